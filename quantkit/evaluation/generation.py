"""Greedy continuations of a prompt, up to the end of a turn, a stop word or a number of tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.runtimes.base import LoadedModel
from quantkit.system.artifacts import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"


def end_tokens(checkpoint: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids after which the model has nothing more to say: those of the tokenizer, the config and the generation config.

    Args:
        checkpoint: a folder, whose ``generation_config.json`` is read where there is one; or a GGUF file.
        config: of its text model.
        tokenizer: its own.
    """
    file = checkpoint / GENERATION_CONFIG
    written = read_json(file).get("eos_token_id") if file.is_file() else None
    return frozenset(_ids(written) | _ids(config.eos_token_id) | _ids(tokenizer.eos_token_id))


def continuation(
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    count: int,
    *,
    ends: Collection[int],
    stops: Collection[str] = (),
) -> str:
    """What the model says after a prompt, likeliest token by likeliest token, without special tokens.

    Args:
        model: as a runtime has loaded it.
        tokenizer: the model's.
        prompt: token ids.
        count: tokens at most.
        ends: ids that end it; none of them is in the text.
        stops: strings that end it; the text goes to the first of them.

    Raises:
        EvaluationError: prompt and continuation do not fit what the runtime was given room for.
    """
    ids: list[int] = []
    text = ""
    for token in islice(model.greedy(torch.tensor(prompt, dtype=torch.int64)), count):
        if token in ends:
            break
        ids.append(token)
        if stops:
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            if any(stop in text for stop in stops):
                break
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found, default=len(text))]


def _ids(given: Any) -> set[int]:
    if given is None:
        return set()
    return {int(each) for each in given} if isinstance(given, list | tuple) else {int(given)}
