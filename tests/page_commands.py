"""The commands of a page, run in a folder that holds what its reader has, with tiny models."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from quantkit.cli import app
from tests.adapters import make_adapter
from tests.runs import edit_json
from tests.tiny import make_model

DOCS = Path(__file__).parent.parent / "docs"
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
"""Groups of 128 and blocks of 256 fit."""
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def make_place(folder: Path, **shape: Any) -> Path:
    """``my-model``, ``my-base`` with ``my-adapter``, ``my-data.jsonl`` and ``held-out.jsonl``.

    Args:
        folder: where they are made.
        shape: of the models, where it is not that of :data:`SHAPE`.
    """
    shape = {**SHAPE, **shape}
    make_model(folder / "my-model", dtype=torch.bfloat16, **shape)
    edit_json(folder / "my-model" / "tokenizer_config.json", of_transformers_4)
    make_model(folder / "my-base", dtype=torch.bfloat16, seed=1, **shape)
    make_adapter(folder / "my-adapter", folder / "my-base", named="./my-base")
    for name, count in {"my-data.jsonl": 80, "held-out.jsonl": 8}.items():
        rows = [
            {"text": f"{name}: the tide comes twice a day, and what people ask of it is {n}, why?"}
            for n in range(count)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def of_transformers_4(config: dict[str, Any]) -> None:
    """A tokenizer by the names that older versions know."""
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    del config["extra_special_tokens"]


def blocks_of(text: str) -> list[tuple[str, str | None, str]]:
    """Language, title and content of every fenced block."""
    return [(found[1], found[2], found[3]) for found in BLOCK.finditer(text)]


def commands_of(shell: str) -> Iterator[list[str]]:
    """The commands of quantkit in a shell block, one a line, as words."""
    for line in shell.splitlines():
        if line.startswith("quantkit "):
            yield shlex.split(line, comments=True)[1:]


def run_line(words: list[str], folder: Path, expected: int = 0) -> str:
    """Run one command in this process, in the current folder, with ``> FILE`` at its end where it has one.

    Returns:
        What it printed on standard output.
    """
    target = folder / words[-1] if ">" in words else None
    given = words[: words.index(">")] if ">" in words else words
    done = CliRunner().invoke(app, given)
    assert done.exit_code == expected, f"quantkit {shlex.join(given)}: {done.output}\n{done.exception!r}"
    if target is not None:
        target.write_text(done.stdout, encoding="utf-8")
    return done.stdout
