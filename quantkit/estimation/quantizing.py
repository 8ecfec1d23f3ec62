"""The peak of a quantizing run of this engine: what is alive at once when a group of layers is solved.

The counts of matrices are those of the code, :mod:`quantkit.engine.statistics` and :mod:`quantkit.numerics.factor` for
a Gram matrix, :mod:`quantkit.methods` for a weight. ``docs/vram.md`` has them beside measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.lines import Line, Part, largest, written
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored
from quantkit.formats.base import BYTES
from quantkit.methods.base import Statistic
from quantkit.recipe import VariantSpec
from quantkit.schemes.codebook import CodebookScheme

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "q_a_proj", "kv_a_proj_with_mqa")
MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "dense_h_to_4h")
FACTORIZING = 8
"""Gram matrices' worth of float32 while one is factorized."""
KEPT = 4
"""The same while a layer is solved with it: the matrix, damped, its factor, and that divided by its diagonal."""
SOLVING, SOLVING_ASYMMETRIC = 7, 11
"""Weights' worth of float32 that the column solver takes beside the weight."""
ROUNDING, ROUNDING_CODEBOOK = 2.25, 4.25
"""The same for methods that round without solving columns."""
EXPORTING = 3
"""Times the largest float tensor, which is checked for NaN and compared after writing."""
BATCH_TOKENS = 16384
"""Tokens that run at a time on CUDA."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share an input.

    Attributes:
        name: of its layers.
        rows: of all of them.
        columns: of the input.
        members: how many layers.
        paused: numbers of a token that are alive before the first of them is called.
        words: how many that are.
    """

    name: str
    rows: int
    columns: int
    members: int
    paused: int
    words: str


def quantizing(anatomy: Anatomy, variant: VariantSpec, file: Stored, use: Use) -> Part:
    """Memory at the widest moment of a run, on the device that it computes on.

    Args:
        anatomy: the model.
        variant: what is done to it.
        file: what comes of it.
        use: calibration tokens, feed and strategy.
    """
    block = max(range(anatomy.blocks), key=lambda index: sum(map(_numel, anatomy.in_block(index).values())))
    quantized = {name for name in file.packed if anatomy.linears().get(name, (None, None))[1] == block}
    moments = [_solving(anatomy, variant, file, use, block, group) for group in groups(anatomy, block, quantized)]
    return largest([*moments, _exporting(file)])


def groups(anatomy: Anatomy, block: int, quantized: set[str]) -> Iterator[Group]:
    """The groups of a block, told by the names of its layers.

    At a pause the embedding, the input of the block, and in the MLP the stream after attention are alive, beside what
    the layer is about to read and what the attention still holds.
    """
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for name, (shape, place) in anatomy.linears().items():
        if place == block and name in quantized:
            parent, _, leaf = name.rpartition(".")
            role = "inputs" if leaf in (*ATTENTION_INPUTS, *MLP_INPUTS) else leaf
            found.setdefault((parent, role), []).append(shape)
    hidden, queries, keys = anatomy.hidden, anatomy.queries, anatomy.keys
    for (parent, role), shapes in found.items():
        columns, attends = shapes[0][1], "att" in parent
        if role == "inputs":
            paused, words = (3 * hidden, f"3 x {hidden:,}") if attends else (4 * hidden, f"4 x {hidden:,}")
        elif attends:
            paused = 3 * hidden + 2 * (queries + keys)
            words = f"(3 x {hidden:,} + 2 x {queries:,} + 2 x {keys:,})"
        else:
            paused, words = 4 * hidden + anatomy.wide, f"(4 x {hidden:,} + {anatomy.wide:,})"
        name = parent.rpartition(".")[2] if role == "inputs" else role
        yield Group(name, sum(rows for rows, _ in shapes), columns, len(shapes), paused, words)


