"""One walk for variants that share one, from a description that can be sent anywhere to their checkpoints.

Where the memory of the GPU runs out the walk is tried again with less, see :mod:`quantkit.quantization.oom`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.batches import Batch
from quantkit.engine.crew import ALONE, Crew
from quantkit.engine.dtype_trial import dtype_that_runs
from quantkit.engine.precision import pass_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import VariantTask
from quantkit.engine.walk import Strategy, Walk, WalkSettings
from quantkit.errors import QuantizationError
from quantkit.quantization.generated import written_for
from quantkit.quantization.helpers import Nowhere, SharedWalk, crew_on
from quantkit.quantization.job import Job, Quantized, Wanted, Written
from quantkit.quantization.memory_use import choose_parking, choose_strategy, experts_room
from quantkit.quantization.oom import FallbackStep, fallback_steps, out_of_memory, ran_out
from quantkit.quantization.sensitivity import known_sensitivity
from quantkit.quantization.solved_layers import SolvedLayers
from quantkit.quantization.solved_variant import Describe, WalkFacts
from quantkit.quantization.solving_notes import loop_notes
from quantkit.quantization.variant import VariantRun
from quantkit.system.devices import resolve_device, resolve_devices
from quantkit.system.free_memory import kept_to
from quantkit.system.shutdown import heed, patient

OnSegment = Callable[[int, int], None]
OnNote = Callable[[str], None]
FEWEST_BATCHES = 8
"""Into as many batches rows are divided at least where segments are tuned, as far as there are rows."""


@dataclass(frozen=True, slots=True)
class WalkJob:
    """All that a walk needs: no live model, no open file, no lock, so that it can be pickled and run elsewhere.

    Attributes:
        job: what is quantized, with the calibration rows and the name of the device.
        wanted: the variants that share the walk, and where each goes.
        describe: see :func:`quantkit.quantization.quantize_together`.
    """

    job: Job
    wanted: tuple[Wanted, ...]
    describe: Describe | None = None


def run_walk(
    walk: WalkJob,
    *,
    on_segment: OnSegment = lambda done, total: None,
    on_note: OnNote = lambda text: None,
) -> list[Quantized | Exception]:
    """Begin all variants of a walk, solve their layers, and write each.

    One walk a process: the garbage collector and the precision of float32 products are settings of the process, which
    the engine changes while it computes and then puts back.

    Args:
        walk: what to do.
        on_segment: called with the number of finished segments and how many there are.
        on_note: called with what the user should know.

    Returns:
        For each variant its checkpoint, or the error by which it failed while others went on.

    Raises:
        CheckpointError: the source is broken.
        QuantizationError: the memory of the GPU is too small whatever is tried.
        Terminated: somebody asked to stop.
    """
    found = dict[str, Quantized | Exception]()
    skeleton = Skeleton(walk.job.source, walk.job.trust_remote_code)
    skeleton.check_blocks()
    with ExitStack() as ends:
        job, runs = _begun(walk, skeleton, ends, found, on_note)
        for run in runs:
            ends.push(partial(_leave, run, found))
        told = {run.name: [*filter(None, [run.resumed.note]), *run.told()] for run in runs}
        for note, names in _alike(told).items():
            on_note(f"{', '.join(names)}: {note}")
        walked = _solve(job, skeleton, runs, on_segment, on_note)
        skeleton.unload_frame()  # the embedding, beside what is written
        found.update(walked.failures)
        for run in runs:
            if run.name not in walked.failures:
                with kept(found, run.name):
                    found[run.name] = run.finish(walked.facts(run.name), walk.describe or _as_it_is)
    return [found[each.variant.name] for each in walk.wanted]


def _begun(
    walk: WalkJob,
    skeleton: Skeleton,
    ends: ExitStack,
    found: MutableMapping[str, Quantized | Exception],
    on_note: OnNote,
) -> tuple[Job, list[VariantRun]]:
    """The variants of a walk that can be begun, and the job with the rows that the float model writes for them."""
    runs, begun = [], []
    for each in walk.wanted:
        with kept(found, each.variant.name):
            run = VariantRun(walk.job, skeleton, each)
            run.lock(ends)
            runs.append(run)
    calibrated = [run for run in runs if run.wanted.variant.calibrated]
    written = Written()
    try:
        variants, stores = [run.wanted.variant for run in calibrated], [run.store for run in calibrated]
        written = written_for(walk.job, skeleton, variants, stores, on_note)
    except QuantizationError as error:
        found.update(dict.fromkeys([run.name for run in calibrated], error))
    for run in runs:
        if run.name not in found:
            with kept(found, run.name):
                run.begin(written)
                begun.append(run)
    return replace(walk.job, written=written), begun


@contextmanager
def kept(found: MutableMapping[str, Any], name: str) -> Iterator[None]:
    """An error inside is kept as the outcome of a variant. Any error counts, as methods and formats are plugins."""
    try:
        yield
    except Exception as error:  # methods and formats are plugins, which may raise anything
        found[name] = error


def _leave(run: VariantRun, found: Mapping[str, Quantized | Exception], *raised: Any) -> None:
    """Leave a variant with what became of it, or with what ended the work on all; an exit callback."""
    outcome = found.get(run.name)
    run.leave(raised[1] if outcome is None else outcome)


def _as_it_is(*_: Any) -> None:
    """Add nothing to a checkpoint."""


def _alike(notes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The notes, each with the names of those that share it."""
    found: dict[str, list[str]] = {}
    for name, own in notes.items():
        for note in own:
            found.setdefault(note, []).append(name)
    return found


