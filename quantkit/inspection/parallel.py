"""Tensor-parallel sizes: over how many devices a server can split each layer so that no group of weights is cut.

vLLM and SGLang give each device some of the attention heads, and split layers in one of two ways: those that read the
residual stream by their outputs, and those that write it, such as ``o_proj`` and ``down_proj``, by their inputs. A
group of columns that share a scale lies on one device, so each device's inputs must be whole groups; vLLM refuses
others when it loads the file (``input_size_per_partition`` in its ``gptq``, ``awq`` and ``compressed_tensors`` layers).
Kernels may ask for more, such as multiples of 64 outputs and 128 inputs for Marlin's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.exports import Export
from quantkit.schemes import Scheme
from quantkit.schemes.base import PER_CHANNEL

SIZES = (1, 2, 4, 8, 16)
"""Numbers of devices that are tried; an even split needs one of these in practice."""
HEADS, KEY_HEADS = ("num_attention_heads", "n_head", "n_heads"), ("num_key_value_heads",)
WIDTHS = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True, slots=True)
class Split:
    """What a checkpoint can be split over.

    Attributes:
        sizes: numbers of devices, 1 first.
        limits: of each of the others what stands in its way, in words.
    """

    sizes: tuple[int, ...]
    limits: Mapping[int, str]

    def to_json(self) -> dict[str, Any]:
        """``sizes`` and ``limits``, the latter by size."""
        return {"sizes": list(self.sizes), "limits": {str(size): limit for size, limit in self.limits.items()}}

    def words(self) -> str:
        """The sizes, and what stands in the way of the next."""
        listed = ", ".join(map(str, self.sizes))
        return listed + "".join(f" ({size}: {limit})" for size, limit in list(self.limits.items())[:1])


def tensor_parallel(export: Export) -> Split:
    """The sizes over which a quantized checkpoint can be split."""
    return split(export.config(), ((name, scheme, export.shape(name)) for name, scheme in export.schemes.items()))


def split(config: Mapping[str, Any], layers: Iterable[tuple[str, Scheme, tuple[int, int]]]) -> Split:
    """The sizes over which a model can be split.

    Args:
        config: ``config.json``.
        layers: packed layers: name, scheme, and shape ``(out_features, in_features)``.
    """
    text: Mapping[str, Any] = next((part for part in (config, *config.values()) if _number(part, HEADS)), {})
    packed = list(layers)
    limits = {size: limit for size in SIZES if (limit := next(_limits(text, packed, size), None)) is not None}
    return Split(tuple(size for size in SIZES if size not in limits), limits)


def _limits(text: Mapping[str, Any], layers: list[tuple[str, Scheme, tuple[int, int]]], size: int) -> Iterator[str]:
    """What stands in the way of a size."""
    heads, keys, width = _number(text, HEADS), _number(text, KEY_HEADS), _number(text, WIDTHS)
    if heads and heads % size:
        yield f"{heads} attention heads do not divide by it"
    if keys and keys % size and size % keys:
        yield f"{keys} heads of keys and values do not divide by it"
    writers = [each for each in layers if each[2][0] == width]
    square = reversed([each for each in writers if each[2][1] == width])  # q_proj may be square, o_proj comes later
    others = [each for each in layers if each[2] != (width, width)]
    for name, scheme, (rows, columns) in [*others, *square]:
        group = 1 if scheme.group_size == PER_CHANNEL else scheme.group_size
        tall = 1 if scheme.stacks else group  # rows that are not independent share square blocks
        if rows == width and columns % (size * group):
            yield f"{name} would have {columns / size:,.6g} inputs a device, in groups of {group}"
        if rows != width and rows % (size * tall):
            yield f"{name} would have {rows / size:,.6g} outputs a device{f', in blocks of {tall}' if tall > 1 else ''}"


def _number(part: Any, keys: tuple[str, ...]) -> int:
    """The first of some keys that a part of a config has a whole number for; 0 if it has none."""
    found = (part.get(key) for key in keys) if isinstance(part, Mapping) else ()
    return next((each for each in found if isinstance(each, int) and not isinstance(each, bool)), 0)
