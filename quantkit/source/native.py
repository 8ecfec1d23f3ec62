"""Weights that their authors store in 8-bit floats or in MXFP4, decoded one expert or matrix at a time.

What a tensor is follows from its dtype and from the tensor of scales beside it:

- ``weight`` in E4M3 or E5M2 with ``weight_scale_inv`` by blocks, as DeepSeek-V3 and Qwen's FP8 models have it, or with
  a ``weight_scale`` by tensor or channel (fbgemm, AutoFP8, ModelOpt); stacks of experts likewise. Scales may be E8M0.
- ``NAME_blocks`` and ``NAME_scales`` of gpt-oss: E2M1 in blocks of 32, ``[E, out, in / 32, 16]``;
  transformers holds it as ``NAME`` ``[E, in, out]`` (``convert_moe_packed_tensors``).
- two E2M1 numbers a byte with E8M0 scales, as DeepSeek-V4's experts are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError
from quantkit.schemes.blockfloat import E2M1_TABLE
from quantkit.source.decoded import DecodedTensor

METHODS = ("fp8", "mxfp8", "fbgemm_fp8", "mxfp4")
"""``quant_method`` of the files that are decoded here."""
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)
EXPONENT_BIAS = 127
BROKEN = "the checkpoint is broken: get it again from its source"
ACTIVATION_SCALES = ("activation_scale", "input_scale", ".k_scale", ".v_scale", "input_scale_ub")
"""Ends of the names of tensors by which runtimes round activations and KV caches; no weight follows from them."""


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A weight and its scales, by their names in the file."""

    weight: str
    scales: str


def native_tensors(reader: CheckpointReader, config: dict[str, Any], dtype: torch.dtype) -> list[DecodedTensor] | None:
    """The tensors of the float model, in the order of the file; None where none is stored as described above.

    Args:
        reader: the checkpoint.
        config: its ``quantization_config``; empty if it has none.
        dtype: of the decoded weights; other tensors keep theirs.

    Raises:
        CheckpointError: a weight lacks its scales, or these do not fit it.
    """
    scaled = {name: _Scaled(name, scales) for name in reader.names() if (scales := _scales_of(reader, name))}
    blocks = {name for name in reader.names() if _is_blocks(reader, name)}
    bare = {name for name in reader.names() if reader.dtype(name) in EIGHT_BITS} - scaled.keys()
    bare -= {each.scales for each in scaled.values()}
    if not (scaled or blocks or bare) or any(name.endswith(("scale", "scales", "scale_inv")) for name in bare):
        return None  # scales in 8-bit floats belong to weights that are packed otherwise
    if bare and config:
        raise CheckpointError(f"{reader.folder}: tensor '{min(bare)}' is of 8-bit floats and has no scales", BROKEN)
    used = {each.scales for each in scaled.values()} | {_beside(name) for name in blocks}
    found = []
    for name in reader.names():
        if name in scaled:
            found.append(_scaled_tensor(reader, scaled[name], config, dtype))
        elif name in blocks:
            found.append(_blocks_tensor(reader, name, dtype))
        elif name not in used and not name.endswith(ACTIVATION_SCALES):
            found.append(DecodedTensor.plain(reader, name, dtype if name in bare else reader.dtype(name)))
    return found


def _scales_of(reader: CheckpointReader, name: str) -> str | None:
    """The tensor with the scales of a weight; None if it has none."""
    kind = reader.dtype(name)
    candidates = [
        f"{name}_scale_inv", f"{name}_scale", f"{name}_weight_scale", f"{name.removesuffix('weight')}scale"
    ]  # fmt: skip
    found = next((other for other in candidates if other != name and other in reader), None)
    if found is None or kind in EIGHT_BITS:
        return found if kind in EIGHT_BITS else None
    return found if kind in (torch.int8, torch.uint8) and reader.dtype(found) == torch.float8_e8m0fnu else None


def _is_blocks(reader: CheckpointReader, name: str) -> bool:
    return name.endswith("_blocks") and reader.dtype(name) == torch.uint8 and _beside(name) in reader


def _beside(blocks: str) -> str:
    return f"{blocks.removesuffix('_blocks')}_scales"


