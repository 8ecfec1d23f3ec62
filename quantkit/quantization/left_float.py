"""What stays float in the decoder blocks and around them, told by its reason."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from quantkit.engine.skeleton import Skeleton
from quantkit.errors import SchemeError
from quantkit.recipe import VariantSpec
from quantkit.system.units import percentage

ALLOWED = 0.5
"""Share of the weights of the blocks that may stay float without the variant asking for it."""
SHOWN = 4
"""Patterns that a note names."""
IGNORED = "the recipe ignores them"
OUTSIDE = "outside the decoder blocks"
TOWER = "text passes it by; an override that names layers of it alone quantizes them"
"""Why models of images and sound stay float."""


@dataclass(frozen=True, slots=True)
class Left:
    """A matrix of a decoder block that stays float.

    Attributes:
        name: in the checkpoint, without ``.weight``.
        weights: how many it has.
        reason: why it does.
    """

    name: str
    weights: int
    reason: str


def pattern_of(name: str) -> str:
    """A name with N for every number in it."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def by_reason(left: Iterable[Left]) -> dict[str, list[Left]]:
    """What stays float, by why it does; the reason of most weights first."""
    found: dict[str, list[Left]] = {}
    for each in left:
        found.setdefault(each.reason, []).append(each)
    return dict(sorted(found.items(), key=lambda item: -_weights(item[1])))


def notes_of(left: Sequence[Left], total: int) -> tuple[str, ...]:
    """A line for every reason for which matrices of the blocks stay float.

    Args:
        left: the matrices.
        total: number of weights in all matrices of the blocks.
    """
    found = []
    for reason, group in by_reason(left).items():
        names, share = told_names(each.name for each in group), percentage(_weights(group) / total)
        found.append(f"float: {names} ({share} of the block weights): {reason}")
    return tuple(found)


def told_names(names: Iterable[str]) -> str:
    """Names as few patterns, with how many there are of each."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = pattern_of(name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return few([f"{count} {pattern}" if count > 1 else pattern for pattern, count in counts.items()])


def few(words: Sequence[str]) -> str:
    """The first of many, and how many more there are."""
    rest = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {rest} more like them" if rest > 0 else "")


def notes_of_towers(skeleton: Skeleton, quantized: Collection[str]) -> tuple[str, ...]:
    """How much of models of images and sound inside the model stays float."""
    weights = skeleton.tower_weights()
    layers = {layer.name: layer for segment in skeleton.towers for layer in segment.layers}
    done = sum(math.prod(layers[name].shape) for name in quantized if name in layers)
    total = sum(each.numel() for each in skeleton.model.parameters() if each.ndim >= 2)
    share = (sum(weights.values()) - done) / max(1, total)
    if not share:
        return ()
    rest = "the rest of " if done else ""
    return (f"float: {rest}{few(list(weights))} ({percentage(share)} of all weights): {TOWER}",)


def notes_of_rest(skeleton: Skeleton) -> tuple[str, ...]:
    """How much of the linear layers around the blocks stays float."""
    rest = skeleton.outside()
    total = sum(each.numel() for each in skeleton.model.parameters() if each.ndim >= 2)
    if not rest:
        return ()
    share = percentage(sum(math.prod(layer.shape) for layer in rest) / max(1, total))
    return (f"float: {told_names(layer.name for layer in rest)} ({share} of all weights): {OUTSIDE}",)


def notes_of_names(skeleton: Skeleton, *, all_left_out: bool = False) -> tuple[str, ...]:
    """What the checkpoint has and the class of the model does not know, and the reverse.

    Args:
        skeleton: of the model.
        all_left_out: the export has no place for what the class does not know.
    """
    kind = type(skeleton.model).__name__
    dropped = skeleton.left_out()
    lacking, unknown = skeleton.lacking(), skeleton.names.unknown_parts(dropped)
    away = f"left out, as they follow from the config or served training alone: {told_names(dropped)}"
    parts = [f"{part} ({count} tensors)" if count > 1 else part for part, count in unknown.items()]
    fate = "left out" if all_left_out else "copied as they are"
    copied = f"unknown to {kind}, {fate}: {few(parts)}"
    missing = f"missing in the checkpoint, though {kind} has them: {told_names(lacking)}"
    return (*([away] if dropped else []), *([copied] if unknown else []), *([missing] if lacking else []))


def share_words(share: float, schemes: Collection[str]) -> str:
    """The quantized part of the blocks in words, such as ``97.4% of the block weights in int4 g64 sym``."""
    return f"{percentage(share)} of the block weights in {', '.join(schemes)}"


def check_left(variant: VariantSpec, left: Sequence[Left], total: int) -> None:
    """Refuse a model that would be mostly float for reasons that the recipe does not give.

    Raises:
        SchemeError: more than half of the blocks' weights would stay float, and the variant does not allow it.
    """
    against = [each for each in left if each.reason != IGNORED]
    share = _weights(against) / max(1, total)
    if share <= ALLOWED or variant.allow_float:
        return
    reason, group = next(iter(by_reason(against).items()))
    largest = max(group, key=lambda each: each.weights)
    raise SchemeError(
        f"{variant.name}: {percentage(share)} of the block weights would stay float, such as {largest.name}: {reason}",
        f"add allow_float: true to variant {variant.name} for a file that is mostly float",
    )


def _weights(group: Iterable[Left]) -> int:
    return sum(each.weights for each in group)
