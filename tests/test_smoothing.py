"""Smoothing places: found by trying in every family, refused where scaling would change the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.engine.groups import shared_inputs
from quantkit.engine.layers import Layer, linear_modules
from quantkit.engine.smoothing import SmoothingFinder, Trial
from quantkit.transforms.base import SmoothingPlace
from quantkit.transforms.channel_scales import scaled_rows
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


def finder_of(block: nn.Module, run: Callable[[], Any], *given: torch.Tensor) -> SmoothingFinder:
    linears = {name: Layer(name, name, module) for name, module in linear_modules(block)}

    def once() -> None:
        run()

    return SmoothingFinder(Trial(block, shared_inputs(linears, once), run, given))


def first_block(
    folder: Path, dtype: torch.dtype = torch.float32, massive: float = 0.0
) -> tuple[nn.Module, Callable[[], torch.Tensor], torch.Tensor]:
    """The first decoder block of a model, how to run it on some tokens, and its hidden states.

    Args:
        folder: of the model.
        dtype: that it computes in.
        massive: value of one channel of the first token, as large models have one.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    seen: list[tuple[Any, Any]] = []
    handle = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    model(torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0)), use_cache=False)
    handle.remove()
    (hidden, *args), kwargs = seen[0]
    if massive:
        hidden[0, 0, 5] = massive

    def run() -> torch.Tensor:
        returned = blocks[0](hidden, *args, **kwargs)
        after: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
        return after

    return blocks[0], run, hidden


@pytest.mark.parametrize("massive", [0.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox"])
def test_places_are_found_in_every_family(tmp_path: Path, family: str, dtype: torch.dtype, massive: float) -> None:
    block, run, hidden = first_block(make_model(tmp_path, family), dtype, massive)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    places = finder_of(block, run, hidden).find()
    found = {place.smooth_layer: place.balance_layers for place in places}
    assert found == (NEOX if family == "gpt_neox" else LLAMA_LIKE)
    for place in places:
        is_norm = place.smooth_layer.endswith("layernorm")
        assert place.offset == (OFFSETS.get(family, 0.0) if is_norm else 0.0)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was left changed"


@pytest.mark.parametrize("massive", [0.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_factors_that_something_forgets_are_refused(
    tmp_path: Path, family: str, dtype: torch.dtype, massive: float
) -> None:
    """However large one token is, beside which nothing that the others lose would show."""
    finder = finder_of(*first_block(make_model(tmp_path, family), dtype, massive))
    before, offset = finder.trial.update(), OFFSETS.get(family, 0.0)
    right = [SmoothingPlace(MLP, "post_attention_layernorm", offset), SmoothingPlace(("mlp.down_proj",), "mlp.up_proj")]
    assert [finder.leaves_output(place, before) for place in right] == [True, True]
    wrong = [
        SmoothingPlace(("mlp.down_proj",), "mlp.gate_proj"),
        SmoothingPlace(MLP[:1], "post_attention_layernorm", offset),
        SmoothingPlace(ATTENTION[:2], "input_layernorm", offset),
    ]
    assert [finder.leaves_output(place, before) for place in wrong] == [False] * 3


class Mlp(nn.Module):
    """A block of two layers with a function between them, of which one neuron answers to one massive activation."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm, self.function = nn.LayerNorm(64), function
        self.fc1, self.fc2 = nn.Linear(64, 256), nn.Linear(256, 64)
        self.fc1.weight.data[11] = 0.0
        self.fc1.weight.data[11, 7] = 40.0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = hidden + self.fc2(self.function(self.fc1(self.norm(hidden))))
        return found


@pytest.mark.parametrize(("name", "passes"), [("gelu", False), ("silu", False), ("relu", True)])
def test_an_outlier_hides_no_function_between_two_layers(name: str, passes: bool) -> None:
    torch.manual_seed(1)
    block, hidden = Mlp(getattr(nn.functional, name)).requires_grad_(False), torch.randn(1, 32, 64)
    hidden[0, 0, 7] = 40.0
    assert block.function(block.fc1(block.norm(hidden))).max() > 100
    found = finder_of(block, lambda: block(hidden), hidden).find()
    assert [place.smooth_layer for place in found] == (["norm", "fc1"] if passes else ["norm"])


def test_heads_that_share_keys_and_values_share_a_channel(tmp_path: Path) -> None:
    """Four heads of 16 over two of v_proj: heads 0 and 1 read its channels 0-15, heads 2 and 3 its 16-31."""
    places = finder_of(*first_block(make_model(tmp_path))).find()
    (found,) = [place.channels for place in places if place.smooth_layer == "self_attn.v_proj"]
    assert found is not None
    first, second = torch.arange(16), torch.arange(16, 32)
    assert torch.equal(found, torch.cat([first, first, second, second]))


def test_any_factors_leave_the_output_as_it_was(tmp_path: Path) -> None:
    block, run, hidden = first_block(make_model(tmp_path, "qwen2"))
    before = run()
    for place in finder_of(block, run, hidden).find():
        width = block.get_submodule(place.balance_layers[0]).in_features
        assert isinstance(width, int)
        free = torch.rand(width) * 3 + 0.2
        factors = free if place.channels is None else free[place.channels]
        smooth = dict(block.get_submodule(place.smooth_layer).named_parameters(recurse=False))
        for leaf, parameter in smooth.items():
            divisor = 1 / place.of_smooth_layer(factors)
            parameter.data = scaled_rows(parameter.data, divisor, place.offset if leaf == "weight" else 0.0)
        for layer in place.balance_layers:
            block.get_parameter(f"{layer}.weight").data *= factors
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


class Routed(nn.Module):
    """A block whose norm a router reads, and experts whose weights are no Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(8), nn.Linear(8, 2)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        shares = self.router(normed).softmax(-1)
        return hidden + torch.einsum("te,eij,ti->tj", shares, self.experts, normed)


@pytest.mark.parametrize("massive", [0.0, 1e4])
@pytest.mark.parametrize("kind", [Leaking, Routed])
def test_a_norm_that_something_else_reads_is_left_alone(kind: type[nn.Module], massive: float) -> None:
    torch.manual_seed(0)
    block, inputs = kind().requires_grad_(False), torch.randn(5, 8)
    inputs[0, 3] += massive
    assert finder_of(block, lambda: block(inputs), inputs).find() == []


@pytest.mark.parametrize(
    ("function", "passes"),
    [
        (torch.nn.functional.relu, True),
        (torch.nn.functional.silu, False),
        (lambda hidden: hidden.roll(1, -1) + hidden, False),
        (lambda hidden: hidden.softmax(-1), False),
    ],
    ids=["relu", "silu", "mixed", "softmax"],
)
def test_only_what_passes_channels_through_is_a_place(
    function: Callable[[torch.Tensor], torch.Tensor], passes: bool
) -> None:
    torch.manual_seed(0)
    block, inputs = Mixing(function).requires_grad_(False), torch.randn(64, 8)
    found = finder_of(block, lambda: block(inputs)).find()
    assert found == ([SmoothingPlace(("second",), "first")] if passes else [])


def test_what_held_in_one_segment_is_confirmed_or_denied_in_the_next(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    through, mixed = Mixing(torch.nn.functional.relu), Mixing(torch.nn.functional.silu)
    places = finder_of(through.requires_grad_(False), lambda: through(inputs)).find()
    assert finder_of(through, lambda: through(inputs)).confirms(places)
    assert not finder_of(mixed.requires_grad_(False), lambda: mixed(inputs)).confirms(places)
