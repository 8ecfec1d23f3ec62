"""Stacks of experts as linear layers, one an expert and projection.

transformers keeps the experts of a block in a few parameters, ``[experts, rows, columns]``. Most classes compute with
them by a function that can be chosen by name (``transformers.integrations.moe``) and say how their parameters lie:
transposed, interleaved, with biases, without a gate. The others differ in what their forward is given, and are told
apart by that and by the parameters that they have. So no model has to be known here: the parameters give way to
``torch.nn.Linear`` modules called ``experts.INDEX.gate_proj`` and so on, and a forward that computes with these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.conversions import Part
from quantkit.engine.routing import Given, giving, way_of

SHOWS_ALL = "quantkit_shows_all"
"""Set on a stack whose experts are shown all tokens."""
MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers says of a stack of experts whose function can be chosen; a class that takes part has all."""
ROUTED = ("hidden_states", "top_k_index", "top_k_weights")
"""What the forward of most is given."""
UNSTACKED = "quantkit_experts"
"""Where a stack that gave way keeps the number of its experts."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix that every expert of a stack has.

    Attributes:
        leaf: what it is called beside the index of the expert; empty where that is the only one.
        stack: the parameter of the module that holds it for all experts, ``[experts, rows, columns]`` or these flat.
        bias: the parameter that holds its bias, ``[experts, rows]``; None for none.
        piece: which of the matrices that lie together there it is, and how many these are.
        interleaved: these lie row by row in turn, not one behind the other.
        transposed: they lie as ``[in_features, out_features]``.
    """

    leaf: str
    stack: str
    bias: str | None = None
    piece: tuple[int, int] = (0, 1)
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """A way in which classes keep experts.

    Attributes:
        fits: the projections of a module, if it is of this kind; else None.
        forward: computes what the module's own does, by the linear layers.
        tells: it tells which tokens it gives to an expert, or gives all to each.
        replays: it can be given the tokens that an earlier run gave to an expert.
    """

    fits: Callable[[nn.Module], list[Projection] | None]
    forward: Callable[..., torch.Tensor]
    tells: bool = True
    replays: bool = False


