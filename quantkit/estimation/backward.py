"""What is alive while a model runs backward a block at a time: to tell what its loss minds, and to train a file."""

from __future__ import annotations

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.lines import Line, Part, largest, written
from quantkit.estimation.tuning import OF_HEADS, OF_HIDDEN, OF_WIDE
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored
from quantkit.formats.base import BYTES
from quantkit.recipe import RecoverOptions

DRAWING = 20
"""Bytes of a logit beside itself while a label is drawn: its logarithm in float32, and sums of chances in float64."""
MATCHING = 16
"""The same while two models are compared: logarithms of both in float32, the chances of one, and their products."""
SQUARES = 2
"""Float32 copies of a gradient at the outputs of a layer while its squares are summed."""
SEEN = (8, 4, 3)
"""What a graph keeps of a token where weights have no gradients, so that the inputs of layers are not kept: in
widths of the residual stream, of all heads of queries and of keys, and of the MLP."""
TRAINED = (OF_HIDDEN, OF_HEADS, OF_WIDE)
"""The same where they have."""
DECODED = 2
"""Weights' worth of float32 of a block that is trained: decoded, and their gradients."""
STATES = 4
"""Numbers of a trained one: itself, its gradient, and two moments."""


def backward(anatomy: Anatomy, use: Use, *, kept: bool) -> Part:
    """Memory of the pass forward and backward that looks at gradients at the outputs of layers.

    Args:
        anatomy: the model.
        use: calibration tokens and the dtype of the passes.
        kept: what blocks are given waits on the device.
    """
    from quantkit.engine.batches import BATCH_TOKENS

    size, tokens = BYTES[use.pass_dtype or "bfloat16"], use.calibration_tokens
    batch = min(tokens, BATCH_TOKENS[use.device])
    held = [_frame(anatomy, size)]
    if kept:
        count = tokens * anatomy.hidden * (anatomy.blocks + 1)
        what = f"{tokens:,} tokens x {anatomy.hidden:,} x ({anatomy.blocks} + 1) x {size} bytes"
        held.append(Line("inputs of all blocks", count * size, what))
    gradients = Line(
        "gradients", tokens * anatomy.hidden * size, f"{tokens:,} tokens x {anatomy.hidden:,} x {size} bytes"
    )
    most = max((rows for (rows, _), block in anatomy.linears().values() if block is not None), default=anatomy.hidden)
    squares = Line("squares", SQUARES * batch * most * 4, f"{SQUARES} x {batch:,} tokens x {most:,} x 4 bytes")
    block = Line("block", anatomy.in_largest() * size, f"{written(anatomy.in_largest())} parameters x {size} bytes")
    moments = [
        Part(
            "backward",
            "a block run backward",
            (*held, gradients, block, graph_line(anatomy, batch, size, SEEN), squares),
        ),
        Part(
            "backward", "the loss", (*held, gradients, _head(anatomy, size), logits_line(anatomy, batch, size, DRAWING))
        ),
    ]
    return largest(moments)


def training_back(anatomy: Anatomy, file: Stored, options: RecoverOptions, use: Use, room: int = 0) -> Part:
    """Memory of a step of a training: two frames and heads, a block with its gradients, and what is trained.

    Args:
        anatomy: the model.
        file: that is trained.
        options: of the training.
        use: the dtype of the passes.
        room: bytes that decoded weights and graphs of blocks may take that are held until these are run back.
    """
    size, tokens = BYTES[use.pass_dtype or "bfloat16"], options.batch_tokens
    frames = [_frame(anatomy, size, copies=2), _head(anatomy, size, copies=2)]
    names = [name for each in anatomy.inputs for name in each.layers if name in file.packed]
    inside = [file.packed[name] for name in dict.fromkeys(names)]
    weights = sum(each.weights for each in inside)
    codes = sum(each.weights for each in file.packed.values() if options.trains("codes", each.scheme.bits))
    scales = sum(each.shape[0] * each.scheme.groups(each.shape[1]) for each in file.packed.values())
    held = sum(each.weights for each in file.packed.values())
    trained = STATES * 4 * scales + 4 * codes + held
    kept = tokens * anatomy.hidden * (anatomy.blocks + 1)
    graph = graph_line(anatomy, tokens, size, TRAINED)
    blocks = anatomy.blocks * (weights * size + graph.nbytes)
    waiting = Line("blocks that are held", min(room, blocks), f"of {written(blocks)} bytes, up to half of what is free")
    lines = [
        *frames,
        Line(
            "codes and what is trained",
            trained,
            f"{written(held)} codes + {STATES} x {written(scales)} scales x 4 bytes + {written(codes)} codes x 4 bytes",
        ),
        Line("inputs of all blocks", kept * size, f"{tokens:,} tokens x {anatomy.hidden:,} x ({anatomy.blocks} + 1)"),
        Line("weights and their gradients", DECODED * weights * 4, f"{DECODED} x {written(weights)} weights x 4 bytes"),
        Line("block", anatomy.in_largest() * size, f"{written(anatomy.in_largest())} parameters x {size} bytes"),
        graph,
    ]
    loss = [*lines[:4], logits_line(anatomy, tokens, size, MATCHING)]
    if room:
        lines, loss = [*lines, waiting], [*loss, waiting]
    return largest(
        [Part("training back", "a block trained", tuple(lines)), Part("training back", "its loss", tuple(loss))]
    )


def graph_line(anatomy: Anatomy, tokens: int, size: int, widths: tuple[int, int, int]) -> Line:
    """What a backward pass of some tokens through a block keeps; attention is computed in tiles."""
    counted = list(zip(widths, (anatomy.hidden, anatomy.queries + anatomy.keys, anatomy.wide), strict=True))
    numbers = sum(count * width for count, width in counted)
    kept = f"({' + '.join(f'{count} x {width:,}' for count, width in counted)})"
    return Line("activations with a graph", tokens * numbers * size, f"{tokens:,} tokens x {kept} x {size} bytes")


def logits_line(anatomy: Anatomy, tokens: int, size: int, beside: int) -> Line:
    """Logits of as many tokens as are handled at once, with what is made of them."""
    from quantkit.engine.reverse import CHUNK_LOGITS

    count = min(tokens * anatomy.vocabulary, CHUNK_LOGITS)
    return Line("logits", count * (size + beside), f"{count:,} x ({size} + {beside} bytes)")


def _frame(anatomy: Anatomy, size: int, copies: int = 1) -> Line:
    outside = (weight for weight in anatomy.weights if weight.block is None and weight.layer != anatomy.head)
    count = sum(weight.numel for weight in outside if weight.kind != "tower")
    what = f"{written(count)} parameters x {size} bytes"
    return Line("embedding and last norm", copies * count * size, what if copies == 1 else f"{copies} x {what}")


def _head(anatomy: Anatomy, size: int, copies: int = 1) -> Line:
    count = anatomy.vocabulary * anatomy.hidden
    what = f"{anatomy.vocabulary:,} x {anatomy.hidden:,} x {size} bytes"
    return Line("head", copies * count * size, what if copies == 1 else f"{copies} x {what}")
