"""Quantize a model into one or more checkpoints."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from quantkit.formats.base import Format
from quantkit.quantization.export import Origin, is_whole, write_checkpoint, write_manifest
from quantkit.quantization.plan import Layers, choose_strategy, plan_layers
from quantkit.quantization.spool import Spool
from quantkit.recipe import VariantSpec

STAGE = "quantize"
CODE_VERSION = 2
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


@dataclass(frozen=True, slots=True)
class Wanted:
    """A variant and the folder of its checkpoint."""

    variant: VariantSpec
    out: Path


def made_from(job: Job, variant: VariantSpec) -> dict[str, Any]:
    """What a variant's bytes depend on, for its fingerprint."""
    calibrated = bool(variant.build_method().needs)
    settings = {key: value for key, value in variant.resolved().items() if key != "name"}
    return {
        "code": CODE_VERSION,
        "source": job.source_facts,
        "variant": settings,
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
    (found,) = quantize_together(job, [Wanted(variant, out)], on_segment=on_segment)
    if isinstance(found, Exception):
        raise found
    return found


def walks(job: Job, variants: Sequence[VariantSpec]) -> list[list[int]]:
    """Which variants share a walk, by their places: all in a float feed, and all that need no calibration.

    In a quantized feed a calibrated variant has activations of its own and so a walk of its own.
    """
    if job.feed == "float":
        return [list(range(len(variants)))] if variants else []
    free = [place for place, variant in enumerate(variants) if not variant.build_method().needs]
    alone = [[place] for place in range(len(variants)) if place not in free]
    return sorted([*([free] if free else []), *alone])


def quantize_together(
    job: Job, wanted: Sequence[Wanted], *, on_segment: Callable[[int, int], None] = lambda done, total: None
) -> list[Quantized | Exception]:
    """Quantize variants in one walk, or reuse what is there; see :func:`walks` for which can share one.

    Returns:
        For each its checkpoint, or the error by which it failed while others went on.
    """
    found: dict[str, Quantized | Exception] = {}
    missing = []
    for each in wanted:
        with _kept(found, each):
            check_writable(each.out)
            finished = finished_variant(each.out, made_from(job, each.variant))
            if finished is None:
                missing.append(each)
            else:
                found[each.variant.name] = Quantized(each.out, finished["facts"], reused=True)
    if missing:
        _quantize_missing(job, missing, found, on_segment)
    return [found[each.variant.name] for each in wanted]


@contextmanager
def _kept(found: dict[str, Quantized | Exception], each: Wanted) -> Iterator[None]:
    """An error inside is kept as the outcome of this variant. Any error counts, as methods and formats are plugins."""
    try:
        yield
    except Exception as error:
        found[each.variant.name] = error


@dataclass(frozen=True, slots=True)
class _Underway:
    """A variant that is being quantized."""

    wanted: Wanted
    folder: Path
    layers: Layers
    spool: Spool
    task: Task


def _quantize_missing(
    job: Job,
    missing: Sequence[Wanted],
    found: dict[str, Quantized | Exception],
    on_segment: Callable[[int, int], None],
) -> None:
    """Walk once for all that is missing, then export each."""
    skeleton = Skeleton(job.source, job.trust_remote_code)
    with ExitStack() as folders:
        underway = []
        for each in missing:
            with _kept(found, each):
                underway.append(_start(job, skeleton, each, folders))
        if not underway:
            return
        started = time.perf_counter()
        walk = _walk(job, skeleton, [each.task for each in underway], on_segment)
        shared = time.perf_counter() - started - sum(walk.seconds.values())
        found.update(walk.failures)
        for done in underway:
            name = done.task.name
            if name not in walk.failures:
                with _kept(found, done.wanted):
                    seconds = Seconds(shared, walk.seconds.get(name, 0.0), len(underway))
                    found[name] = _finish(job, skeleton, done, walk.settings, seconds)


@dataclass(frozen=True, slots=True)
class Seconds:
    """What a walk took: the part that all of its variants share, and the one of this variant."""

    shared: float
    own: float
    variants: int


def _start(job: Job, skeleton: Skeleton, wanted: Wanted, folders: ExitStack) -> _Underway:
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
    return _Underway(wanted, folder, layers, spool, task)


def _walk(job: Job, skeleton: Skeleton, tasks: Sequence[Task], on_segment: Callable[[int, int], None]) -> Walk:
    device = resolve_device(job.device)
    dtype = pass_dtype(device, DTYPES[job.dtype])
    calibrated = any(task.method.needs for task in tasks)
    rows = job.rows if calibrated else ()
    batches = make_batches(rows, device, may_pad=not skeleton.has_routed_layers())
    strategy = choose_strategy(skeleton, sum(map(len, rows)), dtype, device) if calibrated else "one-pass"
    feed = job.feed if calibrated else "float"
    walk = Walk(
        skeleton, CheckpointReader(job.source), batches, tasks, WalkSettings(device, dtype, feed, strategy), on_segment
    )
    with _failures_kept(walk):
        walk.run()
    return walk


@contextmanager
def _failures_kept(walk: Walk) -> Iterator[None]:
    """What the last task of a walk failed with is among its failures; anything else is not a task's."""
    try:
        yield
    except Exception as error:
        if error not in walk.failures.values():
            raise


def _finish(job: Job, skeleton: Skeleton, done: _Underway, settings: WalkSettings, seconds: Seconds) -> Quantized:
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
    if device.type not in ("cpu", "cuda"):
        raise QuantizationError(f"quantkit computes on cpu and cuda, not on '{wanted}'", "use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise QuantizationError(f"device {wanted} is not available", "use auto or cpu")
    return device
