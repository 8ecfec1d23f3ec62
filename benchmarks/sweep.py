"""What a sweep of eight variants costs beside gptq alone: both walk over the same float model and the same tokens.

The walk is timed without export, evaluation and reading the calibration set. Runs alternate, and the ratio of each
pair is printed; the last line is JSON.

    python benchmarks/sweep.py --model FOLDER --records alpaca.json --pairs 3
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from scoring import machine, read_calibration

from quantkit.quantization import Job, Quantized, Wanted, quantize_together
from quantkit.recipe import VariantSpec

EIGHT: list[dict[str, Any]] = [
    {"name": "rtn-int4", "method": "rtn"},
    {"name": "gptq-int4", "method": "gptq"},
    {"name": "awq-int4", "method": "awq"},
    {"name": "awq-gptq-int4", "method": "awq+gptq"},
    {"name": "hqq-int4", "method": "hqq", "symmetric": False},
    {"name": "gptq-int8", "method": "gptq", "bits": 8},
    {"name": "rtn-int8", "method": "rtn", "bits": 8},
    {"name": "nf4", "method": "rtn", "scheme": "nf4", "format": "bitsandbytes"},
]


def walked(job: Job, variants: list[dict[str, Any]], out: Path) -> tuple[float, float, dict[str, float]]:
    """Seconds of the walk, of everything with export, and each variant's own part of the walk and its export."""
    wanted = [Wanted(VariantSpec.model_validate(each), out / each["name"]) for each in variants]
    started, finished = time.perf_counter(), []
    outcomes = quantize_together(job, wanted, on_segment=lambda _done, _total: finished.append(time.perf_counter()))
    whole = time.perf_counter() - started
    own = {}
    for each, outcome in zip(variants, outcomes, strict=True):
        if not isinstance(outcome, Quantized):
            raise outcome
        own[each["name"]] = outcome.facts["seconds_own"]
    return finished[-1] - started, whole, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint folder")
    parser.add_argument("--records", type=Path, required=True, help="alpaca records; the first 128 calibrate")
    parser.add_argument("--pairs", type=int, default=1)
    given = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        job = read_calibration(given, Path(scratch), inputs="float")
        for pair in range(given.pairs):
            alone, alone_whole, _ = walked(job, [EIGHT[1]], Path(scratch) / f"alone-{pair}")
            sweep, sweep_whole, own = walked(job, EIGHT, Path(scratch) / f"sweep-{pair}")
            pairs.append({"gptq": alone, "sweep": sweep, "ratio": sweep / alone, "exported": sweep_whole / alone_whole})
            print(f"pair {pair}: gptq alone {alone:.1f} s, sweep {sweep:.1f} s, ratio {sweep / alone:.2f}", flush=True)
    for name, seconds in own.items():
        print(f"{name:15} {seconds:6.1f} s of its own, with export")
    print(json.dumps({"pairs": pairs, "own": own, "tokens": sum(map(len, job.rows)), **machine()}))


if __name__ == "__main__":
    main()
