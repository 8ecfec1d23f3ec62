"""One variant on its way: begun before a walk, written after it."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from quantkit.artifacts import STAGE_FILE, check_writable, new_folder, translated_os_errors, write_stage
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import Task
from quantkit.engine.walk import WalkSettings
from quantkit.errors import QuantizationError
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.quantization.export import Origin, write_checkpoint, write_manifest
from quantkit.quantization.job import DTYPES, STAGE, Job, Quantized, Wanted, made_from
from quantkit.quantization.plan import Layers, plan_layers
from quantkit.quantization.spool import Spool
from quantkit.recipe import VariantSpec


@dataclass(frozen=True, slots=True)
class Underway:
    """A variant that is being quantized."""

    wanted: Wanted
    folder: Path
    layers: Layers
    spool: Spool
    task: Task


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a walk took: the part that all of its variants share, and the one of this variant."""

    shared: float
    own: float
    variants: int


def start(job: Job, skeleton: Skeleton, wanted: Wanted, folders: ExitStack) -> Underway:
    """Plan a variant and make the folder in which its solved layers wait.

    Raises:
        SchemeError: the variant does not suit the model's layers.
        QuantizationError: it needs calibration rows and there are none.
        OutputError: its folder cannot be written.
    """
    variant = wanted.variant
    layers = plan_layers(skeleton, variant)
    method = variant.build_method()
    if method.needs and not job.rows:
        raise QuantizationError(f"{variant.name}: method {variant.method} needs calibration rows", "give a data set")
    check_writable(wanted.out)
    with translated_os_errors(wanted.out):
        wanted.out.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=wanted.out.parent, prefix=f".{wanted.out.name}.spool-")
    folder = Path(folders.enter_context(place))
    spool = Spool(folder, FORMATS.get(variant.format)(job.dtype), layers.embedding)
    task = Task(variant.name, method, layers.quantized, DTYPES[job.dtype], spool, layers.fused)
    return Underway(wanted, folder, layers, spool, task)


def finish(job: Job, skeleton: Skeleton, done: Underway, settings: WalkSettings, seconds: Seconds) -> Quantized:
    """Write the checkpoint of a solved variant."""
    started = time.perf_counter()
    variant, out = done.wanted.variant, done.wanted.out
    store = FORMATS.get(variant.format)(job.dtype)
    identity = made_from(job, variant)
    with new_folder(out) as folder:
        origin = Origin(job.source, skeleton.head.prefix if skeleton.head else None, job.trust_remote_code)
        write_checkpoint(origin, done.spool, store, done.layers, folder)
        own = seconds.own + time.perf_counter() - started
        facts = {
            **_facts(done.layers, done.spool, _remarks(store, done.layers)),
            "seconds": seconds.shared + own,
            "seconds_shared": seconds.shared,
            "seconds_own": own,
            "walk_variants": seconds.variants,
            "strategy": settings.strategy if done.task.method.needs and settings.feed == "quantized" else "none",
        }
        _write_records(folder, job, variant, identity, facts, done.layers)
        write_stage(folder, STAGE, identity, facts=facts)
    return Quantized(out, facts, reused=False)


def _remarks(store: Format, layers: Layers) -> list[str]:
    """What the format has to say of the linear layers, and of a quantized embedding."""
    remarks = store.remarks({scheme for scheme in layers.linears.values() if scheme is not None})
    if layers.embedding is None:
        return list(remarks)
    return list(dict.fromkeys((*remarks, *store.for_embeddings().remarks({layers.quantized[layers.embedding]}))))


def _facts(layers: Layers, spool: Spool, remarks: Sequence[str]) -> dict[str, Any]:
    found = spool.layers()
    notes = list(dict.fromkeys(f"{layer['name']}: {note}" for layer in found for note in layer["notes"]))
    return {
        "bits_per_weight": spool.stored_bytes * 8 / layers.weights(),
        "layers": found,
        "notes": [*remarks, *notes],
    }


def _write_records(
    folder: Path, job: Job, variant: VariantSpec, identity: dict[str, Any], facts: dict[str, Any], layers: Layers
) -> None:
    """The recipe of this checkpoint, and its manifest."""
    text = yaml.safe_dump(variant.resolved(), sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    versions = {name: version(name) for name in ("quantkit", "torch", "transformers", "safetensors", "numpy")}
    write_manifest(
        folder,
        {
            "schema": 1,
            "created_by": f"quantkit {versions['quantkit']}",
            "source": job.source_facts,
            "calibration_sha256": identity["calibration"],
            "feed": identity["feed"],
            "format": variant.format,
            "layers": {name: scheme.to_json() for name, scheme in layers.quantized.items()},
            "embedding": layers.embedding,
            "versions": {"python": platform.python_version(), **versions},
            "bits_per_weight": facts["bits_per_weight"],
            "stage_file": STAGE_FILE,
        },
    )
