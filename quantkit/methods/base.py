"""What a method is: weights and statistics in, codes out.

This module and the method files beside it import without torch, so that a recipe can be checked and
help printed at once; a method imports its numerics where it uses them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from quantkit.errors import SchemeError
from quantkit.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.factor import Curvature
    from quantkit.numerics.mismatch import Mismatch


MEANS_TOKENS = 512
"""Calibration tokens from which means over tokens are within a few percent of what more would give."""


class Statistic(Enum):
    """What a method may ask to know of a layer's inputs ``x``, over all calibration tokens."""

    ABS_MEAN = "abs_mean"
    """Mean of ``|x|``, ``[in_features]``."""
    SQUARE_MEAN = "square_mean"
    """Mean of ``x**2``, the diagonal of the Gram matrix, ``[in_features]``."""
    GRAM = "gram"
    """``XᵀX / tokens``, ``[in_features, in_features]``."""
    ABS_MAX = "abs_max"
    """The largest ``|x|``, ``[in_features]``, from which static scales of inputs follow."""
    SAMPLE = "sample"
    """``x`` of some tokens, ``[tokens, in_features]``."""


def input_needs(schemes: Iterable[Scheme]) -> frozenset[Statistic]:
    """The statistics that schemes need whatever the method: those of static scales of inputs."""
    static = {each.numbers for scheme in schemes if (each := scheme.input_rounding) is not None and each.static}
    searched = {Statistic.SAMPLE} if "int8" in static else set()
    return frozenset({Statistic.ABS_MAX, *searched} if static else ())


