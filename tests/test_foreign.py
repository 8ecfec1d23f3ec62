"""Files of other tools: layers found by config and tensors, decoded as their own libraries decode them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quantkit
from quantkit.errors import CheckpointError, SchemeError
from quantkit.exports import open_export
from quantkit.exports.folder import FolderExport
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.schemes import Fp4Scheme, Fp8Scheme, IntScheme, Mxfp4Scheme, Nf4Scheme, Nvfp4Scheme, Scheme
from quantkit.schemes.bitstream import pack_bits, unpack_bits
from quantkit.system.artifacts import read_json, write_json
from tests.runs import load_model, logits
from tests.tiny import make_model

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
DYNAMIC = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
DOWN = "model.layers.0.mlp.down_proj"
STATIC = {"num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


def group(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, *targets: str) -> dict[str, Any]:
    """A config group as llm-compressor 0.14 writes it."""
    inputs = inputs and {"type": weights["type"], **inputs}
    return {"targets": list(targets or ["Linear"]), "weights": weights, "input_activations": inputs, "format": form}


def targeted(layer: str, found: dict[str, Any]) -> bool:
    """As much of the package's matching as the groups of these tests need."""
    targets = found["targets"]
    return targets == ["Linear"] or layer in targets or any(each[3:].strip(".*") in layer for each in targets)


