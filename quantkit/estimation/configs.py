"""Reading a model's ``config.json`` as plain data, with the defaults that its class in transformers has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import SourceError

DTYPES = ("float32", "float16", "bfloat16")
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"decoder_sparse_step": 1, "num_experts": 128, "num_experts_per_tok": 8},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {"moe_layer_freq": 1},
    "deepseek_v3": {"moe_layer_freq": 1},
}
"""By ``model_type``, what a config may leave out."""


class Config:
    """A config of a text model.

    Args:
        data: as ``config.json`` has it.
        name: of the model, for messages.

    Attributes:
        family: ``model_type`` of the text model.
        notes: what of the model is not looked at.
    """

    def __init__(self, data: Mapping[str, Any], name: str) -> None:
        text = data.get("text_config")
        nested = isinstance(text, Mapping)
        kind = data.get("model_type")
        if not isinstance(kind, str):
            raise SourceError(f"the config of {name} has no model_type", "give the config.json of a model")
        self.name = name
        self.family = str(text.get("model_type", f"{kind}_text")) if isinstance(text, Mapping) else kind
        self.notes = (f"the parts of {name} beside its text model are left out",) if nested else ()
        self._data = {**DEFAULTS.get(self.family, {}), **(text if isinstance(text, Mapping) else {})}
        if not nested:
            self._data |= data
        self._outer = data

    def get(self, key: str, default: Any = None) -> Any:
        """What a key says; ``default`` where it is missing or null."""
        found = self._data.get(key)
        return default if found is None else found

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises:
            SourceError: it is missing, or something else.
        """
        found = self.get(key, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            said = "does not say" if found is None else f"says {found!r} for"
            raise SourceError(f"the config of {self.name} {said} {key}", "a whole number is needed there")
        return found

    def optional(self, key: str) -> int | None:
        """A positive whole number, or None where there is none."""
        return None if self.get(key) is None else self.whole(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """A flag."""
        return bool(self.get(key, default))

    def dtype(self) -> str:
        """The dtype of the weights; float32 where nothing is said, as transformers takes it."""
        for data in (self._data, self._outer):
            found = data.get("dtype") or data.get("torch_dtype")
            if found in DTYPES:
                return str(found)
        return "float32"

    def windows(self) -> list[int | None]:
        """For each block the tokens that it looks back at most; None for all."""
        blocks, window = self.whole("num_hidden_layers"), self.optional("sliding_window")
        kinds, pattern = self.get("layer_types"), self.optional("sliding_window_pattern")
        if window is None or (self.family.startswith("qwen") and not self.flag("use_sliding_window")):
            return [None] * blocks
        if isinstance(kinds, list) and len(kinds) == blocks:
            return [window if kind == "sliding_attention" else None for kind in kinds]
        if pattern is not None:
            return [window if (block + 1) % pattern else None for block in range(blocks)]
        first = int(self.get("max_window_layers", 0)) if self.family.startswith("qwen") else 0
        return [window if block >= first else None for block in range(blocks)]

    def rope_factors(self) -> int:
        """Numbers that a GGUF file has for the rope of Llama 3.1 and later."""
        rope = self.get("rope_parameters") or self.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") if isinstance(rope, Mapping) else None
        return self.head_dim() // 2 if kind == "llama3" else 0

    def head_dim(self) -> int:
        """Width of a head."""
        return self.whole("head_dim", self.whole("hidden_size") // self.whole("num_attention_heads"))
