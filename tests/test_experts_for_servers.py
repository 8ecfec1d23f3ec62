"""What exports of mixtures tell servers: names of each expert, one scheme for all, and what stays float."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantkit
from quantkit.errors import SchemeError
from quantkit.exports import open_export
from tests.architectures import make

ROUTERS = {
    "mixtral": [f"model.layers.{block}.block_sparse_moe.gate" for block in (0, 1)],
    "qwen3_moe": [f"model.layers.{block}.mlp.gate" for block in (0, 1)],
    "gpt_oss": [f"model.layers.{block}.mlp.router" for block in (0, 1)],
    "deepseek_v3": ["model.layers.1.mlp.gate"],
    "qwen2_moe": [f"model.layers.{block}.mlp.{leaf}" for block in (0, 1) for leaf in ("gate", "shared_expert_gate")],
}


def quantized(folder: Path, architecture: str, **options: Any) -> Path:
    make(folder / "float", architecture)
    options = {
        "method": "rtn",
        "device": "cpu",
        **({} if "scheme" in options else {"bits": 4, "group_size": 32}),
        **options,
    }
    return quantkit.quantize(folder / "float", out=folder / "out", **options)


def told(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("architecture", ROUTERS)
def test_servers_are_told_of_every_router_and_find_each_expert(tmp_path: Path, architecture: str) -> None:
    """vLLM builds routers as layers, and takes those that are not named for packed ones."""
    out = quantized(tmp_path, architecture)
    ignored = told(out)["ignore"]
    assert set(ROUTERS[architecture]) <= set(ignored)
    assert "model.embed_tokens" not in ignored
    assert len(set(ignored)) == len(ignored)
    experts = [
        name for name in load_file(out / "model.safetensors") if re.search(r"\.experts\.\d+\.\w+\.weight_packed$", name)
    ]
    assert len(experts) == 4 * 3 * (1 if architecture == "deepseek_v3" else 2)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_awq_names_them_too(tmp_path: Path, architecture: str) -> None:
    out = quantized(tmp_path, architecture, format="awq", symmetric=False)
    assert set(ROUTERS[architecture]) <= set(told(out)["modules_to_not_convert"])


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "a projection": ({"overrides": {"down_proj": {"bits": 8}}}, "0.gate_proj is int4 g32 sym and 0.down_proj is int8"),
    "an expert": ({"overrides": {r"experts\.2\.": {"bits": 8}}}, "0.gate_proj is int4 g32 sym and 2.gate_proj is int8"),
    "a float one": ({"ignore": ["lm_head", r"experts\.3\."]}, "0.gate_proj is int4 g32 sym and 3.gate_proj is float"),
}


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("kind", DIFFERENT)
def test_experts_of_a_block_must_agree(tmp_path: Path, kind: str, form: str) -> None:
    keys, words = DIFFERENT[kind]
    with pytest.raises(SchemeError) as caught:
        quantized(tmp_path, "qwen3_moe", format=form, **keys)
    assert words in caught.value.problem
    assert f"runtimes of the format {form} load all experts of a block in one scheme" in caught.value.problem
    assert r"'\.experts\.'" in str(caught.value.remedy)
    assert not (tmp_path / "out").exists()


def test_blocks_may_differ_and_gptq_tells_vllm_by_the_name_of_the_stack(tmp_path: Path) -> None:
    out = quantized(tmp_path, "qwen3_moe", format="gptq", first_blocks={"count": 1, "bits": 8})
    dynamic = told(out)["dynamic"]
    changed = {pattern: keys for pattern, keys in dynamic.items() if "experts" in pattern}
    ((pattern, keys),) = changed.items()
    assert keys == {"bits": 4}
    wanted = {"model.layers.1.mlp.experts": True, "model.layers.1.mlp.experts.3.up_proj": True}
    wanted |= {"model.layers.0.mlp.experts": False, "model.layers.1.mlp.gate": False}
    compiled = re.compile(pattern.removeprefix("+:"))
    assert {name: compiled.match(name) is not None for name in wanted} == wanted
    schemes = open_export(out).schemes
    assert {schemes[f"model.layers.{block}.mlp.experts.1.up_proj"].describe() for block in (0, 1)} == {
        "int8 g32 sym",
        "int4 g32 sym",
    }


def test_awq_keeps_a_stack_of_experts_float_by_its_name(tmp_path: Path) -> None:
    out = quantized(
        tmp_path, "qwen3_moe", format="awq", symmetric=False, ignore=["lm_head", r"layers\.0\.mlp\.experts"]
    )
    assert "model.layers.0.mlp.experts" in told(out)["modules_to_not_convert"]
    assert not any("layers.0.mlp.experts" in layer for layer in open_export(out).schemes)


@pytest.mark.parametrize(
    ("architecture", "gate", "up"), [("mixtral", "w1", "w3"), ("qwen3_moe", "gate_proj", "up_proj")]
)
def test_gate_and_projection_of_an_expert_share_a_global_scale(
    tmp_path: Path, architecture: str, gate: str, up: str
) -> None:
    """vLLM takes the gate's for both."""
    out = quantized(tmp_path, architecture, scheme="nvfp4")
    tensors = load_file(out / "model.safetensors")
    gates = [name for name in tensors if name.endswith(f"{gate}.weight_global_scale")]
    assert len(gates) == 8
    for name in gates:
        assert torch.equal(tensors[name], tensors[name.replace(gate, up)])
    assert len({float(tensors[name]) for name in gates}) > 1
