"""Orthogonal matrices: those of Hadamard for the widths of models, and random ones where there is none."""

from __future__ import annotations

import pytest
import torch

from quantkit.numerics.orthogonal import Orthogonal, hadamard_factors, hadamard_rotation, random_rotation


def dense(matrix: Orthogonal) -> torch.Tensor:
    return matrix.columns(torch.eye(matrix.size))


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 64, 84, 200, 576])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_a_hadamard_matrix_is_orthogonal_and_spreads_evenly(size: int, keeps_mean: bool) -> None:
    matrix = hadamard_rotation(size, 3, keeps_mean=keeps_mean)
    assert matrix is not None
    found = dense(matrix)
    torch.testing.assert_close(found @ found.T, torch.eye(size), rtol=0, atol=1e-5)
    if keeps_mean:
        torch.testing.assert_close(found.sum(1), torch.ones(size), rtol=0, atol=1e-4)
    else:
        torch.testing.assert_close(found.abs(), torch.full((size, size), size**-0.5))


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_a_random_matrix_is_orthogonal(keeps_mean: bool) -> None:
    found = dense(random_rotation(52, 1, keeps_mean=keeps_mean))
    torch.testing.assert_close(found @ found.T, torch.eye(52), rtol=0, atol=1e-5)
    assert torch.allclose(found.sum(1), torch.ones(52), atol=1e-4) == keeps_mean
    assert not torch.equal(found, dense(random_rotation(52, 2, keeps_mean=keeps_mean)))


def test_columns_and_rows_turn_pieces() -> None:
    matrix = hadamard_rotation(12, 0)
    assert matrix is not None
    values, whole = torch.randn(5, 36), torch.kron(torch.eye(3), dense(matrix))
    torch.testing.assert_close(matrix.columns(values), values @ whole)
    torch.testing.assert_close(matrix.rows(values.T), whole.T @ values.T)


def test_widths_of_models_have_one_and_others_none() -> None:
    assert [len(each) for each in hadamard_factors(576) or ()] == [36, 16]
    widths = [768, 896, 960, 1152, 1536, 1600, 2048, 2304, 2560, 2880, 3072, 3200, 3584, 4096, 4544, 5120, 7168, 8192]
    assert all(hadamard_factors(width) is not None for width in widths)
    assert [hadamard_factors(width) for width in (3, 52, 100, 172)] == [None] * 4
