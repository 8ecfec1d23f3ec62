"""The chat template of a model whose processor, and not its tokenizer, has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROCESSOR_FILES = ("chat_template.json", "processor_config.json")
"""Where processors of models that see or hear keep it, beside ``chat_template.jinja``, which tokenizers read, too."""


def with_processor_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer with the chat template of the processor beside it, where it has none of its own."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = next(filter(None, (_template(folder / name) for name in PROCESSOR_FILES)), None)
    return tokenizer


def _template(file: Path) -> str | None:
    """The template in a processor's file; None where there is none, or the file is none that a processor reads."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = content.get("chat_template") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None
