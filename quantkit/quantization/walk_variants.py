"""One walk for variants that share one, tried again with less where the memory of the GPU runs out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import make_batches
from quantkit.engine.precision import pass_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import Task
from quantkit.engine.walk import Strategy, Walk, WalkSettings
from quantkit.quantization.job import DTYPES, Job
from quantkit.quantization.oom import Rung, out_of_memory, ran_out, rungs
from quantkit.quantization.plan import choose_strategy
from quantkit.quantization.variant import Underway
from quantkit.system.devices import resolve_device
from quantkit.system.shutdown import heed, patient

OnSegment = Callable[[int, int], None]
OnNote = Callable[[str], None]


@dataclass(slots=True)
class Walked:
    """What is left of a walk.

    Attributes:
        failures: by name the tasks that failed while others went on.
        shared: seconds of all that the tasks share.
        seconds: by name the seconds of each task's own work.
        strategy: as it was in the end.
        notes: what the user should know of every variant.
    """

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


def walk_all(
    job: Job, skeleton: Skeleton, underway: Sequence[Underway], on_segment: OnSegment, on_note: OnNote
) -> Walked:
    """Solve all layers of variants that share a walk.

    Raises:
        CheckpointError: the source is broken.
        QuantizationError: the memory of the GPU is too small whatever is tried.
        Terminated: somebody asked to stop.
    """
    found = Walked()
    tasks = [each.task for each in underway if each.task.schemes]
    if not tasks:
        return found
    device = resolve_device(job.device)
    calibrated = any(task.method.needs for task in tasks)
    feed = job.feed if calibrated else "float"
    dtype = pass_dtype(device, DTYPES[job.dtype])
    tokens = sum(map(len, job.rows)) if calibrated else 0
    strategy = choose_strategy(skeleton, tokens, dtype, device) if calibrated else "one-pass"
    for rung in rungs(device, strategy, feed, calibrated=calibrated):
        if rung.says:
            found.notes.append(ran_out(rung, device))
            on_note(found.notes[-1])
        left = [task for task in tasks if task.name not in found.failures]
        settings = WalkSettings(device, dtype, feed, rung.strategy, rung.offload, tries_again=not rung.is_last)
        if _is_done(job, skeleton, left, settings, rung, found, on_segment):
            break
        for each in underway:
            each.spool.forget_unfinished()
    return found


def _is_done(
    job: Job,
    skeleton: Skeleton,
    tasks: Sequence[Task],
    settings: WalkSettings,
    rung: Rung,
    found: Walked,
    on_segment: OnSegment,
) -> bool:
    """Walk once; false where the memory of the GPU ran out and less is to be tried."""
    rows = job.rows if any(task.method.needs for task in tasks) else ()
    may_pad = not skeleton.has_routed_layers()

    def done(segments: int, total: int) -> None:
        on_segment(segments, total)
        heed()

    started = time.perf_counter()
    found.strategy = rung.strategy
    batches = make_batches(rows, settings.device, may_pad, rung.batch_tokens)
    walk = Walk(skeleton, CheckpointReader(job.source), batches, tasks, settings, done)
    try:
        with _failures_kept(walk), patient():
            walk.run()
    except torch.OutOfMemoryError as error:
        if rung.is_last:
            raise out_of_memory(error, settings.device) from error
        ran_out_here = True
    else:
        ran_out_here = False
    finally:
        found.add(walk, time.perf_counter() - started)
    _name_exhausted(found.failures, settings.device)
    if ran_out_here:
        del walk, batches
        _let_go(settings.device)
    return not ran_out_here


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
    except Exception as error:
        if error not in walk.failures.values():
            raise
