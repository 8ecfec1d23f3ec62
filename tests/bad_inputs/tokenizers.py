"""Tokenizers that are broken, or do not agree with the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place, edit_json

FILE = "tokenizer.json"


def model_with(place: Place, edit: Callable[[dict[str, Any]], object], name: str = "single") -> Path:
    folder = place.copy(name)
    content = json.loads((folder / FILE).read_text())
    edit(content)
    (folder / FILE).write_text(json.dumps(content))
    return folder


def with_file(place: Place, content: str | bytes) -> Path:
    folder = place.copy("single")
    (folder / FILE).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def calibrated(place: Place, model: Path) -> list[str]:
    """A run that reads text with the tokenizer."""
    options = ["--method", "gptq", "--group-size", "32", "--calibration", place.sound("data.jsonl"), "--samples", "4"]
    return ["quantize", str(model), "-o", place.out, *options]


def scored(checkpoint: Path) -> list[str]:
    return ["evaluate", str(checkpoint), "--context-length", "32", "--max-tokens", "64"]


def renumbered(content: dict[str, Any]) -> None:
    """Letters whose ids lie beyond every embedding."""
    vocabulary = content["model"]["vocab"]
    for token in [token for token in vocabulary if len(token) == 1 and token.isalpha()]:
        vocabulary[token] += 1_000_000


@case("tokenizer")
def none(place: Place) -> list[str]:
    folder = place.copy("single")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return place.quantize(folder)


@case("tokenizer")
def empty(place: Place) -> list[str]:
    return calibrated(place, with_file(place, ""))


@case("tokenizer")
def deep(place: Place) -> list[str]:
    return calibrated(place, with_file(place, "[" * 200_000))


@case("tokenizer")
def not_utf8(place: Place) -> list[str]:
    return calibrated(place, with_file(place, b'{"model": "\xff"}'))


@case("tokenizer")
def of_no_kind(place: Place) -> list[str]:
    return calibrated(place, model_with(place, lambda content: content["model"].update(type="Nonesuch")))


@case("tokenizer")
def an_id_that_is_negative(place: Place) -> list[str]:
    return calibrated(place, model_with(place, lambda content: content["model"]["vocab"].update(a=-1)))


@case("tokenizer")
def a_merge_of_what_is_not_there(place: Place) -> list[str]:
    return calibrated(place, model_with(place, lambda content: content["model"].update(merges=[["no", "where"]])))


@case("belongs to another model")
def ids_beyond_the_embedding(place: Place) -> list[str]:
    return calibrated(place, model_with(place, renumbered))


@case("belongs to another model")
def ids_beyond_the_embedding_to_evaluate(place: Place) -> list[str]:
    return scored(model_with(place, renumbered, "export"))


@case("belongs to another model")
def ids_beyond_the_embedding_to_verify(place: Place) -> list[str]:
    return ["verify", str(model_with(place, renumbered, "export")), "--device", "cpu"]


@case("tokenizer_config.json")
def a_config_that_is_a_list(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "tokenizer_config.json").write_text("[]")
    return calibrated(place, folder)


@case("tokenizer_config.json")
def a_config_that_is_cut(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "tokenizer_config.json").write_text('{"a": ')
    return calibrated(place, folder)


@case("tokenizer")
def a_class_of_no_kind(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / FILE).unlink()
    (folder / "vocab.json").write_text("{}")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="NonesuchTokenizer")
    return calibrated(place, folder)
