"""A walk beside its products of matrices: what it takes, what they alone take here, and the ratio.

The walk is done twice: once it is timed, and once each product, factorization and attention that torch is asked for is
counted, by its shapes, dtypes, layouts and precision. Each of these is then done by itself, on random numbers, a few
times in turn with the others, and what all of them take together is the limit that the ratio is to. What the walk does
beside them is choosing and rounding numbers, moving them, and Python. Export and reading the calibration set do not
count. Everything is of one process, in seconds and in processor seconds; on a machine that does other work the latter
say more. The last line is JSON.

    python benchmarks/walk_limit.py --model FOLDER --records alpaca.json --method gptq --bits 4

What a machine without these instructions would do, in part: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scoring import machine, read_calibration
from torch.utils._python_dispatch import TorchDispatchMode
from walk_phases import Phases, phases

from quantkit.quantization import Job, Quantized, Wanted, quantize_together
from quantkit.recipe import VariantSpec

ATEN = torch.ops.aten
PRODUCTS: dict[Any, Callable[[list[torch.Size]], float]] = {
    ATEN.mm: lambda of: 2 * of[0].numel() * of[1][-1],
    ATEN.addmm: lambda of: 2 * of[1].numel() * of[2][-1],
    ATEN.addmm_: lambda of: 2 * of[1].numel() * of[2][-1],
    ATEN.bmm: lambda of: 2 * of[0].numel() * of[1][-1],
    ATEN.baddbmm: lambda of: 2 * of[1].numel() * of[2][-1],
    ATEN.baddbmm_: lambda of: 2 * of[1].numel() * of[2][-1],
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda of: 4 * of[0].numel() * of[1][-2],
    ATEN.linalg_cholesky_ex: lambda of: of[0].numel() * of[0][-1] / 3,
    ATEN.linalg_solve_triangular: lambda of: of[0].numel() * of[1][-1],
    ATEN._linalg_solve_ex: lambda of: of[0].numel() * of[0][-1] * 2 / 3,
    torch.ops.mkldnn._linear_pointwise: lambda of: 2 * of[0].numel() * of[1][0],
    ATEN.cholesky_solve: lambda of: 2 * of[1].numel() * of[0][-1],
}
"""What counts as a product, and its floating point operations by the shapes of the tensors that it is given."""
FEWEST, MOST = 3, 20
"""Repetitions of a product: more of those that take less than :data:`ENOUGH` seconds together."""
ENOUGH = 0.3
ROWS = 24


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor that a product was given: ``shape``, ``stride`` and ``dtype``."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def like(self) -> torch.Tensor:
        """One of random numbers that is laid out like it; square matrices are positive definite."""
        size = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.stride, strict=True))
        found = torch.rand(size).to(self.dtype).as_strided(self.shape, self.stride)
        if len(self.shape) > 1 and self.shape[-1] == self.shape[-2] and min(self.stride) > 0:
            found.diagonal(dim1=-2, dim2=-1).add_(self.shape[-1])
        return found


@dataclass(frozen=True, slots=True)
class Product:
    """A product as it was asked for: the ``operator``, its ``arguments`` by place or name, and their ``precision``."""

    operator: Any
    arguments: tuple[tuple[int | str, Any], ...]
    precision: str

    @property
    def given(self) -> list[Given]:
        """The tensors that go in."""
        return [value for name, value in self.arguments if isinstance(value, Given) and isinstance(name, int)]

    def operations(self) -> float:
        """Floating point operations."""
        return PRODUCTS[self.operator.overloadpacket]([each.shape for each in self.given])

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, each.shape)) for each in self.given)
        kind = str(self.given[-1].dtype).removeprefix("torch.")
        kind += " in bfloat16" if self.precision == "bf16" and kind == "float32" else ""
        return f"{self.operator.overloadpacket.__name__.strip('_')} {shapes} {kind}"


SETTINGS: Any = torch.backends.mkldnn
"""Its settings are not in its type hints."""


def _precision() -> str:
    return str(SETTINGS.matmul.fp32_precision)


class Counting(TorchDispatchMode):
    """Counts products by the phase of the walk in which they are asked for."""

    def __init__(self, spent: Phases) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no type hints
        self._spent = spent
        self.found: Counter[tuple[str, Product]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what is asked for, and count it if it is a product."""
        if func.overloadpacket in PRODUCTS:
            named: list[tuple[int | str, Any]] = [*enumerate(args), *(kwargs or {}).items()]
            arguments = tuple((name, _given(value)) for name, value in named)
            self.found[self._spent.current, Product(func, arguments, _precision())] += 1
        return func(*args, **(kwargs or {}))


