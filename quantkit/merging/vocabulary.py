"""The files beside the weights: config, tokenizer and chat template of the merged model."""

from __future__ import annotations

from pathlib import Path

from quantkit.checkpoint.companions import TOKENIZERS, copy_companions, copy_files, matching
from quantkit.checkpoint.older_keys import add_older_tokenizer_keys, with_older_keys
from quantkit.checkpoint.sizes import TEXT_PARTS
from quantkit.checkpoint.tied import set_tied
from quantkit.checkpoint.tokenizer_files import ONE_OF
from quantkit.errors import SourceError
from quantkit.merging.adapter import Adapter
from quantkit.runtimes._checkpoint import load_tokenizer
from quantkit.system.artifacts import file_sha256, read_json, translated_os_errors, write_json

TEMPLATES = ("chat_template.jinja", "chat_template.json")


def write_companions(
    base: Path, adapters: tuple[Adapter, ...], target: Path, *, rows: int | None, tied: bool | None, dtype: str | None
) -> list[str]:
    """Write all files but the weights.

    Args:
        base: folder of the base.
        adapters: whose tokenizer and chat template, where one has them, take the place of the base's.
        target: folder of the merged model.
        rows: of the embedding, where they are not the base's.
        tied: whether head and embedding share one weight, where that is not as in the base.
        dtype: of the weights, where it is not the base's own.

    Returns:
        What the user should know.

    Raises:
        SourceError: two adapters bring different tokenizers.
        OutputError: ``target`` cannot be written.
    """
    with translated_os_errors(target):
        copy_companions(base, target, code=True)
        notes = _take_tokenizer(adapters, target)
    config = read_json(base / "config.json")
    texts = [config, *(config[name] for name in TEXT_PARTS if isinstance(config.get(name), dict))]
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if rows is not None and "vocab_size" in part and any(part is each for each in texts):
            part["vocab_size"] = rows
        if dtype is not None and ("torch_dtype" in part or "dtype" in part or part is config):
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    write_json(target / "config.json", with_older_keys(config if tied is None else set_tied(config, tied)))
    add_older_tokenizer_keys(target)
    return notes


def check_tokenizer(folder: Path, rows: int, *, trust_remote_code: bool) -> None:
    """Check that every token has its row.

    Raises:
        SourceError: the tokenizer has tokens that the embedding has no row for.
        EvaluationError: the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        raise SourceError(
            f"the tokenizer has {tokens} tokens and the merged embedding {rows} rows",
            "the adapter was trained with added tokens and saved without their rows: "
            "save it again with save_embedding_layers=True",
        )


def tokenizer_files(adapter: Adapter) -> list[Path]:
    """The files of tokenizer and chat template that an adapter brings."""
    return matching(adapter.folder, TOKENIZERS)


def _take_tokenizer(adapters: tuple[Adapter, ...], target: Path) -> list[str]:
    bringing = [adapter for adapter in adapters if tokenizer_files(adapter)]
    if not bringing:
        return []
    first, files = bringing[0], tokenizer_files(bringing[0])
    for adapter in bringing[1:]:
        _check_same(first, adapter)
    whole = any(file.match(pattern) for file in files for pattern in ONE_OF)
    templated = any(file.name in TEMPLATES for file in files)
    for old in matching(target, TOKENIZERS if whole else TEMPLATES if templated else ()):
        old.unlink()
    copy_files(files, first.folder, target)
    what = "tokenizer and chat template" if whole else ", ".join(file.name for file in files)
    return [f"taken from adapter {first.origin}: {what}"]


def _check_same(first: Adapter, second: Adapter) -> None:
    one, other = ({file.name: file_sha256(file) for file in tokenizer_files(each)} for each in (first, second))
    for name in sorted(one.keys() & other.keys()):
        if one[name] != other[name]:
            raise SourceError(
                f"adapters {first.origin} and {second.origin} bring different files {name}",
                "remove the tokenizer's files from the folder of one of them",
            )
