"""What an allocation chooses from and what it chose: layers that get one scheme, and what each choice costs.

On disk it is JSON that people can read, change and give back: the ``choice`` of each unit is all that counts then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError, did_you_mean
from quantkit.system.artifacts import read_json, write_json

ALLOCATION = "allocation.json"
"""The file of an allocation, in the folder of a checkpoint and of a run."""
VERSION = 1


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that get one scheme, as runtimes load them as one.

    Attributes:
        layers: their full names in the checkpoint.
        weights: how many they have.
        costs: by the name of each choice that suits all of them, by how much it is predicted to raise the divergence
            from the float model, in nats a token.
        sizes: by the same names, the bytes that they take in the file.
    """

    layers: tuple[str, ...]
    weights: int
    costs: Mapping[str, float]
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice for every unit.

    Attributes:
        choices: by name the keys of a scheme as a patch of a recipe has them; ``{"scheme": "float"}`` stays float.
        units: what there is to choose for.
        chosen: a name for each of them.
        facts: what it was made for, such as the budget, method and format.
    """

    choices: Mapping[str, Mapping[str, Any]]
    units: Sequence[Unit]
    chosen: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def predicted(self) -> float:
        """The divergence that it is predicted to have, in nats a token."""
        return sum(unit.costs[name] for unit, name in zip(self.units, self.chosen, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all units."""
        return sum(unit.sizes[name] for unit, name in zip(self.units, self.chosen, strict=True))

    @property
    def bits_per_weight(self) -> float:
        """Of all units."""
        return 8 * self.nbytes / sum(unit.weights for unit in self.units)

    def with_choice(self, chosen: Sequence[str]) -> Allocation:
        """The same with another choice."""
        return replace(self, chosen=tuple(chosen))

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "version": VERSION,
            **self.facts,
            "predicted": {
                "kl_divergence": self.predicted,
                "bytes": self.nbytes,
                "bits_per_weight": self.bits_per_weight,
            },
            "choices": {name: dict(keys) for name, keys in self.choices.items()},
            "units": [
                {
                    "layers": list(unit.layers),
                    "choice": name,
                    "weights": unit.weights,
                    "nats": dict(unit.costs),
                    "bytes": dict(unit.sizes),
                }
                for unit, name in zip(self.units, self.chosen, strict=True)
            ],
        }

    @classmethod
    def of_json(cls, data: Any, place: str = "allocation") -> Allocation:
        """From JSON data, as it was written or as somebody changed it.

        Raises:
            RecipeError: it is none, or a choice is not among those of its unit.
        """
        try:
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}")
            units = [
                Unit(tuple(each["layers"]), int(each["weights"]), dict(each["nats"]), dict(each["bytes"]))
                for each in data["units"]
            ]
            chosen = tuple(str(each["choice"]) for each in data["units"])
            choices = {str(name): dict(keys) for name, keys in data["choices"].items()}
            own = ("version", "predicted", "choices", "units")
            facts = {key: value for key, value in data.items() if key not in own}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"{place} is no allocation of this version: {error}"
            raise RecipeError(problem, f"give the {ALLOCATION} of a checkpoint that quantkit wrote") from error
        for unit, name in zip(units, chosen, strict=True):
            if name not in unit.costs or name not in unit.sizes or name not in choices:
                problem = f"{place}: {unit.layers[0]} has no choice '{name}'"
                raise RecipeError(problem, did_you_mean(name, list(unit.costs)))
        return cls(choices, units, chosen, facts)

    def save(self, file: Path) -> None:
        """Write it.

        Raises:
            OutputError: the file cannot be written.
        """
        write_json(file, self.to_json())

    @classmethod
    def load(cls, file: Path) -> Allocation:
        """Read it.

        Raises:
            RecipeError: there is no such file, or it is none.
        """
        try:
            data = read_json(file)
        except (OSError, ValueError) as error:
            raise RecipeError(f"cannot read {file}: {error}", "check the path") from error
        return cls.of_json(data, str(file))
