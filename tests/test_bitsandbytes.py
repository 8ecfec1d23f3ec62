"""The bitsandbytes format: the bytes that transformers writes, and a model that computes with what we decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quantkit
from quantkit.errors import CheckpointError, RecipeError, SchemeError
from quantkit.exports import open_export
from quantkit.formats._bitsandbytes import INT8, STEP
from quantkit.formats.bitsandbytes import BitsAndBytes
from quantkit.methods.base import InputStatistics
from quantkit.recipe import VariantSpec
from quantkit.runtimes._choice import choose_runtime
from quantkit.schemes import Fp4Scheme, Fp8Scheme, IntScheme, Mxfp4Scheme, Nf4Scheme, QuantizedWeight, Scheme
from quantkit.schemes.codebook import CodebookScheme
from quantkit.system.artifacts import read_json
from quantkit.system.validation import parse_section
from tests.runs import decoded_model, logits
from tests.tiny import make_model, tiny_method

SCHEMES = [kind(64, double_quant) for kind in (Nf4Scheme, Fp4Scheme) for double_quant in (True, False)]
names = CodebookScheme.describe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


def random_weight(scheme: Scheme, rows: int = 40, columns: int = 512, method: str = "rtn") -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.03
    return tiny_method(method).quantize(weight, InputStatistics(), scheme, torch.float16).weight


def keys(scheme: CodebookScheme) -> dict[str, Any]:
    """Of a variant that rounds to nearest."""
    chosen = {"scheme": scheme.kind, "group_size": scheme.group_size, "double_quant": scheme.double_quant}
    return {"method": "rtn", "range": "minmax", "format": "bitsandbytes", **chosen}


def exported(model: Path, out: Path, scheme: CodebookScheme, **options: Any) -> Path:
    return quantkit.quantize(model, out=out, **{"dtype": "own", **keys(scheme), **options})


def loaded(folder: Path, **options: Any) -> Any:
    """A model as transformers loads it, every tensor in its place.

    It is left in training mode, which has no dropout, because for inference bitsandbytes rounds to bfloat16 on CPUs
    that have instructions for that.
    """
    found, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return found.train()


def by_transformers(model: Path, folder: Path, scheme: CodebookScheme) -> Path:
    """What transformers and bitsandbytes make of a float model and save."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=scheme.kind, bnb_4bit_use_double_quant=scheme.double_quant
    )
    loaded(model, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_every_tensor_is_the_one_that_transformers_saves(scheme: CodebookScheme, model: Path, tmp_path: Path) -> None:
    ours = exported(model, tmp_path / "ours", scheme)
    theirs = by_transformers(model, tmp_path / "theirs", scheme)
    expected, found = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    configs = [read_json(folder / "config.json")["quantization_config"] for folder in (ours, theirs)]
    assert configs[0].pop("llm_int8_skip_modules") == ["lm_head"]
    assert configs[0].items() <= configs[1].items()


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_transformers_computes_with_the_weights_that_we_decode(
    scheme: CodebookScheme, model: Path, tmp_path: Path
) -> None:
    folder = exported(model, tmp_path / "out", scheme)
    wanted = decoded_model(model, folder, parse_section(VariantSpec, {"name": "v", **keys(scheme)}, "test"))
    found = loaded(folder)
    assert type(found.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-5, atol=1e-5)
    inference = logits(found.eval())
    assert float((inference - logits(wanted)).norm() / logits(wanted).norm()) < 0.03


def test_layers_stay_float_where_they_are_told_to(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", tie_word_embeddings=True)
    options = {"ignore": [r"layers\.0\.self_attn\.(q|k|v)_proj", r"layers\.1\.mlp\.down_proj"]}
    folder = exported(source, tmp_path / "out", Nf4Scheme(), **options)
    found = loaded(folder)
    first, second = (layer.self_attn for layer in found.model.layers)
    assert type(first.q_proj) is type(found.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert type(found.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert type(second.q_proj).__name__ == type(first.o_proj).__name__ == "Linear4bit"
    assert torch.equal(
        first.q_proj.weight, load_file(source / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("shape", [(1, 64), (40, 512), (7, 192)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_a_layer_survives_packing(scheme: CodebookScheme, shape: tuple[int, int], method: str, tmp_path: Path) -> None:
    weight, store = random_weight(scheme, *shape, method=method), BitsAndBytes()
    tensors = store.pack(weight)
    assert set(tensors) == set(store.layer_suffixes(scheme))
    save_file(tensors, tmp_path / "layer.safetensors")
    found = store.unpack(load_file(tmp_path / "layer.safetensors"), scheme)
    assert found.scheme == scheme
    assert set(found.parts) == set(weight.parts)
    pairs = [(found.codes, weight.codes), (found.scales, weight.scales), (found.zeros, weight.zeros)]
    for ours, read in [*pairs, *((found.parts[name], weight.parts[name]) for name in weight.parts)]:
        torch.testing.assert_close(read, ours, rtol=0, atol=0)
    assert torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize(("double_quant", "expected"), [(True, 4.127), (False, 4.5)])
def test_bytes_on_disk_are_the_bits_per_weight_and_the_tables(double_quant: bool, expected: float) -> None:
    scheme, rows, columns = Nf4Scheme(64, double_quant), 1024, 2048
    tensors = BitsAndBytes().pack(random_weight(scheme, rows, columns))
    constants = {"weight.quant_map", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4"}
    bits = 8 * sum(tensor.nbytes for name, tensor in tensors.items() if name not in constants) / (rows * columns)
    assert bits == pytest.approx(expected, abs=0.0005)
    assert bits == pytest.approx(scheme.bits_per_weight(columns, out_features=rows), abs=32 / (rows * columns))
    assert sum(tensors[name].nbytes for name in constants & set(tensors)) < 1400


def test_weights_are_decoded_and_multiplied_in_the_dtype_of_the_checkpoint() -> None:
    store = BitsAndBytes("bfloat16")
    state = bytes(store.pack(random_weight(Nf4Scheme()))["weight.quant_state.bitsandbytes__nf4"].tolist())
    assert json.loads(state)["dtype"] == "bfloat16"
    config = BitsAndBytesConfig.from_dict(store.quantization_config({"a": Nf4Scheme(), "b": None}))
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.bnb_4bit_quant_storage == torch.uint8
    assert config.quantization_method() == "nf4"
    assert config.llm_int8_skip_modules == ["b"]


@pytest.mark.parametrize("scheme", [IntScheme(), IntScheme(8, 64), Fp8Scheme(), Mxfp4Scheme()], ids=Scheme.describe)
def test_other_schemes_are_refused_with_those_that_fit(scheme: Scheme) -> None:
    with pytest.raises(SchemeError, match=r"does not store .*nf4 and fp4, and int8 .*use format compressed-tensors"):
        BitsAndBytes.check(scheme)
    for fits in (*SCHEMES, INT8):
        BitsAndBytes.check(fits)
    given = {"name": "v", "method": "rtn", "scheme": "int", "bits": 4, "format": "bitsandbytes"}
    with pytest.raises(RecipeError, match="does not store int4"):
        parse_section(VariantSpec, given, "test")


@pytest.mark.parametrize("other", [Fp4Scheme(), Nf4Scheme(128), Nf4Scheme(double_quant=False)], ids=names)
def test_several_schemes_are_refused_with_layers_of_each(other: Scheme) -> None:
    layers = {"a.q_proj": Nf4Scheme(), "a.k_proj": Nf4Scheme(), "a.up_proj": other, "head": None}
    with pytest.raises(SchemeError, match=rf"one scheme .*a\.q_proj is nf4 g64 dq, a\.up_proj is {other.describe()}"):
        BitsAndBytes().quantization_config(layers)


def test_a_float_layer_whose_name_would_hide_a_quantized_one_is_refused() -> None:
    """transformers keeps a layer float if its name ends with one of those that it is told to skip."""
    layers = {"model.head": Nf4Scheme(), "head": None}
    with pytest.raises(SchemeError, match=r"would take model\.head for a float layer .*because head is one"):
        BitsAndBytes().quantization_config(layers)


# --- int8


def int8_export(model: Path, out: Path, **options: Any) -> Path:
    keys: dict[str, Any] = {"bits": 8, "group_size": -1, "activations": "dynamic", "format": "bitsandbytes"}
    return quantkit.quantize(model, out=out, **{"method": "rtn", "range": "minmax", "dtype": "own", **keys, **options})


def test_int8_tensors_are_named_and_typed_as_transformers_saves_them(model: Path, tmp_path: Path) -> None:
    ours = int8_export(model, tmp_path / "ours")
    theirs = tmp_path / "theirs"
    loaded(model, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).save_pretrained(theirs)
    expected, found = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
    configs = [read_json(folder / "config.json")["quantization_config"] for folder in (ours, theirs)]
    assert configs[0].pop("llm_int8_skip_modules") == ["lm_head"]
    assert configs[0].items() <= configs[1].items()


def rounded(inputs: torch.Tensor) -> torch.Tensor:
    """What LLM.int8 multiplies by where no input is an outlier: 8 bits per token of the float16 input."""
    halves = inputs.half()
    spans = halves.abs().amax(-1, keepdim=True).float()
    assert float(spans.max()) < 6.0
    return (halves * (127 / spans)).round() * spans / 127


def test_transformers_computes_int8_layers_with_our_weights_and_rounded_inputs(model: Path, tmp_path: Path) -> None:
    """Layer by layer, as two roundings of nearly the same input may differ by a step that later layers spread."""
    folder = int8_export(model, tmp_path / "out")
    export, found = open_export(folder), loaded(folder).eval()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in export.schemes:
        layer = found.get_submodule(name)
        assert type(layer).__name__ == "Linear8bitLt"
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    by_bitsandbytes = logits(found)
    assert set(seen) == set(export.schemes)
    for name, (inputs, output) in seen.items():
        wanted = rounded(inputs) @ export.weight(name).dequantize(torch.float32).T
        assert float((output - wanted).norm() / wanted.norm()) < 1e-4
    keys = {"bits": 8, "group_size": -1, "activations": "dynamic", "format": "bitsandbytes"}
    variant = parse_section(VariantSpec, {"name": "v", "method": "rtn", "range": "minmax", **keys}, "test")
    plain = logits(decoded_model(model, folder, variant))
    assert 1e-3 < float((by_bitsandbytes - plain).norm() / plain.norm()) < 0.05


def test_int8_layers_are_evaluated_by_transformers(model: Path, tmp_path: Path) -> None:
    assert choose_runtime(int8_export(model, tmp_path / "out"), dtype="float32").name == "transformers"
    assert BitsAndBytes.computes_in({INT8}) == ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_int8_scales_are_fitted_once_and_survive_the_disk(method: str, tmp_path: Path) -> None:
    store = BitsAndBytes()
    fitted = store.fitted(random_weight(INT8, method=method))
    assert store.fitted(fitted) is fitted
    assert fitted.scales.dtype == torch.float32
    assert torch.equal(fitted.scales.flatten(), fitted.parts["scb"] * STEP)
    tensors = store.pack(fitted)
    assert set(tensors) == set(store.layer_suffixes(INT8))
    save_file(tensors, tmp_path / "layer.safetensors")
    found = store.unpack(load_file(tmp_path / "layer.safetensors"), INT8)
    for ours, read in ((fitted.codes, found.codes), (fitted.scales, found.scales), (fitted.zeros, found.zeros)):
        assert torch.equal(ours, read)
        assert ours.dtype == read.dtype


def test_fitting_moves_int8_scales_by_rounding_alone() -> None:
    weight = random_weight(INT8)
    torch.testing.assert_close(BitsAndBytes().fitted(weight).scales, weight.scales.float(), rtol=2e-7, atol=0)


def test_int8_without_rounded_inputs_is_refused_with_the_remedy() -> None:
    with pytest.raises(SchemeError, match="set activations: dynamic"):
        BitsAndBytes.check(IntScheme(8, -1))


def test_int8_and_4_bits_do_not_mix() -> None:
    with pytest.raises(SchemeError, match="holds one scheme"):
        BitsAndBytes.check_together([INT8, Nf4Scheme()])
    with pytest.raises(SchemeError, match="one scheme for all layers"):
        BitsAndBytes().quantization_config({"a": INT8, "b": Nf4Scheme()})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_format", torch.tensor(1, dtype=torch.uint8), "stored in tiles"),
        ("SCB", torch.ones(3), "40, 512.* and 3 scales"),
        ("weight", torch.zeros(40, 512), "codes torch.float32"),
    ],
)
def test_int8_tensors_that_do_not_fit_are_refused(name: str, tensor: torch.Tensor, message: str) -> None:
    tensors = BitsAndBytes().pack(random_weight(INT8)) | {name: tensor}
    with pytest.raises(CheckpointError, match=message):
        BitsAndBytes().unpack(tensors, INT8)


# --- broken files


def test_a_table_of_another_type_is_refused() -> None:
    tensors = BitsAndBytes().pack(random_weight(Nf4Scheme()))
    tensors["weight.quant_map"] = tensors["weight.quant_map"].flip(0)
    with pytest.raises(CheckpointError, match=r"quant_map of bitsandbytes is not the table of nf4"):
        BitsAndBytes().unpack(tensors, Nf4Scheme())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[1]", "cannot be read"),
        (b'{"quant_type": "nf4"}', "cannot be read.*blocksize"),
        (b'{"quant_type": "nf4", "blocksize": 128, "nested_blocksize": 256}', "128.*not nf4 g64 dq"),
        (b'{"quant_type": "nf4", "blocksize": 64, "nested_blocksize": 64}', "64.*not nf4 g64 dq"),
    ],
)
def test_a_state_that_is_not_the_layer_s_is_refused(state: bytes, message: str) -> None:
    scheme, store = Nf4Scheme(), BitsAndBytes()
    tensors = store.pack(random_weight(scheme))
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=message):
        store.unpack(tensors, scheme)
