"""The skeleton is the model that transformers would load, but for where its weights are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from quantkit.checkpoint import CheckpointReader
from quantkit.engine import outline
from quantkit.engine.empty_model import empty_model, find_blocks
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError, SourceError
from tests.architectures import make
from tests.tiny import FAMILIES, make_model

CPU = torch.device("cpu")


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    """A skeleton with everything in it but the head."""
    skeleton, reader = Skeleton(folder), CheckpointReader(folder)
    skeleton.load_frame(reader, CPU, dtype)
    for segment in skeleton.segments:
        skeleton.load(segment, reader, CPU, dtype)
    return skeleton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_what_transformers_loads(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    make_model(tmp_path, family)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    skeleton = loaded(tmp_path, dtype)
    found = dict(skeleton.model.named_parameters(remove_duplicate=False))
    assert list(found) == [name for name, _ in expected.named_parameters(remove_duplicate=False)]
    for name, parameter in expected.named_parameters():
        if name != "lm_head.weight":
            assert torch.equal(found[name], parameter), name
            assert found[name].dtype == dtype
            assert not found[name].requires_grad
    buffers = dict(skeleton.model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name].to(buffer.dtype), buffer), name
    assert not skeleton.model.training


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_of_the_frame_stays_when_it_is_unloaded(tmp_path: Path, tied: bool) -> None:
    make_model(tmp_path, tie_word_embeddings=tied)
    skeleton, reader = Skeleton(tmp_path), CheckpointReader(tmp_path)
    for _ in range(2):  # and it can be loaded again
        skeleton.load_frame(reader, CPU, torch.float32)
        embedding = skeleton.text.get_input_embeddings().weight
        assert torch.equal(embedding, reader.read("model.embed_tokens.weight").float())
        skeleton.unload_frame()
        assert all(each.is_meta for each in skeleton.model.parameters() if each.ndim > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_large_parameters_start_and_end_on_meta(tmp_path: Path, family: str) -> None:
    make_model(tmp_path, family)
    skeleton = Skeleton(tmp_path)
    before = dict(skeleton.model.named_parameters())
    assert all(parameter.is_meta for parameter in before.values() if parameter.ndim > 1)
    assert not any(buffer.is_meta for buffer in skeleton.model.buffers())
    segment, other = skeleton.segments
    skeleton.load(segment, CheckpointReader(tmp_path), CPU, torch.float32)
    assert not any(parameter.is_meta for parameter in segment.module.parameters())
    assert all(parameter.is_meta for parameter in other.module.parameters() if parameter.ndim > 1)
    skeleton.unload(segment)
    after = dict(skeleton.model.named_parameters())
    assert {name: id(parameter) for name, parameter in after.items()} == {
        name: id(parameter) for name, parameter in before.items()
    }


def test_experts_that_begin_as_zeros_are_not_there_for_all_blocks(tmp_path: Path) -> None:
    """Those of a block of Llama 4 Scout are 5 GB of zeros where they are made."""
    make(tmp_path, "llama4_text", num_local_experts=8, intermediate_size=96)
    stacks = [each for each in empty_model(tmp_path).parameters() if each.ndim > 2]
    assert stacks
    assert all(each.is_meta for each in stacks)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_are_the_decoder_blocks(tmp_path: Path, family: str) -> None:
    make_model(tmp_path, family, num_hidden_layers=3)
    skeleton = Skeleton(tmp_path)
    base = "gpt_neox" if family == "gpt_neox" else "model"
    assert [segment.prefix for segment in skeleton.segments] == [f"{base}.layers.{index}" for index in range(3)]
    assert skeleton.head is not None
    head = "embed_out" if family == "gpt_neox" else "lm_head"  # transformers renames that of GPT-NeoX on load
    assert skeleton.head.linears == (head,)
    assert skeleton.head.prefix == "lm_head"
    inside = [name for segment in skeleton.segments for name in segment.linears]
    assert [*inside, head] == skeleton.all_linears()
    assert [layer.path for layer in skeleton.segments[1].layers] == list(skeleton.segments[1].linears)
    assert not skeleton.has_routed_layers()


class Nested(nn.Module):
    """Blocks with lists of experts, and a side list with fewer layers that comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": self.experts()}) for _ in range(2))

    def experts(self) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(2, 2) for _ in range(4))


def test_blocks_are_the_outermost_list_with_most_linears() -> None:
    model = Nested()
    ((name, blocks),) = find_blocks(model)
    assert name == "layers"
    assert blocks is model.layers


