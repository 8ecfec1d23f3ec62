"""The sizes that a ``config.json`` claims, checked before a model is built by them.

A model class builds as many blocks, and as wide ones, as its config asks for; a config that asks for a million million
would never be done. What is refused here is far beyond every model, or cannot fit the weights that lie beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import CheckpointError

BLOCKS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")
MAX_BLOCKS = 4096
USUAL_BLOCKS = 256
"""From here on there must be as many tensors as blocks."""
LIMITS = {
    **dict.fromkeys(BLOCKS, MAX_BLOCKS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "n_embd", "d_model", "ffn_dim", "head_dim"), 1 << 24),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"), 1 << 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), 1 << 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1 << 32),
    "vocab_size": 1 << 26,
}
"""The most that a key may say."""
MAY_BE_ZERO = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "num_key_value_heads")
TEXT_PARTS = ("text_config", "llm_config", "language_config")
GET_AGAIN = "get the model again from its source"


def check_sizes(config: Mapping[str, Any], origin: str, folder: Path | None = None) -> None:
    """Check that what a config asks for can be built.

    Args:
        config: the content of ``config.json``.
        origin: what messages call it.
        folder: where its weights lie, if they are here.

    Raises:
        CheckpointError: a size is no count, or beyond all bounds, or there are more blocks than tensors.
    """
    for part in _parts(config):
        for key, most in LIMITS.items():
            for value in _values(part.get(key)):
                least = 0 if key in MAY_BE_ZERO else 1
                if type(value) is not int or not least <= value <= most:
                    said = (
                        value if isinstance(value, int | float) and abs(value) < 1e18 else f"a {type(value).__name__}"
                    )
                    raise CheckpointError(f"{origin} says {said} for {key}, which no model has", GET_AGAIN)
    blocks = max((part[key] for part in _parts(config) for key in BLOCKS if type(part.get(key)) is int), default=0)
    if folder is not None and blocks > USUAL_BLOCKS:
        tensors = len(CheckpointReader(folder).names())
        if tensors < blocks:
            raise CheckpointError(
                f"{origin} says {blocks} for num_hidden_layers, and there are {tensors} tensors", GET_AGAIN
            )


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    yield from (config[name] for name in TEXT_PARTS if isinstance(config.get(name), Mapping))


def _values(found: Any) -> Iterator[Any]:
    """What a key says: nothing, one size, or one for each block."""
    if isinstance(found, list) and len(found) <= MAX_BLOCKS:
        yield from found
    elif found is not None:
        yield found
