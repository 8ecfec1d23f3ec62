"""LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339): int8 codes, and the largest magnitude of each output row.

``weight`` is int8 ``[out_features, in_features]``, ``SCB`` float32 ``[out_features]``, and ``weight_format`` a uint8
that says in which order the codes lie, 0 for rows. A weight is ``code * SCB / 127``, where bitsandbytes multiplies by
the float32 next to 1 / 127. Inputs are rounded to 8 bits per token, but for columns with a magnitude of 6 or more,
which are multiplied in 16 bits. bitsandbytes itself never writes the code -128; it decodes it like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.formats._bitsandbytes.layout import Layout
from quantkit.formats.base import PackedShapes
from quantkit.schemes import PER_CHANNEL, IntScheme, QuantizedWeight

if TYPE_CHECKING:
    import torch

INT8 = IntScheme(8, PER_CHANNEL, symmetric=True, activations="dynamic")
STEP = 7.874015718698502e-3
"""What bitsandbytes multiplies by for a division by 127."""
ROWS_IN_ORDER = 0
ROUNDED_INPUTS = (
    "bitsandbytes int8: inputs are rounded to float16 and then to 8 bits per token, but for columns with a magnitude "
    "of 6 or more, so that logits differ from those of the decoded weights"
)


class Int8(Layout):
    """The 8-bit layout."""

    suffixes = ("weight", "SCB", "weight_format")
    computes_in = ("float32", "float16", "bfloat16")
    remark = ROUNDED_INPUTS
    scheme = INT8

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The same codes with scales that are a float32 times :data:`STEP`; part ``scb`` is that float32 ``[rows]``."""
        if "scb" in weight.parts:
            return weight
        return _scaled(weight, weight.scales.float().flatten() / STEP)

    def pack(self, weight: QuantizedWeight, dtype: str) -> dict[str, torch.Tensor]:
        """Signed codes, the largest magnitude of each row, and the order."""
        import torch

        return {
            "weight": (weight.codes.to(torch.int16) - INT8.zero).to(torch.int8),
            "SCB": self.fitted(weight).parts["scb"].contiguous(),
            "weight_format": torch.tensor(ROWS_IN_ORDER, dtype=torch.uint8),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: the codes lie in an order of early versions of bitsandbytes, or do not fit their scales.
        """
        import torch

        weight, scb = tensors["weight"], tensors["SCB"]
        if int(tensors["weight_format"]) != ROWS_IN_ORDER:
            raise CheckpointError(
                "an int8 layer of bitsandbytes is stored in tiles for one kind of GPU (weight_format is not 0)",
                "save the model again with a current bitsandbytes",
            )
        if weight.dtype != torch.int8 or weight.ndim != 2 or scb.numel() != weight.shape[0]:
            raise CheckpointError(
                f"an int8 layer of bitsandbytes has codes {weight.dtype} {list(weight.shape)} and {scb.numel()} scales",
                "the file is broken: get it again",
            )
        codes = (weight.to(torch.int16) + INT8.zero).to(torch.uint8)
        zeros = torch.full((scb.numel(), 1), INT8.zero, dtype=torch.uint8)
        return _scaled(QuantizedWeight(INT8, codes, scb, zeros), scb.float().flatten())

    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """The shape of the codes."""
        rows, columns = shapes["weight"]
        return rows, columns

    def packed_shapes(self, rows: int, columns: int, dtype: str) -> PackedShapes:
        """A byte a weight, a float a row, and the order."""
        return {"weight": ("int8", (rows, columns)), "SCB": ("float32", (rows,)), "weight_format": ("uint8", ())}

    def config(self, dtype: str) -> dict[str, Any]:
        """8 bits."""
        return {"load_in_4bit": False, "load_in_8bit": True}


def _scaled(weight: QuantizedWeight, scb: torch.Tensor) -> QuantizedWeight:
    return replace(weight, scales=(scb * STEP).unsqueeze(1), parts={"scb": scb})
