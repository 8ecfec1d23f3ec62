"""Types whose blocks llama.cpp's own quantizer makes, which pass as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.errors import CheckpointError
from quantkit.gguf.blocks.codec import Codec
from quantkit.schemes import GgmlScheme, QuantizedWeight

if TYPE_CHECKING:
    import torch


class GgmlBlocks(Codec):
    """The part ``blocks`` of a weight."""

    def __init__(self, scheme: GgmlScheme) -> None:
        self.scheme = scheme
        self.kind = scheme.ggml_type

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The weight itself."""
        return weight

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The blocks."""
        return {"weight": weight.parts["blocks"]}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The blocks taken apart."""
        from quantkit.gguf.kquants import decoded

        blocks = tensors["weight"]
        if blocks.ndim != 2 or blocks.shape[1] % self.scheme.block_bytes:
            raise CheckpointError(f"a tensor of shape {list(blocks.shape)} holds no blocks of {self.kind}")
        return decoded(blocks, self.scheme)
