"""The factor of the inverse Hessian: exact where it can be, damped where it must be, refused where nothing helps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.errors import QuantizationError
from quantkit.numerics import factor as factor_module
from quantkit.numerics.factor import damped, inverse_factor

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has glibc return what is freed."""


def gram_of(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """The Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return inputs.T @ inputs / tokens


@pytest.mark.parametrize("columns", [1, 5, 64, 150])
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse(columns: int, damping: float) -> None:
    gram = gram_of(4 * columns, columns)
    factor, used = inverse_factor(gram, damping)
    assert used == damping
    assert float(factor.tril(-1).abs().max()) == 0
    assert bool((factor.diagonal() > 0).all())
    inverse = torch.linalg.inv(damped(gram, damping).double())
    torch.testing.assert_close((factor.T @ factor).double(), inverse, rtol=1e-3, atol=1e-4 * float(inverse.abs().max()))
    expected = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("columns", [1, 5, 64, 151, 600])
def test_the_factor_in_an_order_is_that_of_the_matrix_in_this_order(columns: int) -> None:
    """Computed in place and by halves, it is what whole copies give but for rounding, and the matrix stays as it is."""
    gram = gram_of(4 * columns, columns)
    before, order = gram.clone(), gram.diagonal().argsort(descending=True, stable=True)
    factor, _ = inverse_factor(gram, 0.03, order)
    ordered = gram[order][:, order]
    upper = torch.linalg.cholesky(damped(ordered, 0.03).flip(0, 1)).flip(0, 1)
    wanted = torch.linalg.solve_triangular(upper, torch.eye(columns), upper=True)
    torch.testing.assert_close(factor, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(inverse_factor(ordered, 0.03)[0], factor)
    assert torch.equal(gram, before)


def test_shrinkage_takes_from_correlations_and_leaves_the_diagonal() -> None:
    gram = gram_of(300, 64)
    before, order = gram.clone(), gram.diagonal().argsort(descending=True, stable=True)
    shrunk = gram * 0.75
    shrunk.diagonal().copy_(gram.diagonal())
    torch.testing.assert_close(damped(gram, 0.03, 0.25), damped(shrunk, 0.03), rtol=1e-6, atol=0)
    found, wanted = inverse_factor(gram, 0.03, order, 0.25)[0], inverse_factor(shrunk, 0.03, order)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(gram, before)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 20, 21])
def test_a_vector_is_reversed_in_place_in_pieces(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor_module, "FLIPPED", 4)
    values = torch.arange(count)
    factor_module._flip_(values)
    assert values.tolist() == list(range(count))[::-1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_than_three_matrices_are_alive() -> None:
    """Of 16 MiB each; the copies that this took before were eight."""
    script = Path(__file__).parents[1] / "benchmarks" / "gram_peak.py"
    command = [sys.executable, str(script), "--columns", "2048", "--child", "solved"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVES_BACK)
    assert float(done.stdout) < 3.8


def test_damping_adds_a_fraction_of_the_mean_diagonal_and_changes_nothing_else() -> None:
    gram = gram_of(64, 16)
    before = gram.clone()
    added = damped(gram, 0.05) - gram
    torch.testing.assert_close(added, torch.eye(16) * gram.diagonal().mean() * 0.05, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gram, before, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_inputs_that_were_never_active_get_a_diagonal(scale: float) -> None:
    gram = gram_of(64, 16) * scale
    gram[3] = gram[:, 3] = 0
    raised = damped(gram, 0.01)
    ridge = float(gram.diagonal().mean()) * 0.01
    assert float(raised[3, 3]) == pytest.approx(2 * ridge, rel=1e-4)
    factor, used = inverse_factor(gram, 0.01)
    assert used == 0.01
    assert bool(factor.isfinite().all())
    off_diagonal = torch.cat([factor[3, :3], factor[3, 4:], factor[:3, 3], factor[4:, 3]])
    assert float(off_diagonal.abs().max()) == 0, "an inactive input passes its error on to nobody"


def test_no_input_was_ever_active() -> None:
    factor, used = inverse_factor(torch.zeros(8, 8), 0.01)
    assert used == 0.01
    torch.testing.assert_close(factor, torch.eye(8))


@pytest.mark.parametrize("damping", [1e-12, 1e-9])
def test_damping_is_raised_until_the_factorization_succeeds(damping: float) -> None:
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 100
    gram = inputs.T @ inputs
    factor, used = inverse_factor(gram, damping)
    assert used >= 1e-4
    inverse = torch.linalg.inv(damped(gram, used).double())
    error = (factor.T.double() @ factor.double() - inverse).abs().max() / inverse.abs().max()
    assert float(error) < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 5)])
def test_statistics_that_are_not_finite_are_refused(value: float, place: tuple[int, int]) -> None:
    gram = gram_of(64, 16)
    gram[place] = gram[place[::-1]] = value
    with pytest.raises(QuantizationError, match=r"cannot be factorized at any damping .*NaN or infinities"):
        inverse_factor(gram, 0.01)


def test_a_matrix_that_no_damping_mends_is_refused() -> None:
    with pytest.raises(QuantizationError, match="cannot be factorized"):
        inverse_factor(torch.tensor([[1.0, 100.0], [100.0, 1.0]]), 0.01)


@pytest.mark.parametrize("columns", [48, 200, 576])
def test_an_order_of_columns_is_that_of_a_matrix_in_this_order_bit_by_bit(columns: int) -> None:
    draw = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=draw) * torch.rand(columns, generator=draw)
    gram, order = inputs.T @ inputs / len(inputs), torch.randperm(columns, generator=draw)
    gram = gram.triu() + gram.triu(1).T
    found, _ = inverse_factor(gram, 0.03, order)
    expected, _ = inverse_factor(gram[order][:, order].contiguous(), 0.03)
    assert torch.equal(found, expected)
