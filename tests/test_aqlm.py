"""AQLM checkpoints: read, scored and looked at, and never written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from quantkit.checkpoint import CheckpointReader
from quantkit.cli import app
from quantkit.errors import CheckpointError, RecipeError, SchemeError
from quantkit.evaluation import EvaluationJob
from quantkit.evaluation.evaluate import evaluate
from quantkit.exports import open_export
from quantkit.formats import FORMATS
from quantkit.formats.aqlm import KEPT, KEYS, AqlmFormat
from quantkit.isolation.codes import chosen_format
from quantkit.recipe import EvaluationSpec, LibrarySpec, TextSpec, VariantSpec
from quantkit.runtimes._choice import choose_runtime
from quantkit.schemes import SCHEMES, AdditiveScheme, AdditiveWeight, scheme_from_json
from quantkit.system.artifacts import read_json, write_json
from quantkit.system.validation import parse_section
from tests.runs import edit_json, load_model, load_whole, logits
from tests.tiny import make_model

LAYOUTS = {
    "1x16": AdditiveScheme(codebooks=1, code_bits=16),
    "2x8": AdditiveScheme(codebooks=2, code_bits=8),
    "3x5 of rows": AdditiveScheme(codebooks=3, code_bits=5, in_group=4, out_group=2),
}
DOWN = "model.layers.0.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def random_layer(scheme: AdditiveScheme, rows: int, columns: int, seed: int = 0) -> Tensors:
    """Codes all over the codebooks, the upper half of them stored as negative numbers."""
    draw = torch.Generator().manual_seed(seed)
    size = 1 << scheme.code_bits
    shape = (rows // scheme.out_group, columns // scheme.in_group, scheme.codebooks)
    codes = torch.randint(-size // 2, size // 2, shape, generator=draw)
    vectors = torch.randn(scheme.codebooks, size, scheme.out_group, scheme.in_group, generator=draw)
    return {
        "codes": codes.to(torch.int8 if scheme.code_bits <= 8 else torch.int16),
        "codebooks": vectors.mul_(0.5).half(),
        "scales": torch.rand(shape[0], 1, 1, 1, generator=draw).add_(0.5).mul_(0.1).half(),
    }


def decoded(tensors: Tensors, bits: int) -> torch.Tensor:
    """The weight by the definition, one number at a time."""
    codes, codebooks, scales = (tensors[name].tolist() for name in ("codes", "codebooks", "scales"))
    _, _, height, width = tensors["codebooks"].shape
    found = torch.zeros(len(codes) * height, len(codes[0]) * width, dtype=torch.float64)
    for down, row in enumerate(codes):
        for across, group in enumerate(row):
            for y in range(height):
                for x in range(width):
                    total = 0.0
                    for number, code in enumerate(group):
                        place = code if code >= 0 else code + 2**bits
                        total += codebooks[number][place][y][x]
                    found[down * height + y, across * width + x] = total * scales[down][0][0][0]
    return found.float()


def write_checkpoint(model: Path, folder: Path, scheme: AdditiveScheme) -> tuple[Path, Tensors]:
    """A checkpoint as AQLM's own conversion lays it out, and what the layers decode to."""
    shutil.copytree(model, folder)
    tensors, weights = {}, {}
    for number, (name, tensor) in enumerate(sorted(load_file(model / "model.safetensors").items())):
        layer = name.removesuffix(".weight")
        if "_proj" not in layer or layer == name:
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        packed = random_layer(scheme, rows, columns, seed=number)
        weights[layer] = decoded(packed, scheme.code_bits)
        tensors |= {f"{layer}.{suffix}": part for suffix, part in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "aqlm",
        **{key: getattr(scheme, name) for name, key in KEYS.items()},
        KEPT: [name for name in tensors if name.endswith(".weight")],
    }
    write_json(folder / "config.json", {**read_json(model / "config.json"), "quantization_config": quantization})
    return folder, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float16)


