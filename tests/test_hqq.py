"""HQQ: the errors of the package hqq, below those of rounding, for every kind of zero point."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from quantkit.errors import QuantizationError, SchemeError
from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics
from quantkit.methods.hqq import Hqq, HqqOptions
from quantkit.methods.rtn import Rtn, RtnOptions
from quantkit.numerics import half_quadratic
from quantkit.numerics.half_quadratic import Schedule
from quantkit.schemes import PER_CHANNEL, Fp8Scheme, IntScheme, Mxfp4Scheme, Nf4Scheme, QuantizedWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GOLDEN = {
    (1, 0, 1): (0.105874, 0.00533959), (1, 1, 1): (0.106046, 0.00557759),
    (2, 0, 1): (0.0787856, 0.00141416), (2, 1, 1): (0.0793014, 0.00146548),
    (3, 0, 1): (0.0514877, 0.000367811), (3, 1, 1): (0.0543933, 0.000415904),
    (4, 0, 1): (0.0318015, 9.12029e-05), (4, 1, 1): (0.0326379, 9.56772e-05),
    (8, 0, 1): (0.0043485, 3.12207e-07), (8, 1, 1): (0.00451414, 3.36627e-07),
    (1, 0, 30): (2.88531, 30.0326), (1, 1, 30): (3.10461, 33.8518),
    (2, 0, 30): (0.97087, 1.74123), (2, 1, 30): (1.04453, 2.05571),
    (3, 0, 30): (0.565761, 0.352055), (3, 1, 30): (0.603161, 0.405807),
    (4, 0, 30): (0.338209, 0.0813718), (4, 1, 30): (0.349473, 0.0854857),
    (8, 0, 30): (0.0470245, 0.000280986), (8, 1, 30): (0.0488158, 0.000302965),
}  # fmt: skip
"""By bits, axis and magnification of :func:`golden_weight`: ``mean |w - ŵ|**0.7`` and ``mean (w - ŵ)**2`` of the
quantizer of hqq 0.2.8 (``group_size=64``, ``optimize=True``, float32 on a CPU)."""
names = IntScheme.describe


def golden_weight() -> torch.Tensor:
    """The same heavy-tailed ``[24, 128]`` on every machine."""
    places = torch.arange(24 * 128)
    even = ((places * places * 31 + places * 7919) % 10007).double() / 10007 - 0.5
    return torch.tan(3 * even).mul(0.03).float().view(24, 128)


def heavy_tailed(rows: int = 64, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    parts = torch.randn(2, rows, columns, generator=generator)
    return parts[0] * parts[1].exp() * 0.02


def found(
    weight: torch.Tensor, scheme: IntScheme, dtype: torch.dtype = torch.float32, **options: str | float
) -> QuantizedWeight:
    return Hqq(HqqOptions.model_validate(options)).quantize(weight, InputStatistics(), scheme, dtype).weight


def by_range(weight: torch.Tensor, scheme: IntScheme, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    return Rtn(RtnOptions()).quantize(weight, InputStatistics(), scheme, dtype).weight


def loss(weight: torch.Tensor, solved: QuantizedWeight, power: float = 0.7) -> float:
    return float((weight - solved.dequantize(torch.float32)).double().abs().pow(power).mean())


def kinds(bits: int, axis: Literal[0, 1]) -> list[IntScheme]:
    """Float zeros, whole zeros, and none where one bit allows it."""
    float_zeros, whole = IntScheme(bits, 64, False, "float", axis), IntScheme(bits, 64, False, "int", axis)
    return [float_zeros, whole, *([IntScheme(bits, 64, True, "int", axis)] if bits > 1 else [])]


def schemes(*widths: int) -> list[IntScheme]:
    """Both axes, every kind of zero."""
    axes: tuple[Literal[0, 1], ...] = (0, 1)
    return [scheme for bits in widths for axis in axes for scheme in kinds(bits, axis)]


@pytest.mark.parametrize(("case", "expected"), GOLDEN.items())
def test_the_error_is_that_of_the_package(case: tuple[int, int, int], expected: tuple[float, float]) -> None:
    """The package may stop a layer one iteration early, which costs it up to a percent."""
    bits, axis, magnified = case
    weight = golden_weight() * magnified
    solved = found(weight, IntScheme(bits, 64, False, "float", 1 if axis else 0))
    assert loss(weight, solved) == pytest.approx(expected[0], rel=0.001)
    assert loss(weight, solved, 2) == pytest.approx(expected[1], rel=0.001)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", schemes(1, 2, 3, 4), ids=names)
def test_the_error_below_power_1_is_less_than_that_of_the_range(scheme: IntScheme, dtype: torch.dtype) -> None:
    weight = heavy_tailed()
    assert loss(weight, found(weight, scheme, dtype)) < 0.99 * loss(weight, by_range(weight, scheme, dtype))


@pytest.mark.parametrize("scheme", schemes(2, 3, 4, 5, 6, 7, 8), ids=names)
def test_the_square_error_is_less_too(scheme: IntScheme) -> None:
    """With a published beta and weights of a language model's size what is left is least squares."""
    weight = heavy_tailed()
    assert loss(weight, found(weight, scheme), 2) < 0.99 * loss(weight, by_range(weight, scheme), 2)


