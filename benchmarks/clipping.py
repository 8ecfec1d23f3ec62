"""What the search for ranges gains that AWQ clips by: layer errors on the activations of a real model, an ablation.

Every linear layer of some blocks is rounded to nearest on four grids: the full range of each group; a search that
weighs columns by the mean square of their inputs; one that knows the group's block of the Gram matrix and judges a
candidate by what its levels and their best scale gain together; and the one that AWQ uses, which judges both scales by
the weights as they would be stored. Errors are those of the layer's outputs relative to these. Beside them the share of
groups that come out worse than by the full range, by the block's own criterion. The last line is JSON.

    python benchmarks/clipping.py --model FOLDER --text prose.txt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from scoring import machine
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.errors import SchemeError
from quantkit.numerics.grid_search import _search_free, encode, quantized, range_grid, search_grid
from quantkit.numerics.refine import row_errors
from quantkit.numerics.weighing import Weighing
from quantkit.schemes import IntScheme
from quantkit.schemes.grids import Grid

WAYS = ("full range", "by column", "by gain", "as stored")


def grams(model: nn.Module, names: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """``XᵀX / tokens`` of the inputs of some layers."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> None:
        def seen(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            flat = given[0].reshape(-1, given[0].shape[-1])
            found[name] = found.get(name, torch.zeros(())) + flat.T @ flat / tokens.numel()

        model.get_submodule(name).register_forward_pre_hook(seen)

    for name in names:
        hook(name)
    with torch.no_grad():
        for row in tokens:
            model(row.unsqueeze(0))
    return found


def by_gain(weight: torch.Tensor, gram: torch.Tensor, scheme: IntScheme, candidates: int) -> Grid:
    """The search that trusts the closed form."""
    grids = scheme.grids()
    groups = grids.grouped(weight)
    weigh = Weighing.of(grids, gram, weight.shape[1], weight.device)
    tried = grids.candidates(groups, candidates, negative_scales=True)
    return grids.stored(*_search_free(grids, groups, weigh, tried), torch.float16)


def errors(weight: torch.Tensor, gram: torch.Tensor, scheme: IntScheme, candidates: int) -> list[tuple[float, float]]:
    """For each way the relative error of the layer, and the share of groups that are worse than by the full range."""
    found = [
        range_grid(weight, scheme, torch.float16),
        search_grid(weight, gram.diagonal(), scheme, torch.float16, candidates),
        by_gain(weight, gram, scheme, candidates),
        search_grid(weight, gram, scheme, torch.float16, candidates),
    ]
    grids = scheme.grids()
    weigh = Weighing.of(grids, gram, weight.shape[1], weight.device)
    energy = float(row_errors(weight.T, gram).sum())
    rows, first = [], None
    for grid in found:
        missing = weight - quantized(encode(weight, grid, scheme), grid, scheme).dequantize(torch.float32)
        groups = grids.grouped(missing)
        losses = (weigh(groups) * groups).sum(-1)
        first = losses if first is None else first
        worse = float((losses > first * (1 + 1e-5)).float().mean())
        rows.append((float(row_errors(missing.T, gram).sum()) / energy, worse))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a float model")
    parser.add_argument("--text", type=Path, required=True, help="text whose tokens are read")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256, help="of a row of tokens")
    parser.add_argument("--blocks", type=int, default=4, help="blocks that are looked at, evenly spread")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--candidates", type=int, default=8)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    text = given.text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(given.model)(text).input_ids[: given.tokens // given.length * given.length]
    scheme = IntScheme(given.bits, given.group_size, given.symmetric)
    count = model.config.num_hidden_layers
    chosen = sorted({round(place * (count - 1) / max(1, given.blocks - 1)) for place in range(given.blocks)})
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f".{block}." in name for block in chosen)
    ]
    seen = grams(model, names, torch.tensor(ids).view(-1, given.length))
    print(f"{scheme.describe()}, {given.candidates} candidates, {len(ids)} tokens")
    print(f"{'layer':<36}", *(f"{way:>20}" for way in WAYS), f"{'gain to stored':>16}", sep="")
    table: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        try:
            scheme.check_layer(*model.get_submodule(name).weight.shape)
        except SchemeError as error:
            print(f"{name:<36}  left out: {error.problem}")
            continue
        table[name] = errors(model.get_submodule(name).weight.detach(), seen[name], scheme, given.candidates)
        cells = [f"{error:.6f} {worse:>6.1%}" for error, worse in table[name]]
        change = table[name][3][0] / table[name][2][0] - 1
        print(f"{name:<36}", *(f"{cell:>20}" for cell in cells), f"{change:>16.1%}", sep="")
    layers = {name: dict(zip(WAYS, rows, strict=True)) for name, rows in table.items()}
    print(json.dumps({"benchmark": "clipping", "scheme": scheme.to_json(), "machine": machine(), "layers": layers}))


if __name__ == "__main__":
    main()
