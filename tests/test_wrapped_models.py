"""Language models inside models that see or hear: which class they are of, and what of them is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

import quantkit
from quantkit.checkpoint.model_class import class_name, class_name_in, model_class
from quantkit.engine.empty_model import empty_model
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantizationError, SourceError
from quantkit.exports import open_export
from quantkit.runtimes._choice import choose_runtime
from quantkit.runtimes.base import LoadOptions
from quantkit.runtimes.reference import Reference
from quantkit.runtimes.transformers import Transformers
from tests.architectures import BASE, QWEN, TOWERS, VISION, make
from tests.tiny import tiny_rows

TEXT = {"text": "one two three four five six seven eight nine ten"}


def quantized(folder: Path, architecture: str, **options: Any) -> tuple[Path, Path]:
    """A model and its 4-bit checkpoint, calibrated on text."""
    make(folder / "model", architecture)
    (folder / "records.json").write_text(json.dumps([TEXT] * 4))
    calibration = {"dataset": str(folder / "records.json"), "max_length": 48, "samples": 4}
    out = quantkit.quantize(
        folder / "model", out=folder / "out", calibration=calibration, bits=4, group_size=32, device="cpu", **options
    )
    return folder / "model", out


@pytest.mark.parametrize("architecture", TOWERS)
def test_the_blocks_are_those_of_the_language_model(tmp_path: Path, architecture: str) -> None:
    make(tmp_path, architecture)
    skeleton = Skeleton(tmp_path)
    config: Any = skeleton.model.config.get_text_config()
    assert len(skeleton.segments) == config.num_hidden_layers
    reads = {layer.shape[1] for segment in skeleton.segments for layer in segment.layers}
    assert config.hidden_size in reads
    towers = ("vision", "visual", "audio", "embed_tokens_extend")
    assert not any(tower in segment.prefix for segment in skeleton.segments for tower in towers)


@pytest.mark.parametrize("architecture", TOWERS)
def test_an_export_loads_by_its_own_class_and_decodes_to_the_same_logits(tmp_path: Path, architecture: str) -> None:
    folder, out = quantized(tmp_path, architecture, method="gptq")
    cls: Any = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    ids = torch.tensor(tiny_rows(2, 20, 20))
    packed, info = cls.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    assert type(decoded.model) is type(packed) is cls
    with torch.no_grad():
        plain = cls.from_pretrained(folder, dtype=torch.float32)(input_ids=ids, use_cache=False).logits
        found = packed.eval()(input_ids=ids, use_cache=False).logits
        expected = decoded.model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected, plain)
    sizes = {layer.name: layer.module.weight.numel() for each in Skeleton(folder).segments for layer in each.layers}
    schemes = open_export(out).schemes
    assert set(schemes) <= set(sizes)
    assert sum(sizes[name] for name in schemes) > 0.97 * sum(sizes.values()), "gates and their like stay float"
    assert quantkit.inspect(out)["problems"] == []


def test_a_language_model_that_transformers_loads_alone_finds_its_layers(tmp_path: Path) -> None:
    """Its names lack the prefix of the model around it, in what stays float, too."""
    _, out = quantized(tmp_path, "qwen3_5", method="rtn")
    config = json.loads((out / "config.json").read_text())
    ignored = set(config["quantization_config"]["ignore"])
    assert {"model.layers.0.linear_attn.in_proj_a", "model.language_model.layers.0.linear_attn.in_proj_a"} <= ignored
    alone, info = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert type(alone).__name__ == "Qwen3_5ForCausalLM"
    assert not info["missing_keys"]
    decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    ids = torch.tensor(tiny_rows(2, 20, 20))
    with torch.no_grad():
        found, expected = (model(input_ids=ids, use_cache=False).logits for model in (alone.eval(), decoded.model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_card_loads_it_by_the_class_that_knows_it(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, "qwen2_vl", method="rtn")
    card = (out / "README.md").read_text()
    assert "from transformers import AutoModelForImageTextToText, AutoTokenizer" in card
    assert class_name_in(out) == "AutoModelForImageTextToText"
    assert class_name_in(tmp_path) == "AutoModelForCausalLM"


def test_layers_that_look_at_images_are_solved_without_tokens_and_that_is_said(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, "mllama", method="gptq")
    layers = {layer["name"]: layer for layer in json.loads((out / "stage.json").read_text())["facts"]["layers"]}
    unreached = {name for name, layer in layers.items() if not layer["tokens"]}
    assert unreached == {name for name in layers if ".layers.1." in name}
    assert all("no calibration token reached" in layers[name]["notes"][0] for name in unreached)


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_every_method_passes_by_layers_that_look_at_images(tmp_path: Path, method: str) -> None:
    _, out = quantized(tmp_path, "mllama", method=method)
    assert any(".layers.1.cross_attn" in name for name in open_export(out).schemes)


@pytest.mark.parametrize(
    ("model_type", "changes", "named", "auto"),
    [
        ("llama", {}, "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("qwen2_vl", {}, "Qwen2VLForConditionalGeneration", "AutoModelForImageTextToText"),
        ("qwen3_5", {}, "Qwen3_5ForConditionalGeneration", "AutoModelForImageTextToText"),
        ("qwen3_5", {"architectures": ["Qwen3_5ForCausalLM"]}, "Qwen3_5ForCausalLM", "AutoModelForCausalLM"),
        ("qwen2_audio", {}, "Qwen2AudioForConditionalGeneration", "AutoModelForMultimodalLM"),
        ("phi4_multimodal", {}, "Phi4MultimodalForCausalLM", "AutoModelForCausalLM"),
        ("llama", {"architectures": ["QwenForCausalLM"]}, "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("llama", {"architectures": ["LlamaModel"]}, "LlamaForCausalLM", "AutoModelForCausalLM"),
    ],
)
def test_the_class_is_the_one_that_the_config_names(
    model_type: str, changes: dict[str, Any], named: str, auto: str
) -> None:
    config = AutoConfig.for_model(model_type, **({"architectures": [named]} | changes))
    found = model_class(config)
    assert class_name(config) == auto
    mapped = found._model_mapping[type(config)] if hasattr(found, "_model_mapping") else found
    assert mapped.__name__ == named


def test_without_architectures_a_model_of_several_parts_is_built_whole() -> None:
    assert class_name(AutoConfig.for_model("qwen3_5")) == "AutoModelForImageTextToText"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "num_layers": 1},
            "T5ForConditionalGeneration has an encoder that its decoder reads",
        ),
        ({"model_type": "vit"}, "transformers has no model that generates text with a config of type 'vit'"),
    ],
)
def test_models_that_go_on_with_no_text_are_refused_in_a_line(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=message) as caught:
        empty_model(tmp_path)
    assert len(str(caught.value)) < 300


def test_a_package_that_a_tower_needs_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers.models.gemma3n")
    if transformers.utils.is_timm_available():
        pytest.skip("timm is here")
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": BASE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"needs packages that are not installed: .*timm"):
        empty_model(tmp_path)


def test_rows_that_a_model_does_not_take_are_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise TypeError("missing 1 required positional argument: 'pixel_values'")

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(QuantizationError, match=r"Llava\w+ does not run on .*rows: TypeError: .* 'pixel_values'"):
        quantized(tmp_path, "llava", method="gptq")


def test_tensors_that_transformers_does_not_split_beside_packed_layers_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Qianfan-OCR's tower, which stays float; the error that is expected here shows when transformers is mended."""
    parts = {
        "text_config": {**BASE, "model_type": "qwen3"},
        "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [16, 16]},
    }
    monkeypatch.setitem(TOWERS, "qianfan_ocr", parts)
    folder, out = quantized(tmp_path, "qianfan_ocr", method="rtn")
    notes = json.loads((out / "stage.json").read_text())["facts"]["notes"]
    assert any("QianfanOCRForConditionalGeneration does not split tensors such as attn.qkv.weight" in n for n in notes)
    assert choose_runtime(out).name == "reference"
    assert Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    cls: Any = transformers.QianfanOCRForConditionalGeneration
    cls.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"source keys=\['attn\.qkv\.weight'"):
        cls.from_pretrained(out)


