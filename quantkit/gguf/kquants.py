"""Blocks of the K-quants and of IQ4_NL taken apart: codes, scales and zero points.

The layouts are those of ``ggml/src/ggml-common.h`` in llama.cpp. A type without minima decodes to exactly the float32
numbers of llama.cpp. With minima ``scale * code - minimum`` becomes ``scale * (code - minimum / scale)``, which rounds
once more. Where the scale of such a group is zero, all its weights equal the minimum: its codes become 0, its scale 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit.schemes.ggml import GgmlScheme
from quantkit.schemes.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What ``n`` blocks hold.

    Attributes:
        codes: uint8 ``[n, weights of a block]``.
        scales: float32 ``[n, groups of a block]``.
        minima: like ``scales``, what is taken off; None where the zero point is fixed.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None


def decoded(blocks: torch.Tensor, scheme: GgmlScheme) -> QuantizedWeight:
    """A weight from its blocks.

    Args:
        blocks: uint8 ``[rows, bytes of a row]`` of the scheme's type, on the CPU.
        scheme: the type.

    Returns:
        The weight, with float32 scales; zeros are float32 where there are minima, else uint8. The part ``blocks`` is
        what was given.
    """
    rows = blocks.shape[0]
    pieces = _DECODERS[scheme.ggml_type](_Cursor(blocks.contiguous().view(-1, scheme.block_bytes)))
    codes, scales = pieces.codes.reshape(rows, -1), pieces.scales.reshape(rows, -1)
    if pieces.minima is None:
        zeros = torch.full(scales.shape, scheme.zero, dtype=torch.uint8)
        return QuantizedWeight(scheme, codes, scales, zeros, {"blocks": blocks})
    constant = scales == 0
    scales = torch.where(constant, 1.0, scales)
    zeros = pieces.minima.reshape(rows, -1) / scales
    codes = codes.masked_fill(constant.repeat_interleave(scheme.sub_block, dim=1), 0)
    return QuantizedWeight(scheme, codes, scales, zeros, {"blocks": blocks})


class _Cursor:
    """Reads the fields of all blocks, ``[n, bytes]``, in the order in which they lie."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self._blocks = blocks
        self._place = 0

    def octets(self, count: int) -> torch.Tensor:
        """The next bytes: uint8 ``[n, count]``."""
        start, self._place = self._place, self._place + count
        return self._blocks[:, start : self._place]

    def half(self) -> torch.Tensor:
        """The next float16, as float32 ``[n, 1]``."""
        return self.octets(2).contiguous().view(torch.float16).float()


def _bits(octets: torch.Tensor, runs: int, shifts: tuple[int, ...], width: int) -> torch.Tensor:
    """Codes that share bytes: of each of ``runs`` runs of bytes first those at the first shift, then the next."""
    split = octets.reshape(octets.shape[0], runs, 1, -1) >> torch.tensor(shifts, dtype=torch.uint8).view(1, 1, -1, 1)
    return (split & ((1 << width) - 1)).reshape(octets.shape[0], -1)


def _nibbles(octets: torch.Tensor, runs: int = 1) -> torch.Tensor:
    return _bits(octets, runs, (0, 4), 4)


def _iq4_nl(read: _Cursor) -> _Pieces:
    scale = read.half()
    return _Pieces(_nibbles(read.octets(16)), scale)


def _q2_k(read: _Cursor) -> _Pieces:
    packed = read.octets(16)
    codes = _bits(read.octets(64), 2, (0, 2, 4, 6), 2)
    scale, minimum = read.half(), read.half()
    return _Pieces(codes, scale * (packed & 15), minimum * (packed >> 4))


def _q3_k(read: _Cursor) -> _Pieces:
    high = _bits(read.octets(32), 1, tuple(range(8)), 1)
    codes = _bits(read.octets(64), 2, (0, 2, 4, 6), 2) | (high << 2)
    packed = read.octets(12)
    steps = _nibbles(packed[:, :8]) | (_bits(packed[:, 8:], 1, (0, 2, 4, 6), 2) << 4)
    return _Pieces(codes, read.half() * (steps.float() - 32))


def _q4_k(read: _Cursor) -> _Pieces:
    scales, minima = _six_bit_scales(read)
    return _Pieces(_nibbles(read.octets(128), 4), scales, minima)


def _q5_k(read: _Cursor) -> _Pieces:
    scales, minima = _six_bit_scales(read)
    high = _bits(read.octets(32), 1, tuple(range(8)), 1)
    return _Pieces(_nibbles(read.octets(128), 4) | (high << 4), scales, minima)


def _q6_k(read: _Cursor) -> _Pieces:
    low = _nibbles(read.octets(128), 2)
    codes = low | (_bits(read.octets(64), 2, (0, 2, 4, 6), 2) << 4)
    steps = read.octets(16).contiguous().view(torch.int8)
    return _Pieces(codes, read.half() * steps)


def _six_bit_scales(read: _Cursor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of eight sub-blocks: two float16 and twelve bytes with the steps, the last four in pieces."""
    scale, minimum, packed = read.half(), read.half(), read.octets(12)
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale_steps = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1)
    minimum_steps = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1)
    return scale * scale_steps, minimum * minimum_steps


_DECODERS: dict[str, Callable[[_Cursor], _Pieces]] = {
    "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
