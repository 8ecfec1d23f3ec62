"""The time that quantizing takes on a GPU, told from what has to be computed: FLOPs, bytes, and kernels to launch.

    python benchmarks/gpu_time.py [--card h100] [--tokens 65536]

It prints a table in Markdown, the one of ``docs/engine.md``. It models 4-bit gptq in groups of 128 with its defaults:
quantized inputs, correction, one refinement. Kernels and the bytes that they move are counted by running the method on
a small weight and looking at each operation, with loops over columns as one kernel a block and without; FLOPs are
written down here beside the code that they are of. Nothing of it is measured on a GPU: :data:`CARDS` are data sheets,
and what else is taken for granted is in capitals below. ``benchmarks/gpu_proof`` measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from quantkit.engine.twins import paired_tokens
from quantkit.methods.base import InputStatistics
from quantkit.numerics import fused
from quantkit.recipe import VariantSpec
from quantkit.system import products as products_of_cpus

GROUP = 128
VARIANT: dict[str, Any] = {"name": "gptq", "method": "gptq", "bits": 4, "group_size": GROUP}
REACHED = 0.7
"""Share of a data sheet's products that large products reach."""
LAUNCH = 5e-6
"""Seconds that Python and the driver take for an operation of torch; in the loops its kernels are shorter."""
COLUMN = 1e-6
"""Seconds that a column takes in a fused loop: a load, a sum over threads and a division, one after another."""
LANES = 4
"""Operations of such a loop for a weight and each column of its block: to choose that, add it up, and change it."""
DISK = 2e9
"""Bytes that a disk reads or writes in a second."""
PACKED = 0.5 + 2 / GROUP
"""Bytes of a weight in the file: 4 bits, and a scale of 16 for each group."""
IN_BLOCK = 16
"""Columns of its own block that a column reads, the mean, in the solver and in the refinement, where none is fused."""
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "_linalg_solve_ex", "linalg_cholesky_ex")
UNCOUNTED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "set_", "_local_scalar_dense")


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense Llama: widths, heads, blocks, vocabulary."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int
    head: int = 128

    def groups(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of what is solved as one matrix in a block."""
        query, key = self.heads * self.head, self.kv_heads * self.head
        return {
            "qkv": (query + 2 * key, self.hidden),
            "o": (self.hidden, query),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def block_weights(self) -> int:
        """Of the linear layers of a block."""
        return sum(rows * columns for rows, columns in self.groups().values())


MODELS = {
    "8B": Shape(4096, 14336, 32, 8, 32, 128256),
    "70B": Shape(8192, 28672, 64, 8, 80, 128256),
}
"""Llama 3.1."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a data sheet says: dense products in bfloat16 and in float32 without TF32, FLOP/s, and bytes a second."""

    name: str
    half: float
    single: float
    bandwidth: float


CARDS = {
    "h100": Card("H100 SXM", 989e12, 67e12, 3.35e12),
    "a100": Card("A100 80 GB SXM", 312e12, 19.5e12, 2.04e12),
    "rtx4090": Card("RTX 4090", 165e12, 82.6e12, 1.01e12),
}


@dataclass(slots=True)
class Work:
    """What a part takes: FLOPs in 16 and 32 bits, bytes moved on the card, operations, bytes of files.

    Of fused loops the columns that wait for each other, and the operations of single numbers.
    """

    half: float = 0.0
    single: float = 0.0
    moved: float = 0.0
    operations: float = 0.0
    filed: float = 0.0
    columns: float = 0.0
    numbers: float = 0.0

    def seconds(self, card: Card) -> float:
        """One thing after another; kernels take as long as they take to launch or to move their bytes."""
        products = (self.half / card.half + self.single / card.single) / REACHED
        fused_loops = max(self.columns * COLUMN, 2 * self.numbers / card.single)
        plain = max(self.operations * LAUNCH, self.moved / card.bandwidth)
        return products + plain + fused_loops + self.filed / DISK

    def times(self, factor: float) -> Work:
        """So many of it."""
        return Work(*(factor * getattr(self, name) for name in self.__slots__))


@dataclass
class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that start a kernel, and the bytes that those move which are no products."""

    operations: int = 0
    moved: int = 0
    by_name: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # what returns a view of what it was given computes nothing
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if views or name in UNCOUNTED:
            return found
        self.operations += 1
        self.by_name[name] = self.by_name.get(name, 0) + 1
        if name.rstrip("_") not in PRODUCTS:
            given = [each for each in (*args, found) if isinstance(each, torch.Tensor)]
            self.moved += sum(each.numel() * each.element_size() for each in given)
        return found

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Inside the block loops over columns are one kernel a block, which is counted; its results are zeros."""

        def run(*given: Any) -> None:
            self.operations += 1
            start, scales, levels, _, found, errors, *before = given
            limits = [each for each in (levels.low, levels.high) if isinstance(each, torch.Tensor)]
            self.moved += 4 * sum(each.numel() for each in (start, scales, *limits, found, errors, *before))
            with _disable_current_modes():
                found.zero_(), errors.zero_()

        with (
            mock.patch.object(fused, "is_fused", return_value=True),
            mock.patch.object(fused, "_refusal", return_value=""),
            mock.patch.object(fused, "run", run),
        ):
            yield


@cache
def counted(rows: int, columns: int, *, is_fused: bool, refinements: int = 1) -> _Counting:
    """What the method does to a weight ``[rows, columns]``, counted on a CPU, whose operations are those of a GPU."""
    variant = VariantSpec.model_validate({**VARIANT, "refinements": refinements})
    method, scheme = variant.build_method(), variant.base_scheme()
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * columns, columns, generator=draw)
    statistics = InputStatistics(tokens=len(inputs), gram=inputs.T @ inputs / len(inputs))
    weight = torch.randn(rows, columns, generator=draw)
    counting = _Counting()
    by_one = mock.patch.object(products_of_cpus, "multiplies_by_onednn", return_value=False)  # as a GPU multiplies
    with torch.no_grad(), by_one, counting.fused() if is_fused else nullcontext(), counting:
        method.quantize(weight, statistics, scheme, torch.float16)
    return counting


