"""`quantkit fit`: from a model to the file that fits a budget and loses least on one's own records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import quantkit
from quantkit import records
from quantkit.cli import app
from quantkit.errors import CalibrationError, QuantkitError
from quantkit.estimation.models import anatomy_of
from quantkit.evaluation import stage
from quantkit.exports import open_export
from quantkit.pipeline.fit_candidates import Candidate, Stock, candidates
from quantkit.recipe import BudgetSpec
from quantkit.records.record import Call, Message, Record
from quantkit.records.splitting import split, write_records
from quantkit.system.artifacts import read_json
from quantkit.system.units import parse_bytes
from tests.page_commands import DOCS, blocks_of, commands_of, run_line
from tests.runs import Notebook, score_here
from tests.runs import write_records as write_instructions
from tests.tiny import make_model

PAGE = (DOCS / "fit.md").read_text(encoding="utf-8")
TOKENS = 96
"""Scored in each test."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("fit") / "my-model", dtype=torch.bfloat16, num_hidden_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instructions(tmp_path_factory.mktemp("data") / "my-data.jsonl")


@pytest.fixture(autouse=True)
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Score in this process; the names of what was scored."""
    names: list[str] = []

    def score(job: Any, **rest: Any) -> dict[str, Any]:
        names.append("baseline" if job.writes_reference else job.checkpoint.name)
        return score_here(job, **rest)

    monkeypatch.setattr(stage, "run_job", score)
    return names


def stock_of(model: Path, runtime: str = "vllm", **budget: Any) -> Stock:
    return Stock(anatomy_of(str(model)), runtime, BudgetSpec(**budget))


def sizes(found: list[Candidate]) -> dict[str, int]:
    return {each.name: each.size for each in found}


def room_between(model: Path) -> int:
    """Bytes for which every file of 8 bits is too large, and not those of 4."""
    grouped = sizes(candidates(stock_of(model, size=2**30)))["int8-g64"]
    return sizes(candidates(stock_of(model, size=grouped - 1)))["int8-channel"] - 1


# The data


def test_no_record_is_on_both_sides(data: Path, tmp_path: Path) -> None:
    found = records.load(str(data))
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text(data.read_text(encoding="utf-8") * 3, encoding="utf-8")
    calibrating, scoring = split(records.load(str(doubled)))
    assert not [each for each in scoring if each in calibrating]
    assert len(calibrating) + len(scoring) == len(found.records) == 20
    assert len(scoring) == 4
    assert (calibrating, scoring) == split(found), "how often a record is there changes nothing"


def test_a_long_text_is_cut_and_a_single_record_refused(tmp_path: Path) -> None:
    text = "".join(f"Sentence {number} is about the tide and about kettles. " for number in range(200))
    whole = tmp_path / "book.txt"
    whole.write_text(text, encoding="utf-8")
    calibrating, scoring = split(records.load(str(whole)))
    assert len(scoring) >= 2
    pieces = [str(each.text) for each in (*calibrating, *scoring)]
    assert sorted(text.index(piece) for piece in pieces)[0] == 0
    assert sum(map(len, pieces)) == len(text)
    short = tmp_path / "short.txt"
    short.write_text("One sentence.", encoding="utf-8")
    with pytest.raises(CalibrationError, match="single record"):
        split(records.load(str(short)))


def test_records_are_written_as_they_are_read(tmp_path: Path) -> None:
    tool = json.dumps({"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}})
    given = [
        Record(text="A plain text,\nof two lines."),
        Record(messages=(Message("system", "Be plain."), Message("user", "When?"), Message("assistant", "At six."))),
        Record(
            messages=(
                Message("user", "When is high tide?"),
                Message("assistant", "", reasoning="I have to look.", calls=(Call("tide", '{"day": 1}', "c1"),)),
                Message("tool", "06:12", name="tide", call_id="c1"),
                Message("assistant", "At twelve past six."),
            ),
            tools=(tool,),
        ),
        Record(messages=(Message("user", "What is it? <image>"), Message("assistant", "A cat.")), images=("/a.png",)),
    ]
    write_records(tmp_path / "again.jsonl", given)
    assert records.load(str(tmp_path / "again.jsonl")).records == given


# What fits


def test_the_best_of_each_width_is_tried_in_formats_that_the_runtime_loads(model: Path) -> None:
    every = 2**30
    names = {
        runtime: list(sizes(candidates(stock_of(model, runtime, size=every))))
        for runtime in ("vllm", "transformers", "llama.cpp")
    }
    assert names["vllm"] == ["int8-g64", "fp8", "int4-g32-asym"]
    assert names["llama.cpp"][0] == "q8_0"
    assert names["transformers"][0] == "int8-g64"
    assert names["transformers"][-1] == "bnb-int8"
    precise = sizes(candidates(stock_of(model, "vllm", size=every)))["int4-g32-asym"]
    assert list(sizes(candidates(stock_of(model, "vllm", size=precise - 1)))) == ["int4-g32", "mix"]


def test_a_mix_fills_a_budget_in_which_8_bits_have_no_room(model: Path) -> None:
    room = room_between(model)
    (mix,) = (each for each in candidates(stock_of(model, size=room)) if each.name == "mix")
    assert mix.keys["budget"] == {"size": room}
    assert mix.size == room
    stock = stock_of(model, memory=2**30, context=256)
    limit = stock.memory("compressed-tensors", room)
    (mix,) = (each for each in candidates(stock_of(model, memory=limit, context=256)) if each.name == "mix")
    assert mix.keys["budget"] == {"memory": limit, "context": 256}
    assert mix.size == room


def test_transformers_holds_compressed_tensors_decoded(model: Path) -> None:
    stock = stock_of(model, "transformers", memory=2**30)
    size = stock.float_size // 4
    assert stock.memory("compressed-tensors", size) == stock.memory("float", stock.float_size)
    assert stock.memory("bitsandbytes", size) < stock.memory("float", stock.float_size)
    smaller = stock.memory("float", stock.float_size) - 1
    found = candidates(stock_of(model, "transformers", memory=smaller))
    assert {each.keys["format"] for each in found} == {"bitsandbytes"}


def test_a_budget_that_nothing_meets_tells_the_smallest_that_is_met(model: Path) -> None:
    with pytest.raises(QuantkitError, match=r"^nothing that vllm loads .* fits 1\.00 KiB of file: .*") as failed:
        candidates(stock_of(model, size=1024))
    least = failed.value.remedy.removeprefix("give --size ")
    assert candidates(stock_of(model, size=parse_bytes(least)))
    with pytest.raises(QuantkitError, match="of it beside the weights") as failed:
        candidates(stock_of(model, memory=2**20, context=256))
    least = failed.value.remedy.removeprefix("give --memory ")
    assert candidates(stock_of(model, memory=parse_bytes(least), context=256))


# The whole


def test_the_file_to_ship_fits_loses_least_and_is_checked_next_week(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: list[str]
) -> None:
    """The commands of docs/fit.md in their order, with a size that leaves out the largest candidate."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "my-model")
    shutil.copy(data, "my-data.jsonl")
    room = room_between(model)
    (shell,) = (text for language, _, text in blocks_of(PAGE) if language == "sh")
    plan, fit, check = (
        [f"--size={room}" if each == "--memory" else each for each in words if each != "8GiB"]
        for words in commands_of(shell)
    )
    assert "int4 g32 asym" in run_line(plan, tmp_path)
    assert not Path("my-model-8gb").exists()
    found = json.loads(run_line([*fit, "--json"], tmp_path))
    able = [each for each in found["candidates"] if each["fits"]]
    assert len(able) >= 2
    shipped = Path(found["checkpoint"])
    assert shipped == Path("my-model-8gb/model")
    assert open_export(shipped).size_bytes() == found["size_bytes"] <= room
    card = (shipped / "README.md").read_text(encoding="utf-8")
    assert "# my-model-8gb" in card
    assert "| held-out |" in card
    report = read_json(Path("my-model-8gb/report.json"))
    (row,) = (row for row in report["variants"] if row["name"] == found["variant"])
    assert row["checkpoint"] == str(shipped)
    assert report["recommendation"]["variant"] == found["variant"]
    assert report["calibration"]["dataset"]["name"] == "calibration"
    assert [text["name"] for text in report["recipe"]["evaluation"]["texts"]] == ["held-out"]
    assert not Path("my-model-8gb/run").exists()
    written = yaml.safe_load(Path(found["recipe"]).read_text(encoding="utf-8"))
    assert [variant["name"] for variant in written["variants"]] == [found["variant"]]

    assert "passed: 3 gates on 1 variant" in run_line(check, tmp_path)
    scored.clear()
    assert json.loads(run_line([*fit, "--json"], tmp_path)) == found
    assert not scored, "what is there is not made again"


