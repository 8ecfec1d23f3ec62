"""What releases before transformers 5 read of an export: the keys that they know, with the values that were meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import quantkit
from quantkit.checkpoint.older_keys import add_older_tokenizer_keys, newer_than, with_older_keys
from quantkit.system.artifacts import read_json, write_json
from tests.architectures import BASE
from tests.tiny import make_model, tiny_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FACTORS_BY_LENGTH = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG = {"rope_type": "longrope", **FACTORS_BY_LENGTH}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 70000.0}
TURNS = {"rope_type": "default", "rope_theta": 70000.0}
WANTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scaled": ("llama", LLAMA3, {"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "rope_theta": None}}),
    "plain": ("cohere", TURNS, {"rope_theta": 70000.0, "rope_scaling": None}),
    "partial": (
        "glm4",
        {**TURNS, "partial_rotary_factor": 0.25},
        {"rope_theta": 70000.0, "partial_rotary_factor": 0.25, "rope_scaling": None},
    ),
    "older names": (
        "gpt_neox",
        {**TURNS, "partial_rotary_factor": 0.125},
        {"rotary_emb_base": 70000.0, "rotary_pct": 0.125, "rope_scaling": None},
    ),
    "a factor for each frequency": (
        "phi3",
        {**LONG, "rope_theta": 70000.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64},
        {
            "rope_theta": 70000.0,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", **FACTORS_BY_LENGTH},
        },
    ),
    "a base frequency of each kind of layer": (
        "modernbert-decoder",
        {"full_attention": TURNS, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}},
        {"global_rope_theta": 70000.0, "local_rope_theta": 5000.0, "rope_scaling": None},
    ),
    "by layer": (
        "gemma3_text",
        {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_theta": 70000.0, "rope_local_base_freq": 5000.0, "rope_scaling": {**LINEAR, "rope_theta": None}},
    ),
}


def config_of(kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers 5 saves it."""
    original = {key: rope[key] for key in ("original_max_position_embeddings",) if kind == "phi3"}
    config = CONFIG_MAPPING[kind](**{**BASE, **original, "rope_parameters": rope, "dtype": torch.bfloat16})
    return json.loads(config.to_json_string(use_diff=False))  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", WANTED)
def test_older_keys_say_what_the_new_ones_do(case: str) -> None:
    kind, rope, wanted = WANTED[case]
    given = config_of(kind, rope)
    found = with_older_keys(given)
    for key, value in wanted.items():
        expected = (
            {each: item for each, item in value.items() if item is not None} if isinstance(value, dict) else value
        )
        assert found[key] == expected, key
    assert found["torch_dtype"] == found["dtype"] == "bfloat16"
    assert {key: found[key] for key in given} == given
    mapping = CONFIG_MAPPING[kind]
    without = {key: value for key, value in found.items() if key != "rope_parameters"}
    before, after, older = (mapping.from_dict(dict(each)).to_dict() for each in (given, found, without))
    for read in (before, after, older):
        read["rope_parameters"].pop("type", None)  # the older name of rope_type
    assert {key: after[key] for key in before} == before
    assert older["rope_parameters"] == before["rope_parameters"]
    assert newer_than(found) == []


def test_the_language_part_of_a_model_has_them_too() -> None:
    text = config_of("llama", LLAMA3)
    found = with_older_keys({"model_type": "llava", "text_config": text, "dtype": "bfloat16"})
    assert found["text_config"]["rope_theta"] == 500000.0


def test_what_older_releases_cannot_say_is_named() -> None:
    rope = {**TURNS, "rope_type": "proportional"}
    given = {"model_type": "llama", "vocab_size": 8, "rope_parameters": rope}
    assert "rope_theta" not in with_older_keys(given)
    assert newer_than(with_older_keys(given)) == ["rope_parameters, beside which no older keys stand"]
    assert newer_than({}, {"tokenizer_class": "MistralCommonBackend"}) == ["the tokenizer class MistralCommonBackend"]
    own_code = {**config_of("llama", LLAMA3), "auto_map": {"AutoModel": "modeling.Own"}}
    assert "rope_theta" not in with_older_keys(own_code)


def test_a_tokenizer_is_read_by_older_releases_and_as_before(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    config = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_start|>"], "eos_token": "</s>"}
    write_json(tmp_path / "tokenizer_config.json", config)
    before = AutoTokenizer.from_pretrained(tmp_path)
    add_older_tokenizer_keys(tmp_path)
    found, after = read_json(tmp_path / "tokenizer_config.json"), AutoTokenizer.from_pretrained(tmp_path)
    assert found.pop("additional_special_tokens") == ["<|im_start|>"]
    assert found == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    text = "a<|im_start|>b"
    assert before(text)["input_ids"] == after(text)["input_ids"]
    assert before.all_special_tokens == after.all_special_tokens


def test_bos_is_said_where_older_tokenizers_would_put_one(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    add_older_tokenizer_keys(tmp_path)
    found = read_json(tmp_path / "tokenizer_config.json")
    assert (found["add_bos_token"], found["add_eos_token"]) == (False, False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    model = make_model(folder / "model", dtype=torch.bfloat16, rope_parameters=LLAMA3)
    return quantkit.quantize(model, out=folder / "int4", method="rtn", bits=4, group_size=32)


def test_an_export_has_them_and_its_card_says_how_it_splits(exported: Path) -> None:
    config = read_json(exported / "config.json")
    assert (config["rope_theta"], config["rope_scaling"]["rope_type"]) == (500000.0, "llama3")
    assert config["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(exported).rope_parameters == LLAMA3
    card = (exported / "README.md").read_text()
    assert "tensor-parallel sizes: 1, 2 (4: model.layers" in card
    assert "o_proj would have 16 inputs a device, in groups of 32" in card
    assert "Transformers 5 is needed" not in card


def test_inspect_tells_sizes_and_the_scales_that_verify_finds(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert quantkit.inspect(exported)["tensor_parallel"]["sizes"] == [1, 2]
    assert not any("misread" in line for line in quantkit.inspect(exported)["remarks"])
    alone = quantkit.inspect(exported.parent / "model")["remarks"]
    assert alone == [
        "releases before transformers 5 misread rope_parameters, beside which no older keys stand",
        "releases before transformers 5 misread the tokenizer class TokenizersBackend",
    ]
    foreign = tmp_path / "foreign"
    shutil.copytree(exported, foreign)
    (foreign / "manifest.json").unlink()
    tensors = load_file(foreign / "model.safetensors")
    names = [f"model.layers.0.self_attn.{each}_scale" for each in "kv"]
    save_file({**tensors, **{name: torch.ones(1) for name in names}}, foreign / "model.safetensors", {"format": "pt"})
    found = quantkit.inspect(foreign)
    assert any(names[0] in line and "does not load whole" in line for line in found["problems"])
    assert "transformers with compressed-tensors, not whole: see the problems" in found["loads"]
    config = read_json(foreign / "config.json")
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    write_json(foreign / "config.json", config)
    assert not any("not load whole" in line for line in quantkit.inspect(foreign)["problems"])
