"""The peak of a quantizing run of this engine: what is alive at once at the widest moment of a block.

The counts of matrices are those of the code, :mod:`quantkit.engine.statistics` and :mod:`quantkit.numerics.factor` for
a Gram matrix; of weights a method tells itself, where it does more than to round. ``docs/vram.md`` has them beside
measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.groups import Group, calibrated_groups, outer_group, uncalibrated_groups
from quantkit.estimation.lines import Line, Part, largest, written
from quantkit.estimation.tuning import tuning_lines
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored
from quantkit.formats import FORMATS
from quantkit.formats.base import BYTES
from quantkit.methods.base import Method, Statistic
from quantkit.methods.tuning import TuneOptions, generated_for
from quantkit.recipe import VariantSpec
from quantkit.schemes import Mxfp4Scheme, Nvfp4Scheme, Scheme
from quantkit.schemes.codebook import CodebookScheme

SUMMED = 1
"""Gram matrices' worth of float32 when its sums are there: the lower triangle is made of the upper in place."""
FACTORIZING = 3
"""The same while one is factorized: the matrix, a damped copy that is factorized in place, and the factor's inverse."""
CORRECTING = 3
"""The same while a layer is corrected for what its input lost: the matrix, damped and factorized as was best so far and
as is tried, beside what was lost."""
KEPT = 3
"""The same while a layer is solved with it: the matrix, damped, and its factor."""
ROUNDING, ROUNDING_TABLE = 2.25, 3.25
"""Weights' worth of float32 beside the weight for methods that do not say themselves, as they round: codes in 8 bits
and two copies, or where codes are looked up in a table the values, their places and the limits between them."""
CAST = 1
"""The same for a comparison that torch on a CPU casts to whole numbers, to add it to the places in a codebook."""
CODES = 0.25
"""The same for the codes of a solved layer."""
FOUND = 3
"""Float32 copies of an input of a batch while it is tried whether it can be scaled: as it was, as it is, compared."""
SCALED = 2
"""Gram matrices beside that of an input while factors are tried: it is divided by their products."""
EXPORTING = 2
"""Times the largest float tensor, which is compared after writing."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What all moments of a run share.

    Attributes:
        size: bytes of a number in the passes.
        method: that chooses the codes.
        needs: the statistics that are gathered.
        observes: a transform is to see all inputs of a block first.
        inside: parameters of the block, or of the head, that is loaded.
        packed: bytes of its packed layers.
        groups: of the block, where statistics are gathered.
    """

    anatomy: Anatomy
    variant: VariantSpec
    use: Use
    size: int
    method: Method
    needs: frozenset[Statistic]
    observes: bool
    inside: int
    packed: int
    groups: tuple[Group, ...] = ()

    @property
    def has_experts(self) -> bool:
        """Whether the block has experts, so that it is run anew for each of its groups."""
        return any(group.experts for group in self.groups)

    @property
    def pauses(self) -> bool:
        """Whether all batches stand inside the block at a time, so that it is run once."""
        return self.use.strategy == "one-pass" and not self.has_experts and self.variant.tune is None

    @property
    def corrects(self) -> bool:
        """Whether layers are corrected for what their inputs lost, for which passes have twins."""
        return self.use.inputs == "quantized" and self.method.corrects and Statistic.GRAM in self.needs

    @property
    def factorizes(self) -> bool:
        return Statistic.GRAM in self.method.needs and self.method.factorizes


