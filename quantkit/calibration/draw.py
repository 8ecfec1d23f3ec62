"""Which records of a data set are used, and in which order."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from quantkit.errors import CalibrationError
from quantkit.records import Record, RecordSet

MINIMUM_TOKENS = 2
TOO_SHORT = f"fewer than {MINIMUM_TOKENS} tokens"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record as tokens.

    Attributes:
        index: its row in the data set.
        ids: its token ids, not truncated.
    """

    index: int
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that was drawn and is in no row, with the reason."""

    index: int
    reason: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """The records that were drawn, in the order of the draw."""

    encoded: list[Encoded]
    dropped: list[Dropped]


def draw(found: RecordSet, samples: int, seed: int, encode: Callable[[Record, int], list[int]]) -> Drawn:
    """Draw records until ``samples`` of them have at least two tokens, or none is left.

    The order is ``random.Random(seed).sample(range(n), n)`` over the ``n`` usable records.

    Args:
        found: the data set.
        samples: records to draw.
        seed: of the order.
        encode: a record and its index in the data set to token ids.

    Raises:
        CalibrationError: no record has two tokens.
    """
    indices = found.indices()
    encoded: list[Encoded] = []
    dropped: list[Dropped] = []
    for place in random.Random(seed).sample(range(len(indices)), len(indices)):
        if len(encoded) == samples:
            break
        ids = encode(found.records[place], indices[place])
        if len(ids) < MINIMUM_TOKENS:
            dropped.append(Dropped(indices[place], TOO_SHORT, len(ids)))
        else:
            encoded.append(Encoded(indices[place], ids))
    if not encoded:
        raise CalibrationError(
            f"data set '{found.name}': each of its {len(indices)} records has {TOO_SHORT}", "use another data set"
        )
    return Drawn(encoded, dropped)
