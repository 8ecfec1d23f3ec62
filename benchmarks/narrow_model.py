"""A narrower Llama made from one without training, so that its widths are multiples of 256: for trying K-quants.

SmolLM2-135M is 576 wide, and blocks of 256 do not divide that. Here the residual stream is cut to its strongest
directions (PCA of what the norms give, as SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024, with one rotation for all
blocks, so that it stays a Llama), in the basis nearest to as many of its own channels, which keeps their outliers. Of
each block's heads those are left out that the others can replace best. Then, block by block, each layer is fitted by
least squares to what the model's layer gives, from the narrow model's own inputs. What comes of it has a function of
its own: its float self is the reference. Its inputs have full rank, which those of a model made wider would not.

    python benchmarks/narrow_model.py MODEL OUT --records alpaca.json [--width 512] [--heads 8]

MODEL is a folder, hub id, GGUF file or ``package:`` reference. Perplexities of both on later records are printed. It
takes minutes on two cores.

SmolLM2-135M-Instruct cut from 576 to 512 and from nine heads to eight had a perplexity of 14.1 on alpaca records, where
it has 7.6 itself, and answers in sentences. Cut to 512 by the rotation alone, with all its heads, it had 17 where it
has 8.5, and 68 where it has 30 on WikiText-2.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from scoring import machine
from split_mixture import rows_of
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from quantkit.checkpoint.companions import copy_companions
from quantkit.recipe import ModelSpec
from quantkit.source import resolve

RIDGE = 0.01
"""What is added to the diagonal of a layer's Gram matrix, as a part of it."""
ROWS = 4
"""How many rows go through a block at once."""


def watched(module: nn.Module, layers: Sequence[nn.Module], *arguments: torch.Tensor, **fixed: Any) -> list[Any]:
    """The inputs and outputs of layers inside a module as it is given rows, a few at a time: pairs, on the CPU."""
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in layers]

    def hook(place: int) -> Any:
        def keep(_: nn.Module, given: Any, made: Any) -> None:
            seen[place][0].append(given[0] if given else torch.empty(0))
            seen[place][1].append(made[0] if isinstance(made, tuple) else made)

        return keep

    hooks = [layer.register_forward_hook(hook(place)) for place, layer in enumerate(layers)]
    for start in range(0, len(arguments[0]), ROWS):
        module(*(each[start : start + ROWS] for each in arguments), **fixed)
    for each in hooks:
        each.remove()
    return [(torch.cat(given), torch.cat(made)) for given, made in seen]


