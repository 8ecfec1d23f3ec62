"""The tensors of a base that hold parameters which adapters change themselves: whole stacks, or experts one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantkit.errors import CheckpointError
from quantkit.merging.adapter import Adapter
from quantkit.merging.base import Base
from quantkit.merging.stacks import Stack


class StackedTensors:
    """What becomes of these tensors.

    Args:
        base: it.
        adapters: placed in it.
    """

    def __init__(self, base: Base, adapters: tuple[Adapter, ...]) -> None:
        self._base = base
        self._changes: dict[str, list[tuple[Adapter, Stack]]] = {}
        for adapter in adapters:
            for parameter, stack in adapter.contents.stacks.items():
                self._changes.setdefault(parameter, []).append((adapter, stack))
        self._parts: dict[str, str] = {}
        self._wholes: dict[str, str] = {}
        self._factors: dict[str, torch.Tensor] = {}
        for parameter in self._changes:
            self._find(parameter)

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is one of them."""
        return name in self._parts or name in self._wholes

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor with what is added to it, float32; a stack that lies as it is computed with, expert by expert.

        Raises:
            CheckpointError: a value is not finite, or the parameter cannot be written as it lies.
        """
        if name in self._parts:
            yield self._single(name)
            return
        parameter, base = self._wholes[name], self._base
        shape = base.names.shapes()[parameter]
        if base.names.parameters().get(name) == parameter and len(shape) == 3:
            for expert in range(shape[0]):
                yield _finite(base.reader.read_part(name, expert), name).float() + self._change(parameter, expert)
            return
        whole = base.names.read_whole(parameter, base.reader.read_finite).float()
        for expert in range(shape[0] if len(shape) == 3 else 1):
            own = whole[expert] if len(shape) == 3 else whole
            own += self._change(parameter, expert)
        yield base.names.as_stored(parameter, whole, base.reader.shape(name))

    def _find(self, parameter: str) -> None:
        """The tensors that a parameter lies in."""
        names = self._base.names
        parts = names.parts().get(parameter, [])
        alone = {part: names.alone(part) for part in parts}
        if parts and all(alone.values()):
            self._parts |= {stored: part for part, stored in alone.items() if stored}
            return
        stored = names.sources(parameter) or [name for part in parts[:1] for name in names.sources(part)]
        if not stored:
            raise CheckpointError(
                f"{self._base.folder} holds no tensor for '{parameter}'", "is this the model you mean?"
            )
        self._wholes |= dict.fromkeys(stored, parameter)

    def _single(self, name: str) -> torch.Tensor:
        """One projection of one expert that is a tensor by itself."""
        part = self._base.names.part(self._parts[name])
        change = self._change(part.parameter, part.expert or 0)
        stack = change.expand(self._base.names.shapes()[part.parameter]) if part.expert is not None else change
        return self._base.reader.read_finite(name).float() + part.cut(stack)

    def _change(self, parameter: str, expert: int) -> torch.Tensor:
        """What all adapters add to one expert, ``[rows, columns]`` of the parameter."""
        changes = [
            stack.change(self._factor(adapter, stack.first), self._factor(adapter, stack.second), expert)
            * adapter.weight
            for adapter, stack in self._changes[parameter]
        ]
        return torch.stack(changes).sum(0) if len(changes) > 1 else changes[0]

    def _factor(self, adapter: Adapter, key: str) -> torch.Tensor:
        """A matrix of an adapter, float32; those of one parameter are kept while its experts are read."""
        place = f"{adapter.origin} {key}"
        if place not in self._factors:
            if len(self._factors) >= 2 * max(map(len, self._changes.values())):
                self._factors.clear()
            self._factors[place] = adapter.read(key).float()
        return self._factors[place]


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"tensor '{name}' holds a value that is not finite", "get the checkpoint again")
    return tensor
