"""Every command that calibrates tells what became of the records, and the export has the audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.calibration import audit_lines, build
from quantkit.cli import app
from quantkit.methods import METHODS
from quantkit.methods.base import MEANS_TOKENS
from quantkit.quantization.calibration_need import few_tokens
from quantkit.recipe import CalibrationSpec
from quantkit.transforms import TRANSFORMS
from tests.tiny import make_model

SHAPES = {"up": (64, 1000), "down": (64, 2000)}
GOOD = {"instruction": "Say a word or two about the sea.", "output": "It is wide, and it is cold. " * 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("told") / "model")


def rows_file(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def told(model: Path, out: Path, *arguments: str) -> tuple[str, str]:
    """What ``quantkit quantize`` prints."""
    command = ["quantize", str(model), "-o", str(out), "--group-size", "32", *arguments]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return done.stdout, " ".join(done.stderr.split())


def test_quantize_tells_what_became_of_the_records_and_the_export_has_the_audit(tmp_path: Path, model: Path) -> None:
    file = rows_file(tmp_path, *[{"q": "Q", "a": "A"}] * 95, *[GOOD] * 5)
    _, lines = told(model, tmp_path / "out", "--calibration", str(file), "--max-length", "32")
    for line in (
        "calibration: 5 of 100 records, 160 tokens in 5 rows",
        "calibration: skipped 95: no known format (keys: q, a); first in record 0",
        "say what other columns are: 'columns: {prompt: COLUMN, response: COLUMN}'",
        "warning: calibration: records skipped as unusable: 95 of 100",
        "warning: calibration: records cut to 32 tokens: 5 of 5",
        f"warning: 160 calibration tokens, and gptq wants {MEANS_TOKENS} or more",
    ):
        assert line in lines
    audit = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert audit["records"]["skipped"] == 95
    assert "calibration.json" in json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "calibration set: `rows`, 5 rows, 160 tokens" in card
    assert "what became of its records is in `calibration.json`" in card


def test_quantize_says_the_same_as_json_and_takes_columns(tmp_path: Path, model: Path) -> None:
    file = rows_file(tmp_path, *[{"q": GOOD["instruction"], "a": GOOD["output"]}] * 3)
    options = ["--column", "prompt=q", "--column", "response=a", "--packing", "full", "--max-length", "32", "--json"]
    printed, _ = told(model, tmp_path / "out", "--calibration", str(file), *options)
    found = json.loads(printed)
    assert found["checkpoint"] == str(tmp_path / "out")
    assert found["calibration"]["records"]["used"] == 3
    assert found["calibration"]["packing"] == "full"
    assert any("gptq wants" in note for note in found["notes"])
    done = CliRunner().invoke(app, ["quantize", str(model), "-o", str(tmp_path / "x"), "--column", "prompt"])
    assert done.exit_code == 2
    assert "--column prompt is not NAME=COLUMN" in done.stderr


def test_a_method_without_calibration_tells_nothing_of_it(tmp_path: Path, model: Path) -> None:
    printed, lines = told(model, tmp_path / "out", "--method", "rtn", "--json")
    assert json.loads(printed)["calibration"] is None
    assert "calibration" not in lines
    assert not (tmp_path / "out" / "calibration.json").exists()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_warning_is_for_more_than_a_tenth(tmp_path: Path, model: Path, lost: int) -> None:
    file = rows_file(tmp_path, *[{"title": "x"}] * lost, *[GOOD] * (10 - lost))
    spec = CalibrationSpec(dataset=str(file), samples=10 - lost, max_length=512)
    lines = audit_lines(build(spec, model, tmp_path / "out").audit)
    assert any(line.startswith(f"calibration: skipped {lost}: no known format (keys: title)") for line in lines)
    assert any(line.startswith("warning: ") for line in lines) == (lost == 2)


@pytest.mark.parametrize(
    ("method", "tokens", "words"),
    [
        ("gptq", 2000, "gptq wants more than 2,000, the width of the input of down: with fewer its Gram matrix"),
        ("gptq", 2001, None),
        ("awq", 500, "awq wants 512 or more: means of fewer are rough"),
        ("awq", 512, None),
        ("rtn", 0, None),
        ("hqq", 0, None),
    ],
)
def test_each_method_says_how_many_tokens_it_wants(method: str, tokens: int, words: str | None) -> None:
    kind = METHODS.get(method)
    transforms = [TRANSFORMS.get(name)(TRANSFORMS.get(name).Options()) for name in kind.transforms]
    notes = few_tokens(kind(kind.Options()), transforms, SHAPES, tokens)
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


def test_python_has_the_audit_in_the_folder(tmp_path: Path, model: Path) -> None:
    file = rows_file(tmp_path, *[GOOD] * 3)
    keys = {"dataset": str(file), "samples": 3, "max_length": 64}
    out = quantkit.quantize(model, out=tmp_path / "out", method="awq", bits=4, group_size=32, calibration=keys)
    assert json.loads((out / "calibration.json").read_text())["records"]["used"] == 3
