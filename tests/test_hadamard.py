"""Inputs that runtimes turn (R4): the float model computes what it did, and compressed-tensors reads what files say."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.equality import largest_difference
from quantkit.engine.input_rounding import Rounder, put_rounder
from quantkit.engine.input_turning import put_turn, take_turns, turned
from quantkit.engine.originals import Originals
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.transforming import Transforming, _Model
from quantkit.errors import CheckpointError, EvaluationError, QuantizationError, QuantkitError, SchemeError
from quantkit.exports import open_export
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.numerics.orthogonal import sylvester_rotation
from quantkit.publishing.card import card
from quantkit.quantization import quantize
from quantkit.recipe import VariantSpec
from quantkit.recovery.whole_changes import whole_changes
from quantkit.runtimes._choice import choose_runtime
from quantkit.runtimes._streamed import load_streamed
from quantkit.runtimes.base import LoadOptions
from quantkit.schemes.rounding import InputRounding
from quantkit.system.artifacts import file_sha256, read_json
from quantkit.system.validation import parse_section
from quantkit.transforms.base import Changes
from quantkit.transforms.hadamard import Hadamard, HadamardOptions, TurnedInputs
from tests.architectures import make
from tests.test_rotate import job, logits, variant, with_norms
from tests.test_transforms import cut_after
from tests.tiny import make_model, tiny_rows

DOWN = "model.layers.{}.mlp.down_proj"
WIDTH = 96
"""Of what down_proj is given: three pieces of 32."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_norms(make_model(tmp_path_factory.mktemp("model"), "llama", intermediate_size=WIDTH))


@pytest.fixture(scope="module")
def turned_file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Behind both kinds of rotation."""
    spec = variant(bits=8, transforms=["rotate", "hadamard"])
    return quantize(job(model), spec, tmp_path_factory.mktemp("turned") / "out").folder


def change_of(folder: Path, **options: Any) -> tuple[Originals, TurnedInputs]:
    originals = Originals(Skeleton(folder), CheckpointReader(folder), torch.device("cpu"))
    change = Hadamard(HadamardOptions(**options)).of_model(_Model(Transforming(originals, True), Changes()))
    assert isinstance(change, TurnedInputs)
    return originals, change


def test_the_matrix_is_that_of_compressed_tensors_and_undoes_itself() -> None:
    hadamard = pytest.importorskip("compressed_tensors.transform.utils.hadamard")
    wanted = hadamard.deterministic_hadamard_matrix(512, torch.float32) / 512**0.5
    found = sylvester_rotation(512)
    torch.testing.assert_close(found.columns(torch.eye(512)), wanted)
    torch.testing.assert_close(found.columns(wanted), torch.eye(512), rtol=0, atol=1e-6)


FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "phi": {"layers": ["fc2$"]},
    "cohere": {"size": 8},
    "gpt2": {"layers": [r"mlp\.c_proj$"]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_what_they_are(tmp_path: Path, family: str) -> None:
    make(tmp_path, family)
    originals, change = change_of(tmp_path, **FAMILIES[family])
    assert change.sizes
    assert largest_difference(originals, change) < 1e-5
    weights = Changes((TurnedInputs(change.sizes),))
    object.__setattr__(weights.parts[0], "sizes", {})  # neither weights nor inputs
    assert largest_difference(originals, weights) == 0


def test_the_runtime_must_turn_what_the_weights_expect(model: Path) -> None:
    class Unturned(TurnedInputs):
        def input_turn(self, module: str) -> int:
            return 0

    originals, change = change_of(model)
    assert change.sizes == {DOWN.format(0): 32, DOWN.format(1): 32}
    assert largest_difference(originals, Unturned(change.sizes)) > 1e-2


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("mixtral", {}, "are experts, before which no runtime turns inputs"),
        ("cohere", {"layers": ["fc2"]}, "no layer of this model is called fc2"),
        ("cohere", {"size": 4096}, "down_proj has .* inputs, no multiple of 4096"),
    ],
)
def test_what_cannot_be_turned_is_refused_by_name(tmp_path: Path, family: str, options: Any, why: str) -> None:
    make(tmp_path, family)
    with pytest.raises(QuantizationError, match=why):
        change_of(tmp_path, **options)


@pytest.mark.parametrize("options", [{"size": 12}, {"layers": ["("]}, {"layers": []}])
def test_options_that_make_no_sense_are_refused_with_the_recipe(options: dict[str, Any]) -> None:
    with pytest.raises(QuantkitError, match=r"power of two|no pattern|must not be empty"):
        parse_section(VariantSpec, {"name": "v", "transforms": [{"name": "hadamard", **options}]}, "test")


@pytest.mark.parametrize("store", ["gptq", "gguf", "bitsandbytes"])
def test_a_format_that_cannot_say_it_is_refused_with_the_recipe(store: str) -> None:
    with pytest.raises(QuantkitError, match=f"a {store} file cannot ask for"):
        parse_section(VariantSpec, {"name": "v", "format": store, "transforms": ["hadamard"]}, "test")


def by_compressed_tensors(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of transformers' packed model as it loads the file, and behind what the package makes of the config."""
    package = pytest.importorskip("compressed_tensors.transform")
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        plain = loaded(ids).logits
    config = package.TransformConfig(**read_json(folder / "config.json")["quantization_config"]["transform_config"])
    for name, scheme in config.config_groups.items():
        scheme.apply = [each for each in scheme.apply if each.is_online()]  # all else is in the weights
        package.TransformFactory.from_scheme(scheme, name=name).apply_to_model(loaded, use_tqdm=False)
    with torch.no_grad():
        return plain, loaded(ids).logits


