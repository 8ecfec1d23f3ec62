"""How fast codes are packed into words and unpacked: millions of weights a second, by the width of a code.

python benchmarks/packing.py [--device cpu] [--rows 4096] [--columns 4096]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch

from quantkit.schemes.bitstream import pack_bits, unpack_bits
from quantkit.system.devices import device_name, resolve_device, synchronize

REPETITIONS = 5


def rate(work: Callable[[], object], weights: int, device: torch.device) -> float:
    """Millions of weights a second, the best of some repetitions after one that does not count."""
    best = float("inf")
    for repetition in range(REPETITIONS + 1):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started) if repetition else best
    return weights / best / 1e6


def main() -> None:
    """Print a table for people and one line of JSON for machines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    given = parser.parse_args()
    device = resolve_device(given.device)
    print(f"{given.rows} x {given.columns} codes on {device_name(device)}, {torch.get_num_threads()} threads")
    print("bits  packed  unpacked   (millions of weights a second)")
    rows = []
    for bits in range(1, 9):
        codes = torch.randint(0, 1 << bits, (given.rows, given.columns), dtype=torch.uint8, device=device)
        words = pack_bits(codes, bits)
        packed = rate(partial(pack_bits, codes, bits), codes.numel(), device)
        unpacked = rate(partial(unpack_bits, words, bits, given.columns), codes.numel(), device)
        print(f"{bits:>4}  {packed:>6.0f}  {unpacked:>8.0f}")
        rows.append({"bits": bits, "packed": round(packed), "unpacked": round(unpacked)})
    print(json.dumps({"device": device_name(device), "millions_of_weights_per_second": rows}))


if __name__ == "__main__":
    main()
