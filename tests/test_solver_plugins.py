"""gptqmodel, llmcompressor, optimum, autoawq, aqlm, eetq: what plugins tell them, and make of what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from quantkit.errors import CheckpointError, RecipeError, SchemeError
from quantkit.isolation.lockfile import lock_path
from quantkit.libraries import LIBRARIES, _devices, _layers, autoawq, eetq, gptqmodel, llmcompressor, optimum
from quantkit.libraries._blocks import blocks_of, telling
from quantkit.libraries._counting import Counter
from quantkit.libraries.base import Request
from quantkit.recipe import LibrarySpec
from quantkit.schemes import Fp8Scheme, QuantizedWeight
from quantkit.system.validation import parse_section
from tests.tiny import make_model

LOCKED = ("gptqmodel", "llmcompressor", "optimum", "autoawq", "aqlm")
ROWS = ((5, 6, 7), (8, 9), (10, 11, 12, 13))
BLOCK_LAYERS = [
    f"model.layers.{block}.{name}" for block in range(2) for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up")
]


def request_of(library: str, method: str, **changes: Any) -> Request:
    """A request with the method's defaults."""
    (offer,) = (each for each in LIBRARIES.get(library).offers if each.method == method)
    fields: dict[str, Any] = {
        "model": Path("nowhere"),
        "tokens": ROWS,
        "out": Path("out"),
        "method": method,
        "bits": offer.bits[0],
        "group_size": 64 if offer.grouped else -1,
        "symmetric": offer.symmetric[0],
        "ignore": (),
        "dtype": "float32",
        "device": "cpu",
        "progress": lambda *_: None,
        **changes,
    }
    fields["options"] = {**offer.options, **changes.get("options", {})}
    return Request(**fields)


class Recorder:
    """Stands for a class of a library: remembers what it is called with."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **given: Any) -> SimpleNamespace:
        return SimpleNamespace(kind=self.name, given=given)


def inject(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module of a library that is not installed here, with the packages above it."""
    above = ""
    for part in name.split("."):
        path = f"{above}.{part}".lstrip(".")
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        if above:
            monkeypatch.setattr(sys.modules[above], part, sys.modules[path], raising=False)
        above = path
    for key, value in content.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)
    return sys.modules[name]


@pytest.mark.parametrize("name", LOCKED)
def test_a_lock_pins_all_files_by_hash(name: str) -> None:
    text = lock_path(LIBRARIES.get(name)).read_text(encoding="utf-8")
    pins = [block for block in text.split("\n") if block and not block.startswith(("#", " "))]
    assert len(pins) > 40
    assert all(pin.endswith("\\") and "==" in pin for pin in pins), "a package without a hash"


def test_environments_share_one_torch_where_they_can() -> None:
    pins = {name: [each for each in LIBRARIES.get(name).requirements if each.startswith("torch==")] for name in LOCKED}
    assert pins.pop("llmcompressor") == ["torch==2.14.0"]  # 0.14 allows no newer one
    assert {tuple(each) for each in pins.values()} == {("torch==2.14.1",)}


def test_what_cannot_quantize_says_why() -> None:
    with pytest.raises(RecipeError, match="the aqlm package runs checkpoints that exist and has no quantizer"):
        parse_section(LibrarySpec, {"name": "v", "library": "aqlm"}, "")
    with pytest.raises(SchemeError, match="aqlm cannot quantize"):
        LIBRARIES.get("aqlm")().quantize(request_of("aqlm", "aqlm"))
    assert {offer.devices for offer in LIBRARIES.get("eetq").offers} == {("cuda",)}


@pytest.mark.parametrize(("cores", "workers"), [(1, "2"), (2, "2"), (16, "16")])
def test_gptqmodel_gets_two_workers_at_least(cores: int, workers: str) -> None:
    assert LIBRARIES.get("gptqmodel").variables(cores, "cpu") == {"GPTQMODEL_CPU_WORKERS": workers}


