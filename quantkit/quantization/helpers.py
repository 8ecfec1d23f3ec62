"""The further processes of a walk, one a device: started, given the walk, and ended with it.

Each runs the same walk over its own batches, see :mod:`quantkit.engine.crew`. They read what earlier runs saved, and
write nothing: what is solved goes to the process that started them, which alone holds the locks of the outputs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import Batch
from quantkit.engine.crew import Crew
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import LayerResult, SavedChange, Tuned, VariantTask
from quantkit.engine.walk import Walk, WalkSettings
from quantkit.errors import QuantizationError
from quantkit.quantization.solved_layers import Saved, SolvedLayers
from quantkit.schemes import QuantizedWeight
from quantkit.system.artifacts import read_json, write_json
from quantkit.system.child import Child
from quantkit.system.child_log import BoundedLog, last_error
from quantkit.system.free_memory import kept_to
from quantkit.system.memory_bounds import MemoryBounds
from quantkit.system.post import LostError, Post
from quantkit.system.processes import signal_name
from quantkit.system.worker import live_no_longer_than_the_parent

LAST_WORDS = 2.0
"""Seconds that a process has to end before it is told how it did."""
START = f"import sys; from {__name__} import main; sys.exit(main(sys.argv[1:]))"
"""What its interpreter runs; ``-m`` would load this module, which its package imports, for the second time."""
NO_MEMORY = 3
"""Exit code of a helper whose GPU was full when others sent it something."""


@dataclass(frozen=True, slots=True)
class SharedWalk:
    """A walk as it is sent to a helper.

    Attributes:
        source: folder of the float checkpoint.
        trust_remote_code: run Python code that comes with it.
        batches: all of them.
        tasks: each without its sink and memory, and what is saved of it.
        settings: but for the device.
        bounds: what a process may take of each device.
    """

    source: Path
    trust_remote_code: bool
    batches: Sequence[Batch]
    tasks: Sequence[tuple[VariantTask, Saved]]
    settings: WalkSettings
    bounds: MemoryBounds

    def run(self, device: torch.device, crew: Crew) -> None:
        """Walk along as a helper."""
        skeleton = Skeleton(self.source, self.trust_remote_code)
        tasks = []
        for task, saved in self.tasks:
            echo = Echo(saved.layers())
            tasks.append(replace(task, sink=echo, memory=echo))
        settings = replace(self.settings, device=device)
        walk = Walk(skeleton, CheckpointReader(self.source), self.batches, tasks, settings, crew=crew)
        try:
            with kept_to(device, self.bounds):
                walk.run()
        finally:
            if settings.parking is not None:
                settings.parking.close()


class Nowhere:
    """A sink that keeps nothing; see :class:`quantkit.engine.tasks.Sink`."""

    def take(self, result: LayerResult) -> None:
        """Drop it."""

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Drop it."""

    def tuned(self, prefix: str, done: Tuned) -> None:
        """Drop it."""

    def segment_done(self, prefix: str) -> None:
        """Drop it."""


class Echo(Nowhere):
    """The sink and memory of a helper: it knows what is finished, reads what is saved, and keeps nothing itself.

    Args:
        saved: what was there when the walk began.
    """

    def __init__(self, saved: SolvedLayers) -> None:
        self._saved = saved
        self._done: set[str] = set()

    def segment_done(self, prefix: str) -> None:
        """It is finished."""
        self._done.add(prefix)

    def has(self, prefix: str) -> bool:
        """Whether it is."""
        return prefix in self._done or self._saved.has(prefix)

    def weight(self, layer: str) -> QuantizedWeight:
        """As it was saved."""
        return self._saved.weight(layer)

    def changes(self, prefix: str) -> Sequence[SavedChange | None]:
        """As they were saved."""
        return self._saved.changes(prefix)

    def floats(self, prefix: str) -> Mapping[str, torch.Tensor]:
        """As they were saved."""
        return self._saved.floats(prefix)

    def remember_changes(self, prefix: str, changes: Sequence[SavedChange | None]) -> None:
        """The starter of the helper keeps them."""

    def remember_seconds(self, own: float, shared: float) -> None:
        """The starter of the helper keeps them."""


