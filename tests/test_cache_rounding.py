"""Scales of keys and values are calibrated, written as servers read them, and scored with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.quant_args import QuantizationArgs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.allocation.budget import allocated
from quantkit.allocation.units import CheckpointModel, units_of
from quantkit.engine.cache_rounding import attention_modules, put_cache_rounder
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantizationError, QuantkitError
from quantkit.estimation import estimate
from quantkit.estimation.weights import stored
from quantkit.exports import open_export
from quantkit.quantization import Job, Quantized, Wanted, quantize_together
from quantkit.recipe import AutoSpec, VariantSpec
from quantkit.runtimes._model import TransformersModel
from quantkit.runtimes._streamed import load_streamed
from quantkit.runtimes.base import LoadOptions
from quantkit.runtimes.reference import Reference
from quantkit.runtimes.transformers import Transformers
from quantkit.schemes.rounding import CACHES
from quantkit.system.artifacts import read_json
from quantkit.system.validation import parse_section
from tests.architectures import make
from tests.test_transforms import cut_after
from tests.tiny import make_model, tiny_rows

INT4: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "format": "compressed-tensors"}
IDS = torch.arange(3, 60)
LAYER = "model.layers.{}.self_attn.{}_scale"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


def exported(
    model: Path,
    out: Path,
    cache: str | None,
    inputs: Any = "float",
    on_segment: Callable[[int, int], None] = lambda _done, _total: None,
    **keys: Any,
) -> Path:
    given = {"name": "v", **INT4, **keys, **({} if cache is None else {"kv_cache": cache})}
    job = Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, device="cpu", inputs=inputs)
    wanted = [Wanted(parse_section(VariantSpec, given, "test"), out)]
    (done,) = quantize_together(job, wanted, on_segment=on_segment)
    if not isinstance(done, Quantized):
        raise done
    return done.folder


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    out = tmp_path_factory.mktemp("out")
    return lambda cache: exported(model, out / cache, cache)


def rounded(values: torch.Tensor, scale: torch.Tensor, numbers: str) -> torch.Tensor:
    """By hand: ``[batch, heads, tokens, width]`` over a scale of all, or of each head."""
    steps = values / scale.view(-1, 1, 1)
    if numbers == "fp8":
        return steps.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale.view(-1, 1, 1)
    return steps.round().clamp(-128, 127) * scale.view(-1, 1, 1)


def logits(loaded: Any) -> torch.Tensor:
    assert isinstance(loaded, TransformersModel)
    return loaded.logits(IDS)


@pytest.mark.parametrize("cache", CACHES)
def test_the_loss_of_a_cache_is_that_of_its_rounded_keys_and_values(
    cache: str, model: Path, folders: Callable[[str], Path]
) -> None:
    """The reference decoder computes what transformers does with the file, and what is computed by hand."""
    folder = folders(cache)
    tensors, export = load_file(folder / "model.safetensors"), open_export(folder)
    options = LoadOptions(dtype="float32")
    loaded = Reference.load(folder, options)
    assert loaded.rounded_inputs == (CACHES[cache].describe(),)
    found = logits(loaded)
    torch.testing.assert_close(found, logits(Transformers.load(folder, options)), rtol=1e-4, atol=1e-4)
    hand = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for layer in export.schemes:
        hand.get_submodule(layer).weight.data = export.weight(layer).dequantize(torch.float32)
    with torch.no_grad():
        plain = hand(IDS[None]).logits[0]
        for index, module in enumerate(attention_modules(hand).values()):
            scales = [tensors[LAYER.format(index, kind)] for kind in "kv"]

            def store(
                keys: torch.Tensor, values: torch.Tensor, scales: list[torch.Tensor] = scales
            ) -> tuple[torch.Tensor, torch.Tensor]:
                numbers = CACHES[cache].numbers
                return rounded(keys, scales[0], numbers), rounded(values, scales[1], numbers)

            put_cache_rounder(module, store)
        wanted = hand(IDS[None]).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("cache", "strategy"), [("fp8", "tensor"), ("fp8_head", "attn_head")])
def test_scales_span_keys_after_the_rotary_embedding(
    cache: str, strategy: str, model: Path, folders: Callable[[str], Path]
) -> None:
    tensors = load_file(folders(cache) / "model.safetensors")
    args = QuantizationArgs.model_validate(
        read_json(folders(cache) / "config.json")["quantization_config"]["kv_cache_scheme"]
    )
    assert (args.num_bits, args.type, args.strategy, args.dynamic) == (8, "float", strategy, False)
    largest = torch.zeros(2, 2)  # of keys and values, by head
    float_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def see(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for place, each in enumerate((keys, values)):
            largest[place] = torch.maximum(largest[place], each.abs().amax((0, 2, 3)))
        return keys, values

    put_cache_rounder(float_model.model.layers[1].self_attn, see)
    with torch.no_grad():
        for row in tiny_rows():
            float_model(torch.tensor([row]))
    for place, kind in enumerate("kv"):
        scale, spans = tensors[LAYER.format(1, kind)], largest[place] / 448
        assert scale.dtype == torch.float32
        assert scale.shape == ((1,) if cache == "fp8" else (2, 1, 1))
        torch.testing.assert_close(
            scale.flatten(), spans if cache == "fp8_head" else spans.amax()[None], rtol=0.02, atol=0
        )


def test_a_cache_is_kept_where_the_format_has_it_and_told_where_not(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders("fp8")
    quantkit.convert(folder, to="compressed-tensors", out=tmp_path / "same")
    (tmp_path / "same" / "manifest.json").unlink()
    foreign = open_export(tmp_path / "same")
    assert foreign.cache == CACHES["fp8"]
    assert not any(name.endswith("_scale") for name in foreign.float_names())
    options = LoadOptions(dtype="float32")
    torch.testing.assert_close(
        logits(Reference.load(tmp_path / "same", options)), logits(Reference.load(folder, options))
    )
    told = quantkit.convert(folder, to="gptq", out=tmp_path / "gptq")
    assert any(
        "the scales of the KV cache are left out" in note
        for note in read_json(tmp_path / "gptq" / "stage.json")["facts"]["notes"]
    ), told
    assert open_export(tmp_path / "gptq").cache is None


def test_a_block_at_a_time_gives_the_same(folders: Callable[[str], Path]) -> None:
    folder, options = folders("fp8_head"), LoadOptions(dtype="float32")
    streamed = load_streamed(folder, options, None)
    assert streamed.rounded_inputs == ("KV cache fp8 per head",)
    (found,) = list(streamed.logits_of([IDS]))
    torch.testing.assert_close(found, logits(Reference.load(folder, options)), rtol=1e-4, atol=1e-4)


def test_quantized_inputs_calibrate_scales_too_and_change_no_codes(model: Path, tmp_path: Path) -> None:
    found = [
        load_file(exported(model, tmp_path / str(cache), cache, "quantized", method="gptq") / "model.safetensors")
        for cache in (None, "fp8")
    ]
    assert set(found[1]) - set(found[0]) == {LAYER.format(block, kind) for block in (0, 1) for kind in "kv"}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_convolutions_beside_attention_have_no_keys(tmp_path: Path) -> None:
    """They are handed the cache, too, for states of their own."""
    make(tmp_path / "model", "lfm2")
    folder = exported(tmp_path / "model", tmp_path / "out", "fp8")
    names = [name for name in load_file(folder / "model.safetensors") if name.endswith(("k_scale", "v_scale"))]
    assert names
    assert all(".self_attn." in name for name in names)
    loaded = Reference.load(folder, LoadOptions(dtype="float32"))
    assert loaded.rounded_inputs == ("KV cache fp8 per tensor",)
    assert logits(loaded).isfinite().all()


def test_a_walk_that_goes_on_has_the_scales_of_the_one_before(model: Path, tmp_path: Path) -> None:
    whole, out = exported(model, tmp_path / "whole", "fp8"), tmp_path / "again" / "out"
    with pytest.raises(KeyboardInterrupt):
        exported(model, out, "fp8", on_segment=cut_after(1))
    again = exported(model, out, "fp8")
    assert read_json(again / "stage.json")["facts"]["resumed"] == 1
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_what_has_no_such_cache_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="kv_cache: the gptq format does not say how servers store keys"):
        exported(model, tmp_path / "a", "fp8", format="gptq")
    with pytest.raises(QuantizationError, match=r"kv_cache: model.layers.1 has no quantized layer"):
        exported(model, tmp_path / "b", "fp8", ignore=["lm_head", r"layers\.1\."])
    make(tmp_path / "zamba", "zamba")
    with pytest.raises(QuantizationError, match=r"kv_cache: model.layers.\d+ shares its attention with other blocks"):
        exported(tmp_path / "zamba", tmp_path / "e", "fp8")
    make(tmp_path / "gpt_neox", "gpt_neox")
    with pytest.raises(QuantizationError, match="no attention of GPTNeoXForCausalLM takes a cache called"):
        exported(tmp_path / "gpt_neox", tmp_path / "d", "fp8")
    with pytest.raises(QuantizationError, match="float inputs do not show what awq"):
        exported(model, tmp_path / "c", "fp8", method="awq")


def test_a_mix_has_the_cache_of_its_variant(model: Path) -> None:
    """What it takes of the file is told, and choices are measured without it, so that mixes share what is measured."""
    spec = parse_section(AutoSpec, {"name": "v", "bits": "auto", "budget": 4.0, "kv_cache": "fp8_head"}, "test")
    assert spec.stand_in().kv_cache is None
    known = CheckpointModel(Job(model, {"reference": "tiny"}, "float32", device="cpu"), Skeleton(model))
    units = units_of(known, spec)
    mixed = spec.with_choice(allocated(known, spec, units, [next(iter(unit.sizes)) for unit in units]))
    assert mixed.kv_cache == "fp8_head"
    plain = mixed.model_copy(update={"kv_cache": None})
    config = read_json(model / "config.json")
    scales = 4 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"]
    assert scales < known.file_bytes(mixed) - known.file_bytes(plain) < scales + 2000
    tensors = [stored(known.anatomy, each).nbytes for each in (mixed, plain)]
    assert tensors[0] - tensors[1] == scales


def test_a_cache_of_8_bits_takes_half_the_memory() -> None:
    plain = estimate("llama-3.1-8b", context=4096)
    halved = estimate("llama-3.1-8b", context=4096, kv_cache="fp8_head")
    sizes = [
        next(line.nbytes for part in each.parts for line in part.lines if line.name == "KV cache")
        for each in (plain, halved)
    ]
    assert sizes[0] == 2 * sizes[1]
