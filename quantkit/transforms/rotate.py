"""Rotations that leave plain files: the residual stream is turned (R1), and the heads of values (R2).

Whatever writes to the residual stream writes into turned channels, and whatever reads it turns them back, which an
orthogonal matrix does exactly. A few channels of large models hold values far beyond all others; turned, these are
spread over all, and weights and activations lose less by rounding. What a norm multiplies channels by goes into the
layers that read it first. One that takes the mean away commutes with matrices that leave the vector of ones as it is,
so that no embedding has to be centered. The rows of the embedding are turned, and so are the columns of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from quantkit.errors import QuantizationError
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.base import Change, ModelView, ResidualStream, Structure, Transform, TransformOptions

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.orthogonal import Orthogonal

Kind = Literal["hadamard", "random"]
RANDOM, HADAMARD = "random", "hadamard"


class RotateOptions(TransformOptions):
    """Options of rotations.

    Attributes:
        residual: turn the residual stream.
        values: turn the heads of values.
        rotation: a Hadamard matrix with random signs, or a random orthogonal matrix.
        seed: of the signs, or of the random matrix.
    """

    residual: bool = True
    values: bool = True
    rotation: Kind = "hadamard"
    seed: int = 0

    @model_validator(mode="after")
    def _something_is_turned(self) -> RotateOptions:
        if not self.residual and not self.values:
            raise ValueError("nothing is turned: leave out residual: false or values: false, or all of rotate")
        return self


@dataclass(slots=True)
class Rotation(Change):
    """What turning does to every module.

    Attributes:
        inputs: modules to the matrix by which the columns of their weight are turned, after the factors.
        outputs: modules to the matrix by which their outputs are turned.
        factors: modules to what the columns of their weight are multiplied by first, float32 ``[in_features]``.
        norms: modules to their weight, all alike from now on, and their bias, if they have one, as it becomes.
        stream: the matrix by which the residual stream is turned; None where it stays.
        told: what the manifest says.
    """

    inputs: dict[str, list[Orthogonal]] = field(default_factory=dict)
    outputs: dict[str, list[Orthogonal]] = field(default_factory=dict)
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[float, torch.Tensor | None]] = field(default_factory=dict)
    stream: Orthogonal | None = None
    told: dict[str, Any] = field(default_factory=dict)

    def touches(self) -> list[str]:
        """All modules that read or write what is turned, and the norms between."""
        return list(dict.fromkeys([*self.inputs, *self.outputs, *self.norms]))

    def apply(self, module: str, leaf: str, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter as it becomes."""
        if module in self.norms:
            weight, bias = self.norms[module]
            if leaf == "weight":
                return parameter.new_full(parameter.shape, weight)
            return parameter if bias is None else bias.to(parameter)
        if leaf == "weight" and module in self.factors:
            parameter = parameter * self.factors[module].to(parameter)
        if leaf == "weight":
            for matrix in self.inputs.get(module, ()):
                parameter = matrix.columns(parameter)
        for matrix in self.outputs.get(module, ()):
            parameter = matrix.rows(parameter) if parameter.ndim > 1 else matrix.columns(parameter)
        return parameter

    def mixes_outputs(self, module: str) -> bool:
        """Whether they are turned."""
        return module in self.outputs

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """The residual stream is turned."""
        return states if self.stream is None else self.stream.columns(states)

    def to_json(self) -> dict[str, Any]:
        """What was turned, and by what."""
        return self.told


