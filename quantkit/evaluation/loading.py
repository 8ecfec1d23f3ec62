"""How a checkpoint is loaded to be scored: whole by a runtime, or a block at a time where the whole would not fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quantkit.engine.kept_calls import OnDisk, on_cpu
from quantkit.errors import EvaluationError
from quantkit.estimation.lines import Part
from quantkit.estimation.measured import held_by, known_anatomy
from quantkit.estimation.streaming import (
    SHARE,
    How,
    Scored,
    fits_whole,
    hidden_line,
    loaded_as,
    tokens_with_room,
    where_activations_wait,
    whole_scoring,
)
from quantkit.evaluation.job import EvaluationJob
from quantkit.evaluation.memory import checkpoint_bytes
from quantkit.evaluation.texts import Windows
from quantkit.recipe.evaluation import AUTO, LOADERS, STREAMED
from quantkit.runtimes._choice import choose_runtime, format_name
from quantkit.runtimes._streamed import TOGETHER, load_streamed
from quantkit.runtimes.base import LoadedModel, LoadOptions, Runtime
from quantkit.system.free_memory import free_bytes
from quantkit.system.scratch import folder_in
from quantkit.system.units import in_units

SURELY = 20
"""A file fits whole without a closer look if so many times its bytes are free: float32 has 16 times those of two
bits."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Loading:
    """Who loads a checkpoint, and how.

    Attributes:
        runtime: that loads it whole.
        streams: it is read a block at a time instead.
        notes: why, if nobody asked for it.
    """

    runtime: type[Runtime]
    streams: bool = False
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a result says of who loaded it."""
        return STREAMED if self.streams else self.runtime.name

    @property
    def weights_are(self) -> str:
        """What the bytes of its weights are of."""
        if self.streams:
            return "one block at a time, decoded to float"
        return f"as loaded by {self.runtime.name}" if self.runtime.packed else "decoded to float"


def choose_loading(job: EvaluationJob, options: LoadOptions, windows: Mapping[str, Windows]) -> Loading:
    """Who loads the checkpoint of a job, and whether it has room for the whole.

    Raises:
        EvaluationError: there is no checkpoint, or the runtime that is asked for cannot score it.
    """
    wanted = AUTO if job.spec.is_served and not job.is_served else job.spec.loader
    runtime = choose_runtime(job.checkpoint, AUTO if wanted in LOADERS else wanted, options.dtype)
    if wanted == STREAMED:
        return Loading(runtime, streams=True)
    device, size = torch.device(options.device), checkpoint_bytes(job.checkpoint)
    free = free_bytes(device, job.bounds)
    if wanted != AUTO or SURELY * size <= SHARE * free:
        return Loading(runtime)
    whole = _whole(job, runtime, options, windows)
    if whole is None or fits_whole(whole, free):
        return Loading(runtime)
    where = "" if device.type == "cpu" else f" on {device}"
    why = f"loaded whole it would take {in_units(whole.nbytes)} of {in_units(free)} that are free{where}"
    return Loading(runtime, streams=True, notes=(f"read a block at a time: {why}",))


def _whole(
    job: EvaluationJob, runtime: type[Runtime], options: LoadOptions, windows: Mapping[str, Windows]
) -> Part | None:
    """What the whole would take; None for a model that transformers does not build by itself."""
    anatomy = known_anatomy(job.checkpoint)
    if anatomy is None:
        return None
    store = format_name(job.checkpoint)
    how: How = "float" if store == "float" else held_by(runtime.name, store, options.dtype).how
    scored = _scored(options, windows, anatomy.dtype)
    loaded = loaded_as(anatomy, scored, how, checkpoint_bytes(job.checkpoint))
    return whole_scoring(anatomy, scored, loaded, pages=False)


def _scored(options: LoadOptions, windows: Mapping[str, Windows], own: str) -> Scored:
    tokens = sum(text.ids.numel() for text in windows.values())
    longest = max(text.ids.shape[1] for text in windows.values())
    return Scored(tokens, longest, options.dtype or own, torch.device(options.device).type)


@contextmanager
def streamed(
    job: EvaluationJob, options: LoadOptions, windows: Mapping[str, Windows]
) -> Iterator[tuple[LoadedModel, list[str]]]:
    """The model of a job to be read a block at a time, and what should be known of it.

    Raises:
        EvaluationError: it cannot be run so, or what its texts hold between blocks has room nowhere.
    """
    anatomy = known_anatomy(job.checkpoint)
    device = torch.device(options.device)
    if anatomy is None:
        yield load_streamed(job.checkpoint, options, None, sum(text.ids.numel() for text in windows.values())), []
        return
    scored = _scored(options, windows, anatomy.dtype)
    on_device, in_memory = free_bytes(device, job.bounds), free_bytes(CPU, job.bounds)
    waiting = where_activations_wait(anatomy, scored, on_device, in_memory)
    needed = hidden_line(anatomy, scored).nbytes
    if waiting != "disk":
        free = on_device if waiting == "device" else in_memory
        together = min(TOGETHER, tokens_with_room(anatomy, scored, waiting, free))
        yield load_streamed(job.checkpoint, options, on_cpu if waiting == "cpu" else None, together), []
        return
    with folder_in(job.bounds.disk or job.scratch, "activations-") as folder:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise EvaluationError(
                f"what the texts hold between blocks takes {in_units(needed)}, more than memory and the disk of "
                f"{folder.parent} have",
                "lower evaluation.max_tokens, or free some disk space",
            )
        note = f"what the texts hold between blocks, {in_units(needed)}, waits on disk"
        together = min(TOGETHER, tokens_with_room(anatomy, scored, waiting, free))
        yield load_streamed(job.checkpoint, options, OnDisk(folder), together), [note]