def is_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of experts, whatever its experts lie in."""
    return can_unstack(module) or hasattr(module, UNSTACKED) or all(mark in vars(module) for mark in MARKS)


def can_unstack(module: nn.Module) -> bool:
    """Whether a module keeps experts in parameters that :func:`unstack` knows."""
    return any(kind.fits(module) is not None for kind in KINDS)


def unstack(module: Any, path: str) -> dict[str, Part]:
    """Put linear layers on meta in the place of a stack's parameters.

    Args:
        module: the stack.
        path: its name in the model.

    Returns:
        By the names of the new parameters what they are a part of.
    """
    kind, projections = next((kind, found) for kind in KINDS if (found := kind.fits(module)) is not None)
    experts = _experts(module, projections)
    shapes = {each.stack: _in_three(module.get_parameter(each.stack), experts).shape for each in projections}
    parts: dict[str, Part] = {}
    for index in range(experts):
        expert = nn.Module()
        for each in (each for each in projections if index < shapes[each.stack][0]):
            rows, columns = shapes[each.stack][1:] if not each.transposed else shapes[each.stack][:0:-1]
            linear = _linear(columns, rows // each.piece[1], each.bias is not None)
            if each.leaf:
                expert.add_module(each.leaf, linear)
            else:
                expert = linear
            for name, _ in linear.named_parameters():
                place = ".".join(filter(None, (path, str(index), each.leaf, name)))
                parts[place] = _part(path, experts, index, each, name)
        module.add_module(str(index), expert)
    for each in projections:
        for name in filter(None, (each.stack, each.bias)):
            owner, _, leaf = name.rpartition(".")
            if leaf in module.get_submodule(owner)._parameters:
                delattr(module.get_submodule(owner), leaf)
    setattr(module, UNSTACKED, experts)
    module.forward = MethodType(kind.forward, module)
    return parts


def _experts(module: nn.Module, projections: list[Projection]) -> int:
    first = module.get_parameter(projections[0].stack)
    return int(first.shape[0]) if first.ndim == 3 else int(vars(module)["num_experts"])


def _in_three(stack: torch.Tensor, experts: int) -> torch.Tensor:
    return stack if stack.ndim == 3 else stack.view(experts, -1, stack.shape[-1])


def _part(path: str, experts: int, index: int, each: Projection, name: str) -> Part:
    is_weight = name == "weight"
    cut = _Cut(index, experts, each, is_weight)
    whole = each.stack if is_weight else each.bias
    return Part(f"{path}.{whole}", cut, index, each.piece if is_weight else (0, 0), each.leaf)


def _linear(columns: int, rows: int, bias: bool) -> nn.Linear:
    """A linear layer on meta; without the drawing of weights, which takes its time even there."""
    linear = nn.Linear(1, 1, bias=bias, device="meta")
    linear.in_features, linear.out_features = columns, rows
    shapes = {"weight": (rows, columns), **({"bias": (rows,)} if bias else {})}
    for name, shape in shapes.items():
        setattr(linear, name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return linear


@dataclass(frozen=True, slots=True)
class _Cut:
    """The view of a stack, or of the biases beside it, that is a projection of one expert."""

    expert: int
    experts: int
    projection: Projection
    is_weight: bool

    def __call__(self, stack: torch.Tensor) -> torch.Tensor:
        own = (_in_three(stack, self.experts) if self.is_weight else stack)[self.expert]
        own = own.T if self.is_weight and self.projection.transposed else own
        place, pieces = self.projection.piece
        return own[place::pieces] if self.projection.interleaved else own.chunk(pieces)[place]


# Experts that are given tokens with the indices of their experts


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
    return _mixed(self, hidden_states, top_k_index, top_k_weights, partial(_expert, self))


def _mixed(
    stack: Any,
    flat: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    compute: Callable[[Any, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The sum of what its experts make of each token, ``[tokens, hidden]``, each expert's times its weight."""
    (top_k_index, top_k_weights), is_replayed = way_of(stack, top_k_index, top_k_weights)
    outputs, total = flat.new_zeros(*top_k_index.shape, flat.shape[-1]), len(flat)
    for index, expert in _numbered(stack):
        token, slot = (top_k_index == index).nonzero(as_tuple=True)
        if len(token):
            with giving(Given(token, total, is_replayed=is_replayed)):
                found = compute(expert, flat[token])
            outputs[token, slot] = (found * top_k_weights[token, slot, None]).to(outputs.dtype)
        if getattr(stack, SHOWS_ALL, False):
            (left,) = (top_k_index != index).all(1).nonzero(as_tuple=True)
            with giving(Given(left, total, is_routed=False)):
                compute(expert, flat[left])
    return outputs.sum(1)


@contextmanager
def showing_all(module: nn.Module) -> Iterator[None]:
    """Inside the block, experts of stacks in a module that are given tokens by index are called with all others too.

    What they make of these is dropped, so that the stacks compute what they did.
    """
    stacks = [each for each in module.modules() if is_stack(each)]
    for stack in stacks:
        setattr(stack, SHOWS_ALL, True)
    try:
        yield
    finally:
        for stack in stacks:
            delattr(stack, SHOWS_ALL)


def tells_tokens(module: nn.Module) -> bool:
    """Whether the forward of a stack that gave way tells which tokens it gives to an expert, or gives all to each."""
    return any(kind.tells for kind in _kinds_of(module))


def replayed_layers(module: nn.Module) -> set[nn.Module]:
    """The layers in a module that belong to experts whose tokens can be those of an earlier run."""
    stacks = [each for each in module.modules() if any(kind.replays for kind in _kinds_of(each))]
    return {each for stack in stacks for each in stack.modules() if isinstance(each, nn.Linear)}


