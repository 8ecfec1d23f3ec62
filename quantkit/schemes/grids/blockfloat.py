"""The grids of MXFP4 and NVFP4: E2M1 levels in small blocks with 8-bit scales.

Scales and codes are those that the compressed-tensors package (``calculate_qparams``, ``generate_gparam``,
``quantize``) gives for the same weight in float32. Of two levels equally near the one with the even code is taken, and
a weight below zero that rounds to zero keeps its sign. Scales are float32, whatever the dtype of the model.
"""

from __future__ import annotations

from functools import cache

import torch

from quantkit.schemes.base import Scheme
from quantkit.schemes.blockfloat import E2M1_TABLE
from quantkit.schemes.grids.base import Grid, Grids, require_held
from quantkit.schemes.grids.fixed import FixedGrids

HIGHEST = 6.0
SIGN = 8
"""The sign bit of a code."""
E4M3_HIGHEST = 448.0
E4M3_HIGHEST_BITS = 126
"""448 as an E4M3 number; positive ones ascend with their bits."""
E4M3_EMPTY = 0.125
"""The scale that the package gives a block whose own scale rounds to zero."""
EXPONENT_BIAS = 127
"""E8M0 counts exponents from -127."""


ONE, FOUR = 0x3F800000, 0x40800000
"""The bits of 1 and 4 in float32; those of its exponents are all below the bits of infinity."""
INFINITY = 0x7F800000
ROUNDS_TO_HALVES = 0.75 * 2**23
"""Added to a number below 2 and taken away again, it leaves a multiple of 1/2, of two equally near the even one."""


@cache
def _table(device: torch.device) -> torch.Tensor:
    """E2M1 by code on a device, where it is kept."""
    return torch.tensor(E2M1_TABLE, device=device)


