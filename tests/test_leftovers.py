"""What killed runs leave in the folder of a run is gone after the next, and what belongs to others stays."""

from __future__ import annotations

from pathlib import Path

from quantkit.pipeline.cleanup import clear_leftovers
from quantkit.system.locks import held
from tests.runs import hidden_names


def test_what_killed_runs_left_is_removed_but_for_what_is_gone_on_with(tmp_path: Path) -> None:
    variants = tmp_path / "variants"
    for name in (".a.layers", ".b.layers", ".b.partial-x1", ".c.old-x2", ".adapters-x3"):
        (variants / name).mkdir(parents=True)
    (variants / ".c.old-x2" / "folder").mkdir()
    for name in (".run.lock", ".baseline.lock", ".report.json.partial-x4"):
        (tmp_path / name).write_text("")
    (variants / "b").mkdir()
    (variants / "b" / ".README.md.partial-x5").write_text("half")
    (variants / "b" / ".gitattributes").write_text("mine")
    clear_leftovers(tmp_path, [variants / "a"])
    assert hidden_names(tmp_path) == [".a.layers", ".gitattributes", ".run.lock"]
    assert sorted(path.name for path in variants.iterdir() if not path.name.startswith(".")) == ["b", "c"]


def test_what_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    import threading

    begun, over = threading.Event(), threading.Event()

    def other() -> None:
        with held(tmp_path / "v", "somebody's work"):
            (tmp_path / ".v.partial-x").mkdir()
            begun.set()
            over.wait()

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    clear_leftovers(tmp_path, [])
    assert (tmp_path / ".v.partial-x").exists()
    over.set()
    thread.join()
    clear_leftovers(tmp_path, [])
    assert hidden_names(tmp_path) == []
