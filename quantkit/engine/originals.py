"""The parameters of the checkpoint, and what changes make of them in the modules through which passes run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from quantkit.engine.input_turning import put_turn, turn_of
from quantkit.engine.segment import WeightReader
from quantkit.engine.skeleton import Skeleton
from quantkit.transforms.base import Change


@dataclass(frozen=True, slots=True)
class Originals:
    """The parameters of the checkpoint in float32, whatever the passes compute in."""

    skeleton: Skeleton
    reader: WeightReader
    device: torch.device

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model."""
        return self.skeleton.read(name, self.reader.read).to(self.device).float()

    def weight(self, path: str) -> torch.Tensor:
        """The weight of the layer at a place of the model, ``[out_features, in_features]``."""
        return self.parameter(f"{path}.weight")

    def put(self, change: Change, name: str) -> None:
        """Let a module that is loaded compute with what a change makes of its parameters, and of what it is given."""
        module = self.skeleton.model.get_submodule(name)
        put_turn(module, change.input_turn(name))
        for leaf, parameter in module.named_parameters(recurse=False):
            changed = change.apply(name, leaf, self.parameter(f"{name}.{leaf}"))
            parameter.data = changed.to(parameter.device, parameter.dtype)

    @contextmanager
    def changed(self, change: Change, names: Iterable[str]) -> Iterator[None]:
        """Inside the block, modules compute with what a change makes of them; those that are not loaded stay so."""
        kept, turned = [], []
        try:
            for name in names:
                module = self.skeleton.model.get_submodule(name)
                own = list(module.parameters(recurse=False))
                if not any(parameter.is_meta for parameter in own):
                    kept += [(parameter, parameter.data) for parameter in own]
                    turned.append((module, turn_of(module)))
                    self.put(change, name)
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data
            for module, size in turned:
                put_turn(module, size)


def inside(names: Iterable[str], prefix: str) -> list[str]:
    """The names of modules that are a module, or in it."""
    return [name for name in names if name == prefix or name.startswith(f"{prefix}.")]
