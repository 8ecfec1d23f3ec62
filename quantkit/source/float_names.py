"""What the float original of a quantized copy is called, by the suffixes with which such copies are published."""

from __future__ import annotations

import re

NF4_COPY = re.compile(r"(-unsloth)?-bnb-4bit$", re.IGNORECASE)
"""The suffix of the copies of Unsloth and others from which QLoRA trainings start."""


def float_name(name: str) -> str | None:
    """The name of the model that a copy for QLoRA was made of; None for other names.

    ``unsloth/Qwen3-8B-unsloth-bnb-4bit`` is a copy of ``unsloth/Qwen3-8B``, which its publisher has in floats too.
    """
    plain = name.partition("@")[0].rstrip("/")
    original = NF4_COPY.sub("", plain)
    return original if original and original != plain else None
