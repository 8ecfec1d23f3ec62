"""Peak memory of whole runs, scoring included, over the number of blocks; and a run with half of its model's memory.

    python benchmarks/run_peak.py [--blocks 12 24] [--width 768] [--method "rtn, weighted"] [--loader streamed]
    python benchmarks/run_peak.py --half --blocks 16 --width 2048 --method rtn

Random Llamas of a byte's vocabulary are quantized and scored by `quantkit run`. The peak of a process is its largest
resident set (``VmHWM``; Linux), that of a run the largest sum over its processes at a time of what each has to itself
and its share of what they have in common (``Pss``), such as libraries. With ``--half`` the loader
is ``auto``, and each process of the run may have half as many bytes of its own (``ulimit -d``, which counts what is no
file's) as the float model's file: that the run ends with its report is the result.
It prints a table in Markdown and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from quantkit.checkpoint import CheckpointReader
from tests.runs import write_records
from tests.tiny import make_model

EVERY = 0.2
"""Seconds between two looks at the processes."""
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "rtn, weighted": {"method": "rtn", "range": "weighted"},
    "gptq": {"method": "gptq"},
}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
"""Has glibc return what is freed, so that the peak is that of what is alive; by default it keeps pieces to 32 MiB."""


def recipe_of(folder: Path, model: Path, given: argparse.Namespace) -> Path:
    """A recipe of one variant."""
    content = {
        "name": "peak",
        "model": {"source": str(model)},
        "calibration": {"dataset": str(write_records(folder / "records.jsonl", 32)), "samples": 16, "max_length": 128},
        "variants": [{"name": "int4", "bits": 4, "group_size": 64, **METHODS[given.method]}],
        "evaluation": {
            "texts": ["prose"],
            "context_length": 128,
            "max_tokens": given.tokens,
            "metrics": ["perplexity", "kl_divergence", "top1_agreement"],
            "loader": "auto" if given.half else given.loader,
            "samples": False,
            "device": "cpu",
        },
        "quantization": {"device": "cpu"},
        "report": {"folder": str(folder / "run")},
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))
    return file


def watched(command: list[str], limit: int | None) -> dict[str, Any]:
    """``rc``, ``main``, ``scoring`` and ``together`` (bytes), ``processor`` (seconds) and ``log`` of a command."""

    def bound() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | GIVES_BACK, preexec_fn=bound
        )
        peaks: dict[int, int] = {}
        together = 0
        while process.poll() is None:
            now = [status(pid) for pid in (process.pid, *children(process.pid))]
            for pid, peak, _ in now:
                peaks[pid] = max(peaks.get(pid, 0), peak)
            together = max(together, sum(share for _, _, share in now))
            time.sleep(EVERY)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        log.seek(0)
        text = log.read()
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    others = [peak for pid, peak in peaks.items() if pid != process.pid]
    return {"rc": process.returncode, "main": peaks[process.pid], "scoring": max(others, default=0),
            "together": together, "processor": spent, "log": text}  # fmt: skip


def children(pid: int) -> list[int]:
    """All processes below one."""
    try:
        return [each.pid for each in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def status(pid: int) -> tuple[int, int, int]:
    """A process, its peak and its share of the memory now, in bytes; zero of one that is gone."""
    try:
        text = "".join(Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "smaps_rollup"))
    except OSError:
        return pid, 0, 0
    found = {key: int(size) * 1024 for key, size in re.findall(r"^(VmHWM|Pss):\s+(\d+) kB$", text, re.MULTILINE)}
    return pid, found.get("VmHWM", 0), found.get("Pss", 0)


def run(blocks: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run of a model of so many blocks."""
    width = given.width
    shape = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_attention_heads": width // 64,
             "num_key_value_heads": width // 64, "head_dim": 64}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="run-peak-", dir=given.folder) as scratch:
        folder = Path(scratch)
        dtype = torch.float32 if given.half else torch.bfloat16
        model = make_model(folder / "model", dtype=dtype, num_hidden_layers=blocks, shards=4, **shape)
        reader = CheckpointReader(model)
        weights = sum(reader.nbytes(name) // reader.dtype(name).itemsize for name in reader.names()) * 4
        recipe = recipe_of(folder, model, given)
        command = [sys.executable, "-m", "quantkit", "run", str(recipe)]
        found = watched(command, weights // 2 if given.half else None)
        report = folder / "run" / "report.json"
        if found["rc"] or not report.is_file():
            raise SystemExit(f"the run of {blocks} blocks failed ({found['rc']}):\n{found['log'][-3000:]}")
        content = json.loads(report.read_text())
    (row,) = content["variants"]
    loaded = [content["baseline"]["loaded_by"], row.get("loaded_by")]
    return {"blocks": blocks, "weights": weights, "loaded_by": loaded, "status": row["status"],
            **{key: value for key, value in found.items() if key not in ("log", "rc")}}  # fmt: skip


def main() -> None:
    """Run all depths."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", nargs="+", type=int, default=[12, 24])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--method", default="rtn, weighted", choices=METHODS)
    parser.add_argument("--loader", default="streamed")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--folder", help="where models and runs lie meanwhile")
    given = parser.parse_args()
    print("| blocks | float32 weights | loaded by | command | scoring process | together | processor |")
    print("|---:|---:|:--|---:|---:|---:|---:|", flush=True)
    found = []
    for blocks in given.blocks:
        found.append(run(blocks, given))
        last = found[-1]
        sizes = [f"{last[key] / 2**20:,.0f} MiB" for key in ("main", "scoring", "together")]
        by = ", ".join(dict.fromkeys(last["loaded_by"]))
        sizes.append(f"{last['processor']:.0f} s")
        print(f"| {blocks} | {last['weights'] / 2**20:,.0f} MiB | {by} | {' | '.join(sizes)} |", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
