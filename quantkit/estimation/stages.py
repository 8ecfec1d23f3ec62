"""What each stage of a run takes, and how it gets by with the memory there is: by the rules that the stages follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.backward import backward, training_back
from quantkit.estimation.lines import Line, Part
from quantkit.estimation.quantizing import quantizing
from quantkit.estimation.streaming import (
    Loaded,
    Scored,
    fits_whole,
    streamed_scoring,
    where_activations_wait,
    whole_scoring,
)
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored
from quantkit.formats.base import BYTES
from quantkit.quantization.memory_use import SPARE_MEMORY, paused_bytes, waiting_bytes
from quantkit.recipe import RecoverOptions, VariantSpec
from quantkit.recipe.evaluation import AUTO, STREAMED
from quantkit.system.units import in_units

TOGETHER = 1 << 15
"""Tokens whose inputs of blocks wait together while the float model tells a training what to reach."""


@dataclass(frozen=True, slots=True)
class Room:
    """The memory there is.

    Attributes:
        device: ``cpu`` or ``cuda``.
        free: bytes of it.
        cpu: bytes of the CPU's memory; the same where that is the device.
    """

    device: str
    free: int
    cpu: int


@dataclass(frozen=True, slots=True)
class StageNeed:
    """What a stage takes.

    Attributes:
        stage: its title.
        device: ``cpu`` or ``cuda``.
        part: what lies on the device at the widest moment; None where a library alone knows.
        how: how it gets by.
        least: bytes of the device with which it would still get by; 0 where that is not known.
        beside: bytes of the CPU's memory while it computes on a GPU.
        disk: bytes that it leaves, or needs meanwhile, on disk.
        process: bytes of the device that a process takes before the stage: Python and its packages, on a CPU.
    """

    stage: str
    device: str
    part: Part | None
    how: str = ""
    least: int = 0
    beside: int = 0
    disk: int = 0
    process: int = 0

    @property
    def nbytes(self) -> int | None:
        """Of the device."""
        return None if self.part is None else self.part.nbytes

    def to_json(self) -> dict[str, Any]:
        """``stage``, ``device``, ``bytes``, ``how``, ``least_bytes``, ``cpu_bytes``, ``disk_bytes``, ``process_bytes``
        and ``lines``.
        """
        return {
            "stage": self.stage,
            "device": self.device,
            "bytes": self.nbytes,
            "how": self.how,
            "least_bytes": self.least,
            "cpu_bytes": self.beside,
            "disk_bytes": self.disk,
            "process_bytes": self.process,
            "lines": [] if self.part is None else [line.to_json() for line in self.part.lines],
        }


def walk_need(
    stage: str, anatomy: Anatomy, planned: Sequence[tuple[VariantSpec, Stored]], use: Use, room: Room
) -> StageNeed:
    """A walk of variants that share one, by the rules of :mod:`quantkit.quantization.memory_use`.

    Args:
        stage: its title.
        anatomy: the model.
        planned: its variants, each with its file.
        use: calibration tokens and inputs; the strategy is told here.
        room: the memory there is.
    """
    written = sum(file.nbytes for _, file in planned)
    packed = sum(each.nbytes for _, file in planned for each in file.packed.values())
    calibrated = any(variant.calibrated for variant, _ in planned)
    how = "weights only"
    beside = waiting = on_disk = 0
    least = use.model_copy(update={"strategy": "recompute", "waiting": 0})
    if calibrated:
        use, how, waiting = getting_by(anatomy, [variant for variant, _ in planned], use, room)
    if use.waiting is not None:
        kept = int(SPARE_MEMORY * room.cpu)
        beside, on_disk = (min(waiting, kept) if room.device != "cpu" else 0), max(0, waiting - kept)
    parts = [quantizing(anatomy, variant, file, use) for variant, file in planned]
    tuned = any(variant.tune is not None for variant, _ in planned)
    smallest = max(quantizing(anatomy, variant, file, use if tuned else least).nbytes for variant, file in planned)
    largest = max(parts, key=lambda part: part.nbytes)
    return StageNeed(stage, room.device, largest, how, smallest, beside, written + packed + on_disk)


def getting_by(anatomy: Anatomy, variants: Sequence[VariantSpec], use: Use, room: Room) -> tuple[Use, str, int]:
    """How a walk gets by: the use with its strategy, that in words, and bytes that wait between blocks.

    Args:
        anatomy: the model.
        variants: of the walk.
        use: calibration tokens, inputs and device.
        room: the memory there is.
    """
    from quantkit.engine.twins import paired_tokens

    tokens, size = use.calibration_tokens, BYTES[use.pass_dtype or "bfloat16"]
    corrected = use.inputs == "quantized" and any(variant.build_method().corrects for variant in variants)
    paired = paired_tokens(tokens, use.device) if corrected else 0
    widest = max((shape[1] for shape, _ in anatomy.linears().values()), default=anatomy.hidden)
    paused = paused_bytes(widest, anatomy.hidden, tokens, size, paired)
    waiting = waiting_bytes(anatomy.hidden, tokens, size, paired)
    if any(variant.tune is not None for variant in variants):
        return use.model_copy(update={"strategy": "recompute"}), "a run of each block for every group, tuned", waiting
    fits = use.inputs == "float" or paused <= SPARE_MEMORY * room.free
    strategy = "one-pass" if fits else "recompute"
    words = "one walk for all" if use.inputs == "float" else "one pass" if fits else "each block anew for every group"
    if use.inputs == "quantized" and any(each.block == anatomy.largest and each.share < 1 for each in anatomy.weights):
        words = "each block anew for every group, as it has experts"
    if waiting <= SPARE_MEMORY * room.free:
        return use.model_copy(update={"strategy": strategy}), words, waiting
    kept = int(SPARE_MEMORY * room.cpu)
    place = "in the CPU's memory" if waiting <= kept else "on disk, what the CPU's memory does not take"
    held = min(waiting, kept) if room.device == "cpu" else 0
    moved = use.model_copy(update={"strategy": "recompute", "waiting": held})
    return moved, f"{words}; activations ({in_units(waiting)}) wait {place}", waiting


def scoring_need(
    stage: str,
    anatomy: Anatomy,
    scored: Scored,
    room: Room,
    *,
    loaded: Loaded | None = None,
    disk: int = 0,
    loader: str = AUTO,
) -> StageNeed:
    """The scoring of a model.

    Args:
        stage: its title.
        anatomy: the model.
        scored: what is scored.
        room: the memory there is.
        loaded: what is held of it where it is loaded whole; None for a float checkpoint.
        disk: bytes that it writes.
        loader: see :class:`quantkit.recipe.EvaluationSpec`.
    """
    whole, packed = whole_scoring(anatomy, scored, loaded), loaded is not None
    waits = where_activations_wait(anatomy, scored, room.free, room.cpu)
    streamed = streamed_scoring(anatomy, scored, packed=packed, waiting=waits)
    least = streamed_scoring(anatomy, scored, packed=packed, waiting="disk").nbytes
    if loader not in (AUTO, STREAMED):
        return StageNeed(stage, room.device, whole, "loaded whole", whole.nbytes, disk=disk)
    if loader == AUTO and fits_whole(whole_scoring(anatomy, scored, loaded, pages=False), room.free):
        return StageNeed(stage, room.device, whole, "loaded whole", min(least, whole.nbytes), disk=disk)
    where = {"device": "beside it", "cpu": "in the CPU's memory", "disk": "on disk"}[waits]
    return StageNeed(stage, room.device, streamed, f"a block at a time, activations {where}", least, disk=disk)


def sensitivity_need(stage: str, anatomy: Anatomy, use: Use, room: Room) -> StageNeed:
    """The pass forward and backward by which it is told what the model's loss minds."""
    size = BYTES[use.pass_dtype or "bfloat16"]
    kept = use.calibration_tokens * anatomy.hidden * anatomy.blocks * size
    least = backward(anatomy, use, kept=False).nbytes
    for place, free in (("on the device", room.free), ("in the CPU's memory", room.cpu)):
        if kept <= SPARE_MEMORY * free:
            inside = place == "on the device" or room.device == "cpu"
            part = backward(anatomy, use, kept=inside)
            how = f"inputs of all blocks {'in memory' if room.device == 'cpu' else place}"
            return StageNeed(stage, room.device, part, how, least, beside=0 if inside else kept)
    part = backward(anatomy, use, kept=False)
    return StageNeed(stage, room.device, part, "inputs of all blocks on disk", least, disk=kept)


def recover_need(
    stage: str, anatomy: Anatomy, file: Stored, options: RecoverOptions, use: Use, room: Room
) -> StageNeed:
    """A training of a file, whose blocks are held forward and back as far as there is room, else one at a time."""
    least = training_back(anatomy, file, options, use).nbytes
    part = training_back(anatomy, file, options, use, int(SPARE_MEMORY * room.free))
    targets = use.calibration_tokens * anatomy.hidden * BYTES[use.pass_dtype or "bfloat16"]
    return StageNeed(stage, room.device, part, "blocks held while there is room", least, disk=targets + file.nbytes)


def copying_need(stage: str, title: str, largest: int, copies: int, disk: int) -> StageNeed:
    """A stage that handles a tensor at a time.

    Args:
        stage: its title.
        title: what it does.
        largest: bytes of the largest tensor.
        copies: of it, at once.
        disk: bytes that it writes.
    """
    line = Line("largest tensor", copies * largest, f"{copies} x {largest:,} bytes")
    part = Part("copying", title, (line,))
    return StageNeed(stage, "cpu", part, "a tensor at a time", part.nbytes, disk=disk)