@pytest.mark.parametrize("scheme", schemes(2, 4), ids=names)
def test_a_beta_in_steps_forgives_outliers_whatever_the_size_of_the_weights(scheme: IntScheme) -> None:
    weight = heavy_tailed()
    gained = loss(weight, found(weight, scheme, beta_unit="step")) / loss(weight, found(weight, scheme))
    assert gained < 0.995
    small = weight / 64
    shrunk = loss(small, found(small, scheme, beta_unit="step")) / loss(small, found(small, scheme))
    assert shrunk == pytest.approx(gained, rel=1e-3)


def test_small_weights_keep_no_bias_within_a_group() -> None:
    """Where nothing is given up, the zero point that the fit ends at is the mean one."""
    weight, scheme = heavy_tailed() * 0.1, IntScheme(4, 64, False, "float")
    fitted, ranged = (
        (weight - solved.dequantize(torch.float32)).view(-1, 64).mean(1).abs().max()
        for solved in (found(weight, scheme, iterations=100), by_range(weight, scheme))
    )
    assert float(fitted) < 0.01 * float(ranged)


@pytest.mark.parametrize("in_steps", [True, False])
@pytest.mark.parametrize("power", [0.3, 0.7, 1.0])
def test_what_is_left_of_a_residual_is_the_residual_less_its_shrunk_part(power: float, in_steps: bool) -> None:
    scales = torch.rand(3, 5, 1) * 2 + 0.1
    residual = torch.randn(3, 5, 16)
    unit = 1.0 if in_steps else scales
    schedule = Schedule(power, beta=4.0, kappa=1.5, iterations=9, in_steps=in_steps)
    for iteration in (0, 3):
        error = residual * unit
        kept = error.abs() - error.abs().pow(power - 1) / (4.0 * 1.5**iteration)
        shrunk = error.sign() * kept.clamp(min=0)
        torch.testing.assert_close(schedule.left(iteration, residual, scales) * unit, error - shrunk)


def test_no_residual_at_all_leaves_nothing() -> None:
    """Here the power is infinite, and the largest scales make its factor vanish."""
    schedule = Schedule(0.7, 10.0, 1.0, 1, in_steps=False)
    residual = torch.tensor([[[0.0, 2.0]]])
    for scale in (1e-38, 1.0, 1e38):
        left = schedule.left(0, residual, torch.full((1, 1, 1), scale))
        assert bool(left.isfinite().all())
        assert float(left[0, 0, 0]) == 0


@pytest.mark.parametrize("beta_unit", ["weight", "step"])
@pytest.mark.parametrize("scheme", [scheme for scheme in schemes(3) if scheme.axis == 1], ids=names)
def test_every_row_is_fitted_by_itself(scheme: IntScheme, beta_unit: str) -> None:
    weight = heavy_tailed()
    whole, part = found(weight, scheme, beta_unit=beta_unit), found(weight[20:30], scheme, beta_unit=beta_unit)
    assert torch.equal(whole.codes[20:30], part.codes)
    assert torch.equal(whole.scales[20:30], part.scales)
    assert torch.equal(whole.zeros[20:30], part.zeros)


