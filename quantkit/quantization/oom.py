"""What a walk does when the GPU's memory runs out: the same with less, step by step, and then a plain line.

Finished segments are saved, so that each step goes on where the one before ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from quantkit.engine.batches import BATCH_TOKENS
from quantkit.engine.walk import Inputs, Strategy
from quantkit.errors import QuantizationError

PARTS = (2, 4, 8)
"""Into how many parts batches are split."""


@dataclass(frozen=True, slots=True)
class FallbackStep:
    """How a walk uses memory.

    Attributes:
        batch_tokens: of a batch that has several rows.
        strategy: see :class:`quantkit.engine.walk.WalkSettings`.
        offload: see there.
        parts: the statistics of a layer's experts take a part of the room that they may take at first.
        says: what is told when this is tried; empty for the first.
        is_last: there is nothing else to try.
    """

    batch_tokens: int
    strategy: Strategy
    offload: bool = False
    parts: int = 1
    says: str = ""
    is_last: bool = False


def fallback_steps(
    device: torch.device, strategy: Strategy, inputs: Inputs, *, calibrated: bool, batch_tokens: int | None = None
) -> list[FallbackStep]:
    """What is tried, one after another.

    Args:
        device: where the walk computes.
        strategy: the one to begin with.
        inputs: of the walk.
        calibrated: the walk runs the model at all; without, there is nothing to save.
        batch_tokens: with which an earlier run solved the last block that is saved. Sums depend on them, so that what
            takes more is not tried again; None where nothing is saved.
    """
    steps = list(_all_steps(device, strategy, inputs, calibrated))
    most = steps[0].batch_tokens if batch_tokens is None else batch_tokens
    left = [step for step in steps if step.batch_tokens <= most]
    return left or steps[-1:]


def _all_steps(device: torch.device, strategy: Strategy, inputs: Inputs, calibrated: bool) -> Iterator[FallbackStep]:
    step = FallbackStep(BATCH_TOKENS[device.type], strategy, is_last=not calibrated)
    yield step
    if not calibrated:
        return
    if strategy == "one-pass" and inputs == "quantized":
        step = replace(step, strategy="recompute", says="each block is run anew for every group, which changes no byte")
        yield step
    whole = step.batch_tokens
    for part in PARTS:
        says = (
            f"batches of {whole // part} tokens instead of {whole}; sums are taken in another order, so that bytes may "
            "differ from those of a run with more memory"
        )
        step = replace(step, batch_tokens=whole // part, parts=part, says=says)
        yield step
    says = "activations wait in the memory of the CPU between blocks, which changes no byte"
    yield replace(step, offload=True, says=says, is_last=True)


def ran_out(step: FallbackStep, device: torch.device) -> str:
    """What is told when a step is tried."""
    return f"the memory of {device} ran out: {step.says}"


def out_of_memory(error: torch.OutOfMemoryError, device: torch.device, where: str = "") -> QuantizationError:
    """One line with the numbers: asked for, free, and in all.

    Args:
        error: torch's.
        device: whose memory it is.
        where: what asked, and a colon.
    """
    text = " ".join(str(error).split())
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
    room = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    numbers = f": {asked[1]} were asked for" if asked else ""
    numbers += f", {room[2]} of {room[1]} are free" if room else ""
    return QuantizationError(
        f"{where}the memory of {device} is too small even for small batches with activations on the CPU{numbers}",
        "close what else uses the device, use shorter calibration rows, or set quantization.device: cpu",
    )
