"""Rows of tokens: which records of a data set are drawn, and how they fill rows, with every token accounted for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from quantkit.calibration.model import added_bos
from quantkit.errors import CalibrationError
from quantkit.records import Record, RecordSet, RefusedRecordError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MINIMUM_TOKENS = 2
CROP = 0.5
"""Share of the rows that begin later than their records, where it matters."""
TOO_SHORT = f"fewer than {MINIMUM_TOKENS} tokens"
NO_ROW = "in the remainder that fills no row"
TOO_LONG = "longer than max_length with its images"
ENOUGH = 2
"""Times the records asked for that are drawn before a run stops for those that it loses, not at the end alone."""
MOST_ENDED = 3
"""Records of which a template may take more time or memory than there is before a run stops."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record as tokens.

    Attributes:
        index: its row in the data set.
        ids: its token ids, not truncated.
        inputs: further inputs of the model by their names, where it has images.
        changes: what of the record had to be changed for them, in words.
    """

    index: int
    ids: list[int]
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


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


def draw(
    found: RecordSet, samples: int, seed: int, encode: Callable[[Record, int], Encoded], max_lost: float = 0.5
) -> Drawn:
    """Draw records until ``samples`` of them have at least two tokens, or none is left.

    The order is ``random.Random(seed).sample(range(n), n)`` over the ``n`` usable records.

    Args:
        found: the data set.
        samples: records to draw.
        seed: of the order.
        encode: a record and its index in the data set to tokens; may refuse it.
        max_lost: share of the records drawn that may be refused.

    Raises:
        CalibrationError: no record has two tokens, or more than ``max_lost`` of them are refused.
    """
    indices = found.indices()
    encoded: list[Encoded] = []
    dropped: list[Dropped] = []
    refused: list[RefusedRecordError] = []
    drawn = 0
    for place in random.Random(seed).sample(range(len(indices)), len(indices)):
        if len(encoded) == samples:
            break
        drawn += 1
        try:
            record = encode(found.records[place], indices[place])
        except RefusedRecordError as error:
            refused.append(error)
            dropped.append(Dropped(indices[place], error.reason, 0))
            record = None
            if sum(each.ended for each in refused) >= MOST_ENDED or drawn >= ENOUGH * samples:
                _check_refused(refused, drawn, max_lost)
        if record is not None and len(record.ids) < MINIMUM_TOKENS:
            dropped.append(Dropped(record.index, TOO_SHORT, len(record.ids)))
        elif record is not None:
            encoded.append(record)
    _check_refused(refused, drawn, max_lost)
    if not encoded:
        raise CalibrationError(
            f"data set '{found.name}': each of its {len(indices)} records has {TOO_SHORT}", "use another data set"
        )
    return Drawn(encoded, dropped)


def _check_refused(refused: list[RefusedRecordError], drawn: int, max_lost: float) -> None:
    """End a draw that loses too many records.

    Raises:
        CalibrationError: with the first that was refused, and how many there are.
    """
    all_are_lost = len(refused) == drawn or sum(error.ended for error in refused) >= MOST_ENDED
    if not refused or not (all_are_lost or len(refused) > max_lost * drawn):
        return
    first = refused[0]
    if len(refused) == 1:
        raise first
    raise CalibrationError(
        f"{first.problem}; {len(refused)} of {drawn} records drawn are refused, and max_lost is {max_lost:g}",
        f"{first.remedy}; or raise calibration.max_lost",
    ) from first


@dataclass(frozen=True, slots=True)
class Packed:
    """Token rows, with counts of what is not in them.

    ``sum(row lengths) + cropped_tokens + truncated_tokens + remainder_tokens`` equals the records' tokens and
    ``separators``.

    Attributes:
        rows: token ids; no row is longer than ``max_length``.
        used: the records that are in the rows, wholly or in part.
        cropped: how many of them begin later than their record, see :func:`pack_none`.
        cropped_tokens: how many tokens that cost.
        truncated: those of them that were cut to ``max_length``.
        truncated_tokens: how many tokens that cost.
        dropped: records of which no token is in a row.
        remainder_tokens: tokens at the end that fill no row.
        separators: end-of-text tokens that were put between records.
    """

    rows: list[list[int]]
    used: list[Encoded]
    cropped: int = 0
    cropped_tokens: int = 0
    truncated: list[Encoded] = field(default_factory=list)
    truncated_tokens: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    remainder_tokens: int = 0
    separators: int = 0


def pack_none(encoded: list[Encoded], max_length: int, crop: float = 0.0, seed: int = 0) -> Packed:
    """One record a row; the tokens of a longer record beyond ``max_length`` are cut off.

    Args:
        encoded: the records.
        max_length: of a row.
        crop: about this share of the rows begin at a token that is drawn from the first half of their record.
        seed: of the draw.
    """
    draws = random.Random(seed)
    starts = [_start(record.ids, draws) if draws.random() < crop else 0 for record in encoded]
    left = [len(record.ids) - start - max_length for record, start in zip(encoded, starts, strict=True)]
    return Packed(
        rows=[record.ids[start : start + max_length] for record, start in zip(encoded, starts, strict=True)],
        used=encoded,
        cropped=sum(start > 0 for start in starts),
        cropped_tokens=sum(starts),
        truncated=[record for record, over in zip(encoded, left, strict=True) if over > 0],
        truncated_tokens=sum(over for over in left if over > 0),
    )


def _start(ids: list[int], draws: random.Random) -> int:
    """A place in the first half, behind which a row has enough tokens; 0 where there is none."""
    last = min(len(ids) // 2, len(ids) - MINIMUM_TOKENS)
    return draws.randint(1, last) if last > 0 else 0


def share_to_crop(rows: Sequence[Sequence[int]], bos: int | None) -> float:
    """The share of rows that are to begin later than their records where a recipe does not say.

    On the first token of a text, whatever it is, much of the attention rests (sinks, Xiao et al. 2023,
    arXiv:2309.17453), and blocks make its hidden state large for that. Rows that all begin as a chat template does show
    this of one token alone; where the tokenizer begins a text with no token of its own, other texts begin with others.

    Args:
        rows: the token ids of records.
        bos: the token with which the tokenizer begins every text.
    """
    firsts = Counter(row[0] for row in rows if row)
    return CROP if bos is None and firsts and max(firsts.values()) > len(rows) / 2 else 0.0


def pack_full(encoded: list[Encoded], max_length: int, tokenizer: PreTrainedTokenizerBase) -> Packed:
    """All records in one stream, cut into rows of exactly ``max_length``; a last part that is shorter is dropped.

    Between two records stands the end-of-text token, unless the first ends with it (white space aside) or the
    tokenizer has none.
    """
    stream: list[int] = []
    starts: list[int] = []
    separators = 0
    for place, record in enumerate(encoded):
        if place and _needs_separator(encoded[place - 1].ids, tokenizer):
            stream.append(tokenizer.eos_token_id)
            separators += 1
        starts.append(len(stream))
        stream += record.ids
    kept = len(stream) - len(stream) % max_length
    within = [start < kept for start in starts]
    return Packed(
        rows=[stream[start : start + max_length] for start in range(0, kept, max_length)],
        used=[record for record, inside in zip(encoded, within, strict=True) if inside],
        dropped=[
            Dropped(record.index, NO_ROW, len(record.ids))
            for record, inside in zip(encoded, within, strict=True)
            if not inside
        ],
        remainder_tokens=len(stream) - kept,
        separators=separators,
    )


def pack(
    encoded: list[Encoded],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    full: bool,
    crop: float | None = None,
    seed: int = 0,
) -> tuple[Packed, dict[int, Mapping[str, torch.Tensor]]]:
    """Rows of records, those with images each by itself and whole, behind the others.

    Args:
        encoded: the records.
        max_length: of a row; a record that is longer with its images is dropped.
        tokenizer: the model's.
        full: see :func:`pack_full`; else :func:`pack_none`.
        crop: see :func:`pack_none`; None is what :func:`share_to_crop` says.
        seed: likewise.

    Returns:
        The rows, and the further inputs of the model by the places of those that have any.
    """
    texts = [record for record in encoded if not record.inputs]
    if full:
        plain = pack_full(texts, max_length, tokenizer)
    else:
        share = share_to_crop([record.ids for record in texts], added_bos(tokenizer)) if crop is None else crop
        plain = pack_none(texts, max_length, share, seed)
    seen = [record for record in encoded if record.inputs]
    fits = [record for record in seen if len(record.ids) <= max_length]
    longer = [record for record in seen if len(record.ids) > max_length]
    packed = replace(
        plain,
        rows=[*plain.rows, *(record.ids for record in fits)],
        used=[*plain.used, *fits],
        dropped=[*plain.dropped, *(Dropped(record.index, TOO_LONG, len(record.ids)) for record in longer)],
        remainder_tokens=plain.remainder_tokens + sum(len(record.ids) for record in longer),
    )
    return packed, {len(plain.rows) + place: record.inputs for place, record in enumerate(fits)}


def _needs_separator(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    end = tokenizer.eos_token_id
    if end is None:
        return False
    if end not in ids:
        return True
    after_last_end = len(ids) - ids[::-1].index(end)
    return bool(tokenizer.decode(ids[after_last_end:]).strip())
