"""Adapters of tiny models, made by PEFT itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from quantkit.checkpoint import CheckpointReader
from tests.runs import logits
from tests.tiny import tiny_tokenizer

STRENGTH = 0.05


def make_adapter(
    folder: Path,
    base: Path,
    *,
    rows: int | None = None,
    tokenizer: bool = False,
    seed: int = 0,
    named: str | None = None,
    **config: Any,
) -> Path:
    """Write a LoRA adapter of ``base`` whose every trained number is away from its beginning.

    Args:
        folder: where it is written.
        base: the model.
        rows: resize the embeddings to so many first.
        tokenizer: save a tokenizer with as many tokens, and a chat template of its own, with it.
        seed: of the numbers.
        named: the base's name in the adapter; its path by default.
        config: of PEFT's ``LoraConfig``.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        if rows is not None:
            model.resize_token_embeddings(rows)
        tuned = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **config}))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * STRENGTH
        if named is not None:
            tuned.peft_config["default"].base_model_name_or_path = named
            tuned.save_pretrained(str(folder), save_embedding_layers=rows is not None)
        else:
            tuned.save_pretrained(str(folder))
    if tokenizer:
        own = tiny_tokenizer("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
        own.add_tokens([f"<added{number}>" for number in range((rows or len(own)) - len(own))])
        own.save_pretrained(folder)
    return folder


def unmerged(base: Path, *adapters: tuple[Path, float], rows: int | None = None) -> Any:
    """PEFT's own model of base and adapters, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        names = [str(number) for number in range(len(adapters))]
        tuned: Any = PeftModel.from_pretrained(model, str(adapters[0][0]), adapter_name=names[0])
        for name, (folder, _) in list(zip(names, adapters, strict=True))[1:]:
            tuned.load_adapter(str(folder), adapter_name=name)
        tuned.base_model.set_adapter(names)
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            for name, (_, weight) in zip(names, adapters, strict=True):
                module.set_scale(name, weight)
    return tuned.eval()


def unmerged_logits(base: Path, *adapters: tuple[Path, float], rows: int | None = None) -> torch.Tensor:
    return logits(unmerged(base, *adapters, rows=rows))


def names_in(folder: Path) -> set[str]:
    return set(CheckpointReader(folder).names())