@TRANSFORMS.register
class Rotate(Transform):
    """Turns the residual stream and the heads of values."""

    name = "rotate"
    summary = "turns the residual stream and the heads of values, so that no channel stands out; folds into the weights"
    source = "QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; SpinQuant, Liu et al. 2024, arXiv:2405.16406"
    Options: ClassVar[type[TransformOptions]] = RotateOptions
    mixes = True
    options: RotateOptions

    @property
    def parts_tied(self) -> bool:
        """With the residual stream the embedding is turned, and the head takes up the last norm as well."""
        return self.options.residual

    def of_model(self, model: ModelView) -> Change | None:
        """Turn what can be turned.

        Raises:
            QuantizationError: nothing of what is asked for can be.
        """
        found, change = model.structure(), Rotation()
        turned, left = [], []
        if self.options.residual and found.stream is not None:
            self._turn_stream(found.stream, model, change)
            turned.append("residual")
        elif self.options.residual:
            left.append(f"the residual stream: {found.why}")
        if self.options.values and found.heads:
            self._turn_values(found, change)
            turned.append("values")
        elif self.options.values:
            left.append("the heads of values: no layer's heads pass through attention unmixed")
        if not turned:
            raise QuantizationError(f"rotate turns nothing in this model: {'; '.join(left)}", "leave out rotate")
        change.told |= {"turned": turned, "left": left}
        return change

    def _turn_stream(self, stream: ResidualStream, model: ModelView, change: Rotation) -> None:
        matrix = self._matrix(stream.width, 0, change, keeps_mean=stream.takes_mean)
        known = model.shapes()
        turned = turned_stream(stream, lambda name: model.parameter(name) if name in known else None, matrix)
        change.inputs, change.outputs = turned.inputs, turned.outputs
        change.factors, change.norms, change.stream = turned.factors, turned.norms, turned.stream

    def _turn_values(self, found: Structure, change: Rotation) -> None:
        for place, heads in enumerate(found.heads):
            matrix = self._matrix(heads.size, 1 + place, change)
            change.outputs.setdefault(heads.values, []).append(matrix)
            change.inputs.setdefault(heads.reader, []).append(matrix)

    def _matrix(self, size: int, place: int, change: Rotation, *, keeps_mean: bool = False) -> Orthogonal:
        from quantkit.numerics.orthogonal import hadamard_rotation, random_rotation

        seed = 1_000_003 * self.options.seed + place
        wanted = self.options.rotation == HADAMARD
        found = hadamard_rotation(size, seed, keeps_mean=keeps_mean) if wanted else None
        used = change.told.setdefault("matrices", {})
        used[str(size)] = RANDOM if found is None else HADAMARD
        return found or random_rotation(size, seed, keeps_mean=keeps_mean)

    def model_notes(self, done: Mapping[str, Any] | None) -> tuple[str, ...]:
        """What was left as it is, and where no Hadamard matrix was at hand."""
        if done is None:
            return ()
        random = [size for size, kind in done["matrices"].items() if kind == RANDOM]
        drawn = self.options.rotation == HADAMARD and random
        return (
            *(f"rotate leaves as it is {each}" for each in done["left"]),
            *([f"rotate: no Hadamard matrix of size {', '.join(random)} is known here: random ones"] if drawn else []),
        )


def turned_stream(
    stream: ResidualStream, parameter: Callable[[str], torch.Tensor | None], matrix: Orthogonal
) -> Rotation:
    """What turning a residual stream does.

    Args:
        stream: what reads and writes it.
        parameter: gives a parameter in float32 by its name; None where there is none.
        matrix: by which it is turned.
    """
    change = Rotation(stream=matrix)
    for norm in stream.norms:
        weight, bias = (parameter(f"{norm.name}.{leaf}") for leaf in ("weight", "bias"))
        if weight is not None:
            factors = weight + norm.offset
            turned = None if bias is None else matrix.columns((bias / factors).nan_to_num(0.0, 0.0, 0.0))
            change.norms[norm.name] = (1.0 - norm.offset, turned)
            change.factors |= dict.fromkeys(norm.readers, factors)
        change.inputs |= {reader: [matrix] for reader in norm.readers}
    change.inputs |= {module: [matrix] for module in (*stream.tables, *stream.readers)}
    change.outputs |= {writer: [matrix] for writer in stream.writers}
    return change
