"""The files that a tokenizer can be made of, the packages without which some of them are not read, and their reading.

``tekken.json``, Mistral's, has no settings beside it: which tokens begin and end a text, that a text begins with one,
and the words of a conversation are in the package mistral-common. transformers takes that package's own tokenizer where
it is installed, and another that begins no text where it is not. Here it is one tokenizer in both cases, the one of the
package ``tokenizers``, which GGUF files are written from, with mistral-common's settings; the package itself is needed
for the chat template and for older files that do not list their special tokens.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.chat_template import with_processor_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONE_OF = ("tokenizer.json", "tekken.json", "vocab.json", "*.model", "*.tiktoken")
"""A model's folder has one of these at least."""
TEKKEN = "tekken.json"
MISTRAL_COMMON = "mistral-common"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TEKKEN_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
"""What every ``tekken.json`` calls them."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary."""
    return any(True for pattern in ONE_OF for _ in folder.glob(pattern))


def missing_package(folder: Path) -> tuple[str, str] | None:
    """A vocabulary that cannot be read here, and what ``pip install`` would need to read it; None for nothing missing.

    ``tokenizer.json`` needs none, nor ``tekken.json`` that lists its special tokens; a ``.model`` is sentencepiece's,
    or tiktoken's lines of text.
    """
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        return None
    if (folder / TEKKEN).exists():
        named = _has_mistral_common() or _lists_special_tokens(folder / TEKKEN)
        return None if named else (TEKKEN, MISTRAL_COMMON)
    for file in sorted((*folder.glob("*.model"), *folder.glob("*.tiktoken"))):
        package = "tiktoken" if file.suffix == ".tiktoken" or _is_text(file) else "sentencepiece"
        if find_spec(package) is None:
            return file.name, package
    return None


def lacks_chat_template_for(folder: Path) -> str | None:
    """The package that would write the chat template of a folder that has none of its own; None where none would."""
    alone = is_tekken(folder) and not any((folder / name).exists() for name in TEMPLATES)
    return MISTRAL_COMMON if alone and not _has_mistral_common() else None


def is_tekken(folder: Path) -> bool:
    """Whether ``tekken.json`` is all that a folder's tokenizer can be made of."""
    return (folder / TEKKEN).exists() and not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))


def read_tokenizer(folder: Path, **given: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder as transformers reads it, whatever else is installed, with its processor's template.

    Args:
        folder: of the model.
        given: what ``AutoTokenizer.from_pretrained`` is given.
    """
    from transformers import AutoTokenizer

    settings = {"mistral_format": False} if (folder / TEKKEN).exists() else {}
    found = AutoTokenizer.from_pretrained(folder, **settings, **given)
    if is_tekken(folder):
        _set_up_tekken(found, folder)
    return with_processor_template(found, folder)


def _set_up_tekken(tokenizer: Any, folder: Path) -> None:
    """Give a tokenizer of ``tekken.json`` what mistral-common's does: special tokens, BOS before a text, a template."""
    from transformers.integrations.mistral.tokenizer import _resolve_chat_template

    vocabulary = tokenizer.get_vocab()
    for role, token in TEKKEN_TOKENS.items():
        if getattr(tokenizer, role, None) is None and token in vocabulary:
            setattr(tokenizer, role, token)
    if tokenizer.bos_token is not None:
        tokenizer.add_bos_token = True
    if not tokenizer.chat_template:
        tokenizer.chat_template = _resolve_chat_template(str(folder / TEKKEN), None)


def _has_mistral_common() -> bool:
    return find_spec("mistral_common") is not None


def _lists_special_tokens(file: Path) -> bool:
    """Whether a ``tekken.json`` has its special tokens, as those since 2024's end do; what is no JSON fails later."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return True
    return not isinstance(content, dict) or "special_tokens" in content


def _is_text(file: Path) -> bool:
    """Whether a vocabulary is lines of a token in base64 and its rank, and no protocol buffer."""
    with file.open("rb") as stream:
        first = stream.read(200).split(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit()
