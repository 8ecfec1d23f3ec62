"""Adapters of experts, of models that see, and such whose names are not the base's: merged as PEFT merges them."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.model_class import model_class
from quantkit.errors import SourceError
from quantkit.merging import merge_model, merged_source
from quantkit.recipe import MergeSpec, ModelSpec
from quantkit.source import resolve
from tests.architectures import BASE, make
from tests.runs import Notebook, config_of
from tests.stored_models import as_mxfp4
from tests.tiny import tiny_tokenizer

STRENGTH = 0.05
EXPERTS: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj|proj|linear).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj|proj|linear)))|(?:.*?audio.*?proj.*?)"
)
"""The pattern by which Unsloth trains the language model of one that sees."""
OTHERS: dict[str, dict[str, Any]] = {
    "llama4_text": {
        **BASE, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 96, "attention_chunk_size": 64,
    },
    "jamba": {
        **BASE, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False,
        "num_experts": 2,
    },
    "jetmoe": {**BASE, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "zamba2": {
        "vocab_size": BASE["vocab_size"], "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 32,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "use_mamba_kernels": False, "pad_token_id": 0,
    },
    "qwen3_vl_moe": {
        "text_config": {
            **BASE, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        },
    },
}  # fmt: skip


def load(folder: Path) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return model_class(config).from_pretrained(folder, dtype=torch.float32).eval()


def adapt(folder: Path, base: Path, rows: int = 0, **config: Any) -> Path:
    """An adapter that PEFT made, every trained number away from its beginning, of a vocabulary of so many rows."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(base)
        if rows:
            model.resize_token_embeddings(rows)
        tuned = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **config}))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * STRENGTH
        tuned.save_pretrained(str(folder), save_embedding_layers=bool(rows))
    return folder


def unloaded(base: Path, adapter: Path, rows: int = 0) -> dict[str, torch.Tensor]:
    """The parameters after PEFT's own ``merge_and_unload``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(base)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


def assert_merged(base: Path, out: Path, adapter: Path) -> None:
    """The merged file loads as what PEFT merges, tensor by tensor, and has the tensors of the base's file."""
    found, wanted = load(out).state_dict(), unloaded(base, adapter)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=2e-7), name
    before, after = CheckpointReader(base), CheckpointReader(out)
    assert {name: before.shape(name) for name in before.names()} == {name: after.shape(name) for name in after.names()}


