"""NF4 and FP4: two codes in a byte, the first in its upper half, in the order of the weight's rows.

Beside them lie the scales (``absmax``, of 8 bits under double quantization, with their own float32 scales
``nested_absmax``), the tables of both (``quant_map``, ``nested_quant_map``), and as JSON in a tensor of bytes
(``quant_state``) the rest: the shape, the block sizes and the offset of the scales. See ``QuantState`` in
https://github.com/bitsandbytes-foundation/bitsandbytes. The tables and the JSON make up 1.3 kB for each layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.formats._bitsandbytes.layout import Layout
from quantkit.formats.base import PackedShapes
from quantkit.schemes import QuantizedWeight
from quantkit.schemes.codebook import NESTED_BLOCK, CodebookScheme

if TYPE_CHECKING:
    import torch

STATE = "weight.quant_state.bitsandbytes__"
BROKEN = "the file is broken: get it again, or quantize again"
ON_CPU = (
    "bitsandbytes: on a CPU with AVX512-BF16 its layers compute in bfloat16 with scales in bfloat16, whatever the "
    "model's dtype, and a layer whose output features are no multiple of 32 fails; GPUs and other CPUs do neither"
)
TABLE_TOLERANCE = 1e-4
NESTED_LEVELS = 256
"""Entries of the table in which scales are stored under double quantization."""
USUAL_OFFSET = 0.08123456686735153
"""An offset with as many digits as most have."""


class FourBit(Layout):
    """The 4-bit layout."""

    computes_in = ("float16", "bfloat16")
    remark = ON_CPU

    def __init__(self, scheme: CodebookScheme) -> None:
        self.scheme: CodebookScheme = scheme
        nested = ("weight.nested_absmax", "weight.nested_quant_map") if scheme.double_quant else ()
        self.suffixes = ("weight", "weight.absmax", "weight.quant_map", *nested, STATE + scheme.kind)

    def pack(self, weight: QuantizedWeight, dtype: str) -> dict[str, torch.Tensor]:
        """Packed codes, scales, tables and state."""
        import torch

        scheme, codes = self.scheme, weight.codes.reshape(-1)
        tensors = {
            "weight": (codes[::2] << 4 | codes[1::2]).unsqueeze(1),
            "weight.absmax": weight.parts.get("absmax", weight.scales).flatten(),
            "weight.quant_map": torch.tensor(scheme.table, dtype=torch.float32),
        }
        offset = float(weight.parts["nested_offset"]) if scheme.double_quant else None
        if scheme.double_quant:
            from quantkit.schemes.grids.codebook import dynamic_table

            tensors["weight.nested_absmax"] = weight.parts["nested_absmax"]
            tensors["weight.nested_quant_map"] = dynamic_table(torch.device("cpu")).clone()
        rows, columns = weight.codes.shape
        state = self._state(rows, columns, dtype, offset)
        tensors[STATE + scheme.kind] = torch.tensor(list(state), dtype=torch.uint8)
        return tensors

    def packed_shapes(self, rows: int, columns: int, dtype: str) -> PackedShapes:
        """Two codes to a byte, scales, tables and state.

        Under double quantization the state's text has the offset of the scales with as many digits as it takes, a few
        more or less than here.
        """
        scheme = self.scheme
        scales = rows * columns // scheme.group_size
        found: PackedShapes = {
            "weight": ("uint8", (rows * columns // 2, 1)),
            "weight.absmax": ("uint8" if scheme.double_quant else "float32", (scales,)),
            "weight.quant_map": ("float32", (len(scheme.table),)),
        }
        if scheme.double_quant:
            found["weight.nested_absmax"] = ("float32", (-(-scales // NESTED_BLOCK),))
            found["weight.nested_quant_map"] = ("float32", (NESTED_LEVELS,))
        state = self._state(rows, columns, dtype, USUAL_OFFSET if scheme.double_quant else None)
        return found | {STATE + scheme.kind: ("uint8", (len(state),))}

    def _state(self, rows: int, columns: int, dtype: str, offset: float | None) -> bytes:
        """The JSON of the state; ``offset`` is that of the scales under double quantization."""
        state: dict[str, Any] = {
            "quant_type": self.scheme.kind,
            "blocksize": self.scheme.group_size,
            "dtype": dtype,
            "shape": [rows, columns],
        }
        if offset is not None:
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(state).encode()

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`, also of codes that are stored as numbers of another dtype than uint8.

        Raises:
            CheckpointError: the state or a table is not that of the scheme.
        """
        import torch

        scheme = self.scheme
        state = _checked(read_state(tensors[STATE + scheme.kind]), scheme)
        _check_tables(tensors, scheme)
        packed = tensors["weight"].view(torch.uint8).reshape(-1, 1)
        codes = torch.cat([packed >> 4, packed & 15], dim=1).view(*state["shape"])
        scales, parts = tensors["weight.absmax"].view(codes.shape[0], -1), {}
        if scheme.double_quant:
            from quantkit.schemes.grids.codebook import nested_scales

            offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
            parts = {"absmax": scales, "nested_absmax": tensors["weight.nested_absmax"], "nested_offset": offset}
            scales = nested_scales(parts)
        return QuantizedWeight(scheme, codes, scales, torch.zeros(scales.shape, dtype=torch.uint8), parts)

    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """As the state says."""
        rows, columns = read_state(read(STATE + self.scheme.kind))["shape"]
        return int(rows), int(columns)

    def config(self, dtype: str) -> dict[str, Any]:
        """The table, whether scales are nested, and the dtype in which layers compute."""
        return {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.scheme.kind,
            "bnb_4bit_use_double_quant": self.scheme.double_quant,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
        }


def read_state(tensor: torch.Tensor) -> dict[str, Any]:
    """The JSON of a ``quant_state``.

    Raises:
        CheckpointError: it is none.
    """
    try:
        state = json.loads(bytes(tensor.tolist()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"a quant_state of bitsandbytes cannot be read: {error!r}", BROKEN) from error
    if not isinstance(state, dict):
        raise CheckpointError("a quant_state of bitsandbytes cannot be read: it is no mapping", BROKEN)
    return state


def _checked(state: dict[str, Any], scheme: CodebookScheme) -> dict[str, Any]:
    """The state of a layer, if it is one of ``scheme``."""
    expected = {"quant_type": scheme.kind, "blocksize": scheme.group_size}
    if scheme.double_quant:
        expected["nested_blocksize"] = NESTED_BLOCK
    missing = [key for key in expected if key not in state]
    if missing:
        raise CheckpointError(f"a quant_state of bitsandbytes cannot be read: it lacks {missing[0]}", BROKEN)
    found = {key: state[key] for key in expected}
    if found != expected:
        raise CheckpointError(f"a quant_state of bitsandbytes is {found}, not {scheme.describe()}", BROKEN)
    return state


def _check_tables(tensors: Mapping[str, torch.Tensor], scheme: CodebookScheme) -> None:
    import torch

    from quantkit.schemes.grids.codebook import dynamic_table

    tables = {"weight.quant_map": torch.tensor(scheme.table)}
    if scheme.double_quant:
        tables["weight.nested_quant_map"] = dynamic_table(torch.device("cpu"))
    for suffix, table in tables.items():
        found = tensors[suffix].float()
        if found.shape != table.shape or not torch.allclose(found, table, rtol=0, atol=TABLE_TOLERANCE):
            raise CheckpointError(f"{suffix} of bitsandbytes is not the table of {scheme.describe()}", BROKEN)