@pytest.fixture(scope="module", params=["1x16", "2x8"])
def written(request: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    return write_checkpoint(model, tmp_path_factory.mktemp("aqlm") / "checkpoint", LAYOUTS[request.param])


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return write_checkpoint(model, tmp_path / "checkpoint", LAYOUTS["3x5 of rows"])[0]


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def error_of(done: Result) -> str:
    """The one line of a command that was refused."""
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


# --- what codes stand for


@pytest.mark.parametrize("scheme", LAYOUTS.values(), ids=LAYOUTS)
def test_a_weight_is_the_sum_of_its_vectors_times_its_scale(scheme: AdditiveScheme) -> None:
    tensors = random_layer(scheme, 16, 32)
    assert tensors["codes"].min() < 0 < tensors["codes"].max()
    found = AqlmFormat().decodable(tensors, scheme)
    torch.testing.assert_close(found.dequantize(torch.float32), decoded(tensors, scheme.code_bits), rtol=1e-6, atol=0)
    assert found.dequantize().dtype == torch.float16
    assert torch.equal(tensors["codes"], random_layer(scheme, 16, 32)["codes"])


def test_codes_that_are_stored_unsigned_mean_the_same() -> None:
    scheme = LAYOUTS["3x5 of rows"]
    tensors = random_layer(scheme, 16, 32)
    signed, unsigned = tensors["codes"], tensors["codes"].remainder(32)
    assert not torch.equal(signed, unsigned)
    weights = [AdditiveWeight(scheme, codes, tensors["codebooks"], tensors["scales"]) for codes in (signed, unsigned)]
    assert torch.equal(*(weight.dequantize(torch.float32) for weight in weights))


def test_the_scheme_says_what_it_costs_and_is_no_choice_of_a_recipe() -> None:
    assert [scheme.describe() for scheme in LAYOUTS.values()] == ["aqlm 1x16 g8", "aqlm 2x8 g8", "aqlm 3x5 g2x4"]
    assert LAYOUTS["1x16"].bits_per_weight(4096) == 2 + 16 / 4096
    assert LAYOUTS["1x16"].bits_per_weight(4096, 16, 4096) == 2 + 16 / 4096 + 65536 * 8 * 16 / 4096**2
    assert LAYOUTS["3x5 of rows"].bits_per_weight(64, 16, 32) == 15 / 8 + 16 / 128 + 3 * 32 * 8 * 16 / 2048
    for scheme in LAYOUTS.values():
        assert scheme_from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
    assert AdditiveScheme.kind not in SCHEMES
    with pytest.raises(RecipeError, match="unknown scheme 'aqlm'"):
        parse_section(VariantSpec, {"name": "v", "method": "rtn", "scheme": "aqlm"}, "variant")
    with pytest.raises(SchemeError, match="codes of 17 bits"):
        AdditiveScheme(code_bits=17)


# --- reading


def test_every_layer_is_decoded_and_all_else_is_float(written: tuple[Path, Tensors]) -> None:
    folder, weights = written
    export = open_export(folder)
    assert export.format == "aqlm"
    assert set(export.schemes) == set(weights)
    for layer, weight in weights.items():
        assert export.shape(layer) == tuple(weight.shape)
        torch.testing.assert_close(export.decodable(layer).dequantize(torch.float32), weight, rtol=1e-6, atol=0)
    assert {"lm_head.weight", "model.norm.weight"} < set(export.float_names())
    assert not {name for name in export.float_names() if "_proj" in name}
    with pytest.raises(SchemeError, match="quantkit reads the aqlm format and does not write it"):
        export.weight(DOWN)


def test_the_reference_decoder_computes_what_the_file_says(model: Path, written: tuple[Path, Tensors]) -> None:
    folder, weights = written
    wanted = load_whole(model)
    for layer, weight in weights.items():
        wanted.get_submodule(layer).weight = torch.nn.Parameter(weight)
    torch.testing.assert_close(logits(load_model(folder, "reference")), logits(wanted), rtol=1e-5, atol=1e-5)


def test_biases_belong_to_their_layers(tmp_path: Path) -> None:
    source = make_model(tmp_path / "qwen", "qwen2", dtype=torch.float16)
    folder, _ = write_checkpoint(source, tmp_path / "out", LAYOUTS["2x8"])
    name = "model.layers.1.self_attn.q_proj.bias"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.full((64,), 3.0).half()}))
    assert torch.equal(load_model(folder, "reference").state_dict()[name], torch.full((64,), 3.0))