@pytest.mark.parametrize("scheme", schemes(3), ids=names)
def test_how_many_weights_are_fitted_at_a_time_does_not_matter(
    scheme: IntScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = heavy_tailed()
    whole = found(weight, scheme, torch.float16)
    monkeypatch.setattr(half_quadratic, "CHUNK", 640)
    parts = found(weight, scheme, torch.float16)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.zeros, parts.zeros)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", schemes(1, 4, 8), ids=names)
def test_groups_of_zeros_and_of_tiny_weights_give_finite_numbers(scheme: IntScheme, dtype: torch.dtype) -> None:
    weight = heavy_tailed()
    weight[:, :32] = 0
    weight[:32] *= 1e-30
    solved = found(weight, scheme, dtype)
    assert bool(solved.scales.isfinite().all())
    assert bool((solved.scales != 0).all())
    decoded = solved.dequantize(dtype).float()
    assert bool(decoded.isfinite().all())
    assert float((decoded - weight).square().sum()) < float(weight.square().sum())


@pytest.mark.parametrize("how", ["hqq", "minmax", "search"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_float_zeros_follow_groups_far_from_zero(axis: Literal[0, 1], dtype: torch.dtype, how: str) -> None:
    """A group of one value, and one whose range is a thousandth of its distance: 16 bits must hold the zero."""
    scheme, spread = IntScheme(4, 64, False, "float", axis), 1e-3
    weight = (torch.rand(64, 64) * spread + 0.5) * torch.where(torch.arange(64) % 2 == 0, 1, -1)
    weight = weight if axis == 0 else weight.T.contiguous()
    weight[:, 7] = 0.75
    weight[7, :] = 0.75
    solved = (
        found(weight, scheme, dtype)
        if how == "hqq"
        else Rtn(RtnOptions.model_validate({"range": how})).quantize(weight, InputStatistics(), scheme, dtype).weight
    )
    off = (weight - solved.dequantize(torch.float32)).abs().max()
    assert float(off) < (0.002 if dtype != torch.bfloat16 else 0.006)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("scheme", [*schemes(4), IntScheme(4, PER_CHANNEL)], ids=names)
def test_what_float16_cannot_hold_is_refused(scheme: IntScheme, value: float) -> None:
    weight = heavy_tailed()
    weight[5, 6] = value
    with pytest.raises(QuantizationError, match=r"not finite or needs a scale beyond the range of float16"):
        found(weight, scheme, torch.float16)


def test_scales_stay_positive_on_request() -> None:
    weight, scheme = heavy_tailed(), IntScheme(4, 64)
    turned, upright = found(weight, scheme), found(weight, scheme, negative_scales=False)
    assert bool((turned.scales < 0).any())
    assert bool((upright.scales > 0).all())
    assert loss(weight, upright) < loss(weight, by_range(weight, scheme))


@pytest.mark.parametrize("scheme", [Nf4Scheme(), Mxfp4Scheme(), Fp8Scheme()])
def test_other_schemes_are_refused_with_what_works(scheme: Nf4Scheme | Mxfp4Scheme | Fp8Scheme) -> None:
    with pytest.raises(SchemeError, match=rf"{scheme.describe()} is not one .*scheme: int .*rtn or gptq"):
        Hqq.check(scheme)
    with pytest.raises(SchemeError):
        Hqq(HqqOptions()).quantize(heavy_tailed(), InputStatistics(), scheme, torch.float32)


def test_few_bits_without_groups_are_warned_of() -> None:
    for bits in (2, 3, 4):
        (text,) = Hqq.warnings(IntScheme(bits, PER_CHANNEL))
        assert f"hqq at {bits} bits without groups" in text
        assert "2309.05516" in text
        assert "group_size" in text
    assert Hqq.warnings(IntScheme(5, PER_CHANNEL)) == ()
    assert Hqq.warnings(IntScheme(4, 128)) == ()
    assert Rtn.warnings(IntScheme(4, PER_CHANNEL)) == ()


def test_it_asks_for_no_data_and_says_so() -> None:
    method = METHODS.get("hqq")
    assert method(method.Options()).needs == frozenset()
    assert "no data" in method.cost
    assert "mobiusml.github.io/hqq_blog" in method.source
