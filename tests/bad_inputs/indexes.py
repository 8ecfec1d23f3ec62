"""Indexes of shards that lead out of the folder, to nothing, or round and round."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place

INDEX = "model.safetensors.index.json"


def model_with(place: Place, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A sharded model whose index was edited."""
    folder = place.copy("model")
    content = json.loads((folder / INDEX).read_text())
    edit(content)
    (folder / INDEX).write_text(json.dumps(content))
    return folder


def all_in(shard: Any) -> Callable[[dict[str, Any]], object]:
    """Every tensor in one shard."""
    return lambda content: content.update(weight_map=dict.fromkeys(content["weight_map"], shard))


def index_of(place: Place, text: str | bytes) -> Path:
    folder = place.copy("model")
    (folder / INDEX).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


@case("not a plain file name")
def outside_by_dots(place: Place) -> list[str]:
    return place.quantize(model_with(place, all_in("../../outside/secret.txt")))


@case("not a plain file name")
def outside_by_a_root(place: Place) -> list[str]:
    return ["inspect", str(model_with(place, all_in(str(place.outside / "secret.txt"))))]


@case("not a plain file name")
def outside_by_backslashes(place: Place) -> list[str]:
    return place.quantize(model_with(place, all_in("..\\..\\secret.txt")))


@case("not a plain file name")
def the_folder_itself(place: Place) -> list[str]:
    return place.quantize(model_with(place, all_in(".")))


@case("not a plain file name")
def a_name_with_a_null(place: Place) -> list[str]:
    return place.quantize(model_with(place, all_in("model\0.safetensors")))


@case("No such file")
def an_absent_shard(place: Place) -> list[str]:
    return place.quantize(model_with(place, all_in("model-00009-of-00009.safetensors")))


@case("not a plain file name")
def numbers_for_shards(place: Place) -> list[str]:
    return place.quantize(model_with(place, all_in(7)))


@case("index of shards")
def lists_for_shards(place: Place) -> list[str]:
    return place.quantize(model_with(place, all_in(["a"])))


@case("index of shards")
def no_map(place: Place) -> list[str]:
    return place.quantize(model_with(place, lambda content: content.pop("weight_map")))


@case("index of shards")
def a_text_for_the_map(place: Place) -> list[str]:
    return place.quantize(model_with(place, lambda content: content.update(weight_map="model")))


@case("does not hold it")
def a_tensor_that_is_not_there(place: Place) -> list[str]:
    def edit(content: dict[str, Any]) -> None:
        content["weight_map"]["model.nothing.weight"] = next(iter(content["weight_map"].values()))

    return place.quantize(model_with(place, edit))


@case("index of shards")
def deep(place: Place) -> list[str]:
    return place.quantize(index_of(place, '{"weight_map": ' + "[" * 300_000))


@case("index of shards")
def cut(place: Place) -> list[str]:
    return place.quantize(index_of(place, '{"weight_map": {"a"'))


@case("index of shards")
def not_utf8(place: Place) -> list[str]:
    return place.quantize(index_of(place, b'{"weight_map": {"\xff": "a"}}'))


@case("holds no float model")
def an_empty_map(place: Place) -> list[str]:
    return place.quantize(index_of(place, '{"weight_map": {}}'))


@case("several checkpoints")
def two_indexes(place: Place) -> list[str]:
    folder = place.copy("model")
    os.replace(folder / INDEX, folder / "one.safetensors.index.json")
    (folder / "two.safetensors.index.json").write_bytes((folder / "one.safetensors.index.json").read_bytes())
    return ["inspect", str(folder)]
