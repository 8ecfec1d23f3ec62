"""The history: what it keeps, and what becomes of it when something goes wrong."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import QuantkitError
from quantkit.pipeline.recorded import append
from quantkit.recipe import Recipe
from quantkit.run_history import History, Wanted, connection
from quantkit.run_history.record import place, private, stopped_record
from quantkit.run_history.rows import RUN_COLUMNS
from quantkit.run_history.schema import APPLICATION_ID, STEPS, VERSION, statements
from tests.history_records import run, variant
from tests.runs import Notebook

ROOT = Path(__file__).parent.parent


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "reports" / "history.sqlite")


def test_a_run_comes_back_as_it_went_in(history: History) -> None:
    record = run()
    assert history.append(record) == 1
    found = history.run(1)
    assert found == replace(record, id=1)
    light = history.run(1, whole=False)
    assert light.variants[0].layers == ()
    assert light.variants[0].texts["prose"].nll == ()
    assert light.variants[0].texts["prose"].token_ids_sha256 == "aa11"
    assert light.variants[0].figures == record.variants[0].figures


def test_any_sqlite_tool_finds_the_figures(history: History) -> None:
    history.append(run())
    query = """SELECT runs.name, variants.name, figures.value FROM runs
        JOIN variants ON variants.run = runs.id JOIN figures ON figures.variant = variants.id
        WHERE variants.role = 'variant' AND metric = 'kl_divergence' AND text = 'prose' AND figure = 'mean'"""
    with closing(sqlite3.connect(history.file)) as other:
        assert other.execute(query).fetchall() == [("demo", "int4", 0.1)]
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert other.execute("PRAGMA foreign_key_check").fetchall() == []
        assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert [path.name for path in history.file.parent.iterdir()] == ["history.sqlite"]


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        (Wanted(), [1, 2, 3]),
        (Wanted(name="other"), [2]),
        (Wanted(variant="int2"), [3]),
        (Wanted(status="regressed"), [3]),
        (Wanted(status="error"), [2]),
        (Wanted(last=2), [2, 3]),
        (Wanted(since="2026-11-08"), [3]),
        (Wanted(name="demo", last=1), [3]),
        (Wanted(name="nobody"), []),
    ],
)
def test_runs_are_found_by_what_is_asked(history: History, wanted: Wanted, numbers: list[int]) -> None:
    history.append(run())
    history.append(run(name="other", status="error", verdict=None, variants=(), baseline=None))
    history.append(run(started="2026-11-08T06:00:00.000000+00:00", verdict="regressed", variants=(variant("int2"),)))
    assert [found.id for found in history.runs(wanted)] == numbers


def test_each_variant_has_a_reference_of_its_own(history: History) -> None:
    both = run(variants=(variant("int4"), variant("int8")))
    history.append(both)
    history.append(both)
    assert history.accept(1).accepted == ("int4", "int8")
    assert history.accept(2, ["int8"]).accepted == ("int8",)
    assert {name: found.run for name, found in history.references("demo").items()} == {"int4": 1, "int8": 2}
    assert history.run(1).accepted == ("int4",)
    history.accept(1, ["int8"])
    assert {name: found.run for name, found in history.references("demo").items()} == {"int4": 1, "int8": 1}
    assert history.references("other") == {}


def test_what_cannot_be_accepted_is_refused(history: History) -> None:
    with pytest.raises(QuantkitError, match="there is no history"):
        history.accept(1)
    history.append(run())
    for number, names, message in (
        (2, [], "has no run 2.*the newest is 1"),
        (1, ["int3"], "has no variant 'int3'.*did you mean"),
        (1, ["int8"], "variant int8 failed: too wide"),
    ):
        with pytest.raises(QuantkitError, match=message):
            history.accept(number, names)
    assert history.accept(1).accepted == ("int4",)


def test_the_latest_run_is_one_that_finished_and_of_one_recipe(history: History) -> None:
    history.append(run())
    history.append(run(status="error", variants=(), baseline=None))
    assert history.latest() == 1
    history.append(run(name="other"))
    assert (history.latest("demo"), history.latest("other")) == (1, 3)
    with pytest.raises(QuantkitError, match=r"holds runs of demo, other.*--name"):
        history.latest()
    with pytest.raises(QuantkitError, match=r"no finished run of dem .*did you mean 'demo'"):
        history.latest("dem")


def version_1(file: Path, accepted: int = 1) -> None:
    """A history as version 1 wrote it: a flag on the run for the one reference of all variants."""
    file.parent.mkdir(parents=True)
    with closing(sqlite3.connect(file)) as made:
        for statement in statements(STEPS[0]):
            made.execute(statement)
        made.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        made.execute("PRAGMA user_version = 1")
        for number in (1, 2):
            values: dict[str, Any] = dict.fromkeys(RUN_COLUMNS, "x") | {"name": "demo", "recipe": "{}", "cores": 2}
            values |= {"id": number, "accepted": int(number == accepted), "finished": f"2026-10-0{number}"}
            made.execute(
                f"INSERT INTO runs ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", [*values.values()]
            )
            for position, (name, status) in enumerate((("int4", "ok"), ("int8", "failed"))):
                row = (None, number, "variant", position, name, status, None, *["x"] * 6, "float32", 2, None)
                made.execute(f"INSERT INTO variants VALUES ({', '.join('?' * len(row))})", row)
        made.execute("INSERT INTO figures VALUES (1, 'perplexity', 'prose', '', 8.5)")
        made.commit()


def version_of(file: Path) -> int:
    with closing(sqlite3.connect(file)) as opened:
        found: int = opened.execute("PRAGMA user_version").fetchone()[0]
        return found


def test_a_history_of_version_1_is_read_without_changing_it_and_migrated_by_the_next_run(history: History) -> None:
    version_1(history.file)
    before = history.file.read_bytes()
    assert history.references("demo")["int4"] == (1, "2026-10-01")
    assert "int8" not in history.references("demo")
    assert history.run(1).variants[0].figures == {("perplexity", "prose", ""): 8.5}
    assert history.file.read_bytes() == before
    assert history.append(run()) == 3
    assert version_of(history.file) == VERSION
    assert [found.id for found in history.runs()] == [1, 2, 3]
    assert history.references("demo")["int4"] == (1, "2026-10-01")
    assert history.run(3) == replace(run(), id=3)


def test_a_migration_that_fails_leaves_the_file_as_it_was(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    version_1(history.file)
    before = history.file.read_bytes()
    monkeypatch.setattr(connection, "STEPS", (STEPS[0], STEPS[1] + "; INSERT INTO nowhere VALUES (1)"))
    with pytest.raises(QuantkitError, match="no such table: nowhere"):
        history.append(run())
    assert history.file.read_bytes() == before


def test_a_newer_history_is_not_touched(history: History) -> None:
    history.append(run())
    with closing(sqlite3.connect(history.file)) as newer:
        newer.execute(f"PRAGMA user_version = {VERSION + 1}")
    before = history.file.read_bytes()
    for use in (lambda: history.append(run()), lambda: history.runs(), history.check, lambda: history.accept(1)):
        with pytest.raises(QuantkitError, match=rf"has version {VERSION + 1}.*upgrade "):
            use()
    assert history.file.read_bytes() == before


def test_a_file_of_somebody_else_is_not_touched(history: History) -> None:
    history.file.parent.mkdir()
    with closing(sqlite3.connect(history.file)) as foreign:
        foreign.execute("CREATE TABLE runs (id INTEGER)")
        foreign.commit()
    before = history.file.read_bytes()
    with pytest.raises(QuantkitError, match="is not a history of quantkit"):
        history.append(run())
    history.file.write_text(
        "notes, not a data base, and longer than a header of SQLite would be, at one hundred bytes.\n" * 9
    )
    with pytest.raises(QuantkitError, match="is not an SQLite file"):
        history.append(run())
    assert before != history.file.read_bytes()


def test_a_damaged_file_is_told_and_not_written(history: History) -> None:
    for _ in range(5):
        history.append(run())
    content = bytearray(history.file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    history.file.write_bytes(content)
    with pytest.raises(QuantkitError, match=r"history .*: it is damaged.*recover"):
        history.append(run())
    assert history.file.read_bytes() == content


@pytest.mark.parametrize("place", ["folder", "below a file"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    if place == "folder":
        file = tmp_path / "history.sqlite"
        file.mkdir()
    else:
        (tmp_path / "file").write_text("")
        file = tmp_path / "file" / "history.sqlite"
    with pytest.raises(QuantkitError) as caught:
        History(file).append(run())
    assert "\n" not in str(caught.value)
    assert "history.sqlite" in str(caught.value)
    assert caught.value.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_history_can_be_read(history: History) -> None:
    history.append(run())
    history.file.chmod(0o444)
    assert len(history.runs()) == 1
    with pytest.raises(QuantkitError, match="it is read-only"):
        history.append(run())


def test_a_reader_that_may_not_write_reads_all_the_same(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    version_1(history.file)
    monkeypatch.setattr(connection, "_writable", lambda file: False)
    assert [found.id for found in history.runs()] == [1, 2]


WRITER = """
import sys
from pathlib import Path
from quantkit.run_history import History
from tests.history_records import run
history = History(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    history.append(run(folder=sys.argv[3]))
"""


def writer(file: Path, runs: int, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(file), str(runs), name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_writers_at_once_lose_nothing(history: History) -> None:
    both = [writer(history.file, 15, name) for name in ("first", "second")]
    for each in both:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in both:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    for each in both:
        each.communicate()
        assert each.returncode == 0
    found = history.runs()
    assert [record.id for record in found] == list(range(1, 31))
    assert sorted(record.folder for record in found) == ["first"] * 15 + ["second"] * 15


LIMITED = """
import resource, sys
from pathlib import Path
from quantkit.errors import QuantkitError
from quantkit.run_history import History
from tests.history_records import run
history = History(Path(sys.argv[1]))
size = history.file.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    for _ in range(100):
        history.append(run())
except QuantkitError as error:
    print(error)
"""


def test_a_full_disk_loses_no_run_that_is_there(history: History) -> None:
    for _ in range(3):
        history.append(run())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(history.file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") == 1
    assert "full" in done.stdout
    assert [found for found in history.runs() if found.verdict != "passed"] == []
    count = len(history.runs())
    assert count >= 3
    assert history.append(run()) == count + 1


def recipe(folder: Path, **history: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "demo",
            "model": {"source": str(folder / "model")},
            "variants": [{"name": "a"}],
            "report": {"folder": str(folder / "reports" / "demo")},
            "history": history,
        }
    )


def test_a_history_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "history.sqlite").mkdir()
    notebook = Notebook()
    asked = recipe(tmp_path, file=str(tmp_path / "history.sqlite"))
    assert append(asked, run(), notebook) is None
    (note,) = notebook.notes
    assert note.startswith("warning: this run is not in the history: history ")
    assert append(recipe(tmp_path, enabled=False), run(), notebook) is None
    assert len(notebook.notes) == 1
    assert append(recipe(tmp_path), run(), notebook) == 1
    assert (tmp_path / "reports" / "history.sqlite").is_file()


def test_records_hold_no_folders_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert place(tmp_path / "work" / "models" / "a") == "models/a"
    assert place(tmp_path / "home" / "models" / "a") == "~/models/a"
    assert place("/srv/secret-project/models/a") == ".../a"
    assert place("org/name") == "org/name"
    assert private({"a": ["/srv/secret-project/b.jsonl", 3]}) == {"a": [".../b.jsonl", 3]}
    error = QuantkitError(f"{tmp_path}/work/models/a has no config.json")
    record = stopped_record(recipe(tmp_path / "work"), error, "run", "2026-11-01")
    assert record.error == "models/a has no config.json"
    assert str(tmp_path) not in repr(record)
    assert stopped_record(recipe(tmp_path), KeyboardInterrupt(), "run", "2026-11-01").status == "interrupted"
