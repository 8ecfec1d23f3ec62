"""Loss by block of a variant that was tuned: what each block lacked on held-out rows before and after."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from quantkit.report.columns import Record
from quantkit.report.numbers import count, figure, fixed, padded


@dataclass(frozen=True, slots=True)
class TunedBlocks:
    """A variant's blocks as tuning left them.

    Attributes:
        caption: the median block and how many were left as they were, in words.
        rows: of each block its name, its error before and after, what that is of it, and the steps, in words.
    """

    caption: str
    rows: list[tuple[str, str, str, str, str]]


def tuned_blocks(variant: Record) -> TunedBlocks | None:
    """What tuning did to a variant; None where it was not tuned."""
    given = [each for each in variant.get("tuning") or [] if isinstance(each, dict)]
    known = [
        (each, before, after)
        for each in given
        if (before := figure(each, "before")) is not None and (after := figure(each, "after")) is not None
    ]
    if not known:
        return None
    ratios = [after / before for _, before, after in known if before]
    left = sum(not each.get("paid") for each, _, _ in known)
    middle = fixed(statistics.median(ratios or [1.0]), 2)
    caption = f"Tuned: the error of a block on held-out rows became {middle} of what it was in the median"
    caption += f"; {left} of {len(known)} blocks were left as the method made them" if left else ""
    return TunedBlocks(caption, [_row(*each) for each in known])


def _row(block: Record, before: float, after: float) -> tuple[str, str, str, str, str]:
    ratio = fixed(after / before if before else 1.0, 2)
    return str(block.get("segment")), padded(before), padded(after), ratio, count(figure(block, "steps"))
