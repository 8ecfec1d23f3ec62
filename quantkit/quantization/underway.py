"""One variant on its way: begun before a walk, written after it."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from quantkit.artifacts import STAGE_FILE, check_writable, new_folder, translated_os_errors, write_stage
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import Task
from quantkit.errors import QuantizationError
from quantkit.exports.manifest import write_manifest
from quantkit.exports.writing import check_origin, origin_remarks, write_export
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.publishing import CardFacts, write_card
from quantkit.quantization.export import Origin, content_of
from quantkit.quantization.importance import write_importance
from quantkit.quantization.job import DTYPES, STAGE, Job, Quantized, Wanted, made_from
from quantkit.quantization.plan import Layers, plan_layers
from quantkit.quantization.spool import SolvedLayers
from quantkit.recipe import VariantSpec


@dataclass(frozen=True, slots=True)
class Underway:
    """A variant that is being quantized."""

    wanted: Wanted
    folder: Path
    layers: Layers
    spool: SolvedLayers
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
    check_origin(FORMATS.get(variant.format), job.source)
    with translated_os_errors(wanted.out):
        wanted.out.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=wanted.out.parent, prefix=f".{wanted.out.name}.spool-")
    folder = Path(folders.enter_context(place))
    store = FORMATS.get(variant.format)
    spool = SolvedLayers(folder, store(job.dtype), layers.embedding)
    scale_dtype = DTYPES[store.scale_dtype(job.dtype)]
    task = Task(variant.name, method, layers.quantized, scale_dtype, spool, layers.fused)
    return Underway(wanted, folder, layers, spool, task)


def finish(job: Job, skeleton: Skeleton, done: Underway, strategy: str, seconds: Seconds) -> Quantized:
    """Write the checkpoint of a solved variant."""
    started = time.perf_counter()
    variant, out = done.wanted.variant, done.wanted.out
    store = FORMATS.get(variant.format)(job.dtype)
    identity = made_from(job, variant)
    with new_folder(out) as folder:
        head = skeleton.head.prefix if skeleton.head else None
        origin = Origin(job.source, job.dtype, head, job.trust_remote_code)
        content = content_of(origin, done.spool, done.layers)
        write_export(content, store, folder)
        write_importance(folder, job, content, done.spool.tokens())
        own = seconds.own + time.perf_counter() - started
        facts = {
            **_facts(
                done.layers, done.spool, [*origin_remarks(store, job.source, job.dtype), *_remarks(store, done.layers)]
            ),
            "seconds": seconds.shared + own,
            "seconds_shared": seconds.shared,
            "seconds_own": own,
            "walk_variants": seconds.variants,
            "strategy": strategy if done.task.method.needs and job.feed == "quantized" else "none",
        }
        _write_records(folder, job, variant, identity, facts, done.layers)
        write_card(folder, replace(card_facts(job), repository=out.name))
        write_stage(folder, STAGE, identity, facts=facts)
    return Quantized(out, facts, reused=False)


def card_facts(job: Job) -> CardFacts:
    """What the card of a checkpoint may say of the model that it was made of."""
    name, revision = job.hub or (None, None)
    return CardFacts(base_model=name, revision=revision, source=job.source)


def _remarks(store: Format, layers: Layers) -> list[str]:
    """What the format has to say of the linear layers, and of a quantized embedding."""
    remarks = store.remarks({scheme for scheme in layers.linears.values() if scheme is not None})
    if layers.embedding is None:
        return list(remarks)
    return list(dict.fromkeys((*remarks, *store.for_embeddings().remarks({layers.quantized[layers.embedding]}))))


def _facts(layers: Layers, spool: SolvedLayers, remarks: Sequence[str]) -> dict[str, Any]:
    found = spool.layers()
    notes = list(dict.fromkeys(f"{layer['name']}: {note}" for layer in found for note in layer["notes"]))
    return {
        "bits_per_weight": spool.stored_bytes * 8 / layers.weights() if layers.quantized else 16.0,
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
            "source": {**job.source_facts, "reference": _public(job.source_facts.get("reference"))},
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


def _public(reference: Any) -> Any:
    """A model's reference for others: of one on this machine its name alone."""
    return Path(reference).name if isinstance(reference, str) and Path(reference).expanduser().exists() else reference
