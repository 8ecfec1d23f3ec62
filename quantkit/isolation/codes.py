"""Codes of a library, in a format of quantkit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.errors import CheckpointError, QuantizationError, SchemeError
from quantkit.exports.content import Content, Stored
from quantkit.exports.layer_store import LayerStore
from quantkit.exports.manifest import model_name
from quantkit.exports.writing import check_origin, write_export
from quantkit.formats import FORMATS
from quantkit.formats.base import Container, Format
from quantkit.isolation.checking import HEAD, Findings, check_layer
from quantkit.libraries._codes import CODES_FILE, SCHEMES_FILE
from quantkit.schemes import QuantizedWeight, Scheme, make_scheme
from quantkit.system.artifacts import read_json

if TYPE_CHECKING:
    from quantkit.quantization import Job

FIRST_CHOICE = "compressed-tensors"
TOLD_BY_CODES = ("int", "fp8", "nf4", "fp4", "mxfp4")
"""Kinds of scheme whose weights have no parts beside codes, scales and zero points."""


def read_schemes(folder: Path) -> dict[str, Scheme]:
    """The scheme of each layer that a library gave the codes of.

    Raises:
        QuantkitError: there are none, or one is not a scheme of quantkit.
    """
    if not (folder / CODES_FILE).is_file() or not (folder / SCHEMES_FILE).is_file():
        raise QuantizationError("it wrote no codes")
    try:
        data: Mapping[str, Any] = read_json(folder / SCHEMES_FILE)
        found = {
            name: make_scheme(keys["scheme"], {key: value for key, value in keys.items() if key != "scheme"})
            for name, keys in data.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{SCHEMES_FILE} cannot be read: {error}") from error
    if not found:
        raise QuantizationError("it quantized no layer")
    return found


def chosen_format(asked: str | None, schemes: Mapping[str, Scheme]) -> type[Format]:
    """The format for some schemes: the one that was asked for, else the first choice, else any, GGUF last.

    Raises:
        SchemeError: it does not store them, or none does.
    """
    if asked is not None:
        _check(FORMATS.get(asked), schemes)
        return FORMATS.get(asked)
    for store in sorted(FORMATS, key=lambda each: (each.name != FIRST_CHOICE, each.container == "gguf", each.name)):
        try:
            _check(store, schemes)
        except SchemeError:
            continue
        return store
    kinds = ", ".join(dict.fromkeys(scheme.describe() for scheme in schemes.values()))
    raise SchemeError(f"no format stores {kinds}", "choose other bits or another group_size")


def write_in_format(
    job: Job, codes: Path, schemes: Mapping[str, Scheme], store: Format, scratch: Path, folder: Path
) -> Findings:
    """Write codes as a checkpoint; all other tensors are the float model's.

    Args:
        job: with the float model.
        codes: folder that the library wrote.
        schemes: of its layers.
        store: the format.
        scratch: folder for layers on their way.
        folder: of the checkpoint.

    Raises:
        QuantkitError: codes and schemes do not fit each other or the model, or a value is not finite.
    """
    check_origin(type(store), job.source)
    reader, source = CheckpointReader(_alone(codes, scratch)), CheckpointReader(job.source)
    layers, findings = LayerStore(scratch / "layers", store), Findings()
    scales = FLOATS[store.scale_dtype(job.dtype)]
    for number, (layer, scheme) in enumerate(schemes.items()):
        weight = _weight(layer, scheme, reader, scales)
        check_layer(layer, weight, source, findings)
        layers.keep(layer, weight)
        layers.flush(str(number))
    findings.packed_bytes = layers.stored_bytes
    write_export(_content(job, schemes, layers, source, store.container), store, folder)
    return findings


def _check(store: type[Format], schemes: Mapping[str, Scheme]) -> None:
    for scheme in dict.fromkeys(schemes.values()):
        store.check(scheme)
    store.check_together(set(schemes.values()))


def _alone(codes: Path, scratch: Path) -> Path:
    """A folder with the codes under the name that a checkpoint has."""
    place = scratch / "codes"
    place.mkdir()
    (codes / CODES_FILE).rename(place / "model.safetensors")
    return place


def _weight(layer: str, scheme: Scheme, reader: CheckpointReader, dtype: torch.dtype) -> QuantizedWeight:
    if scheme.kind not in TOLD_BY_CODES or scheme.orders_columns or getattr(scheme, "double_quant", False):
        raise QuantizationError(f"{layer}: codes, scales and zero points do not tell a weight of {scheme.describe()}")
    codes = reader.read(f"{layer}.codes")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise QuantizationError(f"the codes of {layer} are not a matrix of uint8")
    if int(codes.max()) >= 1 << scheme.bits:
        raise QuantizationError(f"{layer} has a code of {int(codes.max())}, which is none of {scheme.describe()}")
    scheme.check_layer(*codes.shape)
    scales = reader.read(f"{layer}.scales")
    groups = scheme.grids().grouped(codes)
    wanted = list(groups.shape[:2])
    if list(scales.shape) != wanted:
        raise QuantizationError(f"{layer} has scales of shape {list(scales.shape)} in place of {wanted}")
    if not scales.isfinite().all():
        raise QuantizationError(f"{layer} has scales that are not finite")
    name = f"{layer}.zeros"
    if name in reader:
        zeros = reader.read(name)
    elif scheme.symmetric:
        zeros = torch.full_like(scales, getattr(scheme, "zero", 0))
    else:
        raise QuantizationError(f"{layer} is asymmetric and has no zero points")
    if list(zeros.shape) != wanted:
        raise QuantizationError(f"{layer} has zero points of shape {list(zeros.shape)} in place of {wanted}")
    floats = getattr(scheme, "zeros", "int") == "float"
    return QuantizedWeight(
        scheme, codes, scales.to(dtype), zeros.to(dtype) if floats else zeros.round().to(torch.uint8)
    )


def _content(
    job: Job, schemes: Mapping[str, Scheme], layers: LayerStore, source: CheckpointReader, container: Container
) -> Content:
    from quantkit.engine.skeleton import Skeleton

    skeleton = Skeleton(job.source, job.trust_remote_code)
    linears = {name: schemes.get(name) for name in skeleton.all_linears()}
    lost = [name for name in schemes if name not in linears]
    if lost:
        raise QuantizationError(f"it quantized {lost[0]}, which is no linear layer of the model")
    dropped = set(skeleton.left_out(all_unknown=container == "gguf"))
    unties = any(HEAD.search(name) for name in schemes)
    return Content(
        origin=job.source,
        dtype=job.dtype,
        linears=linears,
        packed={layer: layers.packed(layer) for layer in schemes},
        floats={
            name: Stored.of(source, name, finite=True)
            for name in source.names()
            if name not in dropped and name.removesuffix(".weight") not in schemes
        },
        digests=layers.digests(),
        unties=unties,
        runs_code=job.trust_remote_code,
        others=skeleton.others(),
        name=model_name(job.source_facts.get("reference")),
    )
