"""What moves the leaves of a training along their gradients: Adam, and signs for the codes of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantkit.errors import QuantizationError
from quantkit.recovery.parts import Part

CODES, SIGNS = "codes", "signs"
"""The kind of leaves that are the codes of weights, and the optimizer that moves these by signs and others by Adam."""
BETAS = (0.9, 0.99)
EPSILON = 1e-16
"""Of Adam: gradients of single codes are tiny."""
SUDDEN = 2.0
"""How many times its usual norm the gradient of a segment may have; what is beyond is cut."""
MEMORY = 0.9
"""Share of a segment's usual norm that is kept at each step."""


class NotFiniteError(Exception):
    """A loss or a gradient is not finite."""


@dataclass(slots=True)
class Descent:
    """Moves leaves, those of a segment at a time.

    Args:
        parts: what is trained, by the prefixes of segments.
        rates: the learning rate of each kind of leaves.
        optimizer: of codes :data:`SIGNS`, or see :func:`optimizer`.

    Attributes:
        norms: the usual norms of gradients.

    Raises:
        QuantizationError: the optimizer is not installed.
    """

    parts: Mapping[str, Sequence[Part]]
    rates: Mapping[str, float]
    optimizer: str
    norms: dict[str, float] = field(init=False, default_factory=dict)
    _optimizers: dict[str, torch.optim.Optimizer] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for prefix, parts in self.parts.items():
            groups: dict[str, list[torch.Tensor]] = {}
            for part in parts:
                for kind, leaf in part.leaves().values():
                    groups.setdefault(kind, []).append(leaf)
            made: list[dict[str, Any]] = [
                {"params": leaves, "kind": kind, "lr": 0.0}
                for kind, leaves in groups.items()
                if not self._by_signs(kind)
            ]
            if made:
                self._optimizers[prefix] = optimizer(self.optimizer, made)

    def _by_signs(self, kind: str) -> bool:
        """Whether leaves of a kind are moved by the signs of their gradients, without any memory of earlier ones."""
        return kind == CODES and self.optimizer == SIGNS

    def move(self, prefix: str, rate: float) -> None:
        """Move the leaves of a segment along their gradients, which are let go.

        Args:
            prefix: of the segment.
            rate: what the learning rates are multiplied with.

        Raises:
            NotFiniteError: a gradient is not finite.
        """
        by_kind: dict[str, list[torch.Tensor]] = {}
        for part in self.parts.get(prefix, ()):
            for kind, leaf in part.leaves().values():
                if leaf.grad is not None:
                    by_kind.setdefault(kind, []).append(leaf)
        for kind, leaves in by_kind.items():
            self._calm(f"{prefix}|{kind}", leaves)
            if self._by_signs(kind):
                for leaf in leaves:
                    with torch.no_grad():
                        leaf.sub_(_gradient(leaf).sign_(), alpha=self.rates[kind] * rate)
                    leaf.grad = None
        found = self._optimizers.get(prefix)
        if found is not None:
            for group in found.param_groups:
                group["lr"] = self.rates[group["kind"]] * rate
            found.step()
            found.zero_grad(set_to_none=True)
        for part in self.parts.get(prefix, ()):
            part.clamp_()

    def _calm(self, name: str, leaves: Sequence[torch.Tensor]) -> None:
        """Cut gradients that are much larger than they usually are."""
        norm = float(nn.utils.get_total_norm([_gradient(leaf) for leaf in leaves]))
        if not math.isfinite(norm):
            raise NotFiniteError
        usual = self.norms.get(name, norm)
        most = SUDDEN * usual
        if norm > most:
            for leaf in leaves:
                _gradient(leaf).mul_(most / norm)
        self.norms[name] = MEMORY * usual + (1 - MEMORY) * min(norm, most)

    # The state

    def _named_leaves(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Every leaf with its name and the prefix of its segment."""
        for prefix, parts in self.parts.items():
            for part in parts:
                for name, (_, leaf) in part.leaves().items():
                    yield f"{part.name}|{name}", prefix, leaf

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All leaves and what the optimizers keep of them, by name: tensors, and numbers."""
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, prefix, leaf in self._named_leaves():
            tensors[name] = leaf
            found = self._optimizers.get(prefix)
            for key, value in found.state.get(leaf, {}).items() if found is not None else ():
                kept = tensors if isinstance(value, torch.Tensor) else numbers
                kept[f"{name}|{key}"] = value
        return tensors, numbers

    def take_up(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` told."""
        for name, prefix, leaf in self._named_leaves():
            with torch.no_grad():
                leaf.copy_(tensors[name])
            start = f"{name}|"
            state = {key.removeprefix(start): each for key, each in tensors.items() if key.startswith(start)}
            state = {key: each if key == "step" else each.to(leaf.device) for key, each in state.items()}
            others = {key.removeprefix(start): each for key, each in numbers.items() if key.startswith(start)}
            if state or others:
                self._optimizers[prefix].state[leaf] = {**state, **others}


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient of a leaf that has one."""
    if leaf.grad is None:
        raise ValueError("a leaf without a gradient")
    return leaf.grad


def optimizer(name: str, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer by its name in options.

    Args:
        name: one of bitsandbytes, ``adam8bit`` or ``paged_adam8bit``; any other means Adam.
        groups: of leaves.

    Raises:
        QuantizationError: bitsandbytes is not installed.
    """
    if name in (SIGNS, "adam"):
        on_cpu_only = all(leaf.device.type == "cpu" for group in groups for leaf in group["params"])
        return torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=on_cpu_only, foreach=False)
    try:
        import bitsandbytes
    except ImportError as error:
        raise QuantizationError(
            f"optimizer {name} is one of bitsandbytes, which is not installed", "use adam, or pip install bitsandbytes"
        ) from error
    kinds: Any = bitsandbytes.optim  # its classes are not in its type hints
    kind = kinds.PagedAdam8bit if name == "paged_adam8bit" else kinds.Adam8bit
    found: torch.optim.Optimizer = kind(groups, lr=1e-3, betas=BETAS, eps=EPSILON)
    return found