def per_column(*, is_fused: bool = True, refinements: int = 1) -> float:
    """Operations that a further column costs, with what its block and its group do once."""
    few, many = 2 * GROUP, 4 * GROUP
    found = [counted(8, each, is_fused=is_fused, refinements=refinements).operations for each in (few, many)]
    return (found[1] - found[0]) / (many - few)


def moved_per_weight(*, is_fused: bool = True) -> float:
    """Bytes that are read and written for a weight where nothing is multiplied, and within blocks of columns."""
    few, many, columns = 64, 192, 2 * GROUP
    found = [counted(rows, columns, is_fused=is_fused).moved for rows in (few, many)]
    return (found[1] - found[0]) / ((many - few) * columns) + (0 if is_fused else 2 * 4 * IN_BLOCK)


def forward(shape: Shape, tokens: int, context: int = 512) -> Work:
    """A block's forward pass of so many tokens: products with its weights, and attention over half of each row."""
    attention = 2 * 2 * shape.heads * shape.head * context / 2
    return Work(half=tokens * (2 * shape.block_weights + attention), moved=2.0 * shape.block_weights)


def grams(shape: Shape, tokens: int) -> Work:
    """``XᵀX`` of each input of a block, see ``add_gram`` in ``engine/statistics.py``."""
    return Work(single=sum(2.0 * tokens * columns**2 for _, columns in shape.groups().values()))


def mismatches(shape: Shape, tokens: int) -> Work:
    """``X̃ᵀZ`` of each input, see ``engine/mismatch.py``: of o and down of two parts of what the layer gives."""
    widths = {name: 2 * rows if name in ("o", "down") else columns for name, (rows, columns) in shape.groups().items()}
    return Work(single=sum(2.0 * tokens * columns * widths[name] for name, (_, columns) in shape.groups().items()))


def products(rows: int, columns: int, *, outputs: bool) -> Work:
    """The products of solving one matrix, float32.

    For ``c`` columns and ``r`` rows: the factor of the inverse (``numerics/factor.py``) takes ``c³ / 3`` and ``c³``, a
    correction (``numerics/mismatch.py``) three factors of ``c³ / 3`` and ``2 c² r`` to solve, and as much again for its
    moments where outputs are not known; the solver (``numerics/columns.py``) ``c² r``, the refinement
    (``numerics/refine.py``) ``2 c² r`` each for the response, two errors and the descent, and ``c² r`` for the scales.
    """
    cubes, planes = columns**3 * (1 / 3 + 1 + 1), float(rows) * columns**2
    return Work(single=cubes + planes * (1 + 2 * 4 + 1 + (2 if outputs else 4)))


