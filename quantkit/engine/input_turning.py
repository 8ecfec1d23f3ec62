"""Layers that are given their inputs turned by a Hadamard matrix, as a runtime turns them before it rounds them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from quantkit.numerics.orthogonal import Orthogonal, sylvester_rotation


class _Turner:
    """A hook before a module's forward and before all others: what it is given is turned.

    Attributes:
        size: of the matrix.
    """

    def __init__(self, module: nn.Module, size: int) -> None:
        self.size = size
        self.handle = module.register_forward_pre_hook(self, prepend=True)

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (turned(args[0], self.size), *args[1:])


def turned(values: torch.Tensor, size: int) -> torch.Tensor:
    """Inputs ``[..., in_features]``, each piece of ``size`` turned by Sylvester's Hadamard matrix, in float32."""
    return _matrix(size).columns(values.float()).to(values.dtype)


def put_turn(module: nn.Module, size: int) -> None:
    """Let a layer be given its inputs turned from now on; hooks before its forward see them so, too.

    Args:
        module: a Linear or what computes like one.
        size: of the Hadamard matrices; 0 leaves the inputs as they are.
    """
    known = _turner(module)
    if known is not None and known.size != size:
        known.handle.remove()
        known = None
    if known is None and size:
        _Turner(module, size)


def turn_of(module: nn.Module) -> int:
    """The size of the Hadamard matrices by which its inputs are turned; 0 for none."""
    known = _turner(module)
    return 0 if known is None else known.size


def take_turns(modules: Iterable[nn.Module]) -> None:
    """Give modules their inputs as they are again."""
    for module in modules:
        put_turn(module, 0)


def _turner(module: nn.Module) -> _Turner | None:
    return next((each for each in module._forward_pre_hooks.values() if isinstance(each, _Turner)), None)


@cache
def _matrix(size: int) -> Orthogonal:
    return sylvester_rotation(size)
