"""What stays float in the blocks by default, why, and that it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.cli import app
from quantkit.engine.float_parts import COEFFICIENTS, CONVOLUTION, GATE, RECURRENCE, ROUTER, float_parts
from quantkit.engine.segment import Segment
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import SchemeError
from quantkit.estimation import anatomy_of
from quantkit.estimation.weights import stored
from quantkit.exports.manifest import read_manifest
from quantkit.quantization.left_float import IGNORED, told_names
from quantkit.quantization.plan import Layers, plan_layers
from quantkit.recipe import VariantSpec
from quantkit.report.columns import build_columns
from quantkit.report.numbers import ABSENT
from quantkit.system.units import percentage
from quantkit.system.validation import parse_section
from tests.architectures import BASE, make
from tests.runs import recipe_data, write_recipe, write_records
from tests.tiny import make_model, tiny_tokenizer


def variant(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "v", "method": "rtn", "group_size": 32, **keys}, "test")


def other(folder: Path, kind: str, **keys: Any) -> Path:
    """Write a random model of any kind of transformers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**BASE, **keys})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def reasons(layers: Layers) -> dict[str, str]:
    return {each.name: each.reason for each in layers.left}


def share_of(layers: Layers) -> float:
    assert layers.share is not None
    return layers.share


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("phimoe", {"block_sparse_moe.gate": ROUTER}),
        ("qwen2_moe", {"mlp.gate": ROUTER, "mlp.shared_expert_gate": GATE}),
        ("mixtral", {"block_sparse_moe.gate": ROUTER}),
        ("gpt_oss", {"mlp.router": ROUTER}),
        ("deepseek_v3", {"mlp.gate": ROUTER}),
    ],
)
def test_routers_and_gates_stay_float(tmp_path: Path, architecture: str, expected: dict[str, str]) -> None:
    make(tmp_path, architecture)
    layers = plan_layers(Skeleton(tmp_path), variant())
    found = reasons(layers)
    assert {name.partition(".layers.1.")[2]: reason for name, reason in found.items() if ".1." in name} == expected
    assert all(name.partition(".layers.")[2][2:] in expected for name in found)
    assert not any(name.endswith(tuple(expected)) for name in layers.quantized)


def test_the_share_is_that_of_the_weights_in_all_matrices_of_the_blocks(tmp_path: Path) -> None:
    model = make(tmp_path, "qwen2_moe")
    layers = plan_layers(Skeleton(tmp_path), variant())
    inside = {name: each for name, each in model.named_parameters() if ".layers." in name and each.ndim >= 2}
    left = [each.numel() for name, each in inside.items() if name.endswith("gate.weight")]
    assert layers.share == 1 - sum(left) / sum(each.numel() for each in inside.values())


def test_recurrent_parameters_stay_float_and_end_no_run(tmp_path: Path) -> None:
    """Mamba's ``dt_proj`` has four columns, which no group of 32 divides."""
    keys = {"time_step_rank": 4, "state_size": 8, "expand": 2}
    layers = plan_layers(Skeleton(other(tmp_path, "mamba", **keys)), variant())
    found = {name.rpartition(".")[2]: reason for name, reason in reasons(layers).items()}
    assert found["dt_proj"] == RECURRENCE
    assert found["conv1d"] == CONVOLUTION
    assert {name.rpartition(".")[2] for name in layers.quantized} == {"in_proj", "x_proj", "out_proj"}


def test_the_pace_of_gated_delta_nets_stays_float(tmp_path: Path) -> None:
    make(tmp_path, "qwen3_5_moe_text", linear_num_value_heads=16, linear_value_head_dim=32)
    left = reasons(plan_layers(Skeleton(tmp_path), variant()))
    found = {name.rpartition(".")[2]: reason for name, reason in left.items()}
    assert found["in_proj_a"] == found["in_proj_b"] == RECURRENCE
    assert "in_proj_qkv" not in found