class MethodOptions(BaseModel):
    """A method's own options: keys of a variant beside the common ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(slots=True)
class InputStatistics:
    """Statistics of the input that a group of layers shares; what was not asked for is None.

    Attributes:
        tokens: how many calibration tokens reached the layers; 0 for an expert that got none.
        abs_mean, square_mean, gram, abs_max, sample: see :class:`Statistic`; float32.
        derived: what was computed from them once for all variants.
        mismatch: what the input lost in the layers before it, where that was gathered; methods do not see it.
        own: the share of the tokens in them that the layer is given; below 1 for an expert's, beside others'.
        evenness: as how many even tokens they are worth, by how many there are; below 1 where tokens count unlike.
        held_out: of tokens that are not in these, by the layers whose errors they tell; methods do not see them.
    """

    tokens: int = 0
    abs_mean: torch.Tensor | None = None
    square_mean: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    abs_max: torch.Tensor | None = None
    sample: torch.Tensor | None = None
    derived: dict[Any, Any] = field(default_factory=dict)
    mismatch: Mismatch | None = None
    own: float = 1.0
    evenness: float = 1.0
    held_out: Mapping[str, InputStatistics] = field(default_factory=dict)

    @property
    def effective_tokens(self) -> int:
        """As how many tokens that count alike those in them are worth, ``(Σw)² / Σw²``."""
        return round(self.tokens * self.evenness)

    def is_empty(self) -> bool:
        """Whether nothing is known of the input, as no token reached any layer like this."""
        return all(getattr(self, each.value) is None for each in Statistic)

    def only(self, needs: frozenset[Statistic]) -> InputStatistics:
        """What was asked for and no more; what is derived from it is shared by all who ask for the same."""
        if not needs:
            return InputStatistics()
        asked = {each.value: getattr(self, each.value) for each in needs}
        return InputStatistics(self.tokens, **asked, derived=self.derived.setdefault(needs, {}), evenness=self.evenness)

    def gram_for(self, weight: torch.Tensor) -> torch.Tensor:
        """The Gram matrix, float32 ``[in_features, in_features]``; where no token came by, inputs are uncorrelated.

        Args:
            weight: float32 ``[out_features, in_features]``, for its width and device.
        """
        import torch

        return torch.eye(weight.shape[1], device=weight.device) if self.gram is None else self.gram

    def curvature(
        self, damping: float, activation_order: bool, weight: torch.Tensor, shrinkage: float = 0.0
    ) -> Curvature:
        """The damped and factorized Gram matrix; where no token came by, inputs are taken as uncorrelated.

        Args:
            damping: fraction of the mean diagonal that is added to the diagonal.
            activation_order: put the columns with the strongest inputs first.
            weight: float32 ``[out_features, in_features]``, for its width and device.
            shrinkage: share of the correlations that is taken away.

        Raises:
            QuantizationError: the matrix cannot be factorized at any damping.
        """
        from quantkit.numerics.factor import Curvature, strongest_first

        key = ("curvature", damping, activation_order, shrinkage)
        if key not in self.derived:
            gram = self.gram_for(weight)
            order = strongest_first(gram.diagonal()) if activation_order else None
            self.derived[key] = Curvature.of(gram, damping, order, shrinkage)
        found: Curvature = self.derived[key]
        return found


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
        cost: how long it takes, for ``quantkit methods``.
        usual: formats and schemes that a variant of it has where it names none, the likeliest first; where there are
            none, those of the format.
        transforms: the names of the transforms that it brings, which come right before it.
        factorizes: whether it factorizes the sums of products that it asks for; estimates of memory ask.
        needs: the statistics that it asks for, which may depend on its options; it is given these and no others.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    cost: ClassVar[str] = ""
    usual: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    transforms: ClassVar[tuple[str, ...]] = ()
    factorizes: ClassVar[bool] = False
    needs: frozenset[Statistic] = frozenset()

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse a scheme that this method cannot do.

        Raises:
            SchemeError: with the schemes that it can, or the one method that can do this one.
        """
        if scheme.orders_columns and cls.needs == frozenset():
            raise SchemeError(
                f"desc_act orders columns by their inputs, and method {cls.name} asks for no calibration",
                "leave out desc_act, or use a method that is calibrated, such as gptq",
            )
        if scheme.quantizer not in (None, cls.name):
            unquantized = scheme.quantizer == "none"
            raise SchemeError(
                f"method {cls.name} chooses codes, and {scheme.describe()} has none"
                if unquantized
                else f"only {scheme.quantizer}'s own quantizer chooses codes of {scheme.describe()}",
                f"use method: {scheme.quantizer}",
            )

    @classmethod
    def warnings(cls, scheme: Scheme) -> tuple[str, ...]:
        """What the user should know before using this method with a scheme that it can do."""
        return ()

    @property
    def corrects(self) -> bool:
        """Whether weights make up for what quantized inputs lost, see :mod:`quantkit.numerics.mismatch`."""
        return False

    def tokens_wanted(self, width: int) -> int:
        """Calibration tokens without which its statistics say too little; 0 where it asks for none.

        A Gram matrix of ``width`` columns that is factorized wants more tokens than columns, as with fewer it has no
        full rank and damping decides; means want :data:`MEANS_TOKENS`.
        """
        if not self.needs:
            return 0
        return max(MEANS_TOKENS, width + 1 if self.factorizes else 0)

    def working_copies(self, scheme: Scheme) -> float | None:
        """Weights' worth of float32 that lie beside a weight while its codes are chosen; None for what rounding takes.

        Estimates of memory ask.
        """
        return None

    def trial_errors(
        self,
        weight: torch.Tensor,
        statistics: InputStatistics,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        factors: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """What it would lose if the columns of a weight were multiplied by factors, and the input divided by the same.

        A transform asks, before which it does not know what the method makes of a weight. Any measure will do that is
        least where the output error is. Unless a method knows better, scaled weights are rounded to the grid that
        spans them.

        Args:
            weight: some rows of a layer, float32 ``[rows, in_features]``, without factors.
            statistics: of the input without factors, the Gram matrix among them whatever :attr:`needs` says.
            scheme: the grid.
            scale_dtype: dtype in which scales will be stored.
            factors: each positive, float32 ``[in_features]``.

        Returns:
            float32 ``[len(factors)]``.
        """
        from quantkit.numerics.smoothing import rounding_errors

        if statistics.gram is None:
            raise ValueError("factors are judged by the Gram matrix")
        return rounding_errors(weight, statistics.gram, scheme, scale_dtype, factors)

    def for_embeddings(self) -> Method:
        """What solves an input embedding, of which only the weight is known.

        This method, unless another comes to the same with less work.
        """
        return self

    @abstractmethod
    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
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

    def quantize_alike(
        self, given: Sequence[tuple[torch.Tensor, InputStatistics]], scheme: Scheme, scale_dtype: torch.dtype
    ) -> list[Solution]:
        """Choose the codes of weights of one shape, each with an input of its own, as the experts of a layer are.

        A method that is faster with several at once overrides this; what it gives is what :meth:`quantize` gives for
        each.
        """
        return [self.quantize(weight, statistics, scheme, scale_dtype) for weight, statistics in given]
