"""HQQ of the same matrices: quantkit against the package hqq, weight errors, codes and time.

hqq lives in an environment of its own, named by --hqq-python. Both quantize random, heavy-tailed and real matrices with
float zero points in float32 on the CPU, for 1, 2, 3, 4 and 8 bits, both axes, and groups of 64 and 128 where they
divide. For each matrix the table gives hqq's error ``mean |w - w'|^0.7``, by what factor quantkit's is of it, the same
of the mean square error, the share of equal codes, and the seconds of both; the last line is JSON.

    python benchmarks/hqq_against_hqq.py --model FOLDER --hqq-python /path/to/other/venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import CheckpointReader
from quantkit.methods.base import InputStatistics
from quantkit.methods.hqq import Hqq, HqqOptions
from quantkit.schemes import IntScheme

AXES: tuple[Literal[0, 1], ...] = (0, 1)
LAYERS = ("q_proj.weight", "up_proj.weight", "down_proj.weight")
POWER = 0.7

OTHER = """
import json, sys, time
import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import load_file, save_file
threads, matrices, cases, out = sys.argv[1:]
torch.set_num_threads(int(threads))
matrices, found, seconds = load_file(matrices), {}, []
for index, (name, bits, axis, group_size) in enumerate(json.loads(cases)):
    started = time.perf_counter()
    codes, meta = Quantizer.quantize(matrices[name], nbits=bits, group_size=group_size, axis=axis, optimize=True,
                                     bitpack=False, compute_dtype=torch.float32, device="cpu")
    seconds.append(time.perf_counter() - started)
    decoded = ((codes - meta["zero"]) * meta["scale"]).reshape(meta["shape"])
    found |= {f"{index}.codes": codes.reshape(meta["shape"]).to(torch.uint8), f"{index}.decoded": decoded}
save_file(found, out)
print(json.dumps(seconds))
"""


def real_layers(model: Path) -> dict[str, torch.Tensor]:
    """A first, a middle and a last layer, one of each kind."""
    reader = CheckpointReader(model)
    kinds = [[name for name in reader.names() if name.endswith(kind)] for kind in LAYERS]
    chosen = [names[len(names) * place // 3] for place, names in enumerate(kinds) if names]
    return {name: reader.read(name).float().contiguous() for name in chosen}


def made_up() -> dict[str, torch.Tensor]:
    """Normal weights, small and large, and heavy-tailed ones."""
    torch.manual_seed(0)
    normal, tails = torch.randn(512, 1024), torch.distributions.StudentT(torch.tensor(3.0)).sample((512, 1024))
    return {"normal": normal * 0.02, "normal, large": normal, "student-t": tails * 0.02}


def cases_of(matrices: dict[str, torch.Tensor]) -> Iterator[tuple[str, IntScheme]]:
    for name, matrix in matrices.items():
        for axis in AXES:
            for group_size in (64, 128):
                if (matrix.shape[1] if axis == 1 else matrix.numel()) % group_size == 0:
                    yield from ((name, IntScheme(bits, group_size, False, "float", axis)) for bits in (1, 2, 3, 4, 8))


def with_hqq(
    python: str, matrices: dict[str, torch.Tensor], cases: list[tuple[str, IntScheme]]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Codes and decoded weights of every case, and the seconds each took."""
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "matrices.safetensors", Path(scratch) / "found.safetensors"
        save_file(matrices, given)
        asked = json.dumps([[name, scheme.bits, scheme.axis, scheme.group_size] for name, scheme in cases])
        done = subprocess.run(
            [python, "-c", OTHER, str(torch.get_num_threads()), str(given), asked, str(out)],
            env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return load_file(out), json.loads(done.stdout.strip().splitlines()[-1])


def losses(weight: torch.Tensor, decoded: torch.Tensor) -> tuple[float, float]:
    """``mean |w - w'|^0.7`` and the mean square."""
    missing = (weight - decoded).double().abs()
    return float(missing.pow(POWER).mean()), float(missing.square().mean())


def compared(weight: torch.Tensor, scheme: IntScheme, codes: torch.Tensor, decoded: torch.Tensor) -> dict[str, Any]:
    """quantkit on one matrix, beside what hqq found."""
    started = time.perf_counter()
    found = Hqq(HqqOptions()).quantize(weight, InputStatistics(), scheme, torch.float32).weight
    seconds = time.perf_counter() - started
    ours, theirs = losses(weight, found.dequantize()), losses(weight, decoded)
    return {
        "scheme": scheme.describe(),
        "hqq": theirs,
        "lp_ratio": ours[0] / theirs[0],
        "mse_ratio": ours[1] / theirs[1],
        "equal_codes": float((found.codes == codes).float().mean()),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint folder")
    parser.add_argument("--hqq-python", required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    matrices = made_up() | real_layers(given.model)
    cases = list(cases_of(matrices))
    found, seconds = with_hqq(given.hqq_python, matrices, cases)
    print(f"{'matrix':40} {'scheme':34} {'hqq lp':>9} {'lp':>6} {'mse':>6} {'codes':>6} {'s':>6} {'hqq s':>6}")
    rows = []
    for index, (name, scheme) in enumerate(cases):
        row = compared(matrices[name], scheme, found[f"{index}.codes"], found[f"{index}.decoded"])
        rows.append({"matrix": name, **row, "hqq_seconds": seconds[index]})
        print(
            f"{name:40} {row['scheme']:34} {row['hqq'][0]:9.6f} {row['lp_ratio']:6.4f} {row['mse_ratio']:6.4f} "
            f"{row['equal_codes']:6.4f} {row['seconds']:6.3f} {seconds[index]:6.3f}"
        )
    worst = {key: max(row[key] for row in rows) for key in ("lp_ratio", "mse_ratio")}
    total = [sum(row["seconds"] for row in rows), sum(seconds)]
    machine = {"cpu": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"worst": worst, "seconds": total, "rows": rows, **machine}))


if __name__ == "__main__":
    main()
