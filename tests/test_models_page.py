"""The table of architectures is what becomes of them: done again here for some, and by ``make proofs`` for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import SourceError
from quantkit.verification.models import MODELS_FILE, chosen, models_table, read_models
from quantkit.verification.models.table import LOADS
from tests import models_file, zoo

KEPT = read_models()["architectures"]
SOME = (
    "llama",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "falcon",
    "gpt2",
    "mamba",
    "zamba2",
    "qwen2_vl",
    "smolvlm",
    "gemma3n_text",
)


def same(architecture: str, folder: Path) -> None:
    assert models_file.facts_of(architecture, folder) == KEPT[architecture]


@pytest.mark.parametrize("architecture", SOME)
def test_what_becomes_of_some_is_what_the_file_says(architecture: str, tmp_path: Path) -> None:
    same(architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted({*zoo.architectures()} - {*SOME}))
def test_what_becomes_of_every_architecture_is_what_the_file_says(architecture: str, tmp_path: Path) -> None:
    same(architecture, tmp_path)


def test_every_architecture_of_transformers_is_there() -> None:
    assert set(KEPT) == set(zoo.architectures())


def test_few_are_refused_and_the_rest_is_quantized_but_for_what_is_meant_to_stay_float() -> None:
    refused = [name for name, facts in KEPT.items() if "refused" in facts]
    assert len(refused) <= 5, refused
    aside = ("router", "recurrence", "convolution", "small", "gate")
    for name, facts in KEPT.items():
        if facts.get("share", 1) < 0.97:
            assert any(word in reason for reason in facts["float"] for word in aside), name


def test_the_page_is_that_of_the_file() -> None:
    assert models_file.page(read_models()) == models_file.PAGE.read_text(encoding="utf-8"), MODELS_FILE


def printed(*arguments: str) -> str:
    return CliRunner().invoke(app, ["models", *arguments]).stdout


def test_the_command_prints_all_some_and_says_which_there_are() -> None:
    assert json.loads(printed("--json")) == read_models()
    assert set(json.loads(printed("gemma", "--json"))["architectures"]) == {name for name in KEPT if "gemma" in name}
    assert "qwen3_moe" in printed("qwen3moe")
    with pytest.raises(SourceError, match="no architecture is called 'gema'") as caught:
        chosen(read_models(), "gema")
    assert caught.value.remedy.startswith("did you mean gemma")
    with pytest.raises(SourceError) as caught:
        chosen(read_models(), "zebra")
    assert caught.value.remedy == "'quantkit models' lists all"


def test_the_table_has_a_row_for_each_and_marks_what_loads() -> None:
    found = chosen(read_models(), "gpt_oss")
    assert models_table(found).row_count == len(found["architectures"])
    assert found["architectures"]["gpt_oss"]["formats"]["compressed-tensors"] == LOADS
