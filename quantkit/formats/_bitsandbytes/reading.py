"""The layers of a checkpoint that transformers and bitsandbytes wrote, found by the names of their tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats._bitsandbytes.four_bit import STATE, read_state
from quantkit.formats._bitsandbytes.int8 import INT8
from quantkit.schemes import Scheme, make_scheme
from quantkit.schemes.codebook import NESTED_BLOCK

if TYPE_CHECKING:
    from quantkit.checkpoint import CheckpointReader

GET_AGAIN = "the file is broken: get it again"


def schemes_of(reader: CheckpointReader) -> dict[str, Scheme]:
    """The packed layers, by full name.

    Raises:
        CheckpointError: the tensors of a layer do not fit each other, or blocks that quantkit does not read.
    """
    found: dict[str, Scheme] = {}
    for name in reader.names():
        layer, state, _ = name.partition(f".{STATE}")
        if state:
            found[layer] = _four_bit(reader, layer, name)
        elif name.endswith(".SCB"):
            layer = name.removesuffix(".SCB")
            found[layer] = _int8(reader, layer)
    if not found:
        raise CheckpointError(
            f"{reader.folder} says that it is quantized with bitsandbytes, and holds no packed layer",
            "save the model again after it was quantized",
        )
    return found


def _int8(reader: CheckpointReader, layer: str) -> Scheme:
    codes, scales = reader.shape(f"{layer}.weight"), reader.shape(f"{layer}.SCB")
    if len(codes) != 2 or math.prod(scales) != codes[0] or reader.dtype(f"{layer}.weight").itemsize != 1:
        raise CheckpointError(
            f"{layer}: weight {list(codes)} and SCB {list(scales)} are no int8 layer of bitsandbytes", GET_AGAIN
        )
    return INT8


def _four_bit(reader: CheckpointReader, layer: str, name: str) -> Scheme:
    """A scheme whose blocks fill the rows of the layer, as its tensors have it."""
    nested = f"{layer}.weight.nested_absmax" in reader
    try:
        state = read_state(reader.read(name))
        rows, columns = (int(size) for size in state["shape"])
        scheme = make_scheme(name.rpartition("__")[2], {"group_size": state["blocksize"], "double_quant": nested})
    except (CheckpointError, SchemeError) as error:
        raise CheckpointError(f"{layer}: {error.problem}", error.remedy) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{layer}: its quant_state cannot be read: {error!r}", GET_AGAIN) from error
    if columns % scheme.group_size:
        raise CheckpointError(
            f"{layer}: blocks of {scheme.group_size} weights run over the ends of its rows of {columns}",
            "quantkit reads blocks that fill rows; quantize this model with another block size",
        )
    _check_sizes(reader, layer, rows * columns, state, nested)
    return scheme


def _check_sizes(reader: CheckpointReader, layer: str, weights: int, state: dict[str, Any], nested: bool) -> None:
    """The tensors hold as many numbers as the state says."""
    blocks = weights // int(state["blocksize"])
    expected = {"weight.absmax": blocks}
    if nested:
        if state.get("nested_blocksize") != NESTED_BLOCK:
            raise CheckpointError(
                f"{layer}: its scales share one of their own in blocks of {state.get('nested_blocksize')}",
                f"quantkit reads blocks of {NESTED_BLOCK}",
            )
        expected["weight.nested_absmax"] = -(-blocks // NESTED_BLOCK)
    found = {suffix: math.prod(reader.shape(f"{layer}.{suffix}")) for suffix in expected}
    codes = reader.nbytes(f"{layer}.weight")
    if found != expected or codes * 2 != weights:
        raise CheckpointError(
            f"{layer}: {codes} bytes of codes and {found} do not fit a weight of {state['shape']}", GET_AGAIN
        )
