"""Killed at random moments, a command ends with the bytes of one left alone; ``make kill-test`` has 50 rounds."""

from __future__ import annotations

import subprocess
import sys

import pytest


def killed(rounds: int, seed: int, *cases: str) -> str:
    """The last line of what it says, without the number of kills."""
    command = [sys.executable, "-m", "tests.kill_run", "--rounds", str(rounds), "--seed", str(seed)]
    for case in cases:
        command += ["--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()[-1]
    kills = int(said.partition(" rounds with ")[2].partition(" ")[0])
    assert kills >= rounds, done.stdout
    return said.replace(f"with {kills} kills", "with kills")


def test_a_killed_quantization_goes_on_to_the_same_bytes() -> None:
    said = killed(3, 11, "gptq", "sweep")
    assert said == "3 rounds with kills, 3 of them bit-identical, 0 processes lived on"


def test_a_killed_run_goes_on_to_the_same_bytes_and_figures() -> None:
    assert killed(1, 3, "run") == "1 rounds with kills, 1 of them bit-identical, 0 processes lived on"


@pytest.mark.slow
def test_fifty_kills() -> None:
    assert killed(50, 0) == "50 rounds with kills, 50 of them bit-identical, 0 processes lived on"
