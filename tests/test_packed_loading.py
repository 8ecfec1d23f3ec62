"""Models that transformers cannot load packed because their class reaches for weights: known beforehand, and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import quantkit
from quantkit.engine.initializing import reaches_for_weights
from quantkit.engine.skeleton import Skeleton
from quantkit.quantization.plan import plan_layers
from quantkit.recipe import VariantSpec
from quantkit.runtimes._choice import choose_runtime
from quantkit.runtimes.reference import Reference
from quantkit.system.validation import parse_section
from tests.architectures import ARCHITECTURES, BASE, GPT, make
from tests.tiny import VOCABULARY, tiny_rows, tiny_tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "falcon": ARCHITECTURES["falcon"],
    "gpt_bigcode": {**GPT, "vocab_size": VOCABULARY},
    "nanochat": BASE,
    "mamba": {**BASE, "time_step_rank": 4, "state_size": 8},
    "llama": BASE,
    "starcoder2": BASE,
    "mixtral": ARCHITECTURES["mixtral"],
}


def made(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def fails(out: Path) -> bool:
    """Whether transformers itself fails on a packed file for want of a weight."""
    try:
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            model(input_ids=torch.tensor(tiny_rows(1, 12, 12)), use_cache=False)
    except AttributeError as error:
        return "no attribute 'weight'" in str(error)
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_cannot_load_packed_is_said_and_nothing_else(tmp_path: Path, kind: str) -> None:
    """Where transformers mends a class, both sides change."""
    source = made(tmp_path / "model", kind)
    out = quantkit.quantize(source, out=tmp_path / "out", method="rtn", group_size=32)
    manifest = json.loads((out / "manifest.json").read_text())
    notes = json.loads((out / "stage.json").read_text())["facts"]["notes"]
    told = [note for note in notes if "reaches for the weights of packed layers such as" in note]
    assert fails(out) == bool(told) == (not manifest["transformers_loads"])
    if told:
        assert "the reference decoder reads the file, and vLLM does where it has such a model" in told[0]
        assert choose_runtime(out, "auto", "float32").name == Reference.name


@pytest.mark.parametrize("ignore", [["lm_head"], [r"\.experts\.", "lm_head"]])
def test_float_weights_that_transformers_merges_beside_packed_ones_are_said(tmp_path: Path, ignore: list[str]) -> None:
    """Its converter takes them for packed; where transformers mends that, both sides change."""
    source = made(tmp_path / "model", "mixtral")
    out = quantkit.quantize(source, out=tmp_path / "out", method="rtn", group_size=32, ignore=ignore)
    notes = json.loads((out / "stage.json").read_text())["facts"]["notes"]
    told = [note for note in notes if "of float tensors, which it takes for packed ones" in note]
    assert bool(told) == (len(ignore) > 1)
    if not told:
        assert choose_runtime(out, "auto", "float32").name == "transformers"
        return
    assert choose_runtime(out, "auto", "float32").name == Reference.name
    try:
        _, found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, ValueError):
        return
    assert any(found.values())


@pytest.mark.parametrize("replaced", [True, False])
def test_the_model_is_left_as_it_was(tmp_path: Path, replaced: bool) -> None:
    make(tmp_path, "falcon")
    skeleton = Skeleton(tmp_path)
    before = list(skeleton.model.named_parameters()), list(skeleton.model.named_modules())
    found = reaches_for_weights(skeleton.model, [layer.path for layer in skeleton.layers()], replaced=replaced)
    assert (found is None) == replaced
    after = list(skeleton.model.named_parameters()), list(skeleton.model.named_modules())
    assert [name for name, _ in before[0]] == [name for name, _ in after[0]]
    assert all(one is other for (_, one), (_, other) in zip(before[0], after[0], strict=True))
    assert all(one is other for (_, one), (_, other) in zip(before[1], after[1], strict=True))


def test_formats_that_keep_a_weight_are_not_asked(tmp_path: Path) -> None:
    keys = {"name": "v", "method": "rtn", "scheme": "nf4", "format": "bitsandbytes"}
    layers = plan_layers(Skeleton(made(tmp_path, "falcon")), parse_section(VariantSpec, keys, "test"))
    assert layers.transformers_loads
