"""The layers of a block that are solved together, and what is alive before they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from quantkit.estimation.anatomy import Anatomy
from quantkit.formats.base import Format
from quantkit.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share an input, or that a format wants solved together.

    Attributes:
        name: of its layers.
        place: where they are, in words.
        shapes: of each, with its scheme.
        paused: numbers of a token that are alive before the first of them is called.
        experts: how many experts have such layers, each with an input of its own; 0 where they are no experts'.
        together: how many of these are solved together, all of whose layers are in ``shapes``.
        most: weights of several layers that are solved as one at most; None for all.
    """

    name: str
    place: str
    shapes: tuple[tuple[int, int, Scheme], ...]
    paused: int
    experts: int = 0
    together: int = 1
    most: int | None = None

    @property
    def columns(self) -> int:
        """Width of the input."""
        return self.shapes[0][1]

    @property
    def weights(self) -> int:
        """Number of weights of all its layers."""
        return sum(rows * columns for rows, columns, _ in self.shapes)

    @property
    def stacked(self) -> int:
        """Weights that are copied into one matrix: those of several layers of a scheme whose rows stand alone."""
        return max((sum(sizes) for _, sizes in self._stacks() if len(sizes) > 1), default=0)

    @property
    def solved(self) -> tuple[int, Scheme]:
        """The most weights that are solved at once, and their scheme."""
        scheme, sizes = max(self._stacks(), key=lambda each: sum(each[1]))
        return sum(sizes), scheme

    def _stacks(self) -> list[tuple[Scheme, list[int]]]:
        """The weights of the layers that are solved as one, of each such matrix."""
        found: dict[Scheme, list[list[int]]] = {}
        for rows, columns, scheme in self.shapes:
            parts = found.setdefault(scheme, [])
            size = rows * columns
            if parts and scheme.stacks and (self.most is None or sum(parts[-1]) + size <= self.most):
                parts[-1].append(size)
            else:
                parts.append([size])
        return [(scheme, sizes) for scheme, parts in found.items() for sizes in parts]


def calibrated_groups(anatomy: Anatomy, schemes: dict[str, Scheme], device: str) -> Iterator[Group]:
    """The layers of the largest block by the input that they read; of experts as many as are solved together.

    Args:
        anatomy: the model.
        schemes: of its quantized layers.
        device: ``cuda`` or ``cpu``.
    """
    from quantkit.engine.steps import BATCH_WEIGHTS

    alike: dict[tuple[object, ...], list[Group]] = {}
    shapes = _shapes(anatomy)
    for each in anatomy.inputs:
        names = [name for name in each.layers if name in schemes]
        if names:
            group = _group(shapes, names, schemes, each.paused)
            alike.setdefault((re.sub(r"\d+", "*", names[0]), group.shapes), []).append(group)
    for groups in alike.values():
        first = max(groups, key=lambda group: group.paused)
        size = min(len(groups), max(1, BATCH_WEIGHTS[device] // max(first.weights, first.columns**2)))
        experts = len(groups) if len(groups) > 1 else 0
        yield replace(first, shapes=first.shapes * size, experts=experts, together=size, most=_most(device))


def _most(device: str) -> int | None:
    from quantkit.engine.stacks import STACKED

    return STACKED if device == "cpu" else None


def uncalibrated_groups(
    anatomy: Anatomy, schemes: dict[str, Scheme], store: type[Format], device: str
) -> Iterator[Group]:
    """The layers of the largest block, which a method without statistics solves one by one.

    Those that runtimes of the format load as one matrix go together.
    """
    inside = [name for each in anatomy.inputs for name in each.layers if name in schemes]
    there = set(inside)
    fused = {
        f"{parent}.{leaf}": (parent, leaves)
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in inside)
        for leaves in store.fused
        if all(f"{parent}.{leaf}" in there for leaf in leaves)
        for leaf in leaves
    }
    found: dict[object, list[str]] = {}
    for name in inside:
        found.setdefault(fused.get(name, name), []).append(name)
    shapes = _shapes(anatomy)
    most = _most(device)
    groups = (replace(_group(shapes, names, schemes, 0), most=most) for names in found.values())
    yield from {(group.name, group.shapes): group for group in groups}.values()


def _shapes(anatomy: Anatomy) -> dict[str, tuple[int, int]]:
    """Of all linear layers; a model of experts has thousands, so that they are looked up once for all groups."""
    return {name: shape for name, (shape, _) in anatomy.linears().items()}


def _group(known: Mapping[str, tuple[int, int]], names: list[str], schemes: dict[str, Scheme], paused: int) -> Group:
    leaves = " and ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    shapes = tuple((*known[name], schemes[name]) for name in names)
    return Group(leaves, f"{leaves} of a block", shapes, paused)


def outer_group(anatomy: Anatomy, name: str, schemes: dict[str, Scheme], *, head: bool) -> Group:
    """The head, which reads the last hidden states, or the input embedding, which is solved from its weight alone."""
    leaf = "head" if head else "embedding"
    paused = 2 * anatomy.hidden if head else 0
    return Group(leaf, f"the {leaf}", ((*anatomy.head_shape, schemes[name]),), paused)
