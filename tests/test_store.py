"""Runs whose workers share nothing but object storage, which stands in memory here."""

from __future__ import annotations

import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

import quantkit
from quantkit import pipeline
from quantkit.cli import app
from quantkit.errors import OutputError, QuantkitError
from quantkit.evaluation import stage as scores
from quantkit.pipeline import store_task
from quantkit.pipeline.cluster import joined_through
from quantkit.pipeline.moved_paths import packed, unpacked
from quantkit.pipeline.several import run_several
from quantkit.pipeline.store import Store
from quantkit.pipeline.store_task import StoredWork
from quantkit.pipeline.store_units import LISTINGS, OWNERS, STATES, Units, related, units_in
from quantkit.pipeline.store_workers import ThroughStore
from quantkit.pipeline.workers import Task, Work
from quantkit.quantization import Job, Wanted, quantize_together
from quantkit.recipe import EvaluationSpec, Recipe, VariantSpec
from quantkit.system.artifacts import STAGE_FILE
from quantkit.system.progress import Observer, Silent
from quantkit.system.validation import parse_section
from tests.runs import Notebook, make_recipe, recipe_data, score_here, write_recipe
from tests.test_cluster import Threads, tensors
from tests.tiny import make_model, tiny_rows

VARIANTS: list[dict[str, Any]] = [
    {"name": "gptq", "method": "gptq"},
]
URL = "memory://bucket/of/runs"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty one; nodes have their scratch in a folder of the test."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield Store(URL)
    MemoryFileSystem.store.clear()


class Elsewhere(Threads):
    """Does what came through pickle, and hands back what went through it as well."""

    def __init__(self, before: Callable[[StoredWork], None] = lambda work: None) -> None:
        super().__init__()
        self._before = before

    def do(self, task: Task, work: Work[Any], observer: Observer) -> Any:
        assert isinstance(work, StoredWork)
        assert (task.reads, task.outputs) == ((), ())
        self._before(work)
        return pickle.loads(pickle.dumps(super().do(task, work, observer)))


def at_work(node: Path) -> list[Path]:
    """Folders of tasks that a node still has."""
    return list(node.glob("*/task-*"))