def _solving(anatomy: Anatomy, variant: VariantSpec, file: Stored, use: Use, block: int, group: Group) -> Part:
    """The moment at which a group is solved."""
    size = BYTES[use.pass_dtype or ("float16" if file.dtype == "float16" else "bfloat16")]
    needs = variant.build_method().needs
    inside = sum(map(_numel, anatomy.in_block(block).values()))
    lines = [Line("block", inside * size, f"{written(inside)} parameters x {size} bytes")]
    if needs:
        lines += [_frame(anatomy, size), _activations(anatomy, use, group, size)]
    if Statistic.GRAM in needs:
        lines.append(_statistics(anatomy, variant, use, group))
    lines += [_weights(variant, group, solves=Statistic.GRAM in needs), _packed(anatomy, file, block)]
    return Part("quantizing", f"while quantizing, at {group.name} of a block", tuple(lines), _notes(use, bool(needs)))


def _notes(use: Use, calibrated: bool) -> tuple[str, ...]:
    if not calibrated:
        return ("no calibration is needed",)
    tokens = f"{use.calibration_tokens:,} calibration tokens, inputs: {use.feed}"
    return (tokens + (f", {use.strategy}" if use.feed == "quantized" else ""),)


def _frame(anatomy: Anatomy, size: int) -> Line:
    """What runs beside the blocks, the head excepted."""
    count = sum(weight.numel for weight in anatomy.weights if weight.block is None and weight.layer != anatomy.head)
    return Line("embedding and last norm", count * size, f"{written(count)} parameters x {size} bytes")


def _activations(anatomy: Anatomy, use: Use, group: Group, size: int) -> Line:
    tokens, hidden = use.calibration_tokens, anatomy.hidden
    if use.feed == "quantized" and use.strategy == "one-pass":
        return Line("activations", tokens * group.paused * size, f"{tokens:,} tokens x {group.words} x {size} bytes")
    running = min(tokens, BATCH_TOKENS)
    nbytes = (tokens * 2 * hidden + running * group.paused) * size
    return Line("activations", nbytes, f"({tokens:,} x 2 x {hidden:,} + {running:,} x {group.words}) x {size} bytes")


def _statistics(anatomy: Anatomy, variant: VariantSpec, use: Use, group: Group) -> Line:
    """Gram matrices; with float inputs those of all groups of a block are there, and one is factorized."""
    matrices = FACTORIZING if _factorizes(variant, group) else KEPT
    if use.feed == "quantized":
        return Line("statistics", 4 * matrices * group.columns**2, f"{matrices} x {group.columns:,}² x 4 bytes")
    others = sum(width**2 for width in (anatomy.hidden, anatomy.queries, anatomy.hidden, anatomy.wide))
    nbytes = 4 * (others + (matrices - 1) * group.columns**2)
    formula = f"({written(others)} of all inputs + {matrices - 1} x {group.columns:,}²) x 4 bytes"
    return Line("statistics", nbytes, formula)


def _factorizes(variant: VariantSpec, group: Group) -> bool:
    """Whether factorizing the Gram matrix takes more than solving with it."""
    return (FACTORIZING - KEPT) * group.columns**2 >= _solver(variant) * group.rows * group.columns


def _solver(variant: VariantSpec) -> int:
    return SOLVING if variant.base_scheme().symmetric else SOLVING_ASYMMETRIC


def _weights(variant: VariantSpec, group: Group, *, solves: bool) -> Line:
    """The float weights of a group, and what is made of them until their codes are there."""
    copies, count = 2 if group.members > 1 else 1, group.rows * group.columns
    working = ROUNDING_CODEBOOK if isinstance(variant.base_scheme(), CodebookScheme) else ROUNDING
    if solves:
        working = 0 if _factorizes(variant, group) else _solver(variant)
    nbytes = round(count * (copies + working) * 4)
    return Line("weights in float32", nbytes, f"{written(count)} weights x ({copies} + {working:g}) x 4 bytes")


def _packed(anatomy: Anatomy, file: Stored, block: int) -> Line:
    places = anatomy.linears()
    nbytes = sum(each.nbytes for name, each in file.packed.items() if places.get(name, (None, None))[1] == block)
    return Line("packed layers of the block", nbytes, f"{written(nbytes)} bytes, written at its end")


def _exporting(file: Stored) -> Part:
    """The moment at which the largest float tensor is copied."""
    largest_float = max((nbytes for _, nbytes in file.floats.values()), default=0)
    formula = f"{EXPORTING} x {written(largest_float)} bytes, checked and compared"
    return Part(
        "quantizing", "while the file is written", (Line("largest float tensor", EXPORTING * largest_float, formula),)
    )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
