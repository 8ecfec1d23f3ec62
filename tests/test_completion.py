"""Completion in shells: the scripts that the command prints and installs, asked as the shells ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHELLS = ("bash", "zsh", "fish")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a command ``quantkit`` in ``bin``."""
    folder = tmp_path_factory.mktemp("home")
    command = folder / "bin" / "quantkit"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom quantkit.cli import main\n\nmain()\n")
    command.chmod(0o755)
    return folder


def told(home: Path, script: str, **variables: str) -> str:
    """What a script of bash prints in a home."""
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("_")}
    environment = {**inherited, "HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, cwd=home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_is_given_a_script_that_it_can_read(home: Path, shell: str) -> None:
    script = told(home, "quantkit", _QUANTKIT_COMPLETE=f"source_{shell}")
    assert f"_QUANTKIT_COMPLETE=complete_{shell}" in script
    if shutil.which(shell):
        (home / shell).write_text(script)
        subprocess.run([shell, "-n", str(home / shell)], check=True)


def test_bash_completes_commands_and_options(home: Path) -> None:
    asked = 'eval "$(_QUANTKIT_COMPLETE=source_bash quantkit)"; _quantkit_completion quantkit; echo "${COMPREPLY[@]}"'
    assert told(home, f"COMP_WORDS=(quantkit quantiz); COMP_CWORD=1; {asked}").split() == ["quantize"]
    options = told(home, f"COMP_WORDS=(quantkit quantize --f); COMP_CWORD=2; {asked}").split()
    assert "--format" in options
    named = told(home, f"COMP_WORDS=(quantkit quantize --format g); COMP_CWORD=3; {asked}").split()
    assert {"gptq", "gguf"} <= set(named)
    assert all(name.startswith("g") for name in named)
    chained = told(home, f"COMP_WORDS=(quantkit quantize --method awq+); COMP_CWORD=3; {asked}").split()
    assert {"awq+gptq", "awq+tune"} <= set(chained)
    assert "awq+awq" not in chained, "awq brings the transform itself"
    assert told(home, f"COMP_WORDS=(quantkit quantize --method none+); COMP_CWORD=3; {asked}").split() == []
    assert "llama.cpp" in told(home, f"COMP_WORDS=(quantkit verify --runtime ll); COMP_CWORD=3; {asked}")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_commands_with_their_help(home: Path, shell: str) -> None:
    asked = {"_TYPER_COMPLETE_ARGS": "quantkit quantiz", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    answer = told(home, "quantkit", _QUANTKIT_COMPLETE=f"complete_{shell}", **asked)
    assert "quantize" in answer
    assert "Quantize a model" in answer


def test_the_shell_at_hand_is_found_and_set_up(home: Path) -> None:
    assert "complete -o default -F _quantkit_completion quantkit" in told(home, "quantkit --show-completion; true")
    assert "bash completion installed" in told(home, "quantkit --install-completion; true")
    assert ".bash_completions/quantkit.sh" in (home / ".bashrc").read_text()
    assert "_QUANTKIT_COMPLETE" in (home / ".bash_completions" / "quantkit.sh").read_text()


def test_a_stranger_is_not_told_while_a_shell_asks(home: Path) -> None:
    folder = home / "other" / "llm_quantkit-0.29.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-quantkit\nVersion: 0.29\n")
    (folder / "entry_points.txt").write_text("[console_scripts]\nquantkit = quantkit.cli:main\n")
    path = f"{ROOT}:{folder.parent}"
    assert "warning" in told(home, "quantkit --version 2>&1", PYTHONPATH=path)
    asked = {"_QUANTKIT_COMPLETE": "complete_bash", "COMP_WORDS": "quantkit quantiz", "COMP_CWORD": "1"}
    assert told(home, "quantkit 2>&1", PYTHONPATH=path, **asked).split() == ["quantize"]
