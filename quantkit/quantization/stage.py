"""Quantize a model into one or more checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.artifacts import check_writable
from quantkit.checkpoint import CheckpointReader
from quantkit.devices import resolve_device
from quantkit.engine.batches import make_batches
from quantkit.engine.precision import pass_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import Task
from quantkit.engine.walk import Strategy, Walk, WalkSettings
from quantkit.quantization.job import DTYPES, Job, Quantized, Wanted, finished_variant, made_from
from quantkit.quantization.plan import choose_strategy
from quantkit.quantization.underway import Seconds, finish, start
from quantkit.recipe import VariantSpec


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
                underway.append(start(job, skeleton, each, folders))
        if not underway:
            return
        tasks = [each.task for each in underway if each.task.schemes]
        walked = _walk(job, skeleton, tasks, on_segment) if tasks else _Walked()
        found.update(walked.failures)
        for done in underway:
            name = done.task.name
            if name not in walked.failures:
                with _kept(found, done.wanted):
                    seconds = Seconds(walked.shared, walked.seconds.get(name, 0.0), max(1, len(tasks)))
                    found[name] = finish(job, skeleton, done, walked.strategy, seconds)


@dataclass(frozen=True, slots=True)
class _Walked:
    """What is left of a walk: which tasks failed, the seconds that all of it took and each task, and its strategy."""

    failures: Mapping[str, Exception] = field(default_factory=dict)
    shared: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    strategy: Strategy = "one-pass"


def _walk(job: Job, skeleton: Skeleton, tasks: Sequence[Task], on_segment: Callable[[int, int], None]) -> _Walked:
    started = time.perf_counter()
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
    shared = time.perf_counter() - started - sum(walk.seconds.values())
    return _Walked(walk.failures, shared, walk.seconds, strategy)


@contextmanager
def _failures_kept(walk: Walk) -> Iterator[None]:
    """What the last task of a walk failed with is among its failures; anything else is not a task's."""
    try:
        yield
    except Exception as error:
        if error not in walk.failures.values():
            raise
