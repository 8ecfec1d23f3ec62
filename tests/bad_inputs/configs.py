"""Configs with wrong types, absurd sizes, and architectures that nobody has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place, edit_json

DEEP = "[" * 200_000


def model_with(place: Place, name: str = "single", **changes: Any) -> Path:
    """A model whose config says something else."""
    folder = place.copy(name)
    edit_json(folder / "config.json", **changes)
    return folder


def checkpoint_with(place: Place, **changes: Any) -> str:
    """A quantized checkpoint whose config says something else."""
    return str(model_with(place, "export", **changes))


@case("config.json")
def empty(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "config.json").write_text("")
    return place.quantize(folder)


@case("config.json")
def a_list(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "config.json").write_text("[1, 2]")
    return ["inspect", str(folder)]


@case("config.json")
def not_utf8(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
    return ["inspect", str(folder)]


@case("config.json")
def deep(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "config.json").write_text(DEEP)
    return ["inspect", str(folder)]


@case("config.json")
def deep_to_quantize(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "config.json").write_text(DEEP)
    return place.quantize(folder)


@case("config.json")
def a_number_of_a_million_digits(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "config.json").write_text('{"hidden_size": ' + "9" * 1_000_000 + "}")
    return ["inspect", str(folder)]


@case("config.json")
def a_folder_in_its_place(place: Place) -> list[str]:
    folder = place.copy("single")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    return ["inspect", str(folder)]


@case("nonesuch")
def unknown_architecture(place: Place) -> list[str]:
    return place.quantize(model_with(place, model_type="nonesuch", architectures=["NonesuchForCausalLM"]))


@case("model_type")
def no_architecture(place: Place) -> list[str]:
    return place.quantize(model_with(place, model_type=..., architectures=...))


@case("model_type")
def a_list_for_the_architecture(place: Place) -> list[str]:
    return place.quantize(model_with(place, model_type=["llama"]))


@case("bert")
def an_encoder(place: Place) -> list[str]:
    return place.quantize(model_with(place, model_type="bert", architectures=["BertModel"]))


@case("hidden_size")
def a_text_for_the_width(place: Place) -> list[str]:
    return place.quantize(model_with(place, hidden_size="wide"))


@case("hidden_size")
def a_negative_width(place: Place) -> list[str]:
    return place.quantize(model_with(place, hidden_size=-64))


@case("hidden_size")
def a_width_of_a_million_million(place: Place) -> list[str]:
    return place.quantize(model_with(place, hidden_size=10**12))


@case("hidden_size")
def a_width_of_a_million_million_to_inspect(place: Place) -> list[str]:
    return ["inspect", checkpoint_with(place, hidden_size=10**12)]


@case("hidden_size")
def a_width_of_a_million_million_to_evaluate(place: Place) -> list[str]:
    return ["evaluate", checkpoint_with(place, hidden_size=10**12), "--context-length", "32", "--max-tokens", "64"]


@case("hidden_size")
def a_width_of_a_million_million_to_verify(place: Place) -> list[str]:
    return ["verify", checkpoint_with(place, hidden_size=10**12), "--device", "cpu"]


@case("hidden_size")
def a_width_of_a_million_million_to_convert(place: Place) -> list[str]:
    return ["convert", checkpoint_with(place, hidden_size=10**12), "--to", "gptq", "-o", place.out]


@case("num_hidden_layers")
def a_million_million_blocks(place: Place) -> list[str]:
    return place.quantize(model_with(place, num_hidden_layers=10**12))


@case("num_hidden_layers")
def a_million_million_blocks_to_inspect(place: Place) -> list[str]:
    return ["inspect", str(model_with(place, num_hidden_layers=10**12))]


@case("num_hidden_layers")
def a_million_million_blocks_to_evaluate(place: Place) -> list[str]:
    return ["evaluate", checkpoint_with(place, num_hidden_layers=10**12), "--max-tokens", "64"]


@case("num_hidden_layers")
def a_million_million_blocks_to_estimate(place: Place) -> list[str]:
    return ["estimate", str(model_with(place, num_hidden_layers=10**12))]


@case("num_hidden_layers")
def a_million_million_blocks_to_merge(place: Place) -> list[str]:
    return place.merge(place.sound("adapter"), str(model_with(place, num_hidden_layers=10**12)), "--any-base")


@case("num_hidden_layers")
def more_blocks_than_weights(place: Place) -> list[str]:
    return place.quantize(model_with(place, num_hidden_layers=20_000))


@case("num_hidden_layers")
def more_blocks_than_weights_in_a_text_config(place: Place) -> list[str]:
    return place.quantize(model_with(place, text_config={"num_hidden_layers": 10**9}))


@case("num_attention_heads")
def no_heads(place: Place) -> list[str]:
    return place.quantize(model_with(place, num_attention_heads=0, head_dim=...))


@case("num_attention_heads")
def no_heads_to_estimate(place: Place) -> list[str]:
    return ["estimate", str(model_with(place, num_attention_heads=0))]


@case("max_position_embeddings")
def an_absurd_context(place: Place) -> list[str]:
    return place.quantize(model_with(place, max_position_embeddings=-1))


@case("vocab_size")
def an_absurd_vocabulary(place: Place) -> list[str]:
    return place.quantize(model_with(place, vocab_size=10**15))


@case("nonesuch")
def a_rope_of_no_kind(place: Place) -> list[str]:
    return place.quantize(model_with(place, rope_parameters={"rope_type": "nonesuch", "rope_theta": 1e4}))


@case("float7")
def a_dtype_of_no_kind(place: Place) -> list[str]:
    return place.quantize(model_with(place, dtype="float7"))


@case("quantized already")
def quantized_already(place: Place) -> list[str]:
    return place.quantize(place.sound("export"))


def unmarked(place: Place) -> Path:
    """Packed weights with nothing but the config to tell what they are."""
    folder = place.copy("export")
    (folder / "manifest.json").unlink()
    return folder


@case("quantization_config")
def quantized_by_a_text(place: Place) -> list[str]:
    folder = unmarked(place)
    edit_json(folder / "config.json", quantization_config="int4")
    return ["inspect", str(folder)]


@case("nonesuch")
def quantized_by_nobody(place: Place) -> list[str]:
    folder = unmarked(place)
    edit_json(folder / "config.json", quantization_config={"quant_method": "nonesuch"})
    return ["inspect", str(folder)]


@case("group_0")
def groups_of_no_kind(place: Place) -> list[str]:
    folder = unmarked(place)
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": "x"}}}}
    edit_json(folder / "config.json", quantization_config=quantization)
    return ["inspect", str(folder)]


@case("bits")
def gptq_of_no_width(place: Place) -> list[str]:
    folder = unmarked(place)
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": "four", "group_size": 32})
    return ["inspect", str(folder)]


@case("is no pattern")
def patterns_that_never_end(place: Place) -> list[str]:
    folder = place.copy("export")
    (folder / "manifest.json").unlink()
    pattern = "re:" + "(a|a|.)*" * 12 + "\\d\\d$"
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    groups = {"group_0": {"targets": [pattern], "weights": arguments}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    edit_json(folder / "config.json", quantization_config=quantization)
    return ["inspect", str(folder)]
