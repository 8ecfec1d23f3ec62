"""What it costs to measure the choices of a mix, beside a walk and beside a forward pass over the same tokens.

Measured are the Fisher moments with the walk in which each choice is a task, the walk of a variant of one scheme, as it
is by default and on the float model's activations, and one forward pass in the walk's precision, without the head.
Seconds are the processor's, of all threads. The last line is JSON.

    python benchmarks/mix_cost.py --model FOLDER --records alpaca.json --choices int2 int3 int4 int6 int8
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scoring import machine, read_calibration
from transformers import AutoModelForCausalLM

from quantkit.allocation.measuring import measured
from quantkit.allocation.units import CheckpointModel, units_of
from quantkit.engine.precision import pass_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.quantization import Job, Quantized, Wanted, quantize_together
from quantkit.recipe import VariantSpec
from quantkit.recipe.mixing import AutoSpec

ROWS_AT_ONCE = 4


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of the processor that something takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(job: Job, choices: list[str], group_size: int, out: Path) -> None:
    """The costs of choices, as a run measures them."""
    given = {"name": "mix", "bits": "auto", "group_size": group_size, "choices": choices, "budget": 4.5}
    spec = AutoSpec.model_validate(given)
    units = units_of(CheckpointModel(job, Skeleton(job.source)), spec)
    measured(job, spec, units, out, on_segment=lambda _done, _total: None, on_note=print)


def walk(job: Job, group_size: int, out: Path) -> None:
    """A variant of 4 bits."""
    spec = VariantSpec.model_validate({"name": "int4", "method": "gptq", "bits": 4, "group_size": group_size})
    (outcome,) = quantize_together(job, [Wanted(spec, out)])
    if not isinstance(outcome, Quantized):
        raise outcome


@torch.inference_mode()
def forward(job: Job) -> None:
    """One pass of the blocks, in the precision of the walk."""
    dtype = pass_dtype(torch.device("cpu"), torch.float32)
    blocks = AutoModelForCausalLM.from_pretrained(job.source, dtype=dtype).eval().model
    rows = sorted(job.rows, key=len)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = [torch.as_tensor(row) for row in rows[start : start + ROWS_AT_ONCE]]
        blocks(torch.nn.utils.rnn.pad_sequence(batch, batch_first=True), use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint folder")
    parser.add_argument("--records", type=Path, required=True, help="alpaca records")
    parser.add_argument("--samples", type=int, default=256, help="of which so many calibrate, in rows of 512 tokens")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--choices", nargs="+", default=["int2", "int3", "int4", "int6", "int8"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        job = read_calibration(given, work)
        took = {
            "measuring": seconds(lambda: measure(job, given.choices, given.group_size, work / "costs")),
            "walk": seconds(lambda: walk(job, given.group_size, work / "int4")),
            "float_walk": seconds(lambda: walk(replace(job, inputs="float"), given.group_size, work / "int4-float")),
            "forward": seconds(lambda: forward(job)),
        }
    passes = (took["measuring"] - took["walk"]) / took["forward"]
    for name, value in took.items():
        print(f"{name:10} {value:7.1f} s")
    print(f"measuring is a walk and {passes:.1f} forward passes more, with {len(given.choices)} choices")
    tokens = sum(map(len, job.rows))
    print(json.dumps({**took, "passes_more": passes, "tokens": tokens, "choices": given.choices, **machine()}))


if __name__ == "__main__":
    main()