@dataclass(slots=True)
class _Walked:
    """What is left of a walk.

    Attributes:
        variants: how many of them it solved layers of; at least one.
        failures: by name the variants that failed while others went on.
        shared: seconds of all that the variants share.
        seconds: by name the seconds of each variant's own work.
        strategy: as it was in the end.
        notes: what the user should know of every variant.
    """

    variants: int
    failures: dict[str, Exception] = field(default_factory=dict)
    shared: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    strategy: Strategy = "one-pass"
    notes: list[str] = field(default_factory=list)

    def add(self, walk: Walk, elapsed: float) -> None:
        """Count what a walk did, to its end or not."""
        self.failures |= walk.failures
        self.shared += elapsed - sum(walk.seconds.values())
        for name, seconds in walk.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def facts(self, name: str) -> WalkFacts:
        """What it was for a variant."""
        return WalkFacts(self.shared, self.seconds.get(name, 0.0), self.variants, self.strategy, self.notes)


def _solve(job: Job, skeleton: Skeleton, runs: Sequence[VariantRun], on_segment: OnSegment, on_note: OnNote) -> _Walked:
    """Solve all layers of variants that share a walk, with less memory each time that it runs out."""
    tasks = [run.task for run in runs if run.layers.quantized]
    found = _Walked(max(1, len(tasks)))
    if not tasks:
        return found
    device = resolve_device(job.device)
    calibrated = any(task.calibrated for task in tasks)
    inputs = job.inputs if calibrated else "float"
    dtype = pass_dtype(device, FLOATS[job.dtype])
    if calibrated:
        wanted, dtype = dtype, dtype_that_runs(skeleton, CheckpointReader(job.source), device, dtype, job.rows)
        if dtype != wanted:
            found.notes.append("calibration computes in float32: the model's code does not run in bfloat16 here")
            on_note(found.notes[-1])
    for note in loop_notes(device, {(task.method, each) for task in tasks for each in task.schemes.values()}):
        found.notes.append(note)
        on_note(note)
    tokens = job.all_tokens if calibrated else 0
    corrected, tuned = any(task.method.corrects for task in tasks), any(task.tune is not None for task in tasks)
    takes = (skeleton, tokens, dtype, device, corrected and inputs == "quantized", tuned, job.bounds)
    strategy = choose_strategy(*takes) if calibrated else "one-pass"
    before = min((tokens for run in runs for tokens in run.solved.batch_tokens), default=None)
    for step in fallback_steps(device, strategy, inputs, calibrated=calibrated, batch_tokens=before):
        if step.says:
            found.notes.append(ran_out(step, device))
            on_note(found.notes[-1])
        parking, told = choose_parking(*takes, runs[0].store, always=step.offload) if calibrated else (None, "")
        if told and not step.offload:
            on_note(told)
        for run in runs:
            with kept(found.failures, run.name):
                run.begin_walk(step.batch_tokens)
        left = [task for task in tasks if task.name not in found.failures]
        settings = WalkSettings(
            device,
            dtype,
            inputs,
            step.strategy,
            parking,
            tries_again=not step.is_last,
            experts=job.experts,
            room=experts_room(device, job.bounds) // step.parts if calibrated else None,
        )
        if _is_done(job, skeleton, left, settings, step, found, on_segment, on_note):
            break
    return found