class E2m1Grids(FixedGrids):
    """Levels from a table, which lies on every device that asked for it.

    Attributes:
        least_power: the power of two from which on levels have all their bits.
        rounds_at_one: what rounds values between 1 and 2 when it is added and taken away.
    """

    highest = HIGHEST
    least_power = 1.0
    rounds_at_one = ROUNDS_TO_HALVES

    def levels(self, codes: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The numbers that E2M1 codes stand for; a zero has a sign."""
        return _table(codes.device).to(dtype)[codes.int()]

    def codes(self, levels: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The code of each level."""
        return self._magnitudes(levels).bitwise_or_(levels.signbit().to(torch.uint8) * SIGN)

    def nearest_(self, values: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Replace values by the nearest levels, beyond 6 by 6; of two equally near by the one with the even code."""
        return nearest_e2m1(values)

    def encode(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes; a quotient of -0.0 is 0.0, as in the package."""
        scaled = groups / grid.scales.unsqueeze(-1)
        return self._magnitudes(scaled).bitwise_or_((scaled < 0).to(torch.uint8) * SIGN)

    def _magnitudes(self, values: torch.Tensor) -> torch.Tensor:
        """The codes of magnitudes, uint8."""
        levels = _nearest(values.abs())
        # From 1 on, levels are the float32 numbers of one bit of mantissa, in the order of their bits.
        counted = (levels.view(torch.int32) >> 22) - (ONE >> 22) + 2
        return torch.where(levels < 1, 2 * levels, counted).to(torch.uint8)


def nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Float32 values, which are overwritten, replaced by the nearest E2M1 numbers."""
    return torch.copysign(_nearest(values.abs()), values, out=values)


def _nearest(magnitudes: torch.Tensor) -> torch.Tensor:
    """The nearest levels of numbers that are not negative, which are overwritten.

    Levels are 1/2 apart up to 2, then 1 up to 4, then 2. A twentieth of the time of a binary search.
    """
    powers = (magnitudes.view(torch.int32) & INFINITY).clamp_(ONE, FOUR).view(torch.float32)
    rounder = powers.mul_(ROUNDS_TO_HALVES)
    return magnitudes.clamp_(max=HIGHEST).add_(rounder).sub_(rounder)


class Mxfp4Grids(E2m1Grids):
    """Blocks of 32 with a power of two as scale.

    The OCP specification takes the exponent of the largest magnitude less 2, whose block then reaches up to 8 steps
    and clips at 6. The package, and this class with it, goes to the next exponent where the largest magnitude is
    at least 1.75 times its power of two, and would round to 8.
    """

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The power of two at which the largest magnitude rounds to 4 or 6."""
        largest = groups.abs().amax(-1)
        scales = _where_finite(largest, power_of_two(spanning_exponents(largest)))
        return self.stored(scales, torch.zeros_like(scales), scale_dtype)

    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The spanning power of two and its neighbours."""
        largest = groups.abs().amax(-1)
        full, zero = spanning_exponents(largest), torch.zeros_like(largest)
        found = []
        for step in (0, 1, -1, -2)[:count]:
            exponents = (full + step).clamp_(1 - EXPONENT_BIAS, EXPONENT_BIAS)
            found.append((_where_finite(largest, power_of_two(exponents)), zero))
        return found

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Scales rounded to the nearest power of two that E8M0 holds; float32 whatever ``scale_dtype`` is."""
        mantissas, exponents = torch.frexp(scales)
        nearest = (exponents - 1 + (mantissas >= 0.75)).clamp_(-EXPONENT_BIAS, EXPONENT_BIAS)
        return Grid(_where_finite(scales * HIGHEST, power_of_two(nearest)), zeros)


def _where_finite(values: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """Powers of two where what they are of is finite, else NaN, which no grid holds: the exponent would not tell."""
    return torch.where(values.abs() <= torch.finfo(torch.float32).max, powers, torch.nan)


def spanning_exponents(largest: torch.Tensor) -> torch.Tensor:
    """The E8M0 exponents, int32, at which the largest magnitudes of blocks round to 4 or 6."""
    mantissas, exponents = torch.frexp(largest)
    exponents = exponents - 3 + (mantissas >= 0.875)
    # Below E8M0's range lie blocks of zeros, too.
    return torch.where(largest == 0, -EXPONENT_BIAS, exponents).clamp_(-EXPONENT_BIAS, EXPONENT_BIAS)


BEST_STEPS = (0, 5, -1, 4, 1, 6, 3, -2, 2)
"""E4M3 numbers to try, counted from that at which the largest weight of a block becomes 6, the most useful first.

4 and 5 steps up are about 1.5 times the scale: the largest weight becomes 4, and those between 2/3 of it and it, for
which E2M1 has no number between 4 and 6, lie closer ("four over six", arXiv:2512.02010). On held-out Gram matrices the
first 6 lose 1 % more than all, the first 8 as much; -3 to 2 lose 10 % more.
"""


class Nvfp4Grids(E2m1Grids):
    """Blocks of 16 with E4M3 scales under a float32 scale per tensor.

    The effective scale of a block is ``local / tensor``; ``parts`` holds ``scales``, the bits of the local ones as
    uint8 ``[rows, groups]``, and ``global_scale``, float32 ``[1]``. The tensor's scale brings the largest local one to
    448: ``448 * 6 / max|w|``.
    """

    whole = True

    def __init__(self, scheme: Scheme, common: torch.Tensor | None = None) -> None:
        super().__init__(scheme)
        self._common = common

    def fitted(self, groups: torch.Tensor) -> Grids:
        """The grids under the scale of this tensor."""
        return Nvfp4Grids(self.scheme, global_scale(groups.abs().amax()))

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The largest magnitude over 6."""
        scales = groups.abs().amax(-1) / HIGHEST
        return self.fitted(groups).stored(scales, torch.zeros_like(scales), scale_dtype)

    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The spanning scale and the E4M3 numbers around it, see :data:`BEST_STEPS`."""
        common = self._common if self._common is not None else global_scale(groups.abs().amax())
        full = _to_e4m3(common * (groups.abs().amax(-1) / HIGHEST)).view(torch.uint8).int()
        zero = torch.zeros_like(full, dtype=torch.float32)
        steps = [*BEST_STEPS, *(each for far in range(count) for each in (-3 - far, 7 + far))][:count]
        numbers = [(full + step).clamp_(1, E4M3_HIGHEST_BITS).to(torch.uint8) for step in steps]
        return [(number.view(torch.float8_e4m3fn).float() / common, zero) for number in numbers]

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Scales rounded to E4M3 under the tensor's scale; float32 whatever ``scale_dtype`` is."""
        common = self._common if self._common is not None else global_scale(scales.amax() * HIGHEST)
        parts = {"scales": local_scales(scales, common).view(torch.uint8), "global_scale": common}
        return Grid(effective_scales(parts["scales"], common), zeros, parts)


def local_scales(scales: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """The E4M3 scales of blocks under a scale of their tensor, by what they should come to together."""
    local = _to_e4m3(common * scales).float()
    return torch.where(local == 0, E4M3_EMPTY, local).to(torch.float8_e4m3fn)


def effective_scales(bits: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """The scales of blocks, float32, of the bits of their E4M3 numbers and the tensor's scale."""
    return bits.view(torch.float8_e4m3fn).float() / common


def global_scale(largest: torch.Tensor) -> torch.Tensor:
    """NVFP4's scale of a tensor, float32 ``[1]``; 1 where the largest magnitude is too small for any.

    Raises:
        QuantizationError: the largest magnitude is not finite.
    """
    require_held(largest, torch.float32)
    found = E4M3_HIGHEST * HIGHEST / largest.float().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(found.isinf(), 1.0, found).reshape(1)


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """``2**exponents``, exact in float32."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def _to_e4m3(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(max=E4M3_HIGHEST).to(torch.float8_e4m3fn)
