"""Peak memory of what is done with a Gram matrix, in matrices of its size: each step in a fresh process (Linux).

The matrix itself counts as one. The layer that is solved has few rows, and takes next to nothing.

    python benchmarks/gram_peak.py [--columns 4096]

The peak is what the resident set grows by from before the matrix is made. It prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from quantizing_peak import GIVES_BACK, status

from quantkit.engine.batches import make_batches
from quantkit.engine.statistics import Gatherer
from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.schemes import IntScheme

ROWS = 16
WARM = 256


def summed(columns: int) -> InputStatistics:
    """The sums of an input put together."""
    gatherer = Gatherer({Statistic.GRAM})
    (batch,) = make_batches([[0] * ROWS], torch.device("cpu"), may_pad=False)
    gatherer.add(torch.randn(1, ROWS, columns, generator=torch.Generator().manual_seed(0)), batch)
    return gatherer.result()


def factorized(columns: int) -> None:
    """Damped and factorized, in the order of the inputs' strength."""
    summed(columns).curvature(0.03, True, torch.empty(0, columns))


def solved(columns: int, refinements: int = 0) -> None:
    """A narrow layer solved by GPTQ."""
    method = METHODS.get("gptq")
    options = method.Options.model_validate({"refinements": refinements})
    weight = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(0))
    method(options).quantize(weight, summed(columns), IntScheme(4, 64), torch.float16)


STEPS: dict[str, Callable[[int], object]] = {
    "summed": summed,
    "factorized": factorized,
    "solved": solved,
    "refined": lambda columns: solved(columns, 1),
}


def measured(step: str, columns: int) -> float:
    """The peak of a step in matrices, told by a process of its own."""
    command = [sys.executable, __file__, "--columns", str(columns), "--child", step]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVES_BACK)
    return float(done.stdout.splitlines()[-1])


def peak(step: str, columns: int) -> float:
    """The same in this process, which has done the step with a small matrix before."""
    torch.set_num_threads(1)
    STEPS[step](WARM)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    STEPS[step](columns)
    return (status("VmHWM") - before) / (4 * columns**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--child", choices=STEPS)
    given = parser.parse_args()
    if given.child:
        print(peak(given.child, given.columns))
        return
    found = {step: measured(step, given.columns) for step in STEPS}
    print(f"{given.columns:,} columns, {4 * given.columns**2 / 2**20:,.0f} MiB a matrix")
    for step, matrices in found.items():
        print(f"{step:<12}{matrices:>6.2f}")
    print(json.dumps({"benchmark": "gram_peak", "columns": given.columns, "matrices": found}))


if __name__ == "__main__":
    main()