@pytest.fixture
def gptqmodel_config(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GPTQConfig", "GPTAQConfig", "AWQConfig", "RTNConfig", "FP8Config", "GGUFConfig")
    formats = SimpleNamespace(GPTQ="gptq", GPTQ_V2="gptq_v2", GEMM="gemm")
    content = {name: Recorder(name) for name in names}
    inject(monkeypatch, "gptqmodel.quantization.config", FORMAT=formats, **content)


@pytest.mark.usefixtures("gptqmodel_config")
def test_gptqmodel_is_told_method_format_and_options() -> None:
    told = gptqmodel.config_for(request_of("gptqmodel", "gptq", options={"mse": 2.4}))
    assert told.kind == "GPTQConfig"
    assert {key: told.given[key] for key in ("bits", "group_size", "sym", "format", "mse", "gptaq", "dynamic")} == {
        "bits": 4, "group_size": 64, "sym": True, "format": "gptq", "mse": 2.4, "gptaq": None, "dynamic": None,
    }  # fmt: skip
    assert told.given["act_group_aware"] is True
    asymmetric = gptqmodel.config_for(request_of("gptqmodel", "rtn", symmetric=False))
    assert (asymmetric.kind, asymmetric.given["format"]) == ("RTNConfig", "gptq_v2")
    gptaq = gptqmodel.config_for(request_of("gptqmodel", "gptaq")).given["gptaq"]
    assert (gptaq.kind, gptaq.given) == ("GPTAQConfig", {"alpha": 0.25})
    awq = gptqmodel.config_for(request_of("gptqmodel", "awq"))
    assert (awq.kind, awq.given["format"], awq.given["sym"]) == ("AWQConfig", "gemm", False)
    assert "sym" not in gptqmodel.config_for(request_of("gptqmodel", "fp8")).given
    assert gptqmodel.config_for(request_of("gptqmodel", "gguf", bits=8)).given["format"] == "q_0"


@pytest.mark.usefixtures("gptqmodel_config")
@pytest.mark.parametrize("changes", [{"group_size": -1}, {"options": {"desc_act": True}}])
def test_gptqmodel_regroups_columns_only_where_it_can(changes: dict[str, Any]) -> None:
    assert gptqmodel.config_for(request_of("gptqmodel", "gptq", **changes)).given["act_group_aware"] is False


def test_gptqmodel_keeps_float_what_a_pattern_is_found_in(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    found = gptqmodel.rules(request_of("gptqmodel", "gptq", model=model, ignore=("lm_head", r"v_proj$", "nothing")))
    assert found == {r"-:.*(?:v_proj$)": {}}


@pytest.mark.parametrize(
    ("bits", "kind"), [(4, GGMLQuantizationType.Q4_0), (8, GGMLQuantizationType.Q8_0)], ids=["Q4_0", "Q8_0"]
)
def test_blocks_of_ggml_are_read_as_ggml_reads_them(bits: int, kind: GGMLQuantizationType) -> None:
    rows = quantize(np.random.default_rng(0).standard_normal((6, 96), dtype=np.float32), kind)
    parts = gptqmodel.block_parts(torch.from_numpy(rows), bits)
    steps = parts["codes"].float().reshape(6, 3, 32) - (1 << (bits - 1))
    decoded = (steps * parts["scales"].float().unsqueeze(-1)).flatten(1)
    assert np.array_equal(decoded.numpy(), dequantize(rows, kind))


def test_fp8_codes_and_scales_give_the_weights_back() -> None:
    inverse = torch.tensor([448.0, 2.0])
    weight = (torch.tensor([[1.0, -0.5, 0.25], [96.0, -7.0, 0.0]]) * inverse.unsqueeze(1)).to(torch.float8_e4m3fn)
    parts = gptqmodel.fp8_parts(weight, inverse)
    scheme = Fp8Scheme("channel")
    zeros = torch.zeros_like(parts["scales"])
    assert scheme.grids().grouped(parts["codes"]).shape[:2] == parts["scales"].shape
    found = QuantizedWeight(scheme, parts["codes"], parts["scales"], zeros).dequantize()
    assert torch.allclose(found, weight.float() / inverse.unsqueeze(1))


def test_gptqmodel_tells_a_block_once() -> None:
    heard: list[tuple[str, int, int]] = []
    done = gptqmodel.layers_done(request_of("gptqmodel", "gptq", progress=lambda *each: heard.append(each)), 4)
    for finalized in (False, True):
        done(layer_idx=1, submodule_finalized=finalized)
    assert heard == [("layer", 2, 4)]


@pytest.fixture
def llmcompressor_modifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in {
        "gptq": "GPTQModifier",
        "quantization": "QuantizationModifier",
        "transform": "AWQModifier",
        "transform.smoothquant": "SmoothQuantModifier",
    }.items():
        inject(monkeypatch, f"llmcompressor.modifiers.{module}", **{name: Recorder(name)})


@pytest.mark.usefixtures("llmcompressor_modifiers")
def test_llmcompressor_is_told_what_to_do() -> None:
    def told(method: str, **changes: Any) -> list[SimpleNamespace]:
        return llmcompressor.modifiers(request_of("llmcompressor", method, ignore=("lm_head",), **changes))

    (gptq,) = told("gptq", options={"dampening_frac": 0.1, "actorder": "none"})
    weights = gptq.given["config_groups"]["group_0"]["weights"]
    assert (gptq.given["dampening_frac"], gptq.given["block_size"], gptq.given["actorder"]) == (0.1, 128, None)
    assert gptq.given["ignore"] == ["re:.*(?:lm_head)"]
    assert (weights["strategy"], weights["group_size"], weights["symmetric"]) == ("group", 64, True)
    awq, rounded = told("awq", group_size=-1, options={"observer": "memoryless_mse"})
    assert awq.given == {"duo_scaling": True, "n_grid": 20}
    weights = rounded.given["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)
    assert (weights["symmetric"], weights["observer"]) == (False, "memoryless_mse")
    smooth, eight = told("smoothquant")
    assert (smooth.given, eight.given["scheme"]) == ({"smoothing_strength": 0.5}, "W8A8")
    assert [told(method)[0].given["scheme"] for method in ("fp8", "nvfp4")] == ["FP8_DYNAMIC", "NVFP4A16"]
    observers = [told(method)[0].given["weight_observer"] for method in ("fp8", "nvfp4")]
    assert observers == [None, "memoryless_minmax"]
    (searched,) = told("nvfp4", options={"observer": "fouroversix"})
    assert searched.given["weight_observer"] == "fouroversix"
    with pytest.raises(SchemeError, match="no scheme 'FP8' without calibration"):
        told("fp8", options={"scheme": "FP8"})


def test_llmcompressor_gets_rows_as_they_are_in_their_order() -> None:
    batches = list(llmcompressor.loader(request_of("llmcompressor", "gptq")) or ())
    assert [tuple(batch["input_ids"][0].tolist()) for batch in batches] == list(ROWS)
    assert all(batch["attention_mask"].all() for batch in batches)
    assert llmcompressor.loader(request_of("llmcompressor", "rtn", tokens=())) is None


def test_layers_that_stay_float_in_every_block_alike() -> None:
    wanted, kept = _layers.same_in_blocks([*BLOCK_LAYERS, "lm_head"], ("lm_head", "gate"), "optimum")
    assert (wanted, kept) == (["self_attn.q_proj", "mlp.up"], ["mlp.gate_proj"])
    with pytest.raises(SchemeError, match="'ignore' names layers of some blocks alone"):
        _layers.same_in_blocks(BLOCK_LAYERS, ("layers.0.mlp",), "optimum")
    with pytest.raises(SchemeError, match="leaves optimum no layer"):
        _layers.same_in_blocks(BLOCK_LAYERS, ("layers",), "optimum")


def test_optimum_says_in_one_file_what_it_says_in_the_other(tmp_path: Path) -> None:
    said = {"bits": 4, "format": "gptq", "dataset": None}
    (tmp_path / "quantize_config.json").write_text(json.dumps(said), encoding="utf-8")
    before = {"hidden_size": 8, "quantization_config": {"format": "gptq_v2", "dataset": [[1, 2]]}}
    (tmp_path / "config.json").write_text(json.dumps(before), encoding="utf-8")
    optimum.settle_config(request_of("optimum", "gptq", out=tmp_path))
    after = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert after == {"hidden_size": 8, "quantization_config": {**said, "checkpoint_format": "gptq"}}


@pytest.mark.parametrize(
    ("asked", "length"), [(512, 9), (8, 8), (2, 4)], ids=["all tokens are one row", "as asked", "the longest row"]
)
def test_autoawq_cuts_rows_that_lose_no_other(asked: int, length: int) -> None:
    assert autoawq.row_length(request_of("autoawq", "awq", options={"max_calib_seq_len": asked})) == length


def test_autoawq_reads_the_rotary_base_of_new_configs() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0}
    assert autoawq.older_keys({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}) == {"rope_theta": 1e5}
    assert autoawq.older_keys({"rope_parameters": {"rope_theta": 1e5, **scaled}}) == {
        "rope_theta": 1e5,
        "rope_scaling": scaled,
    }
    assert autoawq.older_keys({"rope_theta": 1e5}) == autoawq.older_keys({}) == {}


def test_autoawq_refuses_what_it_would_do_otherwise(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="no scales per channel"):
        autoawq.check(request_of("autoawq", "awq", group_size=-1))


def test_autoawq_puts_back_copies_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs:
        def _compute_best_scale(self, x: Any, w: Any, mean: Any, module: torch.nn.Module, *rest: Any) -> None:
            kept = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
            with torch.no_grad():
                module.weight.mul_(3)  # type: ignore[operator]  # a parameter
            module.load_state_dict(kept)

    inject(monkeypatch, "awq.quantize.quantizer", AwqQuantizer=Theirs)
    layer = torch.nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    autoawq.copying_quantizer()()._compute_best_scale(None, None, None, layer, [], None)
    assert torch.equal(layer.weight, before)
    assert layer.state_dict()["weight"].data_ptr() == layer.weight.data_ptr(), "the module is as it was"


def test_eetq_codes_follow_from_its_products() -> None:
    codes = torch.randint(-127, 128, (12, 5), generator=torch.Generator().manual_seed(0))
    scales = (torch.rand(5, generator=torch.Generator().manual_seed(1)) / 100 + 1e-3).half()

    def product(inputs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (inputs.float() @ (weight.half() * scale).float()).half()

    found = eetq.decoded(codes.to(torch.int8), scales, product, "cpu")
    assert torch.equal(found["codes"].int() - eetq.MIDDLE, codes.t().int())
    assert torch.equal(found["scales"], scales.float().unsqueeze(1))


def test_eetq_reads_no_other_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}', encoding="utf-8")
    for folder in (tmp_path, tmp_path / "absent"):
        request = request_of("eetq", "load", options={"checkpoint": str(folder)})
        with pytest.raises(CheckpointError, match="is no EETQ checkpoint"):
            list(eetq.stored_layers(request))


@pytest.mark.gpu
def test_eetq_quantizes_what_it_reads_back(tmp_path: Path) -> None:
    package = pytest.importorskip("eetq")
    weight = torch.randn(64, 128)
    packed, scales = package.quant_weights(weight.t().contiguous().half(), torch.int8, False)
    found = eetq.decoded(packed, scales, package.w8_a16_gemm, "cuda:0")
    back = (found["codes"].float() - eetq.MIDDLE) * found["scales"]
    assert float((back - weight).norm() / weight.norm()) < 0.01


@pytest.mark.parametrize(
    ("seen", "device", "told"),
    [("", "cpu", ""), ("", "cuda:1", "1"), ("", "cuda", "0"), ("4,6", "cuda:1", "6"), ("4", "cuda:0", "4")],
)
def test_one_device_is_seen(monkeypatch: pytest.MonkeyPatch, seen: str, device: str, told: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert _devices.visible(device) == told
    for name in ("llmcompressor", "optimum", "autoawq"):
        assert LIBRARIES.get(name).variables(2, device)["CUDA_VISIBLE_DEVICES"] == told


def test_blocks_are_told_as_they_start_and_tokens_as_they_come(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"))
    total = len(blocks_of(model))
    heard: list[tuple[str, int, int]] = []
    counter = Counter(ROWS)
    with counter.watching(model), telling(model, lambda *each: heard.append(each)), torch.no_grad():
        model(torch.tensor([ROWS[0]]))
    assert heard == [("layer", done, total) for done in range(total + 1)]
    assert (counter.used().samples, counter.used().tokens) == (1, 3)
