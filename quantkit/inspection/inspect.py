"""All that can be told of a checkpoint, as a mapping that JSON holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.leftovers import is_quantized, leftovers
from quantkit.checkpoint.older_keys import TOKENIZER_CONFIG, newer_than
from quantkit.errors import CheckpointError
from quantkit.exports import Export, find_gguf, open_export
from quantkit.exports.folder import FolderExport, read_config
from quantkit.exports.manifest import read_manifest
from quantkit.formats import FORMATS
from quantkit.inspection.layers import layer_facts
from quantkit.inspection.loading import loads, loads_float
from quantkit.inspection.mixed import mix_facts, mix_in, mix_problems
from quantkit.inspection.parallel import tensor_parallel
from quantkit.inspection.problems import (
    architecture_problems,
    float_problems,
    fused_problems,
    ignored_scales,
    layer_problems,
    leftover_problems,
    own_code,
    scale_problems,
)
from quantkit.inspection.published import DECODED, published_layers
from quantkit.system.artifacts import STAGE_FILE, mapping_or_nothing, read_json

SCHEMA = 1
SERVER = "vllm"
"""The runtime that splits layers over devices, as SGLang does."""


def inspect(path: Path, *, deep: bool = True) -> dict[str, Any]:
    """Describe a checkpoint: a folder of safetensors or a GGUF file, quantized or float, of quantkit or not.

    Memory holds one decoded layer.

    Args:
        path: the checkpoint.
        deep: decode the layers for outliers, codes and scales, and compare the tensors with those of the model class;
            without it only headers and tensors of a few bytes are read.

    Returns:
        ``schema``; ``path``; ``kind``, ``quantized`` or ``float``; ``format``; ``made_by``; ``deep``; ``bytes`` on
        disk; ``parameters``; ``quantized_weights``; ``bits_per_weight`` over these, None where there are none;
        ``layers``, see :func:`quantkit.inspection.layers.layer_facts`, with ``nats``, by how much the errors of each
        are predicted to raise the model's divergence, in nats a token, where quantkit found that out; ``schemes``,
        ``layers``, ``weights``, ``bytes`` and ``bits_per_weight`` of each; ``floats``, name, shape, dtype and bytes of
        each other tensor; ``float_dtypes``, tensors, parameters and bytes of each; ``activation_scales``, names;
        ``turned``, the layers whose inputs runtimes have to turn; ``kv_cache``, None or in what servers are asked to
        store keys and values;
        ``allocation``, None or how its schemes are mixed, see :func:`quantkit.inspection.mixed.mix_facts`;
        ``tensor_parallel``, None or ``sizes`` over which servers can split it and ``limits``, by size what stands in
        the way of others; ``loads``, lines on what loads it; ``remarks`` of its format; ``problems``, a line each.

    Raises:
        CheckpointError: there is no checkpoint, it is broken, or of a format that quantkit does not read.
        SchemeError: it names a scheme that quantkit does not have.
    """
    if _is_float(path):
        return _float_facts(path, deep=deep)
    try:
        export = open_export(path)
    except CheckpointError:
        published = _published_facts(path)
        if published is None:
            raise
        return published
    nats = _predicted(path)
    layers = [layer_facts(export, name, deep=deep) for name in export.schemes]
    layers = [{**each, "nats": nats[each["name"]]} if each["name"] in nats else each for each in layers]
    floats = [_float_fact(name, export.float_shape(name), export.float_dtype(name)) for name in export.float_names()]
    found = _facts(path, "quantized", export.format, export.made_by, export.size_bytes(), layers, floats, deep=deep)
    known = isinstance(export, FolderExport)
    store = FORMATS.get(export.format)
    schemes = set(export.schemes.values())
    found["activation_scales"] = export.activation_scales() if isinstance(export, FolderExport) else []
    found["kv_cache"] = None if export.cache is None else export.cache.describe()
    whole = not ignored_scales(export)
    found["turned"] = len(export.turns)
    found["loads"] = loads(store, schemes, export.config(), whole=whole, turned=bool(export.turns))
    if known and SERVER in store.runtimes:
        found["tensor_parallel"] = tensor_parallel(export).to_json()
    found["remarks"] = list(export.remarks() if isinstance(export, FolderExport) else store().remarks(schemes))
    found["remarks"] += _loading(path) if known else []
    found["problems"] = [*_problems(export, layers, deep=deep, folder=known), *mix_problems(path)]
    mix = mix_in(path)
    found["allocation"] = None if mix is None else mix_facts(mix)
    return found


def _predicted(path: Path) -> dict[str, float]:
    """By layer what its errors are predicted to cost, as the stage that wrote a checkpoint found it."""
    facts = mapping_or_nothing(path / STAGE_FILE).get("facts") if path.is_dir() else None
    layers = facts.get("layers") if isinstance(facts, dict) else None
    return {each["name"]: each["nats"] for each in layers or () if isinstance(each, dict) and "nats" in each}


def _problems(export: Export, layers: list[dict[str, Any]], *, deep: bool, folder: bool) -> list[str]:
    found = [*fused_problems(export), *layer_problems(layers)]
    if folder:
        found += [*leftover_problems(export), *scale_problems(export)]
        found += leftovers(export.path, read_config(export.path), CheckpointReader(export.path))
    if deep:
        found += architecture_problems(export.config(), set(export.float_names()), set(export.schemes))
    return found


def _loading(folder: Path) -> list[str]:
    """What loaders need, and what older ones and servers that pin them read otherwise, a line each."""
    tokenizer = folder / TOKENIZER_CONFIG
    said = read_json(tokenizer) if tokenizer.is_file() else {}
    found = newer_than(read_config(folder), said if isinstance(said, dict) else {})
    code = own_code(read_config(folder))
    needed = f"its model class {code} is Python code that lies beside it: it needs --trust-remote-code"
    return [needed] * bool(code) + [f"releases before transformers 5 misread {what}" for what in found]


def _is_float(path: Path) -> bool:
    """Whether a path is a folder that says nothing of quantization."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}", "check the path")
    if find_gguf(path) is not None:
        return False
    config = read_config(path)
    manifest = read_manifest(path)
    return not is_quantized(path, config) and not (manifest and manifest["layers"])