def quantizing(anatomy: Anatomy, variant: VariantSpec, file: Stored, use: Use) -> Part:
    """Memory at the widest moment of a run, on the device that it computes on.

    Args:
        anatomy: the model.
        variant: what is done to it.
        file: what comes of it.
        use: calibration tokens, inputs and strategy. To the tokens come those that the float model writes for tuning,
            by default; what it takes meanwhile, in a process of its own, is not counted.
    """
    if variant.tune is not None:
        tokens = use.calibration_tokens
        use = use.model_copy(update={"calibration_tokens": tokens + generated_for(tokens, anatomy.wide)})
    moments = [_exporting(file)]
    schemes = {name: each.scheme for name, each in file.packed.items()}
    run = _run_in(anatomy, variant, file, use)
    if run.needs:
        groups = tuple(calibrated_groups(anatomy, schemes, use.device))
        run = replace(run, groups=groups)
    else:
        groups = tuple(uncalibrated_groups(anatomy, schemes, FORMATS.get(variant.format), use.device))
    if run.observes and run.groups and use.inputs == "quantized":
        moments += _observing(run)
    for group in groups:
        moments += _moments(run, group)
    if variant.tune is not None:
        moments.append(_tuning(run, variant.tune, schemes))
    for name in (anatomy.head, anatomy.embedding):
        if name in schemes:
            head = name == anatomy.head
            moments += _moments(
                _run_outside(anatomy, variant, file, use, name), outer_group(anatomy, name, schemes, head=head)
            )
    return largest(moments)


def _run_in(anatomy: Anatomy, variant: VariantSpec, file: Stored, use: Use) -> _Run:
    names = (name for each in anatomy.inputs for name in each.layers)
    packed = sum(file.packed[name].nbytes for name in names if name in file.packed)
    return _run_of(anatomy, variant, file, use, anatomy.in_largest(), packed)


def _run_outside(anatomy: Anatomy, variant: VariantSpec, file: Stored, use: Use, name: str) -> _Run:
    run = _run_of(anatomy, variant, file, use, math.prod(anatomy.head_shape), file.packed[name].nbytes)
    if name != anatomy.embedding:
        return run
    method = run.method.for_embeddings()
    return replace(run, method=method, needs=method.needs, observes=False)


def _run_of(anatomy: Anatomy, variant: VariantSpec, file: Stored, use: Use, inside: int, packed: int) -> _Run:
    observes = any(transform.needs for transform in variant.build_transforms())
    size = _pass_bytes(file, use)
    return _Run(anatomy, variant, use, size, variant.build_method(), variant.needs(), observes, inside, packed)


def _pass_bytes(file: Stored, use: Use) -> int:
    return BYTES[use.pass_dtype or ("float16" if file.dtype == "float16" else "bfloat16")]


def _moments(run: _Run, group: Group) -> Iterator[Part]:
    """The moments of a group at which most may be alive."""
    block, packed = _block(run), _packed(run)
    if not (run.needs and group.paused):
        yield _part(run, f"at {group.place}", [block, _weights(run, group), packed])
        return
    loaded = [block, _frame(run), *_twins(run, group)]
    reading = [_activations(run, group, reading=True), _gathering(run, group)]
    yield _part(run, f"when a batch reaches {group.place}", [*loaded, *reading, packed])
    standing = [*loaded, _activations(run, group, reading=False)]
    if Statistic.GRAM not in run.needs:
        yield _part(run, f"at {group.place}", [*standing, _weights(run, group), packed])
        return
    summed = _statistics(run, group, SUMMED, own=False)
    lost = _lost(run, group)
    yield _part(run, f"when the inputs of {group.place} are summed", [*standing, summed, *lost, packed])
    if lost:
        lines = [_statistics(run, group, CORRECTING), _weights(run, group, solving=False), *lost]
        yield _part(run, f"when {group.place} is corrected", [*standing, *lines, packed])
    if run.factorizes:
        lines = [_statistics(run, group, FACTORIZING), _weights(run, group, solving=False)]
        yield _part(run, f"at {group.place}", [*standing, *lines, packed])
    kept = _statistics(run, group, KEPT if run.factorizes else 1)
    yield _part(run, f"at {group.place}", [*standing, kept, _weights(run, group), packed])


