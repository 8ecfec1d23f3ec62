"""Kill a command at random moments, let the same command go on, and compare bytes with an undisturbed run.

``python -m tests.kill_run --rounds 50`` prints what was killed where, and ends with 1 if a byte differs. A round is one
output, killed once or several times until an attempt comes to its end. Each attempt is a process of its own, forked
from one that has imported everything, so that a kill costs a second. Half of the moments are drawn among the accesses
to files below the work folder, at which the process kills itself, so that every gap between two of them is hit in time;
the others are delays after which it is killed from outside.

Three cases quantize. The fourth is a whole run of a recipe, with the processes that score: of these none may live on,
and its figures must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from quantkit.cli import main as quantkit_main
from quantkit.cli.display import Display
from quantkit.pipeline.single import quantize_one
from quantkit.quantization import Job, Wanted, quantize_together
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import file_sha256, read_json
from tests.runs import hidden_names
from tests.tiny import make_model, tiny_rows

BLOCKS = 4
IMPORTED = (Display, quantize_one)
"""What the command imports when it runs: here it is there before the first fork."""
TOUCHING = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
"""Audit events of the interpreter that change or read files."""
TIMES = ("seconds", "seconds_own", "seconds_shared", "walk_variants", "resumed")
FIGURES = ("metrics", "texts", "size_bytes")
"""What of the result of scoring follows from its input; the rest is speed and memory."""
NO_RESULTS = ("logs/", "report.", "divergence.svg")
"""Files of a run that tell of times, or show what others hold."""
ORPHANS_END = 30.0
"""Seconds that a process may take to see that whoever started it is gone."""
SWEEP: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 32},
    "awq-gptq": {"method": "awq+gptq", "group_size": 32},
    "hqq": {"method": "hqq", "group_size": 32, "symmetric": False},
    "rtn": {"method": "rtn", "group_size": 32},
}


@dataclass(frozen=True)
class Case:
    """What is killed: a command that writes below a folder."""

    name: str
    work: Callable[[Path], object]
    share: int = 1
    """Of the rounds."""


@dataclass
class Outcome:
    """What became of the kills of a case."""

    kills: int = 0
    rounds: int = 0
    differing: int = 0
    orphans: int = 0


def cases(root: Path) -> list[Case]:
    """A method with quantized inputs, one that scales inputs, and a sweep with float inputs."""
    model = make_model(root / "model", "qwen2", num_hidden_layers=BLOCKS)
    records = root / "records.jsonl"
    texts = [f"The tide of day {number} comes in at {number % 12} and goes out again. " * 3 for number in range(12)]
    records.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

    def quantize(method: str) -> Callable[[Path], object]:
        def work(folder: Path) -> None:
            calibration = ["--calibration", str(records), "--samples", "8", "--max-length", "48"]
            given = ["quantize", str(model), "-o", str(folder / "out"), "--method", method, "--group-size", "32"]
            sys.argv = ["quantkit", *given, *calibration]
            quantkit_main()

        return work

    def sweep(folder: Path) -> None:
        job = Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, "float", "cpu")
        variants = [VariantSpec.model_validate({"name": name, **keys}) for name, keys in SWEEP.items()]
        found = quantize_together(job, [Wanted(variant, folder / variant.name) for variant in variants])
        for each in found:
            if isinstance(each, Exception):
                raise each

    def run(folder: Path) -> None:
        recipe = root / "recipe.json"
        text = root / "text.txt"
        text.write_text(texts[0] * 8, encoding="utf-8")
        content = {
            "name": "kill",
            "model": {"source": str(model)},
            "calibration": {"dataset": str(records), "samples": 8, "max_length": 48},
            "variants": [{"name": name, **SWEEP[name]} for name in ("gptq", "rtn")],
            "evaluation": {"context_length": 32, "texts": [{"name": "tide", "file": str(text)}]},
            "report": {"folder": str(folder), "formats": ["json", "md"]},
            "history": {"file": str(root / "history.sqlite")},
        }
        recipe.write_text(json.dumps(content), encoding="utf-8")
        sys.argv = ["quantkit", "run", str(recipe)]
        quantkit_main()

    return [
        Case("gptq", quantize("gptq"), 3),
        Case("awq+gptq", quantize("awq+gptq"), 3),
        Case("sweep", sweep, 3),
        Case("run", run),
    ]


def say(text: str) -> None:
    """A line of the protocol."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def fork(case: Case, folder: Path, at: int | None = None, log: Path | None = None) -> int:
    """Begin an attempt in a process of its own, which kills itself at an access to a file; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        quiet = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        tempfile.tempdir = str(folder.with_name("scratch"))  # by which the processes that it starts are found
        sys.addaudithook(_Counter(str(folder), at, folder.with_name("accesses")))
        case.work(folder)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # whatever it is, the child tells it and ends here
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


class _Counter:
    """Counts accesses to files below a folder; kills the process at one, or says at the end how many there were."""

    def __init__(self, folder: str, at: int | None, told: Path) -> None:
        self._folder, self._at, self._told, self._count = folder, at, told, 0
        self._file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in TOUCHING or not str(args[0]).startswith(self._folder):
            return
        if self._count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._count += 1
        os.pwrite(self._file, str(self._count).encode(), 0)


def digests(folder: Path) -> dict[str, Any]:
    """Every file below; of those that tell times, what does not."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(NO_RESULTS):
            continue
        if path.name == "result.json":
            found[name] = {key: value for key, value in read_json(path).items() if key in FIGURES}
        elif path.name == "stage.json":
            content = read_json(path)
            kept = {key: value for key, value in content.get("facts", {}).items() if key not in TIMES}
            kept["notes"] = [
                note for note in kept.get("notes", []) if "went on after" not in note and "afresh" not in note
            ]
            found[name] = {**content, "facts": kept}
        else:
            found[name] = file_sha256(path)
    return found