def _kinds_of(module: nn.Module) -> list[Kind]:
    """Those whose forward a stack that gave way has; none of other modules."""
    used = getattr(module.forward, "__func__", None)
    return [kind for kind in KINDS if kind.forward is used] if hasattr(module, UNSTACKED) else []


def _numbered(stack: Any) -> Iterator[tuple[int, Any]]:
    for index in range(getattr(stack, UNSTACKED)):
        yield index, getattr(stack, str(index))


def _expert(stack: Any, expert: Any, read: torch.Tensor) -> torch.Tensor:
    """What one expert makes of the tokens that it reads; one without a last projection leaves them as they are."""
    if not hasattr(expert, "down_proj"):
        return read
    gated = hasattr(expert, "gate_proj")
    found: torch.Tensor = expert.down_proj(_gated(stack, expert, read) if gated else stack.act_fn(expert.up_proj(read)))
    return stack.post_expert_norm(found) if getattr(stack, "has_post_expert_norm", False) else found


def _gated(stack: Any, expert: Any, read: torch.Tensor) -> torch.Tensor:
    """Gate and projection, put together as the class's own gating expects them."""
    gate, up = expert.gate_proj(read), expert.up_proj(read)
    gated: torch.Tensor
    if not hasattr(stack, "_apply_gate"):
        gated = stack.act_fn(gate) * up
        return gated
    concatenated = getattr(stack, "is_concatenated", True)
    together = torch.cat([gate, up], -1) if concatenated else torch.stack([gate, up], -1).flatten(-2)
    gated = stack._apply_gate(together)
    return gated


def _routed(module: Any) -> list[Projection] | None:
    """Those whose function can be chosen, and those that have the same forward and a gating of their own."""
    gated = _holds(module, "gate_up_proj", "down_proj")
    if not gated and not _holds(module, "up_proj", "down_proj"):
        return None
    marked = all(mark in vars(module) for mark in MARKS)
    if not marked and not (gated and hasattr(module, "_apply_gate") and _takes(module, *ROUTED)):
        return None
    transposed = module.is_transposed if marked else _is_transposed(module)
    interleaved = marked and not module.is_concatenated
    leaves = [("gate_proj", "gate_up_proj", (0, 2)), ("up_proj", "gate_up_proj", (1, 2))] if gated else []
    leaves = [*(leaves or [("up_proj", "up_proj", (0, 1))]), ("down_proj", "down_proj", (0, 1))]
    return [
        Projection(
            leaf,
            stack,
            f"{stack}_bias" if f"{stack}_bias" in module._parameters else None,
            piece,
            interleaved and piece[1] > 1,
            transposed,
        )
        for leaf, stack, piece in leaves
    ]


def _with_identities(module: Any) -> list[Projection] | None:
    """LongCat's: behind the experts that compute come some that do not, of which there are gates alone."""
    if not hasattr(module, "identity_expert") or not _holds(module, "gate_up_proj", "down_proj"):
        return None
    gate, up = (
        Projection(leaf, "gate_up_proj", piece=(place, 2)) for place, leaf in enumerate(("gate_proj", "up_proj"))
    )
    return [gate, up, Projection("down_proj", "down_proj")] if _takes(module, *ROUTED) else None


def _flat(module: Any) -> list[Projection] | None:
    """DBRX's: the matrices of all experts below one another, in a module that is given an expert's."""
    inner = getattr(module, "mlp", None)
    shapes = [tuple(each.shape) for each in getattr(inner, "_parameters", {}).values() if each is not None]
    if not _holds(inner, "w1", "v1", "w2", ndim=2) or not _takes(module, *ROUTED):
        return None
    if len(set(shapes)) > 1 or shapes[0][0] % module.num_experts:
        return None
    return [Projection("w1", "mlp.w1"), Projection("v1", "mlp.v1"), Projection("w2", "mlp.w2", transposed=True)]


