"""What solving experts together gains: seconds of GPTQ, one by one and in batches, and whether the codes agree.

Inputs are factorized beforehand. Random weights and the factors of random inputs, of shapes that mixtures have. The
last line is JSON.

    python benchmarks/experts_together.py --device cpu
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from scoring import machine

from quantkit.methods.base import InputStatistics
from quantkit.methods.gptq import Gptq, GptqOptions
from quantkit.schemes import IntScheme
from quantkit.system.devices import resolve_device, synchronize

SHAPES = ((16, 128, 576), (16, 576, 64), (64, 256, 512), (8, 512, 1024), (8, 1536, 2048), (8, 2048, 768))
"""Experts, rows and columns."""


def case(experts: int, rows: int, columns: int, device: torch.device) -> list[tuple[torch.Tensor, InputStatistics]]:
    """Weights, and inputs that share some directions."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(experts):
        inputs = torch.randn(2 * columns, columns, generator=draw) * torch.randn(columns, generator=draw).exp()
        gram = (inputs.T @ inputs / len(inputs)).to(device)
        found.append((torch.randn(rows, columns, generator=draw).to(device), InputStatistics(len(inputs), gram=gram)))
    return found


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the faster of two runs."""
    taken = []
    for _ in range(2):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], help="experts that are solved together")
    given = parser.parse_args()
    device, method, scheme = resolve_device(given.device), Gptq(GptqOptions()), IntScheme(4, 64, True)
    found = []
    for experts, rows, columns in SHAPES:
        inputs = case(experts, rows, columns, device)

        def one_by_one(inputs: list[tuple[torch.Tensor, InputStatistics]] = inputs) -> list[torch.Tensor]:
            solved = (method.quantize(weight, known, scheme, torch.float16) for weight, known in inputs)
            return [each.weight.codes for each in solved]

        alone, one = one_by_one(), seconds(one_by_one, device)
        for size in given.sizes:
            parts = [inputs[start : start + size] for start in range(0, experts, size)]

            def together(parts: list[list[tuple[torch.Tensor, InputStatistics]]] = parts) -> list[torch.Tensor]:
                solved = [method.quantize_alike(part, scheme, torch.float16) for part in parts]
                return [each.weight.codes for part in solved for each in part]

            same = all(torch.equal(a, b) for a, b in zip(alone, together(), strict=True))
            taken = seconds(together, device)
            shape = f"{experts} x [{rows}, {columns}]"
            print(f"{shape:20} {size:3} together: {one:.2f} s, {taken:.2f} s, {one / taken:.1f}x, same codes {same}")
            found.append({"shape": [experts, rows, columns], "together": size, "one": one, "all": taken, "same": same})
    print(json.dumps({"benchmark": "experts_together", "device": str(device), "cases": found, **machine()}))


if __name__ == "__main__":
    main()
