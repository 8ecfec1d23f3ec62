"""Which overrides would mend the layers that lose most: a kind of layer, a block, or a layer of its own."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from quantkit.errors import QuantkitError
from quantkit.formats import FORMATS
from quantkit.recipe import VariantSpec

if TYPE_CHECKING:
    from quantkit.report.layer_map import Spot

HOT = 2.0
"""Times the median from which on a layer stands out, beside others of its kind or its block."""
LONE = 3.0
"""The same of a layer that does so alone."""
MOST = 3
COLUMNS = 4096
"""Of a layer by which the bits of schemes are compared."""
RICHER: tuple[dict[str, Any], ...] = (
    {"bits": 8},
    {"scheme": "q6_k"},
    {"scheme": "q8_0"},
    {"scheme": "int", "bits": 8},
    {"scheme": "fp8"},
)
"""What a layer may become that loses too much, the first that the variant's method and format take."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that stand out together.

    Attributes:
        pattern: a regular expression that names them, and what has to be of one scheme with them.
        worst: the name of the worst.
        why: which they are and by how much they stand out, in words.
    """

    pattern: str
    worst: str
    why: str


def standing_out(spots: Sequence[Spot], form: str) -> list[Group]:
    """At most :data:`MOST` groups of layers whose errors are far above the median, the worst first.

    Args:
        spots: of a variant.
        form: its format's name: layers that its runtimes load as one matrix are mended together.
    """
    found: list[Group] = []
    left = [spot for spot in spots if spot.ratio > HOT]
    while left and len(found) < MOST:
        worst = max(left, key=lambda spot: spot.ratio)
        pattern, words, reached = _group(worst, left, spots, form)
        left = [spot for spot in left if spot not in reached]
        if len(reached) > 1 or worst.ratio > LONE:
            middle = statistics.median(spot.ratio for spot in reached)
            found.append(Group(pattern, worst.name, f"{words}: {middle:.2g} times the median"))
    return found


def mending(groups: Sequence[Group], entry: Mapping[str, object] | None) -> str:
    """The keys of a variant, as YAML, that would mend them; nothing where it takes no overrides, or none is known.

    Args:
        groups: of layers.
        entry: the variant in the recipe, with its defaults filled in.
    """
    try:
        spec = None if entry is None else VariantSpec.model_validate(entry)
    except (ValidationError, QuantkitError):
        spec = None  # a library's variant, which takes no overrides, or one of another version
    if spec is None:
        return ""
    patches = [(group.pattern, _patch(group, spec)) for group in groups]
    floats = [pattern for pattern, patch in patches if not patch]
    lines = [f"  '{pattern}': {{{patch}}}" for pattern, patch in patches if patch]
    ignored = ", ".join(f"'{each}'" for each in (*spec.ignore, *floats))
    return "\n".join([*(["overrides:", *lines] if lines else []), *([f"ignore: [{ignored}]"] if floats else [])])


def _group(worst: Spot, left: Sequence[Spot], spots: Sequence[Spot], form: str) -> tuple[str, str, list[Spot]]:
    """The pattern that reaches what stands out with ``worst``, in words, and what of that stands out."""
    place = worst.place
    kinds = _together(place.kind, form)
    row = [spot for spot in spots if spot.place.kind == place.kind and spot.place.stack == place.stack]
    hot_row = [spot for spot in left if spot in row]
    column = [spot for spot in spots if (spot.place.stack, spot.place.block) == (place.stack, place.block)]
    hot_column = [spot for spot in left if spot in column]
    if place.block is None:
        return f"^{re.escape(place.kind)}$", place.kind, [worst]
    stack = re.escape(f"{place.stack}." if place.stack else "")
    if 2 * len(hot_row) > len(row) > 1:
        return rf"^{stack}\d+\.{kinds}$", f"{place.kind} in {len(hot_row)} of {len(row)} blocks", hot_row
    if 2 * len(hot_column) > len(column) > 1:
        words = f"{len(hot_column)} of {len(column)} kinds of layers in block {place.block}"
        return rf"^{stack}{place.block}\.", words, hot_column
    return rf"^{stack}{place.block}\.{kinds}$", worst.name, [worst]


def _together(kind: str, form: str) -> str:
    """A pattern for a kind, and for those that runtimes of the format load as one matrix with it."""
    parts = kind.split(".")
    groups = FORMATS.get(form).fused if form in FORMATS else ()
    names = next((group for group in groups if parts[-1] in group), (parts[-1],))
    last = re.escape(names[0]) if len(names) == 1 else f"({'|'.join(map(re.escape, names))})"
    return r"\.".join([*(r"\d+" if part == "*" else re.escape(part) for part in parts[:-1]), last])


def _patch(group: Group, spec: VariantSpec) -> str:
    """What the layers may become, as keys of an override; nothing where the variant takes nothing richer."""
    plain, now = spec.resolved(), spec.scheme_of(group.worst) or spec.base_scheme()
    for patch in RICHER:
        try:
            richer = VariantSpec.model_validate({**plain, "overrides": {group.pattern: patch, **plain["overrides"]}})
            found = richer.scheme_of(group.worst)
        except (ValidationError, QuantkitError):
            continue  # its method or format does not take this one
        if found is not None and found.bits_per_weight(COLUMNS) > 1.25 * now.bits_per_weight(COLUMNS):
            return ", ".join(f"{key}: {value}" for key, value in patch.items())
    return ""
