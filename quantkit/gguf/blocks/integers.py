"""Q4_0, Q5_0 and Q8_0, symmetric, and Q4_1 and Q5_1 with a least value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from quantkit.errors import CheckpointError, QuantizationError
from quantkit.gguf.blocks.blocks import (
    fifth_bits,
    from_fifth_bits,
    from_half_bytes,
    from_nibbles,
    half_bytes,
    nibbles,
)
from quantkit.gguf.blocks.codec import Codec
from quantkit.gguf.blocks.types import BLOCK, type_of
from quantkit.schemes import IntScheme, QuantizedWeight

SCALE_BYTES = 2


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
        parts = [half_bytes(scales.half().repeat_interleave(repeated, dim=1))]
        if least is not None:
            parts.append(half_bytes(least.half().repeat_interleave(repeated, dim=1)))
        if self.scheme.bits == 8:
            parts.append(codes ^ 128)  # code - 128 as the bits of an int8
        else:
            if self.scheme.bits == 5:
                parts.append(fifth_bits(codes))
            parts.append(nibbles(codes & 15))
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
        scales = self._of_groups(from_half_bytes(blocks[..., :SCALE_BYTES]), groups)
        if self.scheme.symmetric:
            zeros = torch.full(scales.shape, self.scheme.zero, dtype=torch.uint8)
            return QuantizedWeight(self.scheme, codes, scales, zeros)
        return self._with_least(codes, scales, self._of_groups(from_half_bytes(blocks[..., SCALE_BYTES:head]), groups))

    def _codes(self, body: torch.Tensor) -> torch.Tensor:
        if self.scheme.bits == 8:
            return body ^ 128
        if self.scheme.bits == 4:
            return from_nibbles(body)
        return from_nibbles(body[..., 4:]) | from_fifth_bits(body[..., :4])

    def _stored(self, weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and least values of each group as the file holds them, in float32."""
        scales = self._half(weight.scales)
        if self.scheme.symmetric:
            return scales, None
        return scales, self._half(weight.zeros.float().neg() * weight.scales.float())

    def _half(self, values: torch.Tensor) -> torch.Tensor:
        rounded = values.half().float()
        if not bool(rounded.isfinite().all()):
            raise QuantizationError(
                f"a scale or least value is no number that float16 holds, in which {self.kind} stores it",
                "keep this layer float with 'ignore', or use a format whose scales reach further",
            )
        return rounded

    def _with_least(self, codes: torch.Tensor, scales: torch.Tensor, least: torch.Tensor) -> QuantizedWeight:
        """A weight of codes, scales and least values."""
        constant = scales == 0
        if bool(constant.any()):
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
