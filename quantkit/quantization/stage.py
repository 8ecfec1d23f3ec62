"""Quantize a model into one or more checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.engine.skeleton import Skeleton
from quantkit.errors import OutputError
from quantkit.quantization.job import Job, Quantized, Wanted, finished_variant, made_from
from quantkit.quantization.resume import drop_spool, spool_folder
from quantkit.quantization.variant import Seconds, Underway, finish, leave, start
from quantkit.quantization.walk_variants import OnNote, OnSegment, walk_all
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import check_writable
from quantkit.system.locks import alone, lock_file


def quantize(
    job: Job,
    variant: VariantSpec,
    out: Path,
    *,
    on_segment: OnSegment = lambda done, total: None,
    on_note: OnNote = lambda text: None,
) -> Quantized:
    """Quantize one variant into ``out``, or reuse what is there; go on where an earlier run was cut short.

    Raises:
        SchemeError: the variant does not suit the model's layers.
        CheckpointError: the source is broken, or the result could not be read back.
        QuantizationError: a layer cannot be solved.
        OutputError: ``out`` cannot be written, or another process writes it.
        Terminated: somebody asked to stop, see :mod:`quantkit.system.shutdown`; what was solved is saved.
    """
    (found,) = quantize_together(job, [Wanted(variant, out)], on_segment=on_segment, on_note=on_note)
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
    job: Job,
    wanted: Sequence[Wanted],
    *,
    on_segment: OnSegment = lambda done, total: None,
    on_note: OnNote = lambda text: None,
) -> list[Quantized | Exception]:
    """Quantize variants in one walk, or reuse what is there; see :func:`walks` for which can share one.

    Args:
        job: what is quantized.
        wanted: the variants.
        on_segment: called with the number of finished segments and how many there are.
        on_note: called with what the user should know, such as where a variant goes on.

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
                _clear_up(each.out)
    if missing:
        _quantize_missing(job, missing, found, on_segment, on_note)
    return [found[each.variant.name] for each in wanted]


@contextmanager
def _kept(found: dict[str, Quantized | Exception], each: Wanted) -> Iterator[None]:
    """An error inside is kept as the outcome of this variant. Any error counts, as methods and formats are plugins."""
    try:
        yield
    except Exception as error:
        found[each.variant.name] = error


def _clear_up(out: Path) -> None:
    """Remove what a killed run left beside a variant that is finished; whoever is at it clears up himself."""
    if spool_folder(out).exists() or lock_file(out).exists():
        with suppress(OutputError), alone(out, "clearing up"):
            drop_spool(out)


def _quantize_missing(
    job: Job,
    missing: Sequence[Wanted],
    found: dict[str, Quantized | Exception],
    on_segment: OnSegment,
    on_note: OnNote,
) -> None:
    """Walk once for all that is missing, then export each."""
    skeleton = Skeleton(job.source, job.trust_remote_code)
    with ExitStack() as locks:
        underway: list[Underway] = []
        for each in missing:
            with _kept(found, each):
                underway.append(start(job, skeleton, each, locks))
        for begun in underway:
            locks.push(partial(_left, begun, found))
        if not underway:
            return
        for note, names in _alike({each.task.name: each.resumed.note for each in underway}).items():
            on_note(f"{', '.join(names)}: {note}")
        walked = walk_all(job, skeleton, underway, on_segment, on_note)
        variants = max(1, sum(bool(each.task.schemes) for each in underway))
        found.update(walked.failures)
        for done in underway:
            name = done.task.name
            if name not in walked.failures:
                with _kept(found, done.wanted):
                    seconds = Seconds(walked.shared, walked.seconds.get(name, 0.0), variants)
                    found[name] = finish(job, skeleton, done, seconds, walked.strategy, walked.notes)


def _left(done: Underway, found: Mapping[str, Quantized | Exception], *raised: Any) -> None:
    """What became of a variant, or what ended the work on all; an exit callback."""
    outcome = found.get(done.task.name)
    leave(done, raised[1] if outcome is None else outcome)


def _alike(notes: Mapping[str, str]) -> dict[str, list[str]]:
    """The notes, each with the names of those that share it."""
    found: dict[str, list[str]] = {}
    for name, note in notes.items():
        if note:
            found.setdefault(note, []).append(name)
    return found
