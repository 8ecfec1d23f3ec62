"""Mutations that keep the shape of a text, so that what lies behind its parser is reached too.

Bytes changed at random hardly ever give JSON that says something else; a value changed inside a parsed document, a key
of the reader put where it does not belong, or a word of its grammar inside a text does.
"""

from __future__ import annotations

import ast
import copy
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import quantkit

PACKAGE = Path(quantkit.__file__).parent
Mutate = Callable[[bytes, random.Random], bytes]
"""A changed text; the same for the same state of the generator."""
LONGEST_WORD = 48
CHANGES = (1, 1, 1, 2, 3, 6)
"""At once: what a reader says to one is not hidden behind what it says to another."""
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 8, 127, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, -1e-308,
    float("inf"), float("nan"), "", " ", "0", "-1", "a", "none", "..", "../../a", "/etc/passwd", "C:\\a", "a/b", "a.b",
    "\0", "\n", "é", "\U0001f600", "{{", "{% x %}", "${HOME}", "!!python/object", "re:(a+)+$", "a" * 300,
    [], {}, [[]], [{}], [0], {"": None}, {"a": {"a": {"a": []}}},
)  # fmt: skip
"""What a reader may not have thought of."""


def words_in(*names: str) -> tuple[str, ...]:
    """The short texts that stand in the code of some modules or packages of quantkit: keys and values they look for.

    Args:
        names: such as ``exports`` or ``gguf/head.py``, without a trailing slash.
    """
    found: set[str] = set()
    for name in names:
        place = PACKAGE / name
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found |= set(_words(ast.parse(file.read_text(encoding="utf-8"))))
    return tuple(sorted(word for word in found if 0 < len(word) <= LONGEST_WORD and "\n" not in word))


def _words(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def in_json(words: Sequence[str]) -> Mutate:
    """Changes values of a JSON document."""

    def mutate(data: bytes, draw: random.Random) -> bytes:
        return json.dumps(changed(json.loads(data), words, draw), ensure_ascii=draw.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )

    return mutate


def in_lines(words: Sequence[str]) -> Mutate:
    """Changes values of one line of JSON Lines."""

    def mutate(data: bytes, draw: random.Random) -> bytes:
        lines = data.split(b"\n")
        place = draw.randrange(len(lines))
        lines[place] = in_json(words)(lines[place], draw)
        return b"\n".join(lines)

    return mutate


def in_yaml(words: Sequence[str]) -> Mutate:
    """Changes values of a YAML document."""

    def mutate(data: bytes, draw: random.Random) -> bytes:
        text = data.decode()
        if "&" in text:  # an alias may stand for more than memory holds
            raise ValueError("it may have aliases")
        return yaml.safe_dump(
            changed(yaml.safe_load(text), words, draw), sort_keys=False, default_flow_style=draw.choice((None, True))
        ).encode()

    return mutate


def in_text(words: Sequence[str]) -> Mutate:
    """Puts words of a grammar into a text, and takes pieces out or doubles them."""

    def mutate(data: bytes, draw: random.Random) -> bytes:
        pieces = re.findall(r"\w+|\s+|[^\w\s]+", data.decode("utf-8", "replace"))
        for _ in range(draw.choice(CHANGES)):
            begin = draw.randint(0, len(pieces))
            end = min(len(pieces), begin + draw.randint(0, 4))
            match draw.randrange(4):
                case 0:
                    pieces[begin:begin] = draw.choices(words, k=draw.randint(1, 4))
                case 1:
                    pieces[begin:end] = [draw.choice(words)]
                case 2:
                    del pieces[begin:end]
                case _:
                    place = draw.randint(0, len(pieces))
                    pieces[place:place] = pieces[begin:end]
        return "".join(pieces).encode("utf-8", "replace")

    return mutate


def changed(value: Any, words: Sequence[str], draw: random.Random) -> Any:
    """A document with one to some places changed."""
    root = [copy.deepcopy(value)]
    for _ in range(draw.choice(CHANGES)):
        holder, key = draw.choice(list(_places(root)))
        _change(root, holder, key, words, draw)
    return root[0]


def _places(holder: list[Any] | dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Every place of a document, as what holds it and its key or number there."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], list | dict):
            yield from _places(holder[key])


def _change(root: list[Any], holder: Any, key: Any, words: Sequence[str], draw: random.Random) -> None:
    value = holder[key]
    match draw.randrange(8):
        case 0:
            holder[key] = copy.deepcopy(draw.choice(ODD))
        case 1 if words:
            holder[key] = draw.choice(words)
        case 2 if isinstance(value, dict):
            value[draw.choice(words) if words else "a"] = copy.deepcopy(draw.choice(ODD))
        case 2 if isinstance(value, list):
            value.insert(draw.randint(0, len(value)), copy.deepcopy(draw.choice(ODD)))
        case 3 if isinstance(holder, dict):
            del holder[key]
        case 4:  # what stands elsewhere
            other, place = draw.choice(list(_places(root)))
            holder[key] = copy.deepcopy(other[place])
        case 5 if isinstance(holder, dict) and words:
            holder[draw.choice(words)] = holder.pop(key)
        case 6 if isinstance(value, int | float):
            holder[key] = draw.choice((value + 1, value - 1, -value, value * 2, str(value), value * 1.0))
        case 6 if isinstance(value, str):
            holder[key] = draw.choice((value + draw.choice(("a", ".", "/", "*")), value[:-1], value.upper(), [value]))
        case _:
            holder[key] = draw.choice(([value], {"a": value}, str(value)))
