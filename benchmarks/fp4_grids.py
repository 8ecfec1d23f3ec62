"""How nvfp4 and mxfp4 are solved, layer by layer: what each part of it does to the error on inputs not seen.

    python benchmarks/fp4_grids.py MODEL --records alpaca.json --text wikitext.txt [--blocks 1 15] [--samples 24]

MODEL is a folder, hub id or GGUF file of a float model whose layers lie in ``model.layers``. Layers of the blocks are
solved on the Gram matrices of some records and judged by those of later records and of the text: the error of their
outputs as a share of the first line's, the geometric mean over layers. ``in turn`` chooses the scale of a block when
the solver comes to it (``scales: in_turn``), ``before`` all beforehand.

What did not pay and is not in the code, on blocks 1 and 15 of SmolLM2-135M off its grid, as shares of ``gptq`` with 6
scales from -3 to 2 steps of E4M3 around the spanning one, on records alike and on WikiText-2:

- headroom in NVFP4's global scale (256, 350 or 384 for 448): 0.99 to 1.01 of the error without;
- all scales before, judged by more than the diagonal of the Gram matrix, with 16 candidates: 0.932 and 0.932 by the
  diagonal, 0.896 and 0.919 by ``(U'U)⁻¹`` of the block, 0.885 and 0.905 by the inverse of the block of H⁻¹, where in
  turn gives 0.836 and 0.859. The block of H itself is worse than its diagonal (1.013 of it);
- a second solve with scales chosen for the weights that the first one met: 1.03 of the error of nvfp4, 0.995 of
  mxfp4;
- a refit of scales for the codes, rounded to what can be stored, Gauss-Seidel over blocks: 0.994 with a descent over
  codes where scales were chosen before, nothing where they were in turn; of mxfp4 no scale moves. Descending over scale
  and codes of a block at once: within 0.01 of descending over codes;
- the best of 2 or 4 ways through a block (a beam): 0.996 for nvfp4, 0.98 for mxfp4; 8 partial solutions kept per row
  from block to block: 0.975 for nvfp4, 0.99 for mxfp4, at 8 times the time; 16 through all columns of mxfp4: 0.965 at
  10 times the time;
- blocks of mxfp4 solved as wholes, as those of nvfp4 are: 1.06 of the error in the order of columns; and nvfp4 in the
  order of columns: 1.04 of that by blocks.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scoring import read_calibration
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.methods.base import InputStatistics
from quantkit.methods.gptq import Gptq, GptqOptions
from quantkit.schemes import Mxfp4Scheme, Nvfp4Scheme, Scheme

LENGTH = 256
CASES: dict[str, dict[str, Any]] = {
    "before, 6": {"scales": "before"},
    "before, 24": {"scales": "before", "search": 24},
    "in turn, 3": {"search": 3},
    "in turn, 6": {"search": 6},
    "in turn, 9": {},
    "in turn, 24": {"search": 24},
    "in turn, columns as they lie": {"activation_order": False},
    "in turn, refined once": {"refinements": 1},
    "in turn, refined twice": {"refinements": 2},
}


def grams(model: Any, rows: list[list[int]], blocks: list[int]) -> dict[str, torch.Tensor]:
    """The Gram matrices of the inputs of all linear layers of some blocks, by name."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in linears(model, blocks):

        def gather(_: Any, given: tuple[torch.Tensor, ...], name: str = name) -> None:
            flat = given[0].reshape(-1, given[0].shape[-1])
            found[name] = found.get(name, torch.zeros(())) + flat.T @ flat

        hooks.append(module.register_forward_pre_hook(gather))
    with torch.no_grad():
        for row in rows:
            model.model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    tokens = sum(map(len, rows))
    return {name: gram / tokens for name, gram in found.items()}


def linears(model: Any, blocks: list[int]) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The linear layers of some blocks."""
    for block in blocks:
        for name, module in model.model.layers[block].named_modules():
            if isinstance(module, torch.nn.Linear):
                yield f"{block}.{name}", module


def error(
    weight: torch.Tensor, gram: torch.Tensor, scheme: Scheme, judges: list[torch.Tensor], **keys: Any
) -> list[float]:
    """The error of a layer's outputs on inputs with other Gram matrices."""
    options = GptqOptions(**{"scales": "in_turn", "refinements": 0, "range_weights": "inputs", **keys})
    solution = Gptq(options).quantize(weight, InputStatistics(gram=gram), scheme, torch.bfloat16)
    missed = weight - solution.weight.dequantize(torch.float32)
    return [float(((missed @ judge) * missed).sum()) for judge in judges]


def main() -> None:
    """Gather, solve, and print."""
    parser = argparse.ArgumentParser(description="what each part of solving nvfp4 and mxfp4 does to a layer's error")
    parser.add_argument("model", type=Path)
    parser.add_argument("--records", type=Path, required=True, help="the first calibrate, the last are scored")
    parser.add_argument("--text", type=Path, required=True, help="text to score on, unlike the calibration")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 15])
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=12, help="records and rows of text that are scored")
    given = parser.parse_args()
    count = given.samples + given.held_out
    with tempfile.TemporaryDirectory() as folder:
        asked = argparse.Namespace(model=given.model, records=given.records, samples=count)
        records = [list(row) for row in read_calibration(asked, Path(folder)).rows]
    ids = AutoTokenizer.from_pretrained(given.model)(given.text.read_text(encoding="utf-8")[:100_000]).input_ids
    text = [ids[start : start + LENGTH] for start in range(0, LENGTH * given.held_out, LENGTH)]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    del model.model.layers[max(given.blocks) + 1 :]
    seen = grams(model, records[: given.samples], given.blocks)
    alike, unlike = (grams(model, rows, given.blocks) for rows in (records[given.samples :], text))
    for scheme in (Nvfp4Scheme(), Mxfp4Scheme()):
        print(f"\n| {scheme.describe()} | alike | unlike |\n|:--|--:|--:|")
        first: dict[str, list[float]] = {}
        for case, keys in CASES.items():
            shares = []
            for name, layer in linears(model, given.blocks):
                weight, judges = layer.weight.detach(), [alike[name], unlike[name]]
                found = error(weight, seen[name], scheme, judges, **keys)
                base = first.setdefault(name, found)
                shares.append([math.log(one / two) for one, two in zip(found, base, strict=True)])
            means = [math.exp(sum(column) / len(column)) for column in zip(*shares, strict=True)]
            print(f"| {case} | {means[0]:.3f} | {means[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