@contextmanager
def crew_on(devices: Sequence[torch.device], walk: SharedWalk) -> Iterator[Crew]:
    """Inside the block there is a process on each of some devices, which walks along; this one has the first.

    Args:
        devices: at least two; several processes may share one.
        walk: what they are to do.

    Raises:
        QuantizationError: one of them ended before its work was done.
    """
    nccl = all(device.type == "cuda" for device in devices) and len(set(devices)) == len(devices)
    with tempfile.TemporaryDirectory(prefix="quantkit-crew-") as scratch, ExitStack() as ends:
        folder, last = Path(scratch), ends.enter_context(ExitStack())
        helpers = [ends.enter_context(_helper(folder, rank, devices, nccl=nccl)) for rank in range(1, len(devices))]
        try:
            post = Post(folder, 0, len(devices), devices[0], nccl=nccl, one_is_gone=lambda: _has_ended(helpers))
            last.callback(post.close)  # when they have ended, for whom it may still wait
            post.exchange(dict.fromkeys(range(1, len(devices)), walk))
            crew = Crew(post)
            yield crew
            with suppress(Exception):  # all is solved, or what ended the walk here ended it there
                crew.gathered(None)  # they have put their things away
        except LostError as error:
            raise _lost(helpers, devices, folder, error) from error.__cause__


@contextmanager
def _helper(folder: Path, rank: int, devices: Sequence[torch.device], *, nccl: bool) -> Iterator[Child]:
    job = folder / f"{rank}.json"
    given = {"rank": rank, "size": len(devices), "device": str(devices[rank]), "nccl": nccl}
    write_json(job, {**given, "threads": torch.get_num_threads()})
    log = BoundedLog(_log(folder, rank))
    command = [sys.executable, "-c", START, str(job)]
    try:
        with Child(command, dict(os.environ), lambda _line: None, log=log) as child:
            yield child
    finally:
        log.close()


def _has_ended(helpers: Sequence[Child]) -> bool:
    return any(child.has_ended() for child in helpers)


def _log(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.log"


def _lost(helpers: Sequence[Child], devices: Sequence[torch.device], folder: Path, error: LostError) -> Exception:
    """Which process ended, and how, in one line."""
    until = time.monotonic() + LAST_WORDS
    while time.monotonic() < until and not _has_ended(helpers):
        time.sleep(LAST_WORDS / 20)
    for rank, child in enumerate(helpers, start=1):
        if child.has_ended():
            child.end(patient=False)
            status = child.process.returncode
            if status == NO_MEMORY:
                return torch.OutOfMemoryError(last_error(_log(folder, rank)))
            how = f"was ended by {signal_name(-status)}" if status < 0 else f"ended with exit code {status}"
            text = f"the process of device {rank + 1} of {len(devices)} ({devices[rank]}) {how}"
            said = last_error(_log(folder, rank))
            return QuantizationError(f"{text}; the last that it said: {said}", "the same command goes on from there")
    return error


def main(arguments: Sequence[str]) -> int:
    """What a helper does; its arguments are the file of its job."""
    live_no_longer_than_the_parent()
    file = Path(arguments[0])
    job: dict[str, Any] = read_json(file)
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    post = Post(file.parent, job["rank"], job["size"], device, nccl=job["nccl"])
    try:
        walk: SharedWalk = post.exchange({})[0]
        crew = Crew(post)
        walk.run(device, crew)
        crew.gathered(None)
    except LostError:
        return 0  # another one is gone, of which the first process tells
    except BaseException as error:  # whatever it is, the others wait to hear of it
        if not post.fail(error):
            traceback.print_exception(error)
            return NO_MEMORY if isinstance(error, torch.OutOfMemoryError) else 1
    return 0
