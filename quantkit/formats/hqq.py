"""hqq: the tensors of ``HQQLinear.state_dict`` of the package hqq, as transformers 4 saves and loads them.

The codes of a layer are a matrix ``[groups, group_size]`` (axis 1) or ``[group_size, groups]`` (axis 0). Its rows are
cut into as many equal blocks as codes fit into a byte, or for 3 bits ten into an int32, and laid over one another, the
first block in the highest bits (``W_q``). Scale and zero point are floats, one each per group, with
``w = (code - zero) * scale``. The rest describes the layer: numbers as tensors of no dimension, texts as tensors of
bytes. See ``hqq/core/quantize.py`` and ``bitpack.py`` in https://github.com/dropbox/hqq, version 0.2.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.base import FLOAT, Format, PackedShapes
from quantkit.schemes import IntScheme, QuantizedWeight, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint import CheckpointReader

PACKINGS = {1: ("1bit_u8", 8), 2: ("2bit_u8", 4), 3: ("3bit_32", 10), 4: ("4bit_u8", 2)}
"""By bits, hqq's name of the packing and how many codes it puts into a word."""
WHOLE_BYTES = ("8bit_u8", 1)
"""How the other widths are packed: as hqq does with 5, 6 and 8 bits."""
SUFFIXES = (
    "W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "compute_dtype",
    "view_as_float", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip
FLAGS = {
    **dict.fromkeys(("view_as_float", "quant_scale", "quant_zero", "offload_meta"), False),
    **dict.fromkeys(("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize"), True),
}
"""What describes every layer alike."""
WHO_LOADS = (
    "hqq: transformers 4 (4.57 is tested) loads it with the package hqq and dtype=torch.float32, in which its layers "
    "compute whatever dtype is asked for; transformers 5, up to 5.23 at least, does not read the layers and leaves "
    "them at random numbers with no more than a warning, so that quantkit's evaluation decodes them itself"
)


@FORMATS.register
class HqqFormat(Format):
    """The layout of the package hqq."""

    name = "hqq"
    summary = "int1-8 grouped on either axis or per channel, whole and float zero points"
    runtimes = ("transformers 4",)
    requires = ("hqq",)
    examples = tuple({"bits": bits, "group_size": 32, "symmetric": False, "zeros": "float"} for bits in (4, 3))

    @classmethod
    def computes_in(cls, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Its layers compute in float32 whatever dtype is asked for."""
        return ("float32",)

    @classmethod
    def author(cls, config: Mapping[str, Any], folder: Path) -> str | None:
        """transformers, which says its version."""
        version = config.get("transformers_version")
        return f"transformers {version}" if version else None

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse what has no codes with a zero point, or groups that do not fill whole words."""
        found = _integer(scheme)
        _, together = _packing(found)
        if found.axis == 0 and found.bits != 3 and found.group_size % together:
            raise SchemeError(
                f"hqq packs {together} {found.bits}-bit codes of a group into a byte: {found.describe()} does not fit",
                f"choose a group_size that {together} divides",
            )

    @classmethod
    def choices(cls, runtime: str | None = None) -> tuple[str, ...]:
        """Those that take no more than their bits, each told beside its codes."""
        return ("int2", "int3", "int4", "int8", FLOAT) if cls._serves(runtime) else ()

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """What says that it is of hqq."""
        return config.get("quant_method") == "hqq"

    @classmethod
    def schemes_in(cls, config: Mapping[str, Any], reader: CheckpointReader) -> dict[str, Scheme]:
        """The layers with ``W_q``, each as the numbers beside it say; zero points count as floats."""
        layers = [name.removesuffix(".W_q") for name in reader.names() if name.endswith(".W_q")]
        if not layers:
            raise CheckpointError(
                f"{reader.folder} says that it is quantized with hqq, and holds no packed layer",
                "save it with transformers 4 and the package hqq",
            )
        return {layer: _scheme_in(layer, reader) for layer in layers}

    def layer_shape(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """From the tensor that says it; see :meth:`Format.layer_shape`."""
        rows, columns = (int(size) for size in read("shape"))
        return rows, columns

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Float zero points in the dtype of the scales."""
        if _integer(weight.scheme).zeros == "int":
            return weight
        return replace(weight, zeros=weight.zeros.to(weight.scales.dtype))

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Packed codes, scales, zero points and what describes them.

        Raises:
            SchemeError: the layer has not enough groups to fill whole words.
        """
        import torch

        scheme, (rows, columns) = _integer(weight.scheme), weight.codes.shape
        flat = (1, -1) if scheme.axis == 0 else (-1, 1)
        numbers = {"nbits": scheme.bits, "group_size": scheme.columns_per_group(columns), "axis": scheme.axis}
        dtype = weight.scales.dtype
        texts = _texts(scheme, str(dtype))
        flags = {**FLAGS, "round_zero": scheme.zeros == "int"}
        return {
            "W_q": _packed(_matrix(weight.codes, scheme), scheme, (rows, columns)),
            "scale": weight.scales.reshape(flat).contiguous(),
            "zero": weight.zeros.to(dtype).reshape(flat).contiguous(),
            "shape": torch.tensor([rows, columns], dtype=torch.int64),
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()},
            **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()},
            **{name: torch.tensor(flag, dtype=torch.uint8) for name, flag in flags.items()},
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        import torch

        found, (rows, columns) = _integer(scheme), (int(size) for size in tensors["shape"])
        size = found.columns_per_group(columns)
        groups = rows * columns // size
        words = tensors["W_q"].view(torch.int32 if found.bits == 3 else torch.uint8)
        codes = _unpacked(words, found)[: size if found.axis == 0 else groups]
        layout = (groups, 1) if found.axis == 0 else (rows, columns // size)
        zeros = tensors["zero"].reshape(layout)
        return QuantizedWeight(
            found,
            codes.reshape(rows, columns),
            tensors["scale"].reshape(layout),
            zeros if found.zeros == "float" else zeros.to(torch.uint8),
        )

    def packed_shapes(self, scheme: Scheme, out_features: int, in_features: int) -> PackedShapes:
        """Words of codes, a scale and a zero point for each group, and what describes the layer."""
        found = _integer(scheme)
        size = found.columns_per_group(in_features)
        groups = out_features * in_features // size
        down, across = (size, groups) if found.axis == 0 else (groups, size)
        words = (-(-down // _packing(found)[1]), across)
        flat = (1, groups) if found.axis == 0 else (groups, 1)
        dtype = self.scale_dtype(self.dtype)
        texts = _texts(found, f"torch.{dtype}")
        return {
            "W_q": ("int32" if found.bits == 3 else "uint8", words),
            "scale": (dtype, flat),
            "zero": (dtype, flat),
            "shape": ("int64", (2,)),
            **dict.fromkeys(("nbits", "group_size", "axis"), ("int32", ())),
            **{name: ("uint8", (len(text),)) for name, text in texts.items()},
            **dict.fromkeys((*FLAGS, "round_zero"), ("uint8", ())),
        }

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes of :meth:`pack`."""
        return SUFFIXES

    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """One group of settings; each layer's own lie beside its codes, so that others may have others."""
        schemes = [_integer(scheme) for scheme in layers.values() if scheme is not None]
        first = schemes[0]
        return {
            "quant_method": "hqq",
            "quant_config": {
                "weight_quant_params": {
                    "nbits": first.bits,
                    "channel_wise": True,
                    "group_size": None if first.group_size == -1 else first.group_size,
                    "optimize": True,
                    "round_zero": first.zeros == "int",
                    "axis": first.axis,
                    "view_as_float": False,
                },
                "scale_quant_params": None,
                "zero_quant_params": None,
                "offload_meta": False,
            },
            "skip_modules": [name for name, scheme in layers.items() if scheme is None],
        }

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Who loads it, and which widths take more than their bits."""
        wide = sorted({scheme.bits for scheme in schemes if scheme.bits in (5, 6, 7)})
        if not wide:
            return (WHO_LOADS,)
        return (WHO_LOADS, f"hqq: codes of {', '.join(map(str, wide))} bits are stored in 8")


def _integer(scheme: Scheme) -> IntScheme:
    if isinstance(scheme, IntScheme) and scheme.activations is None and not scheme.desc_act:
        return scheme
    raise SchemeError(
        f"the hqq format does not store {scheme.describe()}",
        "it stores int schemes of 1 to 8 bits on either axis, without activations and desc_act; use compressed-tensors",
    )


def _texts(scheme: IntScheme, dtype: str) -> dict[str, str]:
    """What describes a layer in words, with scales of ``dtype``."""
    word = "int32" if scheme.bits == 3 else "uint8"
    return {"packing": _packing(scheme)[0], "unpack_view_dtype": f"torch.{word}", "compute_dtype": dtype}


def _packing(scheme: IntScheme) -> tuple[str, int]:
    return PACKINGS.get(scheme.bits, WHOLE_BYTES)


def _matrix(codes: torch.Tensor, scheme: IntScheme) -> torch.Tensor:
    """Codes with the groups as columns (axis 0) or as rows (axis 1)."""
    if scheme.axis == 0:
        return codes.reshape(scheme.group_size, -1)
    return codes.reshape(-1, scheme.columns_per_group(codes.shape[1]))


def _packed(matrix: torch.Tensor, scheme: IntScheme, shape: tuple[int, int]) -> torch.Tensor:
    """``[n, m]`` codes to ``[ceil(n / together), m]`` words."""
    import torch
    from torch.nn.functional import pad

    packing, together = _packing(scheme)
    missing = -matrix.shape[0] % together
    if missing and scheme.bits != 3:
        raise SchemeError(
            f"hqq's {packing} needs a multiple of {together} groups, and a layer of shape {list(shape)} has "
            f"{matrix.shape[0]} of {scheme.describe()}",
            "keep this layer float with 'ignore', or choose another group_size",
        )
    blocks = pad(matrix.to(torch.int32), (0, 0, 0, missing)).view(together, -1, matrix.shape[1])
    words = torch.zeros_like(blocks[0])
    for block in blocks:
        words = words << scheme.bits | block
    return words if scheme.bits == 3 else words.to(torch.uint8)


def _unpacked(words: torch.Tensor, scheme: IntScheme) -> torch.Tensor:
    """The inverse of :func:`_packed`, with what it padded."""
    import torch

    _, together = _packing(scheme)
    shifts = range(scheme.bits * (together - 1), -1, -scheme.bits)
    mask = scheme.levels - 1
    return torch.cat([(words >> shift & mask).to(torch.uint8) for shift in shifts])


def _scheme_in(layer: str, reader: CheckpointReader) -> IntScheme:
    """The scheme of a layer that the package hqq wrote, if its tensors have the sizes that go with it.

    Raises:
        CheckpointError: they have not, or its scales are quantized themselves.
    """
    remedy = "the file is broken, or of a version of hqq that quantkit does not know"

    def numbers(suffix: str) -> list[float]:
        return list(reader.read(f"{layer}.{suffix}").flatten().tolist())

    if any(any(numbers(flag)) for flag in ("quant_scale", "quant_zero")):
        raise CheckpointError(
            f"{layer}: hqq has quantized its scales or zero points too, which quantkit does not read",
            "quantize with quant_scale and quant_zero off, as hqq does by default",
        )
    try:
        (bits,), (size,), (axis,), (rows, columns) = map(numbers, ("nbits", "group_size", "axis", "shape"))
        along_rows = axis == 1 and size == columns
        scheme = IntScheme(
            int(bits), -1 if along_rows else int(size), symmetric=False, zeros="float", axis=1 if axis else 0
        )
        scheme.check_layer(int(rows), int(columns))
    except (SchemeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{layer}: hqq's description of it cannot be read: {error}", remedy) from error
    weights, groups = int(rows * columns), int(rows * columns // size)
    words = -(-(groups if axis else int(size)) // _packing(scheme)[1]) * (int(size) if axis else groups)
    octets = words * (4 if scheme.bits == 3 else 1)
    found = reader.nbytes(f"{layer}.W_q"), *(math.prod(reader.shape(f"{layer}.{name}")) for name in ("scale", "zero"))
    if found != (octets, groups, groups):
        raise CheckpointError(
            f"{layer}: {weights} weights of {scheme.describe()} do not fit {found[0]} bytes and {found[1]} scales",
            remedy,
        )
    return scheme
