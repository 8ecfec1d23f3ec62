"""A model's tokenizer, the number of its tokens and its longest input, for calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.companions import PROCESSORS, TOKENIZERS, code_files, matching
from quantkit.checkpoint.tokenizer_files import lacks_chat_template_for, missing_package, read_tokenizer
from quantkit.errors import CalibrationError
from quantkit.system.artifacts import file_sha256, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEDY = "copy the tokenizer's files from the model's repository into the folder"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The longest input and the number of tokens of a model.

    Attributes:
        vocabulary: rows of its embedding; every token id is below.
        positions: the longest row that it was made for, where its config says so.
        template_package: the package, not installed, that would write its chat template, if it is one that must.
    """

    vocabulary: int
    positions: int | None
    template_package: str | None = None


def model_limits(folder: Path, trust_remote_code: bool = False) -> ModelLimits:
    """Read a model's limits from its ``config.json``.

    Raises:
        CalibrationError: there is no config that ``transformers`` knows, or it has no ``vocab_size``.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CalibrationError(f"cannot read the model's config in {folder}: {error}", "check the model") from error
    text = config.get_text_config()
    vocabulary: Any = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise CalibrationError(f"{folder / 'config.json'} has no vocab_size", "use a causal language model")
    positions: Any = getattr(text, "max_position_embeddings", None)
    longest = positions if isinstance(positions, int) else None
    return ModelLimits(vocabulary, longest, lacks_chat_template_for(folder))


def processor_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file from which a processor of images is made, by its name in ``folder``."""
    return {path.name: file_sha256(path) for path in matching(folder, PROCESSORS)}


def tokenizer_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that a tokenizer can be made of, by its path in ``folder``.

    Raises:
        CalibrationError: there is none.
    """
    found = matching(folder, TOKENIZERS)
    if not found:
        raise CalibrationError(f"{folder} holds no tokenizer", _REMEDY)
    files = sorted({*found, *code_files(folder)})
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of BOS if the tokenizer begins every sequence with it by default, else None."""
    bos: int | None = tokenizer.bos_token_id
    begins = tokenizer("x").input_ids[:1]
    return bos if bos is not None and begins == [bos] else None


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in ``folder``; nothing is fetched.

    Raises:
        CalibrationError: it is missing, broken or of an unknown kind.
    """
    missing = missing_package(folder)
    if missing is not None:
        raise CalibrationError(f"{folder} has its tokenizer in {missing[0]} alone", f"pip install {missing[1]}")
    try:
        if (folder / "tokenizer.json").exists():
            read_json(folder / "tokenizer.json")
        return read_tokenizer(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # what the tokenizers package raises for a broken file is Exception itself
        raise CalibrationError(f"cannot load the tokenizer in {folder}: {error}", _REMEDY) from error
