"""Quantized input embeddings and heads: what is stored, what loads, and what the passes of a walk read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError, EvaluationError, RecipeError, SchemeError
from quantkit.exports.folder import FolderExport
from quantkit.exports.manifest import MANIFEST
from quantkit.formats import FORMATS
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.numerics.grid_search import encode, quantized, range_grid, search_grid
from quantkit.quantization import Job, Quantized, Wanted, plan_layers, quantize, quantize_together
from quantkit.recipe import VariantSpec
from quantkit.schemes import PER_CHANNEL, Fp8Scheme, IntScheme, Scheme
from quantkit.system.artifacts import read_json
from quantkit.system.validation import parse_section
from tests import tiny
from tests.runs import config_of, load_model, load_whole, logits
from tests.tiny import VOCABULARY, make_model, tiny_rows

EMBEDDING, HEAD, WIDTH = "model.embed_tokens", "lm_head", 64
INT8, FP8 = IntScheme(8, PER_CHANNEL, True), Fp8Scheme("channel")
PATCHES: dict[str, tuple[dict[str, Any], Scheme]] = {
    "int8": ({"bits": 8, "group_size": -1}, INT8),
    "int8 grouped": ({"bits": 8}, IntScheme(8, 32, True)),
    "fp8 channel": ({"scheme": "fp8"}, FP8),
    "fp8 tensor": ({"scheme": "fp8", "granularity": "tensor"}, Fp8Scheme("tensor")),
    "fp8 block": ({"scheme": "fp8", "granularity": "block"}, Fp8Scheme("block")),
}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "weighted": {"method": "rtn", "range": "weighted"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "awq+gptq": {"method": "awq+gptq"},
    "hqq": {"method": "hqq", "symmetric": False},
}


def variant(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "v", "method": "rtn", "group_size": 32, **keys}, "test")


def job(folder: Path, **changes: Any) -> Job:
    given = {"rows": tiny_rows(), "calibration_sha256": "0" * 64, "device": "cpu"}
    return Job(folder, {"reference": "tiny"}, **({"dtype": "float32"} | given | changes))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "untied": make_model(root / "untied"),
        "tied": make_model(root / "tied", tie_word_embeddings=True),
        "gemma": make_model(root / "gemma", "gemma", tie_word_embeddings=True),
        "bfloat16": make_model(root / "bfloat16", dtype=torch.bfloat16, tie_word_embeddings=True),
    }


def decoded(checkpoint: Path, layer: str, scheme: Scheme) -> torch.Tensor:
    """The weight of a layer as the format stores it."""
    export = FolderExport(checkpoint)
    assert export.schemes[layer] == scheme
    return export.weight(layer).dequantize(torch.float32)


def reference(checkpoint: Path) -> torch.Tensor:
    return logits(load_model(checkpoint, "reference"))


def original(source: Path) -> torch.Tensor:
    return CheckpointReader(source).read(f"{EMBEDDING}.weight")


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("tie", ["tied", "untied"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("patch", ["int8", "fp8 channel"])
def test_transformers_and_the_reference_decoder_load_the_same(
    models: dict[str, Path], tmp_path: Path, tie: str, method: str, inputs: Any, patch: str
) -> None:
    keys, scheme = PATCHES[patch]
    out = quantize(job(models[tie], inputs=inputs), variant(method=method, embeddings=keys), tmp_path / "out").folder
    native = load_whole(out)
    torch.testing.assert_close(logits(native), reference(out), rtol=1e-4, atol=1e-4)
    found = decoded(out, EMBEDDING, scheme)
    assert 0 < relative_error(found, original(models[tie])) < 0.04
    assert torch.equal(native.get_input_embeddings().weight, found)
    head = load_whole(models[tie]).get_output_embeddings().weight
    assert torch.equal(native.get_output_embeddings().weight, head), "a float head keeps the source's weight"
    assert config_of(out)["tie_word_embeddings"] is False


@pytest.mark.parametrize("patch", list(PATCHES))
def test_every_scheme_of_an_embedding_loads(models: dict[str, Path], tmp_path: Path, patch: str) -> None:
    keys, scheme = PATCHES[patch]
    out = quantize(job(models["untied"]), variant(embeddings=keys), tmp_path / "out").folder
    weight = original(models["untied"])
    grid = range_grid(weight, scheme, torch.float32)
    wanted = quantized(encode(weight, grid, scheme), grid, scheme).dequantize(torch.float32)
    assert torch.equal(decoded(out, EMBEDDING, scheme), wanted)
    torch.testing.assert_close(logits(load_whole(out)), reference(out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tie", ["tied", "untied"])
@pytest.mark.parametrize("patch", ["int8", "fp8 channel"])
def test_head_and_embedding_together(models: dict[str, Path], tmp_path: Path, tie: str, patch: str) -> None:
    keys, scheme = PATCHES[patch]
    overrides = {HEAD: keys}
    spec = variant(method="gptq", ignore=[], overrides=overrides, embeddings=keys)
    out = quantize(job(models[tie]), spec, tmp_path / "out").folder
    names = CheckpointReader(out).names()
    floats = [name for name in names if CheckpointReader(out).dtype(name) == torch.float32 and ".weight_" not in name]
    assert floats
    assert all("norm" in name for name in floats)
    head = "weight_packed" if patch == "int8" else "weight"
    assert {f"{HEAD}.{head}", f"{EMBEDDING}.weight", f"{EMBEDDING}.weight_scale"} < set(names)
    native = load_whole(out)
    torch.testing.assert_close(logits(native), reference(out), rtol=1e-4, atol=1e-4)
    assert torch.equal(native.get_output_embeddings().weight, decoded(out, HEAD, scheme))


@pytest.mark.parametrize("tie", ["tied", "untied"])
@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_quantizes_the_head_on_request(
    models: dict[str, Path], tmp_path: Path, tie: str, inputs: Any, method: str
) -> None:
    spec = variant(**METHODS[method] | {"bits": 8, "ignore": []})
    done = quantize(job(models[tie], inputs=inputs), spec, tmp_path / "out")
    found = decoded(done.folder, HEAD, spec.base_scheme())
    head = load_whole(models[tie]).get_output_embeddings().weight
    assert 0 < relative_error(found, head) < 0.02
    reader = CheckpointReader(done.folder)
    assert torch.equal(reader.read(f"{EMBEDDING}.weight"), original(models[tie])), "the embedding stays"
    facts = {layer["name"]: layer for layer in done.facts["layers"]}[HEAD]
    assert facts["tokens"] == (sum(map(len, tiny_rows())) if spec.build_method().needs else 0)
    native = load_whole(done.folder)
    torch.testing.assert_close(logits(native), reference(done.folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_solves_the_embedding_from_its_weight_alone(
    models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    keys = {"bits": 8, "group_size": -1, "symmetric": True}
    done = quantize(job(models["untied"]), variant(**METHODS[method], embeddings=keys), tmp_path / "out")
    weight = original(models["untied"])
    grid = range_grid(weight, INT8, torch.float32)
    plain = quantized(encode(weight, grid, INT8), grid, INT8).dequantize(torch.float32)
    found = relative_error(decoded(done.folder, EMBEDDING, INT8), weight)
    assert 0 < found <= 1.01 * relative_error(plain, weight)
    assert not any(EMBEDDING in note for note in done.facts["notes"])
    (facts,) = [layer for layer in done.facts["layers"] if layer["name"] == EMBEDDING]
    assert facts["tokens"] == 0
    assert facts["scheme"] == "int8 channel sym"
    assert facts["error_after"] == pytest.approx(found**2, rel=0.05)


def test_gptq_rounds_an_embedding_to_the_nearest_of_its_searched_grid(models: dict[str, Path], tmp_path: Path) -> None:
    spec = variant(method="gptq", embeddings={"scheme": "fp8"})
    out = quantize(job(models["untied"]), spec, tmp_path / "out").folder
    weight = original(models["untied"])
    grid = search_grid(weight, None, FP8, torch.float32, 6, negative_scales=True)
    wanted = quantized(encode(weight, grid, FP8), grid, FP8).dequantize(torch.float32)
    torch.testing.assert_close(decoded(out, EMBEDDING, FP8), wanted)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"method": "gptq"}, {"range": "search", "search": 6, "negative_scales": True}),
        ({"method": "gptq", "search": 9, "negative_scales": False}, {"search": 9, "negative_scales": False}),
        ({"method": "awq"}, {"range": "search", "search": 8}),
        ({"method": "awq", "clip": False}, {"range": "minmax"}),
        ({"method": "awq+gptq"}, {"range": "search", "search": 6}),
    ],
)
def test_a_method_that_learns_from_inputs_comes_down_to_rounding(keys: dict[str, Any], wanted: dict[str, Any]) -> None:
    method = variant(**keys).build_method().for_embeddings()
    assert method.name == "rtn"
    assert wanted.items() <= method.options.model_dump().items()


def test_one_that_does_more_with_the_weight_alone_stays() -> None:
    kept = [variant(method="hqq", symmetric=False), variant(range="weighted")]
    assert [spec.build_method().for_embeddings().name for spec in kept] == ["hqq", "rtn"]


@pytest.mark.parametrize("strategy", ["one-pass", "recompute"])
def test_in_a_quantized_inputs_the_passes_read_the_quantized_embedding(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """The blocks come out as those of a float model that has the decoded embedding."""
    from quantkit.quantization import walk_variants as walking

    monkeypatch.setattr(walking, "choose_strategy", lambda *_: strategy)
    keys = {"scheme": "fp8", "granularity": "tensor"}
    source, spec = models["untied"], variant(method="gptq", bits=3, correction=False)
    out = quantize(
        job(source), variant(method="gptq", bits=3, correction=False, embeddings=keys), tmp_path / "out"
    ).folder
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for file in source.iterdir():
        (swapped / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[f"{EMBEDDING}.weight"] = decoded(out, EMBEDDING, Fp8Scheme("tensor"))
    save_file(tensors, swapped / "model.safetensors", {"format": "pt"})
    wanted = CheckpointReader(quantize(job(swapped), spec, tmp_path / "wanted").folder)
    plain = CheckpointReader(quantize(job(source), spec, tmp_path / "plain").folder)
    packed = [name for name in plain.names() if name.endswith("weight_packed")]
    found = CheckpointReader(out)
    assert packed
    assert all(torch.equal(found.read(name), wanted.read(name)) for name in packed)
    assert not all(torch.equal(found.read(name), plain.read(name)) for name in packed)


def test_in_a_float_inputs_the_blocks_do_not_see_it(models: dict[str, Path], tmp_path: Path) -> None:
    specs = {
        "plain": variant(name="plain", method="gptq"),
        "fp8": variant(name="fp8", method="gptq", embeddings={"scheme": "fp8"}),
        "rtn": variant(name="rtn", embeddings={"bits": 8}),
    }
    wanted = [Wanted(spec, tmp_path / name) for name, spec in specs.items()]
    found = quantize_together(job(models["tied"], inputs="float"), wanted)
    assert all(isinstance(each, Quantized) for each in found), found
    readers = {name: CheckpointReader(tmp_path / name) for name in specs}
    packed = [name for name in readers["plain"].names() if name.endswith("weight_packed")]
    assert all(torch.equal(readers["plain"].read(name), readers["fp8"].read(name)) for name in packed)
    assert f"{EMBEDDING}.weight_scale" not in readers["plain"]
    assert readers["fp8"].dtype(f"{EMBEDDING}.weight") == torch.float8_e4m3fn
    assert readers["rtn"].dtype(f"{EMBEDDING}.weight") == torch.int8


@pytest.mark.parametrize("ignore", [[HEAD], []])
@pytest.mark.parametrize("patch", ["int8", "fp8 channel"])
def test_gemma_and_its_normalizer(models: dict[str, Path], tmp_path: Path, ignore: list[str], patch: str) -> None:
    keys, scheme = PATCHES[patch]
    spec = variant(method="gptq", bits=8, ignore=ignore, embeddings=keys)
    out = quantize(job(models["gemma"]), spec, tmp_path / "out").folder
    native = load_model(out, "transformers")
    torch.testing.assert_close(logits(native), reference(out), rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[7, 9]])
    with torch.no_grad():
        embedded = native.get_input_embeddings()(ids)
    torch.testing.assert_close(embedded, decoded(out, EMBEDDING, scheme)[ids] * WIDTH**0.5)
    assert relative_error(logits(native), logits(load_whole(models["gemma"]))) < 0.1


def test_gemma_3_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.FAMILIES, "gemma3", Gemma3TextConfig)
    source = make_model(tmp_path / "source", "gemma3")
    out = quantize(job(source), variant(embeddings={"scheme": "fp8"}), tmp_path / "out").folder
    native = load_model(out, "transformers")
    torch.testing.assert_close(logits(native), reference(out), rtol=1e-4, atol=1e-4)


def test_what_else_is_missing_is_still_said(models: dict[str, Path], tmp_path: Path) -> None:
    out = quantize(job(models["gemma"]), variant(embeddings={"scheme": "fp8"}), tmp_path / "out").folder
    tensors = load_file(out / "model.safetensors")
    del tensors[f"{EMBEDDING}.weight_scale"]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(EvaluationError, match=f"1 are missing: {EMBEDDING}.weight_scale"):
        load_model(out, "transformers")


def test_a_bfloat16_model(models: dict[str, Path], tmp_path: Path) -> None:
    spec = variant(method="gptq", embeddings={"scheme": "fp8"})
    out = quantize(job(models["bfloat16"], dtype="bfloat16"), spec, tmp_path / "out").folder
    reader = CheckpointReader(out)
    assert reader.dtype(f"{EMBEDDING}.weight_scale") == reader.dtype(f"{HEAD}.weight") == torch.bfloat16
    assert torch.equal(reader.read(f"{HEAD}.weight"), original(models["bfloat16"]))
    torch.testing.assert_close(logits(load_whole(out)), reference(out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [EMBEDDING, HEAD])
@pytest.mark.parametrize("ignore", [[HEAD], []])
@pytest.mark.parametrize("embeddings", [None, {"bits": 8}])
def test_a_tied_weight_is_found_under_either_name(
    models: dict[str, Path], tmp_path: Path, stored: str, ignore: list[str], embeddings: dict[str, Any] | None
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in models["tied"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[f"{stored}.weight"] = tensors.pop(f"{EMBEDDING}.weight")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = quantize(job(source), variant(ignore=ignore, bits=8, embeddings=embeddings), tmp_path / "out").folder
    native = load_whole(out)
    torch.testing.assert_close(logits(native), reference(out), rtol=1e-4, atol=1e-4)
    weight = original(models["tied"])
    for module, cut in ((native.get_input_embeddings(), embeddings), (native.get_output_embeddings(), not ignore)):
        assert torch.equal(module.weight, weight) == (not cut)
    assert config_of(out)["tie_word_embeddings"] is (bool(ignore) and embeddings is None)


def test_the_config_names_the_embedding_and_no_other(models: dict[str, Path], tmp_path: Path) -> None:
    out = quantize(job(models["untied"]), variant(embeddings={"bits": 8}), tmp_path / "out").folder
    config = config_of(out)["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"], [EMBEDDING]]
    group = config["config_groups"]["group_1"]
    assert (group["format"], group["input_activations"]) == ("int-quantized", None)
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 32)
    assert config["ignore"] == [HEAD]
    manifest = read_json(out / MANIFEST)
    assert manifest["embedding"] == EMBEDDING
    assert manifest["layers"][EMBEDDING] == IntScheme(8, 32, True).to_json()


def test_the_same_scheme_for_all_is_one_format(models: dict[str, Path], tmp_path: Path) -> None:
    spec = parse_section(VariantSpec, {"name": "v", "method": "rtn", "scheme": "fp8", "embeddings": {}}, "test")
    out = quantize(job(models["untied"]), spec, tmp_path / "out").folder
    assert config_of(out)["quantization_config"]["format"] == "float-quantized"
    torch.testing.assert_close(logits(load_whole(out)), reference(out), rtol=1e-4, atol=1e-4)


def test_a_plan_and_the_bits_per_weight_count_the_embedding(models: dict[str, Path], tmp_path: Path) -> None:
    plain, spec = variant(), variant(embeddings={"bits": 8, "group_size": -1})
    skeleton = Skeleton(models["tied"])
    without, layers = plan_layers(skeleton, plain), plan_layers(skeleton, spec)
    store = CompressedTensors("float32")
    assert (without.embedding, layers.embedding) == (None, EMBEDDING)
    assert layers.weights() - without.weights() == VOCABULARY * WIDTH
    assert store.for_embeddings().layer_bytes(layers.quantized[EMBEDDING], VOCABULARY, WIDTH) == VOCABULARY * (
        WIDTH + 4
    )
    assert list(layers.linears) == list(without.schemes)
    done = quantize(job(models["tied"]), spec, tmp_path / "out")
    reader = CheckpointReader(done.folder)
    kept = layers.kept(CheckpointReader(models["tied"]).names())
    assert kept[f"{HEAD}.weight"] == f"{EMBEDDING}.weight"
    assert set(kept) == {name for name in reader.names() if reader.dtype(name) == torch.float32} - {
        name for name in reader.names() if ".weight_" in name
    }
    stored = sum(reader.nbytes(name) for name in reader.names() if name not in kept)
    assert done.facts["bits_per_weight"] == pytest.approx(stored * 8 / layers.weights())
    assert any("vLLM does not" in note for note in done.facts["notes"])


def test_a_broken_embedding_is_named_though_no_pass_reads_it(models: dict[str, Path], tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{EMBEDDING}.weight"][3, 1] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor '{EMBEDDING}.weight' of .* is inf at index \[3, 1\]"):
        quantize(job(source), variant(embeddings={"bits": 8}), tmp_path / "out")
    config = json.loads((models["untied"] / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY + 1}))
    tensors[f"{EMBEDDING}.weight"][3, 1] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {EMBEDDING}.weight has shape"):
        quantize(job(source), variant(embeddings={"bits": 8}), tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"embeddings": {}}, "embeddings: transformers does not load embeddings of int4 g32 sym"),
        ({"embeddings": {"bits": 8, "symmetric": False}}, "does not load embeddings of int8 g32 asym"),
        ({"embeddings": {"scheme": "mxfp4"}}, "does not load embeddings of mxfp4"),
        ({"embeddings": {"scheme": "fp8", "activations": "dynamic"}}, "an embedding has no activations to round"),
        ({"embeddings": {"bits": 8, "axis": 0}}, "does not load embeddings of int8 g32 sym axis 0"),
        ({"embeddings": {"bitz": 8}}, "bitz"),
        ({"embeddings": {"scheme": "fp9"}}, "unknown scheme 'fp9'"),
        ({"embeddings": {"bits": 8}, "format": "hqq", "symmetric": False}, "format hqq does not store quantized embed"),
        ({"embeddings": {"bits": 8}, "method": "hqq", "symmetric": False}, "does not load embeddings of int8 g32 asym"),
    ],
)
def test_what_no_runtime_loads_is_refused_with_the_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, SchemeError)) as caught:
        variant(**keys)
    assert message in str(caught.value)
    assert "embeddings" in str(caught.value)


def test_the_refusal_of_a_format_names_those_that_can() -> None:
    with pytest.raises(SchemeError, match=r"leave it out, or use one that does: .*compressed-tensors"):
        FORMATS.get("bitsandbytes").check_embedding(Fp8Scheme())


def test_a_group_size_that_does_not_divide_the_embedding(models: dict[str, Path]) -> None:
    keys = {"bits": 8, "group_size": 48}
    with pytest.raises(SchemeError, match=f"v: {EMBEDDING}: group_size 48 does not divide the 64 input columns"):
        plan_layers(Skeleton(models["untied"]), variant(embeddings=keys, strict=True))
    layers = plan_layers(Skeleton(models["untied"]), variant(embeddings=keys))
    assert layers.embedding is None
    assert any(f"float: {EMBEDDING}: group_size 48 does not divide" in note for note in layers.notes)
    assert [EMBEDDING] in layers.left_by_reason().values()


def test_a_recipe_keeps_the_key_and_spells_it_out() -> None:
    spec = variant(embeddings={"scheme": "fp8"})
    assert spec.resolved()["embeddings"] == {"scheme": "fp8"}
    assert spec.embedding_scheme() == FP8
    assert variant().resolved()["embeddings"] is None
    assert variant(bits=8, embeddings={"group_size": -1}).embedding_scheme() == INT8
