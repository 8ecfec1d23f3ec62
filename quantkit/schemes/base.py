"""What every scheme tells: the width of its codes, how scales are shared, and what that costs."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import SchemeError
from quantkit.schemes.rounding import InputRounding

if TYPE_CHECKING:
    from quantkit.schemes.grids import Grids

PER_CHANNEL = -1


class Scheme(ABC):
    """Which numbers a weight can become: ``level * scale``, with a level per code and a scale per group.

    Subclasses are frozen dataclasses whose fields are the keys that a recipe may give.

    Attributes:
        kind: what recipes call it.
        summary: one line for ``quantkit methods``.
        source: the paper or specification.
        quantizer: name of the one method that chooses its codes; None leaves that to any.
        authors_method: that of the program which brought the scheme: meant where a variant names no method and gives
            one of its options.
        usual: keys of a variant with such a scheme where it does not give them, such as what becomes of the head.
        grid_class: its arithmetic as ``module:Class``, which imports torch; empty where no codes of weights are told.
        bits: width of a code.
        group_size: input columns that share a scale; ``-1`` is one scale per output row.
        symmetric: zero is a level and no zero point is stored.
        activations: what a runtime does to a layer's inputs: None leaves them as they are; ``dynamic`` rounds them by
            scales that come with each token, ``static`` by a scale of the file; see :attr:`input_rounding`.
    """

    kind: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    quantizer: ClassVar[str | None] = None
    authors_method: ClassVar[str | None] = None
    usual: ClassVar[Mapping[str, Any]] = {}
    grid_class: ClassVar[str] = ""

    def grids(self) -> Grids:
        """The arithmetic of the scheme, the same object at every call.

        Raises:
            TypeError: it has none.
        """
        return grids_of(self)

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Input columns that share a scale; ``-1`` is one scale per output row."""

    @property
    def symmetric(self) -> bool:
        """Whether no zero point is stored."""
        return True

    @property
    def activations(self) -> str | None:
        """What a runtime does to the inputs, in a word; None for nothing."""
        return None

    @property
    def input_rounding(self) -> InputRounding | None:
        """How a runtime rounds the inputs; None where it leaves them as they are."""
        return None

    @property
    def orders_columns(self) -> bool:
        """Whether groups gather columns of like activation instead of neighbours."""
        return False

    @property
    def stacks(self) -> bool:
        """Whether layers that share an input are solved as one.

        So it is where rows have nothing to do with each other, and where one scale per tensor had better be the same
        in layers that servers load as one matrix.
        """
        return True

    @property
    def free_scales(self) -> bool:
        """Whether each scale may take any value of its dtype, independent of the others."""
        return True

    def columns_per_group(self, in_features: int) -> int:
        """Input columns that share one scale, for a layer with ``in_features`` columns."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` columns.

        Raises:
            SchemeError: ``group_size`` does not divide ``in_features``; the remedy names sizes that do.
        """
        size = self.columns_per_group(in_features)
        if in_features % size:
            raise SchemeError(
                f"group_size {size} does not divide the {in_features} input columns", self._ways_out(in_features)
            )
        return in_features // size

    def _ways_out(self, in_features: int) -> str:
        """What to choose where the group size does not divide; schemes of a fixed size can only name another."""
        sizes = ", ".join([*map(str, dividing_group_sizes(in_features)), "-1 (one scale per channel)"])
        return f"sizes that do: {sizes}"

    def check_layer(self, out_features: int, in_features: int) -> None:
        """Refuse a layer whose shape does not suit.

        Raises:
            SchemeError: the group size does not divide it.
        """
        self.groups(in_features)

    def for_layer(self, name: str, block: int | None, blocks: int, shape: tuple[int, int]) -> Scheme:
        """The scheme that a layer gets where this one was asked for; a mixture gives each layer another.

        Args:
            name: full name of the layer; for an input embedding that is tied to the head, the name of the head.
            block: index of the decoder block that holds it; None outside the blocks.
            blocks: number of decoder blocks.
            shape: ``(out_features, in_features)``.

        Raises:
            SchemeError: nothing that it mixes suits the shape.
        """
        return self

    @abstractmethod
    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """Stored bits per weight: code, and each weight's share of scales and zero points.

        Args:
            in_features: columns of the layer.
            scale_bits: width of a stored scale, where the scheme leaves it open.
            out_features: rows of the layer, for schemes that share scales over rows; None leaves these shares out.
        """

    @abstractmethod
    def describe(self) -> str:
        """A short name, such as ``int4 g64 sym``."""

    def to_json(self) -> dict[str, Any]:
        """The kind and the keys, see :func:`quantkit.schemes.kinds.scheme_from_json`."""
        return {"kind": self.kind} | {name: getattr(self, name) for name in self.defaults()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The keys that a recipe may give, with what they are if it does not."""
        return {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]  # subclasses are dataclasses


class TableScheme(Scheme):
    """A scheme whose levels are a table by code, alike for all groups, with a scale per group.

    Attributes:
        table: the level of each code; a level may occur twice, as zero does with a sign bit.
    """

    grid_class: ClassVar[str] = "quantkit.schemes.grids.fixed:TableGrids"
    table: ClassVar[tuple[float, ...]]


@cache
def grids_of(scheme: Scheme) -> Grids:
    """See :meth:`Scheme.grids`."""
    if not scheme.grid_class:
        raise TypeError(f"{scheme.describe()} has no grids")
    module, _, name = scheme.grid_class.partition(":")
    found: Grids = getattr(importlib.import_module(module), name)(scheme)
    return found


def group_name(group_size: int) -> str:
    """``g64``, or ``channel``."""
    return "channel" if group_size == PER_CHANNEL else f"g{group_size}"


def dividing_group_sizes(in_features: int) -> list[int]:
    """Group sizes of common kernels that divide ``in_features``, or else the nearest to 64 that do; may be none."""
    common = [size for size in (128, 64, 32, 256, 16) if in_features % size == 0]
    others = [size for size in range(8, min(in_features - 1, 512) + 1) if in_features % size == 0]
    return common or sorted(others, key=lambda size: abs(size - 64))[:8]
