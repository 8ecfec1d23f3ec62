"""Batches keep every token exactly once, and tell padding from tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.engine.batches import BATCH_TOKENS, Batch, make_batches
from quantkit.errors import QuantizationError

CPU = torch.device("cpu")
ROWS = st.lists(st.lists(st.integers(0, 999), max_size=700), max_size=30)


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    """The rows of a batch without their padding."""
    rows, length = batch.token_ids.shape
    valid = torch.arange(rows * length) if batch.valid is None else batch.valid
    flat = batch.token_ids.reshape(-1)
    return [tuple(flat[valid[valid // length == row]].tolist()) for row in range(rows)]


@given(rows=ROWS, may_pad=st.booleans())
def test_every_row_is_in_one_batch_once(rows: list[list[int]], may_pad: bool) -> None:
    batches = make_batches(rows, CPU, may_pad)
    found = Counter(row for batch in batches for row in rows_of(batch))
    assert found == Counter(tuple(row) for row in rows if row)
    for batch in batches:
        assert batch.token_ids.dtype == torch.int64
        assert batch.token_ids.numel() <= BATCH_TOKENS["cpu"] or len(batch.token_ids) == 1


@given(rows=ROWS)
def test_nothing_is_padded_where_that_is_forbidden(rows: list[list[int]]) -> None:
    assert all(batch.valid is None for batch in make_batches(rows, CPU, may_pad=False))


def test_rows_of_like_length_share_a_batch() -> None:
    rows = [[1] * 500, [2] * 20, [3] * 500, [4] * 21, [5] * 499, [6] * 500]
    padded = make_batches(rows, CPU, may_pad=True)
    assert [tuple(batch.token_ids.shape) for batch in padded] == [(4, 500), (2, 21)]
    assert [None if batch.valid is None else len(batch.valid) for batch in padded] == [1999, 41]
    unpadded = make_batches(rows, CPU, may_pad=False)
    assert [tuple(batch.token_ids.shape) for batch in unpadded] == [(3, 500), (1, 499), (1, 21), (1, 20)]


def test_a_row_longer_than_a_batch_goes_alone() -> None:
    long = list(range(BATCH_TOKENS["cpu"] + 5))
    assert [tuple(batch.token_ids.shape) for batch in make_batches([long, [1]], CPU, True)] == [(1, len(long)), (1, 1)]


def test_padding_is_left_out_of_whatever_positions_a_layer_is_given() -> None:
    batch = make_batches([[1, 2, 3], [4]], CPU, may_pad=True)[0]
    assert batch.tokens == 4
    flat = torch.arange(6.0).unsqueeze(1)
    found, places = batch.tokens_of(flat)
    assert found.squeeze(1).tolist() == [0, 1, 2, 3]
    assert places is None
    found, places = batch.tokens_of(torch.tensor([[50.0], [30.0], [20.0]]), torch.tensor([5, 3, 2]))
    assert found.squeeze(1).tolist() == [30, 20]
    assert places is not None
    assert places.tolist() == [3, 2]
    assert batch.tokens_of(torch.ones(1, 1), torch.tensor([4]))[0].shape == (0, 1)
    whole = make_batches([[1, 2], [3, 4]], CPU, may_pad=True)[0]
    assert whole.valid is None
    assert whole.tokens == 4
    assert whole.tokens_of(flat)[0] is flat


def test_padding_that_cannot_be_told_is_refused() -> None:
    batch = make_batches([[1, 2, 3], [4]], CPU, may_pad=True)[0]
    with pytest.raises(QuantizationError, match=r"given 4 of a batch's 6 positions.*packing: full"):
        batch.tokens_of(torch.zeros(4, 2))
