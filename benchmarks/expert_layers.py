"""What an expert's prior does to the errors of its layers: GPTQ from few tokens of its own and those of all experts.

Some experts of some blocks are solved from the tokens that the router sends them out of the first so many calibration
tokens, blended with the statistics that all experts share over all of these, by several priors. Errors are those of the
layer's outputs, relative to these, on held-out records and on a text, each token weighed as the router does. The last
line is JSON.

    python benchmarks/expert_layers.py --model MIXTURE --records alpaca.json --text wikitext.txt

MIXTURE is a folder as ``benchmarks/split_mixture.py`` makes it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from scoring import arguments, machine
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit import calibration
from quantkit.methods.base import InputStatistics
from quantkit.methods.gptq import Gptq, GptqOptions
from quantkit.recipe import CalibrationSpec
from quantkit.schemes import IntScheme

LENGTH = 400
LAYERS = ("gate and up", "down")
SCHEME = IntScheme(4, 64, True)
Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What an expert's gate and up read, what its down reads, and how the router weighs each token."""


def rows_of(records: list[Any], folder: Path, count: int) -> list[list[int]]:
    """Rows of ``LENGTH`` tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "records.json").write_text(json.dumps(records), encoding="utf-8")
        file = str(Path(scratch) / "records.json")
        spec = CalibrationSpec(dataset=file, samples=10**6, max_length=LENGTH, packing="full")
        rows = calibration.build(spec, folder, Path(scratch) / "rows").rows
    return [list(row) for row in rows[: count // LENGTH]]


def routed(model: Any, rows: list[list[int]], blocks: list[int]) -> dict[int, list[torch.Tensor]]:
    """What the experts of each block are called with: hidden states, indices and weights of all tokens."""
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {block: [] for block in blocks}
    hooks = [
        model.model.layers[block].mlp.experts.register_forward_pre_hook(lambda _, args, at=at: at.append(args))
        for block, at in seen.items()
    ]
    with torch.no_grad():
        for row in rows:
            model.model(torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {block: [torch.cat(each) for each in zip(*given, strict=True)] for block, given in seen.items()}


def read(experts: Any, given: list[torch.Tensor], number: int, tokens: int | None = None) -> Read:
    """What an expert reads of the first so many tokens."""
    hidden, index, weights = (each[:tokens] for each in given)
    token, slot = (index == number).nonzero(as_tuple=True)
    gate, up = (hidden[token] @ experts.gate_up_proj[number].T).chunk(2, -1)
    return hidden[token], nn.functional.silu(gate) * up, weights[token, slot, None]


def error(weight: torch.Tensor, gram: torch.Tensor, seen: list[torch.Tensor]) -> list[float]:
    """Of the solved weight on inputs, relative to its outputs."""
    known = InputStatistics(1, gram=gram)
    found = Gptq(GptqOptions()).quantize(weight, known, SCHEME, torch.float16).weight.dequantize(torch.float32)
    return [((each @ (weight - found).T).square().sum() / (each @ weight.T).square().sum()).item() for each in seen]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--priors", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 1, 4])
    parser.add_argument(
        "--few", type=int, nargs="+", default=[200, 800, 3200], help="tokens of which experts see theirs"
    )
    parser.add_argument("--tokens", type=int, default=6400, help="of all experts, and of each text that is scored on")
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 17])
    parser.add_argument("--experts", type=int, nargs="+", default=[0, 4, 8, 12])
    given = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval().requires_grad_(False)
    records = json.loads(given.records.read_text(encoding="utf-8"))
    ids = AutoTokenizer.from_pretrained(given.model)(given.text.read_text(encoding="utf-8")).input_ids[: given.tokens]
    held_out = rows_of(records[len(records) // 2 :], given.model, given.tokens)
    texts = [held_out, [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]]
    seen, *scored = (
        routed(model, rows, given.blocks)
        for rows in (rows_of(records[: len(records) // 2], given.model, given.tokens), *texts)
    )
    found: dict[str, list[list[float]]] = {}
    for block in given.blocks:
        experts = model.model.layers[block].mlp.experts
        every = [read(experts, seen[block], number) for number in range(experts.num_experts)]
        for place, layer in enumerate(LAYERS):
            whole = torch.cat([each[place] for each in every])
            pool = whole.T @ whole / len(whole)
            for number in given.experts:
                weight = (experts.down_proj if place else experts.gate_up_proj)[number]
                outside = [read(experts, each[block], number) for each in scored]
                judged = [each[place] * each[2] for each in outside]
                for few in given.few:
                    own = read(experts, seen[block], number, few)[place]
                    for prior in given.priors:
                        share = prior * own.shape[1]
                        gram = (own.T @ own + share * pool) / max(len(own) + share, 1)
                        found.setdefault(f"{layer}, {few}, {prior:g}", []).append(error(weight, gram, judged))
    means = {name: torch.tensor(each).mean(0).tolist() for name, each in found.items()}
    for name, (like, unlike) in means.items():
        print(f"{name:24} held-out {like:.4f}, unlike {unlike:.4f}")
    print(json.dumps({"benchmark": "expert_layers", "errors": means, "machine": machine()}))


if __name__ == "__main__":
    main()