def renamed(adapter: Path, folder: Path, *changes: tuple[str, str], **config: Any) -> Path:
    """An adapter with other names in its file."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for old, new in changes:
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(told | config))
    return folder


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llava"
    make(folder, "llava")
    return folder


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("mixtral", EXPERTS),
        ("qwen3_moe", EXPERTS | {"use_rslora": True}),
        ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"]}),
        ("qwen3_moe", {"target_parameters": ["mlp.gate.weight", "experts.down_proj"]}),
        ("gpt_oss", EXPERTS | {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}}),
        ("qwen3_vl_moe", EXPERTS),
        ("llama4_text", EXPERTS),
        ("jetmoe", {"target_parameters": ["input_linear.weight", "output_linear.weight"]}),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    ],
)
def test_adapted_stacks_of_experts(architecture: str, config: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    make(base, architecture, **OTHERS.get(architecture, {}))
    adapter = adapt(tmp_path / "adapter", base, **config)
    facts = merge_model(str(base), str(adapter), tmp_path / "out")
    assert facts["check"]["relative_difference"] < 1e-5 < 1e-3 < facts["check"]["adapter_kl_divergence"]
    assert facts["adapters"][0]["layers"] > 2
    assert_merged(base, tmp_path / "out", adapter)


def test_a_base_in_mxfp4_is_decoded_first(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make(base, "gpt_oss")
    as_mxfp4(base)
    decoded = resolve(ModelSpec(source=str(base)), tmp_path / "work").folder
    adapter = adapt(tmp_path / "adapter", decoded, **EXPERTS)
    facts = merge_model(str(base), str(adapter), tmp_path / "out", dtype="float32", any_base=True)
    assert facts["check"]["relative_difference"] < 1e-4 < 1e-3 < facts["check"]["adapter_kl_divergence"]
    assert_merged(decoded, tmp_path / "out", adapter)
    spec = ModelSpec.model_validate({"source": str(base), "adapter": str(adapter)})
    merged = merged_source(spec, MergeSpec(any_base=True), tmp_path / "run", Notebook())
    assert (merged.decoded, merged.relative_to) == ("mxfp4", "the dequantized source")
    assert merged.made_from()["base"]["decoded"] == "mxfp4"


def test_weighted_adapters_of_experts_add_up(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make(base, "mixtral")
    first = adapt(tmp_path / "first", base, **EXPERTS)
    second = adapt(tmp_path / "second", base, r=2, **EXPERTS)
    weights = [{"source": str(first), "weight": 0.5}, {"source": str(second), "weight": -2.0}]
    merge_model(str(base), weights, tmp_path / "out")
    plain, one, two = load(base).state_dict(), unloaded(base, first), unloaded(base, second)
    for name, tensor in load(tmp_path / "out").state_dict().items():
        wanted = plain[name] + 0.5 * (one[name] - plain[name]) - 2.0 * (two[name] - plain[name])
        assert torch.allclose(tensor, wanted, rtol=0, atol=2e-6), name


def test_experts_that_were_layers_when_the_adapter_was_trained(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make(base, "qwen3_moe")
    adapter = adapt(tmp_path / "adapter", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj"
    before = CheckpointReader(base).read(f"{name}.weight")
    first, second = torch.randn(4, before.shape[1]), torch.randn(before.shape[0], 4)
    tensors |= {f"base_model.model.{name}.lora_A.weight": first, f"base_model.model.{name}.lora_B.weight": second}
    save_file(tensors, adapter / "adapter_model.safetensors")
    facts = merge_model(str(base), str(adapter), tmp_path / "out")
    assert f"PEFT finds no layer '{name}'" in facts["check"]["skipped"]
    after = CheckpointReader(tmp_path / "out")
    assert torch.allclose(after.read(f"{name}.weight"), before + second @ first * 2, atol=1e-5)
    other = name.replace("experts.2", "experts.3")
    assert torch.equal(after.read(f"{other}.weight"), CheckpointReader(base).read(f"{other}.weight"))


def test_a_router_that_was_a_layer_when_the_adapter_was_trained(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make(base, "mixtral")
    adapter = adapt(tmp_path / "adapter", base, target_parameters=["mlp.gate.weight"])
    old = {"target_parameters": None, "target_modules": ["q_proj", "gate"]}
    given = renamed(adapter, tmp_path / "given", (r"mlp\.gate", "block_sparse_moe.gate"), **old)
    facts = merge_model(str(base), str(given), tmp_path / "out")
    assert facts["check"]["relative_difference"] < 1e-5
    assert_merged(base, tmp_path / "out", adapter)


def test_weights_that_the_model_reads_past_peft_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make(base, "jamba", **OTHERS["jamba"])
    adapter = adapt(tmp_path / "adapter", base, target_modules=["dt_proj", "q_proj"])
    watching = Notebook()
    check = merge_model(str(base), str(adapter), tmp_path / "out", observer=watching)["check"]
    assert check["relative_difference"] < 1e-5 < check["unmerged_difference"]
    assert any("reads weights past PEFT's layers" in note for note in watching.notes)
    assert_merged(base, tmp_path / "out", adapter)


def test_blocks_that_share_weights_and_not_their_change_are_one_line(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make(base, "zamba2", **OTHERS["zamba2"])
    adapter = adapt(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(SourceError, match=r"layers\.1\..*q_proj' and 'model\.layers\.3\..*share a weight in the base"):
        merge_model(str(base), str(adapter), tmp_path / "out")


@pytest.mark.parametrize("named", ["model.layers", "model.language_model.layers", "language_model.model.layers"])
def test_a_model_of_which_transformers_builds_the_language_model_alone(named: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = make(base, "qwen3_5_moe_text")
    held = {name: CheckpointReader(base).read(name) for name in CheckpointReader(base).names()}
    seen = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in held.items()}
    tower = "model.visual.blocks.0.attn.qkv.weight"
    seen[tower] = torch.randn(4, 8)
    save_file(seen, base / "model.safetensors")
    adapter = adapt(tmp_path / "adapter", base, target_modules=["down_proj"], **EXPERTS)
    given = renamed(adapter, tmp_path / "given", (r"model\.layers", named))
    facts = merge_model(str(base), str(given), tmp_path / "out")
    assert facts["check"]["relative_difference"] < 1e-5
    after = CheckpointReader(tmp_path / "out")
    assert set(after.names()) == set(seen)
    assert torch.equal(
        after.read("model.visual.blocks.0.attn.qkv.weight"), seen["model.visual.blocks.0.attn.qkv.weight"]
    )
    assert load(tmp_path / "out").state_dict().keys() == model.state_dict().keys()
    assert_merged(base, tmp_path / "out", adapter)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [(r"model\.language_model\.", "language_model.model.")],
        [(r"model\.language_model\.layers", "model.layers")],
        [(r"base_model\.model\.", "base_model.model._orig_mod.")],
        [(r"^base_model", "_orig_mod.base_model"), (r"(lora_[AB])\.weight", r"\1.default.weight")],
    ],
)
def test_a_language_model_in_one_that_sees_by_any_of_its_names(
    seeing: Path, changes: list[tuple[str, str]], tmp_path: Path
) -> None:
    pattern = r"model\.language_model.*\.(q_proj|down_proj)"
    config: dict[str, Any] = {"rank_pattern": {r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    adapter = adapt(tmp_path / "adapter", seeing, target_modules=pattern, **config)
    given = renamed(adapter, tmp_path / "given", *changes)
    facts = merge_model(str(seeing), str(given), tmp_path / "out")
    assert facts["check"]["relative_difference"] < 1e-5 < 1e-3 < facts["check"]["adapter_kl_divergence"]
    assert_merged(seeing, tmp_path / "out", adapter)


def test_a_pattern_that_could_take_for_ever_is_not_matched(seeing: Path, tmp_path: Path) -> None:
    adapter = adapt(tmp_path / "adapter", seeing, target_modules=UNSLOTH)
    watching = Notebook()
    facts = merge_model(str(seeing), str(adapter), tmp_path / "out", observer=watching)
    assert facts["check"]["relative_difference"] < 1e-5
    assert facts["adapters"][0]["layers"] == 14
    assert_merged(seeing, tmp_path / "out", adapter)
    assert any("its target_modules are a pattern that is not matched" in note for note in watching.notes)


def test_towers_that_were_not_trained_are_not_missed(seeing: Path, tmp_path: Path) -> None:
    adapter = adapt(tmp_path / "adapter", seeing, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    text = {name: tensor for name, tensor in tensors.items() if "vision" not in name}
    assert len(text) < len(tensors)
    save_file(text, adapter / "adapter_model.safetensors")
    merge_model(str(seeing), str(adapter), tmp_path / "out")
    save_file(dict(list(text.items())[2:]), adapter / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"targets the layer 'model\.language_model\..* and holds no"):
        merge_model(str(seeing), str(adapter), tmp_path / "again")


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("llava", {"modules_to_save": ["embed_tokens", "lm_head"]}), ("gemma3", {}), ("llava", {})],
)
def test_a_resized_vocabulary_of_a_language_model_that_sees(
    architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    seeing = tmp_path / "base"
    make(seeing, architecture)
    rows = config_of(seeing)["text_config"]["vocab_size"] + 7
    adapter = adapt(tmp_path / "adapter", seeing, rows, **config)
    own = tiny_tokenizer("{{ messages[0]['content'] }}")
    own.add_tokens([f"<added{number}>" for number in range(rows - len(own))])
    own.save_pretrained(adapter)
    merge_model(str(seeing), str(adapter), tmp_path / "out")
    assert config_of(tmp_path / "out")["text_config"]["vocab_size"] == rows
    merged = load(tmp_path / "out")
    assert merged.get_input_embeddings().num_embeddings == rows
    for name, tensor in unloaded(seeing, adapter, rows).items():
        assert torch.allclose(merged.state_dict()[name], tensor, rtol=0, atol=2e-7), name
    assert len(json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]) >= 7
