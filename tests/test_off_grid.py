"""The benchmark's twin of a model: the same function, and no weight on the grid that it was on."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.numerics.grid_search import encode, quantized, range_grid
from quantkit.schemes import IntScheme
from tests.tiny import FAMILIES, tiny_config

SCHEME = IntScheme(4, 16, False)
"""The grid that the tiny models lie on."""
TWINS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "off_grid.py"))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The weight on its grid."""
    return quantized(
        encode(weight, grid := range_grid(weight, SCHEME, torch.float32), SCHEME), grid, SCHEME
    ).dequantize(torch.float32)


def on_a_grid(family: str, **changes: Any) -> Any:
    """A tiny model whose layers are rounded, with norms and biases that are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
            parameter.copy_(rounded(parameter))
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(parameter)
    return model


def off(model: Any) -> dict[str, float]:
    """By layer, how far its weights are from their grid, as a part of them."""
    layers = {name: module for name, module in model.named_modules() if ".layers." in name and "proj" in name}
    return {
        name: float((rounded(layer.weight) - layer.weight).norm() / layer.weight.norm())
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_twin_gives_the_same_logits_from_weights_off_the_grid(family: str, tied: bool) -> None:
    model = on_a_grid(family, tie_word_embeddings=tied)
    ids = torch.arange(5, 200).view(3, 65)
    before, kept = model(ids).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert max(off(model).values()) < 1e-5
    assert TWINS["disguise"](model, 1.25, 0) <= TWINS["TOLERANCE"]
    assert (model(ids).logits - before).abs().max() <= 1e-4 * before.abs().max()
    assert min(off(model).values()) > 0.02
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, kept[name])}
    assert set(kept) - changed <= {name for name in kept if "q_norm" in name or "k_norm" in name}


def test_a_model_that_would_become_another_function_is_refused() -> None:
    assert "gemma" in FAMILIES
    with pytest.raises(SystemExit, match="gemma is not built like a Llama"):
        TWINS["disguise"](on_a_grid("gemma"), 1.25, 0)
