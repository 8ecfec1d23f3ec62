"""Tensors that a file has and the class of its model does not know, and the reverse: told, copied, kept float."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import EvaluationError
from quantkit.quantization.plan import plan_layers
from quantkit.recipe import VariantSpec
from quantkit.runtimes.base import LoadOptions
from quantkit.runtimes.reference import Reference
from quantkit.system.validation import parse_section
from tests.architectures import make
from tests.tiny import VOCABULARY, make_model, tiny_rows, tiny_tokenizer

PLAIN = LoadOptions(device="cpu", dtype="float32")
NEXT = "model.layers.2"
"""The layer that predicts further tokens, as DeepSeek-V3 and GLM-4.5 number it: after those of the model."""


def variant(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "v", "method": "rtn", "group_size": 32, **keys}, "test")


def with_next_layer(folder: Path) -> Path:
    """A model with a layer more in its file, experts in it, and a module of its own."""
    make_model(folder, num_hidden_layers=2, dtype=torch.bfloat16)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    last = {name: each.clone() for name, each in tensors.items() if ".layers.1." in name}
    own = {name.replace(".layers.1.", ".layers.2."): each for name, each in last.items()}
    more = {
        f"{NEXT}.eh_proj.weight": torch.randn(64, 128),
        f"{NEXT}.mlp.experts.0.up_proj.weight": torch.randn(32, 64),
        f"{NEXT}.mlp.gate.weight": torch.randn(4, 64),
        "mtp.fc.weight": torch.randn(64, 128),
        "mtp.norm.weight": torch.randn(64),
    }
    save_file(tensors | own | more, file, {"format": "pt"})
    return folder


def settings(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return found


def stays_float(found: dict[str, Any], name: str) -> bool:
    """Whether a ``quantization_config`` keeps a layer float."""
    if "dynamic" in found and "modules_to_not_convert" not in found:
        return any(re.match(pattern.removeprefix("-:"), name) for pattern in found["dynamic"] if pattern[0] == "-")
    return name in (found.get("ignore") or found["modules_to_not_convert"])


def test_what_the_class_does_not_know_is_told_and_copied(tmp_path: Path) -> None:
    source = with_next_layer(tmp_path / "model")
    layers = plan_layers(Skeleton(source), variant())
    unknown = "unknown to LlamaForCausalLM, copied as they are: "
    assert layers.notes == (f"{unknown}{NEXT} (12 tensors), mtp (2 tensors)",)
    out = quantkit.quantize(source, out=tmp_path / "out", method="rtn", group_size=32, dtype="own")
    read, written = CheckpointReader(source), CheckpointReader(out)
    copied = [name for name in read.names() if name.startswith((f"{NEXT}.", "mtp."))]
    assert len(copied) == 14
    assert all(torch.equal(read.read(name), written.read(name)) for name in copied)
    loaded = Reference().load(out, PLAIN)
    assert loaded.logits(torch.tensor(tiny_rows(1, 12, 12))) is not None


@pytest.mark.parametrize("store", ["compressed-tensors", "gptq", "awq"])
def test_servers_are_told_that_its_layers_are_float(tmp_path: Path, store: str) -> None:
    """vLLM builds them and looks for packed weights of each layer that the config does not name."""
    source = with_next_layer(tmp_path / "model")
    out = quantkit.quantize(source, out=tmp_path / "out", method="rtn", group_size=32, format=store)
    wanted = ["self_attn.q_proj", "mlp.down_proj", "eh_proj", "mlp.experts.0.up_proj", "mlp.gate"]
    assert all(stays_float(settings(out), f"{NEXT}.{name}") for name in wanted)
    assert not stays_float(settings(out), f"{NEXT}.input_layernorm")
    assert store == "gptq" or stays_float(settings(out), "mtp.fc")


@pytest.mark.parametrize("store", ["compressed-tensors", "gptq", "awq"])
def test_a_router_that_is_a_bare_parameter_is_named_as_float(tmp_path: Path, store: str) -> None:
    make(tmp_path / "model", "qwen3_moe")
    out = quantkit.quantize(tmp_path / "model", out=tmp_path / "out", method="rtn", group_size=32, format=store)
    assert stays_float(settings(out), "model.layers.1.mlp.gate")


@pytest.mark.parametrize("keys", [{}, {"overrides": {"down_proj": {"bits": 8}}}])
def test_the_model_of_text_alone_is_told_of_float_layers_by_its_own_names(tmp_path: Path, keys: dict[str, Any]) -> None:
    """transformers makes a causal language model of what was saved as one that sees, and calls its layers otherwise."""
    make(tmp_path / "model", "qwen3_5")
    out = quantkit.quantize(tmp_path / "model", out=tmp_path / "out", method="rtn", group_size=32, **keys)
    ids, found = torch.tensor(tiny_rows(2, 20, 20)), []
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model, info = kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        with torch.no_grad():
            found.append(model.eval()(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def classifier(folder: Path) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval().to(torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.float()


@pytest.mark.parametrize("keys", [{}, {"ignore": ["lm_head", "down_proj"]}])
def test_a_classifier_keeps_its_head_and_loads_again(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = classifier(tmp_path / "model")
    notes = plan_layers(Skeleton(tmp_path / "model"), variant(**keys)).notes
    assert "unknown to LlamaForCausalLM, copied as they are: score" in notes
    assert "missing in the checkpoint, though LlamaForCausalLM has them: lm_head.weight" in notes
    keys |= {"method": "rtn", "group_size": 32, "bits": 8}
    out = quantkit.quantize(tmp_path / "model", out=tmp_path / "out", dtype="own", **keys)
    assert "score" in settings(out)["ignore"]
    packed, info = AutoModelForSequenceClassification.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(packed, LlamaForSequenceClassification)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.tensor(tiny_rows(2, 20, 20))
    with torch.no_grad():
        found, expected = packed.eval()(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(packed.score.weight, model.score.weight)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.std()


def test_a_classifier_gives_no_next_token_to_score(tmp_path: Path) -> None:
    classifier(tmp_path)
    with pytest.raises(EvaluationError, match="is a LlamaForSequenceClassification: it has no lm_head"):
        quantkit.evaluate(tmp_path, texts=["prose"], max_tokens=64, context_length=32)


def test_a_model_that_lacks_nothing_has_no_note(tmp_path: Path) -> None:
    skeleton = Skeleton(make_model(tmp_path, tie_word_embeddings=True))
    assert skeleton.lacking() == []
    assert skeleton.others() == []
