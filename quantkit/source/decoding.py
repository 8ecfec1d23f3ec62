"""Float models that lie quantized on disk: which are decoded by themselves, which on request, and which are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.checkpoint.leftovers import is_stale, quantization_of
from quantkit.engine.empty_model import empty_model
from quantkit.errors import CheckpointError, SchemeError, SourceError
from quantkit.exports import Export, open_export
from quantkit.runtimes._decoded import Promise, as_transformers_stores, decoded_state, layer_names
from quantkit.source import native
from quantkit.source.decoded import DecodedTensor
from quantkit.source.float_names import float_name

USUAL_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a quantized checkpoint becomes a float one.

    Attributes:
        form: what it is stored in, such as ``fp8`` or ``gptq``.
        tensors: of the float model, in the order in which they are written.
    """

    form: str
    tensors: list[DecodedTensor]


def float_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of the float model that a quantized checkpoint stands for, as its config says it."""
    parts = (config, *(value for value in config.values() if isinstance(value, dict)))
    told = [str(part.get(key)).removeprefix("torch.") for part in parts for key in ("dtype", "torch_dtype")]
    return next((name for name in told if name in FLOATS), USUAL_DTYPE)


def decoding_of(
    folder: Path,
    config: Mapping[str, Any],
    reader: CheckpointReader,
    dtype: torch.dtype,
    *,
    asked: bool,
    trust_remote_code: bool,
) -> Decoding | None:
    """How the checkpoint in ``folder`` is decoded; None where it is a float model as it lies.

    8-bit floats and MXFP4, in which models are published by their authors, are decoded in any case; what a tool made
    of a float model only if that is ``asked`` for. Float weights are floats though their config says that they are
    quantized, as that of a merge may which was saved with its base's config.

    Raises:
        SourceError: it is quantized, and not decoded, with the way out.
        CheckpointError: its tensors do not fit each other.
    """
    said = quantization_of(config)
    method = str((said or {}).get("quant_method") or "")
    if said is None or method in native.METHODS or (method == "modelopt" and said.get("quant_algo") == "FP8"):
        found = native.native_tensors(reader, said or {}, dtype)
        if found is None and said is None:
            return None
        if found is not None:
            return Decoding(method or "fp8", found)
    if is_stale(said, reader):
        return None
    export = _readable(folder)
    if export is None:
        raise _refusal(folder, config, method, readable=False)
    if not asked and {scheme.kind for scheme in export.schemes.values()} != {"fp8"}:
        raise _refusal(folder, config, method, readable=True)
    return Decoding(_form(export), _packed_tensors(folder, export, dtype, trust_remote_code))


def _readable(folder: Path) -> Export | None:
    """The checkpoint as one of the formats that quantkit reads; None if it is none of them."""
    try:
        export = open_export(folder)
    except (CheckpointError, SchemeError):
        return None
    return export if export.schemes else None


def _form(export: Export) -> str:
    kinds = sorted({scheme.kind for scheme in export.schemes.values()})
    return f"{export.format} ({', '.join(kinds)})"


def _refusal(folder: Path, config: Mapping[str, Any], method: str, *, readable: bool) -> SourceError:
    named = config.get("_name_or_path")
    original = float_name(named) if isinstance(named, str) else None
    give = f"give the float model{f' ({original})' if original else ''}"
    what = f"quantization_config of {method}" if method else "quantization_config"
    way_out = (
        f"{give}, or set model.decode: true (quantize --decode), which decodes it and compares with that"
        if readable
        else f"{give}: this format is not read"
    )
    return SourceError(f"{folder} is quantized already ({what})", way_out)


def _packed_tensors(folder: Path, export: Export, dtype: torch.dtype, trust_remote_code: bool) -> list[DecodedTensor]:
    """The tensors of the float model, as transformers reads them: stacks whole, transposed ones transposed."""
    names = set(export.float_names())
    empty, state = empty_model(folder, trust_remote_code), decoded_state(export, torch.float32)
    stored = as_transformers_stores(layer_names(empty, state), state, names)
    floats = [
        DecodedTensor(name, export.float_shape(name), export.float_dtype(name), partial(_plain, export, name))
        for name in export.float_names()
    ]
    packed = [
        DecodedTensor(name, promise.shape or export.shape(name.removesuffix(".weight")), dtype, partial(_kept, promise))
        for name, promise in stored.items()
        if name not in names
    ]
    return [*floats, *packed]


def _kept(promise: Promise) -> Iterator[torch.Tensor]:
    yield promise[...]


def _plain(export: Export, name: str) -> Iterator[torch.Tensor]:
    yield export.float_tensor(name)
