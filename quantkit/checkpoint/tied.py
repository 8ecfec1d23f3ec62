"""Whether head and embedding share one weight: what the config says, and what the tensors say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.model_class import text_part
from quantkit.checkpoint.names import Names
from quantkit.checkpoint.sizes import TEXT_PARTS

UNTIED = "config.json says that head and embedding share one weight, and they differ: each is kept"
TIED = "config.json says that the head has a weight of its own, and there is none: it is the embedding's"

Parts = Callable[[str], Iterable[torch.Tensor]]
"""Reads a tensor of the checkpoint by name, in parts that make it up in order."""


def tied_by_tensors(model: nn.Module, names: Names, parts: Parts) -> bool | None:
    """Whether head and embedding share one weight by the tensors, where that is not what the config says; else None.

    A head that is missing is the embedding where the class that the config names ties them on request.

    Args:
        model: as transformers builds it by the config.
        names: of the checkpoint's tensors.
        parts: reads a tensor.
    """
    pair = head_and_embedding(model)
    if pair is None:
        return None
    head, embedding = pair
    there = [names.sources(name) for name in pair]
    tied = model.get_parameter(head) is model.get_parameter(embedding)
    if tied and all(len(sources) == 1 for sources in there) and there[0] != there[1]:
        return None if _equal(parts(there[0][0]), parts(there[1][0])) else False
    same = names.shapes()[head] == names.shapes()[embedding]
    if not tied and not there[0] and there[1] and same and _is_named(model) and _can_tie(model, head):
        return True
    return None


def head_and_embedding(model: nn.Module) -> tuple[str, str] | None:
    """The parameters that are the weights of the output head and of the input embedding; None where one is missing."""
    text: Any = text_part(model)
    places = {id(module): name for name, module in model.named_modules()}
    head, embedding = text.get_output_embeddings(), text.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        return None
    return f"{places[id(head)]}.weight", f"{places[id(embedding)]}.weight"


def set_tied(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """A ``config.json`` that says whether head and embedding share one weight, also each of its models that does."""
    found = {**config, "tie_word_embeddings": tied}
    for name, part in config.items():
        if isinstance(part, dict) and ("tie_word_embeddings" in part or name in TEXT_PARTS):
            found[name] = {**part, "tie_word_embeddings": tied}
    return found


def _is_named(model: nn.Module) -> bool:
    """Whether the config names the model's class, which has the head, and not one that does without."""
    named = getattr(model.config, "architectures", None)
    return not named or type(model).__name__ in named


def _can_tie(model: nn.Module, head: str) -> bool:
    keys = getattr(text_part(model), "_tied_weights_keys", None) or ()
    return any(head == key or head.endswith(f".{key}") for key in keys)


def _equal(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> bool:
    """Whether two tensors in parts hold the same values; the parts of both are cut alike or not."""
    first, second = _rows(one), _rows(other)
    return all(
        a is not None and b is not None and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
        for a, b in zip_longest(first, second)
    )


def _rows(parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for part in parts:
        yield from torch.split(part, 4096)
