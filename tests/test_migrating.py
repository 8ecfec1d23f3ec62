"""docs/migrating.md: both halves of every pair are run, and give files of the format and scheme that the page names.

The half of another tool runs where its package is: in the environment of the library, made by
``quantkit env install``. These tests are marked slow.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.isolation.environments import environment_of
from quantkit.libraries import LIBRARIES
from quantkit.system.artifacts import read_json
from tests.page_commands import DOCS, blocks_of, commands_of, make_place, run_line
from tests.runs import score_here

PAGE = (DOCS / "migrating.md").read_text(encoding="utf-8")
LIBRARY = {"gptqmodel": "gptqmodel", "awq": "autoawq", "llmcompressor": "llmcompressor", "hqq": "hqq"}
"""By the module that a call imports, the library whose environment has it."""
GRID = re.compile(r'<div class="grid" markdown>\n(.*?)</div>\n\n([^\n]*)', re.DOTALL)


class Pair(NamedTuple):
    """A tool's call and quantkit's, side by side.

    Attributes:
        name: the heading, numbered where it has several pairs.
        theirs: Python, or None where it is a shell command.
        files: what is written first, by name.
        ours: quantkit's commands.
        held: scheme and format of both files, or None where the page does not say.
    """

    name: str
    theirs: str | None
    files: dict[str, str]
    ours: str
    held: tuple[str, str] | None


def pairs() -> list[Pair]:
    """The pairs of the page, in its order."""
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        for number, (grid, after) in enumerate(GRID.findall(section), start=1):
            blocks = blocks_of(grid)
            held = re.match(r"Both hold `([^`]+)` in the format `([^`]+)`\.", after)
            found.append(
                Pair(
                    heading if number == 1 else f"{heading} {number}",
                    next((text for language, _, text in blocks if language == "python"), None),
                    {title: text for _, title, text in blocks if title},
                    next(text for language, _, text in blocks if language == "sh"),
                    held and (held[1], held[2]),
                )
            )
    return found


PAIRS = {pair.name: pair for pair in pairs()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("migrating"))


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_here)


def holds(folder: Path) -> tuple[str, str]:
    """The one scheme of a checkpoint, and its format."""
    found = quantkit.inspect(folder, deep=False)
    (scheme,) = found["schemes"]
    return scheme, found["format"]


def test_every_tool_has_a_pair_and_says_its_version() -> None:
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)[:-1]
    assert headings == [name for name in PAIRS if not name[-1].isdigit()]
    for library, module in ((LIBRARIES.get(name), module) for module, name in LIBRARY.items()):
        requirement = next(each for each in library.requirements if each.startswith(library.distribution))
        assert requirement.partition("==")[2].rpartition(".")[0] in PAGE, f"{module}: the page names another version"


def shorten(recipe: Path) -> None:
    """Let a recipe that is written and not yet run score a few tokens."""
    text = recipe.read_text(encoding="utf-8")
    if "evaluation:" not in text:
        short = "evaluation: {texts: [prose], context_length: 32, max_tokens: 64, metrics: [perplexity]}"
        recipe.write_text(f"{text}\n{short}\n", encoding="utf-8")


@pytest.mark.parametrize("name", PAIRS)
def test_our_half_gives_what_the_page_says(name: str, place: Path) -> None:
    pair = PAIRS[name]
    for file, text in pair.files.items():
        (place / file).write_text(text, encoding="utf-8")
    for words in commands_of(pair.ours):
        run_line(words, place)
        if words[-1] == "first.yaml":
            shorten(place / "first.yaml")
    for folder in re.findall(r"--out (\S+)", pair.ours):
        assert (place / folder / "manifest.json").is_file()
        if pair.held:
            assert holds(place / folder) == pair.held
    if "first.yaml" in pair.ours:
        (made,) = (place / "reports").glob("*/variants/*/")
        assert holds(made) == pair.held
        assert read_json(place / "reports" / "theirs-gptq" / "report.json")["status"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, pair in PAIRS.items() if pair.theirs and pair.name != "Unsloth"])
def test_their_half_gives_what_the_page_says(name: str, place: Path) -> None:
    pair = PAIRS[name]
    assert pair.theirs
    (place / "theirs.py").write_text(pair.theirs, encoding="utf-8")
    own = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        [interpreter(pair.theirs), "theirs.py"], env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = re.findall(r'"\./(theirs-[\w-]+)"', pair.theirs)
    assert written
    if pair.held:
        assert holds(place / written[0]) == pair.held


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("llamafactory-cli") is None, reason="needs LLaMA-Factory on the PATH")
def test_llama_factory_merges_what_we_merge(place: Path) -> None:
    pair = PAIRS["LLaMA-Factory"]
    (place / "merge.yaml").write_text(pair.files["merge.yaml"], encoding="utf-8")
    done = subprocess.run(["llamafactory-cli", "export", "merge.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    quantkit.merge("./my-base", "./my-adapter", out="./ours")
    ours, theirs = CheckpointReader(place / "ours"), CheckpointReader(place / "theirs-merged")
    for name in ours.names():
        torch.testing.assert_close(theirs.read(name), ours.read(name), rtol=2e-2, atol=2e-3)


def interpreter(code: str) -> str:
    """The interpreter that has the package which a call imports; skips where there is none."""
    for module, name in LIBRARY.items():
        if re.search(rf"^from {module}\b", code, re.MULTILINE):
            environment = environment_of(LIBRARIES.get(name))
            if environment.state != "ready":
                pytest.skip(f"its environment is {environment.state}: quantkit env install {name}")
            return str(environment.python)
    return sys.executable