def _forward_flat(self: Any, hidden_states: torch.Tensor, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])

    def compute(expert: Any, read: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = expert.w2(self.mlp.activation_fn(expert.w1(read)) * expert.v1(read))
        return found

    return _mixed(self, flat, top_k_index, top_k_weights, compute).view(hidden_states.shape[0], -1, flat.shape[-1])


# Experts that are given their tokens


def _sorted(module: Any) -> list[Projection] | None:
    """JetMoE's: one matrix an expert, for tokens that are sorted by it."""
    alone = list(module._parameters) == ["weight"] and _holds(module, "weight")
    return [Projection("", "weight")] if alone and _takes(module, "inputs", "expert_size") else None


def _forward_sorted(self: Any, inputs: torch.Tensor, expert_size: Any) -> torch.Tensor:
    pieces = torch.split(inputs, expert_size)
    return torch.cat([expert(pieces[index]) for index, expert in _numbered(self) if len(pieces[index])])


def _repeated(module: Any) -> list[Projection] | None:
    """Llama 4's: every token for every expert, times what the router gives it, which is zero for most."""
    if not _holds(module, "gate_up_proj", "down_proj") or not _takes(module, "hidden_states"):
        return None
    transposed = _is_transposed(module)
    return [
        Projection("gate_proj", "gate_up_proj", piece=(0, 2), transposed=transposed),
        Projection("up_proj", "gate_up_proj", piece=(1, 2), transposed=transposed),
        Projection("down_proj", "down_proj", transposed=transposed),
    ]


def _forward_repeated(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """An expert is called with the tokens that are not zero; it makes zeros of the others."""
    given = hidden_states.view(getattr(self, UNSTACKED), -1, hidden_states.shape[-1])
    outputs = torch.zeros_like(given)
    for index, expert in _numbered(self):
        routed = given[index].any(-1).nonzero()[:, 0]
        if len(routed):
            read = given[index, routed]
            with giving(Given(routed, given.shape[1])):
                outputs[index, routed] = expert.down_proj(expert.up_proj(read) * self.act_fn(expert.gate_proj(read)))
    return outputs.view(-1, hidden_states.shape[-1])


def _shared(module: Any) -> list[Projection] | None:
    """Inkling's shared experts: every token for every expert, and what each is multiplied by."""
    if not _holds(module, "gate_proj", "up_proj", "down_proj") or not _takes(module, "hidden_states", "gammas"):
        return None
    return [Projection(leaf, leaf) for leaf in ("gate_proj", "up_proj", "down_proj")]


def _forward_shared(self: Any, hidden_states: torch.Tensor, gammas: torch.Tensor) -> torch.Tensor:
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    factors = gammas.reshape(len(flat), -1, 1)
    found = [
        expert.down_proj(self.act_fn(expert.gate_proj(flat)) * expert.up_proj(flat) * factors[:, index])
        for index, expert in _numbered(self)
    ]
    return torch.stack(found).float().sum(0).to(hidden_states.dtype).view(hidden_states.shape)


def _holds(module: Any, *names: str, ndim: int = 3) -> bool:
    """Whether a module has parameters of these names, which are stacks."""
    found = [getattr(module, "_parameters", {}).get(name) for name in names]
    return all(each is not None and each.ndim == ndim for each in found)


def _takes(module: nn.Module, *names: str) -> bool:
    """Whether a module's forward is given these arguments and no more."""
    return tuple(signature(module.forward).parameters) == names


def _is_transposed(module: Any) -> bool:
    """Whether the stacks ``gate_up_proj`` and ``down_proj`` lie as ``[experts, in_features, out_features]``."""
    return bool(module.gate_up_proj.shape[1] != 2 * module.down_proj.shape[2])


KINDS = (
    Kind(_routed, forward, replays=True),
    Kind(_with_identities, forward, replays=True),
    Kind(_flat, _forward_flat, replays=True),
    Kind(_sorted, _forward_sorted, tells=False),
    Kind(_repeated, _forward_repeated),
    Kind(_shared, _forward_shared),
)
