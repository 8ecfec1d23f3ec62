"""What scoring takes: of a model that is loaded whole, and of one that is read a block at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.inference import activations_line
from quantkit.estimation.lines import Line, Part, largest, written
from quantkit.estimation.use import OVERHEAD
from quantkit.formats.base import BYTES

LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits that a scorer handles at once."""
LOGIT_COPIES = 4
"""Float32 tensors of as many numbers while divergence is taken: logarithms of the model and of the reference, which is
what was stored of it, normalized, and its chances."""
PAGES = "pages of the file"
DECODING = 8
"""Bytes of a weight beside the model while it is decoded: in float32, and what that is made of."""
STREAMED_LOGITS = 1 << 24
"""Logits that a streamed model makes at once."""
STREAMS = 2
"""Tensors as wide as the model that a text holds between blocks, at most: what it is given, and what comes of it."""
SHARE = 0.8
"""Of what a device has free, what is counted on."""

How = Literal[
    "float", "decoded", "decoded at first use", "packed", "packed, a layer decoded at a time", "a block at a time"
]
"""How a runtime holds the layers of a checkpoint."""
Waiting = Literal["device", "cpu", "disk"]
"""Where activations wait between blocks."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What is scored.

    Attributes:
        tokens: of all texts together.
        window: tokens that are read at once.
        dtype: in which the model computes.
        device: ``cpu`` or ``cuda``.
    """

    tokens: int
    window: int
    dtype: str
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint as a runtime holds it, once it is loaded whole.

    Attributes:
        held: its tensors, and pages of its file that stay mapped beside them.
        reading: what is there beside these while it is loaded: pages of the file of which all tensors are copied.
        running: what is there beside them while it runs: the layer that is decoded.
    """

    held: tuple[Line, ...]
    reading: tuple[Line, ...] = ()
    running: tuple[Line, ...] = ()


def loaded_as(anatomy: Anatomy, scored: Scored, how: How = "float", file: int | None = None) -> Loaded:
    """What a checkpoint takes that is loaded whole.

    transformers maps the files of a checkpoint, so that on a CPU all pages that were read are in memory as long as a
    tensor lies in them: of float files until each is in the dtype in which the model computes, of packed ones for good.

    Args:
        anatomy: the model.
        scored: what is scored.
        how: the runtime holds it.
        file: bytes of it; None for those of the float model.
    """
    size, own = BYTES[scored.dtype], BYTES[anatomy.dtype]
    whole = anatomy.parameters * own if file is None else file
    floats = Line("weights", anatomy.parameters * size, f"{written(anatomy.parameters)} values x {size} bytes")
    pages = Line(PAGES, whole, f"{written(whole)} bytes, mapped")
    most = max((math.prod(shape) for shape, _ in anatomy.linears().values()), default=0)
    layer = Line("decoded layer", most * size, f"{written(most)} weights x {size} bytes")
    if how == "packed":
        return Loaded((Line("weights", whole, "as they lie on disk"),))
    if scored.device != "cpu":
        held = Line("weights", whole, "as they lie on disk") if how.startswith("packed") else floats
        return Loaded((held,), running=(layer,) if how.startswith("packed") else ())
    if how == "float":
        return Loaded((floats,), (pages,) if scored.dtype != anatomy.dtype else ())
    if how == "decoded":
        decoding = Line("tensor that is decoded", most * DECODING, f"{written(most)} weights x {DECODING} bytes")
        return Loaded((floats,), (decoding,))
    if how == "decoded at first use":
        return Loaded((floats, pages))
    frame = frame_bytes(anatomy, scored.dtype) + (0 if anatomy.tied else anatomy.vocabulary * anatomy.hidden * size)
    return Loaded((Line("embedding and head", frame, f"in {scored.dtype}"), pages), running=(layer,))


def whole_scoring(anatomy: Anatomy, scored: Scored, loaded: Loaded | None = None, *, pages: bool = True) -> Part:
    """Memory of a model that is loaded whole while it is loaded and scored.

    Args:
        anatomy: the model.
        scored: what is scored.
        loaded: what is held of it; None for a float checkpoint.
        pages: count those of files, which the system takes back where memory is short.
    """
    loaded = loaded_as(anatomy, scored) if loaded is None else loaded
    beside = (_window_logits(anatomy, scored), activations_line(anatomy, 1, scored.window, scored.dtype))
    most, device = max(beside, key=lambda line: line.nbytes), _device(scored)
    moments = {
        "loading the whole model": (*loaded.held, *loaded.reading, *device),
        "scoring, the whole model loaded": (*loaded.held, *loaded.running, most, _handled(anatomy, scored), *device),
    }
    counted = {title: tuple(each for each in lines if pages or each.name != PAGES) for title, lines in moments.items()}
    return largest([Part("scoring", title, lines) for title, lines in counted.items()])


def streamed_scoring(anatomy: Anatomy, scored: Scored, *, packed: bool = False, waiting: Waiting | None = None) -> Part:
    """Memory of a model that is read a block at a time while it is scored, of its device.

    Args:
        anatomy: the model.
        scored: what is scored.
        packed: its layers are decoded when they are read.
        waiting: where activations wait between blocks; None for the device.
    """
    frame = frame_bytes(anatomy, scored.dtype)
    waits = waiting in (None, "device") or (waiting == "cpu" and scored.device == "cpu")
    kept = (hidden_line(anatomy, scored),) if waits else ()
    held = (Line("frame", frame, "the embedding and what else is no block"), *kept)
    block = block_bytes(anatomy, scored.dtype)
    through = (
        *held,
        Line("block", block, "the largest block, in the dtype of the model"),
        _read_line(anatomy, packed),
        activations_line(anatomy, 1, scored.window, scored.dtype),
        *_device(scored),
    )
    size = BYTES[scored.dtype]
    head = 0 if anatomy.tied else anatomy.vocabulary * anatomy.hidden * size
    shape = f"{anatomy.vocabulary:,} x {anatomy.hidden:,} x {size} bytes"
    ends = (
        *held,
        Line("head", head, "the embedding" if anatomy.tied else shape),
        _streamed_logits(anatomy, scored),
        _handled(anatomy, scored),
        *_device(scored),
    )
    title = "scoring, a block at a time"
    return largest([Part("scoring_streamed", title, through), Part("scoring_streamed", f"{title}, its logits", ends)])


def fits_whole(whole: Part, free: int) -> bool:
    """Whether a model is loaded whole to be scored, where that is left to quantkit.

    Args:
        whole: what it takes then, without pages of files.
        free: bytes of the device.
    """
    return whole.nbytes <= SHARE * free


def where_activations_wait(anatomy: Anatomy, scored: Scored, device_free: int, cpu_free: int) -> Waiting:
    """Where what texts hold between blocks has room: on the device, else in the memory of the CPU, else on disk.

    Args:
        anatomy: the model.
        scored: what is scored.
        device_free: bytes that its device has free.
        cpu_free: bytes that the CPU has.
    """
    needed = hidden_line(anatomy, scored).nbytes
    bare = streamed_scoring(anatomy, scored, waiting="disk").nbytes
    if bare + needed <= SHARE * device_free:
        return "device"
    return "cpu" if scored.device != "cpu" and needed <= SHARE * cpu_free else "disk"


def tokens_with_room(anatomy: Anatomy, scored: Scored, waiting: Waiting, free: int) -> int:
    """Tokens whose hidden states have room between blocks, at least those of the texts, which were seen to have it.

    Args:
        anatomy: the model.
        scored: what is scored.
        waiting: where they wait.
        free: bytes that are free there.
    """
    device = waiting == "device"
    room = SHARE * free - (streamed_scoring(anatomy, scored, waiting="disk").nbytes if device else 0)
    return max(scored.tokens, int(room // hidden_line(anatomy, replace(scored, tokens=1)).nbytes))


def hidden_line(anatomy: Anatomy, scored: Scored) -> Line:
    """What all texts hold between blocks."""
    size = BYTES[scored.dtype]
    nbytes = STREAMS * scored.tokens * anatomy.hidden * size
    what = f"{STREAMS} x {scored.tokens:,} tokens x {anatomy.hidden:,} x {size} bytes"
    return Line("hidden states", nbytes, what)


def frame_bytes(anatomy: Anatomy, dtype: str) -> int:
    """Bytes of what runs around the blocks, the output head aside."""
    outside = [each for each in anatomy.weights if each.block is None and each.kind != "tower"]
    return sum(each.numel for each in outside if each.layer != anatomy.head or anatomy.tied) * BYTES[dtype]


def block_bytes(anatomy: Anatomy, dtype: str) -> int:
    """Bytes of the largest block."""
    return anatomy.in_largest() * BYTES[dtype]


def streamed_weights(anatomy: Anatomy, dtype: str) -> Line:
    """The weights that are in memory at once, at most: the frame, and the largest block or the head."""
    head = 0 if anatomy.tied else anatomy.vocabulary * anatomy.hidden * BYTES[dtype]
    frame, block = frame_bytes(anatomy, dtype), block_bytes(anatomy, dtype)
    what = f"{written(frame)} of the frame + {written(max(head, block))} of {'the head' if head > block else 'a block'}"
    return Line("weights", frame + max(head, block), what)


def _read_line(anatomy: Anatomy, packed: bool) -> Line:
    """A tensor while it is read: as the file has it, and decoded in float32."""
    most = max((each.numel for each in anatomy.weights if each.block is not None), default=0)
    each = 8 if packed else BYTES[anatomy.dtype]
    return Line("tensor that is read", most * each, f"{most:,} x {each} bytes")


def _window_logits(anatomy: Anatomy, scored: Scored) -> Line:
    size = BYTES[scored.dtype]
    nbytes = scored.window * anatomy.vocabulary * size
    return Line("logits", nbytes, f"{scored.window:,} tokens x {anatomy.vocabulary:,} x {size} bytes")


def _streamed_logits(anatomy: Anatomy, scored: Scored) -> Line:
    count = min(STREAMED_LOGITS, scored.tokens * anatomy.vocabulary)
    return Line("logits", count * BYTES[scored.dtype], f"{count:,} at once")


def _handled(anatomy: Anatomy, scored: Scored) -> Line:
    count = min(LOGITS_AT_ONCE[scored.device], scored.window * anatomy.vocabulary)
    return Line("figures", LOGIT_COPIES * count * 4, f"{LOGIT_COPIES} x {count:,} logits x 4 bytes")


def _device(scored: Scored) -> tuple[Line, ...]:
    return (Line("device", OVERHEAD, "context, kernels and allocator"),) if scored.device == "cuda" else ()
