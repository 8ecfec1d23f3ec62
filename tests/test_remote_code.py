"""Models that bring their own Python code: refused by every command until it is trusted, and told of in the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import quantkit
from quantkit.cli import app
from quantkit.exports.manifest import read_manifest
from quantkit.publishing.card import card
from quantkit.verification.job import VerificationJob
from quantkit.verification.worker import perform
from tests.adapters import make_adapter
from tests.runs import score_here
from tests.tiny import make_model

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-of-this-test"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("models") / "own")
    (folder / "own_model.py").write_text(CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    config |= {"model_type": "own-of-this-test", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def export(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "own-int8"
    found = invoke("quantize", str(model), "--out", str(out), "--method", "rtn", "--bits", "8", "--trust-remote-code")
    assert found.exit_code == 0, found.stderr
    return out


def test_it_is_recorded_and_told(export: Path) -> None:
    manifest = read_manifest(export)
    assert manifest is not None
    assert manifest["remote_code"] is True
    assert (export / "own_model.py").read_text() == CODE
    text = card(export)
    assert "trust_remote_code=True" in text
    assert "--trust-remote-code" in text
    assert "made with Python code that came with the model" in text


def test_inspect_says_what_its_class_is_and_takes_it_for_no_problem(model: Path, export: Path) -> None:
    for folder in (model, export):
        found = quantkit.inspect(folder)
        assert found["problems"] == []
        assert "its model class OwnModel is Python code that lies beside it" in "\n".join(found["remarks"])


LINES: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize", "{model}", "--out", "{out}", "--method", "rtn"),
    "evaluate": ("evaluate", "{export}", "--reference", "{model}", "--max-tokens", "64", "--context-length", "32"),
    "convert": ("convert", "{export}", "--to", "gptq", "--out", "{out}"),
    "merge": ("merge", "{model}", "{adapter}", "{out}", "--any-base"),
    "verify": ("verify", "{export}"),
    "estimate": ("estimate", "{model}"),
    "estimate --cards": ("estimate", "{model}", "--cards"),
}


@pytest.mark.parametrize("name", LINES)
def test_every_command_that_loads_a_model_runs_its_code_only_where_it_is_trusted(
    name: str, model: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluation.run_job", score_here)
    monkeypatch.setattr("quantkit.verification.verdict.carry_out", answer_here)
    plain = make_model(tmp_path / "plain")
    places = {"model": model, "export": export, "out": tmp_path / "out"}
    places["adapter"] = make_adapter(tmp_path / "adapter", plain, target_modules=["q_proj"])
    line = [part.format(**places) for part in LINES[name]]
    refused = invoke(*line)
    assert refused.exit_code == 2
    assert "--trust-remote-code" in refused.stderr
    assert "Traceback" not in refused.output
    trusted = invoke(*line, "--trust-remote-code")
    assert trusted.exit_code == 0, trusted.output


def test_the_code_goes_along_with_a_converted_checkpoint(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted = invoke("convert", export, "--to", "gptq", "--out", out, "--trust-remote-code")
    assert converted.exit_code == 0, converted.output
    assert (out / "own_model.py").read_text() == CODE
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoConfig"] == "own_model.OwnConfig"
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["remote_code"] is True


def answer_here(job: VerificationJob) -> dict[str, Any]:
    """What the process of a verification does, in this one."""
    return perform(job)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