def fit(layer: nn.Linear, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
    """Change a layer so that it gives what is wanted, by least squares; little where its inputs say little."""
    inputs, wanted = inputs.flatten(0, 1), wanted.flatten(0, 1)
    gram = (inputs.T @ inputs).double()
    gram.diagonal().mul_(1 + RIDGE)
    left = inputs.T @ (wanted - inputs @ layer.weight.T)
    layer.weight.add_(torch.linalg.solve(gram, left.double()).T.float())


def strongest(model: Any, rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The basis ``[hidden, width]`` of the residual stream that is kept, and the channels it is nearest to."""
    norms = [norm for block in model.model.layers for norm in (block.input_layernorm, block.post_attention_layernorm)]
    hidden = model.config.hidden_size
    total = torch.zeros(hidden, hidden, dtype=torch.float64)
    for row in torch.split(rows, ROWS):
        for stream, _ in watched(model.model, norms, row, use_cache=False):
            normed = nn.functional.rms_norm(stream.flatten(0, 1), (hidden,), eps=model.config.rms_norm_eps)
            total += (normed.T @ normed).double()
    directions = torch.linalg.eigh(total).eigenvectors
    lost, kept = directions[:, : hidden - width].T.clone(), directions[:, hidden - width :]
    left = torch.ones(hidden, dtype=torch.bool)
    for _ in range(hidden - width):  # the channels that span what is lost, as QR with pivoting finds them
        worst = int(lost.square().sum(0).masked_fill(~left, -1).argmax())
        left[worst] = False
        axis = lost[:, worst] / lost[:, worst].norm()
        lost = lost - torch.outer(axis, axis @ lost)
    channels = left.nonzero().flatten()
    first, _, second = torch.linalg.svd(kept[channels])
    return (kept @ (first @ second).T).float(), channels


def replaceable(inputs: torch.Tensor, weight: torch.Tensor, size: int, count: int) -> list[int]:
    """The heads that are kept, when so many are left out whose part of the output the others give best."""
    kept = list(range(weight.shape[1] // size))
    inputs = inputs.flatten(0, 1)
    gram = (inputs.T @ inputs).double()
    gram.diagonal().mul_(1 + RIDGE)
    for _ in range(count):
        columns = torch.cat([torch.arange(head * size, (head + 1) * size) for head in kept])
        inverse = torch.linalg.inv(gram[columns][:, columns])
        losses = []
        for place, head in enumerate(kept):
            part = slice(place * size, (place + 1) * size)
            own = weight[:, head * size : (head + 1) * size].double()
            losses.append(float((own @ torch.linalg.inv(inverse[part, part]) * own).sum()))
        kept.pop(losses.index(min(losses)))
    return kept


class Narrowing:
    """A narrow model that is made from a model block by block.

    Attributes:
        model: float32.
        narrow: of the width and heads that are wanted; its weights are filled in.
    """

    def __init__(self, model: Any, rows: torch.Tensor, width: int, heads: int) -> None:
        self.model, self.config, self.heads = model, model.config, heads
        config = deepcopy(model.config)
        config.hidden_size, config.tie_word_embeddings, config.num_attention_heads = width, False, heads
        if heads != self.config.num_attention_heads:
            config.num_key_value_heads = heads
        self.narrow: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
        self.basis, self.channels = strongest(model, rows, width)
        self.gain = (self.config.hidden_size / width) ** 0.5
        self._places = model.model.rotary_emb(self.basis, torch.arange(rows.shape[1]).unsqueeze(0))

    def norm(self, ours: Any, theirs: Any, readers: Sequence[tuple[nn.Linear, torch.Tensor]]) -> None:
        """Give a norm the weights of the kept channels, and its readers their part of the model's weights."""
        ours.weight.copy_(theirs.weight[self.channels] * self.gain)
        for layer, weight in readers:
            layer.weight.copy_((weight * theirs.weight) @ self.basis / theirs.weight[self.channels])

    def make(self, rows: torch.Tensor) -> Any:
        """The narrow model, fitted on rows of token ids."""
        theirs = self.model.model.embed_tokens(rows)
        self.narrow.model.embed_tokens.weight.copy_(self.model.model.embed_tokens.weight @ self.basis)
        ours = self.narrow.model.embed_tokens(rows)
        for place, (block, narrow) in enumerate(zip(self.model.model.layers, self.narrow.model.layers, strict=True)):
            attention, mlp = block.self_attn, block.mlp
            layers = [
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                attention.o_proj,
                block.post_attention_layernorm,
            ]
            layers += [mlp.gate_proj, mlp.up_proj, block]
            seen = watched(block, layers, theirs, position_embeddings=self._places, attention_mask=None)
            ours = self.attention(narrow, block, ours, seen[:5])
            ours = self.mlp(narrow, block, ours, seen[5:])
            theirs = seen[-1][1]
            wanted = theirs @ self.basis
            error = float((ours - wanted).square().sum() / wanted.square().sum())
            print(f"block {place}: error of the residual stream {error:.4f}", flush=True)
        self.norm(self.narrow.model.norm, self.model.model.norm, [(self.narrow.lm_head, self.model.lm_head.weight)])
        return self.narrow

    def attention(self, narrow: Any, block: Any, ours: torch.Tensor, seen: list[Any]) -> torch.Tensor:
        """Fit a block's attention; the residual stream after it."""
        size, heads, groups = self.config.head_dim, self.config.num_attention_heads, self.config.num_key_value_heads
        weight = block.self_attn.o_proj.weight
        kept = replaceable(seen[3][0], weight, size, heads - self.heads)
        whole = torch.arange(size)
        of_query = (torch.tensor(kept).unsqueeze(1) * size + whole).flatten()
        of_key = of_query if len(kept) < heads else torch.arange(groups * size)
        if len(kept) < heads:
            of_key = (torch.tensor(kept).unsqueeze(1) // (heads // groups) * size + whole).flatten()
        readers = []
        for name, order in (("q_proj", of_query), ("k_proj", of_key), ("v_proj", of_key)):
            readers.append((getattr(narrow.self_attn, name), getattr(block.self_attn, name).weight[order]))
        self.norm(narrow.input_layernorm, block.input_layernorm, readers)
        normed = narrow.input_layernorm(ours)
        for (layer, _), (_, made), order in zip(readers, seen, (of_query, of_key, of_key), strict=False):
            fit(layer, normed, made[..., order])
        out = narrow.self_attn.o_proj
        out.weight.copy_(self.basis.T @ weight[:, of_query])
        ((read, _),) = watched(narrow.self_attn, [out], normed, position_embeddings=self._places, attention_mask=None)
        fit(out, read, seen[4][0] @ self.basis - ours)
        moved: torch.Tensor = ours + out(read)
        return moved

    def mlp(self, narrow: Any, block: Any, ours: torch.Tensor, seen: list[Any]) -> torch.Tensor:
        """Fit a block's MLP; the residual stream after it."""
        gate, up, down = narrow.mlp.gate_proj, narrow.mlp.up_proj, narrow.mlp.down_proj
        readers = [(gate, block.mlp.gate_proj.weight), (up, block.mlp.up_proj.weight)]
        self.norm(narrow.post_attention_layernorm, block.post_attention_layernorm, readers)
        normed = narrow.post_attention_layernorm(ours)
        for layer, (_, made) in zip((gate, up), seen, strict=False):
            fit(layer, normed, made)
        inner = narrow.mlp.act_fn(gate(normed)) * up(normed)
        down.weight.copy_(self.basis.T @ block.mlp.down_proj.weight)
        fit(down, inner, seen[-1][1] @ self.basis - ours)
        moved: torch.Tensor = ours + down(inner)
        return moved


def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Of rows of token ids."""
    losses = [model(row, labels=row, use_cache=False).loss for row in torch.split(rows, 1)]
    return float(torch.stack(losses).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=Path, required=True, help="records to fit on, in alpaca form")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rows", type=int, default=20, help="that layers are fitted on")
    parser.add_argument("--length", type=int, default=512, help="of a row of tokens")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = resolve(ModelSpec(source=given.model), Path(scratch)).folder
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        rows = torch.tensor(rows_of(given, folder, Path(scratch)))
        used, later = rows[: given.rows], rows[given.rows : given.rows + 6]
        narrow = Narrowing(model, used, given.width, given.heads).make(used)
        found = {"model": perplexity(model, later), "narrow": perplexity(narrow, later)}
        given.out.mkdir(parents=True, exist_ok=True)
        copy_companions(folder, given.out)
        narrow.save_pretrained(given.out)
    print(json.dumps({"benchmark": "narrow_model", "perplexity": found, "machine": machine()}))


if __name__ == "__main__":
    main()
