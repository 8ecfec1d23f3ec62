"""What a method is: weights and statistics in, codes out.

This module and the method files beside it import without torch, so that a recipe can be checked and
help printed at once; a method imports its numerics where it uses them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from quantkit.schemes import IntScheme, QuantizedWeight

if TYPE_CHECKING:
    import torch


class Statistic(Enum):
    """What a method may ask to know of a layer's inputs ``x``, over all calibration tokens."""

    ABS_MEAN = "abs_mean"
    """Mean of ``|x|``, ``[in_features]``."""
    SQUARE_MEAN = "square_mean"
    """Mean of ``x**2``, the diagonal of the Gram matrix, ``[in_features]``."""
    GRAM = "gram"
    """``XᵀX / tokens``, ``[in_features, in_features]``."""


class MethodOptions(BaseModel):
    """A method's own options: keys of a variant beside the common ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(slots=True)
class InputStatistics:
    """Statistics of the input that a group of layers shares; what was not asked for is None.

    Attributes:
        tokens: how many calibration tokens reached the layers; 0 for an expert that got none.
        abs_mean, square_mean, gram: see :class:`Statistic`; float32.
    """

    tokens: int = 0
    abs_mean: torch.Tensor | None = None
    square_mean: torch.Tensor | None = None
    gram: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Solution:
    """What a method returns for a weight.

    Errors and energy are per output row and stay on the device: the mean over the calibration tokens of
    the squared output of ``w - ŵ`` and of ``w``. A method that asks for no Gram matrix gives them for
    uncorrelated inputs of unit variance, the squared norms of the rows.

    Attributes:
        weight: the codes.
        error: float32 ``[out_features]``.
        energy: float32 ``[out_features]``.
        error_before: the error before a refinement, where there was one.
        notes: what the user should know, such as a damping that had to be raised.
    """

    weight: QuantizedWeight
    error: torch.Tensor
    energy: torch.Tensor
    error_before: torch.Tensor | None = None
    notes: tuple[str, ...] = ()


class Method(ABC):
    """Chooses the codes of a weight.

    A subclass is one file: it sets the class attributes and writes :meth:`quantize`.

    Attributes:
        name: what recipes call it.
        summary: one line for ``quantkit methods``.
        source: the paper that it follows.
        Options: its own options.
        needs: the statistics that it asks for; none means that it needs no calibration.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    @classmethod
    def check(cls, scheme: IntScheme) -> None:
        """Refuse a scheme that this method cannot do.

        Raises:
            SchemeError: with the schemes that it can.
        """

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: IntScheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Choose the codes of a weight.

        Args:
            weight: float32 ``[out_features, in_features]``; rows of several layers that share the
                input may be stacked, so the result of a row must not depend on the other rows.
            statistics: of the input, on the weight's device.
            scheme: the grid; its group size divides ``in_features``.
            scale_dtype: dtype in which scales will be stored; codes must suit the rounded scales.

        Raises:
            QuantizationError: the statistics or the weight are not finite, or a scale does not fit its dtype.
        """
