"""The layouts of bitsandbytes: the tensors of a layer, and the keys of the config that belong to it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats.base import PackedShapes
from quantkit.schemes import PER_CHANNEL, IntScheme, QuantizedWeight, Scheme
from quantkit.schemes.codebook import NESTED_BLOCK, CodebookScheme

if TYPE_CHECKING:
    import torch


class Layout(ABC):
    """How one scheme is stored.

    Attributes:
        scheme: the scheme.
        suffixes: of the names of a layer's tensors.
        computes_in: the dtypes in which bitsandbytes multiplies with such layers.
        remark: what someone who loads such a checkpoint should know.
    """

    scheme: Scheme
    suffixes: tuple[str, ...]
    computes_in: tuple[str, ...]
    remark: str

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The nearest weight that this layout can hold."""
        return weight

    @abstractmethod
    def pack(self, weight: QuantizedWeight, dtype: str) -> dict[str, torch.Tensor]:
        """The tensors of a layer of a float model of ``dtype``, by suffix."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: the tensors are not those of the scheme.
        """

    @abstractmethod
    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """``(out_features, in_features)`` from the shapes of the tensors; ``read`` gives a small one by suffix."""

    @abstractmethod
    def packed_shapes(self, rows: int, columns: int, dtype: str) -> PackedShapes:
        """The tensors of :meth:`pack`."""

    @abstractmethod
    def config(self, dtype: str) -> dict[str, Any]:
        """The keys of ``quantization_config`` that tell this layout."""


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
    """NF4 and FP4: two codes in a byte, the first in its upper half, in the order of the weight's rows.

    Beside them lie the scales (``absmax``, of 8 bits under double quantization, with their own float32 scales
    ``nested_absmax``), the tables of both (``quant_map``, ``nested_quant_map``), and as JSON in a tensor of bytes
    (``quant_state``) the rest: the shape, the block sizes and the offset of the scales. See ``QuantState`` in
    https://github.com/bitsandbytes-foundation/bitsandbytes. The tables and the JSON make up 1.3 kB for each layer.
    """

    computes_in = ("float16", "bfloat16")
    remark = ON_CPU

    def __init__(self, scheme: CodebookScheme) -> None:
        self.scheme: CodebookScheme = scheme
        nested = ("weight.nested_absmax", "weight.nested_quant_map") if scheme.double_quant else ()
        self.suffixes = ("weight", "weight.absmax", "weight.quant_map", *nested, STATE + scheme.kind)

    def pack(self, weight: QuantizedWeight, dtype: str) -> dict[str, torch.Tensor]:
        """Packed codes, scales, tables and state."""
        import torch

        from quantkit.system.host import number

        scheme, codes = self.scheme, weight.codes.reshape(-1)
        tensors = {
            "weight": (codes[::2] << 4 | codes[1::2]).unsqueeze(1),
            "weight.absmax": weight.parts.get("absmax", weight.scales).flatten(),
            "weight.quant_map": torch.tensor(scheme.table, dtype=torch.float32),
        }
        offset = number(weight.parts["nested_offset"]) if scheme.double_quant else None
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


INT8 = IntScheme(8, PER_CHANNEL, symmetric=True, activations="dynamic")
STEP = 7.874015718698502e-3
"""What bitsandbytes multiplies by for a division by 127."""
ROWS_IN_ORDER = 0
ROUNDED_INPUTS = (
    "bitsandbytes int8: inputs are rounded to float16 and then to 8 bits per token, but for columns with a magnitude "
    "of 6 or more, so that logits differ from those of the decoded weights"
)


class Int8(Layout):
    """LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339): int8 codes, and the largest magnitude of each output row.

    ``weight`` is int8 ``[out_features, in_features]``, ``SCB`` float32 ``[out_features]``, and ``weight_format`` a
    uint8 that says in which order the codes lie, 0 for rows. A weight is ``code * SCB / 127``, where bitsandbytes
    multiplies by the float32 next to 1 / 127. Inputs are rounded to 8 bits per token, but for columns with a magnitude
    of 6 or more, which are multiplied in 16 bits. bitsandbytes itself never writes the code -128; it decodes it like
    any other.
    """

    suffixes = ("weight", "SCB", "weight_format")
    computes_in = ("float32", "float16", "bfloat16")
    remark = ROUNDED_INPUTS
    scheme = INT8

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The same codes with scales that are a float32 times :data:`STEP`; part ``scb`` is that float32 ``[rows]``."""
        if "scb" in weight.parts:
            return weight
        return _scaled(weight, weight.scales.float().flatten() / STEP)

    def pack(self, weight: QuantizedWeight, dtype: str) -> dict[str, torch.Tensor]:
        """Signed codes, the largest magnitude of each row, and the order."""
        import torch

        return {
            "weight": (weight.codes.to(torch.int16) - INT8.zero).to(torch.int8),
            "SCB": self.fitted(weight).parts["scb"].contiguous(),
            "weight_format": torch.tensor(ROWS_IN_ORDER, dtype=torch.uint8),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: the codes lie in an order of early versions of bitsandbytes, or do not fit their scales.
        """
        import torch

        weight, scb = tensors["weight"], tensors["SCB"]
        if int(tensors["weight_format"]) != ROWS_IN_ORDER:
            raise CheckpointError(
                "an int8 layer of bitsandbytes is stored in tiles for one kind of GPU (weight_format is not 0)",
                "save the model again with a current bitsandbytes",
            )
        if weight.dtype != torch.int8 or weight.ndim != 2 or scb.numel() != weight.shape[0]:
            raise CheckpointError(
                f"an int8 layer of bitsandbytes has codes {weight.dtype} {list(weight.shape)} and {scb.numel()} scales",
                "the file is broken: get it again",
            )
        codes = (weight.to(torch.int16) + INT8.zero).to(torch.uint8)
        zeros = torch.full((scb.numel(), 1), INT8.zero, dtype=torch.uint8)
        return _scaled(QuantizedWeight(INT8, codes, scb, zeros), scb.float().flatten())

    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """The shape of the codes."""
        rows, columns = shapes["weight"]
        return rows, columns

    def packed_shapes(self, rows: int, columns: int, dtype: str) -> PackedShapes:
        """A byte a weight, a float a row, and the order."""
        return {"weight": ("int8", (rows, columns)), "SCB": ("float32", (rows,)), "weight_format": ("uint8", ())}

    def config(self, dtype: str) -> dict[str, Any]:
        """8 bits."""
        return {"load_in_4bit": False, "load_in_8bit": True}


def _scaled(weight: QuantizedWeight, scb: torch.Tensor) -> QuantizedWeight:
    return replace(weight, scales=(scb * STEP).unsqueeze(1), parts={"scb": scb})


def layout_of(scheme: Scheme) -> Layout:
    """The layout of a scheme.

    Raises:
        SchemeError: there is none, with what to choose instead.
    """
    if isinstance(scheme, CodebookScheme):
        return FourBit(scheme)
    if scheme == INT8:
        return Int8()
    if scheme == IntScheme(8, PER_CHANNEL, symmetric=True):
        raise SchemeError(
            f"bitsandbytes rounds the inputs of {scheme.describe()} layers to 8 bits too", "set activations: dynamic"
        )
    raise SchemeError(
        f"the bitsandbytes format does not store {scheme.describe()}",
        "it stores the schemes nf4 and fp4, and int8 per channel with activations: dynamic; use format "
        "compressed-tensors for others",
    )
