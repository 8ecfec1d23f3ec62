"""Convert whatever there is: a quantized checkpoint to another format, a float model to a file, codes to floats."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from quantkit.checkpoint.leftovers import quantization_of
from quantkit.errors import CheckpointError, SchemeError
from quantkit.exports import Export, open_export
from quantkit.exports.convert import LOST_CACHE, convert
from quantkit.exports.manifest import read_manifest
from quantkit.formats import FORMATS
from quantkit.pipeline.single import quantize_one
from quantkit.recipe.single import single_recipe
from quantkit.source.model import decoded_from
from quantkit.system.artifacts import mapping_or_nothing
from quantkit.system.names import chosen
from quantkit.system.progress import Observer

FLOAT = "float"
DTYPES = ("float16", "bfloat16", "float32")
FLOATS = (FLOAT, "gguf")
"""Formats that hold a float model."""


def convert_any(
    checkpoint: str, to: str, out: Path, observer: Observer, *, dtype: str = "auto", trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write a model in another format.

    A quantized checkpoint keeps its codes; with ``to`` of ``float`` it is decoded. A float model, or one that its
    authors publish in 8-bit floats, becomes a float checkpoint or a float GGUF file.

    Args:
        checkpoint: folder or GGUF file; of a float model also a hub id.
        to: name of a format, or ``float16``, ``bfloat16`` or ``float32`` for a float checkpoint of that dtype.
        out: folder of the new checkpoint.
        observer: is told what happens.
        dtype: of a float checkpoint or file, see :class:`quantkit.recipe.ModelSpec`.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        See :func:`quantkit.exports.convert.convert`; of floats ``layers`` is 0, and there are ``dtype``, ``float``, and
        ``decoded``, what they were decoded from, or None.

    Raises:
        QuantkitError: the format does not hold it, with what does; the checkpoint is broken.
    """
    floats = chosen(to, DTYPES)
    target = FLOAT if floats else FORMATS.name_of(to)
    export = _quantized(Path(checkpoint).expanduser(), target)
    if export is not None and target != FLOAT:
        if dtype != "auto":
            raise SchemeError(f"--dtype is of floats, and {checkpoint} keeps its codes in {target}", "leave it out")
        on_layer = partial(observer.progress, "layer")
        return convert(export.path, target, out, trust_remote_code=trust_remote_code, on_layer=on_layer)
    if target not in FLOATS:
        raise SchemeError(
            f"{checkpoint} is a float model, and format {target} holds codes",
            f"quantize it (quantkit quantize --format {target}), or convert it to float or gguf",
        )
    told = {"source": checkpoint, "dtype": floats or dtype, "decode": True, "trust_remote_code": trust_remote_code}
    variant = {"name": "converted", "method": "none", "format": target, "scheme": "float"}
    recipe, _ = single_recipe(told, variant)
    quantize_one(recipe, out, observer)
    return _facts(out, target) | {"notes": [] if export is None else _lost(export)}


def _quantized(path: Path, target: str) -> Export | None:
    """The checkpoint with its codes; None for a float model, and for one that only the source stage can decode."""
    config = path / "config.json"
    if not path.exists() or (config.is_file() and quantization_of(mapping_or_nothing(config)) is None):
        return None
    try:
        export = open_export(path)
    except CheckpointError:
        if config.is_file() and target in FLOATS:
            return None
        raise
    return export if export.schemes else None


def _lost(export: Export) -> list[str]:
    """What a checkpoint asks of runtimes beside its weights, and a float one does not."""
    roundings = {each.describe() for layer in export.schemes if (each := export.input_rounding(layer)) is not None}
    told = f"a float model's inputs are not rounded, as those of this checkpoint are: {', '.join(sorted(roundings))}"
    return [*([told] if roundings else []), *([LOST_CACHE] if export.cache is not None else [])]


def _facts(out: Path, target: str) -> dict[str, Any]:
    manifest = read_manifest(out) or {}
    source = manifest.get("source", {})
    decoded = decoded_from(source)
    return {
        "from": decoded or FLOAT,
        "format": target,
        "layers": 0,
        "bits_per_weight": manifest.get("bits_per_weight_file"),
        "largest_shift": 0.0,
        "float": True,
        "dtype": source.get("dtype"),
        "decoded": decoded,
    }
