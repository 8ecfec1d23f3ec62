"""The convert stage: a checkpoint of one format in, one of another out, with the same codes.

Where the schemes of two formats have the same grid, only the way of telling it differs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import FLOATS
from quantkit.checkpoint.companions import asks_for_code
from quantkit.errors import SchemeError
from quantkit.exports import Export, open_export
from quantkit.exports.layer_store import LayerStore
from quantkit.exports.manifest import read_manifest, write_manifest
from quantkit.exports.rewriting import content_of, float_dtype, floats_that_stay, model_of, origin_folder
from quantkit.exports.writing import check_origin, origin_remarks, write_export
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.schemes import IntScheme, QuantizedWeight, Scheme
from quantkit.schemes.rounding import INPUT_SCALE
from quantkit.system.artifacts import check_writable, new_folder, translated_os_errors, write_stage
from quantkit.system.distribution import own_version
from quantkit.system.scratch import workplace

STAGE = "convert"
SHIFT_ALLOWED = 0.1
"""How far a weight may move, in steps of its grid, where scales or minimums are stored in fewer bits."""


def convert(
    checkpoint: Path,
    to: str,
    out: Path,
    *,
    trust_remote_code: bool = False,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a quantized checkpoint in another format, with the same codes.

    Scales and minimums that the other format keeps in fewer bits are rounded, if that moves no weight by more than a
    tenth of a step.

    Args:
        checkpoint: folder or GGUF file, quantkit's or another tool's.
        to: name of a format.
        out: folder of the new checkpoint; it appears when it is whole.
        trust_remote_code: run Python code that comes with the checkpoint, to find its layers.
        on_layer: called with the number of layers done and their total.

    Returns:
        ``from``, ``format``, ``layers``, ``bits_per_weight``, ``largest_shift`` in steps of the grid, and ``notes``.

    Raises:
        SchemeError: the format cannot tell the grid of a layer.
        CheckpointError: the checkpoint is broken, or of a format that quantkit does not read.
        OutputError: ``out`` cannot be written.
    """
    check_writable(out, stage=STAGE, source=checkpoint)
    export, target = open_export(checkpoint), FORMATS.get(to)
    if export.turns and not target.turning:
        raise SchemeError(
            f"{checkpoint}: {next(iter(export.turns))} is given turned inputs (transform_config), which a {to} file "
            "cannot ask for",
            "quantize the float model again without the transform hadamard",
        )
    schemes = {layer: _placed(layer, target, export) for layer in export.schemes}
    with workplace(out, "convert") as work, _scratch(work) as scratch, new_folder(out, guests=True) as folder:
        origin = origin_folder(export, scratch / "origin")
        skeleton, mended = model_of(export, origin, trust_remote_code)
        linears = {name: schemes.get(name) for name in skeleton.all_linears()}
        _check_together(export, target, linears, schemes)
        dtype = float_dtype(export)
        floats = floats_that_stay(export, skeleton, target)
        check_origin(target, origin, [*floats, *(f"{layer}.weight" for layer in schemes)])
        layers = LayerStore(scratch / "layers", target(dtype), export.embedding)
        largest = 0.0
        for done, layer in enumerate(schemes, start=1):
            largest = max(largest, _move(export, layer, schemes[layer], FLOATS[target.scale_dtype(dtype)], layers))
            on_layer(done, len(schemes))
        store = target(dtype)
        trusted = trust_remote_code and asks_for_code(origin)
        write_export(content_of(export, origin, skeleton, schemes, layers, floats, code=trusted), store, folder)
        facts = _facts(export, store, origin, schemes, layers, largest, mended)
        _write_records(folder, checkpoint, export, schemes, facts, remote_code=trusted)
    return facts


LOST_CACHE = "this format does not say how runtimes store keys and values: the scales of the KV cache are left out"


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    """An empty folder for the time of the block; what a killed process left there is of no use."""
    folder = work / "convert"
    with translated_os_errors(work):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _placed(layer: str, target: type[Format], export: Export) -> Scheme:
    """The scheme in which the target stores a layer's grid."""
    with _named(layer):
        scheme = _target_scheme(export.schemes[layer], target, export.shape(layer))
        if layer == export.embedding:
            target.check_embedding(scheme)
    return scheme


def _move(export: Export, layer: str, scheme: Scheme, scales: torch.dtype, layers: LayerStore) -> float:
    """Pack a layer in the target format; how far its weights moved, in steps."""
    weight = _recast(export.weight(layer), scheme)
    moved = _shift(weight, layers.keep(layer, _with_scales_in(weight, scales)))
    layers.flush(layer)
    if not moved <= SHIFT_ALLOWED:
        raise SchemeError(
            f"{layer}: a weight of {scheme.describe()} would move by {moved:.2g} steps of its grid, "
            f"as scales are kept in {str(scales).removeprefix('torch.')}",
            "quantize the float model again, in this format",
        )
    return moved


