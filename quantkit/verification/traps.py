"""What is known to go wrong between a checkpoint and a runtime, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from quantkit.runtimes._model import listed
from quantkit.schemes import Scheme

FUSED = "fused layers"
OVERFLOW = "float16 overflow"
DROPPED = "dropped tensors"


@dataclass(frozen=True, slots=True)
class Trap:
    """A known cause of wrong numbers; whether they are wrong, the figures say.

    Attributes:
        name: which.
        found: where, in words.
    """

    name: str
    found: str

    def to_json(self) -> dict[str, str]:
        """As JSON data."""
        return {"name": self.name, "found": self.found}


def fused_layers(
    schemes: Mapping[str, Scheme], linears: Collection[str], fused: tuple[tuple[str, ...], ...]
) -> Trap | None:
    """Layers that a runtime loads as one matrix, and that are not of one scheme.

    Args:
        schemes: the packed layers.
        linears: all layers by full name, packed or float.
        fused: names of layers beside each other that become one matrix.
    """
    for group in fused:
        parents = sorted({name.rpartition(".")[0] for name in linears if name.rpartition(".")[2] in group})
        for parent in parents:
            there = [name for name in group if f"{parent}.{name}" in linears]
            found = {name: schemes.get(f"{parent}.{name}") for name in there}
            if len(set(found.values())) > 1:
                each = ", ".join(
                    f"{name} is {scheme.describe() if scheme else 'float'}" for name, scheme in found.items()
                )
                return Trap(FUSED, f"in {parent}, {each}, and the runtime loads them as one matrix of one scheme")
    return None


def overflow(finite: bool, dtype: str) -> Trap | None:
    """Logits that are no numbers, of a runtime that computes in float16."""
    if finite or dtype != "float16":
        return None
    return Trap(OVERFLOW, "logits are not finite: activations leave the range of float16; use bfloat16")


def dropped_tensors(names: Collection[str]) -> Trap | None:
    """Tensors of the file that the loader did not use; an order of columns that changes nothing is a harmless one."""
    if not names:
        return None
    found = listed(sorted(names))
    return Trap(DROPPED, f"the loader was given {len(names)} tensors that it did not use: {found}")
