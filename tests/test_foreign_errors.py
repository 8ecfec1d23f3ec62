"""What transformers says of models that it cannot build is one short line with the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.foreign_errors import said_by_transformers
from quantkit.engine.empty_model import empty_model
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError, SourceError
from quantkit.recipe import ModelSpec
from quantkit.source import resolve
from tests.tiny import make_model

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"model_type": "nonesuch"}, "knows no model_type 'nonesuch' (install a newer one if that does"),
    "none": ({"hidden_size": 8}, "Unrecognized model in"),
    "sees only": ({"model_type": "clip"}, "no model that generates text with a config of type 'clip'"),
    "value": ({"model_type": "llama", "hidden_size": "big"}, "Field 'hidden_size' expected int, got str"),
    "code": (
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
        "its code comes with it (read it, and set model.trust_remote_code: true (--trust-remote-code) if you trust it)",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_one_line_with_the_reason(tmp_path: Path, kind: str) -> None:
    config, words = CONFIGS[kind]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError) as caught:
        empty_model(tmp_path)
    text = str(caught.value)
    assert words in text
    assert "\n" not in text
    assert len(text) < 300 + len(str(tmp_path))
    assert "download it again" not in text


def test_the_source_says_the_same(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(SourceError, match="knows no model_type 'nonesuch'") as caught:
        resolve(ModelSpec(source=str(folder)), tmp_path / "run")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_packages_are_named_and_lists_are_not() -> None:
    text = "\nA requires the PIL library but it is not here.\nB requires the timm library. C requires the PIL library"
    assert said_by_transformers(ImportError(text)).problem == "it needs packages that are not installed: PIL, timm"
    classes = ", ".join(f"Config{number}" for number in range(400))
    reason = "Unrecognized configuration class <class 'C'> for this kind of AutoModel: X"
    text = f"{reason}.\nModel type should be one of {classes}."
    assert said_by_transformers(ValueError(text)).problem == reason


def test_a_tensor_that_is_missing_in_the_last_block_is_told_at_the_start(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    words = r"tensor model.layers.1.mlp.down_proj.weight is not in the checkpoint \(check that all files are there"
    with pytest.raises(CheckpointError, match=words):
        Skeleton(folder).check_blocks()
    with pytest.raises(CheckpointError, match=words):
        quantkit.quantize(folder, out=tmp_path / "out", method="rtn", group_size=32)
