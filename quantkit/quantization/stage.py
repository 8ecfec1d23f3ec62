"""Quantize a model into one or more checkpoints: which are there already, and which share a walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError
from quantkit.quantization.job import Job, Quantized, Wanted, finished_variant, made_from
from quantkit.quantization.resume import drop_layers, layers_folder
from quantkit.quantization.solved_variant import Describe
from quantkit.quantization.walk_variants import OnNote, OnSegment, WalkJob, kept, run_walk
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import check_writable
from quantkit.system.locks import alone, lock_file


def quantize(
    job: Job,
    variant: VariantSpec,
    out: Path,
    *,
    describe: Describe | None = None,
    documents: Mapping[str, Any] | None = None,
    on_segment: OnSegment = lambda done, total: None,
    on_note: OnNote = lambda text: None,
) -> Quantized:
    """Quantize one variant into ``out``, or reuse what is there; go on where an earlier run was cut short.

    ``documents`` are JSON files that go along with it.

    Raises:
        SchemeError: the variant does not suit the model's layers.
        CheckpointError: the source is broken, or the result could not be read back.
        QuantizationError: a layer cannot be solved.
        OutputError: ``out`` cannot be written, or another process writes it.
        Terminated: somebody asked to stop, see :mod:`quantkit.system.shutdown`; what was solved is saved.
    """
    wanted = [Wanted(variant, out, documents or {})]
    (found,) = quantize_together(job, wanted, describe=describe, on_segment=on_segment, on_note=on_note)
    if isinstance(found, Exception):
        raise found
    return found


def walks(job: Job, variants: Sequence[VariantSpec]) -> list[list[int]]:
    """Which variants share a walk, by their places: all with float inputs, and all that need no calibration.

    With quantized inputs a calibrated variant has activations of its own and so a walk of its own. With float inputs
    those that are calibrated also on tokens that the float model writes share none with those that are not, those
    that are tuned have batches of their own, of as many tokens as their steps, and passes run through what a transform
    makes of the model where it mixes channels.
    """
    if job.inputs == "float":
        alike: dict[tuple[bool, int | None, str], list[int]] = {}
        for place, variant in enumerate(variants):
            tokens = None if variant.tune is None else variant.tune.batch_tokens
            alike.setdefault((bool(job.generates(variant)), tokens, variant.mixing), []).append(place)
        return list(alike.values())
    free = [place for place, variant in enumerate(variants) if not variant.calibrated]
    alone = [[place] for place in range(len(variants)) if place not in free]
    return sorted([*([free] if free else []), *alone])


def quantize_together(
    job: Job,
    wanted: Sequence[Wanted],
    *,
    describe: Describe | None = None,
    on_segment: OnSegment = lambda done, total: None,
    on_note: OnNote = lambda text: None,
) -> list[Quantized | Exception]:
    """Quantize variants in one walk, or reuse what is there; see :func:`walks` for which can share one.

    Args:
        job: what is quantized.
        wanted: the variants.
        describe: adds to a new checkpoint what is said of it, such as a model card.
        on_segment: called with the number of finished segments and how many there are.
        on_note: called with what the user should know, such as where a variant goes on.

    Returns:
        For each its checkpoint, or the error by which it failed while others went on.
    """
    found: dict[str, Quantized | Exception] = {}
    missing = []
    for each in wanted:
        with kept(found, each.variant.name):
            check_writable(each.out)
            finished = finished_variant(each.out, made_from(job, each.variant))
            if finished is None:
                missing.append(each)
            else:
                found[each.variant.name] = Quantized(each.out, finished["facts"], reused=True)
                _clear_up(each.out)
    if missing:
        walk = WalkJob(job, tuple(missing), describe)
        outcomes = run_walk(walk, on_segment=on_segment, on_note=on_note)
        found |= {each.variant.name: outcome for each, outcome in zip(missing, outcomes, strict=True)}
    return [found[each.variant.name] for each in wanted]


def _clear_up(out: Path) -> None:
    """Remove what a killed run left beside a variant that is finished; whoever is at it clears up himself."""
    if layers_folder(out).exists() or lock_file(out).exists():
        with suppress(OutputError), alone(out, "clearing up"):
            drop_layers(out)