def _tuning(run: _Run, options: TuneOptions, schemes: dict[str, Scheme]) -> Part:
    """The moment at which a step through the whole block has been taken forward, and its gradients come back."""
    lines = [_block(run), _frame(run), *tuning_lines(run.anatomy, options, schemes, run.use, run.size), _packed(run)]
    return _part(run, "when a block is tuned", lines)


def _block(run: _Run) -> Line:
    return Line("block", run.inside * run.size, f"{written(run.inside)} parameters x {run.size} bytes")


def _packed(run: _Run) -> Line:
    return Line("packed layers of the block", run.packed, f"{written(run.packed)} bytes, written at its end")


def _part(run: _Run, when: str, lines: list[Line]) -> Part:
    return Part("quantizing", f"while quantizing, {when}", tuple(lines), _notes(run))


def _notes(run: _Run) -> tuple[str, ...]:
    if not run.variant.calibrated:
        return ("no calibration is needed",)
    use = run.use
    tokens = f"{use.calibration_tokens:,} calibration tokens, inputs: {use.inputs}"
    strategy = use.strategy if run.variant.tune is None else "recompute"
    return (tokens + (f", {strategy}" if use.inputs == "quantized" else ""),)


def _frame(run: _Run) -> Line:
    """What runs beside the blocks, the head excepted."""
    outside = (weight for weight in run.anatomy.weights if weight.block is None and weight.layer != run.anatomy.head)
    count = sum(weight.numel for weight in outside)
    return Line("embedding and last norm", count * run.size, f"{written(count)} parameters x {run.size} bytes")


def _activations(run: _Run, group: Group, *, reading: bool) -> Line:
    """Those of all batches that stand at a group; where none pauses, those between two blocks, and of one that runs."""
    from quantkit.engine.batches import BATCH_TOKENS

    use, size = run.use, run.size
    tokens = use.calibration_tokens
    if use.inputs == "quantized" and run.pauses:
        return Line("activations", tokens * group.paused * size, f"{tokens:,} tokens x {group.paused:,} x {size} bytes")
    waiting, words = _waiting(run, tokens)
    if not reading:
        return Line("activations", waiting, words)
    running = min(tokens, BATCH_TOKENS[use.device])
    nbytes = waiting + running * group.paused * size
    return Line("activations", nbytes, f"{words} + {running:,} x {group.paused:,} x {size} bytes")


def _waiting(run: _Run, tokens: int) -> tuple[int, str]:
    """Bytes of activations that wait on the device between blocks, and that in words."""
    nbytes = tokens * 2 * run.anatomy.hidden * run.size
    if run.use.waiting is None or nbytes <= run.use.waiting:
        return nbytes, f"{tokens:,} tokens x 2 x {run.anatomy.hidden:,} x {run.size} bytes"
    return run.use.waiting, f"{written(run.use.waiting)} bytes, the rest elsewhere"


def _twins(run: _Run, group: Group) -> Iterator[Line]:
    """What the float passes of batches hold: of those that pause what each group of the block is given from this on."""
    from quantkit.engine.twins import paired_tokens

    tuned = run.variant.tune is not None and run.use.inputs == "quantized"
    if not (run.corrects or tuned):
        return
    tokens, widths = run.use.calibration_tokens, [2 * run.anatomy.hidden] if run.use.waiting is None else []
    tokens = tokens if tuned else paired_tokens(tokens, run.use.device)
    if run.pauses and group in run.groups:
        widths += [each.columns for each in run.groups[run.groups.index(group) :]]
    what = f"{tokens:,} tokens x {sum(widths):,} x {run.size} bytes"
    yield Line("activations of the float model", tokens * sum(widths) * run.size, what)


