"""Methods one after another: ``awq+gptq`` scales as AWQ does and solves as GPTQ does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import create_model

from quantkit.errors import RecipeError
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution
from quantkit.schemes import Scheme

if TYPE_CHECKING:
    import torch


class Composed(Method):
    """Factors from one method, codes from another.

    Attributes:
        Scaler: the method whose factors are used; it declares ``ScalingOptions``, the options that they depend on.
        Solver: the method that chooses codes.
    """

    Scaler: ClassVar[type[Method]]
    Solver: ClassVar[type[Method]]
    scales_inputs = True

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        self._scaler = self.Scaler(_part(self.Scaler.Options, options))
        self._solver = self.Solver(_part(self.Solver.Options, options))
        self.needs = self._scaler.needs | self._solver.needs

    def working_copies(self, scheme: Scheme) -> float | None:
        """What the second method takes."""
        return self._solver.working_copies(scheme)

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Both must take the scheme."""
        cls.Scaler.check(scheme)
        cls.Solver.check(scheme)

    @classmethod
    def warnings(cls, scheme: Scheme) -> tuple[str, ...]:
        """What either has to say."""
        return (*cls.Scaler.warnings(scheme), *cls.Solver.warnings(scheme))

    def channel_factors(
        self,
        members: Sequence[tuple[torch.Tensor, Scheme]],
        statistics: InputStatistics,
        scale_dtype: torch.dtype,
        channels: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The factors of the first method."""
        return self._scaler.channel_factors(members, statistics, scale_dtype, channels)

    def for_embeddings(self) -> Method:
        """What the second method uses."""
        return self._solver.for_embeddings()

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        """The codes of the second method."""
        return self._solver.quantize(weight, statistics, scheme, scale_dtype)


@cache
def composed(name: str, scaler: type[Method], solver: type[Method]) -> type[Method]:
    """The class of a composed method.

    Raises:
        RecipeError: the first method has no factors to give, or the second would scale again.
    """
    if not scaler.scales_inputs or not hasattr(scaler, "ScalingOptions"):
        raise RecipeError(f"method '{name}': {scaler.name} does not scale inputs", "the first part must, as awq does")
    if solver.scales_inputs:
        raise RecipeError(
            f"method '{name}': {solver.name} scales inputs itself", "the last part must only choose codes"
        )
    scaling = cast(type[MethodOptions], scaler.ScalingOptions)
    options = create_model(f"{scaling.__name__}And{solver.Options.__name__}", __base__=(scaling, solver.Options))
    return type(
        f"{scaler.__name__}{solver.__name__}",
        (Composed,),
        {
            "name": name,
            "summary": f"the factors of {scaler.name}, then {solver.summary}",
            "source": f"{scaler.source}; {solver.source}",
            "cost": solver.cost,
            "factorizes": solver.factorizes,
            "Options": options,
            "Scaler": scaler,
            "Solver": solver,
            "__doc__": f"{scaler.name}, then {solver.name}.",
        },
    )


def _part(kind: type[MethodOptions], options: MethodOptions) -> MethodOptions:
    """The options that one of the methods knows."""
    given = {name: getattr(options, name) for name in type(options).model_fields if name in kind.model_fields}
    return kind.model_validate(given)
