"""The architectures as they are kept, and as people read them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import SourceError
from quantkit.system.artifacts import read_json
from quantkit.system.units import percentage

if TYPE_CHECKING:
    from rich.table import Table

MODELS_FILE = Path(__file__).with_name("models.json")
LOADS = "loads"
"""What is said of a runtime, or a format, that takes an architecture; anything else is the reason why not."""


def read_models() -> dict[str, Any]:
    """What became of every architecture.

    Returns:
        ``architectures``, by transformers' ``model_type``, each with ``class``, and ``refused``, ``untried`` (why no
        small model of it could be made and run on a text), or: ``share`` of the weights in the blocks' matrices that is
        quantized, ``float`` (reason to patterns of names), ``formats`` and ``runtimes`` (name to ``loads`` or why not);
        and ``versions`` of what it was done with.
    """
    found: dict[str, Any] = read_json(MODELS_FILE)
    return found


def chosen(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The same of the architectures whose names hold a word.

    Raises:
        SourceError: there is none.
    """
    there: Mapping[str, Any] = found["architectures"]
    kept = {each: facts for each, facts in there.items() if name.lower() in f"{each} {facts['class']}".lower()}
    if not kept:
        close = difflib.get_close_matches(name.lower(), there)
        remedy = f"did you mean {' or '.join(close)}?" if close else "'quantkit models' lists all"
        raise SourceError(f"no architecture is called '{name}'", remedy)
    return {**found, "architectures": kept}


def models_table(found: Mapping[str, Any]) -> Table:
    """A row for each architecture."""
    from rich.table import Table

    table = Table(caption=_caption(found), caption_justify="left")
    heads = _heads(found)
    table.add_column(heads[0], no_wrap=True)
    for head in heads[1:-1]:
        table.add_column(head, justify="center")
    table.add_column(heads[-1])
    for row in _rows(found):
        table.add_row(*row)
    return table


def models_markdown(found: Mapping[str, Any]) -> str:
    """The same for a page, then every reason why something does not load, once."""
    heads = _heads(found)
    lines = [f"| {' | '.join(heads)} |", f"|---|{':---:|' * (len(heads) - 2)}---|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(found)]
    return "\n".join([*lines, "", _caption(found), "", *_reasons(found)])


def _heads(found: Mapping[str, Any]) -> list[str]:
    return ["model_type", "4 bits", *_columns(found), "stays float"]


def _columns(found: Mapping[str, Any]) -> list[str]:
    """The formats and the runtimes, in the order in which they are kept."""
    names = [name for facts in found["architectures"].values() for kind in _kinds(facts) for name in kind]
    return list(dict.fromkeys(names))


def _kinds(facts: Mapping[str, Any]) -> list[Mapping[str, str]]:
    return [facts.get("formats", {}), facts.get("runtimes", {})]


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    columns = _columns(found)
    rows = []
    for name, facts in found["architectures"].items():
        why = facts.get("refused", facts.get("untried"))
        if why is not None:
            rows.append([name, "refused" if "refused" in facts else "not tried", *["-"] * len(columns), why])
            continue
        said = {column: each for kind in _kinds(facts) for column, each in kind.items()}
        marks = ["-" if column not in said else "yes" if said[column] == LOADS else "no" for column in columns]
        kept = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in facts["float"].items())
        rows.append([name, percentage(facts["share"]), *marks, kept])
    return rows


def _reasons(found: Mapping[str, Any]) -> list[str]:
    places: dict[tuple[str, str], list[str]] = {}
    for name, facts in found["architectures"].items():
        for kind in _kinds(facts):
            for column, said in kind.items():
                if said != LOADS:
                    places.setdefault((column, _general(said)), []).append(name)
    return [f"- {column}: {', '.join(names)}: {reason}" for (column, reason), names in places.items()]


def _general(reason: str) -> str:
    """A reason without the names of one model."""
    reason = re.sub(r" such as [\w.]+", "", reason)
    reason = re.sub(r"\btransformers' \w+", "transformers' class", reason)
    reason = re.sub(r"^variant: [\w.]+: ", "", reason)
    reason = re.sub(r"^transformers makes [\w.]+ of", "transformers makes tensors of", reason)
    return re.sub(r" of type '[\w-]+'", " of this type", reason).removeprefix("it: ")


def _caption(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"4 bits: share of the weights in the blocks' matrices. -: not tried. With {versions}"
