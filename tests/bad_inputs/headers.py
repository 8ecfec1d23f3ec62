"""Safetensors headers that lie."""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place

FILE = "model.safetensors"


def written(place: Place, header: bytes, data: bytes = b"", length: int | None = None) -> list[str]:
    """The command that meets a model with such a file."""
    folder = place.copy("single")
    claimed = len(header) if length is None else length
    (folder / FILE).write_bytes(struct.pack("<Q", claimed) + header + data)
    return place.quantize(folder)


def described(place: Place, tensors: dict[str, Any], data: bytes = b"") -> list[str]:
    return written(place, json.dumps(tensors).encode(), data)


def entry(begin: Any, end: Any, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@case("truncated")
def nothing(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / FILE).write_bytes(b"")
    return place.quantize(folder)


@case("truncated")
def a_header_of_exabytes(place: Place) -> list[str]:
    return written(place, b"{}", length=(1 << 63) + 5)


@case("truncated")
def a_header_longer_than_the_file(place: Place) -> list[str]:
    return written(place, b"{}", length=4096)


@case("has no valid safetensors header")
def a_header_of_nothing(place: Place) -> list[str]:
    return written(place, b"", b"\0" * 64)


@case("has no valid safetensors header")
def a_list(place: Place) -> list[str]:
    return written(place, b"[1]")


@case("has no valid safetensors header")
def deep(place: Place) -> list[str]:
    return written(place, b'{"a":' + b"[" * 300_000)


@case("has no valid safetensors header")
def not_utf8(place: Place) -> list[str]:
    return written(place, b'{"\xff\xfe": {}}')


@case("has no valid safetensors header")
def utf16(place: Place) -> list[str]:
    return written(place, '{"a": {}}'.encode("utf-16"))


@case("given twice")
def a_name_given_twice(place: Place) -> list[str]:
    text = json.dumps(entry(0, 4))
    return written(place, f'{{"a": {text}, "a": {text}}}'.encode(), b"\0" * 4)


@case("does not begin where the one before it ends")
def overlapping(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12)


@case("does not begin where the one before it ends")
def a_hole(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12)


@case("does not fit its shape")
def a_shape_larger_than_its_bytes(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 4, [10**6, 10**6])}, b"\0" * 4)


@case("does not fit its shape")
def a_shape_that_overflows_to_nothing(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 0, [1 << 32, 1 << 32])})


@case("bytes where its header says")
def offsets_beyond_the_file(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 4 << 40, [1 << 40])}, b"\0" * 4)


@case("has no valid safetensors header")
def negative_sizes(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 4, [-1])}, b"\0" * 4)


@case("has no valid safetensors header")
def negative_offsets(place: Place) -> list[str]:
    return described(place, {"a": entry(-4, 0)}, b"\0" * 4)


@case("does not fit its shape")
def offsets_the_wrong_way_round(place: Place) -> list[str]:
    return described(place, {"a": entry(4, 0)}, b"\0" * 4)


@case("has no valid safetensors header")
def sizes_that_are_floats(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 4, [1.0])}, b"\0" * 4)


@case("has no valid safetensors header")
def sizes_that_are_flags(place: Place) -> list[str]:
    return described(place, {"a": entry(False, 4, [True])}, b"\0" * 4)


@case("has no valid safetensors header")
def a_shape_of_a_million_axes(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 4, [1] * 1_000_000)}, b"\0" * 4)


@case("F3")
def a_dtype_of_no_kind(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 4, dtype="F3")}, b"\0" * 4)


@case("has no valid safetensors header")
def a_list_for_a_dtype(place: Place) -> list[str]:
    return described(place, {"a": entry(0, 4, dtype=["F32"])}, b"\0" * 4)


@case("has no valid safetensors header")
def a_number_for_a_tensor(place: Place) -> list[str]:
    return described(place, {"a": 1})


@case("has no valid safetensors header")
def a_number_of_a_million_digits(place: Place) -> list[str]:
    return written(place, b'{"a": ' + b"9" * 1_000_000 + b"}")


@case("holds no float model")
def nothing_but_metadata(place: Place) -> list[str]:
    return described(place, {"__metadata__": {"format": "pt"}})


@case("has no valid safetensors header")
def no_number_at_all(place: Place) -> list[str]:
    return written(place, b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, Infinity]}}')


@case("bytes where its header says")
def cut_in_the_middle(place: Place) -> list[str]:
    folder = place.copy("single")
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: len(whole) // 2])
    return ["inspect", str(folder)]


@case("cannot read")
def a_folder_in_its_place(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    return ["inspect", str(folder)]


@case("is not a plain file")
def a_pipe_in_its_place(place: Place) -> list[str]:
    import os

    folder = place.copy("single")
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)
    return ["inspect", str(folder)]


@case("has shape (7, 64)")
def a_weight_of_another_shape(place: Place) -> list[str]:
    from safetensors.torch import load_file, save_file

    folder = place.copy("single")
    tensors = load_file(folder / FILE)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:7].clone()
    save_file(tensors, folder / FILE, {"format": "pt"})
    return place.quantize(folder)


@case("is not in the checkpoint")
def a_weight_that_is_absent(place: Place) -> list[str]:
    from safetensors.torch import load_file, save_file

    folder = place.copy("single")
    tensors = load_file(folder / FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / FILE, {"format": "pt"})
    return place.quantize(folder)


@case("nan at index")
def a_weight_that_is_no_number(place: Place) -> list[str]:
    from safetensors.torch import load_file, save_file

    folder = place.copy("single")
    tensors = load_file(folder / FILE)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / FILE, {"format": "pt"})
    return place.quantize(folder)
