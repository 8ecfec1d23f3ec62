"""Folds: found by trying in every family, refused where scaling would change the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.engine.groups import shared_inputs
from quantkit.engine.smoothing import Fold, FoldFinder, scaled_rows
from tests.tiny import make_model

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA_LIKE = {
    "input_layernorm": ATTENTION,
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": MLP,
    "mlp.up_proj": ("mlp.down_proj",),
}
NEOX = {"input_layernorm": ("attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)}
OFFSETS = {"gemma": 1.0}


def finder_of(block: nn.Module, run: Callable[[], Any]) -> FoldFinder:
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}

    def once() -> None:
        run()

    return FoldFinder(block, shared_inputs(linears, once), run)


def first_block(folder: Path) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """The first decoder block of a model, and how to run it on some tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    seen: list[tuple[Any, Any]] = []
    handle = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model(torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0)), use_cache=False)
    handle.remove()

    def run() -> torch.Tensor:
        returned = blocks[0](*seen[0][0], **seen[0][1])
        hidden: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
        return hidden

    return blocks[0], run


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox"])
def test_folds_are_found_in_every_family(tmp_path: Path, family: str) -> None:
    block, run = first_block(make_model(tmp_path, family))
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    folds = finder_of(block, run).find()
    assert {fold.producer: fold.readers for fold in folds} == (NEOX if family == "gpt_neox" else LLAMA_LIKE)
    for fold in folds:
        is_norm = fold.producer.endswith("layernorm")
        assert fold.offset == (OFFSETS.get(family, 0.0) if is_norm else 0.0)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was left changed"


def test_heads_that_share_keys_and_values_share_a_channel(tmp_path: Path) -> None:
    """Four heads of 16 over two of v_proj: heads 0 and 1 read its channels 0-15, heads 2 and 3 its 16-31."""
    folds = finder_of(*first_block(make_model(tmp_path))).find()
    (found,) = [fold.channels for fold in folds if fold.producer == "self_attn.v_proj"]
    assert found is not None
    first, second = torch.arange(16), torch.arange(16, 32)
    assert torch.equal(found, torch.cat([first, first, second, second]))


def test_any_factors_leave_the_output_as_it_was(tmp_path: Path) -> None:
    block, run = first_block(make_model(tmp_path, "qwen2"))
    before = run()
    for fold in finder_of(block, run).find():
        width = block.get_submodule(fold.readers[0]).in_features
        assert isinstance(width, int)
        free = torch.rand(width) * 3 + 0.2
        factors = free if fold.channels is None else free[fold.channels]
        producer = dict(block.get_submodule(fold.producer).named_parameters(recurse=False))
        for leaf, parameter in producer.items():
            divisor = 1 / fold.of_producer(factors)
            parameter.data = scaled_rows(parameter.data, divisor, fold.offset if leaf == "weight" else 0.0)
        for reader in fold.readers:
            block.get_parameter(f"{reader}.weight").data *= factors
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-4)


class Leaking(nn.Module):
    """A block whose norm is also read by something that is no Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        found: torch.Tensor = self.linear(normed) + normed
        return found


class Mixing(nn.Module):
    """A block whose second layer reads a mixture of the first one's channels, or a nonlinear function of them."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.function = function

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.function(self.first(hidden)))
        return found


def test_a_norm_that_something_else_reads_is_left_alone() -> None:
    torch.manual_seed(0)
    block, inputs = Leaking().requires_grad_(False), torch.randn(5, 8)
    assert finder_of(block, lambda: block(inputs)).find() == []


@pytest.mark.parametrize(
    ("function", "folds"),
    [
        (torch.nn.functional.relu, True),
        (torch.nn.functional.silu, False),
        (lambda hidden: hidden.roll(1, -1) + hidden, False),
        (lambda hidden: hidden.softmax(-1), False),
    ],
    ids=["relu", "silu", "mixed", "softmax"],
)
def test_only_what_passes_channels_through_folds(function: Callable[[torch.Tensor], torch.Tensor], folds: bool) -> None:
    torch.manual_seed(0)
    block, inputs = Mixing(function).requires_grad_(False), torch.randn(64, 8)
    found = finder_of(block, lambda: block(inputs)).find()
    assert found == ([Fold(("second",), "first")] if folds else [])


def test_what_held_in_one_segment_is_confirmed_or_denied_in_the_next(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    through, mixed = Mixing(torch.nn.functional.relu), Mixing(torch.nn.functional.silu)
    folds = finder_of(through.requires_grad_(False), lambda: through(inputs)).find()
    assert finder_of(through, lambda: through(inputs)).confirms(folds)
    assert not finder_of(mixed.requires_grad_(False), lambda: mixed(inputs)).confirms(folds)
