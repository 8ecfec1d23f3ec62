"""Packed blocks of GGML: the codes of a scheme as raw bytes, and back. One codec a family of types.

32 weights of a row lie with their scale in a fixed number of bytes. A block begins with its scale ``d``, float16, and
for the types whose name ends in 1 the least value ``m``, float16. 4-bit codes follow two to a byte: the first 16
weights in the lower halves, the others in the upper ones. Of 5 bits, the fifth of each code lies before them, 32 in a
row. MXFP4 has one byte of exponent in place of ``d``. See ``ggml-common.h`` in https://github.com/ggml-org/llama.cpp
and ``quants.py`` of the package gguf.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch

from quantkit.errors import CheckpointError, QuantizationError
from quantkit.gguf.kquants import decoded, encoded
from quantkit.gguf.types import BLOCK, BLOCK_BYTES, MXFP4, type_of
from quantkit.schemes import GgmlScheme, IntScheme, Mxfp4Scheme, QuantizedWeight, Scheme
from quantkit.system.host import decide

HALF = BLOCK // 2
SCALE_BYTES = 2
BIAS = 127
"""Of the exponent of MXFP4."""


class Codec(ABC):
    """Packs the weights of one scheme.

    Attributes:
        kind: name of the GGML type, such as ``Q4_0``.
    """

    kind: str

    @abstractmethod
    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The nearest weight that the type holds.

        Raises:
            QuantizationError: a number is beyond what the type holds.
        """

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Raw blocks, ``weight`` uint8 ``[rows, row_bytes]``, of what :meth:`fitted` gives."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: the blocks are not those of the scheme.
        """


def codec_of(scheme: Scheme) -> Codec:
    """What packs a scheme.

    Raises:
        SchemeError: no type holds it, with what to choose instead.
    """
    kind = type_of(scheme)
    match scheme:
        case IntScheme():
            return Integers(scheme)
        case Mxfp4Scheme():
            return Mxfp4(scheme)
        case GgmlScheme():
            return GgmlBlocks(scheme)
    raise TypeError(f"no codec of {kind}")


class Integers(Codec):
    """Integer codes; a group of several blocks has its scale repeated in each.

    Scales are float32 that hold float16. Of an asymmetric group the file holds the least value ``m``, float16, and the
    zero point is ``-m / scale`` in float32. A group whose scale vanishes is constant: scale 1 and codes of 0.
    """

    def __init__(self, scheme: IntScheme) -> None:
        self.scheme = scheme
        self.kind = type_of(scheme)

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Scales, and least values, rounded to float16."""
        scales, least = self._stored(weight)
        if least is None:
            return replace(weight, scales=scales)
        return self._with_least(weight.codes, scales, least)

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Blocks of scale, least value, fifth bits and codes."""
        rows, columns = weight.codes.shape
        codes = weight.codes.view(rows, columns // BLOCK, BLOCK)
        repeated = codes.shape[1] // weight.scales.shape[1]
        scales, least = self._stored(weight)
        parts = [_half_bytes(scales.half().repeat_interleave(repeated, dim=1))]
        if least is not None:
            parts.append(_half_bytes(least.half().repeat_interleave(repeated, dim=1)))
        if self.scheme.bits == 8:
            parts.append(codes ^ 128)  # code - 128 as the bits of an int8
        else:
            if self.scheme.bits == 5:
                parts.append(_fifth_bits(codes))
            parts.append(_nibbles(codes & 15))
        return {"weight": torch.cat(parts, dim=-1).flatten(1)}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """Codes, with the scale of each group's first block, which all its blocks must have."""
        head = SCALE_BYTES if self.scheme.symmetric else 2 * SCALE_BYTES
        body = {4: BLOCK // 2, 5: 4 + BLOCK // 2, 8: BLOCK}[self.scheme.bits]
        packed = tensors["weight"]
        if packed.ndim != 2 or packed.shape[1] % (head + body):
            raise CheckpointError(f"a tensor of shape {list(packed.shape)} holds no blocks of {self.kind}")
        blocks = packed.view(packed.shape[0], -1, head + body)
        codes = self._codes(blocks[..., head:]).flatten(1)
        groups = self.scheme.groups(codes.shape[1])
        scales = self._of_groups(_from_half_bytes(blocks[..., :SCALE_BYTES]), groups)
        if self.scheme.symmetric:
            zeros = torch.full(scales.shape, self.scheme.zero, dtype=torch.uint8)
            return QuantizedWeight(self.scheme, codes, scales, zeros)
        return self._with_least(codes, scales, self._of_groups(_from_half_bytes(blocks[..., SCALE_BYTES:head]), groups))

    def _codes(self, body: torch.Tensor) -> torch.Tensor:
        if self.scheme.bits == 8:
            return body ^ 128
        if self.scheme.bits == 4:
            return _from_nibbles(body)
        return _from_nibbles(body[..., 4:]) | _from_fifth_bits(body[..., :4])

    def _stored(self, weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and least values of each group as the file holds them, in float32."""
        scales = self._half(weight.scales)
        if self.scheme.symmetric:
            return scales, None
        return scales, self._half(weight.zeros.float().neg() * weight.scales.float())

    def _half(self, values: torch.Tensor) -> torch.Tensor:
        rounded = values.half().float()
        if not decide(rounded.isfinite().all()):
            raise QuantizationError(
                f"a scale or least value is no number that float16 holds, in which {self.kind} stores it",
                "keep this layer float with 'ignore', or use a format whose scales reach further",
            )
        return rounded

    def _with_least(self, codes: torch.Tensor, scales: torch.Tensor, least: torch.Tensor) -> QuantizedWeight:
        """A weight of codes, scales and least values."""
        constant = scales == 0
        if decide(constant.any()):
            grouped = codes.view(*scales.shape, -1)
            codes = torch.where(constant.unsqueeze(-1), torch.zeros_like(grouped), grouped).flatten(1)
            scales = torch.where(constant, torch.ones_like(scales), scales)
        return QuantizedWeight(self.scheme, codes, scales, least.neg() / scales)

    def _of_groups(self, values: torch.Tensor, groups: int) -> torch.Tensor:
        """``[rows, blocks]`` to ``[rows, groups]``."""
        grouped = values.view(values.shape[0], groups, -1)
        if not torch.equal(grouped.amax(-1), grouped.amin(-1)):
            raise CheckpointError(f"blocks of one group of {self.scheme.describe()} have unlike scales in the file")
        return grouped[..., 0].contiguous()


class Mxfp4(Codec):
    """Blocks of an exponent and 32 E2M1 codes; any weight of the scheme fits.

    The package gguf and ggml double the levels and halve the scale, which comes to the same numbers: the exponent's
    byte ``e`` stands for ``2**(e - 127)`` as in the OCP specification.
    """

    kind = MXFP4

    def __init__(self, scheme: Mxfp4Scheme) -> None:
        self.scheme = scheme

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The weight itself."""
        _exponents(weight.scales)
        return weight

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Exponents and codes."""
        codes = weight.codes.view(weight.codes.shape[0], -1, BLOCK)
        exponents = _exponents(weight.scales).unsqueeze(-1)
        return {"weight": torch.cat([exponents, _nibbles(codes)], dim=-1).flatten(1)}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        packed = tensors["weight"]
        if packed.ndim != 2 or packed.shape[1] % BLOCK_BYTES[MXFP4]:
            raise CheckpointError(f"a tensor of shape {list(packed.shape)} holds no blocks of {self.kind}")
        blocks = packed.view(packed.shape[0], -1, BLOCK_BYTES[MXFP4])
        exponents = blocks[..., 0].int()
        if bool((exponents == 2 * BIAS + 1).any()):
            raise CheckpointError("a block of MXFP4 has the exponent that stands for NaN")
        scales = torch.ldexp(torch.ones(exponents.shape), exponents - BIAS)
        zeros = torch.zeros(scales.shape, dtype=torch.uint8)
        return QuantizedWeight(self.scheme, _from_nibbles(blocks[..., 1:]).flatten(1), scales, zeros)


class GgmlBlocks(Codec):
    """Types of llama.cpp's own. Blocks that its quantizer made pass as they are: the part ``blocks`` of a weight."""

    def __init__(self, scheme: GgmlScheme) -> None:
        self.scheme = scheme
        self.kind = scheme.ggml_type

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The weight itself, with its blocks."""
        return weight if "blocks" in weight.parts else replace(weight, parts={"blocks": encoded(weight)})

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The blocks."""
        return {"weight": self.fitted(weight).parts["blocks"]}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The blocks taken apart."""
        blocks = tensors["weight"]
        if blocks.ndim != 2 or blocks.shape[1] % self.scheme.block_bytes:
            raise CheckpointError(f"a tensor of shape {list(blocks.shape)} holds no blocks of {self.kind}")
        return decoded(blocks, self.scheme)


def _exponents(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes of scales that are powers of two."""
    mantissas, exponents = torch.frexp(scales.float())
    if not decide((mantissas == 0.5).all()):
        raise QuantizationError("a scale of mxfp4 is no power of two")
    return (exponents - 1 + BIAS).to(torch.uint8)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes uint8 ``[..., 32]`` to bytes ``[..., 16]``."""
    return codes[..., :HALF] | codes[..., HALF:] << 4


def _from_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_nibbles`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """The highest bit of 5-bit codes uint8 ``[..., 32]`` as bytes ``[..., 4]``, the first weight lowest."""
    bits = (codes >> 4 & 1).view(*codes.shape[:-1], 4, 8)
    weights = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=codes.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def _from_fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_fifth_bits`: 16 or 0 for each weight, ``[..., 32]``."""
    places = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> places & 1) << 4).flatten(-2)


def _half_bytes(values: torch.Tensor) -> torch.Tensor:
    """Float16 ``[...]`` as bytes ``[..., 2]``."""
    return values.contiguous().view(torch.uint8).view(*values.shape, 2)


def _from_half_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_half_bytes`, in float32."""
    return packed.contiguous().view(torch.float16).squeeze(-1).float()