def _float_facts(folder: Path, *, deep: bool) -> dict[str, Any]:
    config, reader = read_config(folder), CheckpointReader(folder)
    floats = [_float_fact(name, reader.shape(name), reader.dtype(name)) for name in reader.names()]
    manifest = read_manifest(folder)
    made_by = f"transformers {config['transformers_version']}" if config.get("transformers_version") else "unknown"
    if manifest is not None:
        made_by = str(manifest.get("created_by", made_by))
    size = sum(file.stat().st_size for file in reader.files())
    found = _facts(folder, "float", "float", made_by, size, [], floats, deep=deep)
    found["loads"] = loads_float()
    found["remarks"] = _loading(folder)
    found["problems"] = [*leftovers(folder, config, reader), *(float_problems(config, reader) if deep else [])]
    return found


def _published_facts(folder: Path) -> dict[str, Any] | None:
    """A model that its authors publish in fewer bits than 16, by its headers alone; None where it is none."""
    if not (folder / "config.json").is_file():
        return None
    config, reader = read_config(folder), CheckpointReader(folder)
    layers = published_layers(reader)
    if not layers:
        return None
    packed = {name for layer in layers for name in layer.pop("tensors")}
    rest = [name for name in reader.names() if name not in packed]
    floats = [_float_fact(name, reader.shape(name), reader.dtype(name)) for name in rest]
    said = config.get("quantization_config")
    method = said.get("quant_method", "unknown") if isinstance(said, dict) else "unknown"
    size = sum(file.stat().st_size for file in reader.files())
    found = _facts(folder, "quantized", f"{method}, as published", "its authors", size, layers, floats, deep=False)
    found["loads"] = loads_float()
    found["remarks"] = [DECODED]
    return found


def _facts(
    path: Path,
    kind: str,
    form: str,
    made_by: str,
    size: int,
    layers: list[dict[str, Any]],
    floats: list[dict[str, Any]],
    *,
    deep: bool,
) -> dict[str, Any]:
    weights, packed = sum(layer["weights"] for layer in layers), sum(layer["bytes"] for layer in layers)
    return {
        "schema": SCHEMA,
        "path": str(path),
        "kind": kind,
        "format": form,
        "made_by": made_by,
        "deep": deep,
        "bytes": size,
        "parameters": weights + sum(each["parameters"] for each in floats),
        "quantized_weights": weights,
        "bits_per_weight": packed * 8 / weights if weights else None,
        "layers": layers,
        "schemes": _by_scheme(layers),
        "floats": floats,
        "float_dtypes": _by_dtype(floats),
        "activation_scales": [],
        "kv_cache": None,
        "turned": 0,
        "allocation": None,
        "tensor_parallel": None,
        "loads": [],
        "remarks": [],
        "problems": [],
    }


def _float_fact(name: str, shape: Iterable[int], dtype: Any) -> dict[str, Any]:
    sizes = list(shape)
    count = math.prod(sizes)
    written = str(dtype).removeprefix("torch.")
    return {"name": name, "shape": sizes, "dtype": written, "parameters": count, "bytes": count * dtype.itemsize}


def _by_scheme(layers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for layer in layers:
        total = found.setdefault(layer["scheme"], {"layers": 0, "weights": 0, "bytes": 0, "bits_per_weight": 0.0})
        total["layers"] += 1
        total["weights"] += layer["weights"]
        total["bytes"] += layer["bytes"]
        total["bits_per_weight"] = total["bytes"] * 8 / total["weights"]
    return found


def _by_dtype(floats: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for each in floats:
        total = found.setdefault(each["dtype"], {"tensors": 0, "parameters": 0, "bytes": 0})
        total["tensors"] += 1
        total["parameters"] += each["parameters"]
        total["bytes"] += each["bytes"]
    return found
