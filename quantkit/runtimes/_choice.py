"""Who loads a checkpoint to score it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.leftovers import is_quantized
from quantkit.errors import CheckpointError, EvaluationError
from quantkit.exports.adapter import adapter_beside
from quantkit.exports.manifest import read_manifest
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes._checkpoint import check_checkpoint, is_gguf, translated
from quantkit.runtimes.base import Runtime
from quantkit.schemes import Scheme, scheme_from_json
from quantkit.system.artifacts import read_json

AUTO = "auto"


def choose_runtime(path: Path, wanted: str = AUTO, dtype: str | None = None) -> type[Runtime]:
    """Who loads a checkpoint.

    A float checkpoint is transformers', unless a runtime of another interpreter is asked for. ``auto`` gives it also
    what it can load: a format of which quantkit knows nothing, and one that it knows to load there, if its packages are
    installed and its schemes run in this dtype. A GGUF file is llama.cpp's where that is installed and no adapter lies
    beside it. The reference decoder has the rest.

    Args:
        path: the checkpoint.
        wanted: ``auto``, or a runtime's name.
        dtype: in which the model will compute; None is the checkpoint's own.

    Raises:
        EvaluationError: there is no checkpoint, or the runtime does not serve it or cannot compute with the adapter
            that lies there.
        RecipeError: there is no such runtime.
        CheckpointError: the manifest is broken.
    """
    chosen = None if wanted == AUTO else RUNTIMES.get(wanted)
    served = chosen is not None and chosen.separate
    if not served and is_float(path):
        return RUNTIMES.get("transformers")
    if chosen is not None:
        check_adapter(path, chosen)
        check_turns(path, chosen)
        reason = refusal(path, chosen) if served else None
        if reason is not None:
            raise EvaluationError(f"{path} is not served: {reason}", "score it with loader auto or reference")
        return chosen
    if is_gguf(path):
        return RUNTIMES.get("llama.cpp" if _is_usable("llama.cpp") and not adapter_beside(path) else "reference")
    return RUNTIMES.get("transformers" if _transformers_loads(path, dtype) else "reference")


def refusal(path: Path, runtime: type[Runtime]) -> str | None:
    """Why a runtime does not load a checkpoint, a sentence; None where it does, or where quantkit cannot tell.

    Raises:
        EvaluationError: there is no checkpoint, or its config cannot be read.
    """
    check_checkpoint(path)
    if is_gguf(path):
        return f"quantkit gives {runtime.name} no GGUF files."
    if is_float(path):
        return None
    found = _format_in(path, _config(path)["quantization_config"])
    if found is None:
        return None
    return runtime.refusal(*found, embedding=(read_manifest(path) or {}).get("embedding") is not None)


def check_adapter(path: Path, runtime: type[Runtime]) -> None:
    """Refuse to leave out the adapter that lies beside a checkpoint.

    Raises:
        EvaluationError: there is one, and the runtime does not compute with it.
        CheckpointError: it belongs to another checkpoint.
    """
    if not runtime.adapters and adapter_beside(path) is not None:
        able = ", ".join(each.name for each in RUNTIMES if each.adapters)
        raise EvaluationError(
            f"{path} is computed with the adapter in it, which quantkit does not give to {runtime.name}",
            f"choose one of {able}, or give the checkpoint that the adapter was made for by itself",
        )


def check_turns(path: Path, runtime: type[Runtime]) -> None:
    """Refuse a runtime that would compute something else without a word, as it leaves inputs unturned.

    Raises:
        EvaluationError: it does.
        CheckpointError: the file asks runtimes for what quantkit does not have.
    """
    reason = None if is_gguf(path) else _turn_refusal(_config(path), runtime.name)
    if reason is not None:
        raise EvaluationError(f"{path}: {reason}", "choose reference, which needs no GPU")


def _turn_refusal(config: Mapping[str, Any], runtime: str) -> str | None:
    """Why a runtime does not compute what a checkpoint with this config is; None where it does, as far as is known."""
    found = config.get("quantization_config")
    store = next((each for each in FORMATS if each.reads(found)), None) if isinstance(found, Mapping) else None
    return store.turn_refusal(runtime) if store is not None and found and store.turns_in(found) else None


def is_float(path: Path) -> bool:
    """Whether a checkpoint is a folder of float weights, whatever its config says.

    Raises:
        EvaluationError: there is no checkpoint, or its config cannot be read.
    """
    check_checkpoint(path)
    return not is_gguf(path) and not is_quantized(path, _config(path))


def format_name(path: Path) -> str:
    """The name of a checkpoint's format: ``float`` for one that is not quantized, empty for one that nobody here knows.

    Raises:
        EvaluationError: there is no checkpoint, or its config cannot be read.
    """
    if is_float(path):
        return "float"
    if is_gguf(path):
        return "gguf"
    found = _format_in(path, _config(path)["quantization_config"])
    return "" if found is None else found[0].name


def _config(folder: Path) -> dict[str, Any]:
    with translated(folder, "config.json"):
        return dict(read_json(folder / "config.json"))


def _is_usable(name: str) -> bool:
    return name in RUNTIMES and RUNTIMES.get(name).missing() is None


def _transformers_loads(folder: Path, dtype: str | None) -> bool:
    """Whether transformers loads a packed checkpoint; what quantkit cannot tell is left to transformers."""
    config = _config(folder)
    found = _format_in(folder, config["quantization_config"])
    if found is None:
        return True
    store, schemes = found
    if not (read_manifest(folder) or {}).get("transformers_loads", True):
        return False
    if _turn_refusal(config, "transformers") is not None:
        return False
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return (
        store.loads_in("transformers")
        and (dtype or own) in store.computes_in(schemes)
        and all(map(is_installed, store.requires))
    )


def _format_in(folder: Path, config: Mapping[str, Any]) -> tuple[type[Format], Collection[Scheme]] | None:
    """Format and schemes of a checkpoint; None where quantkit does not know them."""
    manifest = read_manifest(folder)
    if manifest is not None:
        if manifest["format"] not in FORMATS:
            return None
        return FORMATS.get(manifest["format"]), {scheme_from_json(each) for each in manifest["layers"].values()}
    store = next((each for each in FORMATS if each.reads(config)), None)
    if store is None:
        return None
    try:
        return store, set(store.schemes_in(config, CheckpointReader(folder)).values())
    except CheckpointError:
        return None  # transformers may know what quantkit does not, and says what is wrong with it otherwise


def is_installed(package: str) -> bool:
    """Whether a package is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