def test_quick_stops_at_the_first_good_answer(model: Path, data: Path, tmp_path: Path, scored: list[str]) -> None:
    found = quantkit.fit(model, out=tmp_path / "o", size="10MB", data=data, max_tokens=TOKENS, quick=True)
    assert [each["name"] for each in found["candidates"]] == ["int8-g64"]
    assert scored == ["baseline", "int8-g64"]


class Stopped(Notebook):
    """Is interrupted when a stage begins."""

    def stage(self, title: str) -> None:
        super().stage(title)
        if title == "evaluate: fp8":
            raise KeyboardInterrupt


def test_a_quick_answer_that_is_not_good_is_not_the_last_and_what_was_stopped_goes_on(
    model: Path, data: Path, tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.pipeline.fitting.GOOD", -1.0)
    given: dict[str, Any] = {"size": "10MB", "data": data, "max_tokens": TOKENS, "quick": True, "keep": True}
    with pytest.raises(KeyboardInterrupt):
        quantkit.fit(model, out=tmp_path / "o", **given, observer=Stopped())
    assert scored == ["baseline", "int8-g64"]
    notebook = Notebook()
    quantkit.fit(model, out=tmp_path / "o", **given, observer=notebook)
    assert scored == ["baseline", "int8-g64", "fp8", "int4-g32-asym"]
    assert "fp8: reused the finished checkpoint" in notebook.notes
    kept = [each.name for each in (tmp_path / "o" / "run" / "variants").glob("[!.]*")]
    assert sorted(kept) == ["fp8", "int4-g32-asym", "int8-g64"]


def test_the_command_shows_a_plan_and_writes_nothing(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", str(model), "--size", "10MB", "--data", str(data), "--out", "o", "--dry-run"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "int4 g32 asym" in done.stdout
    assert "in all, between" in done.stdout
    assert "the model fits 9.54 MiB of file as it is" in done.stderr
    told = json.loads(CliRunner().invoke(app, [*words, "--json", "--quick"]).stdout)
    assert told["quick"] == "int8-g64"
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.txt").write_text("a", encoding="utf-8")
    small = ["--size", "10MB"]
    for words, expected in (
        (["--out", "o"], "fit: budget: there is none (give --memory"),
        (["--out", "o", *small, "--runtime", "vlm"], "did you mean 'vllm'"),
        (["--out", "o", *small, "--data", "nothing.jsonl"], "there is no nothing.jsonl"),
        (["--out", "o", "--size", "ten"], "fit: budget.size: 'ten' is not a size"),
        (["--out", "theirs", *small], "theirs exists and was not written by quantkit"),
        (["--out", str(model), *small], "is the model that is read"),
        (["--out", "o", "--size", "1KiB"], "nothing that vllm loads"),
        (["--out", "o", *small, "--runtime", "gptqmodel"], "fit makes no file of"),
    ):
        done = CliRunner().invoke(app, ["fit", str(model), *words])
        assert done.exit_code == 2, done.output
        (line,) = [each for each in done.stderr.splitlines() if each.startswith("error")]
        assert expected in line
    assert not (tmp_path / "o").exists()
