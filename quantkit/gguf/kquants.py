"""Blocks of the K-quants and of IQ4_NL, both ways: taken apart to codes, scales and zero points, and put together.

The layouts are those of ``ggml/src/ggml-common.h`` in llama.cpp. A type without minima decodes to exactly the float32
numbers of llama.cpp. With minima ``scale * code - minimum`` becomes ``scale * (code - minimum / scale)``, which rounds
once more. Where the scale of such a group is zero, all its weights equal the minimum: its codes become 0, its scale 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def encoded(weight: QuantizedWeight) -> torch.Tensor:
    """The blocks of a weight whose codes quantkit chose, uint8 ``[rows, bytes of a row]``.

    Args:
        weight: of a K-quant, with the parts of :class:`quantkit.schemes.grids.ggml.KQuantGrids`, or of IQ4_NL.
    """
    scheme = weight.scheme
    if not isinstance(scheme, GgmlScheme):
        raise TypeError(f"{scheme.describe()} is no type of llama.cpp's own")
    rows, blocks = weight.codes.shape[0], weight.codes.numel() // scheme.block
    fields = {name: part.reshape(blocks, -1) for name, part in weight.parts.items() if name in _FIELDS}
    fields.setdefault("scale", weight.scales.half().reshape(-1, scheme.block // scheme.sub_block))
    pieces = _ENCODERS[scheme.ggml_type](_Fields(weight.codes.reshape(blocks, -1), fields))
    octets = [piece.contiguous().view(torch.uint8) for piece in pieces]
    return torch.cat([piece.view(blocks, -1) for piece in octets], dim=1).view(rows, -1)


class _Fields:
    """What ``n`` blocks are made of: codes, uint8 ``[n, weights]``, and their scales and steps."""

    def __init__(self, codes: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> None:
        self.codes = codes
        self._fields = fields

    def half(self, name: str) -> torch.Tensor:
        """Float16 ``[n, 1]``."""
        return self._fields[name].half()

    def steps(self, name: str) -> torch.Tensor:
        """Whole numbers, int8 ``[n, groups of a block]``."""
        return self._fields[name]


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


def _packed(codes: torch.Tensor, runs: int, shifts: tuple[int, ...], width: int) -> torch.Tensor:
    """The inverse of :func:`_bits`, of the lowest ``width`` bits of codes uint8 ``[n, codes]``."""
    places = torch.tensor(shifts, dtype=torch.uint8, device=codes.device).view(1, 1, -1, 1)
    split = (codes & ((1 << width) - 1)).view(codes.shape[0], runs, len(shifts), -1) << places
    return split.sum(2, dtype=torch.uint8).flatten(1)  # no two have a bit in common


def _packed_nibbles(codes: torch.Tensor, runs: int = 1) -> torch.Tensor:
    return _packed(codes, runs, (0, 4), 4)


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


def _to_iq4_nl(write: _Fields) -> list[torch.Tensor]:
    return [write.half("scale"), _packed_nibbles(write.codes)]


def _to_q2_k(write: _Fields) -> list[torch.Tensor]:
    steps = write.steps("scale_steps").view(torch.uint8) | write.steps("minimum_steps").view(torch.uint8) << 4
    codes = _packed(write.codes, 2, (0, 2, 4, 6), 2)
    return [steps, codes, write.half("scale"), write.half("minimum")]


def _to_q3_k(write: _Fields) -> list[torch.Tensor]:
    steps = (write.steps("scale_steps") + 32).view(torch.uint8)
    low, high = _packed_nibbles(steps), _packed(steps >> 4, 1, (0, 2, 4, 6), 2)
    codes = write.codes
    return [
        _packed(codes >> 2, 1, tuple(range(8)), 1),
        _packed(codes, 2, (0, 2, 4, 6), 2),
        low,
        high,
        write.half("scale"),
    ]


def _to_q4_k(write: _Fields) -> list[torch.Tensor]:
    return [*_to_six_bit_scales(write), _packed_nibbles(write.codes, 4)]


def _to_q5_k(write: _Fields) -> list[torch.Tensor]:
    high = _packed(write.codes >> 4, 1, tuple(range(8)), 1)
    return [*_to_six_bit_scales(write), high, _packed_nibbles(write.codes, 4)]


def _to_q6_k(write: _Fields) -> list[torch.Tensor]:
    low, high = _packed_nibbles(write.codes, 2), _packed(write.codes >> 4, 2, (0, 2, 4, 6), 2)
    return [low, high, write.steps("scale_steps"), write.half("scale")]


def _to_six_bit_scales(write: _Fields) -> list[torch.Tensor]:
    """The inverse of :func:`_six_bit_scales`."""
    scales, minima = (write.steps(name).view(torch.uint8) for name in ("scale_steps", "minimum_steps"))
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    third = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return [write.half("scale"), write.half("minimum"), first, second, third]


_FIELDS = ("scale", "minimum", "scale_steps", "minimum_steps")
_ENCODERS: dict[str, Callable[[_Fields], list[torch.Tensor]]] = {
    "IQ4_NL": _to_iq4_nl,
    "Q2_K": _to_q2_k,
    "Q3_K": _to_q3_k,
    "Q4_K": _to_q4_k,
    "Q5_K": _to_q5_k,
    "Q6_K": _to_q6_k,
}
_DECODERS: dict[str, Callable[[_Cursor], _Pieces]] = {
    "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
