"""Every mistake that a user can make: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.cli import app
from tests.runs import hidden_names, recipe_data, write_recipe, write_records
from tests.tiny import make_model

Breaker = Callable[[dict[str, Any], Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sharded model and a data set, to be copied and broken."""
    folder = tmp_path_factory.mktemp("sound")
    make_model(folder / "model", shards=3)
    write_records(folder / "data.jsonl")
    return folder


def shard(folder: Path) -> Path:
    return sorted((folder / "model").glob("model-*.safetensors"))[1]


def truncated_shard(data: dict[str, Any], folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def missing_shard(data: dict[str, Any], folder: Path) -> None:
    shard(folder).unlink()


def nan_weight(data: dict[str, Any], folder: Path) -> None:
    tensors = load_file(shard(folder))
    name = next(name for name in sorted(tensors) if name.endswith("proj.weight"))
    tensors[name][1, 2] = float("nan")
    save_file(tensors, shard(folder), {"format": "pt"})


def pickled_only(data: dict[str, Any], folder: Path) -> None:
    for file in (folder / "model").glob("*.safetensors*"):
        file.unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(b"x")


def broken_config(data: dict[str, Any], folder: Path) -> None:
    (folder / "model" / "config.json").write_text("{")


def unknown_architecture(data: dict[str, Any], folder: Path) -> None:
    (folder / "model" / "config.json").write_text('{"model_type": "nonesuch"}')


def missing_model(data: dict[str, Any], folder: Path) -> None:
    data["model"]["source"] = str(folder / "modle")


def empty_data(data: dict[str, Any], folder: Path) -> None:
    (folder / "data.jsonl").write_text("\n\n")


def binary_data(data: dict[str, Any], folder: Path) -> None:
    (folder / "data.jsonl").write_bytes(bytes(range(256)))


def missing_data(data: dict[str, Any], folder: Path) -> None:
    (folder / "data.jsonl").unlink()


def foreign_columns(data: dict[str, Any], folder: Path) -> None:
    (folder / "data.jsonl").write_text('{"frage": "x", "antwort": "y"}\n' * 4)


def output_below_a_file(data: dict[str, Any], folder: Path) -> None:
    data["report"]["folder"] = str(folder / "data.jsonl" / "run")


def output_is_a_file(data: dict[str, Any], folder: Path) -> None:
    data["report"]["folder"] = str(folder / "data.jsonl")


def output_where_nothing_can_be(data: dict[str, Any], folder: Path) -> None:
    data["report"]["folder"] = "/proc/quantkit-run"


def foreign_output(data: dict[str, Any], folder: Path) -> None:
    (folder / "run" / "variants" / "gptq").mkdir(parents=True)
    (folder / "run" / "variants" / "gptq" / "thesis.tex").write_text("x")


def unknown_key(data: dict[str, Any], folder: Path) -> None:
    data["varaints"] = []


def unknown_method(data: dict[str, Any], folder: Path) -> None:
    data["variants"][0]["method"] = "gtpq"


def absent_device(data: dict[str, Any], folder: Path) -> None:
    data["evaluation"]["device"] = "cuda:99"


def missing_template(data: dict[str, Any], folder: Path) -> None:
    data["calibration"]["chat_template"] = str(folder / "none.jinja")


BROKEN: dict[Breaker, str] = {
    truncated_shard: "model-00002-of-",
    missing_shard: "model-00002-of-",
    nan_weight: "proj.weight' of ",
    pickled_only: "pytorch_model.bin",
    broken_config: "config.json",
    unknown_architecture: "nonesuch",
    missing_model: "did you mean",
    empty_data: "data.jsonl",
    binary_data: "data.jsonl is not UTF-8 text",
    missing_data: "calibration.dataset: there is no ",
    foreign_columns: "frage",
    output_below_a_file: "data.jsonl is not a folder",
    output_is_a_file: "data.jsonl",
    output_where_nothing_can_be: "/proc/quantkit-run",
    foreign_output: "exists and was not written by quantkit",
    unknown_key: "unknown key 'varaints' (did you mean 'variants'?",
    unknown_method: "unknown method 'gtpq' (did you mean 'gptq'?",
    absent_device: "cuda:99",
    missing_template: "none.jinja",
}


@pytest.mark.parametrize("breaker", BROKEN, ids=lambda breaker: breaker.__name__)
def test_a_run_that_cannot_be_is_one_line(sound: Path, tmp_path: Path, breaker: Breaker) -> None:
    folder = tmp_path / "work"
    shutil.copytree(sound, folder)
    data = recipe_data(folder / "model", folder / "data.jsonl", folder / "run", [{"name": "gptq"}])
    breaker(data, folder)
    recipe = write_recipe(folder / "demo.yaml", data)
    done = CliRunner().invoke(app, ["run", str(recipe)])
    assert done.exit_code == 2, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.rstrip().endswith(errors[0])
    assert BROKEN[breaker] in errors[0]
    assert "Traceback" not in done.output
    assert hidden_names(folder) == []
    assert not any((folder / "run" / stage).exists() for stage in ("baseline", "evaluations", "report.json"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "none.yaml"], "cannot read recipe none.yaml: No such file or directory"),
        (["run", "."], "cannot read recipe .: Is a directory"),
        (["plan", "none.yaml"], "cannot read recipe none.yaml"),
        (["quantize", "none", "-o", "out"], "there is no none"),
        (["quantize", ".", "-o", "out", "--bits", "9"], "bits 9 is not a width that quantkit has"),
        (["quantize", ".", "-o", "/proc/quantkit/out"], "cannot write /proc/quantkit/out"),
        (["evaluate", "."], "is not a checkpoint: it has no config.json"),
        (["report", "."], "cannot read report report.json"),
    ],
)
def test_every_command_reports_a_mistake_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert expected in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_the_command_itself_prints_one_line_and_no_traceback(tmp_path: Path) -> None:
    recipe = tmp_path / "demo.yaml"
    recipe.write_text(yaml.safe_dump({"name": "demo", "model": {"source": "x"}, "variants": [{"nam": "a"}]}))
    command = [sys.executable, "-c", "from quantkit.cli import main; main()", "run", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {recipe}:5: unknown key 'variants[0].nam' (did you mean 'name'?")
    assert len(done.stderr.splitlines()) == 1


def test_a_file_size_limit_is_one_line_and_leaves_nothing(sound: Path, tmp_path: Path) -> None:
    """The system itself refuses to write, as it does on a full disk."""
    pytest.importorskip("resource")
    limited = (
        "import resource, sys\nfrom quantkit.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\nmain()\n"
    )
    out = tmp_path / "out"
    arguments = ["quantize", str(sound / "model"), "-o", str(out), "--method", "rtn", "--group-size", "32"]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
