"""What every runtime needs of a checkpoint beside its weights: its kind, its config and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.checkpoint.adapter_folder import adapter_in
from quantkit.checkpoint.reader import PICKLES, CheckpointReader
from quantkit.checkpoint.sizes import check_sizes
from quantkit.checkpoint.tokenizer_files import missing_package, read_tokenizer
from quantkit.errors import EvaluationError, QuantkitError
from quantkit.exports import find_gguf, open_export
from quantkit.system.artifacts import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a checkpoint is one GGUF file, or a folder that holds one and no ``config.json``."""
    return find_gguf(path) is not None


def check_checkpoint(path: Path) -> None:
    """Check that there is something to load.

    Raises:
        EvaluationError: there is not.
        CheckpointError: there are pickles alone.
    """
    if path.is_file() and not _begins_as_gguf(path):
        raise EvaluationError(f"{path} is neither a folder nor a GGUF file", "name the folder of the checkpoint")
    adapter = adapter_in(path)
    if adapter is not None:
        raise EvaluationError(*adapter)
    if not is_gguf(path) and not (path / "config.json").is_file():
        raise EvaluationError(f"{path} is not a checkpoint: it has no config.json", "check the path")
    if not any(path.glob("*.safetensors")) and any(file for pattern in PICKLES for file in path.glob(pattern)):
        CheckpointReader(path)  # refuses pickles with the way to convert them


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def load_tokenizer(path: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        EvaluationError: the checkpoint is missing or has no usable tokenizer.
    """
    check_checkpoint(path)
    with translated(path, "the tokenizer"):
        export = open_export(path) if is_gguf(path) else None  # its tokenizer's folder goes when it goes
        folder = path if export is None else export.tokenizer_folder()
        missing = missing_package(folder)
        if missing is not None:
            raise EvaluationError(f"{path} has its tokenizer in {missing[0]} alone", f"pip install {missing[1]}")
        return read_tokenizer(folder, trust_remote_code=trust_remote_code)


def load_config(path: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a checkpoint's text model.

    Raises:
        EvaluationError: the checkpoint is missing or its config unusable.
    """
    check_checkpoint(path)
    if not is_gguf(path):
        with translated(path, "config.json"):
            given = read_json(path / "config.json")
        check_sizes(given if isinstance(given, dict) else {}, str(path / "config.json"), path)
    with translated(path, "config.json"):
        text_config: PreTrainedConfig = whole_config(path, trust_remote_code=trust_remote_code).get_text_config()
    return text_config


def whole_config(path: Path, *, trust_remote_code: bool) -> Any:
    """The configuration that transformers makes of a checkpoint's; that of a GGUF file is read from its head."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if not is_gguf(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    found = open_export(path).config()
    return CONFIG_MAPPING[found["model_type"]].from_dict(found)


@contextmanager
def translated(path: Path, what: str) -> Iterator[None]:
    """Turn what libraries raise for broken files into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except QuantkitError:
        raise
    except Exception as error:  # the tokenizers package raises Exception itself, transformers whatever befalls it
        lines = str(error).strip().splitlines() or [""]
        if "trust_remote_code" in str(error):
            raise EvaluationError(
                f"{what} in {path} needs Python code that comes with it (auto_map), which does not run here",
                "read that code, and set model.trust_remote_code: true (--trust-remote-code) if you trust it",
            ) from error
        raise EvaluationError(
            f"{what} in {path} cannot be loaded: {type(error).__name__}: {lines[0]}",
            "check that the checkpoint is whole and that the packages its format needs are installed",
        ) from error
