"""Data sets of the hub: the real library against a stand-in on loopback, whose files are compared with its hashes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from quantkit import records
from quantkit.calibration import build
from quantkit.errors import CalibrationError
from quantkit.recipe import CalibrationSpec
from tests.loopback import Answer, Request, serving
from tests.tiny import make_model

COMMIT = "c" * 40
DATA = "data/train.jsonl"
API, RESOLVE = "/api/datasets/org/name", "/datasets/org/name/resolve/"
ROWS = b"".join(b'{"text": "Text %d."}\n' % number for number in range(6))
TEXTS = [f"Text {number}." for number in range(6)]


class Hub:
    """One data set, ``org/name``, whose data lies in Git LFS."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files = {"README.md": b"# A data set\n", DATA: ROWS}
        self.served = dict(self.files)
        self.downloads = 0

    def hash(self, name: str) -> str:
        data = self.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return hashlib.sha256(data).hexdigest() if name == DATA else git

    def entry(self, name: str) -> dict[str, Any]:
        lfs = {"oid": self.hash(name), "size": len(self.files[name]), "pointerSize": 100}
        told = {"type": "file", "path": name, "size": len(self.files[name]), "oid": "0" * 40}
        return told | ({"lfs": lfs} if name == DATA else {})

    def answer(self, request: Request) -> Answer:
        path, _, _ = request.path.partition("?")
        if path.startswith(f"{API}/tree/{COMMIT}"):
            under = path.removeprefix(f"{API}/tree/{COMMIT}").strip("/")
            folder = [] if under else [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]
            here = [self.entry(name) for name in self.files if name.rpartition("/")[0] == under]
            return 200, {}, json.dumps(folder + here).encode()
        if path in (API, f"{API}/revision/{COMMIT}", f"{API}/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            facts = {"id": "org/name", "sha": COMMIT, "siblings": siblings, "private": False}
            return 200, {}, json.dumps(facts).encode()
        name = path.removeprefix(RESOLVE).partition("/")[2]
        if path.startswith(RESOLVE) and name in self.files:
            self.downloads += request.method == "GET" and name == DATA
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{self.hash(name)}"'}, self.served[name]
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    def cached(self) -> Path:
        """The file of the hub's cache that holds the data."""
        return self.cache / "hub" / "datasets--org--name" / "blobs" / self.hash(DATA)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    stand_in = Hub(tmp_path)

    with serving(stand_in.answer) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
        yield stand_in


def read() -> records.RecordSet:
    return records.load("hub:org/name")


def texts(found: records.RecordSet) -> list[str | None]:
    return [record.text for record in found.records]


def test_a_data_set_comes_at_its_commit_and_is_compared(hub: Hub) -> None:
    found = read()
    assert texts(found) == TEXTS
    assert found.origin == {"kind": "hub", "dataset": "org/name", "split": "train", "revision": COMMIT}
    assert found.unchecked == ()
    assert texts(read()) == TEXTS
    assert hub.downloads == 1


def test_a_file_that_is_not_what_the_hub_states_is_refused_and_nothing_of_it_kept(hub: Hub) -> None:
    hub.served[DATA] = ROWS.replace(b"Text 3", b"Poison")
    for _ in range(2):
        with pytest.raises(CalibrationError, match=r"data/train\.jsonl of org/name is not the file that") as told:
            read()
    hub.served[DATA] = ROWS
    assert str(hub.cached()) in told.value.remedy
    hub.cached().unlink()
    assert texts(read()) == TEXTS
    assert read().unchecked == ()


def test_a_cached_file_that_changed_since_is_refused(hub: Hub) -> None:
    read()
    hub.cached().write_bytes(ROWS.replace(b"Text 3", b"Poison"))
    with pytest.raises(CalibrationError, match="is not the file that the hub states"):
        read()


def test_what_cannot_be_compared_is_said(hub: Hub) -> None:
    read()
    shutil.rmtree(hub.cache / "hub")
    found = read()
    assert texts(found) == TEXTS
    assert found.unchecked == (DATA,)
    model = make_model(hub.cache / "model")
    spec = CalibrationSpec.model_validate({"dataset": "hub:org/name", "samples": 2, "max_length": 8})
    warnings = build(spec, model, hub.cache / "calibration").audit["warnings"]
    assert any(DATA in warning and "not compared with the hub" in warning for warning in warnings)
