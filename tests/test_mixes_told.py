"""Mixes beside their files: in `inspect`, on the model card, and what changed of them since the accepted run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import quantkit
from quantkit.gates.record import LayerRecord, variant_record
from quantkit.inspection import inspect, inspect_tables
from quantkit.publishing import CardFacts, card
from quantkit.regression.changes import changes
from quantkit.regression.document import Change
from quantkit.regression.judging import Beside
from quantkit.run_history.terminal import run_lines
from quantkit.system.artifacts import write_json
from tests.history_records import run, variant
from tests.report_rows import allocation, mixed_row
from tests.tiny import make_model

KINDS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)
    overrides = {r"\.0\.mlp\.down_proj$": {"bits": 8}}
    out = tmp_path_factory.mktemp("exports") / "mix"
    return quantkit.quantize(source, out=out, method="rtn", bits=4, group_size=32, overrides=overrides)


@pytest.fixture
def mixed(plain: Path, tmp_path: Path) -> Path:
    """A checkpoint with its allocation, by whose choices the down projection of the first block has 8 bits."""
    names = [f"model.layers.{block}.{kind}" for block in range(2) for kind in KINDS]
    chosen = dict.fromkeys(names, "int4") | {"model.layers.0.mlp.down_proj": "int8"}
    folder = Path(shutil.copytree(plain, tmp_path / "mix"))
    write_json(folder / "allocation.json", allocation(chosen, predicted=0.0125, budget="4.75 bits per weight"))
    return folder


def test_inspect_tells_what_each_layer_got_and_the_predicted_loss(mixed: Path, plain: Path) -> None:
    found = inspect(mixed, deep=False)
    told = found["allocation"]
    assert (told["budget"], told["predicted"]) == ("4.75 bits per weight", pytest.approx(0.0125))
    assert {name: part["layers"] for name, part in told["choices"].items()} == {"int4": 13, "int8": 1}
    kinds = {kind["layers"]: (kind["blocks"], kind["choices"]) for kind in told["kinds"]}
    assert kinds["down_proj"] == ("84", {"int4": 1, "int8": 1})
    assert kinds["q_proj"] == ("44", {"int4": 2})
    assert found["problems"] == inspect(plain, deep=False)["problems"]
    console = Console(file=StringIO(), width=160, color_system=None)
    for each in inspect_tables(found):
        console.print(each)
    assert isinstance(console.file, StringIO)
    printed = " ".join(console.file.getvalue().split())
    assert "predicted loss │ 0.0125 nats per token" in printed
    assert "mixed within │ 4.75 bits per weight" in printed
    assert "down_proj int4 in 1, int8 in 1 84 4.50 to 8.50" in printed


def test_an_allocation_that_is_none_is_a_problem_and_nothing_else(mixed: Path, plain: Path) -> None:
    assert inspect(plain, deep=False)["allocation"] is None
    for text in ("{", '{"units": 3}'):
        (mixed / "allocation.json").write_text(text)
        found = inspect(mixed, deep=False)
        assert found["allocation"] is None
        assert any("allocation.json is no allocation" in problem for problem in found["problems"])
        assert "Mixed schemes" not in card(mixed)


def test_the_card_has_the_strip_with_predicted_and_measured_loss(mixed: Path, plain: Path) -> None:
    scores = {"metrics": {"perplexity": {"prose": 9.0}, "kl_divergence": {"prose": {"mean": 0.0131}}}}
    text = card(mixed, CardFacts(scores=scores))
    section = text.split("## Mixed schemes\n")[1].split("\n## ")[0]
    assert "within 4.75 bits per weight. Predicted: 0.01250 nats per token" in section
    assert "Measured: 0.01310 on prose." in section
    assert "| int4 | 4.50 | 13 | 53,248 | 29,952 |" in section
    assert "| `down_proj` | int4 in 1, int8 in 1 | `84` | 4.50 to 8.50 |" in section
    assert "Measured:" not in card(mixed)
    assert "Mixed schemes" not in card(plain)


def test_a_changed_allocation_is_told_by_how_many_layers_changed() -> None:
    def record(**schemes: str) -> list[Change]:
        layers = tuple(LayerRecord(name, scheme, None, 0.01) for name, scheme in schemes.items())
        now = run(variants=(variant(layers=layers),))
        then = run(id=3, variants=(variant(layers=before),))
        return [change for change in changes(now, Beside({"int4": then}, [])) if change.area == "file"]

    old = {"a": "int3", "b": "int3", "c": "int4", "d": "int4"}
    before = tuple(LayerRecord(name, scheme, None, 0.01) for name, scheme in old.items())
    assert record(**old) == []
    (found,) = record(**(old | {"a": "int4", "c": "int3", "b": "int8"}))
    assert (found.key, found.before, found.after) == (
        "schemes of 3 of 4 layers",
        "int3 in 2, int4 in 1",
        "int4 in 1, int8 in 1, int3 in 1",
    )
    assert found.variants == ("int4",)
    del old["d"]
    (found,) = record(**old)
    assert (found.key, found.before, found.after) == ("schemes of 1 of 4 layers", "int4 in 1", "float in 1")
    before = tuple(replace(layer, scheme="int4") for layer in before)
    assert record(a="int3", b="int3", c="int3", d="int3") == []  # which the recipe's keys tell


def test_history_names_the_schemes_of_a_mix() -> None:
    found = variant_record(mixed_row("mix-4", 0.3, 0.02))
    assert found.scheme == "mixed int3, int4"
    assert "mix-4: mixed int3, int4" in run_lines(run(variants=(found,)))
