"""Killed at random moments, a quantization ends with the bytes of an undisturbed one; ``make kill-test`` kills 50."""

from __future__ import annotations

import subprocess
import sys

import pytest


def killed(kills: int, seed: int) -> str:
    command = [sys.executable, "-m", "tests.kill_run", "--kills", str(kills), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_a_killed_quantization_goes_on_to_the_same_bytes() -> None:
    said = killed(6, seed=11)
    rounds = said.removeprefix("6 kills, ").partition(" ")[0]
    assert said == f"6 kills, {rounds} rounds that came to their end, {rounds} of them bit-identical"
    assert int(rounds) >= 3


@pytest.mark.slow
def test_fifty_kills() -> None:
    assert killed(50, seed=0).startswith("50 kills, ")