def loops(rows: int, columns: int, *, is_fused: bool = True) -> Work:
    """All that is no product of large matrices: the solver's and the refinement's loops over columns, the search."""
    passes = 2 * columns if is_fused else 0  # of the solver, and of one refinement
    return Work(
        operations=per_column(is_fused=is_fused) * columns,
        moved=moved_per_weight(is_fused=is_fused) * rows * columns,
        columns=passes,
        numbers=float(passes) * rows * fused.BLOCK * LANES,
    )


def parts(shape: Shape, tokens: int, *, is_fused: bool = True) -> dict[str, Work]:
    """What a whole model takes, by part; all but the output head and the embedding, which stay float."""
    twins = paired_tokens(tokens, "cuda")
    groups = shape.groups()
    solved = [products(*group, outputs=name in ("o", "down")) for name, group in groups.items()]
    looped = [loops(*group, is_fused=is_fused) for group in groups.values()]
    weights, floats = shape.blocks * shape.block_weights, 2 * shape.vocabulary * shape.hidden
    return {
        "read and written": Work(filed=2.0 * (weights + floats) + 2 * PACKED * weights + 2.0 * floats),
        "forward passes": forward(shape, tokens + twins).times(shape.blocks),
        "Gram matrices": _sum(grams(shape, tokens), mismatches(shape, twins)).times(shape.blocks),
        "products of the solver": _sum(*solved).times(shape.blocks),
        "loops over columns": _sum(*looped).times(shape.blocks),
    }


def _sum(*works: Work) -> Work:
    return Work(*(sum(getattr(work, name) for work in works) for name in Work.__slots__))


def table(card: Card, tokens: int, models: Mapping[str, Shape] = MODELS) -> str:
    """Seconds by part and model, and what each part is counted from."""
    found = {name: parts(shape, tokens) for name, shape in models.items()}
    head = "| part | " + " | ".join(f"{name}: counted | seconds" for name in models) + " |"
    lines = [head, "|:--|" + "--:|--:|" * len(models)]
    for part in next(iter(found.values())):
        cells = [f"{in_words(each[part])} | {each[part].seconds(card):,.0f}" for each in found.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    sums = [sum(work.seconds(card) for work in each.values()) for each in found.values()]
    plain = [parts(shape, tokens, is_fused=False)["loops over columns"] for shape in models.values()]
    cells = [f"{in_words(work)} | {work.seconds(card):,.0f}" for work in plain]
    lines.append(f"| without triton instead | {' | '.join(cells)} |")
    return "\n".join([*lines, "| all, with triton | " + " | ".join(f"| {seconds:,.0f}" for seconds in sums) + " |"])


def in_words(work: Work) -> str:
    """What it is, in the unit that counts."""
    if work.filed:
        return f"{work.filed / 1e9:,.0f} GB of files"
    if work.operations:
        waiting = f"{work.columns / 1e6:,.1f} million columns, " if work.columns else ""
        return f"{waiting}{work.operations / 1e6:,.2f} million operations, {work.moved / 1e12:,.1f} TB"
    return f"{(work.half or work.single) / 1e15:,.2f} PFLOP {'bfloat16' if work.half else 'float32'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--tokens", type=int, default=128 * 512)
    given = parser.parse_args()
    card = CARDS[given.card]
    rates = f"{card.half / 1e12:,.0f} TFLOP/s in bfloat16, {card.single / 1e12:,.1f} in float32"
    print(
        f"{card.name}, by its data sheet: {rates}, {card.bandwidth / 1e12} TB/s. {given.tokens:,} calibration tokens."
    )
    moved = f"the loops and the search move {moved_per_weight():,.0f} bytes a weight"
    each = f"{per_column(is_fused=False):.1f} operations a column, {per_column():.2f} where loops are fused"
    print(f"{each}; {moved}.\n")
    print(table(card, given.tokens))


if __name__ == "__main__":
    main()
