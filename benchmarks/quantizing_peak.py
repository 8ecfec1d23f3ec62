"""Peak memory of a quantizing run beside its estimate, over depths and calibration sizes: each run in a fresh process.

    python benchmarks/quantizing_peak.py [METHOD ...]

The peak is what the resident set grows by from after the imports on, reset before the run (Linux). It prints a table
in Markdown and one line of JSON. Without a name all methods of :data:`METHODS` are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

DEPTHS = (2, 4)
ROWS = (32, 64, 128)
LENGTH = 256
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has glibc return what is freed, so that the peak is that of what is alive; by default it keeps pieces to 32 MiB."""
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "group_size": 64},
    "rtn, weighted": {"method": "rtn", "group_size": 64, "range": "weighted"},
    "rtn, nf4": {"method": "rtn", "scheme": "nf4", "format": "bitsandbytes"},
    "hqq": {"method": "hqq", "group_size": 64, "symmetric": False},
    "llama.cpp": {"method": "llama.cpp", "group_size": 32},
    "gptq": {"method": "gptq", "group_size": 64},
    "awq": {"method": "awq", "group_size": 64, "symmetric": False},
    "awq+gptq": {"method": "awq+gptq", "group_size": 64},
}
HEAD = "| method | blocks | tokens | estimated | measured | estimated / measured |\n|---|---:|---:|---:|---:|---:|"
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
}


SMALL = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}


def model_of(folder: Path, depth: int, shape: dict[str, Any] = SHAPE) -> Path:
    """A random Llama."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=depth)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def status(key: str) -> int:
    """A figure of this process in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


def measure(folder: Path, rows: int, out: Path, keys: dict[str, Any]) -> dict[str, int]:
    """Quantize in this process and tell its peak beside the estimate."""
    import torch

    from quantkit.engine.precision import pass_dtype
    from quantkit.estimation import estimate
    from quantkit.recipe import VariantSpec
    from quantkit.system.validation import parse_section

    inputs = keys.pop("inputs", "quantized")
    variant = parse_section(VariantSpec, {"name": "v", **keys}, "benchmark")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, SHAPE["vocab_size"], (rows, LENGTH), generator=draw).tolist()
    computing = pass_dtype(torch.device("cpu"), torch.bfloat16)
    use = {"calibration_tokens": rows * LENGTH, "inputs": inputs, "pass_dtype": str(computing)[6:], "device": "cpu"}
    found = estimate(str(folder), **use, **keys)
    _quantize(model_of(out.parent / "small", 1, SMALL), tokens[:1], out.parent / "warm", inputs, variant)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _quantize(folder, tokens, out, inputs, variant)
    return {"measured": status("VmHWM") - before, "estimated": found.part("quantizing").nbytes}


def _quantize(folder: Path, tokens: list[list[int]], out: Path, inputs: Any, variant: Any) -> None:
    """A run; the first one, of a small model, loads what the packages load when they are used."""
    from quantkit.quantization import Job, quantize

    quantize(Job(folder, {}, "bfloat16", tokens, "x", inputs=inputs, device="cpu"), variant, out)


def measured(folder: Path, rows: int, keys: dict[str, Any]) -> dict[str, int]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--child", str(folder), str(rows), scratch, json.dumps(keys)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVES_BACK)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(
    names: Sequence[str], depths: tuple[int, ...] = DEPTHS, rows: tuple[int, ...] = ROWS
) -> list[dict[str, int | str]]:
    """Every method and depth with every number of rows."""
    found: list[dict[str, int | str]] = []
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {depth: model_of(Path(scratch) / f"depth{depth}", depth) for depth in depths}
        for name, depth, count in product(names, depths, rows):
            figures = measured(folders[depth], count, METHODS[name])
            found.append({"method": name, "blocks": depth, "tokens": count * LENGTH, **figures})
            ratio = figures["estimated"] / figures["measured"]
            sizes = " | ".join(f"{figures[key] / 2**20:,.1f} MiB" for key in ("estimated", "measured"))
            print(f"| {name} | {depth} | {count * LENGTH:,} | {sizes} | {ratio:.3f} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--child", nargs=4)
    given = parser.parse_args()
    if given.child:
        folder, rows, out, keys = given.child
        print(json.dumps(measure(Path(folder), int(rows), Path(out) / "out", json.loads(keys))))
        return
    print(json.dumps(table(given.methods or list(METHODS))))


if __name__ == "__main__":
    main()
