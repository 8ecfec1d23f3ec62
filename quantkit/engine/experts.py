"""Stacks of experts as linear layers, one an expert and projection.

transformers keeps the experts of a block in two or three parameters, ``[experts, rows, columns]``, and computes with
them by a function that can be chosen by name (``transformers.integrations.moe``). The classes that take part say how
their parameters lie: transposed, interleaved, with biases, without a gate. So no model has to be known here: the
parameters give way to ``torch.nn.Linear`` modules called ``experts.INDEX.gate_proj``, ``up_proj`` and ``down_proj``,
and a function that computes with these is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.conversions import Part

IMPLEMENTATION = "quantkit"
"""The name under which transformers knows the function that computes with linear layers."""
MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers says of a stack of experts; a class that takes part has all of them."""


def is_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of experts whose function can be chosen, whatever its experts lie in."""
    return all(mark in vars(module) for mark in MARKS)


def can_unstack(module: nn.Module) -> bool:
    """Whether a module keeps experts in the parameters that :func:`unstack` knows."""
    return is_stack(module) and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def unstack(module: Any, path: str) -> dict[str, Part]:
    """Put linear layers on meta in the place of a stack's parameters.

    Args:
        module: the stack.
        path: its name in the model.

    Returns:
        By the names of the new parameters what they are a part of.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    parts: dict[str, Part] = {}
    stacks = {leaf: parameter.shape for leaf, parameter in module.named_parameters(recurse=False)}
    for leaf in stacks:
        delattr(module, leaf)
    for index in range(stacks["down_proj"][0]):
        expert = nn.Module()
        for leaf, stack, piece in _pieces(module):
            rows, columns = stacks[stack][1:] if not module.is_transposed else stacks[stack][:0:-1]
            pieces = piece[1]
            linear = _linear(columns, rows // pieces, module.has_bias)
            expert.add_module(leaf, linear)
            for name in [name for name, _ in linear.named_parameters()]:
                whole = f"{path}.{stack}" if name == "weight" else f"{path}.{stack}_bias"
                cut = _Cut(index, piece, module.is_concatenated, module.is_transposed and name == "weight")
                parts[f"{path}.{index}.{leaf}.{name}"] = Part(
                    whole, cut, index, piece if name == "weight" else (0, 0), leaf
                )
        module.add_module(str(index), expert)
    module.config._experts_implementation = IMPLEMENTATION
    return parts


def _linear(columns: int, rows: int, bias: bool) -> nn.Linear:
    """A linear layer on meta; without the drawing of weights, which takes its time even there."""
    linear = nn.Linear(1, 1, bias=bias, device="meta")
    linear.in_features, linear.out_features = columns, rows
    shapes = {"weight": (rows, columns), **({"bias": (rows,)} if bias else {})}
    for name, shape in shapes.items():
        setattr(linear, name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return linear


def _pieces(module: Any) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """The projections of an expert: their names, the parameter in which they lie, and which piece of it they are."""
    if module.has_gate:
        yield "gate_proj", "gate_up_proj", (0, 2)
        yield "up_proj", "gate_up_proj", (1, 2)
    else:
        yield "up_proj", "up_proj", (0, 1)
    yield "down_proj", "down_proj", (0, 1)


class _Cut:
    """The view of a stack, ``[experts, rows, columns]`` or ``[experts, rows]``, that is a projection of one expert."""

    def __init__(self, expert: int, piece: tuple[int, int], concatenated: bool, transposed: bool) -> None:
        self._expert = expert
        self._piece = piece
        self._concatenated = concatenated
        self._transposed = transposed

    def __call__(self, stack: torch.Tensor) -> torch.Tensor:
        own = stack[self._expert].T if self._transposed else stack[self._expert]
        place, pieces = self._piece
        return own.chunk(pieces)[place] if self._concatenated else own[place::pieces]


def forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What a stack of experts computes, expert by expert and by linear layers.

    An expert is called with the tokens that were routed to it, in their order; one without tokens is not called. Sums
    are taken in the same order every time.

    Args:
        self: the stack, see :func:`unstack`.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: int64 ``[tokens, k]``, the experts of each token.
        top_k_weights: ``[tokens, k]``.

    Returns:
        ``[tokens, hidden]``.
    """
    outputs = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1])
    for index in range(self.num_experts):
        token, slot = (top_k_index == index).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        expert = getattr(self, str(index))
        read = hidden_states[token]
        inner = _gated(self, expert, read) if self.has_gate else self.act_fn(expert.up_proj(read))
        found = expert.down_proj(inner)
        if getattr(self, "has_post_expert_norm", False):
            found = self.post_expert_norm(found)
        outputs[token, slot] = (found * top_k_weights[token, slot, None]).to(outputs.dtype)
    return outputs.sum(1)


def _gated(stack: Any, expert: Any, read: torch.Tensor) -> torch.Tensor:
    """Gate and projection, put together as the class's own gating expects them."""
    gate, up = expert.gate_proj(read), expert.up_proj(read)
    together = torch.cat([gate, up], -1) if stack.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
    gated: torch.Tensor = stack._apply_gate(together)
    return gated