def test_the_reference_computes_what_compressed_tensors_does(turned_file: Path) -> None:
    ids = torch.tensor([tiny_rows()[0]])
    unturned, wanted = by_compressed_tensors(turned_file, ids)
    found = logits(turned_file)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (unturned - wanted).norm() > 0.1 * wanted.norm(), "transformers turns inputs by itself: let it load the file"


def test_a_block_at_a_time_computes_the_same(turned_file: Path) -> None:
    row = torch.tensor(tiny_rows()[0])
    streamed = load_streamed(turned_file, LoadOptions(dtype="float32"), None).logits(row)
    torch.testing.assert_close(streamed, logits(turned_file)[0], rtol=1e-4, atol=1e-4)


def test_no_runtime_that_leaves_inputs_unturned_is_given_the_file(turned_file: Path, tmp_path: Path) -> None:
    assert choose_runtime(turned_file).name == "reference"
    with pytest.raises(EvaluationError, match="transformers does not turn the inputs of layers"):
        choose_runtime(turned_file, "transformers")
    with pytest.raises(EvaluationError, match="transformers does not turn the inputs of layers"):
        quantkit.verify(turned_file, runtime="transformers")
    assert "transformers does not turn the inputs" in card(turned_file)
    told = quantkit.inspect(turned_file)
    assert told["turned"] == 2
    assert told["loads"] == ["vLLM", "quantkit's reference decoder: as a float model"]
    with pytest.raises(SchemeError, match=r"is given turned inputs .*, which a gptq file cannot ask for"):
        quantkit.convert(turned_file, to="gptq", out=tmp_path / "gptq")


def test_a_file_keeps_its_turns_when_it_is_converted(turned_file: Path, tmp_path: Path) -> None:
    done = tmp_path / "again"
    quantkit.convert(turned_file, to="compressed-tensors", out=done)
    assert open_export(done).turns == {DOWN.format(0): 32, DOWN.format(1): 32}
    torch.testing.assert_close(logits(done), logits(turned_file))


@pytest.mark.parametrize(
    "patch",
    [{"type": "random-hadamard"}, {"randomize": True}, {"head_dim": None}, {"apply": [{"location": "output"}]}],
    ids=str,
)
def test_other_turns_of_other_tools_are_refused(turned_file: Path, patch: dict[str, Any]) -> None:
    config = read_json(turned_file / "config.json")["quantization_config"]
    config["transform_config"]["config_groups"]["R4"] |= patch
    with pytest.raises(CheckpointError, match="R4 of transform_config"):
        CompressedTensors.turns_in(config)


def test_what_is_in_the_weights_alone_asks_nothing_of_a_runtime(turned_file: Path) -> None:
    """As llm-compressor tells of R1 and R2."""
    config = read_json(turned_file / "config.json")["quantization_config"]
    places = [{"targets": ["re:.*o_proj$"], "location": "weight_output"}]
    config["transform_config"] = {"config_groups": {"R1": {"type": "random-hadamard", "apply": places}}}
    assert CompressedTensors.turns_in(config) == {}


def test_a_channel_that_stands_out_takes_less_of_the_range() -> None:
    layer = torch.nn.Linear(64, 64, bias=False)
    layer.weight.data = torch.eye(64)
    inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    inputs[:, 3] *= 100
    put_rounder(layer, Rounder(InputRounding("int8")))
    plain = (layer(inputs) - inputs).norm()
    put_turn(layer, 32)
    assert (turned(layer(inputs), 32) - inputs).norm() < 0.3 * plain
    take_turns([layer])
    assert (layer(inputs) - inputs).norm() == plain


def test_a_run_that_was_cut_short_gives_the_same_bytes(model: Path, turned_file: Path, tmp_path: Path) -> None:
    spec = variant(bits=8, transforms=["rotate", "hadamard"])
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), spec, tmp_path / "cut" / "out", on_segment=cut_after(1))
    done = quantize(job(model), spec, tmp_path / "cut" / "out")
    assert done.facts["resumed"] > 0
    for name in ("model.safetensors", "config.json"):
        assert file_sha256(turned_file / name) == file_sha256(done.folder / name)


def test_what_is_trained_is_quantized_without(model: Path, turned_file: Path) -> None:
    manifest = read_json(turned_file / "manifest.json")
    assert manifest["transforms"][1]["model"]["sizes"] == {DOWN.format(0): 32, DOWN.format(1): 32}
    with pytest.raises(QuantizationError, match="made with hadamard: runtimes turn"):
        whole_changes(manifest, Skeleton(model), CheckpointReader(model), torch.device("cpu"))
