"""Regular expressions that match given layers and no others, in which the numbers of blocks are put together."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"\.experts\.\0(?=\.)")
"""In the template of a name, the number of an expert."""
_HOLE = "\0"


def patterns_of(names: Iterable[str], among: Collection[str]) -> list[str]:
    r"""Patterns that together match every name of ``names`` and of ``among`` none else.

    Each is anchored at both ends. Names that differ in the number of their block share a pattern, and so do those that
    differ in their last word and lie in the same blocks. All experts of a stack are ``\d+``, where none of their kind
    in ``among`` is left out.

    Args:
        names: of layers.
        among: of all layers that there are to tell apart, those among them.
    """
    wanted = set(names)
    stacks: dict[str, set[str]] = {}
    for name in among:
        stacks.setdefault(_stacked(name), set()).add(name)
    whole = {stack for stack, members in stacks.items() if members <= wanted}
    told = dict.fromkeys(_stacked(name) if _stacked(name) in whole else name for name in among if name in wanted)
    blocks: dict[str, list[str]] = {}
    for name in told:
        number = _NUMBER.search(name)
        form = name if number is None else f"{name[: number.start()]}{_HOLE}{name[number.end() :]}"
        blocks.setdefault(form, []).extend([] if number is None else [number[0]])
    return [_pattern(*each) for each in _with_leaves(blocks)]


def _stacked(name: str) -> str:
    r"""The name with ``\d+`` for the number of an expert."""
    holes = _NUMBER.sub(_HOLE, name)
    match = _EXPERT.search(holes)
    if match is None:
        return name
    place = holes.count(_HOLE, 0, match.end()) - 1
    number = list(_NUMBER.finditer(name))[place]
    return rf"{name[: number.start()]}\d+{name[number.end() :]}"


def _with_leaves(blocks: Mapping[str, list[str]]) -> list[tuple[str, list[str], list[str]]]:
    """Forms without their last word, the last words, and the blocks that all of these lie in."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for form, numbers in blocks.items():
        parent, _, leaf = form.rpartition(".")
        found.setdefault((parent, tuple(numbers)), []).append(leaf)
    return [(parent, leaves, list(numbers)) for (parent, numbers), leaves in found.items()]


def _pattern(parent: str, leaves: list[str], numbers: list[str]) -> str:
    """The pattern of layers of one parent."""
    words = [re.escape(part).replace(r"\\d\+", r"\d+") for part in parent.split(_HOLE)]
    text = _either(numbers).join(words)
    return f"^{text}{re.escape('.') if parent else ''}{_either([re.escape(leaf) for leaf in leaves])}$"


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"(?:{'|'.join(words)})"
