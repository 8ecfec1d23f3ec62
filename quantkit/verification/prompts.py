"""The prompts on which runtimes are compared, and their tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import EvaluationError
from quantkit.records.sandbox import TemplateFailure, render_chat
from quantkit.runtimes._checkpoint import load_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "What is the capital of France, and which river runs through it?",
    "The lighthouse keeper wound the clock every evening at six, and on the night of the storm",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n",
    "A train leaves at 9:40 and travels 210 km at 84 km/h. It arrives at",
    "Pourquoi le ciel est-il bleu le jour et rouge le soir ? Expliquez en une phrase.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "works":',
    "1. Wash the rice.\n2. Add twice as much water.\n3. Bring it to the boil.\n4.",
    "水は百度で沸騰し、零度で凍る。Ωμέγα, naïve café — “quoted” ½ €5 🙂",
)
"""Of different kinds: a question, prose, code, arithmetic, another language, data, a list, and rare characters."""
FEWEST_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Prompts:
    """Texts as token ids: each as it stands, then each as a user's turn where the tokenizer has a chat template.

    Attributes:
        ids: of every prompt.
        chats: how many of them, at the end, went through the chat template.
        tokenizer: that made them.
    """

    ids: tuple[tuple[int, ...], ...]
    chats: int
    tokenizer: PreTrainedTokenizerBase

    @property
    def continued(self) -> int:
        """Which prompt is continued: the first chat, or the first of all."""
        return len(self.ids) - self.chats if self.chats else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(map(len, self.ids))

    @property
    def sha256(self) -> str:
        """Of the token ids."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()

    def text(self, ids: Sequence[int]) -> str:
        """A continuation in words, up to the end of the turn."""
        end = self.tokenizer.eos_token_id
        kept = list(ids)[: list(ids).index(end)] if end in ids else list(ids)
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


def tokenize(checkpoint: Path, texts: Sequence[str], *, trust_remote_code: bool) -> Prompts:
    """The texts as tokens of a checkpoint's tokenizer.

    Raises:
        EvaluationError: there is no tokenizer, its chat template fails, or a text is shorter than three tokens.
    """
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    plain = [tuple(tokenizer(text).input_ids) for text in texts]
    for text, ids in zip(texts, plain, strict=True):
        if len(ids) < FEWEST_TOKENS:
            raise EvaluationError(f"prompt '{text}' has {len(ids)} tokens", f"give {FEWEST_TOKENS} or more")
    chats = [_as_chat(tokenizer, text) for text in texts] if tokenizer.chat_template else []
    rows = load_config(checkpoint, trust_remote_code=trust_remote_code).vocab_size
    largest = max(token for ids in (*plain, *chats) for token in ids)
    if largest >= rows:
        raise EvaluationError(
            f"the tokenizer gives token id {largest}, and the model's vocabulary has {rows}",
            "the checkpoint's tokenizer belongs to another model",
        )
    return Prompts((*plain, *chats), len(chats), tokenizer)


def _as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    turn = [{"role": "user", "content": text}]
    variables = {**tokenizer.special_tokens_map, "add_generation_prompt": True}
    try:
        rendered = render_chat(str(tokenizer.get_chat_template()), turn, variables)
    except (TemplateFailure, ValueError) as error:
        raise EvaluationError(f"the chat template cannot be used: {error}", "mend chat_template.jinja") from error
    return tuple(tokenizer(rendered, add_special_tokens=False).input_ids)
