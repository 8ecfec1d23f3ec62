from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import NoReturn

import pytest

from quantkit.errors import OutputError
from quantkit.system import artifacts
from quantkit.system.artifacts import (
    STAGE_FILE,
    check_writable,
    file_sha256,
    fingerprint,
    new_folder,
    read_json,
    read_stage,
    translated_os_errors,
    write_json,
    write_stage,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def finished(place: Path, content: str) -> Path:
    with new_folder(place) as folder:
        (folder / "data").write_text(content)
        write_stage(folder, "demo", {"content": content})
    return place


def test_a_fingerprint_depends_on_content_and_not_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_file_is_written_whole_and_readable_by_all(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "er" / "x.json", {"käse": [1, None]})
    assert read_json(tmp_path / "deep" / "er" / "x.json") == {"käse": [1, None]}
    assert names(tmp_path / "deep" / "er") == ["x.json"]
    assert stat.S_IMODE((tmp_path / "deep" / "er" / "x.json").stat().st_mode) == 0o644


def test_a_file_that_cannot_be_replaced_stays_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "x", "old")

    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write .*x: No space left on device \(free some disk space"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "place") as folder:
        (folder / "data").write_text("x")
        assert not (tmp_path / "deep" / "place").exists()
    assert names(tmp_path / "deep") == ["place"]
    assert stat.S_IMODE((tmp_path / "deep" / "place").stat().st_mode) == 0o755


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    place = finished(tmp_path / "place", "old")
    with pytest.raises(failure), new_folder(place) as folder:  # noqa: PT012 - the block is what is interrupted
        (folder / "data").write_text("half")
        raise failure
    assert (place / "data").read_text() == "old"
    assert names(tmp_path) == ["place"]


def test_a_new_folder_replaces_the_old_one_and_all_of_it(tmp_path: Path) -> None:
    place = finished(tmp_path / "place", "old")
    (place / "more").write_text("x")
    finished(place, "new")
    assert names(place) == ["data", STAGE_FILE]
    assert (place / "data").read_text() == "new"
    assert names(tmp_path) == ["place"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = finished(tmp_path / "place", "old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError, match=r"cannot write .*place"):
        finished(place, "new")
    assert (place / "data").read_text() == "old"
    assert names(tmp_path) == ["place"]


def test_a_full_disk_while_a_folder_is_made_is_one_line_and_keeps_the_old_folder(tmp_path: Path) -> None:
    place = finished(tmp_path / "place", "old")
    refused = pytest.raises(OutputError, match=r"cannot write .*place: No space left.*what is finished is kept")
    with refused, new_folder(place):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (place / "data").read_text() == "old"
    assert names(tmp_path) == ["place"]


def test_an_os_error_that_is_no_refusal_to_write_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), translated_os_errors(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="exists and was not written by quantkit"):
        check_writable(tmp_path / "mine")
    with pytest.raises(OutputError, match="exists and was not written by quantkit"):
        finished(tmp_path / "mine", "new")
    assert names(tmp_path / "mine") == ["thesis.tex"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (finished(tmp_path / "empty", "x") / "data").exists()


def test_a_place_that_is_a_file_or_lies_below_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file exists and is not a folder"):
        check_writable(tmp_path / "file")
    with pytest.raises(OutputError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "below" / "it")
    with pytest.raises(OutputError, match="name another output folder"):
        write_text(tmp_path / "file" / "x.json", "x")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no folders")
def test_a_file_system_that_takes_no_folders_is_refused() -> None:
    with pytest.raises(OutputError, match=r"cannot write /proc/quantkit/x: .*name another output folder"):
        check_writable(Path("/proc/quantkit/x"))


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the path is too long"):
        check_writable(tmp_path / ("x" * 300))


def test_checking_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    monkeypatch.chdir(tmp_path)
    check_writable(Path("relative"))
    assert names(tmp_path) == []


def test_a_stage_is_found_by_what_it_was_made_from(tmp_path: Path) -> None:
    mark = write_stage(tmp_path, "demo", {"a": 1}, facts={"seconds": 2})
    found = read_stage(tmp_path, "demo", {"a": 1})
    assert found is not None
    assert (found["fingerprint"], found["facts"]) == (mark, {"seconds": 2})
    assert read_stage(tmp_path, "demo", {"a": 2}) is None
    assert read_stage(tmp_path, "other", {"a": 1}) is None
    assert read_stage(tmp_path / "none", "demo", {"a": 1}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"fingerprint": 1}', "\xff"])
def test_a_damaged_stage_file_is_no_finished_stage(tmp_path: Path, text: str) -> None:
    (tmp_path / STAGE_FILE).write_text(text, encoding="latin-1")
    assert read_stage(tmp_path, "demo", {"a": 1}) is None


def test_remedies_name_what_to_do() -> None:
    assert all(remedy and remedy[0].islower() for remedy in artifacts.REMEDIES.values())
