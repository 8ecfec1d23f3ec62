"""Low-rank terms: what they leave of an error is what theory says, and no other of their rank leaves less."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.low_rank import LowRank, aligned, closest


def an_error(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An error, and the Gram matrix of inputs of very different strengths, which are fewer than the columns."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(rows, columns, generator=generator) * 0.01
    inputs = torch.randn(columns // 2, columns, generator=generator) * torch.logspace(-2, 1, columns)
    return error, inputs.T @ inputs / len(inputs)


def left(error: torch.Tensor, gram: torch.Tensor | None, term: torch.Tensor) -> float:
    """The loss of the layer's output, of which a term takes up some."""
    rest = (error - term).double()
    return float(((rest if gram is None else rest @ gram.double()) * rest).sum())


def tail(error: torch.Tensor, gram: torch.Tensor | None, rank: int) -> float:
    """The squares of the singular values of ``E G^(1/2)`` after the first ones."""
    weighed = error.double()
    if gram is not None:
        values, vectors = torch.linalg.eigh(gram.double())
        weighed = weighed @ vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    return float(torch.linalg.svdvals(weighed)[rank:].square().sum())


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("weighed", [True, False])
def test_what_is_left_is_the_tail_of_singular_values(rows: int, columns: int, rank: int, weighed: bool) -> None:
    error, gram = an_error(rows, columns)
    by = gram if weighed else None
    found = closest(error, by, rank)
    assert found.rank == rank
    assert left(error, by, found.product()) == pytest.approx(tail(error, by, rank), rel=1e-3, abs=1e-9)


def test_the_weighed_term_takes_up_more_of_the_outputs_error_than_the_plain_one() -> None:
    error, gram = an_error(32, 48)
    nothing = left(error, gram, torch.zeros_like(error))
    plain = left(error, gram, closest(error, None, 4).product())
    weighed = left(error, gram, closest(error, gram, 4).product())
    assert weighed < 0.7 * plain
    assert plain < nothing


def test_signs_do_not_depend_on_those_that_the_library_chose() -> None:
    error, gram = an_error(20, 30)
    found = closest(error, gram, 6)
    for column in found.up.T:
        assert column[column.abs().argmax()] > 0
    assert torch.equal(closest(error.clone(), gram.clone(), 6).up, found.up)
    torch.testing.assert_close(closest(-error, gram, 6).up, found.up, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(closest(-error, gram, 6).down, -found.down, rtol=1e-4, atol=1e-6)


def test_both_matrices_of_a_term_have_the_same_norm() -> None:
    found = closest(*an_error(20, 30), 6)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-4, atol=1e-7)


def test_an_error_of_low_rank_is_taken_up_whole_and_more_rank_is_zeros() -> None:
    error = torch.outer(torch.arange(1.0, 4.0), torch.arange(1.0, 6.0))
    found = closest(error, None, 8)
    assert found.up.shape == (3, 8)
    assert found.down.shape == (8, 5)
    torch.testing.assert_close(found.product(), error, rtol=1e-5, atol=1e-5)
    assert not found.up[:, 3:].any()
    assert not found.down[3:].any()


def test_no_error_asks_for_no_term() -> None:
    found = closest(torch.zeros(4, 6), torch.eye(6), 2)
    assert isinstance(found, LowRank)
    assert not found.product().any()
    assert bool(found.down.isfinite().all())


def test_factors_of_rows_and_columns_are_found_and_noise_and_shrinking_are_none() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, noise = (torch.randn(96, 64, generator=generator) for _ in range(2))
    rows = torch.rand(96, 1, generator=generator) + 0.5
    columns = torch.rand(1, 64, generator=generator) + 0.5
    rounded = 0.9 * weight + 0.2 * noise
    assert aligned(weight, rounded) is weight
    scaled = weight * rows * columns
    found = aligned(weight, scaled + 0.2 * noise)
    assert float((found - scaled).norm() / scaled.norm()) < 0.1
