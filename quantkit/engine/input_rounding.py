"""Layers that round what they are given, as a runtime does that multiplies in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.numerics.activation_rounding import round_inputs
from quantkit.schemes.rounding import InputRounding


@dataclass(frozen=True, slots=True)
class Rounder:
    """What becomes of a layer's inputs.

    Attributes:
        rounding: how they are rounded.
        scale: the static scale, float32 ``[1]``; None where scales come with the inputs.
    """

    rounding: InputRounding
    scale: torch.Tensor | None = None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The inputs, ``[..., in_features]``, as the layer computes with them; gradients pass as if they were not."""
        found = round_inputs(values.detach(), self.rounding, self.scale)
        return values + (found - values).detach() if values.requires_grad else found


class _Forward:
    """The forward of a module, which rounds its first argument once it is told how."""

    def __init__(self, module: nn.Module, rounder: Rounder | None) -> None:
        self._own, self._module, self.rounder = type(module).forward, module, rounder

    def __call__(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._own(self._module, inputs if self.rounder is None else self.rounder(inputs), *args, **kwargs)


def put_rounder(module: nn.Module, rounder: Rounder | None) -> None:
    """Let a layer round its inputs from now on.

    Hooks before its forward still see the inputs as they come. A call that stands in such a hook goes on with the
    rounder that is put meanwhile, if one was put before it began, None or another.

    Args:
        module: a Linear or what computes like one.
        rounder: how; None leaves the inputs as they are.
    """
    forward = vars(module).get("forward")
    if isinstance(forward, _Forward):
        forward.rounder = rounder
    else:
        vars(module)["forward"] = _Forward(module, rounder)


@contextmanager
def without_rounding(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, modules leave their inputs as they are."""
    asked = [each for module in modules if isinstance(each := vars(module).get("forward"), _Forward)]
    kept = [each.rounder for each in asked]
    for each in asked:
        each.rounder = None
    try:
        yield
    finally:
        for each, rounder in zip(asked, kept, strict=True):
            each.rounder = rounder


def take_rounders(modules: Iterable[nn.Module]) -> None:
    """Let modules compute as their classes do again."""
    for module in modules:
        if isinstance(vars(module).get("forward"), _Forward):
            del vars(module)["forward"]
