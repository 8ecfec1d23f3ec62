"""What holds on the device: the tests that are marked for it, and the same bytes on two runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_proof.found import TINY, Found
from gpu_proof.work import digest, job_of, random_llama, random_rows, run

ROOT = Path(__file__).resolve().parents[2]
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq", "symmetric": False},
    "hqq": {"method": "hqq", "symmetric": False},
    "awq+gptq": {"method": "awq+gptq"},
    "gptq+tune": {"method": "gptq", "tune": {"steps": 8, "batch_tokens": 256}},
}
"""Quantkit's own methods, in groups of 64."""
OUTCOME = re.compile(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)")
REASON = re.compile(r"(?:FAILED|ERROR) (tests/\S+::.+?) - (.*)")


def tests(found: Found) -> None:
    """The tests that are marked ``gpu``; where there is no CUDA they skip themselves."""
    if importlib.util.find_spec("pytest") is None:
        found.say("pytest is not installed: pip install -e '.[test]'; the tests were not run")
        return
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", "--color=no"]
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    with subprocess.Popen(
        [*command, *map(str, files)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            if match := OUTCOME.match(line):
                outcomes[match[1]] = match[2].lower()
                _tell_tests(found, outcomes, reasons)
            elif match := REASON.match(line):
                reasons[match[1]] = match[2]
    _tell_tests(found, outcomes, reasons)
    if child.returncode not in (0, 1):  # 1 is that some failed
        found.say(f"pytest ended with {child.returncode}", failed=True)


def _tell_tests(found: Found, outcomes: Mapping[str, str], reasons: Mapping[str, str]) -> None:
    """What came out so far, in the place of what was said before."""
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "error", "skipped")}
    bad = [name for name, outcome in outcomes.items() if outcome in ("failed", "error")]
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    found.lines = [f"{name}: {reasons.get(name, 'see the log')}" for name in bad]
    found.lines.insert(0, f"{told or 'none ran'} on {found.device}")
    found.figures = {"counts": counts, "failures": {name: reasons.get(name, "") for name in bad}}
    found.failed = bool(bad)
    found.keep()


def equal_bytes(found: Found) -> None:
    """Whether two runs of every own method write the same bytes."""
    folder = random_llama(found.work / "tiny", "cpu", **TINY)
    job = job_of(folder, random_rows(TINY["vocab_size"], 16, 64), found.device)
    equal: dict[str, bool | None] = {}
    for name, keys in METHODS.items():
        try:
            spec = {"name": "v", "bits": 4, "group_size": 64, **keys}
            digests = [digest(run(job, spec, found.work / f"bytes-{name}-{turn}").done.folder) for turn in range(2)]
        except Exception as error:  # the other methods are still to be looked at; the log has the trace
            traceback.print_exc()
            equal[name] = None
            found.say(f"{name}: {type(error).__name__}: {error}", {"equal": equal}, failed=True)
            continue
        equal[name] = digests[0] == digests[1]
        said = "the same bytes" if equal[name] else "OTHER bytes the second time"
        found.say(f"{name}: {said} on {found.device}", {"equal": equal}, failed=not equal[name])
