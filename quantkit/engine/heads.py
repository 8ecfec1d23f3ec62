"""Matrices of heads as linear layers, one a head.

Some recurrent blocks project each head by a matrix of its own, all of which lie in one parameter ``[heads, rows,
columns]`` that the block multiplies by as it would by a tensor. Such a parameter gives way to a list of
``torch.nn.Linear`` modules that stands in these products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.conversions import Part


class Heads(nn.ModuleList):
    """Linear layers in the place of a parameter ``[heads, rows, columns]``."""

    def __getitem__(self, index: Any) -> Any:
        """A layer; itself where a dimension is put in for the batch, ``[:, None]``."""
        return self if isinstance(index, tuple) else super().__getitem__(index)

    def __matmul__(self, given: torch.Tensor) -> torch.Tensor:
        """The product with ``[heads, batch, columns, tokens]``."""
        found = [linear(each.transpose(-1, -2)) for linear, each in zip(self, given, strict=True)]
        return torch.stack(found).transpose(-1, -2)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Stands in ``torch.baddbmm(bias, given, heads)``, where ``given`` is ``[heads, tokens, columns]``."""
        if func is not torch.baddbmm or kwargs or not isinstance(args[2], Heads):
            return NotImplemented
        bias, given, heads = args
        return bias + torch.stack([linear(each) for linear, each in zip(heads, given, strict=True)])


def has_heads(module: nn.Module) -> bool:
    """Whether a module has parameters that :func:`split_heads` knows."""
    return bool(_stacks(module))


def split_heads(module: nn.Module, path: str) -> dict[str, Part]:
    """Put linear layers on meta in the place of a module's matrices of heads.

    Args:
        module: the module.
        path: its name in the model.

    Returns:
        By the names of the new parameters what they are a part of.
    """
    parts: dict[str, Part] = {}
    for leaf, is_transposed in _stacks(module).items():
        stack = module.get_parameter(leaf)
        heads = Heads()
        for index in range(stack.shape[0]):
            own = _Cut(index, is_transposed)
            rows, columns = own(stack).shape
            heads.append(nn.Linear(columns, rows, bias=False, device="meta").requires_grad_(False))
            parts[f"{path}.{leaf}.{index}.weight"] = Part(f"{path}.{leaf}", own, index)
        delattr(module, leaf)
        module.add_module(leaf, heads)
    return parts


class _Cut:
    """The view of a parameter that is the matrix of a head, ``[out_features, in_features]``."""

    def __init__(self, head: int, is_transposed: bool) -> None:
        self._head = head
        self._is_transposed = is_transposed

    def __call__(self, stack: torch.Tensor) -> torch.Tensor:
        return stack[self._head].T if self._is_transposed else stack[self._head]


def _stacks(module: nn.Module) -> dict[str, bool]:
    """The parameters of a module that are matrices of heads, and whether these lie transposed.

    Those of Zamba's Mamba project from a head's width, to which its time step goes back. Those of RecurrentGemma are
    square gates, each with a bias ``[heads, width]``.
    """
    own = {name: tuple(each.shape) for name, each in module._parameters.items() if each is not None and each.ndim > 1}
    x_proj, dt_proj = own.get("x_proj_weight", ()), own.get("dt_proj_weight", ())
    found = {}
    if len(x_proj) == len(dt_proj) == 3 and x_proj[2] == dt_proj[1]:
        found["x_proj_weight"] = False
    for name, shape in own.items():
        bias = own.get(name.removesuffix("weight") + "bias")
        if name.endswith("gate_weight") and len(shape) == 3 and shape[1] == shape[2] and bias == shape[:2]:
            found[name] = True
    return found
