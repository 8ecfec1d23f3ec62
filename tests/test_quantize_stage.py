from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from quantkit.checkpoint import CheckpointReader, writer
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError, OutputError, QuantizationError, QuantkitError, SchemeError
from quantkit.exports.manifest import MANIFEST, is_whole, write_manifest
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.publishing import describe
from quantkit.quantization import Job, finished_variant, made_from, plan_layers, quantize
from quantkit.quantization import job as jobs
from quantkit.quantization.memory_use import choose_strategy, paused_bytes
from quantkit.recipe import VariantSpec
from quantkit.schemes import IntScheme
from quantkit.system.artifacts import read_json, write_json
from quantkit.system.devices import resolve_device
from quantkit.system.validation import parse_section
from tests.runs import config_of, decoded_model, files_with_times, hidden_names, load_whole, logits
from tests.tiny import make_model, tiny_rows


def variant(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "v", "method": "rtn", "group_size": 32, **keys}, "test")


def job(folder: Path, dtype: str = "float32", **changes: Any) -> Job:
    facts = {"reference": "tiny", "relative_to": "the float model", "dtype": dtype}
    given: dict[str, Any] = {"rows": tiny_rows(), "calibration_sha256": "0" * 64, "device": "cpu"}
    return Job(folder, facts, dtype, **(given | changes))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": make_model(root / "llama"),
        "tied": make_model(root / "tied", tie_word_embeddings=True),
        "sharded": make_model(root / "sharded", shards=3),
        "qwen2": make_model(root / "qwen2", "qwen2", tie_word_embeddings=True),
        "bfloat16": make_model(root / "bfloat16", dtype=torch.bfloat16),
    }


def assert_loads_as_it_decodes(source: Path, checkpoint: Path, spec: VariantSpec) -> None:
    found, wanted = logits(load_whole(checkpoint)), logits(decoded_model(source, checkpoint, spec))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_loads_every_scheme_as_the_format_decodes_it(
    models: dict[str, Path], tmp_path: Path, method: str, bits: int, symmetric: bool
) -> None:
    spec = variant(method=method, bits=bits, symmetric=symmetric)
    done = quantize(job(models["llama"]), spec, tmp_path / "out")
    assert_loads_as_it_decodes(models["llama"], done.folder, spec)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_per_channel_loads_as_it_decodes(models: dict[str, Path], tmp_path: Path, symmetric: bool) -> None:
    spec = variant(group_size=-1, symmetric=symmetric)
    done = quantize(job(models["llama"]), spec, tmp_path / "out")
    assert_loads_as_it_decodes(models["llama"], done.folder, spec)


