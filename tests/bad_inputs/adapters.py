"""Adapters for other models, with parts that are absent, of another rank or no numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place, edit_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def configured(place: Place, **changes: Any) -> list[str]:
    folder = place.copy("adapter")
    edit_json(folder / CONFIG, **changes)
    return place.merge(folder)


def weighted(place: Place, edit: Callable[[dict[str, torch.Tensor]], object]) -> list[str]:
    folder = place.copy("adapter")
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return place.merge(folder)


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def text(place: Place, content: str | bytes) -> list[str]:
    folder: Path = place.copy("adapter")
    (folder / CONFIG).write_bytes(content.encode() if isinstance(content, str) else content)
    return place.merge(folder)


@case("was trained on 'org/Other-70B'")
def of_another_base(place: Place) -> list[str]:
    return configured(place, base_model_name_or_path="org/Other-70B")


@case("layers.7")
def of_a_deeper_base(place: Place) -> list[str]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors[name.replace(".layers.1.", ".layers.7.")] = tensors.pop(name)

    return weighted(place, edit)


@case("shape")
def of_a_wider_base(place: Place) -> list[str]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = first(tensors, "q_proj.lora_A")
        tensors[name] = torch.zeros(4, 128)

    return weighted(place, edit)


@case("lacks the tensor")
def without_a_half(place: Place) -> list[str]:
    return weighted(place, lambda tensors: tensors.pop(first(tensors, "lora_B")))


@case("and the rank of its layer is 8")
def of_another_rank(place: Place) -> list[str]:
    return configured(place, r=8)


@case("rank")
def of_no_rank(place: Place) -> list[str]:
    return configured(place, r=0)


@case("rank")
def of_a_rank_that_is_text(place: Place) -> list[str]:
    return configured(place, r="four")


@case("rank")
def of_a_rank_beyond_the_world(place: Place) -> list[str]:
    return configured(place, r=10**12)


@case("lora_alpha")
def of_a_strength_that_is_text(place: Place) -> list[str]:
    return configured(place, lora_alpha="strong")


@case("lora_alpha")
def of_a_strength_that_is_no_number(place: Place) -> list[str]:
    return configured(place, lora_alpha=float("nan"))


@case("nan at index")
def of_no_numbers(place: Place) -> list[str]:
    return weighted(place, lambda tensors: tensors[first(tensors, "lora_A")].view(-1)[:1].fill_(float("nan")))


@case("inf at index")
def of_infinite_numbers(place: Place) -> list[str]:
    return weighted(place, lambda tensors: tensors[first(tensors, "lora_B")].view(-1)[:1].fill_(float("inf")))


@case("not named as PEFT")
def of_other_names(place: Place) -> list[str]:
    return weighted(place, lambda tensors: tensors.update(weight=tensors.pop(first(tensors, "lora_A"))))


@case("not LORA")
def of_another_kind(place: Place) -> list[str]:
    return configured(place, peft_type="IA3")


@case("not LORA")
def of_a_kind_that_is_a_list(place: Place) -> list[str]:
    return configured(place, peft_type=["LORA"])


@case("which the installed PEFT does not know")
def of_keys_that_nobody_knows(place: Place) -> list[str]:
    return configured(place, __class__="os.system", run_me=f"touch {place.canary}")


@case("adapter_config.json")
def with_a_pattern_that_is_a_list(place: Place) -> list[str]:
    return configured(place, rank_pattern=["q_proj"])


@case("adapter_config.json")
def with_a_pattern_that_is_broken(place: Place) -> list[str]:
    return configured(place, rank_pattern={"(((": 4})


@case("adapter_config.json")
def with_a_pattern_that_never_ends(place: Place) -> list[str]:
    return configured(place, rank_pattern={"(" + "(a|.)*" * 14 + ")\\d\\d\\d": 4})


@case("adapter_config.json")
def with_a_config_that_is_cut(place: Place) -> list[str]:
    return text(place, '{"peft_type": ')


@case("adapter_config.json")
def with_a_config_that_is_deep(place: Place) -> list[str]:
    return text(place, "[" * 200_000)


@case("adapter_config.json")
def with_a_config_that_is_not_utf8(place: Place) -> list[str]:
    return text(place, b'{"peft_type": "LORA\xff"}')


@case("trained 1 rows up to 1000000000")
def with_tokens_beyond_the_vocabulary(place: Place) -> list[str]:
    folder = place.copy("adapter")
    edit_json(folder / CONFIG, trainable_token_indices={"embed_tokens": [10**9]})
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.zeros(1, 64)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return place.merge(folder)


@case("adapter_config.json")
def with_modules_that_are_numbers(place: Place) -> list[str]:
    return configured(place, modules_to_save=[1, 2], target_modules=5)


@case("does not fit its shape")
def with_a_header_that_lies(place: Place) -> list[str]:
    folder = place.copy("adapter")
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    return place.merge(folder)