def test_a_model_that_speaks_is_quantized_where_it_thinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no forward of its own, and is loaded with its voices."""
    thinker = {
        "text_config": QWEN,
        "audio_config": {
            "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "output_dim": 64,
        },
        "vision_config": {
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
    }  # fmt: skip
    monkeypatch.setitem(TOWERS, "qwen2_5_omni", {"thinker_config": thinker, "enable_audio_output": False})
    torch.manual_seed(0)
    make(tmp_path / "model", "qwen2_5_omni")
    torch.save({}, tmp_path / "model" / "spk_dict.pt")
    folder, out = quantized(tmp_path, "qwen2_5_omni", method="gptq")
    assert {name.rpartition(".layers.")[0] for name in open_export(out).schemes} == {"thinker.model"}
    assert quantkit.inspect(out)["problems"] == []
    decoded: Any = Reference().load(out, LoadOptions(device="cpu", dtype="float32"))
    cls: Any = transformers.Qwen2_5OmniForConditionalGeneration
    packed = Transformers().load(out, LoadOptions(device="cpu", dtype="float32"))
    plain = cls.from_pretrained(folder, dtype=torch.float32).thinker.eval()
    ids = torch.tensor(tiny_rows(1, 20, 20)[0])
    found = packed.logits(ids)
    torch.testing.assert_close(decoded.logits(ids), found, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.equal(found, plain(input_ids=ids[None], use_cache=False).logits[0])