class Odd(nn.Module):
    """A mixture of no known model: experts in a list, its router behind a module, and coefficients."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)) for _ in range(16))
        self.chooser = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 16))
        self.mix = nn.Linear(4, 64)
        self.shared = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64))


def test_a_router_is_found_by_the_experts_beside_it(tmp_path: Path) -> None:
    """And a shared expert, whose first layer has as many rows, is none: there is another matrix beside that."""
    skeleton = Skeleton(make_model(tmp_path, num_hidden_layers=1))
    block = Odd()
    layers = skeleton._segment("model.layers.0", block).layers
    skeleton.segments = [Segment("model.layers.0", block, layers)]
    found = {name.removeprefix("model.layers.0."): part.reason for name, part in float_parts(skeleton).items()}
    assert found == {"chooser.1": ROUTER, "mix": COEFFICIENTS}


def test_a_pattern_that_names_nothing_else_asks_for_what_stays_float(tmp_path: Path) -> None:
    make(tmp_path, "qwen2_moe")
    skeleton = Skeleton(tmp_path)
    keys: dict[str, Any] = {"overrides": {r"shared_expert_gate$": {"bits": 8}}}
    assert plan_layers(skeleton, variant(**keys)).quantized["model.layers.0.mlp.shared_expert_gate"].bits == 8
    broad: dict[str, Any] = {"overrides": {r"mlp": {"bits": 8}}}
    assert plan_layers(skeleton, variant(**broad)).schemes["model.layers.0.mlp.shared_expert_gate"] is None


def test_a_few_layers_that_the_groups_do_not_divide_stay_float(tmp_path: Path) -> None:
    """Of low rank with 48 columns; both layers of the MLP and attention are whole."""
    make(tmp_path, "deepseek_v3", q_lora_rank=48, intermediate_size=2048, moe_intermediate_size=512)
    skeleton = Skeleton(tmp_path)
    layers = plan_layers(skeleton, variant(format="gptq"))
    assert reasons(layers)["model.layers.0.self_attn.q_b_proj"].startswith("group_size 32 does not divide the 48 input")
    assert 0.95 < share_of(layers) < 1
    keys: dict[str, Any] = {"overrides": {"q_b_proj": {"bits": 8}}}
    with pytest.raises(SchemeError, match="q_b_proj: group_size 32 does not divide the 48 input columns"):
        plan_layers(skeleton, variant(format="gptq", **keys))


def test_a_width_that_the_groups_do_not_divide_is_refused_with_those_that_do(tmp_path: Path) -> None:
    skeleton = Skeleton(make_model(tmp_path, hidden_size=96))
    with pytest.raises(SchemeError) as caught:
        plan_layers(skeleton, variant(group_size=64))
    assert "group_size 64 does not divide the 96 input columns (sizes that do: 32" in str(caught.value)
    assert "add allow_float: true" in str(caught.value)
    layers = plan_layers(skeleton, variant(group_size=64, allow_float=True))
    assert {name.rpartition(".")[2] for name in layers.quantized} == {"down_proj", "o_proj"}


def test_a_layer_that_is_fused_with_one_that_does_not_suit_stays_float_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = Skeleton(make_model(tmp_path, intermediate_size=4096, num_key_value_heads=1, head_dim=12))
    layers = plan_layers(skeleton, variant(format="awq", overrides={}))
    left = {name.rpartition(".")[2]: reason for name, reason in reasons(layers).items()}
    assert set(left) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert left["q_proj"] == "servers load them as one matrix with k_proj"


def test_the_head_is_ignored_whatever_its_name(tmp_path: Path) -> None:
    skeleton = Skeleton(make_model(tmp_path, "gpt_neox"))
    assert skeleton.head is not None
    (head,) = skeleton.head.linears
    assert "lm_head" not in head
    assert plan_layers(skeleton, variant()).schemes[head] is None
    assert plan_layers(skeleton, variant(ignore=[])).schemes[head] is not None


def test_what_the_recipe_ignores_is_counted_and_not_held_against_it(tmp_path: Path) -> None:
    layers = plan_layers(Skeleton(make_model(tmp_path)), variant(ignore=["lm_head", "mlp"]))
    assert set(reasons(layers).values()) == {IGNORED}
    assert share_of(layers) < 0.5


def test_what_stays_float_is_told_by_the_plan_the_command_the_manifest_and_the_report(tmp_path: Path) -> None:
    make(tmp_path / "model", "qwen2_moe")
    records = write_records(tmp_path / "records.jsonl")
    wanted: list[dict[str, Any]] = [{"name": "a", "method": "rtn"}, {"name": "b", "method": "rtn", "bits": 8}]
    recipe = write_recipe(tmp_path / "r.yaml", recipe_data(tmp_path / "model", records, tmp_path / "run", wanted))
    share = share_of(plan_layers(Skeleton(tmp_path / "model"), variant()))
    told = f"{percentage(share)} of the block weights"
    done = CliRunner().invoke(app, ["plan", str(recipe)], env={"COLUMNS": "160"})
    assert told in " ".join(done.stdout.split())
    assert done.stdout.count("2 model.layers.N.mlp.gate (") == 1
    assert json.loads(CliRunner().invoke(app, ["plan", str(recipe), "--json"]).stdout)["variants"][0]["share"] == share
    out = tmp_path / "out"
    command = ["quantize", str(tmp_path / "model"), "--method", "rtn", "--group-size", "32", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert f"{told} in int4 g32 sym" in done.stderr
    assert f"{told} quantized, " in done.stderr
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["share"] == share
    assert (
        f"layers, {told.replace('block weights', 'weights of its blocks')}, quantized by"
        in (out / "README.md").read_text()
    )
    assert manifest["float"] == {ROUTER: ["model.layers.N.mlp.gate"], GATE: ["model.layers.N.mlp.shared_expert_gate"]}
    written, source = CheckpointReader(out), CheckpointReader(tmp_path / "model")
    name = "model.layers.0.mlp.gate.weight"
    assert torch.equal(written.read(name), source.read(name).bfloat16())


def test_estimates_keep_float_what_the_plan_keeps(tmp_path: Path) -> None:
    make(tmp_path / "model", "qwen2_moe")
    quantkit.quantize(tmp_path / "model", out=tmp_path / "out", method="rtn", group_size=32, dtype="own")
    reader = CheckpointReader(tmp_path / "out")
    found = stored(anatomy_of(str(tmp_path / "model")), variant())
    assert found.nbytes == sum(map(reader.nbytes, reader.names()))


def test_estimates_ignore_the_head_whatever_its_name(tmp_path: Path) -> None:
    make_model(tmp_path, "gpt_neox")
    anatomy = anatomy_of(str(tmp_path))
    assert "lm_head" not in anatomy.head
    assert anatomy.head not in stored(anatomy, variant()).packed
    assert anatomy.head in stored(anatomy, variant(ignore=[])).packed


def test_names_are_told_as_patterns() -> None:
    names = [f"model.layers.{block}.{leaf}" for block in range(3) for leaf in "abcdef"]
    listed = ", ".join(f"3 model.layers.N.{leaf}" for leaf in "abcd")
    assert told_names(names) == f"{listed} and 2 more like them"
    assert told_names(["a.0.b"]) == "a.N.b"


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100%"), (0.9999, "99.9%"), (0.974, "97.4%"), (0.0001, "under 0.1%"), (0.0, "0%")]
)
def test_a_share_is_never_rounded_to_all_or_nothing(share: float, text: str) -> None:
    assert percentage(share) == text


def test_layers_around_the_blocks_are_told(tmp_path: Path) -> None:
    model = make(tmp_path, "llava")
    (note,) = [
        note for note in plan_layers(Skeleton(tmp_path), variant()).notes if "outside the decoder blocks" in note
    ]
    total = sum(each.numel() for each in model.parameters() if each.ndim >= 2)
    around = [each.numel() for name, each in model.named_parameters() if "projector" in name and each.ndim == 2]
    assert len(around) == 2
    share = percentage(sum(around) / total)
    assert f"multi_modal_projector.linear_1, multi_modal_projector.linear_2 ({share} of all weights)" in note
    assert "vision" not in note


def test_experts_that_servers_load_as_one_stay_float_with_one_that_does_not_suit(tmp_path: Path) -> None:
    make(tmp_path, "qwen2_moe", moe_intermediate_size=24, shared_expert_intermediate_size=2048)
    skeleton = Skeleton(tmp_path)
    found = reasons(plan_layers(skeleton, variant()))
    assert "does not divide the 24 input columns (sizes that do: " in found["model.layers.0.mlp.experts.0.down_proj"]
    together = "runtimes load them as one with model.layers.0.mlp.experts.0.down_proj"
    assert found["model.layers.0.mlp.experts.3.up_proj"] == together
    with pytest.raises(SchemeError, match=r"does not divide the 24 .*or leave out strict: true, and weights like"):
        plan_layers(skeleton, variant(strict=True))


@pytest.mark.parametrize(
    ("store", "keys", "reason"),
    [
        ("compressed-tensors", {}, "group_size 32 does not divide the 136 input columns"),
        ("gptq", {}, "group_size 32 does not divide the 136 input columns"),
        ("awq", {"symmetric": False}, "group_size 32 does not divide the 136 input columns"),
        ("hqq", {"symmetric": False}, "136"),
        ("gguf", {}, "136"),
        ("bitsandbytes", {"scheme": "nf4", "group_size": 64}, "136"),
    ],
)
def test_a_layer_that_a_format_cannot_hold_stays_float_and_is_listed(
    tmp_path: Path, store: str, keys: dict[str, Any], reason: str
) -> None:
    """A fifth of the weights of the blocks; the head has an odd number of rows."""
    skeleton = Skeleton(make_model(tmp_path, intermediate_size=136))
    given = {"group_size": 32, "format": store, "ignore": [], **keys}
    layers = plan_layers(skeleton, variant(**given))
    found = reasons(layers)
    assert all(reason in found[f"model.layers.{block}.mlp.down_proj"] for block in (0, 1))
    assert any("2 model.layers.N.mlp.down_proj (" in note and reason in note for note in layers.notes)
    with pytest.raises(SchemeError, match="or leave out strict: true"):
        plan_layers(skeleton, variant(**given, strict=True))


def test_the_report_has_a_column_where_not_all_is_quantized() -> None:
    def shown(*shares: float) -> list[str] | None:
        rows = [{"name": str(share), "status": "ok", "share": share, "size_bytes": 1} for share in shares]
        columns = build_columns({"name": "r", "baseline": {"size_bytes": 2}, "variants": rows})
        return [cell.text for cell in columns["blocks"].cells] if "blocks" in columns else None

    assert shown(1.0, 1.0) is None
    assert shown(0.974, 1.0) == [ABSENT, "97.4%", "100.0%"]
