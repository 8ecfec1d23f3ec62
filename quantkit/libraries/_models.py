"""What plugins that go through transformers do alike.

Runs in the worker, so it needs torch and transformers alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from quantkit.libraries.base import Request

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "*.jinja", "additional_chat_templates/*.jinja", "generation_config.json",
)  # fmt: skip


def load(request: Request) -> Any:
    """The float model on the request's device, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        request.model, dtype=getattr(torch, request.dtype), use_safetensors=True
    )
    return model.to(request.device).eval()


def layers_of(folder: Path) -> list[str]:
    """Full names of the linear layers of the model in a folder, in the model's order; no weight is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return linear_layers(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))


def linear_layers(model: nn.Module) -> list[str]:
    """Full names of a model's linear layers, in its order."""
    from torch import nn

    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def copy_tokenizer(origin: Path, folder: Path) -> None:
    """Put the tokenizer's files beside a result as they are."""
    for path in sorted({path for pattern in TOKENIZER_FILES for path in origin.glob(pattern)}):
        target = folder / path.relative_to(origin)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