def compress(weight: torch.Tensor, found: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of a layer as the package compresses it, and what it decompresses them to."""
    scheme = QuantizationScheme.model_validate(found)
    size = scheme.weights.group_size or weight.shape[1]
    cells = weight.view(weight.shape[0], -1, size)
    low, high = cells.amin(-1), cells.amax(-1)
    if scheme.weights.strategy == "tensor":
        low, high = low.amin().view(1), high.amax().view(1)
    scales, zeros = calculate_qparams(low, high, scheme.weights)
    state = {"weight": weight, "weight_scale": scales}
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = zeros
    compressor = BaseCompressor.get_value_from_registry(found["format"])
    packed = dict(compressor.compress(state, scheme))
    return packed, compressor.decompress(dict(packed), scheme)["weight"]


def written(
    model: Path, folder: Path, groups: list[dict[str, Any]], **changes: Any
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of the package, and its weights as the package decodes them."""
    tensors, decoded = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        found = next((each for each in groups if "_proj" in layer and targeted(layer, each)), None)
        if found is None:
            tensors[name] = tensor
            continue
        packed, decoded[layer] = compress(tensor, found)
        tensors |= {f"{layer}.{suffix}": part.contiguous() for suffix, part in packed.items()}
        if (found["input_activations"] or {}).get("dynamic") is False:
            tensors[f"{layer}.input_scale"] = torch.ones(1)
    forms = {each["format"] for each in groups}
    config = {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": each for index, each in enumerate(groups)},
        "ignore": ["lm_head"],
        "version": "0.18.0",
    }
    return saved(model, folder, tensors, config | changes), decoded


def saved(model: Path, folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for file in model.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {**read_json(model / "config.json"), "quantization_config": quantization})
    return folder


def opened(folder: Path) -> FolderExport:
    found = open_export(folder)
    assert isinstance(found, FolderExport)
    return found


def assert_decodes(export: FolderExport, wanted: dict[str, torch.Tensor], tolerance: float = 0) -> None:
    assert set(export.schemes) == set(wanted)
    for layer, weight in wanted.items():
        assert export.shape(layer) == tuple(weight.shape)
        assert export.layer_bytes(layer) < weight.numel() * 4
        torch.testing.assert_close(export.weight(layer).dequantize(), weight, rtol=tolerance, atol=0)


# --- compressed-tensors

CASES: dict[str, tuple[dict[str, Any], Scheme]] = {
    "W4A16": (group("pack-quantized", INT4), IntScheme(4, 32)),
    "W4A16 asym": (group("pack-quantized", {**INT4, "symmetric": False}), IntScheme(4, 32, False)),
    "W8A16 static order": (group("pack-quantized", {**INT4, "num_bits": 8, "actorder": "static"}), IntScheme(8, 32)),
    "W8A8": (group("int-quantized", INT8, DYNAMIC), IntScheme(8, -1, activations="dynamic")),
    "W8A8 asym": (group("int-quantized", {**INT8, "symmetric": False}, DYNAMIC), IntScheme(8, -1, False)),
    "W8 per tensor": (group("int-quantized", {**INT8, "strategy": "tensor"}), IntScheme(8, -1)),
    "W8 naive": (group("naive-quantized", INT8), IntScheme(8, -1)),
    "W8A8 static": (group("int-quantized", INT8, STATIC), IntScheme(8, -1, activations="static")),
    "W4A8": (group("int-quantized", {**INT4, "group_size": 32}, DYNAMIC), IntScheme(4, 32, activations="dynamic")),
    "FP8 dynamic": (group("float-quantized", FP8, DYNAMIC), Fp8Scheme("channel", "dynamic")),
    "FP8": (group("float-quantized", {**FP8, "strategy": "tensor"}, STATIC), Fp8Scheme("tensor", "static")),
    "FP8 naive": (group("naive-quantized", FP8), Fp8Scheme("channel")),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_of_the_package_are_read_as_it_reads_them(case: str, model: Path, tmp_path: Path) -> None:
    given, scheme = CASES[case]
    folder, decoded = written(model, tmp_path / "out", [given])
    export = opened(folder)
    assert (export.format, export.made_by) == ("compressed-tensors", "compressed-tensors 0.18.0")
    assert set(export.schemes.values()) == {scheme}
    assert_decodes(export, decoded)
    assert not any(name.endswith(("weight_scale", "input_scale")) for name in export.float_names())


def test_groups_are_found_by_name_pattern_and_class(model: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    groups = [
        group("float-quantized", FP8, DYNAMIC, *names),
        group("pack-quantized", {**INT4, "symmetric": False}, None, "re:.*self_attn.*"),
        group("pack-quantized", INT4),
    ]
    folder, decoded = written(model, tmp_path / "out", groups)
    export = opened(folder)
    found = {layer.rpartition(".")[2]: scheme.describe() for layer, scheme in export.schemes.items()}
    assert (found["down_proj"], found["up_proj"], found["q_proj"]) == (
        "fp8 channel a8",
        "int4 g32 sym",
        "int4 g32 asym",
    )
    assert_decodes(export, decoded)


def test_static_inputs_and_caches_are_said_and_left_out(model: Path, tmp_path: Path) -> None:
    given = group("int-quantized", INT8, {**STATIC, "symmetric": False})
    folder, _ = written(model, tmp_path / "out", [given], kv_cache_scheme={"num_bits": 4})
    add_tensors(folder, {"model.layers.0.self_attn.k_scale": torch.ones(1)})
    export = opened(folder)
    assert len(export.activation_scales()) == 15
    remarks = " ".join(export.remarks())
    assert "8-bit int with static scales" in remarks
    assert "KV cache" in remarks
    assert logits(load_model(folder, "reference")).isfinite().all()


def test_the_reference_decoder_runs_what_the_package_decodes(model: Path, tmp_path: Path) -> None:
    folder, decoded = written(model, tmp_path / "out", [CASES["W4A16 asym"][0]])
    wanted = AutoModelForCausalLM.from_pretrained(model)
    for layer, weight in decoded.items():
        wanted.get_submodule(layer).weight.data = weight
    assert torch.equal(logits(load_model(folder, "reference")), logits(wanted))


def test_groups_that_gather_columns_are_read_with_their_order(model: Path, tmp_path: Path) -> None:
    """As llm-compressor wrote them until compressed-tensors 0.18: codes in place, ``weight_g_idx`` beside them."""
    given = group("pack-quantized", {**INT4, "actorder": "group"})
    stored = load_file(model / "model.safetensors")
    weight = stored.pop(f"{DOWN}.weight")
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    back = order.argsort()
    packed, gathered = compress(weight[:, order].contiguous(), group("pack-quantized", INT4))
    packed["weight_packed"] = pack_bits(unpack_bits(packed["weight_packed"], 4, weight.shape[1])[:, back], 4)
    packed["weight_g_idx"] = (back // 32).to(torch.int32)
    tensors = stored | {f"{DOWN}.{suffix}": part for suffix, part in packed.items()}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": given}}
    export = opened(saved(model, tmp_path / "out", tensors, config))
    assert export.schemes == {DOWN: IntScheme(4, 32, desc_act=True)}
    assert torch.equal(export.weight(DOWN).dequantize(), gathered[:, back])
    with pytest.raises(SchemeError, match="leave out desc_act"):
        CompressedTensors.check(IntScheme(4, 32, desc_act=True))


@pytest.mark.parametrize(
    ("keys", "scheme"),
    [
        ({"scheme": "mxfp4"}, Mxfp4Scheme()),
        ({"scheme": "nvfp4"}, Nvfp4Scheme()),
        ({"scheme": "fp8", "granularity": "block"}, Fp8Scheme("block")),
        ({"bits": 3, "group_size": 32, "symmetric": False}, IntScheme(3, 32, False)),
    ],
    ids=lambda each: each.describe() if isinstance(each, Scheme) else "",
)
def test_our_own_files_are_read_without_their_manifest(
    keys: dict[str, Any], scheme: Scheme, model: Path, tmp_path: Path
) -> None:
    folder = quantkit.quantize(model, out=tmp_path / "out", method="rtn", format="compressed-tensors", **keys)
    with_manifest = open_export(folder)
    wanted = {layer: with_manifest.weight(layer).dequantize() for layer in with_manifest.schemes}
    (folder / "manifest.json").unlink()
    export = opened(folder)
    assert set(export.schemes.values()) == {scheme}
    assert_decodes(export, wanted)


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")


def without(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        save_file({name: each for name, each in found.items() if name not in names}, folder / "model.safetensors")

    return spoil


def with_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = read_json(folder / "config.json")
        config["quantization_config"] |= changes
        write_json(folder / "config.json", config)

    return spoil


def with_weights(**changes: Any) -> Callable[[Path], None]:
    return with_config(config_groups={"group_0": group("pack-quantized", {**INT4, **changes})})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without(f"{DOWN}.weight_scale"), f"holds no tensor '{DOWN}.weight_scale'"),
        (with_weights(group_size=16), r"weight_scale has the shape \[\d+, \d+\], and int4 g16 sym .* needs"),
        (with_weights(num_bits=8), r"weight_packed has the shape"),
        (with_weights(group_size=48), "is no layer of int4 g48 sym"),
        (with_weights(type="float", num_bits=16), "16-bit float"),
        (with_weights(num_bits=9), "bits 9"),
        (with_weights(strategy="token"), "by token"),
        (with_config(config_groups=None), "no mapping of groups"),
        (with_config(config_groups={"a": {"weights": {}}}), "a of compressed-tensors cannot be read"),
        (with_config(ignore=["re:.*down_proj"]), f"{DOWN} is packed, and the config says that it is not"),
        (with_config(ignore=["re:("]), "is no pattern"),
        (with_config(format="marlin-24", config_groups={"a": {**group("marlin-24", INT4)}}), "format 'marlin-24'"),
        (with_config(sparsity_config={"format": "sparse-24-bitmask"}), "stored sparse"),
        (with_config(transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (
            with_config(config_groups={"a": group("pack-quantized", INT4, None, "re:.*self_attn.*")}),
            "is packed, and no config group",
        ),
        (
            with_config(config_groups={"a": group("pack-quantized", INT4, None, "Linear", "lm_head", "model.lm")}),
            "is quantized, and it is not packed",
        ),
        (
            with_config(config_groups={"a": group("pack-quantized", INT8), "b": group("int-quantized", INT8)}),
            "is stored as pack-quantized and as int-quantized",
        ),
    ],
)
def test_config_and_tensors_that_do_not_fit_are_one_line(
    spoil: Callable[[Path], None], message: str, model: Path, tmp_path: Path
) -> None:
    folder, _ = written(model, tmp_path / "out", [group("pack-quantized", INT4)])
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_export(folder)
    assert "\n" not in str(caught.value)


# --- bitsandbytes

FOUR_BITS = [(kind, double_quant) for kind in ("nf4", "fp4") for double_quant in (True, False)]


def by_transformers(model: Path, folder: Path, **keys: Any) -> Path:
    AutoModelForCausalLM.from_pretrained(model, quantization_config=BitsAndBytesConfig(**keys)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "double_quant"), FOUR_BITS)
def test_4_bit_layers_of_transformers_are_read_as_bitsandbytes_does(
    kind: str, double_quant: bool, model: Path, tmp_path: Path
) -> None:
    keys = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double_quant}
    folder = by_transformers(model, tmp_path / "out", **keys)
    export = opened(folder)
    scheme = {"nf4": Nf4Scheme, "fp4": Fp4Scheme}[kind](64, double_quant)
    assert set(export.schemes.values()) == {scheme}
    assert export.made_by.startswith("transformers ")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    wanted = {}
    for layer in export.schemes:
        weight = loaded.get_submodule(layer).weight
        wanted[layer] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    assert len(wanted) == 14
    assert_decodes(export, wanted)


def test_8_bit_layers_of_transformers_are_read_as_bitsandbytes_does(model: Path, tmp_path: Path) -> None:
    export = opened(by_transformers(model, tmp_path / "out", load_in_8bit=True))
    assert set(export.schemes.values()) == {IntScheme(8, -1, activations="dynamic")}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {
        layer: bitsandbytes.functional.int8_vectorwise_dequant(stored[f"{layer}.weight"], stored[f"{layer}.SCB"])
        for layer in export.schemes
    }
    assert_decodes(export, wanted, tolerance=2e-7)  # the product of three factors, in another order


def edit_state(**changes: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "quant_state" in name)
        state = json.loads(bytes(tensors[name].tolist())) | changes
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return spoil


def cut(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(suffix))
        tensors[name] = tensors[name][:-1].contiguous()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edit_state(blocksize=48), "no block of 48"),
        (edit_state(blocksize=128, shape=[128, 96]), "run over the ends of its rows of 96"),
        (edit_state(shape=[1]), "quant_state cannot be read"),
        (edit_state(shape=[64, 4096]), "do not fit a weight of"),
        (edit_state(nested_blocksize=128), "in blocks of 128"),
        (cut(".absmax"), "do not fit"),
        (cut(".nested_absmax"), "do not fit"),
        (cut("down_proj.weight"), "do not fit"),
    ],
)
def test_states_that_do_not_fit_their_tensors_are_one_line(
    spoil: Callable[[dict[str, torch.Tensor]], None], message: str, model: Path, tmp_path: Path
) -> None:
    folder = quantkit.quantize(model, out=tmp_path / "out", method="rtn", scheme="nf4", format="bitsandbytes")
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_export(folder)
    assert "\n" not in str(caught.value)


