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


class _Tables:
    """E2M1 by code, and the limits up to which a magnitude goes to each, which an odd code leaves to its neighbours."""

    def __init__(self, device: torch.device) -> None:
        self.levels = torch.tensor(E2M1_TABLE, device=device)
        middles = (self.levels[1:SIGN] + self.levels[: SIGN - 1]) / 2
        odd = torch.arange(SIGN - 1, device=device) % 2 == 1
        self.limits = torch.where(odd, torch.nextafter(middles, torch.zeros_like(middles)), middles)


@cache
def _tables(device: torch.device) -> _Tables:
    """The tables on a device, where they are kept."""
    return _Tables(device)


class _E2m1Grids(FixedGrids):
    """Levels from tables, which lie on every device that asked for some."""

    highest = HIGHEST

    def levels(self, codes: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The numbers that E2M1 codes stand for; a zero has a sign."""
        return _tables(codes.device).levels.to(dtype)[codes.int()]

    def codes(self, levels: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The code of each level."""
        return self._magnitudes(levels).bitwise_or_(levels.signbit().to(torch.uint8) * SIGN)

    def nearest_(self, values: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Replace values by the nearest levels, beyond 6 by 6."""
        place = self._magnitudes(values).int()
        return values.copy_(torch.copysign(_tables(values.device).levels[place], values))

    def encode(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes; a quotient of -0.0 is 0.0, as in the package."""
        scaled = groups / grid.scales.unsqueeze(-1)
        return self._magnitudes(scaled).bitwise_or_((scaled < 0).to(torch.uint8) * SIGN)

    def _magnitudes(self, values: torch.Tensor) -> torch.Tensor:
        """The codes of magnitudes, uint8."""
        return torch.bucketize(values.abs(), _tables(values.device).limits, out_int32=True).to(torch.uint8)


class Mxfp4Grids(_E2m1Grids):
    """Blocks of 32 with a power of two as scale.

    The OCP specification takes the exponent of the largest magnitude less 2, whose block then reaches up to 8 steps
    and clips at 6. The package, and this class with it, goes to the next exponent where the largest magnitude is
    at least 1.75 times its power of two, and would round to 8.
    """

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The power of two at which the largest magnitude rounds to 4 or 6."""
        scales = _power(self._exponents(groups))
        return self.stored(scales, torch.zeros_like(scales), scale_dtype)

    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The spanning power of two and its neighbours."""
        full = self._exponents(groups)
        zero = torch.zeros_like(full, dtype=torch.float32)
        found = []
        for step in (0, 1, -1, -2)[:count]:
            exponents = (full + step).clamp_(1 - EXPONENT_BIAS, EXPONENT_BIAS)
            found.append((_power(exponents), zero))
        return found

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Scales rounded to the nearest power of two that E8M0 holds; float32 whatever ``scale_dtype`` is."""
        require_held(scales * HIGHEST, torch.float32)
        mantissas, exponents = torch.frexp(scales)
        nearest = (exponents - 1 + (mantissas >= 0.75)).clamp_(-EXPONENT_BIAS, EXPONENT_BIAS)
        return Grid(_power(nearest), zeros)

    def _exponents(self, groups: torch.Tensor) -> torch.Tensor:
        """Of the spanning scales, int32 ``[rows, groups]``."""
        largest = groups.abs().amax(-1)
        require_held(largest, torch.float32)
        mantissas, exponents = torch.frexp(largest)
        exponents = exponents - 3 + (mantissas >= 0.875)
        # Below E8M0's range lie blocks of zeros, too.
        return torch.where(largest == 0, -EXPONENT_BIAS, exponents).clamp_(-EXPONENT_BIAS, EXPONENT_BIAS)


class Nvfp4Grids(_E2m1Grids):
    """Blocks of 16 with E4M3 scales under a float32 scale per tensor.

    The effective scale of a block is ``local / tensor``; ``parts`` holds ``scales``, the bits of the local ones as
    uint8 ``[rows, groups]``, and ``global_scale``, float32 ``[1]``. The tensor's scale brings the largest local one to
    448: ``448 * 6 / max|w|``.
    """

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
        """The spanning scale and the E4M3 numbers around it."""
        common = self._common if self._common is not None else global_scale(groups.abs().amax())
        full = _to_e4m3(common * (groups.abs().amax(-1) / HIGHEST)).view(torch.uint8).int()
        zero = torch.zeros_like(full, dtype=torch.float32)
        steps = sorted(range(-count, count), key=lambda step: (abs(step), step))[:count]
        numbers = [(full + step).clamp_(1, E4M3_HIGHEST_BITS).to(torch.uint8) for step in steps]
        return [(number.view(torch.float8_e4m3fn).float() / common, zero) for number in numbers]

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Scales rounded to E4M3 under the tensor's scale; float32 whatever ``scale_dtype`` is."""
        common = self._common if self._common is not None else global_scale(scales.amax() * HIGHEST)
        local = _to_e4m3(common * scales)
        local = torch.where(local.float() == 0, E4M3_EMPTY, local.float()).to(torch.float8_e4m3fn)
        parts = {"scales": local.view(torch.uint8), "global_scale": common}
        return Grid(effective_scales(parts["scales"], common), zeros, parts)


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


def _power(exponents: torch.Tensor) -> torch.Tensor:
    """``2**exponents``, exact in float32."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def _to_e4m3(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(max=E4M3_HIGHEST).to(torch.float8_e4m3fn)
