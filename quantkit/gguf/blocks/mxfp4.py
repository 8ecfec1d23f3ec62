"""MXFP4: E2M1 codes with an E8M0 exponent.

The package gguf and ggml double the levels and halve the scale, which comes to the same numbers: the exponent's byte
``e`` stands for ``2**(e - 127)`` as in the OCP specification.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quantkit.errors import CheckpointError, QuantizationError
from quantkit.gguf.blocks.blocks import from_nibbles, nibbles
from quantkit.gguf.blocks.codec import Codec
from quantkit.gguf.blocks.types import BLOCK, MXFP4
from quantkit.schemes import Mxfp4Scheme, QuantizedWeight

BIAS = 127
BLOCK_BYTES = 1 + BLOCK // 2


class Mxfp4(Codec):
    """Blocks of an exponent and 32 codes; any weight of the scheme fits."""

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
        return {"weight": torch.cat([exponents, nibbles(codes)], dim=-1).flatten(1)}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        packed = tensors["weight"]
        if packed.ndim != 2 or packed.shape[1] % BLOCK_BYTES:
            raise CheckpointError(f"a tensor of shape {list(packed.shape)} holds no blocks of {self.kind}")
        blocks = packed.view(packed.shape[0], -1, BLOCK_BYTES)
        exponents = blocks[..., 0].int()
        if bool((exponents == 2 * BIAS + 1).any()):
            raise CheckpointError("a block of MXFP4 has the exponent that stands for NaN")
        scales = torch.ldexp(torch.ones(exponents.shape), exponents - BIAS)
        zeros = torch.zeros(scales.shape, dtype=torch.uint8)
        return QuantizedWeight(self.scheme, from_nibbles(blocks[..., 1:]).flatten(1), scales, zeros)


def _exponents(scales: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes of scales that are powers of two."""
    mantissas, exponents = torch.frexp(scales.float())
    if not bool((mantissas == 0.5).all()):
        raise QuantizationError("a scale of mxfp4 is no power of two")
    return (exponents - 1 + BIAS).to(torch.uint8)