def test_a_model_whose_blocks_lie_in_parts_is_refused() -> None:
    model = nn.Module()
    model.attentions = nn.ModuleList(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))) for _ in range(3))
    model.feed_forwards = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 16)}) for _ in range(3))
    with pytest.raises(SourceError, match="in several lists, attentions and feed_forwards"):
        find_blocks(model)


def test_a_single_block_is_preferred_to_the_lists_inside() -> None:
    model = Nested()
    model.layers = model.layers[:1]
    model.side = nn.ModuleList()
    ((name, _),) = find_blocks(model)
    assert name == "layers"


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(SourceError, match="Linear has no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "no-such-model"},
        {"model_type": "vit"},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "llama", "num_attention_heads": 7, "hidden_size": 64},
        {},
        [],
    ],
)
def test_an_unknown_or_broken_config_is_a_source_error(tmp_path: Path, config: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"config\.json"):
        Skeleton(tmp_path)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"hidden_size": -8}, RuntimeError),
        ({"dtype": "nope"}, AttributeError),
        ({"num_key_value_heads": 0}, ZeroDivisionError),
        ({"pad_token_id": 10**6}, AssertionError),
        ({"hidden_act": "nope"}, KeyError),
    ],
)
def test_whatever_transformers_raises_for_an_odd_config_is_a_source_error(
    tmp_path: Path, change: dict[str, Any], cause: type[Exception]
) -> None:
    file = make_model(tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SourceError, match=r"config\.json") as caught:
        empty_model(tmp_path)
    assert isinstance(caught.value.__cause__, cause)
    assert "\n" not in str(caught.value)


def test_no_config_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        Skeleton(tmp_path)


class Buffered(nn.Module):
    """A model with every kind of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
        self.register_buffer("stored", torch.empty(4, device="meta"))
        self.register_buffer("counter", torch.empty(1, dtype=torch.int64, device="meta"))
        self.register_buffer("computed", torch.arange(4.0), persistent=False)
        self.register_buffer("optional", torch.ones(4))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> None:
        return None


def buffered(folder: Path, monkeypatch: pytest.MonkeyPatch, **stored: torch.Tensor) -> Skeleton:
    weights = {
        "embed.weight": torch.ones(5, 4),
        "layers.0.0.weight": torch.ones(4, 4),
        "layers.0.0.bias": torch.ones(4),
    }
    save_file(weights | stored, folder / "model.safetensors")
    monkeypatch.setattr(outline, "empty_model", lambda *_: Buffered())
    return loaded(folder, torch.bfloat16)


def test_buffers_come_from_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = buffered(
        tmp_path,
        monkeypatch,
        stored=torch.full((4,), 3.0),
        counter=torch.tensor([2**40 + 1]),
        computed=torch.zeros(4, dtype=torch.float16),
    ).model
    assert torch.equal(model.stored, torch.full((4,), 3.0, dtype=torch.bfloat16))
    assert model.counter.item() == 2**40 + 1
    assert torch.equal(model.computed, torch.arange(4.0)), "a computed buffer is not to be read from an old checkpoint"
    assert torch.equal(model.optional, torch.ones(4))


def test_a_stored_buffer_that_is_missing_or_misshapen_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="tensor stored is not in the checkpoint"):
        buffered(tmp_path, monkeypatch, counter=torch.ones(1, dtype=torch.int64))
    with pytest.raises(CheckpointError, match=r"tensor stored has shape \(7,\), the model expects \(4,\)"):
        buffered(tmp_path, monkeypatch, counter=torch.ones(1, dtype=torch.int64), stored=torch.ones(7))


def test_a_model_without_a_linear_head_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = buffered(tmp_path, monkeypatch, stored=torch.ones(4), counter=torch.ones(1, dtype=torch.int64))
    assert skeleton.head is None
    assert skeleton.all_linears() == ["layers.0.0"]


@pytest.mark.parametrize(("tied", "kept"), [(True, "lm_head.weight"), (True, "model.embed_tokens.weight")])
def test_tied_weights_are_found_under_either_name(tmp_path: Path, tied: bool, kept: str) -> None:
    from safetensors.torch import load_file

    make_model(tmp_path, tie_word_embeddings=tied)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {kept: weight}, tmp_path / "model.safetensors")
    skeleton, reader = Skeleton(tmp_path), CheckpointReader(tmp_path)
    assert skeleton.head is not None
    skeleton.load_frame(reader, CPU, torch.float32)
    skeleton.load(skeleton.head, reader, CPU, torch.float32)
    assert torch.equal(skeleton.model.get_input_embeddings().weight, weight)
    assert torch.equal(skeleton.model.get_output_embeddings().weight, weight)
