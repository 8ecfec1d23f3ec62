"""LLaMA-Factory's export configurations become recipes, and its data sets are read as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.errors import CalibrationError, RecipeError
from quantkit.recipe import Recipe
from quantkit.recipe.llamafactory import import_recipe
from quantkit.records import Message, identify, load

MERGE = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "adapter_name_or_path": "saves/llama3-8b/lora/sft",
    "template": "llama3",
    "trust_remote_code": True,
    "export_dir": "output/llama3_lora_sft",
    "export_size": 5,
    "export_device": "cpu",
    "export_legacy_format": False,
}
QUANTIZE = {
    "model_name_or_path": "models/llama3",
    "export_dir": "output/llama3 gptq/",
    "export_quantization_bit": 4,
    "export_quantization_dataset": "data/c4_demo.jsonl",
}


def imported(folder: Path, config: dict[str, Any]) -> tuple[Recipe, str]:
    file = folder / "export.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    text = import_recipe(file)
    return Recipe.parse(text), text


def test_an_export_of_an_adapter_is_a_merge(tmp_path: Path) -> None:
    recipe, text = imported(tmp_path, MERGE)
    assert recipe.name == "llama3_lora_sft"
    assert recipe.model.source == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert [(adapter.source, adapter.weight) for adapter in recipe.model.adapter] == [("saves/llama3-8b/lora/sft", 1.0)]
    assert recipe.model.trust_remote_code
    (variant,) = recipe.own_variants
    assert (variant.method, variant.format, variant.scheme) == ("none", "float", "bfloat16")
    for remark in (
        "template: llama3 is left out",
        "export_size: 5 (shards",
        "export_device: cpu",
        "output/llama3_lora_sft",
    ):
        assert remark in text


def test_an_export_that_quantizes_is_gptq_with_its_calibration(tmp_path: Path) -> None:
    config = {**QUANTIZE, "export_quantization_nsamples": 64, "export_quantization_maxlen": 2048}
    recipe, _ = imported(tmp_path, config)
    assert recipe.name == "llama3-gptq"
    calibration = recipe.calibration
    assert (calibration.dataset, calibration.samples, calibration.max_length) == ("data/c4_demo.jsonl", 64, 2048)
    (variant,) = recipe.own_variants
    assert (variant.method, variant.format, variant.base_scheme().describe()) == ("gptq", "gptq", "int4 g128 sym")
    usual, _ = imported(tmp_path, QUANTIZE)
    assert (usual.calibration.samples, usual.calibration.max_length) == (128, 1024)


def test_both_at_once_several_adapters_and_a_hub_data_set(tmp_path: Path) -> None:
    config = {**MERGE, **QUANTIZE, "adapter_name_or_path": "one, two", "export_quantization_dataset": "allenai/c4"}
    recipe, _ = imported(tmp_path, config)
    assert [adapter.source for adapter in recipe.model.adapter] == ["one", "two"]
    assert recipe.calibration.dataset == "hub:allenai/c4"
    assert recipe.own_variants[0].method == "gptq"


def test_what_is_not_known_is_named_and_cannot_break_out_of_its_comment(tmp_path: Path) -> None:
    recipe, text = imported(tmp_path, {**MERGE, "new_special_tokens": "<a>\nname: other", "flash_attn": False})
    assert "# Left out, not known: new_special_tokens: <a> name: other\n" in text
    assert "flash_attn" not in text
    assert recipe.name == "llama3_lora_sft"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"quantization_bit": 4},
            "merges into a quantized base (quantization_bit: 4) (remove the key and na",
        ),
        ({"do_train": True}, "is a configuration of a training"),
        ({"export_dir": None}, "is no export configuration: it has no export_dir"),
        ({"model_name_or_path": 3}, "it has no model_name_or_path"),
        ({"finetuning_type": "freeze"}, "finetuning_type freeze is no LoRA"),
        ({"infer_dtype": "int8"}, "infer_dtype 'int8' is none of auto"),
        ({"adapter_name_or_path": {"a": 1}}, "adapter_name_or_path is neither text nor a list"),
        ({"export_quantization_bit": 5}, "bits"),
    ],
)
def test_what_cannot_be_imported_is_one_line(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        imported(tmp_path, {**MERGE, **changes})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


ALPACA = [{"ask": "Q1", "more": "", "answer": "A1", "sys": "Be brief.", "past": [["q", "a"]]}, {"ask": "Q2"}]
TAGGED = [
    {"talk": [{"by": "u", "says": "Q"}, {"by": "b", "says": "A"}], "sys": "S"},
    {"talk": [{"by": "u", "says": "Q2"}, {"by": "b", "says": "A2"}]},
]
OPENAI = [{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}]
ENTRIES: dict[str, Any] = {
    "alpaca": {
        "file_name": "alpaca.json",
        "columns": {"prompt": "ask", "query": "more", "response": "answer", "system": "sys", "history": "past"},
    },
    "tagged": {
        "file_name": "tagged.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "sys"},
        "tags": {"role_tag": "by", "content_tag": "says", "user_tag": "u", "assistant_tag": "b"},
    },
    "usual": {"file_name": "usual.json", "formatting": "sharegpt"},
    "openai": {"file_name": "openai.json", "formatting": "openai", "columns": {"messages": "messages"}},
    "first": {"file_name": "tagged.json", "formatting": "sharegpt", "num_samples": 1},
    "pairs": {
        "file_name": "pairs.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "wanted": {"file_name": "wanted.json", "columns": {"prompt": "ask", "response": "answer", "kto_tag": "label"}},
    "sounds": {"file_name": "x.json", "columns": {"audios": "audios"}},
    "scripted": {"script_url": "x.py"},
    "nowhere": {"ms_hub_url": "org/name"},
    "typed": {"file_name": 3},
    "missing": {"file_name": "missing.json"},
}
ENTRIES["first"] |= {"columns": ENTRIES["tagged"]["columns"], "tags": ENTRIES["tagged"]["tags"]}
USUAL = [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}]


PAIRS = [
    {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "no"},
    }
]
WANTED = [{"ask": "Q", "answer": "A", "label": True}, {"ask": "Q", "answer": "no", "label": False}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    files = {"dataset_info": ENTRIES, "alpaca": ALPACA, "tagged": TAGGED, "openai": OPENAI, "usual": USUAL}
    files |= {"pairs": PAIRS, "wanted": WANTED}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def turns(data: Path, name: str) -> list[list[Message]]:
    found = load(f"llamafactory:{data}/{name}")
    assert found.name == name
    assert found.origin == identify(f"llamafactory:{data}/{name}")
    return [list(record.messages) for record in found.records]


def test_alpaca_columns_are_read_by_their_names(data: Path) -> None:
    (only,) = turns(data, "alpaca")
    assert [(message.role, message.content) for message in only] == [
        ("system", "Be brief."), ("user", "q"), ("assistant", "a"), ("user", "Q1"), ("assistant", "A1"),
    ]  # fmt: skip
    assert load(f"llamafactory:{data}/alpaca").skipped[0].index == 1


def test_tags_tell_the_roles_of_a_conversation(data: Path) -> None:
    first, second = turns(data, "tagged")
    assert first == [Message("system", "S"), Message("user", "Q"), Message("assistant", "A")]
    assert second == [Message("user", "Q2"), Message("assistant", "A2")]
    assert turns(data, "usual") == [[Message("user", "Q"), Message("assistant", "A")]]
    assert turns(data, "openai") == [[Message("system", "S"), Message("user", "Q")]]


def test_of_preferences_the_chosen_side_is_read(data: Path) -> None:
    assert turns(data, "pairs") == turns(data, "wanted") == [[Message("user", "Q"), Message("assistant", "A")]]
    (skipped,) = load(f"llamafactory:{data}/wanted").skipped
    assert skipped.reason == "its answer is marked as not wanted ('label' is false)"


def test_num_samples_are_the_first_rows_and_part_of_the_identity(data: Path) -> None:
    assert len(turns(data, "first")) == 1
    assert identify(f"llamafactory:{data}/first") != identify(f"llamafactory:{data}/tagged")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sounds", "holds audios"),
        ("scripted", "is made by a script, which is not run"),
        ("nowhere", "lies neither in a file nor on the Hugging Face hub"),
        ("typed", "typed.file_name: Input should be a valid string"),
        ("missing", "cannot read"),
        ("alpacca", "has no data set 'alpacca' (did you mean 'alpaca'?"),
    ],
)
def test_an_entry_that_cannot_calibrate_is_one_line(data: Path, name: str, expected: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load(f"llamafactory:{data}/{name}")
    assert expected in str(caught.value)


def test_a_folder_without_the_file_names_the_form(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="write llamafactory:DIR/NAME"):
        load(f"llamafactory:{tmp_path}/x")
