"""The layers of a block that are solved together, and what is alive before they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.estimation.anatomy import Anatomy
from quantkit.formats.base import Format
from quantkit.schemes import Scheme

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "q_a_proj", "kv_a_proj_with_mqa")
MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "dense_h_to_4h")


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share an input, or that a format wants solved together.

    Attributes:
        name: of its layers.
        place: where they are, in words.
        shapes: of each, with its scheme.
        paused: numbers of a token that are alive before the first of them is called.
        words: how many that are.
    """

    name: str
    place: str
    shapes: tuple[tuple[int, int, Scheme], ...]
    paused: int
    words: str

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
        found: dict[Scheme, list[int]] = {}
        for rows, columns, scheme in self.shapes:
            if scheme.stacks:
                found.setdefault(scheme, []).append(rows * columns)
        return max((sum(sizes) for sizes in found.values() if len(sizes) > 1), default=0)

    @property
    def solved(self) -> tuple[int, Scheme]:
        """The most weights that are solved at once, and their scheme."""
        found: dict[Scheme, int] = {}
        for rows, columns, scheme in self.shapes:
            found[scheme] = found.get(scheme, 0) + rows * columns if scheme.stacks else rows * columns
        scheme = max(found, key=lambda each: found[each])
        return found[scheme], scheme


def calibrated_groups(anatomy: Anatomy, block: int, schemes: dict[str, Scheme]) -> Iterator[Group]:
    """The layers of a block by the input that they read, told by their names.

    At a pause the embedding, the input of the block, and in the MLP the stream after attention are alive, beside what
    the layer is about to read and what the attention still holds.
    """
    found: dict[tuple[str, str], list[tuple[int, int, Scheme]]] = {}
    for name, (shape, place) in anatomy.linears().items():
        if place == block and name in schemes:
            parent, _, leaf = name.rpartition(".")
            role = "inputs" if leaf in (*ATTENTION_INPUTS, *MLP_INPUTS) else leaf
            found.setdefault((parent, role), []).append((*shape, schemes[name]))
    for (parent, role), shapes in found.items():
        paused, words = _paused(anatomy, "att" in parent, role)
        name = parent.rpartition(".")[2] if role == "inputs" else role
        yield Group(name, f"{name} of a block", tuple(shapes), paused, words)


def _paused(anatomy: Anatomy, attends: bool, role: str) -> tuple[int, str]:
    hidden, queries, keys = anatomy.hidden, anatomy.queries, anatomy.keys
    if role == "inputs":
        streams = 3 if attends else 4
        return streams * hidden, f"{streams} x {hidden:,}"
    if attends:
        return 3 * hidden + 2 * (queries + keys), f"(3 x {hidden:,} + 2 x {queries:,} + 2 x {keys:,})"
    return 4 * hidden + anatomy.wide, f"(4 x {hidden:,} + {anatomy.wide:,})"


def uncalibrated_groups(
    anatomy: Anatomy, block: int, schemes: dict[str, Scheme], store: type[Format]
) -> Iterator[Group]:
    """The layers of a block, which a method without statistics solves one by one.

    Those that runtimes of the format load as one matrix go together.
    """
    inside = [name for name, (_, place) in anatomy.linears().items() if place == block and name in schemes]
    fused = {
        f"{parent}.{leaf}": (parent, leaves)
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in inside)
        for leaves in store.fused
        if all(f"{parent}.{leaf}" in inside for leaf in leaves)
        for leaf in leaves
    }
    found: dict[object, list[str]] = {}
    for name in inside:
        found.setdefault(fused.get(name, name), []).append(name)
    for names in found.values():
        leaves = " and ".join(name.rpartition(".")[2] for name in names)
        yield Group(leaves, f"{leaves} of a block", tuple(_shape(anatomy, name, schemes) for name in names), 0, "")


def outer_group(anatomy: Anatomy, name: str, schemes: dict[str, Scheme], *, head: bool) -> Group:
    """The head, which reads the last hidden states, or the input embedding, which is solved from its weight alone."""
    leaf = "head" if head else "embedding"
    paused = 2 * anatomy.hidden if head else 0
    return Group(
        leaf, f"the {leaf}", ((*anatomy.head_shape, schemes[name]),), paused, f"2 x {anatomy.hidden:,}" if head else ""
    )


def _shape(anatomy: Anatomy, name: str, schemes: dict[str, Scheme]) -> tuple[int, int, Scheme]:
    (rows, columns), _ = anatomy.linears()[name]
    return rows, columns, schemes[name]
