"""Formats: how codes lie on disk. One file each."""

from __future__ import annotations

from quantkit.formats.base import Format
from quantkit.system.registry import Registry

ALSO = {
    **dict.fromkeys(("ct", "llm-compressor"), "compressed-tensors"),
    **dict.fromkeys(("auto-gptq", "gptqmodel", "gptq-marlin"), "gptq"),
    **dict.fromkeys(("llama.cpp", "ggml"), "gguf"),
    **dict.fromkeys(("autoawq", "awq-marlin"), "awq"),
    "bnb": "bitsandbytes",
}
"""What the field also calls a format, mostly by who writes it."""
FORMATS: Registry[Format] = Registry("format", "quantkit.formats", "quantkit.formats", also=ALSO)
