"""A layer of a GPTQ checkpoint of any author: how its zero points are told, and what scheme its tensors have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.formats._per_layer import BROKEN, Rules, columns_per_group, require, require_matrix
from quantkit.schemes import IntScheme
from quantkit.schemes.bitstream import pack_bits, unpack_bits

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint import CheckpointReader

BITS = (2, 3, 4, 8)
WORD = 32
LESS = {"gptq": 1, "gptq_v2": 0}
"""By ``checkpoint_format``, what is taken off a zero point before it is stored."""


def shifted_zeros(words: torch.Tensor, bits: int, change: int) -> torch.Tensor:
    """Packed zero points plus ``change``, int32 ``[groups, words]``.

    2, 4 and 8 bits are added word by word as gptqmodel does, so that what it took from a zero point of 0, and with that
    from its neighbour, comes back; in 3 bits it counts round for each by itself.
    """
    import torch

    if change == 0:
        return words
    if WORD % bits:
        codes = unpack_bits(words, bits, words.shape[1] * WORD // bits)
        return pack_bits(((codes.to(torch.int16) + change) & ((1 << bits) - 1)).to(torch.uint8), bits)
    step = change * sum(1 << place for place in range(0, WORD, bits)) % (1 << WORD)
    return words.contiguous() + (step - (1 << WORD) if step >> (WORD - 1) else step)  # int32 counts round


def less_in(config: Mapping[str, Any]) -> int:
    """What a checkpoint takes off its zero points.

    Raises:
        CheckpointError: quantkit does not read its ``checkpoint_format``.
    """
    stored = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        stored = "marlin"
    if stored not in LESS:
        raise CheckpointError(
            f"a gptq checkpoint of checkpoint_format '{stored}' is laid out for one kind of kernel",
            f"quantkit reads {' and '.join(LESS)}: get the model in one of them",
        )
    return LESS[stored]


def scheme_in(layer: str, rules: Rules, reader: CheckpointReader) -> IntScheme:
    """The scheme of a layer.

    Raises:
        CheckpointError: its tensors are not as its config asks for.
    """
    import torch

    said = rules.of(layer)
    if said.bits not in BITS:
        raise CheckpointError(f"layer {layer} has {said.bits} bits", "quantkit reads gptq of 2, 3, 4 and 8 bits")
    words, rows = require_matrix(reader, f"{layer}.qweight")
    columns = words * WORD // said.bits
    size = columns_per_group(layer, said.group_size, columns)
    groups, whole = columns // size, (torch.int32,)
    if columns * said.bits % WORD or rows * said.bits % WORD:
        raise CheckpointError(f"the codes of layer {layer} do not fill whole words", BROKEN)
    require(reader, f"{layer}.qweight", whole, (words, rows))
    require(reader, f"{layer}.qzeros", whole, (groups, rows * said.bits // WORD))
    require(reader, f"{layer}.scales", (torch.float16, torch.bfloat16, torch.float32), (groups, rows))
    ordered = False
    if f"{layer}.g_idx" in reader:
        require(reader, f"{layer}.g_idx", whole, (columns,))
        ordered = _is_ordered(layer, reader.read(f"{layer}.g_idx"), size)
    return IntScheme(said.bits, said.group_size, said.symmetric, desc_act=ordered)


def _is_ordered(layer: str, groups: torch.Tensor, size: int) -> bool:
    """Whether the groups are anything else than neighbours."""
    import torch

    columns = len(groups)
    if bool((groups == torch.arange(columns) // size).all()):
        return False
    wanted = torch.arange(columns // size).repeat_interleave(size)
    if not torch.equal(groups.long().sort().values, wanted):
        raise CheckpointError(f"g_idx of layer {layer} does not have {size} columns in each group", BROKEN)
    return True
