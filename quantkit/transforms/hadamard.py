"""Hadamard matrices at run time (R4): what layers are given is turned before it is rounded and multiplied.

The input of ``down_proj`` is a product behind a nonlinearity, which no matrix passes through: what stands out in it can
only be spread over other channels when the model runs. The runtime turns it, and the weight has the inverse in it, so
that the float model computes what it did. The matrices are Sylvester's, of the largest power of two that divides the
width, along the diagonal: runtimes have kernels for those. A runtime that does not know of the turn computes something
else without a word; so a format must be able to say it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from quantkit.errors import QuantizationError
from quantkit.system.patterns import why_refused
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.base import Change, ModelView, Transform, TransformOptions

if TYPE_CHECKING:
    import torch

LARGEST = 1 << 15
"""The largest matrix of the kernels that runtimes have for this (hadacore)."""
WEIGHT = ".weight"
EXPERT = re.compile(r"\.\d+\..*\.\d+\.")
"""In the name of a layer that is one of several in its block."""


class HadamardOptions(TransformOptions):
    """Options of Hadamard matrices at run time.

    Attributes:
        layers: regular expressions of the layers whose inputs are turned.
        size: of the matrices, a power of two; None is the largest that divides the width.
    """

    layers: tuple[str, ...] = Field(default=(r"\.down_proj$",), min_length=1)
    size: int | None = Field(default=None, ge=2, le=LARGEST)

    @field_validator("layers")
    @classmethod
    def _compile(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        for each in layers:
            reason = why_refused(each)
            if reason is not None:
                raise ValueError(f"'{each}' is no pattern: {reason}")
        return layers

    @field_validator("size")
    @classmethod
    def _is_power_of_two(cls, size: int | None) -> int | None:
        if size is not None and size & (size - 1):
            raise ValueError("the size is a power of two")
        return size


@dataclass(frozen=True, slots=True)
class TurnedInputs(Change):
    """Inputs that the runtime turns.

    Attributes:
        sizes: full name of each layer to the size of its matrices.
        left: layers that a pattern names and that are left as they are.
    """

    sizes: Mapping[str, int]
    left: tuple[str, ...] = ()

    def touches(self) -> list[str]:
        """The layers."""
        return list(self.sizes)

    def apply(self, module: str, leaf: str, parameter: torch.Tensor) -> torch.Tensor:
        """The columns of a weight are turned; the matrix is its own inverse."""
        from quantkit.numerics.orthogonal import sylvester_rotation

        size = self.sizes.get(module)
        return parameter if size is None or leaf != "weight" else sylvester_rotation(size).columns(parameter)

    def input_turn(self, module: str) -> int:
        """The size of the matrices of a layer."""
        return self.sizes.get(module, 0)

    def to_json(self) -> dict[str, Any]:
        """The layers by the size of their matrices, and those that are left."""
        return {"sizes": dict(self.sizes), "left": list(self.left)}


@TRANSFORMS.register
class Hadamard(Transform):
    """Lets runtimes turn what layers are given."""

    name = "hadamard"
    summary = "turns the inputs of down_proj at run time, so that no channel stands out in them; for vLLM"
    source = "QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; SpinQuant, Liu et al. 2024, arXiv:2405.16406 (R4)"
    Options: ClassVar[type[TransformOptions]] = HadamardOptions
    mixes = True
    online = True
    options: HadamardOptions

    def of_model(self, model: ModelView) -> Change | None:
        """Turn the inputs of the layers that the patterns name.

        Raises:
            QuantizationError: they name none, or none whose width suits.
        """
        matrices = {
            name.removesuffix(WEIGHT): shape[1]
            for name, shape in model.shapes().items()
            if name.endswith(WEIGHT) and len(shape) == 2
        }
        named = {
            name: width
            for name, width in matrices.items()
            if any(re.search(each, name) for each in self.options.layers)
        }
        if not named:
            raise QuantizationError(
                f"hadamard: no layer of this model is called {' or '.join(self.options.layers)}",
                "name the layers in front of which inputs are to be turned in its option 'layers'",
            )
        sizes = {name: self._size(width) for name, width in named.items() if not EXPERT.search(name)}
        if not sizes:
            raise QuantizationError(
                f"hadamard: {next(iter(named))} and its like are experts, before which no runtime turns inputs",
                "leave out hadamard",
            )
        short = next((name for name, size in sizes.items() if not size), None)
        if short is not None:
            wanted = "an odd number" if self.options.size is None else f"no multiple of {self.options.size}"
            raise QuantizationError(
                f"hadamard: {short} has {named[short]} inputs, {wanted}", "choose another size, or leave out hadamard"
            )
        return TurnedInputs(sizes, tuple(name for name in named if EXPERT.search(name)))

    def _size(self, width: int) -> int:
        """The size of the matrices for a width; 0 where there is none."""
        if self.options.size is not None:
            return 0 if width % self.options.size else self.options.size
        largest = min(width & -width, LARGEST)
        return largest if largest > 1 else 0

    def turned(self, done: Mapping[str, Any] | None) -> Mapping[str, int]:
        """The layers of the change."""
        return {} if done is None else {str(name): int(size) for name, size in done["sizes"].items()}

    def model_notes(self, done: Mapping[str, Any] | None) -> tuple[str, ...]:
        """How many layers are turned, by what, and which are left."""
        if done is None:
            return ()
        sizes = sorted(set(done["sizes"].values()))
        turned = f"{len(done['sizes'])} layers by Hadamard matrices of {', '.join(map(str, sizes))}"
        left = [f"hadamard leaves as they are {len(done['left'])} layers of experts"] if done["left"] else []
        return (f"the runtime turns the inputs of {turned}: vLLM does, transformers does not", *left)
