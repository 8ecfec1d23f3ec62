"""What is trained of a model: parts that stand in for parameters, with leaves that gradients go to.

Leaves are float32 masters without units, so that one learning rate a kind suits all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from quantkit.numerics.group_adapter import GroupAdapter
from quantkit.numerics.trainable import Trainable
from quantkit.numerics.trained_codes import TrainedCodes
from quantkit.schemes import QuantizedWeight

KINDS = {"factors": "scales", "shifts": "zeros", "latents": "codes", "down": "qa-lora", "up": "qa-lora"}
"""Of which kind the leaves of a quantized weight are, by their names."""


class Part(Protocol):
    """Something that is trained."""

    @property
    def name(self) -> str:
        """Tells it from others, such as the name of a tensor of the checkpoint."""

    def leaves(self) -> Mapping[str, tuple[str, torch.Tensor]]:
        """What gradients go to, float32, by name, each with its kind, for which there is a learning rate."""

    def given(self) -> Mapping[str, torch.Tensor]:
        """By the names of a module's parameters what stood there before the training, float32."""

    def standing_in(self) -> Mapping[str, torch.Tensor]:
        """By the names of a module's parameters what stands in for them, float32, with a graph back to the leaves."""

    def rounded(self) -> Mapping[str, torch.Tensor]:
        """The same, as what is stored of it stands for it, without a graph.

        Raises:
            QuantizationError: its dtype does not hold it.
        """

    def stored(self) -> Mapping[str, torch.Tensor]:
        """What is to be kept of it, by name: all that is written from it in the end."""

    def clamp_(self) -> None:
        """Bring leaves back to where they may be; after each step."""


@dataclass(frozen=True, slots=True)
class TrainedWeight:
    """A packed layer.

    Attributes:
        name: of the layer in the checkpoint.
        parameter: of the module, that is its weight.
        weight: the layer with its leaves.
        trained: the kinds of leaves that are trained; the others stay.
    """

    name: str
    parameter: str
    weight: Trainable | TrainedCodes | GroupAdapter
    trained: frozenset[str]

    def leaves(self) -> dict[str, tuple[str, torch.Tensor]]:
        """Those of its kinds that are trained."""
        found = {name: (KINDS[name], leaf) for name, leaf in self.weight.parameters().items()}
        return {name: (kind, leaf) for name, (kind, leaf) in found.items() if kind in self.trained}

    def given(self) -> dict[str, torch.Tensor]:
        """Its weight as the checkpoint has it."""
        own = self.weight.trainable if isinstance(self.weight, TrainedCodes) else self.weight
        return {self.parameter: own.given.dequantize(torch.float32)}

    def standing_in(self) -> dict[str, torch.Tensor]:
        """Its weight."""
        return {self.parameter: self.weight.weight()}

    def rounded(self) -> dict[str, torch.Tensor]:
        """Its weight, decoded from what is stored."""
        return {self.parameter: self.weight.result().dequantize(torch.float32)}

    def stored(self) -> dict[str, torch.Tensor]:
        """Codes if they are trained, scales and their parts, and zero points."""
        found = self.weight.result()
        parts = {f"parts.{name}": part for name, part in found.parts.items()}
        codes = {"codes": found.codes} if "codes" in self.trained else {}
        return {**codes, "scales": found.scales, "zeros": found.zeros, **parts}

    def clamp_(self) -> None:
        """Keep scales near those that they began with, and latent codes on the grid."""
        self.weight.clamp_()


def with_stored(weight: QuantizedWeight, stored: Mapping[str, torch.Tensor]) -> QuantizedWeight:
    """A layer with what :meth:`TrainedWeight.stored` told of it."""
    parts = {name.removeprefix("parts."): each for name, each in stored.items() if name.startswith("parts.")}
    codes = stored.get("codes", weight.codes)
    return QuantizedWeight(weight.scheme, codes, stored["scales"], stored["zeros"], {**weight.parts, **parts})


@dataclass(frozen=True, slots=True)
class TrainedVector:
    """A norm or a bias.

    Attributes:
        name: of the tensor in the checkpoint.
        parameter: of the module.
        kind: ``norms`` or ``biases``.
        start: what it began as, in the dtype in which it is stored.
        change: float32, in units of its root mean square; a leaf.
    """

    LEAST = 0.05
    """The unit where a vector nearly vanishes, as norms do that add 1 to it."""

    name: str
    parameter: str
    kind: str
    start: torch.Tensor
    change: torch.Tensor

    @classmethod
    def of(cls, name: str, parameter: str, kind: str, given: torch.Tensor) -> TrainedVector:
        """A vector on the device on which it is trained."""
        return cls(name, parameter, kind, given, torch.zeros_like(given, dtype=torch.float32, requires_grad=True))

    def _value(self) -> torch.Tensor:
        start = self.start.float()
        return start + self.change * start.square().mean().sqrt().clamp_(min=self.LEAST)

    def leaves(self) -> dict[str, tuple[str, torch.Tensor]]:
        """How far it is from what it was."""
        return {"change": (self.kind, self.change)}

    def given(self) -> dict[str, torch.Tensor]:
        """What it began as."""
        return {self.parameter: self.start.float()}

    def standing_in(self) -> dict[str, torch.Tensor]:
        """Its value."""
        return {self.parameter: self._value()}

    def rounded(self) -> dict[str, torch.Tensor]:
        """Its value in the dtype in which it is stored."""
        return {self.parameter: self._value().detach().to(self.start.dtype).float()}

    def stored(self) -> dict[str, torch.Tensor]:
        """The same, as it is stored."""
        return {"value": self._value().detach().to(self.start.dtype)}

    def clamp_(self) -> None:
        """It may be anything."""
