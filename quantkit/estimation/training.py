"""What QLoRA training takes: a quantized base, adapters with gradients and optimizer states, and saved activations."""

from __future__ import annotations

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.inference import weights_line
from quantkit.estimation.lines import Line, Part, written
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored

STATE_BYTES: dict[str, float] = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 2 + 2 * 4 / 256}
"""Bytes of optimizer states for a parameter: two float32, or two bytes with a float32 scale per 256 of each. Paged ones
take the same and may move to the host's memory while they are not needed."""
ADAPTER_BYTES = 4
"""Adapters and their gradients are float32."""
ACTIVATION_BYTES = 2
"""Training computes in 16 bits."""


def adapter_parameters(anatomy: Anatomy, rank: int) -> int:
    """Parameters of adapters on all linear layers of the blocks."""
    return sum(rank * sum(shape) for shape, block in anatomy.linears().values() if block is not None)


def training(anatomy: Anatomy, file: Stored, use: Use) -> Part:
    """Memory at the widest moment of a training step.

    That is either the start of the backward pass, with logits and their gradient in float32, or one block that is
    computed anew, with all that its gradients need. Saved inputs of the blocks are there in both.
    """
    count, states = adapter_parameters(anatomy, use.lora_rank), STATE_BYTES[use.optimizer]
    lines = (
        weights_line(anatomy, file),
        Line("adapters", count * ADAPTER_BYTES, f"{_rank(anatomy, use)} = {written(count)} x {ADAPTER_BYTES} bytes"),
        Line("gradients", count * ADAPTER_BYTES, f"{written(count)} x {ADAPTER_BYTES} bytes"),
        Line("optimizer", round(count * states), f"{written(count)} x {states:g} bytes ({use.optimizer})"),
        *_activations(anatomy, use),
        _decoded(anatomy),
        Line("device", use.overhead, f"{written(use.overhead / 2**20)} MiB for context, kernels and allocator"),
    )
    title = f"QLoRA training, rank {use.lora_rank}, batch {use.batch}, {use.context:,} tokens"
    return Part("training", title, lines, anatomy.notes)


def _rank(anatomy: Anatomy, use: Use) -> str:
    layers = sum(block is not None for _, block in anatomy.linears().values())
    return f"{use.lora_rank} x (rows + columns) of {layers} layers"


def _activations(anatomy: Anatomy, use: Use) -> tuple[Line, Line]:
    tokens, size = use.tokens, ACTIVATION_BYTES
    saved = 8 * anatomy.hidden + 3 * anatomy.queries + 2 * anatomy.keys + 4 * anatomy.wide
    block = f"(8 x {anatomy.hidden:,} + 3 x {anatomy.queries:,} + 2 x {anatomy.keys:,} + 4 x {anatomy.wide:,})"
    logits = tokens * anatomy.vocabulary * (4 + 4 + size)
    of_block = tokens * saved * size * 2
    if use.gradient_checkpointing:
        kept = Line(
            "saved activations",
            anatomy.blocks * tokens * anatomy.hidden * size,
            f"{anatomy.blocks} blocks x {tokens:,} tokens x {anatomy.hidden:,} x {size} bytes",
        )
    else:
        nbytes = anatomy.blocks * tokens * saved * size
        kept = Line(
            "saved activations", nbytes, f"{anatomy.blocks} blocks x {tokens:,} tokens x {block} x {size} bytes"
        )
        of_block = 0
    if logits >= of_block:
        words = f"logits: {tokens:,} tokens x {anatomy.vocabulary:,} x ({size} + 4 + 4 bytes with gradient)"
        return kept, Line("activations", logits, words)
    return kept, Line("activations", of_block, f"{tokens:,} tokens x {block} x {size} bytes, with gradients twice")


def _decoded(anatomy: Anatomy) -> Line:
    """The widest layer, which is decoded to 16 bits to be multiplied."""
    rows, columns = max(
        (shape for shape, block in anatomy.linears().values() if block is not None), key=lambda s: s[0] * s[1]
    )
    size = ACTIVATION_BYTES
    return Line("decoded layer", rows * columns * size, f"{rows:,} x {columns:,} x {size} bytes")