# --- hqq


@pytest.mark.parametrize(
    "scheme",
    [
        IntScheme(4, 32, False, "float"),
        IntScheme(3, 32, False, "float"),
        IntScheme(4, 32, False, "float", axis=0),
        IntScheme(8, -1, False, "float"),
    ],
    ids=IntScheme.describe,
)
def test_hqq_layers_are_found_by_what_lies_beside_them(scheme: IntScheme, model: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        name: getattr(scheme, name) for name in ("bits", "group_size", "symmetric", "zeros", "axis")
    }
    folder = quantkit.quantize(model, out=tmp_path / "out", method="hqq", format="hqq", **keys)
    with_manifest = open_export(folder)
    wanted = {layer: with_manifest.weight(layer).dequantize() for layer in with_manifest.schemes}
    (folder / "manifest.json").unlink()
    export = opened(folder)
    assert set(export.schemes.values()) == {scheme}
    assert_decodes(export, wanted)


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("quant_scale", torch.tensor(True, dtype=torch.uint8), "quantized its scales"),
        ("nbits", torch.tensor(9), "cannot be read"),
        ("group_size", torch.tensor(64), "do not fit"),
        ("shape", torch.tensor([3, 5]), "cannot be read"),
        ("shape", torch.tensor([3]), "cannot be read"),
    ],
)
def test_hqq_layers_that_do_not_fit_are_one_line(
    suffix: str, tensor: torch.Tensor, message: str, model: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False, "zeros": "float"}
    folder = quantkit.quantize(model, out=tmp_path / "out", method="hqq", format="hqq", **keys)
    (folder / "manifest.json").unlink()
    add_tensors(folder, {f"{DOWN}.{suffix}": tensor})
    with pytest.raises(CheckpointError, match=f"{DOWN}: .*{message}"):
        open_export(folder)


# --- neither


@pytest.mark.parametrize(
    ("method", "rest"),
    [("compressed-tensors", {"config_groups": {}}), ("bitsandbytes", {"load_in_4bit": True}), ("hqq", {})],
)
def test_a_config_without_packed_layers_is_one_line(
    method: str, rest: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    folder = saved(model, tmp_path / "out", tensors, {"quant_method": method, **rest})
    with pytest.raises(CheckpointError, match=f"quantized with {method}, and holds no packed layer"):
        open_export(folder)
