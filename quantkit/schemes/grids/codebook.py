"""The grids of NF4 and FP4: codes and scales as bitsandbytes computes them on the CPU.

Double quantization (QLoRA, arXiv:2305.14314) takes the mean off all scales of a weight and stores what is left of
each in 8 bits: a code of the dynamic data type of Dettmers 2016 (arXiv:1511.04561), and a float32 factor for every
256 of them. The order of the float operations below is that of bitsandbytes 0.50, so that the bits agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from quantkit.schemes.base import Scheme
from quantkit.schemes.codebook import NESTED_BLOCK, CodebookScheme
from quantkit.schemes.grids.base import Grid, stored
from quantkit.schemes.grids.fixed import TableGrids

LEAST_SPAN = 1e-38
"""What bitsandbytes divides by where the largest magnitude of a block is less."""
NESTED_STEPS = 65535
"""bitsandbytes looks the 8-bit codes up by values rounded to this many steps of ``-1 .. 1``."""


@dataclass(frozen=True, slots=True)
class SpannedGrid(Grid):
    """A grid that spans the range of each block, with the ranges that the codes are chosen by.

    Attributes:
        spans: the largest magnitude of each block, ``[A, G]``; the scales are these after double quantization.
    """

    spans: torch.Tensor = field(kw_only=True)


class CodebookGrids(TableGrids):
    """16 levels and a float32 scale per block, the largest magnitude in it."""

    scheme: CodebookScheme
    narrowest = 0.7

    def __init__(self, scheme: Scheme) -> None:
        if not isinstance(scheme, CodebookScheme):
            raise TypeError(f"{scheme.describe()} is not a codebook")
        super().__init__(scheme)
        zeros = [code for code, level in enumerate(scheme.table) if level == 0]
        self._second_zero = zeros[1] if len(zeros) > 1 else None

    @property
    def independent(self) -> bool:
        """Scales that are quantized themselves are rounded with their neighbours."""
        return not self.scheme.double_quant

    def encode(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes; on a grid that spans the range relative to that range, as bitsandbytes does.

        Of the two zeros of FP4, positive weights take the second.
        """
        if isinstance(grid, SpannedGrid):
            values = groups * (1 / grid.spans.clamp(min=LEAST_SPAN)).unsqueeze(-1)
        else:
            values = groups / grid.scales.unsqueeze(-1)
        codes = self._coded(values)
        if self._second_zero is not None:
            codes[(codes == 0) & (values > 0)] = self._second_zero
        return codes

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The largest magnitude of each block, which may be zero."""
        spans = groups.abs().amax(-1)
        grid = self.held(self._nested(spans, torch.zeros_like(spans)))
        return SpannedGrid(grid.scales, grid.zeros, grid.parts, spans=spans)

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """float32 scales, after double quantization where the scheme asks for it."""
        return self._nested(stored(scales, torch.float32), zeros)

    def _nested(self, scales: torch.Tensor, zeros: torch.Tensor) -> Grid:
        if not self.scheme.double_quant:
            return Grid(scales, zeros)
        parts = nested_parts(scales)
        return Grid(nested_scales(parts), zeros, parts)


def nested_parts(scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales in 8 bits.

    Args:
        scales: float32 ``[rows, groups]``.

    Returns:
        ``absmax``: uint8 codes ``[rows, groups]``; ``nested_absmax``: float32, one per 256 codes in the order of
        rows; ``nested_offset``: float32 ``[]``, the mean of the scales.
    """
    flat = scales.reshape(-1)
    offset = flat.mean()
    blocks = _blocks(flat - offset)
    spans = blocks.abs().amax(1)
    shares = (blocks * (1 / spans).unsqueeze(1)).clamp_(-1, 1).add_(1).mul_(0.5)
    # Scales that are all alike give 0 / 0, whose step as an integer is 0 or less: they take the first code.
    steps = shares.mul_(NESTED_STEPS).add_(0.5).int().clamp_(min=0)
    table = dynamic_table(scales.device)
    codes = torch.bucketize(2.0 * steps / NESTED_STEPS - 1, (table[1:] + table[:-1]) / 2, out_int32=True)
    kept = codes.to(torch.uint8).view(-1)[: flat.numel()].view(scales.shape)
    return {"absmax": kept, "nested_absmax": spans, "nested_offset": offset}


def nested_scales(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The float32 scales that the parts of :func:`nested_parts` stand for."""
    codes = parts["absmax"]
    levels = _blocks(dynamic_table(codes.device).index_select(0, codes.int().view(-1)))
    scaled = levels.mul_(parts["nested_absmax"].unsqueeze(1)).view(-1)[: codes.numel()]
    return scaled.add_(parts["nested_offset"]).view(codes.shape)


@cache
def dynamic_table(device: torch.device) -> torch.Tensor:
    """The dynamic 8-bit data type: float32 ``[256]``, ascending.

    Each of the seven decades below 1 has twice as many levels as the one before, from one on, evenly spread over
    ``0.1 .. 1`` of it; to their positive and negative sides come 0 and 1.
    """
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        decades.append(10.0 ** (exponent - 6) * ((edges[1:] + edges[:-1]) / 2))
    magnitudes = torch.cat(decades)
    table = torch.cat([-magnitudes, magnitudes, torch.tensor([0.0, 1.0])])
    return table.sort().values.to(device)


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """``[blocks, 256]``, the last filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
