"""No method: the weights stay float, for a 16-bit checkpoint of a model that was merged or converted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import SchemeError
from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Method, Solution
from quantkit.schemes import Scheme
from quantkit.schemes.plain import PlainScheme

if TYPE_CHECKING:
    import torch


@METHODS.register
class Unquantized(Method):
    """Keeps the model float; see format ``float``."""

    name = "none"
    summary = "nothing is quantized; the whole model is stored in 16 bits"
    source = "-"
    cost = "seconds"
    usual = ({"format": "float", "scheme": "float"},)

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse schemes with codes."""
        if not isinstance(scheme, PlainScheme):
            raise SchemeError(
                f"method none chooses no codes, and {scheme.describe()} has some",
                "use scheme: float, bfloat16 or float16",
            )

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Raise a TypeError: layers of these schemes stay float."""
        raise TypeError(f"a layer of {scheme.describe()} is not solved")
