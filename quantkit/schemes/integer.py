"""Integer codes: ``w = (code - zero) * scale``.

Codes and zeros lie in ``0 .. 2**bits - 1``, with one scale and zero per group. Symmetric: ``zero = 2**(bits - 1)``,
so that it need not be stored. This is the uniform affine quantization of Jacob et al. 2018 (arXiv:1712.05877), laid
out per group as in GPTQ (arXiv:2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from quantkit.errors import SchemeError
from quantkit.schemes.base import PER_CHANNEL, Scheme, group_name
from quantkit.schemes.kinds import SCHEMES
from quantkit.schemes.rounding import InputRounding

INTEGER_BITS = (1, 2, 3, 4, 5, 6, 7, 8)


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class IntScheme(Scheme):
    """Integer codes with a scale, and if asymmetric a zero point, per group.

    Args:
        bits: width of a code, 1 to 8.
        group_size: weights that share a scale; ``-1`` is one scale per output row.
        symmetric: the zero point is fixed at ``2**(bits - 1)`` and not stored.
        zeros: zero points are whole codes (``int``), or any number, stored like a scale (``float``).
        axis: 1 groups neighbouring weights of a row; 0 groups weights of one column, those whose places in the
            flattened weight differ by a multiple of ``numel / group_size``, as HQQ does.
        activations: has the runtime round a layer's inputs as well: ``dynamic`` to 8-bit integers per token (W8A8,
            W4A8), ``static`` to 8-bit integers per tensor by a calibrated scale, ``fp8`` to 8-bit floats per token.
        desc_act: groups gather columns of like activation, strongest first, instead of neighbours; the weight's part
            ``g_idx``, int32 ``[in_features]``, tells the group of each column.
    """

    kind: ClassVar[str] = "int"
    summary: ClassVar[str] = "integer codes, 1 to 8 bits; grouped or per channel, symmetric or with zero points"
    source: ClassVar[str] = "Jacob et al. 2018, arXiv:1712.05877"
    grid_class: ClassVar[str] = "quantkit.schemes.grids.integer:IntGrids"

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    zeros: Literal["int", "float"] = "int"
    axis: Literal[0, 1] = 1
    activations: Literal["dynamic", "static", "fp8"] | None = None
    desc_act: bool = False

    def __post_init__(self) -> None:
        if self.bits not in INTEGER_BITS:
            allowed = ", ".join(map(str, INTEGER_BITS))
            raise SchemeError(f"bits {self.bits} is not a width that quantkit has", f"allowed: {allowed}")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise SchemeError(f"group_size {self.group_size} is not positive", "use -1 for one scale per channel")
        if self.symmetric and self.bits == 1:
            raise SchemeError("a symmetric grid of 1 bit has no level above zero", "use symmetric: false")
        if self.symmetric and self.zeros == "float":
            raise SchemeError("a symmetric scheme stores no zero points", "use symmetric: false with zeros: float")
        if self.axis == 0 and self.group_size == PER_CHANNEL:
            raise SchemeError("axis 0 shares scales down a column and needs a group_size", "give a group_size")
        self._check_activations()
        if self.desc_act and (self.axis == 0 or self.group_size == PER_CHANNEL):
            raise SchemeError("desc_act orders the columns of groups along axis 1", "give a group_size and axis: 1")

    def _check_activations(self) -> None:
        """Refuse weights beside which no runtime rounds inputs."""
        if self.activations is None:
            return
        if not self.symmetric or self.bits == 1 or self.axis == 0 or self.desc_act:
            raise SchemeError(
                "rounded inputs need symmetric weights of 2 bits or more, along axis 1 and without desc_act",
                "use symmetric: true, or leave out activations",
            )
        if self.activations == "static" and (self.bits, self.group_size) != (8, PER_CHANNEL):
            raise SchemeError(
                "a static scale of inputs needs 8-bit weights per channel",
                "use bits: 8 with group_size: -1, or activations: dynamic",
            )
        if self.activations == "fp8" and (self.bits != 4 or self.group_size == PER_CHANNEL):
            raise SchemeError("inputs in fp8 need 4-bit weights in groups", "use bits: 4 with group_size: 128")

    @property
    def input_rounding(self) -> InputRounding | None:
        """8-bit integers or floats per token, or 8-bit integers per tensor, on request."""
        if self.activations is None:
            return None
        return InputRounding("fp8" if self.activations == "fp8" else "int8", static=self.activations == "static")

    @property
    def orders_columns(self) -> bool:
        """On request."""
        return self.desc_act

    @property
    def stacks(self) -> bool:
        """Groups down a column cross rows."""
        return self.axis == 1

    @property
    def free_scales(self) -> bool:
        """A refit row by row needs scales that rows do not share."""
        return self.axis == 1

    @property
    def levels(self) -> int:
        """Number of different codes."""
        return 1 << self.bits

    @property
    def zero(self) -> int:
        """The zero point of the symmetric grid."""
        return 1 << (self.bits - 1)

    def check_layer(self, out_features: int, in_features: int) -> None:
        """Refuse a layer that the groups do not divide.

        Raises:
            SchemeError: ``group_size`` does not divide its row, or for axis 0 its weights.
        """
        if self.axis == 1:
            self.groups(in_features)
        elif out_features * in_features % self.group_size:
            raise SchemeError(
                f"group_size {self.group_size} does not divide the {out_features * in_features} weights of the layer",
                "choose a power of two",
            )

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """Code, and this group's share of scale and zero point."""
        zero_bits = 0 if self.symmetric else scale_bits if self.zeros == "float" else self.bits
        return self.bits + (scale_bits + zero_bits) / self.columns_per_group(in_features)

    def describe(self) -> str:
        """A short name, such as ``int4 g64 sym``."""
        parts = [f"int{self.bits}", group_name(self.group_size), "sym" if self.symmetric else "asym"]
        extras = {"float zeros": self.zeros == "float", "axis 0": self.axis == 0, "a8": self.activations == "dynamic"}
        extras |= {"a8 static": self.activations == "static", "afp8": self.activations == "fp8"}
        extras |= {"desc_act": self.desc_act}
        return " ".join([*parts, *(name for name, there in extras.items() if there)])