def _is_done(
    job: Job,
    skeleton: Skeleton,
    tasks: Sequence[VariantTask],
    settings: WalkSettings,
    step: FallbackStep,
    found: _Walked,
    on_segment: OnSegment,
    on_note: OnNote,
) -> bool:
    """Walk once; false where the memory of the GPU ran out and less is to be tried."""
    places = [*skeleton.segments, *([skeleton.head] if skeleton.head else [])]
    left = [task for task in tasks if any(task.lacks(each.prefix, each.linears) for each in places)]
    reader = CheckpointReader(job.source)

    def done(segments: int, total: int) -> None:
        on_segment(segments, total)
        heed()

    started = time.perf_counter()
    found.strategy = step.strategy
    batches: list[Batch] = []
    if any(task.calibrated for task in left):
        limit = batch_limit(tasks, job.all_tokens, step.batch_tokens)
        tuned = any(task.tune is not None or task.learns for task in tasks)  # a step of few tokens would say little
        batches = job.batches(skeleton, reader, settings.device, settings.dtype, limit, ends_short=not tuned)
    settings = replace(settings, sensitivity=known_sensitivity(job.sensitivity, batches))
    walk: Walk | None = None
    try:
        with patient(), kept_to(settings.device, job.bounds), _crew(job, tasks, batches, settings, on_note) as crew:
            walk = Walk(skeleton, reader, batches, tasks, settings, done, crew)
            with _failures_kept(walk):
                walk.run()
    except torch.OutOfMemoryError as error:
        if step.is_last:
            raise out_of_memory(error, settings.device) from error
        ran_out_here = True
    else:
        ran_out_here = False
    finally:
        if walk is not None:
            found.add(walk, time.perf_counter() - started)
        if settings.parking is not None:
            settings.parking.close()
    _name_exhausted(found.failures, settings.device)
    if ran_out_here:
        del walk, batches
        _let_go(settings.device)
    return not ran_out_here


@contextmanager
def _crew(
    job: Job, tasks: Sequence[VariantTask], batches: Sequence[Batch], settings: WalkSettings, on_note: OnNote
) -> Iterator[Crew]:
    """The processes that walk together, on the devices of the job; this one alone where there is nothing to deal."""
    asked, dealt = len(resolve_devices(job.device, job.devices)), walk_devices(job, tasks)
    devices = dealt[: max(1, len(batches))]
    if len(devices) < asked and batches:
        few = f"it has no more than {len(devices)} batch{'' if len(devices) == 1 else 'es'}"
        why = few if len(dealt) == asked else "what tunes or learns goes from batch to batch"
        on_note(f"the walk takes {len(devices)} of {asked} devices: {why}")
    if len(devices) < 2:
        yield ALONE
        return
    sent = []
    for task in tasks:
        if not isinstance(task.memory, SolvedLayers):
            raise TypeError(f"{task.name} keeps what is solved where no other process can read it")
        sent.append((replace(task, sink=Nowhere(), memory=None), task.memory.saved()))
    walk = SharedWalk(job.source, job.trust_remote_code, batches, sent, settings, job.bounds)
    with crew_on(devices, walk) as crew:
        yield crew


def walk_devices(job: Job, tasks: Sequence[VariantTask]) -> list[torch.device]:
    """The devices over which a walk is dealt: those of the job, or its first where the walk cannot be.

    Tuning and transforms that learn go from batch to batch, and without calibration there is nothing to deal.
    """
    devices = resolve_devices(job.device, job.devices)
    dealt = any(task.calibrated for task in tasks) and not any(task.tune is not None or task.learns for task in tasks)
    return devices if dealt else devices[:1]


def batch_limit(tasks: Sequence[VariantTask], tokens: int, limit: int) -> int:
    """Tokens of a batch at most.

    Args:
        tasks: of the walk; those that tune take one batch a step, and hold some batches out.
        tokens: of all rows.
        limit: what memory allows.
    """
    asked = [task.tune.batch_tokens for task in tasks if task.tune is not None]
    few = asked or any(task.learns for task in tasks)
    return min([limit, *asked, *([max(1, tokens // FEWEST_BATCHES)] if few else [])])


def _name_exhausted(failures: dict[str, Exception], device: torch.device) -> None:
    """Where a task's own work did not fit, say so in one line with the numbers."""
    for name, error in failures.items():
        if isinstance(error, torch.OutOfMemoryError):
            failures[name] = out_of_memory(error, device, f"{name}: ")
            failures[name].__cause__ = error


def _let_go(device: torch.device) -> None:
    """Give back what an ended walk held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _failures_kept(walk: Walk) -> Iterator[None]:
    """What the last task of a walk failed with is among its failures; anything else is not a task's."""
    try:
        yield
    except Exception as error:  # what is no failure of a variant is raised again below
        if error not in walk.failures.values():
            raise
