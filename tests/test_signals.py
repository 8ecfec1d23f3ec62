"""Signals: what is saved, what is said, and with which status a command ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from quantkit.system.artifacts import file_sha256, read_json
from tests.commands import go_to, quantize_arguments, read_line, run_command, stepping
from tests.runs import hidden_names

BLOCKS = 2


def segments(out: Path) -> list[str]:
    layers = out.parent / f".{out.name}.layers"
    return sorted(path.name for path in layers.iterdir() if path.is_dir()) if layers.exists() else []


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_request_to_terminate_finishes_the_block_and_saves_it(
    model: Path, records: Path, tmp_path: Path, method: str
) -> None:
    arguments = quantize_arguments(model, records, tmp_path / "out", "--method", method)
    with stepping("_solve_own", *arguments) as child:
        go_to(child, 2)
        assert segments(tmp_path / "out") == []
        os.kill(child.pid, signal.SIGTERM)
        _, said = child.communicate("all\n", timeout=120)
    assert child.returncode == 143, said
    assert "asked to stop: the block under way is finished and saved first; ask again to stop at once" in said
    assert said.rstrip().endswith("stopped: what is finished is kept, the same command goes on from there")
    assert "Traceback" not in said
    assert segments(tmp_path / "out") == ["model.layers.0"]
    assert not (tmp_path / "out").exists()

    again = run_command(*arguments)
    assert again.returncode == 0, again.stderr
    assert f"went on after a run that ended early, with 1 of {BLOCKS} segments already solved" in again.stderr
    assert read_json(tmp_path / "out" / "stage.json")["facts"]["resumed"] == 1
    assert hidden_names(tmp_path) == []
    run_command(*quantize_arguments(model, records, tmp_path / "whole" / "out", "--method", method))
    for name in ("model.safetensors", "config.json", "manifest.json", "README.md"):
        assert file_sha256(tmp_path / "out" / name) == file_sha256(tmp_path / "whole" / "out" / name)


@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_stops_at_once(
    model: Path, records: Path, tmp_path: Path, second: signal.Signals, status: int
) -> None:
    with stepping("_solve_own", *quantize_arguments(model, records, tmp_path / "out", "--method", "rtn")) as child:
        go_to(child, 6)  # in the second block
        os.kill(child.pid, signal.SIGTERM)
        while "asked to stop" not in read_line(child):  # two that wait together would count as one
            assert child.poll() is None
        os.kill(child.pid, second)
        _, said = child.communicate(timeout=120)
    assert child.returncode == status, said
    assert "Traceback" not in said
    assert segments(tmp_path / "out") == ["model.layers.0"]


@pytest.mark.parametrize(("calls", "saved"), [(1, []), (6, ["model.layers.0"])])
def test_an_interrupt_stops_at_once_and_what_is_saved_stays(
    model: Path, records: Path, tmp_path: Path, calls: int, saved: list[str]
) -> None:
    with stepping("_solve_own", *quantize_arguments(model, records, tmp_path / "out", "--method", "rtn")) as child:
        go_to(child, calls)
        os.kill(child.pid, signal.SIGINT)
        _, said = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert said.rstrip().endswith("interrupted: what is finished is kept, the same command goes on from there")
    assert "Traceback" not in said
    assert segments(tmp_path / "out") == saved
    assert (tmp_path / ".out.layers").exists() == bool(saved)
    assert not (tmp_path / ".out.lock").exists()
