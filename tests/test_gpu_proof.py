"""The proof for the first minutes on a GPU, tried on a CPU: its parts, its limits, and the model of the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_proof import proof as found

    return found


def found_for(tmp_path: Path) -> Any:
    from gpu_proof.found import Found

    setting = {
        "device": "cpu",
        "sizes": "small",
        "work": str(tmp_path),
        "told": str(tmp_path / "told.json"),
        "known": {},
    }
    return Found(setting)


def test_a_part_runs_from_the_command_line_and_says_what_it_ran_on(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_proof"), "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--parts", "facts"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.startswith("[cpu] ") for line in done.stdout.splitlines()] == [True, False]
    record = json.loads((tmp_path / "gpu-proof.json").read_text())
    assert (record["device"], record["sizes"], record["not_yet"]) == ("cpu", "small", [])
    (facts,) = record["parts"]
    assert facts["state"] == "done"
    assert {"bfloat16", "float32", "copy", "disk written"} < facts["figures"]["rates"].keys()
    assert all(rate > 0 for rate in facts["figures"]["rates"].values())
    page = (tmp_path / "gpu-proof.html").read_text()
    assert "says nothing of a GPU" in page
    assert "cuda" not in page.lower().replace("cuda none", "")


@pytest.mark.usefixtures("proof")
def test_a_model_goes_from_quantizing_to_scores(tmp_path: Path) -> None:
    from gpu_proof.models import blocks

    found = found_for(tmp_path)
    found.setting["known"] = {"facts": {"rates": {"float32": 1e11}}}
    blocks(found)
    figures = json.loads((tmp_path / "told.json").read_text())["figures"]
    assert not found.failed
    assert {"load", "Grams", "Grams of what was lost", "solve", "correct", "pack", "write"} < figures["phases"].keys()
    assert figures["peak"] is None
    assert figures["estimate"] > 0
    assert 0 < figures["kl"] < 1
    assert figures["achieved"].keys() >= {"Grams, FLOP/s", "solve, B/s"}
    assert any("% of what was measured for float32, on cpu" in line for line in found.lines)
    assert any(line.startswith("peak memory: not measured on a cpu") for line in found.lines)


def test_a_part_that_hangs_or_crashes_leaves_the_others_and_what_it_said(
    proof: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says = (
        "import json,os,sys,time;json.dump({'lines':['<one>'],'figures':{'a':1},'failed':False},open(sys.argv[1],'w'));"
    )
    scripts = {"facts": says + "time.sleep(60)", "tests": "print('how it ended');os.abort()", "bytes": says}

    def command(name: str, setting: dict[str, Any]) -> list[str]:
        return [sys.executable, "-c", "import os;" + scripts[name], setting["told"]]

    monkeypatch.setattr(proof, "command", command)
    monkeypatch.setattr(proof, "LIMITS", {"facts": 2, "tests": 20, "bytes": 20})
    monkeypatch.setitem(proof.MINUTES, "cpu", proof.MINUTES["cuda"])
    started = time.monotonic()
    setting = {"device": "cpu", "sizes": "small"}
    found = proof.Proof(setting, tmp_path, time.monotonic() + 60).run(["facts", "tests", "bytes"])
    assert time.monotonic() - started < 40
    assert [part.state for part in found] == ["cut", "failed", "done"]
    assert found[1].log.splitlines()[-1] == "it was ended by SIGABRT"
    assert found[0].lines == ["<one>"]
    assert found[2].figures == {"a": 1}
    assert "<li>&lt;one&gt;</li>" in (tmp_path / "gpu-proof.html").read_text()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_what_is_known_is_on_disk_after_every_part_and_none_begins_after_the_end(
    proof: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def summary(part: Any, device: str) -> str:
        record = json.loads((tmp_path / "gpu-proof.json").read_text())
        seen.append(([each["state"] for each in record["parts"]], record["not_yet"]))
        return str(part.name)

    monkeypatch.setattr(proof, "command", lambda name, setting: [sys.executable, "-c", ""])
    monkeypatch.setattr(proof, "summary", summary)
    setting = {"device": "cpu", "sizes": "small"}
    proof.Proof(setting, tmp_path, time.monotonic() + 60).run(["facts", "tests"])
    assert seen == [(["done"], ["tests"]), (["done", "done"], [])]
    (late,) = proof.Proof(setting, tmp_path, time.monotonic() + 1).run(["facts"])
    assert late.state == "left out"


@pytest.mark.usefixtures("proof")
def test_bytes_that_differ_and_methods_that_fail_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_proof import checks

    found = found_for(tmp_path)
    monkeypatch.setattr(checks, "METHODS", {"rtn": {"method": "rtn"}, "other": {"method": "no such method"}})
    checks.equal_bytes(found)
    assert found.figures["equal"] == {"rtn": True, "other": None}
    assert found.failed
    assert json.loads((tmp_path / "told.json").read_text())["lines"][0] == "rtn: the same bytes on cpu"
    digests = iter("ab")
    monkeypatch.setattr(checks, "METHODS", {"rtn": {"method": "rtn"}})
    monkeypatch.setattr(checks, "digest", lambda folder: next(digests))
    other = found_for(tmp_path)
    checks.equal_bytes(other)
    assert other.figures["equal"] == {"rtn": False}
    assert other.failed


@pytest.mark.usefixtures("proof")
def test_methods_of_the_proof_are_all_that_quantkit_has() -> None:
    from gpu_proof.checks import METHODS

    from quantkit.recipe import VariantSpec

    for keys in METHODS.values():
        VariantSpec.model_validate({"name": "v", "bits": 4, "group_size": 64, **keys})
    assert METHODS.keys() == {"rtn", "gptq", "awq", "hqq", "awq+gptq", "gptq+tune"}


@pytest.mark.usefixtures("proof")
def test_outcomes_of_tests_are_counted_and_failures_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_proof import checks

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n\n@pytest.mark.gpu\ndef test_good():\n    pass\n\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('a', ['x y'])\ndef test_bad(a):\n    assert a == 'z'\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\nmarkers = gpu\n")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    found = found_for(tmp_path)
    checks.tests(found)
    assert found.figures["counts"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 0}
    assert found.lines[0] == "1 passed, 1 failed on cpu"
    assert found.lines[1].startswith("tests/test_some.py::test_bad[x y]: ")
    assert "AssertionError" in found.lines[1] or "assert" in found.lines[1]
    assert found.failed


@pytest.mark.usefixtures("proof")
def test_without_gptqmodel_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_proof import other

    monkeypatch.setattr(other, "_interpreter", lambda: None)
    found = found_for(tmp_path)
    other.gptqmodel(found)
    assert "it was not run" in found.lines[0]
    assert not found.failed


@pytest.mark.usefixtures("proof")
def test_what_runs_inside_a_phase_is_not_the_outer_ones() -> None:
    from gpu_proof.phases import REST, Clock

    clock = Clock(torch.device("cpu"))
    with clock.phase("outer"):
        time.sleep(0.01)
        with clock.phase("inner"):
            time.sleep(0.05)
    assert clock.seconds["inner"] >= 0.05
    assert 0.01 <= clock.seconds["outer"] < 0.05
    assert REST in clock.seconds


@pytest.mark.usefixtures("proof")
def test_the_model_of_the_time_counts_what_the_method_does() -> None:
    import gpu_time

    shape = gpu_time.MODELS["8B"]
    assert shape.block_weights == 218_103_808
    assert gpu_time.forward(shape, 1, 0).half == 2 * shape.block_weights
    # three inputs of 4096 columns and one of 14336
    assert gpu_time.grams(shape, 10).single == 2 * 10 * (3 * 4096**2 + 14336**2)
    # of a column at least: a product, a division, a rounding, a difference, and as much again in the refinement
    assert 8 <= gpu_time.per_column(is_fused=False) <= 20
    # a kernel and a few products for each block of 128, and the refit of scales for each group
    assert gpu_time.per_column() <= 0.6
    loops = gpu_time.loops(4096, 4096)
    assert (loops.columns, loops.numbers) == (2 * 4096, 2 * 4096 * 4096 * 128 * gpu_time.LANES)
    assert gpu_time.Work(single=67e12).seconds(gpu_time.CARDS["h100"]) == pytest.approx(1 / gpu_time.REACHED)
    assert gpu_time.Work(operations=1e6, moved=1e9).seconds(gpu_time.CARDS["h100"]) == pytest.approx(5.0)


@pytest.mark.usefixtures("proof")
def test_the_table_of_the_docs_is_about_what_the_script_prints() -> None:
    import gpu_time

    docs = (ROOT / "docs" / "engine.md").read_text("utf-8").splitlines()
    printed = gpu_time.table(gpu_time.CARDS["h100"], 65536).splitlines()
    own = docs[docs.index(printed[0]) :][: len(printed)]  # other tables of the page have rows of the same names
    for line in printed[2:]:
        _, part, *cells = (cell.strip() for cell in line.split("|"))
        (told,) = (each for each in own if each.startswith(f"| {part} |"))
        written = [cell.strip() for cell in told.split("|")][2:]
        for now, then in zip(cells[1::2], written[1::2], strict=True):  # what the method does may change by a little
            assert float(then.replace(",", "")) == pytest.approx(float(now.replace(",", "")), rel=0.25, abs=1), part
