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
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Walked:
    """Seconds of a walk, its ``processor`` seconds, and of everything with export; and by variant its ``own`` part."""

    seconds: float
    processor: float
    exported: float
    own: dict[str, float]


def walked(job: Job, variants: list[dict[str, Any]], out: Path) -> Walked:
    """One walk."""
    wanted = [Wanted(VariantSpec.model_validate(each), out / each["name"]) for each in variants]
    started, finished = _clocks(), [_clocks()]
    outcomes = quantize_together(job, wanted, on_segment=lambda _done, _total: finished.append(_clocks()))
    whole = time.perf_counter() - started[0]
    own = {}
    for each, outcome in zip(variants, outcomes, strict=True):
        if not isinstance(outcome, Quantized):
            raise outcome
        own[each["name"]] = outcome.facts["seconds_own"]
    return Walked(finished[-1][0] - started[0], finished[-1][1] - started[1], whole, own)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint folder")
    parser.add_argument("--records", type=Path, required=True, help="alpaca records; the first of them calibrate")
    parser.add_argument("--samples", type=int, default=128, help="how many of the records calibrate")
    parser.add_argument("--pairs", type=int, default=1)
    given = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as scratch:
        job = read_calibration(given, Path(scratch), inputs="float")
        for pair in range(given.pairs):
            alone = walked(job, [EIGHT[1]], Path(scratch) / f"alone-{pair}")
            sweep = walked(job, EIGHT, Path(scratch) / f"sweep-{pair}")
            ratio, used = sweep.seconds / alone.seconds, sweep.processor / alone.processor
            exported = sweep.exported / alone.exported
            found = {"gptq": alone.seconds, "sweep": sweep.seconds, "ratio": ratio, "processor": used}
            pairs.append({**found, "exported": exported})
            print(
                f"pair {pair}: gptq alone {alone.seconds:.1f} s, sweep {sweep.seconds:.1f} s, ratio {ratio:.2f};"
                f" of processor seconds {used:.2f}",
                flush=True,
            )
    for name, seconds in sweep.own.items():
        print(f"{name:15} {seconds:6.1f} s of its own, with export")
    print(json.dumps({"pairs": pairs, "own": sweep.own, "tokens": sum(map(len, job.rows)), **machine()}))


if __name__ == "__main__":
    main()
