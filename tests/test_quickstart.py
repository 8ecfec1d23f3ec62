"""docs/quickstart.md and docs/index.md, as a newcomer follows them: every command in its order, on tiny models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit import evaluation
from quantkit.evaluation.job import EvaluationJob, Progress
from quantkit.system.artifacts import read_json
from tests.page_commands import DOCS, blocks_of, commands_of, make_place, run_line
from tests.runs import score_here

TRIED_ELSEWHERE = {"verify", "fit"}
"""Commands that start processes of their own, and take long; or that ``test_fit`` runs."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("newcomer"), hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Score in this process, and measure neither memory nor speed."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_quickly)
    monkeypatch.setattr(evaluation, "run_job", score_quickly)


def score_quickly(job: EvaluationJob, *, log: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    figures = tuple(metric for metric in job.spec.metrics if metric not in ("memory", "speed"))
    spec = job.spec.model_copy(update={"metrics": figures})
    return score_here(replace(job, spec=spec), log=log, on_progress=on_progress)


def test_the_quickstart_does_what_it_says(place: Path) -> None:
    ran = []
    for language, _, text in blocks_of((DOCS / "quickstart.md").read_text(encoding="utf-8")):
        if language == "yaml":
            (place / f"{yaml.safe_load(text)['name']}.yaml").write_text(text, encoding="utf-8")
        for words in commands_of(text) if language == "sh" else ():
            if words[0] == "merge":
                shutil.rmtree(place / "my-model")
            if words[0] not in TRIED_ELSEWHERE:
                run_line(words, place)
                ran.append(words[0])
    assert ran == ["merge", "inspect", "quantize", "evaluate", "quantize", "validate", "plan", "run", "accept", "check"]
    assert list((place / "my-model-gguf").glob("*.gguf"))
    assert (place / "my-model-gguf" / "Modelfile").is_file()
    assert (place / "reports" / "first" / "report.html").is_file()
    report = read_json(place / "reports" / "first" / "report.json")
    assert [variant["status"] for variant in report["variants"]] == ["ok"] * 3


def test_the_three_commands_of_the_first_page_work(place: Path) -> None:
    recipe = Path("recipes/quickstart.yaml")
    text = (DOCS.parent / recipe).read_text(encoding="utf-8")
    (place / "recipes").mkdir()
    (place / recipe).write_text(text.replace("max_tokens: 8192", "max_tokens: 64"), encoding="utf-8")
    shutil.rmtree(place / "my-model-int4", ignore_errors=True)
    (shown,) = [text for language, _, text in blocks_of((DOCS / "index.md").read_text(encoding="utf-8"))]
    lines = list(commands_of(shown))
    assert [words[0] for words in lines] == ["quantize", "evaluate", "run"]
    for words in lines:
        run_line(words, place)
    assert (place / "reports" / "quickstart" / "report.html").is_file()
