"""Pushing to the hub, against a stand-in on loopback that speaks the routes of ``huggingface_hub``."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

import quantkit
from quantkit.errors import CheckpointError, OutputError
from quantkit.publishing import push, write_card
from quantkit.system.artifacts import read_json, write_json
from tests.loopback import Answer, Request, serving
from tests.tiny import make_model

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload
TOKEN = "hf_" + "s" * 34
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A stand-in for the hub: what it was asked, and the files that it was given."""

    def __init__(self) -> None:
        self.refuse: dict[str, tuple[int, str]] = {}
        self.tokens: set[str | None] = set()
        self.created: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        self.address = ""

    def answer(self, path: str, body: bytes) -> tuple[int, str, Any]:
        """Status, error code and JSON for a request; ``refuse`` maps a part of a path to an error."""
        for part, (status, code) in self.refuse.items():
            if part in path:
                return status, code, {"error": f"no: Bearer {TOKEN}", "url": f"{self.address}/org/tiny"}
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, "", {}
        if "/commit/" in path:
            return 200, "", self.commit(path, [json.loads(line) for line in body.splitlines()])
        asked = json.loads(body or b"{}")
        if path == "/api/repos/create":
            self.created.append(asked)
            return 200, "", {"url": f"{self.address}/{asked['organization']}/{asked['name']}"}
        if "/branch/" in path:
            self.branches.append(path.rpartition("/")[2])
            return 200, "", {}
        if path == "/api/validate-yaml":
            return 200, "", {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = [self.mode(file["path"]) for file in asked["files"]]
            return 200, "", {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, "", {"transfer": "basic", "objects": [self.upload(each) for each in asked["objects"]]}
        return 404, "RepoNotFound", {}

    def mode(self, name: str) -> dict[str, Any]:
        kind = "lfs" if name.endswith(".safetensors") else "regular"
        return {"path": name, "uploadMode": kind, "shouldIgnore": False}

    def upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.address}/blob/{wanted['oid']}", "header": {}}}}

    def commit(self, path: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        files = {}
        for line in lines[1:]:
            value = line["value"]
            content = self.blobs[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            files[value["path"]] = content
        self.commits.append({"path": path, "summary": lines[0]["value"]["summary"], "files": files})
        return {"commitUrl": f"{self.address}/org/tiny/commit/{COMMIT}", "commitOid": COMMIT, "success": True}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    stand_in = Hub()

    def answer(request: Request) -> Answer:
        stand_in.tokens.add(request.headers.get("Authorization"))
        status, code, found = stand_in.answer(request.path.partition("?")[0], request.body)
        headers = {"Content-Type": "application/json", "X-Error-Code": code, "ETag": '"x"'}
        return status, {key: value for key, value in headers.items() if value}, json.dumps(found).encode()

    with serving(answer) as stand_in.address:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a store that the stand-in has not
        yield stand_in


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    out = quantkit.quantize(make_model(folder / "source"), out=folder / "tiny", method="rtn", bits=4, group_size=32)
    write_card(out)
    return out


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "tiny")


def test_the_files_of_the_manifest_arrive_in_one_commit(checkpoint: Path, hub: Hub) -> None:
    (checkpoint / "notes.txt").write_text("private")
    assert push(checkpoint, "org/tiny") == f"{hub.address}/org/tiny/commit/{COMMIT}"
    (commit,) = hub.commits
    listed = set(read_json(checkpoint / "manifest.json")["files"])
    assert set(commit["files"]) == listed | {"manifest.json", "README.md"}
    assert "stage.json" not in commit["files"]
    for name, content in commit["files"].items():
        assert content == (checkpoint / name).read_bytes()
    assert commit["path"] == "/api/models/org/tiny/commit/main"
    assert hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest() in hub.blobs


@pytest.mark.parametrize(("private", "visibility"), [(True, "private"), (False, "public")])
def test_a_new_repository_is_private_unless_said_otherwise(
    private: bool, visibility: str, checkpoint: Path, hub: Hub
) -> None:
    push(checkpoint, "org/tiny", private=private)
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("org", "tiny")
    assert created.get("visibility", "private" if created.get("private") else "public") == visibility


def test_a_branch_and_a_message_can_be_given(checkpoint: Path, hub: Hub) -> None:
    push(checkpoint, "org/tiny", revision="v2", message="Second try")
    assert hub.branches == ["v2"]
    assert hub.commits[0]["path"].endswith("/commit/v2")
    assert hub.commits[0]["summary"] == "Second try"


def test_an_existing_repository_is_used(checkpoint: Path, hub: Hub) -> None:
    hub.refuse = {"/api/repos/create": (409, "")}
    push(checkpoint, "org/tiny")
    assert len(hub.commits) == 1


def test_the_token_goes_to_the_hub_and_nowhere_else(
    checkpoint: Path, hub: Hub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        push(checkpoint, "org/tiny", token="hf_" + "t" * 34)
        hub.refuse = {"/preupload/": (403, "")}
        with pytest.raises(OutputError) as caught:
            push(checkpoint, "org/tiny")
    assert "Bearer hf_" + "t" * 34 in hub.tokens
    shown = caplog.text + "".join(capfd.readouterr()) + str(caught.value)
    assert "hf_ttt" not in shown
    assert "hf_sss" not in shown


# --- refusals of the hub


@pytest.mark.parametrize(
    ("where", "refusal", "message"),
    [
        ("/api/repos/create", (401, ""), "does not accept the token.*HF_TOKEN"),
        ("/api/repos/create", (403, ""), "may not write to org/tiny.*write permission"),
        ("/preupload/", (403, ""), "may not write to org/tiny"),
        ("/preupload/", (404, "RepoNotFound"), "no org/tiny that this token may write to"),
        ("/preupload/", (401, "RepoNotFound"), "does not accept the token"),
        ("/blob/", (403, ""), "may not write to org/tiny"),
        ("/commit/", (404, "RevisionNotFound"), "no org/tiny"),
        ("/commit/", (418, ""), "refused the upload to org/tiny: status 418"),
        ("/api/validate-yaml", (400, ""), "refused the upload to org/tiny|uploading to org/tiny failed"),
    ],
)
def test_refusals_are_one_line_with_a_remedy(
    where: str, refusal: tuple[int, str], message: str, checkpoint: Path, hub: Hub
) -> None:
    hub.refuse = {where: refusal}
    with pytest.raises(OutputError, match=message) as caught:
        push(checkpoint, "org/tiny")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    assert not hub.commits


def test_no_token_is_one_line_before_anything_is_sent(
    checkpoint: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OutputError, match=r"needs a token.*HF_TOKEN.*hf auth login"):
        push(checkpoint, "org/tiny")
    assert not hub.tokens


def test_a_hub_that_cannot_be_reached_is_one_line(checkpoint: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OutputError, match=r"cannot be reached to push org/tiny.*network"):
        push(checkpoint, "org/tiny")


def test_offline_mode_is_one_line(checkpoint: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE"):
        push(checkpoint, "org/tiny")
    assert not hub.commits


@pytest.mark.parametrize("name", ["a/b/c", "org/", "-x/y", "org/ti ny"])
def test_a_name_of_no_repository_is_one_line(name: str, checkpoint: Path, hub: Hub) -> None:
    with pytest.raises(OutputError, match=r"is not the name of a repository.*org/name"):
        push(checkpoint, name)
    assert not hub.created


# --- folders that are not to be pushed


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _longer(name: str) -> Callable[[Path], None]:
    return lambda folder: _append(folder / name)


def _append(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")


def _lists(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        manifest = read_json(folder / "manifest.json")
        (folder.parent / "secret").write_text("s")
        write_json(folder / "manifest.json", manifest | {"files": manifest["files"] | {name: {"bytes": 1}}})

    return spoil


def _links_out(folder: Path) -> None:
    (folder.parent / "secret").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder.parent / "secret")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("manifest.json"), "has no manifest of quantkit"),
        (_without("model.safetensors"), r"not whole: model\.safetensors is missing"),
        (_longer("config.json"), r"not whole: config\.json is missing or of another size"),
        (_lists("../secret"), "outside the checkpoint"),
        (_lists("/etc/passwd"), "outside the checkpoint"),
        (_lists("a\\b"), "outside the checkpoint"),
        (_links_out, r"'config\.json', which lies outside"),
        (lambda folder: _edit(folder, files={}), "lists no files"),
    ],
)
def test_a_folder_that_is_no_whole_export_is_refused(
    spoil: Callable[[Path], None], message: str, checkpoint: Path, hub: Hub
) -> None:
    spoil(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        push(checkpoint, "org/tiny")
    assert not hub.created


def _edit(folder: Path, **changes: Any) -> None:
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | changes)
