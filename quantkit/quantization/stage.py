"""Quantize a model into one or more checkpoints."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from quantkit.artifacts import STAGE_FILE, check_writable, new_folder, read_stage, translated_os_errors, write_stage
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import make_batches
from quantkit.engine.precision import pass_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import Task
from quantkit.engine.walk import Feed, Walk, WalkSettings
from quantkit.errors import QuantizationError
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.quantization.export import Origin, is_whole, write_checkpoint, write_manifest
from quantkit.quantization.plan import Layers, choose_strategy, plan_layers
from quantkit.quantization.spool import Spool
from quantkit.recipe import VariantSpec

STAGE = "quantize"
CODE_VERSION = 1
"""Part of the fingerprint: raised when the same inputs would give other bytes."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Job:
    """What is quantized, for all variants alike.

    Attributes:
        source: folder of the float checkpoint.
        source_facts: what identifies it, and how the manifest names it.
        dtype: of the checkpoint, in which scales are stored: ``float32``, ``float16`` or ``bfloat16``.
        rows: calibration token ids; empty if no method needs them.
        calibration_sha256: of the token ids.
        feed: see :class:`quantkit.recipe.CalibrationSpec`.
        device: ``auto`` is CUDA where there is one.
        trust_remote_code: run Python code that comes with the model.
    """

    source: Path
    source_facts: dict[str, Any]
    dtype: str
    rows: Sequence[Sequence[int]] = ()
    calibration_sha256: str | None = None
    feed: Feed = "quantized"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Quantized:
    """A finished variant.

    Attributes:
        folder: the checkpoint.
        facts: of ``stage.json``: ``bits_per_weight``, ``seconds``, ``layers``, ``notes``, ``strategy``.
        reused: it was already there.
    """

    folder: Path
    facts: dict[str, Any]
    reused: bool


def made_from(job: Job, variant: VariantSpec) -> dict[str, Any]:
    """What a variant's bytes depend on, for its fingerprint."""
    calibrated = bool(METHODS.get(variant.method).needs)
    settings = variant.model_dump(mode="json", exclude={"name"})
    return {
        "code": CODE_VERSION,
        "source": job.source_facts,
        "variant": {**settings, "options": variant.method_options().model_dump(mode="json")},
        "calibration": job.calibration_sha256 if calibrated else None,
        "feed": job.feed if calibrated else None,
    }


def finished_variant(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The ``stage.json`` of a whole variant in ``out`` made from exactly ``identity``, or None."""
    finished = read_stage(out, STAGE, identity)
    return finished if finished is not None and is_whole(out) else None


def quantize(
    job: Job,
    variant: VariantSpec,
    out: Path,
    *,
    on_segment: Callable[[int, int], None] = lambda done, total: None,
) -> Quantized:
    """Quantize one variant into ``out``, or reuse what is there.

    Raises:
        SchemeError: the variant does not suit the model's layers.
        CheckpointError: the source is broken, or the result could not be read back.
        QuantizationError: a layer cannot be solved.
        OutputError: ``out`` cannot be written.
    """
    check_writable(out)
    identity = made_from(job, variant)
    finished = finished_variant(out, identity)
    if finished is not None:
        return Quantized(out, finished["facts"], reused=True)
    started = time.perf_counter()
    skeleton = Skeleton(job.source, job.trust_remote_code)
    layers = plan_layers(skeleton, variant)
    with new_folder(out) as folder:
        with translated_os_errors(out):
            spool_folder = Path(tempfile.mkdtemp(dir=folder, prefix=".spool-"))
        store = FORMATS.get(variant.format)()
        spool = Spool(spool_folder, store)
        strategy = _walk(job, variant, skeleton, layers, spool, on_segment)
        origin = Origin(job.source, skeleton.head.prefix if skeleton.head else None, job.trust_remote_code)
        write_checkpoint(origin, spool, store, layers.schemes, folder)
        shutil.rmtree(spool_folder)
        remarks = store.remarks(set(layers.quantized.values()))
        facts = _facts(layers, spool, time.perf_counter() - started, strategy, remarks)
        _write_records(folder, job, variant, identity, facts)
        write_stage(folder, STAGE, identity, facts=facts)
    return Quantized(out, facts, reused=False)


def _walk(
    job: Job,
    variant: VariantSpec,
    skeleton: Skeleton,
    layers: Layers,
    spool: Spool,
    on_segment: Callable[[int, int], None],
) -> str:
    device = resolve_device(job.device)
    stored = DTYPES[job.dtype]
    method = METHODS.get(variant.method)
    task = Task(variant.name, method(variant.method_options()), layers.quantized, stored, spool)
    calibrated = bool(method.needs)
    if calibrated and not job.rows:
        raise QuantizationError(f"{variant.name}: method {variant.method} needs calibration rows", "give a data set")
    dtype = pass_dtype(device, stored)
    batches = make_batches(job.rows, device, may_pad=not skeleton.has_routed_layers()) if calibrated else []
    strategy = choose_strategy(skeleton, sum(map(len, job.rows)), dtype, device) if calibrated else "one-pass"
    settings = WalkSettings(device, dtype, job.feed, strategy)
    Walk(skeleton, CheckpointReader(job.source), batches, [task], settings, on_segment).run()
    return strategy if calibrated and job.feed == "quantized" else "none"


def _facts(layers: Layers, spool: Spool, seconds: float, strategy: str, remarks: Sequence[str]) -> dict[str, Any]:
    found = spool.layers()
    notes = list(dict.fromkeys(f"{layer['name']}: {note}" for layer in found for note in layer["notes"]))
    return {
        "bits_per_weight": spool.stored_bytes * 8 / layers.weights(),
        "seconds": seconds,
        "strategy": strategy,
        "layers": found,
        "notes": [*remarks, *notes],
    }


def _write_records(
    folder: Path, job: Job, variant: VariantSpec, identity: dict[str, Any], facts: dict[str, Any]
) -> None:
    """The recipe of this checkpoint, and its manifest."""
    text = yaml.safe_dump(
        variant.model_dump(mode="json") | {"options": identity["variant"]["options"]}, sort_keys=False
    )
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
            "versions": {"python": platform.python_version(), **versions},
            "bits_per_weight": facts["bits_per_weight"],
            "stage_file": STAGE_FILE,
        },
    )


def resolve_device(wanted: str) -> torch.device:
    """The device of a recipe; ``auto`` is CUDA where there is one.

    Raises:
        QuantizationError: the device is not there.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise QuantizationError(f"'{wanted}' is not a device", "use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise QuantizationError(f"device {wanted} is not available", "use auto or cpu")
    return device
