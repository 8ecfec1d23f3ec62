"""What a model is beside its weights: the files that go along into every copy and export of it, and no others.

A folder may hold anything: training data, the state of a trainer, adapters, logs. What is copied is on this list.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from quantkit.system.artifacts import mapping_or_nothing, translated_os_errors

CONFIGS = ("config.json", "generation_config.json")
PROCESSORS = ("*processor_config.json",)
"""How a model that sees or hears is given images and sound."""
TEMPLATES = ("chat_template.json", "*.jinja", "additional_chat_templates/*.jinja")
TOKENIZERS = (
    *TEMPLATES, "tokenizer.json", "*tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "vocab-*.json", "target_vocab.json", "entity_vocab.json", "merges.txt", "*.model",
    "tokenizer.model.v*", "*.tiktoken", "tekken.json", "*.spm", "bpe.codes", "dict.txt", "emoji.json",
    "byte_maps.json", "normalizer.json", "prophetnet.tokenizer", "word_shape.json", "word_pronunciation.json",
)  # fmt: skip
"""The files that tokenizers of transformers are made of, as ``vocab_files_names`` of its classes have them."""
VOICES = ("spk_dict.pt",)
"""Tensors of the voices of models that speak, without which transformers does not load these; read as tensors alone."""
EMBEDDERS = ("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "*_Pooling/config.json")
"""What sentence-transformers asks for beside a model of embeddings."""
MODEL = (*CONFIGS, *PROCESSORS, *TOKENIZERS, *VOICES, *EMBEDDERS)
_LICENCE = re.compile(r"(licen[cs]e|notice|copying|copyright|use_policy|acceptable_use|third.?party)", re.IGNORECASE)


def model_files(folder: Path, *, code: bool = False) -> list[Path]:
    """The files that make up a model beside its weights, sorted; with ``code`` the Python files that it is built by."""
    found = {*matching(folder, MODEL), *_named_vocabularies(folder)}
    return sorted(found | set(code_files(folder)) if code else found)


def licence_files(folder: Path) -> list[Path]:
    """Licences and notices."""
    return sorted(file for file in folder.iterdir() if file.is_file() and _LICENCE.match(file.name))


def copy_companions(origin: Path, target: Path, *, code: bool = False, licences_only: bool = False) -> None:
    """Copy what goes along with a model's weights: :func:`model_files` and its licences.

    Args:
        origin: the model.
        target: folder, there already.
        code: the Python files go along too.
        licences_only: licences and nothing else.

    Raises:
        OutputError: the folder cannot be written.
    """
    copy_files([*([] if licences_only else model_files(origin, code=code)), *licence_files(origin)], origin, target)


def copy_files(files: Iterable[Path], origin: Path, target: Path) -> None:
    """Copy files of a folder to the same places in another.

    Raises:
        OutputError: the folder cannot be written.
    """
    for file in files:
        place = target / file.relative_to(origin)
        with translated_os_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder that patterns name, sorted."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def asks_for_code(folder: Path) -> bool:
    """Whether a config beside the weights names Python code of its own (``auto_map``)."""
    return any(mapping_or_nothing(file).get("auto_map") for file in _configs(folder))


def code_files(folder: Path) -> list[Path]:
    """The Python files that ``auto_map`` of a model's configs names, and those that these import from beside them."""
    wanted = [module for names in _auto_maps(folder) for module in names]
    found: set[Path] = set()
    while wanted:
        file = folder / f"{wanted.pop().replace('.', '/')}.py"
        if file not in found and file.is_file():
            found.add(file)
            wanted += _imports(file, folder)
    return sorted(found)


def _auto_maps(folder: Path) -> Iterator[list[str]]:
    """The modules that each config names; those of other repositories (``org/name--module.Class``) are not here."""
    for file in _configs(folder):
        named = mapping_or_nothing(file).get("auto_map")
        values = named.values() if isinstance(named, dict) else [named]
        flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
        names = [each.rpartition(".")[0] for each in flat if isinstance(each, str) and "--" not in each]
        yield [name for name in names if re.fullmatch(r"\w+(\.\w+)*", name)]


def _configs(folder: Path) -> list[Path]:
    return matching(folder, ("config.json", "*tokenizer_config.json", *PROCESSORS))


def _imports(file: Path, folder: Path) -> list[str]:
    """The modules beside a Python file that it imports relatively, as seen from ``folder``."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):  # it is copied as it is; who runs it is told
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            place = file.parents[node.level - 1]
            if place.is_relative_to(folder):
                prefix = [*place.relative_to(folder).parts, *(node.module.split(".") if node.module else [])]
                found += [".".join(prefix)] if node.module else []
                found += [".".join([*prefix, alias.name]) for alias in node.names if alias.name.isidentifier()]
    return found


def _named_vocabularies(folder: Path) -> list[Path]:
    """Files beside the tokenizer that its config names as ``vocab_file`` and the like."""
    config = mapping_or_nothing(folder / "tokenizer_config.json")
    names = [value for key, value in config.items() if key.endswith("_file") and isinstance(value, str)]
    return [folder / name for name in names if name and Path(name).name == name and (folder / name).is_file()]
