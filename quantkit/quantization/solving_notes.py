"""What is told of how layers are solved: loops on a GPU, corrections, what tuning did, what errors cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.methods.base import Method
from quantkit.quantization.left_float import few
from quantkit.schemes import Scheme

if TYPE_CHECKING:
    import torch

EVEN_ENOUGH = 4
"""Even tokens for a column of the input without which correlations are partly chance, and damping is at its most."""


def loop_notes(device: torch.device, solved: Iterable[tuple[Method, Scheme]]) -> list[str]:
    """Why a GPU goes through the columns of weights operation by operation; none where it does not, and on a CPU.

    Args:
        device: of the walk.
        solved: the methods, and the schemes of their layers.
    """
    from quantkit.numerics.fused import refusal

    asked = {scheme for method, scheme in solved if method.factorizes} if device.type == "cuda" else set()
    reasons = sorted({refusal(device, scheme.grids()) for scheme in asked} - {""})
    slower = "loops over columns go operation by operation, which takes several times as long"
    return [f"{slower}: {'; '.join(reasons)}"] if reasons else []


def correction_notes(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far layers were corrected for what their inputs lost; none where that was not looked at."""
    shares = [layer["correction"] for layer in layers if "correction" in layer]
    if not shares:
        return []
    left = len(layers) - len(shares)
    note = (
        f"correction: {sum(map(bool, shares))} of {len(shares)} layers make up for what their inputs lost in the "
        f"layers before them, by {sum(shares) / len(shares):.2f} of the whole on average"
    )
    return [f"{note}; {left} more, such as experts that saw few tokens, were solved as they are" if left else note]


def tuning_notes(segments: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tuning gained and where it did not pay; none where nothing was tuned.

    Args:
        segments: see :meth:`quantkit.quantization.solved_layers.SolvedLayers.tuning`.
    """
    if not segments:
        return []
    paid = [each for each in segments if each["paid"]]
    notes = [
        f"tune: {len(paid)} of {len(segments)} blocks are closer to the float model's{_gain(paid)}{_left(segments)}"
    ]
    said: dict[str, list[str]] = {}
    for each in segments:
        said.setdefault(each["note"], []).append(each["segment"])
    return [*notes, *(f"tune: {few(names)}: {note}" for note, names in said.items() if note)]


def _gain(paid: Sequence[Mapping[str, Any]]) -> str:
    """By how much the error of held-out rows fell in the blocks where tuning paid: the geometric mean."""
    ratios = [each["after"] / each["before"] for each in paid if each["before"] > 0 and each["after"] > 0]
    if not ratios:
        return ""
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    steps = sum(each["steps"] for each in paid) / len(paid)
    return f": the error of held-out rows fell to {mean:.2f} of what it was, in {steps:.0f} steps on average"


def _left(segments: Sequence[Mapping[str, Any]]) -> str:
    left = [each["segment"] for each in segments if not each["paid"]]
    return f"; it did not pay in {few(left)}, which the method alone made" if left else ""


def sensitivity_notes(layers: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """What the report says of a variant: the layers whose errors cost most, and where tokens are few.

    Args:
        layers: as they were solved.
        shapes: of all layers.
    """
    notes = []
    nats = {layer["name"]: layer["nats"] for layer in layers if "nats" in layer}
    if nats:
        total = sum(nats.values())
        most = sorted(nats, key=lambda name: -nats[name])[:3]
        told = ", ".join(f"{name} {nats[name] / total:.0%}" for name in most)
        notes.append(f"sensitivity: errors of layers are predicted to cost {total:.3g} nats a token; most: {told}")
    effective = {layer["name"]: layer["effective_tokens"] for layer in layers if "effective_tokens" in layer}
    if effective:
        few = sum(tokens < EVEN_ENOUGH * shapes[name][1] for name, tokens in effective.items())
        middle = statistics.median(effective.values())
        notes.append(
            f"token_weights: tokens are worth {middle:.0f} that count alike in the median layer"
            + (f"; in {few} layers fewer than {EVEN_ENOUGH} for a column, which raises damping" if few else "")
        )
    return notes