def _lost(run: _Run, group: Group) -> list[Line]:
    """What the input of a group lost, summed and of the tokens that are held out."""
    from quantkit.engine.mismatch import HELD_OUT, MOST_HELD, lost_numbers, most_held
    from quantkit.engine.twins import paired_tokens

    if not run.corrects:
        return []
    rows, columns = sum(rows for rows, *_ in group.shapes) // group.together, group.columns
    width = columns
    if len(group.shapes) == group.together:  # outputs are compared, with what goes into the residual stream beside them
        width = 2 * rows if rows == run.anatomy.hidden and not group.experts else min(rows, columns)
    held = min(MOST_HELD, paired_tokens(run.use.calibration_tokens, run.use.device) // HELD_OUT)
    held = min(held, most_held(columns)) if group.experts else held
    what = f"({columns:,} x {width:,} + {held:,} held-out tokens x {columns + width:,})"
    numbers = lost_numbers(columns, width, held)
    if group.experts:  # and what one expert's Gram matrix is among its own tokens
        what, numbers = f"({group.together} experts x {what} + {columns:,}²)", group.together * numbers + columns**2
    return [Line("what inputs lost", 4 * numbers, f"{what} x 4 bytes")]


def _beside(run: _Run) -> tuple[int, str]:
    """Numbers of the Gram matrices of a block's other inputs that are there.

    With float inputs all are gathered in one run of the block, and stay until it is done.
    """
    if Statistic.GRAM not in run.needs or run.use.inputs != "float":
        return 0, ""
    count = _of_all_inputs(run)
    return count, f"{written(count)} of all inputs + "


def _of_all_inputs(run: _Run) -> int:
    """Numbers of the Gram matrices of all inputs of a block.

    Without a method that scales inputs those of experts come as many at a time as there is room for, and no fewer than
    are solved together, which is what is counted.
    """
    return sum(((run.observes and group.experts) or group.together) * group.columns**2 for group in run.groups)


def _observing(run: _Run) -> Iterator[Part]:
    """The moments at which a transform looks at a block whose passes go on from there: one more run, and its search."""
    from quantkit.engine.batches import BATCH_TOKENS
    from quantkit.engine.statistics import SAMPLED
    from quantkit.numerics.smoothing import SEARCH_ROWS

    tokens, batch = run.use.calibration_tokens, min(run.use.calibration_tokens, BATCH_TOKENS[run.use.device])
    waiting, words = _waiting(run, tokens)
    paused = max(group.paused for group in run.groups)
    running = waiting + batch * paused * run.size
    standing = [_block(run), _frame(run), *_twins(run, run.groups[0])]
    passing = Line("activations", running, f"{words} + {batch:,} x {paused:,} x {run.size} bytes")
    widest = max(run.groups, key=lambda group: group.columns)
    columns, sampled = widest.columns, SAMPLED * (Statistic.SAMPLE in run.needs)
    grams = _of_all_inputs(run) if Statistic.GRAM in run.needs else 0
    kept = grams + min(tokens, sampled) * sum(group.columns for group in run.groups)
    inputs = Line("inputs", FOUND * batch * columns * 4, f"{FOUND} x {batch:,} tokens x {columns:,} x 4 bytes")
    if any(transform.smooths for transform in run.variant.build_transforms()):
        yield _part(run, "when places for factors are found", [*standing, passing, inputs, _packed(run)])
    what = f"({written(kept)} of all inputs + {batch:,} tokens of a batch x {columns:,}) x 4 bytes"
    statistics = Line("statistics", 4 * (kept + batch * columns), what)
    yield _part(run, "when all inputs of a block are read", [*standing, passing, statistics, _packed(run)])
    weights, rows = max(group.weights for group in run.groups), 2 * SEARCH_ROWS
    matrices = FACTORIZING if run.factorizes else SCALED
    count = kept + matrices * columns**2 + weights + round(rows * columns * (1 + _working(run, widest.solved[1])))
    what = f"({written(kept)} of all inputs + {matrices} x {columns:,}² + {written(weights)} weights + their trial)"
    searched = Line("statistics and weights", 4 * count, f"{what} x 4 bytes")
    still = Line("activations", waiting, words)
    yield _part(run, "when factors are searched", [*standing, still, searched, _packed(run)])


def _matrices(group: Group, matrices: int) -> tuple[int, str]:
    """How many Gram matrices of a group's width there are, those of experts and one of all of them together, in words.

    Args:
        group: of which inputs.
        matrices: for each of them.
    """
    if not group.experts:
        return matrices, f"{matrices} x"
    return matrices * group.together + 1, f"({group.together} experts x {matrices} + 1) x"


def _gathering(run: _Run, group: Group) -> Line:
    """The sums of an input, and the float32 copies of the last batch that is added to them."""
    from quantkit.engine.batches import BATCH_TOKENS
    from quantkit.engine.statistics import CHUNK_TOKENS

    columns, batch = group.columns, min(run.use.calibration_tokens, BATCH_TOKENS[run.use.device])
    if Statistic.GRAM not in run.needs:
        return Line("statistics", 4 * batch * columns, f"{batch:,} tokens of a batch x {columns:,} x 4 bytes")
    beside, words = _beside(run)
    own, each = (0, "") if run.use.inputs == "float" else _matrices(group, 1)
    if run.use.device == "cpu" and run.needs == {Statistic.GRAM}:
        batch = min(batch, CHUNK_TOKENS)
    words += f"{each} {columns:,}² + ".removeprefix("1 x ") if own else ""
    what = f"{words}{batch:,} tokens of a batch x {columns:,}"
    count = beside + own * columns**2 + batch * columns
    return Line("statistics", 4 * count, f"({what}) x 4 bytes")


def _statistics(run: _Run, group: Group, matrices: int, *, own: bool = True) -> Line:
    """Gram matrices after the last batch.

    Args:
        run: the run.
        group: of which input.
        matrices: of its size that are there.
        own: a variant that scales float inputs has made a matrix of its own.
    """
    beside, words = _beside(run)
    if run.use.inputs == "float" and not (own and run.observes):
        matrices -= 1  # it is among those of all inputs
    count, each = _matrices(group, matrices)
    nbytes = 4 * (beside + count * group.columns**2)
    return Line("statistics", nbytes, f"({words}{each} {group.columns:,}²) x 4 bytes")


def _weights(run: _Run, group: Group, *, solving: bool = True) -> Line:
    """The float weights of a group, and what is made of them until their codes are there."""
    count, (most, scheme) = group.weights, group.solved
    copies = 1 + run.observes + (run.corrects and not group.experts)
    working = _working(run, scheme) if solving else 0.0
    codes = CODES * (count - most)
    nbytes = round((count * copies + group.stacked + most * working + codes) * 4)
    words = [f"{copies} x {written(count)} weights"] if copies > 1 else [f"{written(count)} weights"]
    words += [f"{written(group.stacked)} stacked"] if group.stacked else []
    words += [f"{working:g} x {written(most)}"] if working else []
    words += [f"{CODES:g} x {written(count - most)}"] if codes else []
    return Line("weights in float32", nbytes, f"({' + '.join(words)}) x 4 bytes")


def _working(run: _Run, scheme: Scheme) -> float:
    """Weights' worth of float32 beside the weight while its codes are chosen."""
    own = run.method.working_copies(scheme)
    if own is not None:
        return own
    if isinstance(scheme, CodebookScheme):
        return ROUNDING_TABLE + (CAST if run.use.device == "cpu" else 0)
    return ROUNDING_TABLE if isinstance(scheme, Mxfp4Scheme | Nvfp4Scheme) else ROUNDING


def _exporting(file: Stored) -> Part:
    """The moment at which the largest float tensor is copied."""
    largest_float = max((nbytes for _, nbytes in file.floats.values()), default=0)
    formula = f"{EXPORTING} x {written(largest_float)} bytes, compared"
    return Part(
        "quantizing", "while the file is written", (Line("largest float tensor", EXPORTING * largest_float, formula),)
    )
