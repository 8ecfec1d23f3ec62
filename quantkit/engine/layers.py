"""Layers: the weight matrices that are planned, calibrated, solved and stored.

What provides them is known here alone: ``torch.nn.Linear``, transformers' ``Conv1D``, whose weight lies transposed,
stacks of experts (:mod:`quantkit.engine.experts`), and matrices of heads (:mod:`quantkit.engine.heads`). In a model
without weights all but the first give way to Linear modules, so that whoever runs it sees the input of every layer in
the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint.conversions import Part
from quantkit.checkpoint.names import Names
from quantkit.engine.experts import can_unstack, is_stack, unstack
from quantkit.engine.heads import has_heads, split_heads


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A weight matrix that is solved as one.

    Attributes:
        name: in the checkpoint, without ``.weight``.
        path: of the module in the model.
        module: computes with it; a hook before its forward sees its input.
    """

    name: str
    path: str
    module: nn.Linear | nn.Embedding

    @property
    def weight(self) -> torch.Tensor:
        """The weight that is loaded, ``[out_features, in_features]``; of an embedding the tokens by the width."""
        return self.module.weight

    @property
    def shape(self) -> tuple[int, int]:
        """Its ``out_features`` and ``in_features``."""
        rows, columns = self.module.weight.shape
        return rows, columns

    def put(self, weight: torch.Tensor) -> None:
        """Let the model compute with another weight, in the dtype in which it computes."""
        self.module.weight.data = weight.to(self.module.weight.dtype)


def linear_modules(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers inside a module, by their names in it."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield name, child


def is_linear(module: object) -> bool:
    """Whether a module is a linear layer."""
    return isinstance(module, nn.Linear)


def adaptable_modules(model: nn.Module) -> list[str]:
    """The names of modules that LoRA can be put on: linear layers and embeddings, not the experts of a stack."""
    stacks = tuple(f"{name}." for name, module in model.named_modules() if is_stack(module))
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    return [name for name in found if not name.startswith(stacks)]


def whole_modules(model: nn.Module) -> dict[str, bool]:
    """The names of modules whose weight is one matrix that PEFT adapts, and whether it lies transposed.

    Args:
        model: as transformers builds it, before anything gave way to Linear modules.
    """
    stacks = tuple(f"{name}." for name, module in model.named_modules() if is_stack(module))
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and not n.startswith(stacks)}
    return {name: isinstance(module, Conv1D) for name, module in found.items()}


def layer_of(path: str, module: nn.Linear | nn.Embedding, names: Names) -> Layer:
    """The layer that a module of the model is."""
    return Layer(names.layer(f"{path}.weight"), path, module)


def give_way(model: PreTrainedModel) -> dict[str, Part]:
    """Put Linear modules in the place of whatever else provides layers.

    Returns:
        By the names of the new parameters what they are a part of, for :meth:`quantkit.checkpoint.names.Names.divide`.
    """
    parts: dict[str, Part] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _linear(module))
            parts[f"{name}.weight"] = Part(f"{name}.weight", _transposed)
        elif can_unstack(module):
            parts |= unstack(module, name)
        elif has_heads(module):
            parts |= split_heads(module, name)
    return parts


def _linear(module: Conv1D) -> nn.Linear:
    columns, rows = module.weight.shape
    linear = nn.Linear(columns, rows, bias=module.bias is not None, device="meta").requires_grad_(False)
    linear.bias = module.bias
    return linear


def _transposed(weight: torch.Tensor) -> torch.Tensor:
    return weight.T
