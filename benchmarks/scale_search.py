"""What the search for scales and the refinement of GPTQ gain on integer grids: errors of layers, an ablation.

Every linear layer of some blocks is solved from the Gram matrix of calibration inputs, and judged on that of other
inputs, like these and unlike. The search weighs the error of a column by the mean square of its input (``inputs``), by
what the columns after it in the order of solving cannot make up for (``1 / U_ii²``, ``remaining``), by the geometric
mean of both (``solver``, gptq's default), or by the group's block of the Gram matrix (``block``). Asymmetric grids try
the zero points beside the best one or not. Errors are relative to those of ``inputs`` without either, the geometric
mean over layers. The last line is JSON.

    python benchmarks/scale_search.py --model FOLDER --records alpaca.json --text wikitext.txt --samples 40
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from scoring import arguments, machine, read_calibration
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.methods.base import InputStatistics
from quantkit.methods.gptq import Gptq, GptqOptions
from quantkit.numerics.factor import Curvature
from quantkit.numerics.refine import row_errors
from quantkit.schemes import IntScheme
from quantkit.schemes.grids.integer import IntGrids

LENGTH = 512
SOLVER_WEIGHTS = Curvature.column_weights


@dataclass(frozen=True, slots=True)
class Case:
    """How a layer is solved."""

    way: str = "inputs"
    zeros: bool = False
    refinements: int = 0

    def __str__(self) -> str:
        return f"{self.way:9} {'zeros' if self.zeros else '':5} refinements {self.refinements}"


CASES = (
    Case(),
    Case("block"),
    Case("remaining"),
    Case("solver"),
    Case("solver", zeros=True),
    Case("solver", zeros=True, refinements=1),
    Case("solver", zeros=True, refinements=2),
)
Rows = list[list[int]]
Grams = dict[str, torch.Tensor]


def grams(model: nn.Module, names: list[str], rows: Rows) -> Grams:
    """``XᵀX / tokens`` of the inputs of some layers."""
    found: Grams = {}
    tokens = sum(map(len, rows))

    def watch(name: str) -> None:
        def seen(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            flat = given[0].reshape(-1, given[0].shape[-1])
            found[name] = found.get(name, torch.zeros(())) + flat.T @ flat / tokens

        model.get_submodule(name).register_forward_pre_hook(seen)

    for name in names:
        watch(name)
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    return found


def weights_of(curvature: Curvature, way: str) -> torch.Tensor:
    """What the search is given, see :meth:`quantkit.numerics.weighing.Weighing.of`."""
    if way == "block":
        return curvature.hessian
    strength = curvature.hessian.diagonal()
    if way == "inputs":
        return strength
    both = SOLVER_WEIGHTS(curvature)
    return both if way == "solver" else both.square() / strength


def missing(weight: torch.Tensor, gram: torch.Tensor, scheme: IntScheme, case: Case) -> torch.Tensor:
    """What GPTQ leaves undone of a layer, float32 ``[columns, rows]``."""
    method = Gptq(GptqOptions(damping=0.05, refinements=case.refinements))
    neighbours = IntGrids.neighbours if case.zeros else lambda *_: []
    with (
        patch.object(Curvature, "column_weights", lambda curvature: weights_of(curvature, case.way)),
        patch.object(IntGrids, "neighbours", neighbours),
    ):
        found = method.quantize(weight, InputStatistics(1, gram=gram), scheme, torch.float16)
    return (weight - found.weight.dequantize(torch.float32)).T.contiguous()


def rows_of(given: argparse.Namespace, records: list[dict[str, str]]) -> Rows:
    """Records as calibration makes tokens of them."""
    with tempfile.TemporaryDirectory() as scratch:
        given.records = Path(scratch) / "records.json"
        given.records.write_text(json.dumps(records), encoding="utf-8")
        return [list(row) for row in read_calibration(given, Path(scratch)).rows]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 15, 27])
    given = parser.parse_args()
    records = json.loads(given.records.read_text(encoding="utf-8"))
    ids = AutoTokenizer.from_pretrained(given.model)(given.text.read_text(encoding="utf-8")).input_ids
    texts = {
        "calibration": rows_of(given, records[: given.samples]),
        "alike": rows_of(given, records[300 : 300 + given.samples]),
        "unlike": [ids[start : start + LENGTH] for start in range(0, 8 * LENGTH, LENGTH)],
    }
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and set(name.split(".")) & set(map(str, given.blocks))
    ]
    known = {text: grams(model, names, rows) for text, rows in texts.items()}
    results: list[dict[str, object]] = []
    for bits, symmetric in ((4, True), (4, False), (3, True), (2, True)):
        scheme, first = IntScheme(bits, given.group_size, symmetric), dict[str, torch.Tensor]()
        for case in CASES:
            losses: dict[str, list[float]] = {text: [] for text in texts}
            for name in names:
                weight = model.get_submodule(name).weight.detach()
                left = missing(weight, known["calibration"][name], scheme, case)
                for text, found in losses.items():
                    found.append(float(row_errors(left, known[text][name]).sum()))
            logs = {text: torch.tensor(found).log() for text, found in losses.items()}
            first = first or logs
            ratios = {text: round(float((logs[text] - first[text]).mean().exp()), 4) for text in texts}
            print(
                f"{scheme.describe():14} {case}", *(f"{text} {ratio:.3f}" for text, ratio in ratios.items()), flush=True
            )
            results.append({"scheme": scheme.describe(), "case": str(case), **ratios})
    print(json.dumps({"benchmark": "scale_search", "ratios": results, **machine()}))


if __name__ == "__main__":
    main()