@pytest.mark.parametrize("family", ["tied", "sharded", "qwen2", "bfloat16"])
def test_models_of_every_make_load_as_they_decode(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    spec = variant(method="gptq", overrides={"down_proj": {"bits": 8, "group_size": -1}})
    dtype = "bfloat16" if family == "bfloat16" else "float32"
    done = quantize(job(models[family], dtype), spec, tmp_path / "out")
    assert_loads_as_it_decodes(models[family], done.folder, spec)
    scales = [name for name in CheckpointReader(done.folder).names() if name.endswith("weight_scale")]
    assert {CheckpointReader(done.folder).dtype(name) for name in scales} == {getattr(torch, dtype)}


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2"])
def test_a_quantized_head_loads_and_the_embedding_stays(models: dict[str, Path], tmp_path: Path, family: str) -> None:
    source, spec = models[family], variant(bits=8, ignore=[])
    done = quantize(job(source), spec, tmp_path / "out")
    skeleton = Skeleton(source)
    assert skeleton.head is not None
    head = skeleton.head.prefix
    reader, embeddings = CheckpointReader(done.folder), [n for n in CheckpointReader(source).names() if "embed_" in n]
    assert f"{head}.weight_packed" in reader
    assert f"{head}.weight" not in reader
    kept = [name for name in embeddings if name != f"{head}.weight"]
    assert kept
    assert all(torch.equal(reader.read(name), CheckpointReader(source).read(name)) for name in kept)
    assert config_of(done.folder)["tie_word_embeddings"] is False
    assert head not in config_of(done.folder)["quantization_config"]["ignore"]
    assert_loads_as_it_decodes(source, done.folder, spec)


def test_a_float_head_leaves_the_tie_as_it_was(models: dict[str, Path], tmp_path: Path) -> None:
    done = quantize(job(models["tied"]), variant(), tmp_path / "out")
    assert config_of(done.folder)["tie_word_embeddings"] is True
    assert config_of(done.folder)["quantization_config"]["ignore"] == ["lm_head"]


def test_the_checkpoint_holds_all_that_a_runtime_and_a_reader_need(models: dict[str, Path], tmp_path: Path) -> None:
    given = job(models["llama"])
    done = quantize(given, variant(), tmp_path / "out", describe=partial(describe, given))
    names = {path.name for path in done.folder.iterdir()}
    assert names == {
        "LICENSE" if (models["llama"] / "LICENSE").exists() else "config.json",
        *("chat_template.jinja", "config.json", "generation_config.json", MANIFEST, "model.safetensors"),
        *("README.md", "recipe.yaml", "stage.json", "tokenizer.json", "tokenizer_config.json"),
    }
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (done.folder / name).read_bytes() == (models["llama"] / name).read_bytes()
    manifest = read_json(done.folder / MANIFEST)
    assert set(manifest["files"]) == names - {MANIFEST, "README.md", "stage.json"}
    for name, facts in manifest["files"].items():
        content = (done.folder / name).read_bytes()
        assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert manifest["source"]["reference"] == "tiny"
    assert (done.folder / "README.md").read_text(encoding="utf-8").count("# out\n") == 1


def test_licence_and_further_templates_go_along_and_an_old_index_does_not(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", shards=3)
    (source / "LICENSE.txt").write_text("free")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (source / "modeling_own.py").write_text("raise SystemExit")
    (source / "notes.bin").write_bytes(b"x")
    out = quantize(job(source), variant(), tmp_path / "out").folder
    assert (out / "LICENSE.txt").read_text() == "free"
    assert (out / "additional_chat_templates" / "tool.jinja").exists()
    assert "additional_chat_templates/tool.jinja" in read_json(out / MANIFEST)["files"]
    assert not any((out / name).exists() for name in ("modeling_own.py", "notes.bin", "model.safetensors.index.json"))


def test_the_models_own_code_goes_along_where_it_is_trusted(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    (source / "tokenization_own.py").write_text("x = 1\n")
    (source / "train.py").write_text("x = 2\n")
    told = {**read_json(source / "tokenizer_config.json"), "auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}
    write_json(source / "tokenizer_config.json", told)
    out = quantize(job(source, trust_remote_code=True), variant(), tmp_path / "out").folder
    assert (out / "tokenization_own.py").read_text() == "x = 1\n"
    assert not (out / "train.py").exists()


def test_bits_per_weight_count_every_stored_byte(models: dict[str, Path], tmp_path: Path) -> None:
    done = quantize(job(models["llama"]), variant(bits=4, symmetric=False), tmp_path / "out")
    reader = CheckpointReader(done.folder)
    stored = sum(reader.nbytes(name) for name in reader.names() if ".weight_" in name)
    weights = plan_layers(Skeleton(models["llama"]), variant()).weights()
    assert done.facts["bits_per_weight"] == pytest.approx(stored * 8 / weights)
    assert {layer["scheme"] for layer in done.facts["layers"]} == {"int4 g32 asym"}
    assert len(done.facts["layers"]) == 14


def test_a_finished_variant_is_reused_without_a_byte_written(models: dict[str, Path], tmp_path: Path) -> None:
    first = quantize(job(models["llama"]), variant(), tmp_path / "out")
    times = files_with_times(tmp_path)
    second = quantize(job(models["llama"]), variant(), tmp_path / "out")
    assert (first.reused, second.reused) == (False, True)
    assert files_with_times(tmp_path) == times
    assert second.facts == read_json(tmp_path / "out" / "stage.json")["facts"]


def test_the_same_variant_gives_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    spec = variant(method="gptq", bits=3)
    folders = [quantize(job(models["llama"]), spec, tmp_path / name).folder for name in "ab"]
    manifests = [(folder / MANIFEST).read_bytes() for folder in folders]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("damage", ["removed", "truncated", "no manifest"])
def test_a_damaged_variant_is_made_again(models: dict[str, Path], tmp_path: Path, damage: str) -> None:
    out = quantize(job(models["llama"]), variant(), tmp_path / "out").folder
    whole = (out / "model.safetensors").read_bytes()
    if damage == "truncated":
        (out / "model.safetensors").write_bytes(whole[:-8])
    else:
        (out / ("model.safetensors" if damage == "removed" else MANIFEST)).unlink()
    assert not is_whole(out)
    assert finished_variant(out, made_from(job(models["llama"]), variant())) is None
    assert not quantize(job(models["llama"]), variant(), out).reused
    assert (out / "model.safetensors").read_bytes() == whole


def test_what_a_variant_depends_on(models: dict[str, Path]) -> None:
    base, calibrated = made_from(job(models["llama"]), variant()), variant(method="gptq")
    other_rows = job(models["llama"], calibration_sha256="1" * 64)
    assert made_from(job(models["llama"]), variant(name="renamed")) == base
    assert made_from(other_rows, variant()) == base
    assert made_from(other_rows, calibrated) != made_from(job(models["llama"]), calibrated)
    assert made_from(job(models["llama"], "bfloat16"), calibrated) != made_from(job(models["llama"]), calibrated)
    assert made_from(job(models["llama"], inputs="float"), calibrated) != made_from(job(models["llama"]), calibrated)
    assert made_from(job(models["llama"]), variant(bits=8)) != base
    assert made_from(job(models["llama"]), variant(method="gptq", damping=0.5)) != made_from(
        job(models["llama"]), calibrated
    )


def test_what_computes_a_variant_is_part_of_what_it_depends_on(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of the device, the versions, and where the model is run the dtype of the passes."""
    given = job(models["llama"])
    plain, calibrated = variant(), variant(method="gptq")

    def changes(owner: Any, name: str, value: Any) -> tuple[bool, bool]:
        before = made_from(given, plain), made_from(given, calibrated)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            after = made_from(given, plain), made_from(given, calibrated)
        return before[0] != after[0], before[1] != after[1]

    assert changes(jobs, "resolve_device", lambda _: torch.device("cuda", 0)) == (True, True)
    assert changes(jobs, "pass_dtype", lambda *_: "another") == (False, True)
    real = metadata.version
    assert changes(jobs, "version", lambda name: "9.9.9" if name == "torch" else real(name)) == (True, True)
    assert changes(jobs, "version", lambda name: "9.9.9" if name == "transformers" else real(name)) == (False, True)
    assert changes(jobs, "version", lambda name: real(name) + ".post1") == (False, False)


def test_a_device_that_is_not_there_fails_the_variant(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="device cuda:99 is not available"):
        quantize(job(models["llama"], device="cuda:99"), variant(), tmp_path / "out")


def test_a_group_size_that_divides_one_layer_only_names_the_other(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", intermediate_size=96)
    with pytest.raises(SchemeError) as caught:
        quantize(job(source), variant(group_size=64, strict=True), tmp_path / "out")
    message = str(caught.value)
    assert "v: model.layers.0.mlp.down_proj: group_size 64 does not divide the 96 input columns" in message
    assert "sizes that do: 32, 16" in message
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_matches_nothing_and_one_that_leaves_nothing_are_refused(models: dict[str, Path]) -> None:
    skeleton = Skeleton(models["llama"])
    with pytest.raises(SchemeError, match="the override 'q_porj' matches no Linear layer"):
        plan_layers(skeleton, variant(overrides={"q_porj": {"bits": 8}}))
    with pytest.raises(SchemeError, match="no layer is left to quantize"):
        plan_layers(skeleton, variant(ignore=[""]))


def test_a_plan_knows_every_layer(models: dict[str, Path]) -> None:
    layers = plan_layers(Skeleton(models["llama"]), variant(ignore=["lm_head", "down_proj"]))
    assert len(layers.schemes) == 15
    assert len(layers.quantized) == 12
    assert layers.schemes["lm_head"] is None
    assert layers.schemes["model.layers.1.mlp.down_proj"] is None
    assert layers.schemes["model.layers.1.mlp.up_proj"] == IntScheme(4, 32, True)
    store = CompressedTensors("float16")
    told = sum(store.layer_bytes(scheme, *layers.shapes[name]) for name, scheme in layers.quantized.items())
    assert told == layers.weights() * 9 // 16 + 16 * 12


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives every block of a Llama a matrix that is in no layer."""
    init = LlamaDecoderLayer.__init__

    def with_bare_matrix(columns: int) -> None:
        def changed(self: LlamaDecoderLayer, *given: Any, **keys: Any) -> None:
            init(self, *given, **keys)
            self.bare = torch.nn.Parameter(torch.zeros(64, columns))

        monkeypatch.setattr(LlamaDecoderLayer, "__init__", changed)

    return with_bare_matrix


def test_a_model_that_is_partly_float_is_noted(bare: Callable[[int], None], tmp_path: Path) -> None:
    bare(96)
    source = make_model(tmp_path / "source")
    done = quantize(job(source), variant(), tmp_path / "out")
    whole = 3 * 64 * 128 + 2 * 64 * 64 + 2 * 64 * 32
    share = 2 * 96 * 64 / (2 * whole + 2 * 96 * 64)
    text = f"({share:.1%} of the block weights): bare parameters are no linear layers"
    assert done.facts["notes"] == [f"float: 2 model.layers.N.bare {text}"]
    assert done.facts["share"] == 1 - share
    written, read = CheckpointReader(done.folder), CheckpointReader(source)
    stored = sum(map(written.nbytes, written.names()))
    assert done.facts["bits_per_weight_file"] == stored * 8 / sum(read.read(name).numel() for name in read.names())
    assert done.facts["bits_per_weight_file"] > 2 * done.facts["bits_per_weight"]


def test_a_model_that_is_mostly_float_is_refused_unless_it_may_be(bare: Callable[[int], None], tmp_path: Path) -> None:
    bare(1024)
    source = make_model(tmp_path / "source")
    with pytest.raises(SchemeError) as caught:
        quantize(job(source), variant(), tmp_path / "out")
    assert "% of the block weights would stay float, such as model.layers.0.bare: bare para" in caught.value.problem
    assert caught.value.remedy == "add allow_float: true to variant v for a file that is mostly float"
    done = quantize(job(source), variant(allow_float=True), tmp_path / "out")
    assert "model.layers.N.bare" in done.facts["notes"][0]
    assert made_from(job(source), variant(allow_float=True)) == made_from(job(source), variant())


def test_a_gguf_file_counts_its_tensors_alone(models: dict[str, Path], tmp_path: Path) -> None:
    facts = quantize(job(models["llama"]), variant(format="gguf"), tmp_path / "out").facts
    reader = CheckpointReader(models["llama"])
    layers = plan_layers(Skeleton(models["llama"]), variant(format="gguf"))
    total = sum(reader.read(name).numel() for name in reader.names())
    floats = total - layers.weights()
    assert facts["bits_per_weight"] * layers.weights() + 16 * floats <= facts["bits_per_weight_file"] * total
    assert facts["bits_per_weight_file"] * total <= facts["bits_per_weight"] * layers.weights() + 32 * floats


def test_a_model_of_layers_alone_has_no_note(models: dict[str, Path]) -> None:
    assert plan_layers(Skeleton(models["llama"]), variant()).notes == ()


def test_the_strategy_follows_the_free_memory(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton, cpu = Skeleton(models["llama"]), torch.device("cpu")
    assert choose_strategy(skeleton, 100, torch.float32, cpu) == "one-pass"
    assert choose_strategy(skeleton, 10**14, torch.float32, cpu) == "recompute"
    assert paused_bytes(64, 32, 10, 4) == 2 * paused_bytes(64, 32, 10, 2)


def test_a_method_that_needs_calibration_refuses_to_go_without(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="v: method gptq needs calibration rows"):
        quantize(job(models["llama"], rows=()), variant(method="gptq"), tmp_path / "out")
    assert hidden_names(tmp_path) == []


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(QuantkitError, match="'gpux' is not a device"):
        resolve_device("gpux")
    with pytest.raises(QuantkitError, match="not on 'mps'"):
        resolve_device("mps")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(QuantkitError, match="device cuda is not available"):
            resolve_device("cuda")


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 1] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor 'model.embed_tokens.weight' of .* is nan at index \[3, 1\]"):
        quantize(job(source), variant(), tmp_path / "out")
    assert hidden_names(tmp_path) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", ["layers", "checkpoint"])
def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    out = quantize(job(models["llama"]), variant(), tmp_path / "out").folder
    old = files_with_times(out)
    write = writer.ShardWriter._shard_file

    def full(self: writer.ShardWriter, number: int) -> Any:
        if (".layers" in str(self.folder)) == (at == "layers"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, number)

    monkeypatch.setattr(writer.ShardWriter, "_shard_file", full)
    with pytest.raises(OutputError, match=r"No space left on device \(free some disk space"):
        quantize(job(models["llama"]), variant(bits=8), out)
    assert files_with_times(out) == old
    left = [path.name for path in tmp_path.iterdir() if path != out]
    assert left == ([".out.layers"] if at == "checkpoint" else [])  # what was solved is kept
    monkeypatch.undo()
    assert quantize(job(models["llama"]), variant(bits=8), out).facts["resumed"] == (2 if at == "checkpoint" else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_that_reads_back_differently_does_not_count(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer.ShardWriter.write

    def flipped(self: writer.ShardWriter, name: str, tensor: torch.Tensor) -> None:
        broken = name == "model.layers.1.mlp.up_proj.weight_packed" and ".layers" not in str(self.folder)
        write(self, name, tensor ^ 1 if broken else tensor)

    monkeypatch.setattr(writer.ShardWriter, "write", flipped)
    with pytest.raises(CheckpointError, match=r"layer model.layers.1.mlp.up_proj in .* does not decode to what the"):
        quantize(job(models["llama"]), variant(), tmp_path / "out")
    assert hidden_names(tmp_path) == []
    assert not (tmp_path / "out").exists()


def test_progress_counts_the_blocks(models: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    quantize(
        job(models["llama"]), variant(), tmp_path / "out", on_segment=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]


def test_a_manifest_reaches_into_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("x")
    write_manifest(tmp_path, {"schema": 1})
    assert list(read_json(tmp_path / MANIFEST)["files"]) == ["deep/file"]
    assert is_whole(tmp_path)