def _given(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Given(value.shape, value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def again(product: Product) -> Callable[[], Any]:
    """The same product of random numbers."""
    made = {name: value.like() if isinstance(value, Given) else value for name, value in product.arguments}
    args = [value for name, value in made.items() if isinstance(name, int)]
    named = {name: value for name, value in made.items() if isinstance(name, str)}
    return lambda: product.operator(*args, **named)


def seconds_of(product: Product) -> tuple[float, float]:
    """Median seconds and processor seconds of a product by itself, in the precision in which it was asked for."""
    work, before, taken = again(product), _precision(), list[tuple[float, float]]()
    SETTINGS.matmul.fp32_precision = product.precision
    try:
        work()
        while len(taken) < FEWEST or (len(taken) < MOST and sum(wall for wall, _ in taken) < ENOUGH):
            started = time.perf_counter(), time.process_time()
            work()
            taken.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    finally:
        SETTINGS.matmul.fp32_precision = before
    return statistics.median(wall for wall, _ in taken), statistics.median(used for _, used in taken)


def walked(job: Job, spec: VariantSpec, out: Path) -> None:
    """One walk, and its export."""
    (outcome,) = quantize_together(job, [Wanted(spec, out)])
    if not isinstance(outcome, Quantized):
        raise outcome


@dataclass(slots=True)
class Limit:
    """What products take by themselves, by phase: ``seconds``, ``processor`` seconds, ``operations``; and ``lines``."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    processor: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    operations: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lines: list[tuple[float, str]] = field(default_factory=list)


def limit_of(found: Mapping[tuple[str, Product], int]) -> Limit:
    """Do every product by itself."""
    limit = Limit()
    taken = {product: seconds_of(product) for product in dict.fromkeys(product for _, product in found)}
    for (phase, product), count in found.items():
        wall, used = taken[product]
        limit.seconds[phase] += wall * count
        limit.processor[phase] += used * count
        limit.operations[phase] += product.operations() * count
        rate = product.operations() / used / 1e9 if used else math.nan
        limit.lines.append((used * count, f"{used * count:8.2f} s {rate:7.1f} GFLOP/s {count:7d} x {phase}: {product}"))
    return limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="float checkpoint folder")
    parser.add_argument("--records", type=Path, required=True, help="alpaca records; the first of them calibrate")
    parser.add_argument("--samples", type=int, default=128, help="how many of the records calibrate")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--inputs", choices=("quantized", "float"), default="quantized")
    given = parser.parse_args()
    keys = {"name": "walk", "method": given.method, "bits": given.bits, "group_size": given.group_size}
    spec = VariantSpec.model_validate(keys)
    with tempfile.TemporaryDirectory() as scratch:
        job = read_calibration(given, Path(scratch), inputs=given.inputs)
        with phases() as spent:
            walked(job, spec, Path(scratch) / "timed")
        with phases() as again_spent, Counting(again_spent) as counting:
            walked(job, spec, Path(scratch) / "counted")
        limit = limit_of(counting.found)
    for _, line in sorted(limit.lines, reverse=True)[:ROWS]:
        print(line)
    print(f"{'phase':10} {'seconds':>8} {'processor':>10} {'products':>9} {'processor':>10} {'GFLOP/s':>8}")
    for phase, seconds in spent.seconds.items():
        rate = limit.operations[phase] / limit.processor[phase] / 1e9 if limit.processor[phase] else math.nan
        print(
            f"{phase:10} {seconds:8.1f} {spent.processor[phase]:10.1f} {limit.seconds[phase]:9.1f}"
            f" {limit.processor[phase]:10.1f} {rate:8.1f}"
        )
    walk = {kind: sum(getattr(spent, kind).values()) - getattr(spent, kind)["writing"] for kind in KINDS}
    products = {kind: sum(getattr(limit, kind).values()) for kind in KINDS}
    ratio = {kind: walk[kind] / products[kind] for kind in KINDS}
    for kind in KINDS:
        print(f"{kind}: walk {walk[kind]:.1f}, products {products[kind]:.1f}, ratio {ratio[kind]:.2f}")
    told = {"walk": walk, "products": products, "ratio": ratio, "phases": spent.seconds, "used": spent.processor}
    print(json.dumps({**told, "operations": limit.operations, "tokens": sum(map(len, job.rows)), **machine()}))


KINDS = ("seconds", "processor")


if __name__ == "__main__":
    main()