def test_auto_leaves_it_to_the_reference_decoder(
    written: tuple[Path, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.runtimes._choice.is_installed", lambda package: True)
    assert choose_runtime(written[0]).name == "reference"


def test_an_evaluation_scores_it(written: tuple[Path, Tensors], model: Path, tmp_path: Path) -> None:
    folder, weights = written
    text = tmp_path / "text.txt"
    text.write_text("The tide went out further than anyone had seen. " * 9, encoding="utf-8")
    exact = shutil.copytree(model, tmp_path / "float")
    edit_tensors(exact, lambda tensors: tensors.update({f"{layer}.weight": weights[layer] for layer in weights}))
    spec = EvaluationSpec(
        texts=(TextSpec(name="tide", file=str(text)),),
        context_length=64,
        max_tokens=200,
        device="cpu",
        dtype="float32",
        metrics=("perplexity",),
    )
    found, wanted = (evaluate(EvaluationJob(each, spec), lambda *_: None) for each in (folder, exact))
    assert (found["loaded_by"], wanted["loaded_by"]) == ("reference", "transformers")
    figures, expected = (each["metrics"]["perplexity"]["tide"] for each in (found, wanted))
    assert figures == pytest.approx(expected, rel=1e-5)


# --- looking at it


def test_inspect_tells_sizes_and_bits(written: tuple[Path, Tensors]) -> None:
    folder, weights = written
    found = json.loads(invoke("inspect", folder, "--json").stdout)
    reader = CheckpointReader(folder)
    stored = sum(reader.nbytes(name) for name in reader.names() if "_proj" in name)
    count = sum(weight.numel() for weight in weights.values())
    assert (found["format"], found["quantized_weights"], found["problems"]) == ("aqlm", count, [])
    assert found["bits_per_weight"] == pytest.approx(stored * 8 / count)
    (scheme,) = set(open_export(folder).schemes.values())
    assert isinstance(scheme, AdditiveScheme)
    assert found["schemes"][scheme.describe()]["layers"] == 14
    for layer in found["layers"]:
        rows, columns = layer["shape"]
        assert layer["bits_per_weight"] == pytest.approx(scheme.bits_per_weight(columns, 16, rows))
        assert layer["bytes"] == AqlmFormat("float16").layer_bytes(scheme, rows, columns)
        assert layer["at_ends"] is None
        assert layer["scales"] == {"count": rows, "zero": 0, "denormal": 0, "non_finite": 0}
        weight = weights[layer["name"]]
        assert layer["largest"] == pytest.approx(float(weight.abs().max() / weight.std(correction=0)), rel=1e-5)
    assert found["loads"] == [
        "transformers 4 with accelerate and aqlm",
        "quantkit's reference decoder: as a float model",
    ]


def test_inspect_prints_it(written: tuple[Path, Tensors]) -> None:
    for further in ((), ("--no-deep",)):
        done = invoke("inspect", written[0], *further)
        assert done.exit_code == 0, done.output
        assert "aqlm" in done.stdout
        assert "transformers 4" in done.stdout


# --- never written


def test_it_cannot_be_asked_for() -> None:
    reason = "quantkit reads the aqlm format and does not write it: its codes are learned"
    for given in ({"method": "rtn"}, {"method": "none", "scheme": "float16"}):
        with pytest.raises(RecipeError, match=reason):
            parse_section(VariantSpec, {"name": "v", "format": "aqlm", **given}, "variant")
    with pytest.raises(RecipeError, match=reason):
        parse_section(LibrarySpec, {"name": "v", "library": "torchao", "format": "aqlm"}, "variant")
    with pytest.raises(SchemeError, match="no format stores aqlm 2x8 g8"):
        chosen_format(None, {"a": LAYOUTS["2x8"]})
    assert [store.name for store in FORMATS if store.read_only] == ["aqlm"]


def test_it_is_not_converted_but_to_floats(written: tuple[Path, Tensors], tmp_path: Path) -> None:
    for target in FORMATS.names():
        if target != "float":
            line = error_of(invoke("convert", written[0], "--to", target, "--out", tmp_path / "out"))
            assert ("does not write it" in line) is (target == "aqlm")
            assert target in line
    assert not (tmp_path / "out").exists()
    done = invoke("convert", written[0], "--to", "float", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "decoded from aqlm" in done.stdout


def test_the_lists_say_that_it_is_read() -> None:
    listed = invoke("formats").stdout
    assert "aqlm: additive codebooks of AQLM checkpoints, which quantkit reads and does not write" in listed
    methods = " ".join(invoke("methods").stdout.split())
    assert "quantkit inspects and evaluates checkpoints that exist, as format aqlm" in methods


# --- broken files


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(f"{DOWN}.codes"), f"layer {DOWN} in .* has no tensor 'codes'"),
        (lambda tensors: tensors.pop(f"{DOWN}.codebooks"), f"layer {DOWN} in .* has no tensor 'codebooks'"),
        (lambda tensors: tensors.pop(f"{DOWN}.scales"), f"layer {DOWN} in .* has no tensor 'scales'"),
        (
            lambda tensors: tensors.update({f"{DOWN}.codes": torch.zeros(32, 32, dtype=torch.int8)}),
            r"down_proj\.codes has shape \[32, 32\]",
        ),
        (
            lambda tensors: tensors.update({f"{DOWN}.codes": torch.zeros(0, 32, 3, dtype=torch.int8)}),
            r"down_proj\.codes has shape \[0, 32, 3\]",
        ),
        (
            lambda tensors: tensors.update({f"{DOWN}.codes": torch.zeros(32, 32, 2, dtype=torch.int8)}),
            r"down_proj\.codes has shape \[32, 32, 2\], and by its config .* \[32, 32, 3\]",
        ),
        (
            lambda tensors: tensors.update({f"{DOWN}.codes": torch.zeros(32, 32, 3)}),
            r"down_proj\.codes is float32, not int8",
        ),
        (
            lambda tensors: tensors.update({f"{DOWN}.codebooks": torch.zeros(3, 16, 2, 4)}),
            r"down_proj\.codebooks has shape \[3, 16, 2, 4\]",
        ),
        (
            lambda tensors: tensors.update({f"{DOWN}.scales": torch.ones(64, 1, 1, 1)}),
            r"down_proj\.scales has shape \[64, 1, 1, 1\]",
        ),
        (
            lambda tensors: tensors.update({f"{DOWN}.scales": torch.ones(32, 1, 1, 1, dtype=torch.int32)}),
            r"down_proj\.scales is int32",
        ),
        (lambda tensors: tensors[f"{DOWN}.codes"][3, 4, 1].fill_(32), "a code is 32, and a codebook has 32 vectors"),
        (lambda tensors: tensors[f"{DOWN}.codes"][3, 4, 1].fill_(-17), "a code is -17, and a codebook has 32 vectors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(checkpoint: Path, edit: Callable[[Tensors], object], message: str) -> None:
    edit_tensors(checkpoint, edit)
    with pytest.raises(CheckpointError, match=message) as refusal:
        open_export(checkpoint).decodable(DOWN)
    assert DOWN in refusal.value.problem
    line = error_of(invoke("inspect", checkpoint))
    assert refusal.value.problem in line
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint, "reference")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nbits_per_codebook": 24}, "codes of 24 bits"),
        ({"nbits_per_codebook": 8}, r"codebooks has shape \[3, 32, 2, 4\]"),
        ({"num_codebooks": 0}, "cannot have 0 for codebooks"),
        ({"in_group_size": "8"}, "cannot have '8' for in_group"),
        ({"out_group_size": True}, "cannot have True for out_group"),
        ({KEPT: [f"{DOWN}.weight"]}, f"layer {DOWN} has codes, and '{KEPT}' of the config keeps it float"),
        ({KEPT: 5}, "is no list"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(checkpoint / "config.json", lambda config: config["quantization_config"].update(changes))
    with pytest.raises(CheckpointError, match=message):
        open_export(checkpoint)
    error_of(invoke("inspect", checkpoint))


def test_a_config_may_leave_out_what_the_package_assumes(tmp_path: Path) -> None:
    tensors = {f"layer.{name}": tensor for name, tensor in random_layer(LAYOUTS["1x16"], 16, 32).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "aqlm"}})
    assert open_export(tmp_path).schemes == {"layer": LAYOUTS["1x16"]}


def test_a_checkpoint_without_codes_is_refused(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "out")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "aqlm"}))
    with pytest.raises(CheckpointError, match="says that it is of aqlm, and no tensor is called codes"):
        open_export(folder)
