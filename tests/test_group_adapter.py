"""QA-LoRA: merged zero points give what base and adapter give, and its gradients are those of group sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantkit.methods.base import InputStatistics
from quantkit.numerics.group_adapter import GroupAdapter, can_adapt
from quantkit.schemes import IntScheme, QuantizedWeight
from tests.tiny import tiny_method


def a_weight(dtype: torch.dtype = torch.float32, bits: int = 3) -> QuantizedWeight:
    """A weight with float zero points, in groups of 16 columns."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    scheme = IntScheme(bits, 16, symmetric=False, zeros="float")
    return tiny_method("rtn").quantize(weight, InputStatistics(), scheme, dtype).weight


def moved(adapter: GroupAdapter) -> GroupAdapter:
    """An adapter as a training leaves it."""
    with torch.no_grad():
        adapter.up.copy_(torch.randn(adapter.up.shape, generator=torch.Generator().manual_seed(1)))
    return adapter


def test_it_begins_as_what_it_was_given() -> None:
    given = a_weight()
    adapter = GroupAdapter.of(given, 2)
    assert torch.equal(adapter.weight(), given.dequantize(torch.float32))
    assert torch.equal(adapter.result().zeros, given.zeros)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float16, 4e-3)])
def test_merged_zero_points_give_what_base_and_adapter_give(dtype: torch.dtype, close: float) -> None:
    given = a_weight(dtype)
    adapter = moved(GroupAdapter.of(given, 2))
    inputs = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    beside = inputs @ given.dequantize(torch.float32).T
    beside = beside + inputs.view(7, 4, 16).sum(-1) @ adapter.term().T
    merged = adapter.result()
    assert torch.equal(merged.codes, given.codes)
    assert torch.equal(merged.scales, given.scales)
    assert (merged.zeros.dtype, merged.zeros.shape) == (given.zeros.dtype, given.zeros.shape)
    size = float(beside.abs().max())
    torch.testing.assert_close(inputs @ merged.dequantize(torch.float32).T, beside, rtol=0, atol=close * size)
    torch.testing.assert_close(inputs @ adapter.weight().T, beside, rtol=0, atol=1e-5 * size)


def test_gradients_reach_both_matrices() -> None:
    adapter = moved(GroupAdapter.of(a_weight(), 2))
    torch.autograd.backward(adapter.weight().square().sum())
    assert all(leaf.grad is not None and bool(leaf.grad.any()) for leaf in adapter.parameters().values())


def test_more_rank_than_groups_says_no_more() -> None:
    assert GroupAdapter.of(a_weight(), 64).down.shape == (4, 4)


def test_whole_zero_points_cannot_take_it() -> None:
    assert not can_adapt(IntScheme(3, 16, symmetric=False))
    assert not can_adapt(IntScheme(3, 16, symmetric=False, zeros="float", axis=0))
    with pytest.raises(ValueError, match="no float zero points"):
        GroupAdapter.of(replace(a_weight(), scheme=IntScheme(3, 16)), 2)