def kill_case(case: Case, root: Path, rounds: int, draw: random.Random) -> Outcome:
    """Kill a case in so many rounds, and compare at the end of each."""
    whole, folder, log = root / case.name / "whole", root / case.name / "work", root / case.name / "log"
    for each in (whole, folder, folder.with_name("scratch")):
        each.mkdir(parents=True)
    started = time.monotonic()
    _expect_end(fork(case, folder, log=log), log)
    longest = time.monotonic() - started
    accesses = int(folder.with_name("accesses").read_text())
    folder.rename(whole)
    expected = digests(whole)
    say(f"{case.name}: undisturbed {longest:.2f} s, {accesses} accesses to {len(expected)} files")
    outcome = Outcome()
    folder.mkdir()
    while outcome.rounds < rounds:
        kills = 0
        while not _attempt(case, folder, log, draw, longest, accesses):
            kills += 1
            outcome.orphans += _orphans(folder)
        outcome.kills += kills
        if kills:
            _compare(case, folder, expected, outcome)
        shutil.rmtree(folder)
        folder.mkdir()
    return outcome


def _orphans(folder: Path) -> int:
    """How many processes of a case live on after their parent was killed."""
    place = str(folder.parent)
    deadline = time.monotonic() + ORPHANS_END
    while True:
        alive = [each for each in psutil.process_iter() if any(place in word for word in _words(each))]
        if not alive or time.monotonic() > deadline:
            for each in alive:
                say(f"{each.pid} lives on: {' '.join(_words(each))}")
                each.kill()
            return len(alive)
        time.sleep(0.05)


def _words(process: psutil.Process) -> list[str]:
    """The command line of a living process; a forked one has that of this process, which names no folder."""
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


def _attempt(case: Case, folder: Path, log: Path, draw: random.Random, longest: float, accesses: int) -> bool:
    """One attempt with a kill somewhere; whether it ended before."""
    if draw.random() < 0.5:
        at = draw.randrange(accesses)
        child, moment = fork(case, folder, at, log), f"at access {at}"
    else:
        delay = draw.uniform(0, longest)
        child, moment = fork(case, folder, log=log), f"after {delay:.2f} s"
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        segments = sum(path.name == "segment.json" for path in folder.rglob("segment.json"))
        say(f"{case.name}: killed {moment}, with {segments} segments saved")
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{case.name} failed:\n{log.read_text()}")
    return True


def _expect_end(child: int, log: Path) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"an attempt that nobody disturbed ended with {status}:\n{log.read_text()}")


def _compare(case: Case, folder: Path, expected: dict[str, Any], outcome: Outcome) -> None:
    """Compare a finished round with the undisturbed one."""
    found = digests(folder)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    wrong += [f"{name} stayed behind" for name in hidden_names(folder)]
    outcome.rounds += 1
    outcome.differing += bool(wrong)
    say(f"{case.name}: round {outcome.rounds}: {', '.join(wrong) if wrong else 'the same bytes'}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Kill commands at random moments and compare bytes.")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", help="gptq, awq+gptq, sweep or run; all by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantkit-kill-") as name:
        chosen = [case for case in cases(Path(name)) if not given.case or case.name in given.case]
        places = [case for case in chosen for _ in range(case.share)]
        draw = random.Random(given.seed)
        found = [
            kill_case(case, Path(name), sum(places[turn % len(places)] is case for turn in range(given.rounds)), draw)
            for case in chosen
        ]
    kills, rounds, wrong, orphans = (
        sum(getattr(each, key) for each in found) for key in ("kills", "rounds", "differing", "orphans")
    )
    say(f"{rounds} rounds with {kills} kills, {rounds - wrong} of them bit-identical, {orphans} processes lived on")
    return 1 if wrong or orphans else 0


if __name__ == "__main__":
    sys.exit(main())
