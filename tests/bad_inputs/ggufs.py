"""GGUF files with absurd counts, lengths, types and cycles."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place
from tests.test_source_gguf import write_gguf

STRING, ARRAY, UINT32, UINT64 = 8, 9, 4, 10


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def head(tensors: int = 0, keys: int = 0, body: bytes = b"", version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def met(place: Place, content: bytes) -> list[str]:
    return ["inspect", str(place.write("model.gguf", content + b"\0" * 64))]


def edited(place: Place, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> list[str]:
    """A whole file whose metadata or tensors were edited."""
    return place.quantize(write_gguf(place.inside / "model.gguf", edit=edit))


def setting(place: Place, name: str, value: Any) -> list[str]:
    return edited(place, lambda keys, tensors: keys.update({name: value}))


@case("model.gguf")
def nothing(place: Place) -> list[str]:
    return place.quantize(place.write("model.gguf", b""))


@case("does not begin with 'GGUF'")
def other_magic(place: Place) -> list[str]:
    return met(place, head(magic=b"GGML"))


@case("version 99")
def a_version_of_the_future(place: Place) -> list[str]:
    return met(place, head(version=99))


@case("claims")
def more_tensors_than_atoms(place: Place) -> list[str]:
    return met(place, head(tensors=1 << 62))


@case("claims")
def more_keys_than_atoms(place: Place) -> list[str]:
    return met(place, head(keys=1 << 62))


@case("ends inside its header")
def a_text_longer_than_the_file(place: Place) -> list[str]:
    return met(place, head(keys=1, body=text(b"k", (1 << 64) - 1)))


@case("array items")
def an_array_of_exabytes(place: Place) -> list[str]:
    return met(place, head(keys=1, body=key(b"k", ARRAY, struct.pack("<IQ", 0, 1 << 60))))


@case("array of the unknown type 9")
def arrays_in_arrays(place: Place) -> list[str]:
    return met(place, head(keys=1, body=key(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)))


@case("unknown type 77")
def a_value_of_no_type(place: Place) -> list[str]:
    return met(place, head(keys=1, body=key(b"k", 77, b"\0" * 8)))


@case("not a whole GGUF file")
def a_text_that_is_not_utf8(place: Place) -> list[str]:
    return met(place, head(keys=1, body=key(b"k", STRING, text(b"\xff\xfe\xfd"))))


@case("twice")
def a_key_given_twice(place: Place) -> list[str]:
    return met(place, head(keys=2, body=key(b"k", UINT32, b"\0" * 4) * 2))


@case("twice")
def a_tensor_given_twice(place: Place) -> list[str]:
    return met(place, head(tensors=2, body=tensor(b"a", (4,)) * 2))


@case("alignment")
def no_alignment(place: Place) -> list[str]:
    body = key(b"general.alignment", UINT32, struct.pack("<I", 0)) + tensor(b"a", (4,))
    return met(place, head(tensors=1, keys=1, body=body))


@case("alignment")
def an_alignment_of_exabytes(place: Place) -> list[str]:
    body = key(b"general.alignment", UINT64, struct.pack("<Q", (1 << 64) - 1)) + tensor(b"a", (4,))
    return met(place, head(tensors=1, keys=1, body=body))


@case("alignment")
def an_alignment_that_is_text(place: Place) -> list[str]:
    body = key(b"general.alignment", STRING, text(b"32")) + tensor(b"a", (4,))
    return met(place, head(tensors=1, keys=1, body=body))


@case("dimensions")
def a_tensor_of_a_thousand_million_axes(place: Place) -> list[str]:
    return met(place, head(tensors=1, body=tensor(b"a", (4,), dimensions=1 << 30)))


@case("dimensions")
def a_tensor_of_no_axes(place: Place) -> list[str]:
    return met(place, head(tensors=1, body=tensor(b"a", ())))


@case("9999")
def a_tensor_of_no_type(place: Place) -> list[str]:
    return met(place, head(tensors=1, body=tensor(b"a", (32,), kind=9999)))


@case("cannot store")
def a_tensor_of_no_size(place: Place) -> list[str]:
    return met(place, head(tensors=1, body=tensor(b"a", (0,))))


@case("ends at byte")
def a_tensor_larger_than_the_world(place: Place) -> list[str]:
    return met(place, head(tensors=1, body=tensor(b"a", (1 << 62, 1 << 62))))


@case("ends at byte")
def a_tensor_beyond_the_end(place: Place) -> list[str]:
    return met(place, head(tensors=1, body=tensor(b"a", (4,), offset=1 << 60)))


@case("overlap")
def tensors_that_share_bytes(place: Place) -> list[str]:
    rows = b"".join(tensor(b"t%d" % number, (256,)) for number in range(200))
    return met(place, head(tensors=200, body=rows + b"\0" * 8192))


@case("dimensions")
def a_hundred_thousand_tensors_that_are_not_there(place: Place) -> list[str]:
    return met(place, head(tensors=1 << 17, body=tensor(b"a", (4,))))


@case("ends at byte")
def cut(place: Place) -> list[str]:
    whole = place.copy("float.gguf")
    whole.write_bytes(whole.read_bytes()[:-1000])
    return place.quantize(whole)


@case("nonesuch")
def unknown_architecture(place: Place) -> list[str]:
    return setting(place, "general.architecture", "nonesuch")


@case("one of 99 parts")
def a_part_of_many(place: Place) -> list[str]:
    return setting(place, "split.count", 99)


@case("blocks")
def a_thousand_million_blocks(place: Place) -> list[str]:
    return setting(place, "llama.block_count", 1_000_000_000)


@case("shape")
def a_width_of_a_thousand_million(place: Place) -> list[str]:
    return setting(place, "llama.embedding_length", 1 << 30)


@case("head_count")
def no_heads(place: Place) -> list[str]:
    return setting(place, "llama.attention.head_count", 0)


@case("rope.freq_base")
def a_rope_that_is_no_number(place: Place) -> list[str]:
    return setting(place, "llama.rope.freq_base", float("inf"))


@case("vocabulary")
def a_token_beyond_the_vocabulary(place: Place) -> list[str]:
    return setting(place, "tokenizer.ggml.eos_token_id", (1 << 32) - 1)


@case("merge")
def a_merge_of_what_is_not_there(place: Place) -> list[str]:
    return setting(place, "tokenizer.ggml.merges", ["nothing less"])


@case("tokenizer.ggml.tokens")
def tokens_that_are_numbers(place: Place) -> list[str]:
    return setting(place, "tokenizer.ggml.tokens", [1, 2, 3])


def more_tokens(keys: dict[str, Any]) -> dict[str, Any]:
    return {"tokenizer.ggml.tokens": [*keys["tokenizer.ggml.tokens"], "more", "tokens"]}


@case("rows of weights")
def more_tokens_than_rows(place: Place) -> list[str]:
    return edited(place, lambda keys, tensors: keys.update(more_tokens(keys)))


@case("holds a token twice")
def a_token_given_twice(place: Place) -> list[str]:
    def edit(keys: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tokens = list(keys["tokenizer.ggml.tokens"])
        tokens[10] = tokens[11]
        keys["tokenizer.ggml.tokens"] = tokens

    return edited(place, edit)


@case("token_embd.weight")
def no_embedding(place: Place) -> list[str]:
    return edited(place, lambda keys, tensors: tensors.pop("token_embd.weight"))


@case("quantkit.schemes")
def schemes_that_are_a_list(place: Place) -> list[str]:
    write_gguf(place.inside / "model.gguf", edit=lambda keys, tensors: keys.update({"quantkit.schemes": "[1]"}))
    return ["inspect", str(place.inside / "model.gguf")]


@case("quantkit.schemes")
def schemes_that_are_deep(place: Place) -> list[str]:
    deep = {"quantkit.schemes": "[" * 100_000}
    write_gguf(place.inside / "model.gguf", edit=lambda keys, tensors: keys.update(deep))
    return ["inspect", str(place.inside / "model.gguf")]
