"""A tiny model that sees, with its processor, and images for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken

from tests.architectures import BASE, VISION, make
from tests.tiny import VOCABULARY, tiny_tokenizer

IMAGE_TOKENS = 4
"""Of an image: 32 pixels a side in patches of 16."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}\n"
    "{% endfor %}"
)
"""As those of LLaVA: of a content that is a text it writes nothing."""


def make_seeing(folder: Path) -> Path:
    """Write a LLaVA whose chat template is in a file of its processor alone; the folder."""
    text = {**BASE, "model_type": "llama", "vocab_size": VOCABULARY + 1}
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
    make(folder, "llava", text_config=text, vision_config=vision, image_token_index=VOCABULARY)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    files: dict[str, Any] = {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32}, "processor_class": "LlavaProcessor",
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "patch_size": 16, "image_token": "<image>",
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
        },
        "chat_template.json": {"chat_template": TEMPLATE},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def draw_image(file: Path, seed: int = 0) -> Path:
    """Write an image of noise."""
    from PIL import Image

    values = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(values.numpy()).save(file)
    return file
