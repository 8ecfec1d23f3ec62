"""Exports whose manifest, config and files do not agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place

MANIFEST = "manifest.json"


def edited(place: Place, edit: Callable[[dict[str, Any]], object], *command: str) -> list[str]:
    folder = place.copy("export")
    content = json.loads((folder / MANIFEST).read_text())
    edit(content)
    (folder / MANIFEST).write_text(json.dumps(content))
    name, *options = command or ("inspect",)
    return [name, str(folder), *options]


def text(place: Place, content: str | bytes) -> list[str]:
    folder = place.copy("export")
    (folder / MANIFEST).write_bytes(content.encode() if isinstance(content, str) else content)
    return ["inspect", str(folder)]


def with_scheme(scheme: Any) -> Callable[[dict[str, Any]], object]:
    """Every layer has this scheme."""
    return lambda content: content.update(layers=dict.fromkeys(content["layers"], scheme))


@case("manifest.json")
def cut(place: Place) -> list[str]:
    return text(place, '{"format": ')


@case("manifest.json")
def deep(place: Place) -> list[str]:
    return text(place, "[" * 200_000)


@case("manifest.json")
def not_utf8(place: Place) -> list[str]:
    return text(place, b'{"format": "\xff"}')


@case("nonesuch")
def unknown_format(place: Place) -> list[str]:
    return edited(place, lambda content: content.update(format="nonesuch"))


@case("layers")
def schemes_that_are_text(place: Place) -> list[str]:
    return edited(place, with_scheme("int4"))


@case("scheme")
def a_scheme_of_no_kind(place: Place) -> list[str]:
    return edited(place, with_scheme({"kind": "nonesuch"}))


@case("bits")
def a_scheme_of_no_width(place: Place) -> list[str]:
    return edited(place, with_scheme({"kind": "int", "bits": 10**9, "group_size": 32, "symmetric": True}))


@case("bits")
def a_scheme_of_wrong_types(place: Place) -> list[str]:
    return edited(place, with_scheme({"kind": "int", "bits": "4", "group_size": [32], "symmetric": "yes"}))


@case("group_size")
def a_scheme_of_no_groups(place: Place) -> list[str]:
    return edited(place, with_scheme({"kind": "int", "bits": 4, "group_size": 0, "symmetric": True}))


@case("scheme")
def a_scheme_of_an_empty_mapping(place: Place) -> list[str]:
    return edited(place, with_scheme({}))


@case("no tensor")
def a_layer_that_is_not_there(place: Place) -> list[str]:
    def edit(content: dict[str, Any]) -> None:
        content["layers"]["model.layers.99.mlp"] = next(iter(content["layers"].values()))

    return edited(place, edit)


@case("embedding")
def an_embedding_that_is_a_list(place: Place) -> list[str]:
    return edited(place, lambda content: content.update(embedding=["x"]))


@case("shape")
def a_layer_of_another_width(place: Place) -> list[str]:
    return edited(place, with_scheme({"kind": "int", "bits": 8, "group_size": 32, "symmetric": True}))


@case("outside")
def files_outside_to_push(place: Place) -> list[str]:
    def edit(content: dict[str, Any]) -> None:
        content["files"]["../../outside/secret.txt"] = {"sha256": "0" * 64, "bytes": 29}

    return edited(place, edit, "push", "org/name")


@case("is not whole")
def a_file_that_is_missing_to_push(place: Place) -> list[str]:
    folder = place.copy("export")
    (folder / "model.safetensors").unlink()
    return ["push", str(folder), "org/name"]


@case("bytes where its header says")
def a_checkpoint_that_is_cut_to_convert(place: Place) -> list[str]:
    folder = place.copy("export")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    return ["convert", str(folder), "--to", "gptq", "-o", place.out]


@case("shape")
def codes_of_another_shape(place: Place) -> list[str]:
    from safetensors.torch import load_file, save_file

    folder = place.copy("export")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("weight_packed"))
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return ["inspect", str(folder)]


@case("shape")
def a_shape_tensor_beyond_the_world(place: Place) -> list[str]:
    import torch
    from safetensors.torch import load_file, save_file

    folder = place.copy("export")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("weight_shape"))
    tensors[name] = torch.tensor([1 << 40, 1 << 40])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return ["inspect", str(folder)]


@case("is missing")
def a_file_name_of_three_hundred_letters(place: Place) -> list[str]:
    return edited(
        place, lambda content: content["files"].update({"a" * 300: {"bytes": 1, "sha256": "0"}}), "push", "org/a"
    )


@case("lies outside")
def a_file_name_with_a_nul(place: Place) -> list[str]:
    return edited(place, lambda content: content["files"].update({"a\0b": {"bytes": 1}}), "push", "org/a")


@case("File name too long")
def a_path_of_three_hundred_letters(place: Place) -> list[str]:
    return ["inspect", str(place.inside / ("a" * 300))]


@case("scheme int: group_size is '32'")
def a_group_size_that_is_text(place: Place) -> list[str]:
    return edited(place, with_scheme({"kind": "int", "bits": 4, "group_size": "32"}))


@case("scheme int: symmetric is 1")
def a_flag_that_is_a_number(place: Place) -> list[str]:
    return edited(place, with_scheme({"kind": "int", "bits": 4, "symmetric": 1}))
