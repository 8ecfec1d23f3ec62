"""Every input of the corpus is refused: one line with a remedy, exit code 2, bounded time and memory, nothing run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bad_inputs import CASES, GROUPS, Case
from tests.bad_inputs.place import OUTSIDE, Kit, Place
from tests.runs import files_with_times, hidden_names

KEPT = (".out.layers", "out/logs/", "history.sqlite")
SECONDS = 20
"""Of the processor, that a refusal may take, with the processes that it starts."""


def written(folder: Path) -> dict[str, int]:
    """Every file but those that a run keeps though it failed: its log, its history, and blocks that are solved."""
    return {name: time for name, time in files_with_times(folder).items() if not name.startswith(KEPT)}


class Runner:
    """The process of :mod:`tests.bad_inputs.runner`, started again when a command kills it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def run(self, folder: Path, arguments: list[str]) -> dict[str, Any]:
        """What the command answered; an exit code of -2 is the death of the process."""
        child = self._child or self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps([str(folder), arguments]) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        return {"code": -2, "output": "", "errors": f"the process died: {child.returncode}", "seconds": 0.0}

    def _started(self) -> subprocess.Popen[str]:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.bad_inputs.runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        return self._child

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            child, self._child = self._child, None
            with child:
                pass


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    found = Runner()
    yield found
    found.close()


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit.make(tmp_path_factory.mktemp("kit"))


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_a_bad_input_is_refused(case: Case, kit: Kit, runner: Runner, tmp_path: Path) -> None:
    place = Place.make(tmp_path / "case", kit)
    arguments = case.build(place)
    before, kit_before = written(place.root), files_with_times(kit.folder)
    answer = runner.run(place.inside, arguments)
    told = answer["errors"]
    assert answer["code"] == 2, told
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, told
    assert told.rstrip().endswith(lines[0])
    assert case.expected in lines[0]
    assert lines[0].endswith(")"), f"no remedy: {lines[0]}"
    assert len(lines[0]) < 2000
    assert "Traceback" not in told + answer["output"]
    assert answer["seconds"] < SECONDS
    assert written(place.root) == before
    assert files_with_times(kit.folder) == kit_before
    assert [name for name in hidden_names(place.root) if not name.startswith(KEPT)] == []
    assert sorted(path.name for path in (place.root / OUTSIDE).iterdir() if path.suffix == ".txt") == ["secret.txt"]
    assert not place.canary.exists()


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(CASES) >= 100
    assert {name.partition(".")[0] for name in CASES} == set(GROUPS)
