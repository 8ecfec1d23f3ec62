"""What stays float in the decoder blocks, told by its reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from quantkit.errors import SchemeError
from quantkit.recipe import VariantSpec
from quantkit.system.units import percentage

ALLOWED = 0.5
"""Share of the weights of the blocks that may stay float without the variant asking for it."""
SHOWN = 4
"""Patterns that a note names."""
IGNORED = "the recipe ignores them"


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