def _check_together(
    export: Export, target: type[Format], linears: Mapping[str, Scheme | None], schemes: Mapping[str, Scheme]
) -> None:
    lost = [name for name in schemes if name not in linears and name != export.embedding]
    if lost:
        raise SchemeError(
            f"{export.path}: {lost[0]} is no linear layer of the model", "convert models with Linear layers"
        )
    target.check_together({scheme for scheme in linears.values() if scheme is not None})
    target(float_dtype(export)).quantization_config(linears)  # raises for what one checkpoint cannot hold


def _facts(
    export: Export,
    store: Format,
    origin: Path,
    schemes: Mapping[str, Scheme],
    layers: LayerStore,
    largest: float,
    mended: Sequence[str],
) -> dict[str, Any]:
    weights = sum(rows * columns for rows, columns in map(export.shape, schemes))
    return {
        "from": export.format,
        "format": store.name,
        "layers": len(schemes),
        "bits_per_weight": layers.stored_bytes * 8 / weights,
        "largest_shift": largest,
        "notes": [
            *mended,
            *([LOST_CACHE] if export.cache is not None and export.cache.name not in store.caches else []),
            *origin_remarks(store, origin, store.dtype, export.float_names()),
            *store.remarks(set(schemes.values())),
        ],
    }


def _write_records(
    folder: Path,
    checkpoint: Path,
    export: Export,
    schemes: Mapping[str, Scheme],
    facts: Mapping[str, Any],
    *,
    remote_code: bool,
) -> None:
    """The manifest of the new checkpoint, and the mark of a finished stage."""
    made_by = f"quantkit {own_version()}"
    origin = {"reference": str(checkpoint), "format": export.format, "made_by": export.made_by}
    layers = {name: scheme.to_json() for name, scheme in schemes.items()}
    identity = {"source": origin, "format": facts["format"], "layers": layers}
    write_manifest(
        folder,
        {
            "schema": 1,
            "created_by": made_by,
            "source": origin,
            "format": facts["format"],
            "layers": layers,
            "embedding": export.embedding,
            "remote_code": remote_code,
            "bits_per_weight": facts["bits_per_weight"],
            "largest_shift": facts["largest_shift"],
            **_transforms(checkpoint),
        },
    )
    write_stage(folder, STAGE, identity, facts=dict(facts))


def _transforms(checkpoint: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint says of the transforms that it was made with, if it does."""
    manifest = read_manifest(checkpoint if checkpoint.is_dir() else checkpoint.parent) or {}
    return {key: manifest[key] for key in ("transforms",) if key in manifest}


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Inside the block, what a format refuses is said with the name of the layer."""
    try:
        yield
    except SchemeError as error:
        raise SchemeError(f"{layer}: {error.problem}", error.remedy) from error


def _target_scheme(scheme: Scheme, store: type[Format], shape: tuple[int, int]) -> Scheme:
    """The scheme in which a format stores the grid of another scheme.

    Raises:
        SchemeError: it stores none that has this grid; the reason is the format's own.
    """
    refusal: SchemeError | None = None
    for candidate in _same_grid(scheme):
        try:
            store.check(candidate)
            store.check_layer(candidate, *shape)
        except SchemeError as error:
            refusal = refusal or error
            continue
        return candidate
    if refusal is None:
        raise SchemeError(f"format {store.name} has no scheme for {scheme.describe()}")
    raise refusal


def _recast(weight: QuantizedWeight, scheme: Scheme) -> QuantizedWeight:
    """The same codes and scales under a scheme of the same grid, as :func:`_target_scheme` gives it."""
    if scheme == weight.scheme:
        return weight
    zeros = weight.zeros
    if isinstance(scheme, IntScheme) and scheme.zeros == "float":
        zeros = zeros.to(torch.float32)
    return replace(weight, scheme=scheme, zeros=zeros)


def _with_scales_in(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    """Scales that a dtype of 16 bits holds; they are the only part of a weight that this may move."""
    if weight.parts.keys() - {INPUT_SCALE} or weight.scales.dtype == dtype or not isinstance(weight.scheme, IntScheme):
        return weight
    return replace(weight, scales=weight.scales.to(dtype))


def _shift(before: QuantizedWeight, after: QuantizedWeight) -> float:
    """The farthest that a weight moved, in steps of its grid."""
    moved = (after.dequantize(torch.float32) - before.dequantize(torch.float32)).abs()
    if not moved.any():
        return 0.0
    unit = replace(before, codes=torch.ones_like(before.codes), zeros=torch.zeros_like(before.zeros))
    steps = unit.dequantize(torch.float32).abs()
    return float((moved / steps.clamp_(min=torch.finfo(torch.float32).tiny)).max())


def _same_grid(scheme: Scheme) -> Iterator[Scheme]:
    """The scheme itself, and others that can tell the same values."""
    yield scheme
    if isinstance(scheme, IntScheme) and scheme.activations is None:
        if scheme.symmetric:
            yield replace(scheme, symmetric=False)
        if scheme.zeros == "int" and not scheme.desc_act:
            yield replace(scheme, symmetric=False, zeros="float")
