"""Several quantkit processes at once on the processors of one: what threads that wait for each other cost.

Every round runs `quantkit quantize` alone, then so many at once, under each of the settings to be compared. A setting
is variables of the environment: none is what a user has, and that quantkit decides; those of OpenMP and quantkit that
are set here are left out. Processors that are shared fairly, without waste, give a ratio as large as the number of
processes, or less where one alone leaves some idle. Processor seconds tell what was wasted on a busy machine too, on
which seconds tell little: alone and side by side they should be the same for each process.

The last line is JSON; it also says whether all checkpoints have the same bytes.

    python benchmarks/side_by_side.py --model FOLDER --records alpaca.json --rounds 3 \\
        --setting "" --setting "OMP_WAIT_POLICY=ACTIVE" --setting "OMP_NUM_THREADS=1"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LEFT_OUT = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
"""Prefixes of variables that no run has, unless its setting says so."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one process took.

    Attributes:
        seconds: from its start to its end.
        processor: seconds of all its threads and children, in user and system mode.
        yielded: how often a thread gave a processor up, to wait.
        taken: how often a processor was taken from a thread that had work, or that was spinning.
        digest: of the checkpoint's tensors.
    """

    seconds: float
    processor: float
    yielded: int
    taken: int
    digest: str


def environment(setting: str) -> dict[str, str]:
    """The variables of a run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    return kept | dict(each.split("=", 1) for each in shlex.split(setting))


def runs(command: list[str], folder: Path, variables: dict[str, str], processes: int) -> list[Run]:
    """Run a command so many times at once, each with an output of its own."""
    started, begun = {}, {}
    for number in range(processes):
        out = folder / str(number)
        with (folder / f"{number}.log").open("wb") as log:
            child = subprocess.Popen([*command, "--out", str(out)], env=variables, stdout=log, stderr=log)
        started[child.pid], begun[child.pid] = out, time.perf_counter()
    found = []
    while started:
        pid, status, used = os.wait4(-1, 0)
        out = started.pop(pid)
        if status:
            sys.exit(out.with_suffix(".log").read_text(encoding="utf-8", errors="replace"))
        digest = hashlib.sha256()
        for shard in sorted(out.glob("*.safetensors")):
            digest.update(shard.read_bytes())
        seconds, processor = time.perf_counter() - begun[pid], used.ru_utime + used.ru_stime
        found.append(Run(seconds, processor, used.ru_nvcsw, used.ru_nivcsw, digest.hexdigest()))
    return found


def told(name: str, runs: list[Run]) -> str:
    """The means over processes, as a line."""
    seconds, processor, yielded, taken = (
        statistics.mean(getattr(run, key) for run in runs) for key in ("seconds", "processor", "yielded", "taken")
    )
    return f"{name:14} {seconds:7.1f} s {processor:7.1f} s of processor, yielded {yielded:.0f}, taken {taken:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="float checkpoint folder")
    parser.add_argument("--records", required=True, help="alpaca records; the first of them calibrate")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--processes", type=int, default=2, help="that run at once")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--setting", action="append", help="variables as 'NAME=VALUE NAME=VALUE'; repeatable")
    given = parser.parse_args()
    command = [sys.executable, "-m", "quantkit", "quantize", given.model, "--calibration", given.records]
    command += ["--samples", str(given.samples), "--max-length", str(given.max_length), "--method", given.method]
    command += ["--group-size", "64"]
    settings, digests = given.setting or [""], set()
    ratios: dict[str, list[float]] = {setting: [] for setting in settings}
    record = []
    for number in range(given.rounds):
        for setting in settings:
            print(f"round {number + 1}, {setting or 'as it is'}", flush=True)
            both = []
            for processes in (1, given.processes):
                with tempfile.TemporaryDirectory() as scratch:
                    both.append(runs(command, Path(scratch), environment(setting), processes))
                print(told("alone" if processes == 1 else "side by side", both[-1]), flush=True)
            last = max(run.seconds for run in both[1])
            ratios[setting].append(last / both[0][0].seconds)
            print(f"{'ratio':14} {ratios[setting][-1]:7.2f}", flush=True)
            digests |= {run.digest for each in both for run in each}
            record.append({"setting": setting, "runs": [[asdict(run) for run in each] for each in both]})
    median = {setting: statistics.median(of) for setting, of in ratios.items()}
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"processes": given.processes, "processors": processors, "same_bytes": len(digests) == 1}
    print(json.dumps({"ratio": median, **facts, "rounds": record}))


if __name__ == "__main__":
    main()
