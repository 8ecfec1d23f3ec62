"""The columns of a row by what they mean: what people call them, and what a recipe says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from quantkit.errors import CalibrationError, did_you_mean
from quantkit.recipe.columns import MEANINGS

NAMES = {
    "messages": (
        "messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns", "contents", "message_list",
        "trajectory",
    ),
    "prompt": (
        "instruction", "prompt", "question", "problem", "query", "request", "user", "human", "user_prompt",
        "input_text", "instructions", "task", "message",
    ),
    "query": ("input", "query", "context", "inputs", "passage", "question", "problem"),
    "response": (
        "output", "response", "completion", "solution", "answer", "reply", "target", "target_text", "output_text",
        "assistant", "outputs", "responses", "completions", "solutions", "answers", "final_answer", "ground_truth",
        "generation", "generations", "ideal", "model_answer", "expected_output", "gpt", "bot",
    ),
    "chosen": (
        "chosen", "accepted", "preferred", "preferred_output", "chosen_response", "response_chosen",
        "preferred_response", "full_chosen",
    ),
    "system": ("system", "system_prompt", "system_message", "systeminstruction", "system_instruction"),
    "history": ("history", "chat_history"),
    "tools": ("tools", "functions", "available_tools"),
    "reasoning": ("reasoning_content", "reasoning", "thinking", "complex_cot", "chain_of_thought", "cot", "rationale"),
    "wanted": ("kto_tag", "label"),
    "text": ("text", "content", "raw_content", "document", "page_content", "sentence", "article", "code", "markdown"),
    "images": ("images", "image"),
}  # fmt: skip
"""What columns are called, without regard to case, blanks and hyphens; the first that holds something is it."""
ASKS_ALONE = ("prompt", "question", "problem", "query")
"""Columns that ask something even where no answer stands beside them."""
FORMATS = ("messages", "chosen", "prompt", "query", "response", "text")
"""Columns of which one makes a row a record."""
BESIDE = {
    "messages": {"messages", "chosen"},
    "text": {"text"},
    **{key: {"prompt", "query", "response", "chosen"} for key in ("prompt", "query", "response", "history")},
    "chosen": {"messages", "prompt", "query", "chosen"},
}
"""With each column that a recipe names, those that count without being named."""
UNKNOWN_FORMAT = "no known format"
_KEYS_SHOWN = 12


class Fields:
    """The columns of a row that mean something, by what they mean.

    Args:
        row: with its columns.
        columns: of a recipe, see :data:`quantkit.recipe.columns.MEANINGS`.
        others: columns that are not among these are looked for as usual.
        prompts: any question needs no answer.
    """

    def __init__(
        self, row: Mapping[str, Any], columns: Mapping[str, str], others: bool = True, prompts: bool = False
    ) -> None:
        self._row = row
        self._prompts = prompts
        self._named = {MEANINGS[name]: column for name, column in columns.items()}
        keys = {plain(key): key for key in reversed(list(row))}
        allowed = set(NAMES)
        for meaning in set(self._named) & set(BESIDE):
            allowed -= set(FORMATS) - BESIDE[meaning]
        usual = allowed - set(self._named) if others or not columns else set()
        self._columns: dict[str, str] = {}
        for meaning in NAMES:
            if meaning in self._named:
                there = [self._named[meaning]] if self._named[meaning] in row else []
            else:
                there = [keys[name] for name in NAMES[meaning] if name in keys] if meaning in usual else []
            free = [key for key in there if key not in self._columns.values()]
            chosen = next((key for key in free if _holds(row[key])), free[0] if free else None)
            if chosen is not None:
                self._columns[meaning] = chosen

    def __contains__(self, meaning: str) -> bool:
        """Whether it is there and holds something."""
        return meaning in self._columns and _holds(self._row[self._columns[meaning]])

    def __getitem__(self, meaning: str) -> Any:
        """What it holds; None where it holds nothing."""
        return self._row[self._columns[meaning]] if meaning in self else None

    def column(self, meaning: str) -> str:
        """Its name in the data set."""
        return self._columns.get(meaning, self._named.get(meaning, meaning))

    def is_blank(self, meaning: str) -> bool:
        """Whether it is there and holds nothing, or was promised and is not there."""
        return meaning not in self and (
            (meaning in self._columns and self._row[self._columns[meaning]] is not None) or meaning in self._named
        )

    def asks(self) -> bool:
        """Whether it is a question, with an answer or without one."""
        if not ("prompt" in self or "query" in self):
            return False
        if self._prompts or "response" in self or "chosen" in self or {"prompt", "query"} & set(self._named):
            return True
        asked = plain(self.column("prompt" if "prompt" in self else "query"))
        return asked in ASKS_ALONE and not ("text" in self and self.column("text").lower() == "text")

    def why_not(self) -> str:
        """Why it is no record."""
        answers = ("response", "prompt") if "prompt" in self else ("prompt", "response")
        order = ("messages", "chosen", *answers, "text", "query")
        blank = next((meaning for meaning in order if self.is_blank(meaning)), None)
        return self.blank_reason(blank) if blank else f"{UNKNOWN_FORMAT} (keys: {listed(self._row)})"

    def blank_reason(self, meaning: str) -> str:
        """Why one that is blank makes the row unusable."""
        column = self.column(meaning)
        if self._row.get(column) is None:
            return f"has no '{column}' (keys: {listed(self._row)})"
        return f"'{column}' is empty" if isinstance(self._row[column], str) else f"'{column}' holds no message"


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Check a renaming: each key is a name that a format knows, each value a column of the data set.

    Raises:
        CalibrationError: a key is unknown.
    """
    for name in columns or {}:
        if name not in MEANINGS:
            raise CalibrationError(f"unknown column name '{name}'", did_you_mean(name, MEANINGS))


def listed(row: object) -> str:
    """The keys of a row, for messages."""
    keys = [str(key) for key in row] if isinstance(row, Mapping) else []
    more = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
    return ", ".join(keys[:_KEYS_SHOWN]) + more if keys else "none"


def _holds(value: Any) -> bool:
    """Whether a column holds anything: null, a missing number of a table, blanks and empty lists are nothing."""
    if value is None or value != value:
        return False
    return bool(value.strip()) if isinstance(value, str) else not (isinstance(value, list | dict) and not value)


@lru_cache(maxsize=4096)
def plain(key: str) -> str:
    """A column's name without regard to case, blanks and hyphens."""
    return re.sub(r"[\s-]+", "_", key.strip().lower())
