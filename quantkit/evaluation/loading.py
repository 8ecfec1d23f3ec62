"""Load an exported checkpoint as transformers does, and check that every tensor found its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from quantkit.errors import EvaluationError
from quantkit.evaluation.zero_points import packed_zero_points

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

KEYS_SHOWN = 5


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


def load_model(
    folder: Path, *, device: torch.device, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a checkpoint for inference, from safetensors only; packed weights stay packed.

    Args:
        folder: the checkpoint.
        device: where it runs.
        dtype: name of the compute dtype; ``auto`` is float32 on a CPU and the checkpoint's own on CUDA.
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        EvaluationError: it cannot be loaded, or a tensor is missing, unexpected or of the wrong shape.
    """
    from transformers import AutoModelForCausalLM

    _check_folder(folder)
    model: PreTrainedModel
    with _translated(folder, "the model"), packed_zero_points():
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_resolve_dtype(dtype, device),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            output_loading_info=True,
        )
    _check_tensors(folder, found)
    return model if model.device == device else model.to(device)


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


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
