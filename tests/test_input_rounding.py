"""What layers are given is rounded as runtimes round it, and scored so by the reference decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_args import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import make_batches
from quantkit.engine.input_rounding import Rounder, put_rounder, take_rounders
from quantkit.engine.layer_results import with_input_scale
from quantkit.engine.layers import is_linear
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.stacks import InputGroup
from quantkit.engine.walk import Walk, WalkSettings
from quantkit.errors import QuantizationError
from quantkit.exports import open_export
from quantkit.formats._compressed_tensors.reading import groups_in
from quantkit.formats.bitsandbytes import BitsAndBytes
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.methods.base import InputStatistics
from quantkit.numerics.activation_rounding import SHRINKS, round_inputs, searched_scale, static_scale
from quantkit.quantization import Job, Quantized, Wanted, quantize_together
from quantkit.recipe import VariantSpec
from quantkit.recipe.scheme import written_keys
from quantkit.runtimes._model import TransformersModel
from quantkit.runtimes.base import LoadOptions
from quantkit.runtimes.reference import Reference
from quantkit.schemes import Fp8Scheme, IntScheme, Mxfp4Scheme, Nvfp4Scheme, QuantizedWeight, Scheme
from quantkit.schemes.rounding import INPUT_SCALE, InputRounding
from tests.architectures import make
from tests.runs import logits, write_records
from tests.tiny import make_model, tiny_method, tiny_rows, tiny_task

INT8, FP8 = InputRounding("int8"), InputRounding("fp8")
W8A8: dict[str, Any] = {"method": "rtn", "bits": 8, "group_size": -1, "activations": "dynamic", "dtype": "own"}


def by_hand(values: torch.Tensor) -> torch.Tensor:
    """8-bit integers by the largest magnitude of each token."""
    steps = values.abs().amax(-1, keepdim=True) / 127
    return (values / steps).round() * steps


def package(values: torch.Tensor, preset: str, common: torch.Tensor | None = None) -> torch.Tensor:
    """What compressed-tensors makes of inputs ``[batch, tokens, in_features]`` by one of its presets."""
    args = preset_name_to_scheme(preset, ["Linear"]).input_activations
    scale, zero = compute_dynamic_scales_and_zp(values, args, torch.nn.Linear(1, 1), global_scale=common)
    found: torch.Tensor = fake_quantize(values, scale, zero, args, global_scale=common)
    return found


def decoded(folder: Path) -> TransformersModel:
    found = Reference.load(folder, LoadOptions(dtype="float32"))
    assert isinstance(found, TransformersModel)
    return found


@pytest.fixture
def values() -> torch.Tensor:
    torch.manual_seed(0)
    found = torch.randn(2, 7, 256) * torch.logspace(-2, 2, 14).view(2, 7, 1)
    found[0, 1, :64] = 0
    return found


@pytest.mark.parametrize(
    ("preset", "rounding"),
    [("FP8_DYNAMIC", FP8), ("FP8_BLOCK", InputRounding("fp8", 128)), ("MXFP4", InputRounding("mxfp4"))],
)
def test_floats_are_rounded_as_compressed_tensors_does(
    values: torch.Tensor, preset: str, rounding: InputRounding
) -> None:
    torch.testing.assert_close(round_inputs(values, rounding), package(values, preset), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("largest", [1.0, 1000.0])
def test_nvfp4_is_rounded_under_a_static_scale_as_compressed_tensors_does(values: torch.Tensor, largest: float) -> None:
    """Also where inputs go beyond what the scale was calibrated for."""
    rounding = InputRounding("nvfp4", static=True)
    common = static_scale(torch.tensor(largest), rounding)
    assert float(common) == pytest.approx(448 * 6 / largest)
    found = round_inputs(values, rounding, common)
    torch.testing.assert_close(found, package(values, "NVFP4", common), rtol=1e-6, atol=0)


def test_integers_take_the_127th_part_of_a_token() -> None:
    given = torch.tensor([[12.7, 0.04, -0.06], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_inputs(given, INT8), torch.tensor([[12.7, 0.0, -0.1], [0.0, 0.0, 0.0]]))
    assert round_inputs(given.bfloat16(), INT8).dtype == torch.bfloat16


@pytest.mark.parametrize("numbers", ["int8", "fp8"])
def test_a_static_scale_clips_what_is_beyond_it(numbers: Any) -> None:
    rounding = InputRounding(numbers, static=True)
    scale = static_scale(torch.tensor(2.0), rounding)
    found = round_inputs(torch.tensor([2.0, 5.0, -5.0, 0.0]), rounding, scale)
    torch.testing.assert_close(found, torch.tensor([2.0, 2.0, -128 / 127 * 2 if numbers == "int8" else -2.0, 0.0]))
    with pytest.raises(ValueError, match="static scale"):
        round_inputs(torch.ones(3), rounding)


@pytest.mark.parametrize("rounding", [INT8, FP8, InputRounding("mxfp4")], ids=lambda each: each.numbers)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(rounding: InputRounding, bad: float) -> None:
    given = torch.ones(2, 32)
    given[0, 3] = bad
    found = round_inputs(given, rounding)
    assert not found[0].isfinite().all()
    assert found[1].isfinite().all()


def test_columns_with_outliers_stay_as_they_are() -> None:
    rounding = BitsAndBytes().input_rounding(IntScheme(8, -1, activations="dynamic"))
    assert rounding is not None
    given = torch.tensor([[100.0, 1.0, 0.0031], [3.0, 0.5, 0.25]])
    found = round_inputs(given, rounding)
    torch.testing.assert_close(found[:, 0], given[:, 0])
    torch.testing.assert_close(found[0, 1:], torch.tensor([1.0, 0.0]))  # the outlier does not widen its token's steps
    assert (
        BitsAndBytes.for_config({"llm_int8_threshold": 0.0}, "float32").input_rounding(
            IntScheme(8, -1, activations="dynamic")
        )
        == INT8
    )


def test_a_rounder_that_is_put_while_a_call_stands_in_a_hook_counts() -> None:
    linear = torch.nn.Linear(8, 3, bias=False)
    given = torch.randn(2, 8)
    put_rounder(linear, None)
    seen = []

    def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])
        put_rounder(linear, Rounder(INT8))

    linear.register_forward_pre_hook(hook)
    torch.testing.assert_close(linear(given), by_hand(given) @ linear.weight.T)
    assert seen[0] is given
    take_rounders([linear])
    assert "forward" not in vars(linear)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


def test_the_reference_decoder_rounds_inputs(model: Path, tmp_path: Path) -> None:
    folder = quantkit.quantize(model, out=tmp_path / "w8a8", **W8A8)
    loaded = decoded(folder)
    assert loaded.rounded_inputs == ("int8 per token",)
    export, wanted = open_export(folder), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.arange(3, 60)
    plain = loaded.logits(ids)
    for layer in export.schemes:
        module = wanted.get_submodule(layer)
        module.weight.data = export.weight(layer).dequantize(torch.float32)
    without = logits(wanted)
    for layer in export.schemes:
        wanted.get_submodule(layer).register_forward_pre_hook(lambda _, args: (by_hand(args[0]),))
    with torch.no_grad():
        hand = wanted(ids[None]).logits[0]
    divergence = torch.nn.functional.kl_div(
        plain.log_softmax(-1), hand.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert float(divergence) < 1e-3
    torch.testing.assert_close(plain, hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(wanted), without, rtol=1e-3)


def test_experts_round_their_own_inputs(tmp_path: Path) -> None:
    make(tmp_path / "moe", "qwen3_moe")
    folder = quantkit.quantize(tmp_path / "moe", out=tmp_path / "out", **W8A8)
    loaded = decoded(folder)
    seen = {}
    for name, module in loaded.model.named_modules():
        if name.endswith(".experts.1.down_proj"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (m, args[0], out)}))
    ids = torch.arange(3, 60)
    loaded.logits(ids)
    assert len(seen) == 2
    for module, given, output in seen.values():
        torch.testing.assert_close(output, by_hand(given) @ module.weight.T)
    tensors = load_file(folder / "model.safetensors")
    codes = tensors["model.layers.0.mlp.experts.1.down_proj.weight"]
    weight = codes * tensors["model.layers.0.mlp.experts.1.down_proj.weight_scale"].float()
    torch.testing.assert_close(seen["model.layers.0.mlp.experts.1.down_proj"][0].weight.data, weight)


STATIC = [Fp8Scheme("tensor", "static"), IntScheme(8, -1, activations="static"), Nvfp4Scheme("static")]


def rounded_model(model: Path, weights: Mapping[str, QuantizedWeight], *, rounds: bool = True) -> PreTrainedModel:
    """The float model with solved weights, whose layers round their inputs."""
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, weight in weights.items():
        module = found.get_submodule(name)
        module.weight.data = weight.dequantize(torch.float32)
        rounding, scale = weight.scheme.input_rounding, weight.parts.get(INPUT_SCALE)
        if rounds and rounding is not None:
            put_rounder(module, Rounder(rounding, scale))
    return found


def largest_inputs(model: PreTrainedModel, names: Iterable[str], rows: Iterable[Sequence[int]]) -> dict[str, float]:
    """The largest magnitude that each layer is given, before it is rounded."""
    found: dict[str, float] = {}
    for name in names:

        def see(_: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

        model.get_submodule(name).register_forward_pre_hook(see)
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    return found


def nearest_shares(spans: Mapping[str, float], largest: Mapping[str, float]) -> dict[str, float]:
    """By layer the share of its largest input that is nearest to what its scale spans."""
    return {
        name: min((share * largest[name] for share in SHRINKS), key=lambda each: abs(each - span))
        for name, span in spans.items()
    }


@pytest.mark.parametrize("strategy", ["one-pass", "recompute"])
@pytest.mark.parametrize("scheme", STATIC, ids=lambda scheme: scheme.kind)
def test_quantized_inputs_are_those_of_layers_that_round(model: Path, scheme: Scheme, strategy: Any) -> None:
    """Static scales span what layers are given behind those that are solved already, and round their inputs."""
    rows, cpu = tiny_rows(), torch.device("cpu")
    skeleton = Skeleton(model)
    task, sink = tiny_task(skeleton, tiny_method("gptq"), scheme)
    batches = make_batches(rows, cpu, may_pad=True)
    Walk(skeleton, CheckpointReader(model), batches, [task], WalkSettings(cpu, strategy=strategy)).run()
    weights = {name: result.weight for name, result in sink.results.items()}
    rounding = scheme.input_rounding
    assert rounding is not None
    scales = {name: float(weight.parts[INPUT_SCALE]) for name, weight in weights.items()}
    spans = {
        name: rounding.highest / each if scheme.kind == "nvfp4" else rounding.highest * each
        for name, each in scales.items()
    }
    seen = largest_inputs(rounded_model(model, weights), weights, rows)
    without = largest_inputs(rounded_model(model, weights, rounds=False), weights, rows)
    if scheme.kind == "int":  # a searched share of them
        seen, without = (nearest_shares(spans, each) for each in (seen, without))
    assert seen == pytest.approx(spans, rel=0.003)
    assert without != pytest.approx(spans, rel=0.003)
    assert not any("forward" in vars(module) for module in skeleton.model.modules() if is_linear(module))


def test_a_searched_scale_is_that_of_the_variant_whoever_shares_its_walk(tmp_path: Path) -> None:
    """Where an MLP reads what attention reads, a variant that leaves it float has other readers of that input."""
    model = tmp_path / "model"
    make(model, "phi")
    tensors = load_file(model / "model.safetensors")
    for name, each in tensors.items():
        if name.endswith("layernorm.weight"):
            each[3] = 40.0
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            each[:, 3] /= 1000
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    keys = {"method": "rtn", "bits": 8, "group_size": -1, "activations": "static"}
    small = VariantSpec.model_validate({"name": "small", **keys, "ignore": ["lm_head", "fc1"]})
    whole = VariantSpec.model_validate({"name": "whole", **keys})
    job = Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, "float", "cpu")
    alone = quantize_together(job, [Wanted(small, tmp_path / "alone")])
    company = quantize_together(job, [Wanted(whole, tmp_path / "whole"), Wanted(small, tmp_path / "company")])
    assert isinstance(alone[0], Quantized)
    assert isinstance(company[1], Quantized)
    found, wanted = (load_file(each.folder / "model.safetensors") for each in (company[1], alone[0]))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    name = "model.layers.0.self_attn.q_proj.input_scale"
    assert float(load_file(tmp_path / "whole" / "model.safetensors")[name]) > 2 * float(found[name])


@pytest.mark.parametrize("scheme", STATIC, ids=lambda scheme: scheme.kind)
def test_static_scales_are_stored_and_read_back(scheme: Scheme, model: Path, tmp_path: Path) -> None:
    """Layers that servers load as one matrix share them, and a conversion keeps them."""
    keys = written_keys(scheme) | {"method": "rtn", "dtype": "own", "format": "compressed-tensors"}
    records = str(write_records(tmp_path / "rows.jsonl"))
    out = quantkit.quantize(model, out=tmp_path / "out", calibration=records, **keys)
    export, name = open_export(out), "model.layers.0.self_attn.{}_proj"
    suffix = "input_global_scale" if scheme.kind == "nvfp4" else "input_scale"
    tensors = load_file(out / "model.safetensors")
    stored = [tensors[f"{name.format(leaf)}.{suffix}"] for leaf in "qkvo"]
    assert (stored[0].dtype, stored[0].shape) == (torch.float32, (1,))
    assert float(stored[0]) == float(stored[1]) == float(stored[2]) != float(stored[3])
    assert export.input_scale(name.format("q")) == stored[0]
    assert export.weight(name.format("q")).parts[INPUT_SCALE] == stored[0]
    assert not any(each.endswith(suffix) for each in export.float_names())
    quantkit.convert(out, to="compressed-tensors", out=tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")[f"{name.format('q')}.{suffix}"] == stored[0]
    (tmp_path / "again" / "manifest.json").unlink()
    foreign = open_export(tmp_path / "again")
    assert set(foreign.schemes.values()) == set(export.schemes.values()) == {scheme}
    ids = torch.arange(3, 60)
    torch.testing.assert_close(decoded(tmp_path / "again").logits(ids), decoded(out).logits(ids))


PRESETS: dict[str, Scheme] = {
    "W8A8": IntScheme(8, -1, activations="dynamic"),
    "W4A8": IntScheme(4, 128, activations="dynamic"),
    "W4AFP8": IntScheme(4, 128, activations="fp8"),
    "FP8": Fp8Scheme("tensor", "static"),
    "FP8_DYNAMIC": Fp8Scheme("channel", "dynamic"),
    "FP8_BLOCK": Fp8Scheme("block", "dynamic"),
    "NVFP4": Nvfp4Scheme("static"),
    "MXFP4": Mxfp4Scheme("dynamic"),
    "MXFP4XFP8": Mxfp4Scheme("fp8"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_config_groups_are_the_presets_of_the_package(name: str) -> None:
    """Weights and inputs are asked for in its words, and a group in its words is read as the scheme."""
    preset = preset_name_to_scheme(name, ["Linear"])
    config = CompressedTensors().quantization_config({"model.layers.0.mlp.up_proj": PRESETS[name]})
    group = config["config_groups"]["group_0"]
    for part in ("weights", "input_activations"):
        ours, theirs = QuantizationArgs.model_validate(group[part]), getattr(preset, part)
        for key in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype"):
            assert getattr(ours, key) == getattr(theirs, key), (part, key)
    given = {**preset.model_dump(mode="json"), "format": group["format"]}
    (read,) = groups_in({"config_groups": {"group_0": given}, "format": group["format"]})
    assert (read.scheme, read.notes) == (PRESETS[name], ())


def test_a_searched_scale_of_integers_loses_less_and_clips() -> None:
    """A few inputs a hundred times as large as the rest leave these no steps, unless outputs depend on them."""
    torch.manual_seed(0)
    sample, weight, rounding = torch.randn(256, 64), torch.randn(32, 64), InputRounding("int8", static=True)
    sample[::64, 3] = 300.0

    def lost(scale: torch.Tensor, weight: torch.Tensor) -> float:
        return float(((sample - round_inputs(sample, rounding, scale)) @ weight.T).square().sum())

    largest, minds = sample.abs().max(), weight.clone()
    minds[:, 3] /= 1000
    spanning = static_scale(largest, rounding)
    found = searched_scale(largest, sample, [minds], rounding)
    assert found.shape == spanning.shape
    assert float(found) < float(spanning)
    assert lost(found, minds) < 0.1 * lost(spanning, minds)
    assert float(searched_scale(largest, sample, [weight], rounding)) == float(spanning)


def test_a_layer_of_whose_inputs_nothing_is_known_has_no_static_scale() -> None:
    weight = QuantizedWeight(STATIC[0], torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1))
    group = InputGroup({"down": torch.zeros(2, 8)}, InputStatistics())
    with pytest.raises(QuantizationError, match=r"down: no calibration token reached it.*activations: dynamic"):
        with_input_scale(weight, group, "down")


def test_gradients_pass_through_rounded_inputs() -> None:
    given = torch.randn(3, 8, requires_grad=True)
    Rounder(INT8)(given).sum().backward()  # type: ignore[no-untyped-call]
    assert given.grad is not None
    assert torch.equal(given.grad, torch.ones(3, 8))
