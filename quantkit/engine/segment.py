"""A part of a model that is loaded as one, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from quantkit.engine.layers import Layer


class WeightReader(Protocol):
    """Where weights come from: a checkpoint's tensors by name."""

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a tensor called ``name``."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor on CPU."""

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype."""

    def read_finite(self, name: str) -> torch.Tensor:
        """The tensor on CPU; raises CheckpointError if it holds NaN or infinities."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the model that is loaded as one.

    Attributes:
        prefix: its name in the model, such as ``model.layers.3``.
        module: the module, on meta until loaded.
        layers: its layers, in the order of the model; without those that an earlier segment has, too.
        shared: names in it of the modules whose parameters other segments have, too.
    """

    prefix: str
    module: nn.Module
    layers: tuple[Layer, ...]
    shared: frozenset[str] = frozenset()

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of its layers in the checkpoint."""
        return tuple(layer.name for layer in self.layers)

    def names(self) -> dict[str, str]:
        """The names of its layers in the checkpoint, by their paths in the model."""
        return {layer.path: layer.name for layer in self.layers}

    @property
    def is_layer(self) -> bool:
        """Whether it is a single layer, as the output head and the input embedding are."""
        return len(self.layers) == 1 and self.layers[0].module is self.module
