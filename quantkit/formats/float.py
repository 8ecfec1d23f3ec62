"""float: no packing at all, every tensor in one 16-bit dtype; any server loads it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.base import Format, PackedShapes
from quantkit.schemes import QuantizedWeight, Scheme
from quantkit.schemes.plain import PlainScheme

if TYPE_CHECKING:
    import torch


@FORMATS.register
class Float(Format):
    """A float checkpoint as transformers writes it."""

    name = "float"
    summary = "float16 or bfloat16, not quantized"
    runtimes = ("transformers", "vllm")
    usual = ({"scheme": "float"},)
    examples = tuple({"scheme": kind} for kind in ("bfloat16", "float16"))

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse schemes with codes."""
        if not isinstance(scheme, PlainScheme):
            raise SchemeError(
                f"format float stores no codes, and {scheme.describe()} has some",
                "use method: none with scheme: float, bfloat16 or float16, or another format",
            )

    @classmethod
    def check_together(cls, schemes: Collection[Scheme]) -> None:
        """One dtype for the whole model."""
        if len(set(schemes)) > 1:
            raise SchemeError("format float has one dtype for the whole model", "leave out overrides")

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Raise a TypeError: layers of this format are not quantized."""
        raise TypeError("format float packs nothing")

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """Raise a TypeError: layers of this format are not quantized."""
        raise TypeError("format float packs nothing")

    def packed_shapes(self, scheme: Scheme, out_features: int, in_features: int) -> PackedShapes:
        """Raise a TypeError: layers of this format are not quantized."""
        raise TypeError("format float packs nothing")

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """Empty: no layer is quantized."""
        return ()

    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """Empty: no layer is quantized."""
        return {}