def test_a_run_through_a_store_has_the_same_report_and_goes_on_elsewhere(
    model: Path, records: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    monkeypatch.chdir(tmp_path)
    here = pipeline.run(make_recipe(model, records, tmp_path / "here", VARIANTS), Silent())
    seen: list[StoredWork] = []
    recipe = make_recipe(model, records, Path("runs/there"), VARIANTS)
    there = pipeline.run(recipe, Silent(), workers=ThroughStore(Elsewhere(seen.append), store))
    kept = ("name", "status", "metrics", "texts", "bits_per_weight", "size_bytes")
    assert [{key: row[key] for key in kept} for row in there["variants"]] == [
        {key: row[key] for key in kept} for row in here["variants"]
    ]
    assert tensors(Path("runs/there")) == tensors(tmp_path / "here")
    assert there["variants"][0]["checkpoint"] == "runs/there/variants/gptq"
    assert not any(str(tmp_path).encode() in each.content for each in seen if each.title.startswith("quantize: gptq"))
    assert not at_work(tmp_path / "node")
    for file in ("report.json", "report.html", "variants/gptq/model.safetensors", "variants/gptq/README.md"):
        assert store.read(f"there/{file}") == Path("runs/there", file).read_bytes()
    assert store.names(STATES) == []
    seen.clear()
    before = Path("runs/there/variants/gptq/stage.json").read_bytes()
    shutil.rmtree("runs")
    notes = Notebook()
    again = pipeline.run(recipe, notes, workers=ThroughStore(Elsewhere(seen.append), store))
    assert [row["metrics"] for row in again["variants"]] == [row["metrics"] for row in there["variants"]]
    assert Path("runs/there/variants/gptq/stage.json").read_bytes() == before
    assert any("gptq: reused the finished evaluation" in note for note in notes.notes)
    assert any("gptq: reused the finished checkpoint" in note for note in notes.notes)


def read_there(spec: EvaluationSpec, observer: Observer) -> tuple[str, str]:
    """Where the work is done, and what lies there."""
    (text,) = spec.texts
    return str(Path.cwd()), Path(str(text.file)).read_text()


def test_files_that_recipes_name_by_relative_paths_go_along(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/own.txt").write_text("the tide")
    spec = EvaluationSpec.model_validate({"texts": [{"name": "own", "file": "data/own.txt"}]})
    found = ThroughStore(Elsewhere(), store).do(Task("score"), partial(read_there, spec), Silent())
    assert found[1] == "the tide"
    assert Path(found[0]).is_relative_to(tmp_path / "node")
    assert Path.cwd() == tmp_path


# A node that dies


class Died(BaseException):
    """A machine that is gone, with all it would have said."""


class Dying(Silent):
    """Ends in the third block, once the first two are saved."""

    def progress(self, step: str, done: int, total: int) -> None:
        if step.endswith("block") and done == 3:
            until = time.monotonic() + 30
            while len(self.saved()) < 2 and time.monotonic() < until:
                time.sleep(0.01)
            raise Died

    def saved(self) -> list[str]:
        listing = Units(Store(URL)).listing("run/variants/.gptq.layers") or {}
        return [path for path in listing if path.endswith("segment.json")]


def walk(job: Job, wanted: Wanted, observer: Observer) -> Any:
    (done,) = quantize_together(job, [wanted], on_segment=partial(observer.progress, "block"), on_note=observer.note)
    return done


def test_a_node_that_dies_costs_a_block(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=4)
    spec = parse_section(VariantSpec, {"name": "gptq", "method": "gptq", "group_size": 32}, "test")
    job = Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, device="cpu")
    wanted = Wanted(spec, tmp_path / "run" / "variants" / "gptq")
    workers = ThroughStore(Elsewhere(), store)
    task = Task("quantize: gptq", "cpu", reads=(model / "config.json",), outputs=(wanted.out,))
    with workers.share(tmp_path / "run"):
        with monkeypatch.context() as silent:
            silent.setattr(store_task._Task, "save", lambda _: None)  # no last words
            with pytest.raises(Died):
                workers.do(task, partial(walk, job, wanted), Dying())
        assert store.names("run/variants") == []
        assert store.names(f"{LISTINGS}/run/variants") == [f"{LISTINGS}/run/variants/.gptq.layers.json"]
        assert store.names(STATES) != []
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
        done = workers.do(task, partial(walk, job, wanted), Silent())
        assert done.folder == wanted.out
        assert done.facts["resumed"] >= 2
        assert store.names(STATES) == []
    alone = walk(job, Wanted(spec, tmp_path / "alone"), Silent())
    written = (wanted.out / "model.safetensors").read_bytes()
    assert (alone.folder / "model.safetensors").read_bytes() == written
    assert store.read("run/variants/gptq/model.safetensors") == written


def written_late(file: Path, owner: str, observer: Observer) -> None:
    """Work during which somebody else begins the same."""
    file.parent.mkdir(parents=True)
    file.write_text("late")
    store = Store(URL)
    for name in store.names(OWNERS):
        if name.endswith("/run") == (owner == "run"):
            store.write(name, b"host 17 of another")


@pytest.mark.parametrize("owner", ["task", "run"])
def test_who_is_given_up_writes_nothing(tmp_path: Path, store: Store, owner: str) -> None:
    workers = ThroughStore(Elsewhere(), store)
    work = partial(written_late, tmp_path / "run/variants/a/file", owner)
    with pytest.raises(OutputError, match="walk was begun again elsewhere"), workers.share(tmp_path / "run"):
        workers.do(Task("walk"), work, Silent())
    assert store.names("run") == []


def test_a_run_that_another_process_has_begun_ends(tmp_path: Path, store: Store) -> None:
    first, second = (ThroughStore(Elsewhere(), store) for _ in range(2))
    work = partial(written_late, tmp_path / "run/a/file", "none")
    taken, alike = r"bucket/of/runs/run was taken over by process \d+ on ", "two runs would have the folder run"
    with pytest.raises(OutputError, match=taken), first.share(tmp_path / "run"), second.share(tmp_path / "other/run"):
        first.do(Task("walk"), work, Silent())
    with first.share(tmp_path / "run"), pytest.raises(OutputError, match=alike), first.share(tmp_path / "other/run"):
        pass


def test_the_page_of_several_runs_lies_beside_them_and_a_run_that_cannot_be_leaves_the_others(
    model: Path, tmp_path: Path, store: Store
) -> None:
    plain = {"model": {"source": str(model)}, "variants": [{"name": "rtn", "method": "rtn", "group_size": 5}]}
    names = {"a": "reports/same", "b": "others/same"}
    recipes = [
        Recipe.of({**plain, "name": each, "report": {"folder": str(tmp_path / to)}}) for each, to in names.items()
    ]
    taken = ThroughStore(Elsewhere(), store)
    with taken.share(tmp_path / "same"):
        found = run_several(recipes, Silent(), page=tmp_path / "runs.html", workers=taken)
    assert {each["error"] for each in found["runs"]} == {
        f"two runs would have the folder same of {URL} (name one otherwise)"
    }
    assert store.read("runs.html") == (tmp_path / "runs.html").read_bytes()
    assert store.read("runs.json") == (tmp_path / "runs.json").read_bytes()


# Units


def unit_of(folder: Path, **files: str) -> Path:
    """A folder of a finished stage."""
    for name, text in {STAGE_FILE.partition(".")[0]: "{}", **files}.items():
        file = folder / (STAGE_FILE if name == "stage" else f"{name}.txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_unit_is_there_whole_or_not_at_all(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    units, place = Units(store), unit_of(tmp_path / "a", one="1", two="2")
    assert not Units(store).pull("run/a", tmp_path / "b")
    assert units.push("run/a", place)
    assert not units.push("run/a", place)
    assert not Units(store).push("run/a", place)
    assert Units(store).pull("run/a", tmp_path / "b")
    assert {file.name: file.read_text() for file in (tmp_path / "b").iterdir()} == {
        STAGE_FILE: "{}",
        "one.txt": "1",
        "two.txt": "2",
    }
    (place / "one.txt").unlink()
    (place / "two.txt").write_text("two")
    put = store.put

    def failing(file: Path, name: str) -> None:
        put(file, name)
        raise OSError("the cable is out")

    with monkeypatch.context() as broken:
        broken.setattr(store, "put", failing)
        with pytest.raises(OSError, match="cable"):
            Units(store).push("run/a", place)
    assert not Units(store).pull("run/a", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert Units(store).push("run/a", place)
    assert Units(store).pull("run/a", tmp_path / "b")
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == [STAGE_FILE, "two.txt"]
    assert store.names("run/a") == [f"run/a/{STAGE_FILE}", "run/a/two.txt"]
    store.write("run/a/two.txt", b"TWO")
    with pytest.raises(OutputError, match=r"run/a/two.txt is not what was written there"):
        Units(store).pull("run/a", tmp_path / "d")
    assert [each.name for each in tmp_path.iterdir() if "partial" in each.name] == []


def test_a_state_is_the_old_one_or_the_new_one(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / ".a.training"
    state.mkdir()
    (state / "step").write_text("1")
    Units(store).push("run/.a.training", state)
    (state / "step").write_text("2")
    with monkeypatch.context() as broken:
        broken.setattr(store, "write", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            Units(store).push("run/.a.training", state)
    assert Units(store).pull("run/.a.training", tmp_path / "found")
    assert (tmp_path / "found/step").read_text() == "1"
    Units(store).push("run/.a.training", state)
    assert len(store.names(STATES)) == 1
    Units(store).remove("run/.a.training")
    assert store.names("") == []


def test_what_lies_in_the_folder_of_a_run(tmp_path: Path) -> None:
    unit_of(tmp_path / "variants/a", one="1")
    for name in ("report.json", "logs/a.log", ".run.lock", "variants/.b.layers/x/y", "variants/.b.partial-1/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [each.relative_to(tmp_path).as_posix() for each in units_in(tmp_path)]
    assert found == ["logs/a.log", "report.json", "variants/.b.layers", "variants/a"]
    assert list(units_in(tmp_path, tmp_path / "variants/a/one.txt")) == [tmp_path / "variants/a"]
    assert list(units_in(tmp_path, tmp_path / "nowhere/at/all")) == []


@pytest.mark.parametrize(
    ("unit", "path", "is_related"),
    [
        ("run/a", "run/a", True),
        ("run/a", "run/a/logprobs", True),
        ("run/a", "run", True),
        ("run/ab", "run/a", False),
        ("run/.a.layers", "run/a", True),
        ("run/.a.part.layers", "run/a", False),
        ("run/costs/.a.part.json", "run/costs/a", True),
    ],
)
def test_which_units_a_path_names(unit: str, path: str, is_related: bool) -> None:
    assert related(unit, path) is is_related


# Values that travel


def test_paths_in_a_value_lead_from_folders_of_the_other_machine(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    value = {"in": [Path("run/variants/a"), tmp_path / "run"], "out": Path("/usr/lib"), "text": "run/variants/a"}
    sent = packed(value, {"run": Path("run")})
    assert sent.paths == {("run", "variants/a"), ("run", ".")}
    there = unpacked(sent.content, {"run": Path("/node/run")})
    assert there == {**value, "in": [Path("/node/run/variants/a"), Path("/node/run")]}
    spec = EvaluationSpec.model_validate({"texts": ["prose", {"name": "own", "file": "data/own.txt"}]})
    assert packed([spec], {}).files == {"data/own.txt"}


# Stores that refuse


def test_a_store_that_refuses_is_one_line_without_secrets(
    model: Path, records: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied for hush-hush-hush\nat line 1")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    recipe = make_recipe(model, records, tmp_path / "run", VARIANTS)
    with pytest.raises(OutputError) as told:
        pipeline.run(recipe, Silent(), workers=ThroughStore(Elsewhere(), store))
    said = str(told.value)
    assert said.startswith(f"cannot write {URL}/.quantkit/owners/run/run: PermissionError: Access Denied")
    assert "hush" not in said
    assert "the same command goes on" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("bucket/folder", "bucket/folder is no address of object storage"),
        ("s3://me:hush@bucket/folder", r"^the address s3://bucket/... holds more than a place"),
        ("s3://bucket/folder?token=hush", r"^the address s3://bucket/... holds more than a place"),
        ("nowhere://bucket", "nowhere://bucket cannot be used: Protocol not known: nowhere"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str, told: str) -> None:
    with pytest.raises(QuantkitError, match=told) as error:
        Store(url)
    assert "hush" not in str(error.value)


def test_the_package_of_a_provider_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(QuantkitError, match=r"gs:// needs a package .* \(pip install gcsfs, here and on all nodes"):
        Store("gs://bucket")


def test_a_store_without_a_cluster_is_refused() -> None:
    with pytest.raises(QuantkitError, match="add --cluster ADDRESS"), joined_through(None, URL):
        pass


def test_the_command_line_and_the_api_know_stores(model: Path, records: Path, tmp_path: Path) -> None:
    written = str(write_recipe(tmp_path / "demo.yaml", recipe_data(model, records, tmp_path / "run", VARIANTS)))
    for command, told in (([], "add --cluster ADDRESS"), (["--cluster", "auto"], "is no address of object storage")):
        result = CliRunner().invoke(app, ["run", written, "--store", "bucket", *command])
        assert result.exit_code == 2
        assert told in result.stderr
    with pytest.raises(QuantkitError, match="add --cluster ADDRESS"):
        quantkit.run_all([written], store="bucket")