def _scaled_tensor(
    reader: CheckpointReader, names: _Scaled, config: dict[str, Any], dtype: torch.dtype
) -> DecodedTensor:
    shape, given = reader.shape(names.weight), reader.shape(names.scales)
    is_packed = reader.dtype(names.weight) not in EIGHT_BITS
    if is_packed:
        shape = (*shape[:-1], 2 * shape[-1])
    block = config.get("weight_block_size") if not is_packed else None
    if len(shape) == 3 and config.get("quant_method") == "fbgemm_fp8":
        given = (shape[0], 1, shape[2])  # its scales belong to the last axis, whatever the file says
    steps = _steps(given, shape, block)
    if steps is None:
        raise CheckpointError(
            f"{reader.folder}: '{names.scales}' has the shape {list(given)}, and '{names.weight}' {list(shape)}", BROKEN
        )
    scales = tuple(given) if len(given) == len(shape) else (*given, *[1] * (len(shape) - len(given)))
    return DecodedTensor(names.weight, shape, dtype, partial(_decoded, reader, names, steps, scales))


def _steps(scales: Sequence[int], shape: Sequence[int], block: Sequence[int] | None) -> tuple[int, ...] | None:
    """How many neighbours along each axis of a weight share a scale; None where the scales fit no division."""
    padded = (*scales, *[1] * (len(shape) - len(scales)))
    wanted = [*[1] * (len(shape) - 2), *block] if block else [1] * len(shape)
    if len(padded) != len(shape) or len(wanted) != len(shape):
        return None
    found = []
    for count, size, step in zip(padded, shape, wanted, strict=True):
        if count == 1:
            found.append(size)
        elif -(-size // step) == count:
            found.append(step)
        elif size % count == 0:
            found.append(size // count)
        else:
            return None
    return tuple(found)


def _decoded(
    reader: CheckpointReader, names: _Scaled, steps: tuple[int, ...], given: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    """The weight, whole or expert by expert."""
    scales = _as_floats(reader.read(names.scales)).reshape(given)
    if len(given) < 3:
        yield _multiplied(_levels(reader.read(names.weight)), scales, steps)
        return
    for expert in range(reader.shape(names.weight)[0]):
        levels = _levels(reader.read_part(names.weight, expert))
        yield _multiplied(levels, scales[expert // steps[0]], steps[1:])


def _levels(stored: torch.Tensor) -> torch.Tensor:
    return stored.float() if stored.dtype in EIGHT_BITS else _two_a_byte(stored)


def _multiplied(levels: torch.Tensor, scales: torch.Tensor, steps: tuple[int, ...]) -> torch.Tensor:
    """Every level times its scale, in place; as many neighbours as ``steps`` says share one."""
    for axis, step in enumerate(steps):
        if scales.shape[axis] > 1 and step > 1:
            scales = scales.repeat_interleave(step, dim=axis).narrow(axis, 0, levels.shape[axis])
    return levels.mul_(scales)


def _as_floats(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32; bytes are exponents."""
    if scales.dtype not in EXPONENTS:
        return scales.float()
    return torch.exp2(scales.view(torch.uint8).float() - EXPONENT_BIAS)


def _two_a_byte(packed: torch.Tensor) -> torch.Tensor:
    """E2M1 numbers, the first in the low half of its byte."""
    octets = packed.view(torch.uint8)
    codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return torch.tensor(E2M1_TABLE)[codes.int()]


def _blocks_tensor(reader: CheckpointReader, name: str, dtype: torch.dtype) -> DecodedTensor:
    shape, scales = reader.shape(name), reader.shape(_beside(name))
    if len(shape) != 4 or shape[:-1] != scales:
        raise CheckpointError(
            f"{reader.folder}: '{_beside(name)}' has the shape {list(scales)}, and '{name}' {list(shape)}", BROKEN
        )
    experts, rows, groups, octets = shape
    whole = (experts, groups * octets * 2, rows)
    return DecodedTensor(name.removesuffix("_blocks"), whole, dtype, partial(_experts, reader, name))


def _experts(reader: CheckpointReader, name: str) -> Iterator[torch.Tensor]:
    """The experts of a stack in MXFP4, each ``[in, out]``."""
    for expert in range(reader.shape(name)[0]):
        levels = _two_a_byte(reader.read_part(name, expert))
        exponents = reader.read_part(_beside(name), expert).int() - EXPONENT_BIAS
        yield torch.ldexp(levels, exponents.unsqueeze(-1)).flatten(1).T.contiguous()
