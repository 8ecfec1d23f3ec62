"""Load an exported checkpoint, and check that every tensor found its place.

transformers loads the files as they are where it can; the reference decoder of
:mod:`quantkit.evaluation.decoded` loads every format that quantkit writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from quantkit.artifacts import read_json
from quantkit.errors import EvaluationError
from quantkit.evaluation.decoded import load_decoded, read_packing
from quantkit.evaluation.zero_points import packed_zero_points
from quantkit.formats import FORMATS
from quantkit.recipe import LoaderChoice

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

KEYS_SHOWN = 5
Loader = Literal["transformers", "reference"]
"""Who loads a checkpoint: transformers as it is, or the reference decoder as a float model."""


def resolve_device(name: str) -> torch.device:
    """The device that a recipe names; ``auto`` is CUDA where there is one.

    Raises:
        EvaluationError: it is not there, or neither a CPU nor a CUDA device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EvaluationError(f"'{name}' is not a device", "use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise EvaluationError(f"evaluation runs on cpu and cuda, not on '{name}'", "use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EvaluationError(
            f"device '{name}' is not there: {torch.cuda.device_count()} CUDA devices are visible to torch",
            "set evaluation.device to cpu",
        )
    return device if device.type == "cpu" else torch.device("cuda", device.index or 0)


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's folder.

    Raises:
        EvaluationError: the folder is missing or has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    _check_folder(folder)
    with _translated(folder, "the tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return tokenizer


def load_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a checkpoint's text model.

    Raises:
        EvaluationError: the folder is missing or its ``config.json`` unusable.
    """
    from transformers import AutoConfig

    _check_folder(folder)
    with _translated(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        text_config: PreTrainedConfig = config.get_text_config()
    return text_config


def choose_loader(folder: Path, wanted: LoaderChoice = "auto", dtype: torch.dtype | None = None) -> Loader:
    """Who loads a checkpoint.

    A float checkpoint is transformers' in any case. ``auto`` gives it also what it can load: a checkpoint that
    quantkit did not export, and a format of quantkit that it knows, whose packages are installed, and whose schemes
    it runs in this dtype.

    Args:
        folder: the checkpoint.
        wanted: ``auto``, or who shall load it.
        dtype: in which the model will compute; None is the checkpoint's own.

    Raises:
        EvaluationError: the folder is missing, or the reference decoder is wanted and the checkpoint does not say
            how its layers are packed.
    """
    _check_folder(folder)
    with _translated(folder, "config.json"):
        config = read_json(folder / "config.json")
        if "quantization_config" not in config:
            return "transformers"
    if wanted == "transformers":
        return "transformers"
    packing = read_packing(folder)
    if wanted == "reference":
        if packing is None:
            raise EvaluationError(
                f"{folder} has no manifest of quantkit that says how its layers are packed",
                "set evaluation.loader to transformers, or quantize again",
            )
        return "reference"
    if packing is None or packing.format not in FORMATS:
        return "transformers"
    store = FORMATS.get(packing.format)
    own = config.get("dtype") or config.get("torch_dtype") or "float32"
    runs = _name(dtype, own) in store.computes_in(set(packing.schemes.values()))
    return "transformers" if store.native and runs and all(map(_is_installed, store.requires)) else "reference"


def _name(dtype: torch.dtype | None, own: str) -> str:
    return own if dtype is None else str(dtype).removeprefix("torch.")


def load_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    loader: LoaderChoice = "auto",
) -> PreTrainedModel:
    """Load a checkpoint for inference, from safetensors only; with transformers packed weights stay packed.

    Args:
        folder: the checkpoint.
        device: where it runs.
        dtype: name of the compute dtype; ``auto`` is float32 on a CPU and the checkpoint's own on CUDA.
        trust_remote_code: run Python code that comes with the checkpoint.
        loader: see :func:`choose_loader`.

    Raises:
        EvaluationError: it cannot be loaded, or a tensor is missing, unexpected or of the wrong shape.
        QuantkitError: the reference decoder cannot read it.
    """
    computed = resolve_dtype(dtype, device)
    chosen = choose_loader(folder, loader, computed)
    with _translated(folder, "the model"):
        load = _load_decoded if chosen == "reference" else _load_with_transformers
        model, found = load(folder, computed, trust_remote_code)
    _check_tensors(folder, found)
    return model if model.device == device else model.to(device)


def _load_with_transformers(
    folder: Path, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    with packed_zero_points():
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are reported by _check_tensors, by name
            output_loading_info=True,
        )
    if found["missing_keys"]:
        found = {**found, "missing_keys": set(found["missing_keys"]) - _computed_names(model)}
    return model, found


def _computed_names(model: PreTrainedModel) -> set[str]:
    """Names of the buffers that no file holds, such as the normalizer of Gemma's embedding.

    compressed-tensors makes parameters of those of a module that it compresses; transformers then computes them as
    ever, but says that they were missing.
    """
    with torch.device("meta"):
        fresh = type(model)(model.config)
    return {name for name, _ in fresh.named_buffers()} - set(fresh.state_dict())


def _load_decoded(
    folder: Path, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    packing = read_packing(folder)
    if packing is None:
        raise EvaluationError(f"the manifest of {folder} is gone", "export the checkpoint again")
    return load_decoded(folder, packing, dtype=dtype, trust_remote_code=trust_remote_code)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype to compute in; None is the checkpoint's own."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise EvaluationError(f"{folder} is not a checkpoint: it has no config.json", "check the path")


def _check_tensors(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise for tensors that the model lacks, does not know, or wants in another shape."""
    problems = {
        "are missing": sorted(found["missing_keys"]),
        "are not known to the model": sorted(found["unexpected_keys"]),
        "have the wrong shape": sorted(str(key[0]) for key in found["mismatched_keys"]),
        "could not be read": sorted(map(str, found["error_msgs"])),
    }
    texts = [f"{len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names]
    if texts:
        raise EvaluationError(
            f"{folder} did not load whole: of its tensors {'; '.join(texts)}",
            "export the checkpoint again; its files do not match its config.json",
        )


def _listed(names: list[str]) -> str:
    rest = len(names) - KEYS_SHOWN
    return ", ".join(names[:KEYS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _translated(folder: Path, what: str) -> Iterator[None]:
    """Turn what libraries raise for broken files into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        lines = str(error).strip().splitlines() or [""]
        raise EvaluationError(
            f"{what} in {folder} cannot be loaded: {type(error).__name__}: {lines[0]}",
            "check that the checkpoint is whole and that the packages its format needs are installed",
        ) from error
