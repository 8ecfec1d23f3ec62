from __future__ import annotations

import errno
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open

from quantkit.checkpoint import INDEX_FILE, SINGLE_FILE, CheckpointReader, ShardWriter
from quantkit.checkpoint import reader as reader_module
from quantkit.errors import CheckpointError, OutputError
from quantkit.system.host import all_finite
from tests.tiny import make_model


def assorted() -> dict[str, torch.Tensor]:
    """Every kind of tensor that makes writers stumble: odd byte counts, no dimension, no elements."""
    torch.manual_seed(0)
    return {
        "bytes": torch.randint(0, 256, (3,), dtype=torch.uint8),
        "half": torch.randn(5, 3).half(),
        "brain": torch.randn(7, 1, 3).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "codes": torch.randint(-9, 9, (2, 9), dtype=torch.int32),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(11, dtype=torch.float64),
        "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "größe": torch.arange(6).reshape(2, 3).t(),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> None:
    with ShardWriter(folder, **options) as writer:
        for name, tensor in tensors.items():
            writer.declare(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


@pytest.mark.parametrize("limit", [4 << 30, 64, 1])
def test_safetensors_reads_what_the_writer_wrote(tmp_path: Path, limit: int) -> None:
    tensors = assorted()
    write(tmp_path, tensors, max_shard_bytes=limit)
    found: dict[str, torch.Tensor] = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - it is not a dict
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("limit", [4 << 30, 64])
def test_the_reader_reads_what_the_writer_wrote(tmp_path: Path, limit: int) -> None:
    tensors = assorted()
    write(tmp_path, tensors, max_shard_bytes=limit)
    reader = CheckpointReader(tmp_path)
    assert sorted(reader.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert name in reader
        assert same(reader.read(name), tensor)
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert reader.nbytes(name) == tensor.numel() * tensor.itemsize


def test_shards_are_limited_named_and_indexed(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(10) for number in range(5)} | {"large": torch.randn(100)}
    write(tmp_path, tensors, max_shard_bytes=80)
    names = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*names, INDEX_FILE])
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 600
    assert [index["weight_map"][name] for name in tensors] == [names[0]] * 2 + [names[1]] * 2 + names[2:]
    assert CheckpointReader(tmp_path).file_of("t3") == tmp_path / names[1]


def test_the_reader_reads_what_transformers_wrote(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path, shards=3, dtype=torch.bfloat16)
    reader = CheckpointReader(folder)
    assert len(reader.files()) >= 4
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert all(same(reader.read(name), state[name]) for name in reader.names())
    assert set(state) == set(reader.names())


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    write(tmp_path, {f"t{number}": torch.zeros(1 << 20) for number in range(64)})
    reader = CheckpointReader(tmp_path)
    process = psutil.Process()
    before = process.memory_info().rss
    for name in reader.names():
        tensor = reader.read(name)
        assert process.memory_info().rss - before < 32 << 20  # the file has 256 MiB
        del tensor


def test_a_tensor_stays_when_its_file_goes(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.arange(4)})
    tensor = CheckpointReader(tmp_path).read("a")
    (tmp_path / SINGLE_FILE).write_bytes(b"")
    assert tensor.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_seen_wherever_it_lies(dtype: torch.dtype, value: float) -> None:
    values = torch.randn(3, 1001).to(dtype)
    assert all_finite(values)
    assert all_finite(values.T)
    assert all_finite(values[:0])
    assert all_finite(torch.full((4,), torch.finfo(torch.float32).max))
    for place in (0, 1, 31, 500, 1000):
        broken = values.clone()
        broken[1, place] = value
        assert not all_finite(broken)
        assert not all_finite(broken.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_finite_names_the_tensor_and_the_first_index(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    broken = torch.zeros(4, 5, dtype=dtype)
    broken[2, 3] = broken[3, 0] = value
    write(tmp_path, {"good": torch.ones(3, dtype=dtype), "broken.weight": broken, "codes": torch.ones(2).int()})
    reader = CheckpointReader(tmp_path)
    assert reader.read_finite("good").sum() == 3
    assert reader.read_finite("codes").sum() == 2
    with pytest.raises(CheckpointError, match=r"'broken.weight'.*at index \[2, 3\]"):
        reader.read_finite("broken.weight")


@pytest.mark.parametrize("place", [0, 3, 4, 19])
def test_a_large_tensor_is_looked_through_in_parts(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(reader_module, "TESTED", 4)
    values = torch.zeros(20)
    assert reader_module.first_not_finite(values.view(4, 5)) is None
    values[place:] = float("inf")
    assert reader_module.first_not_finite(values.view(4, 5)) == place


def test_float8_has_nan_and_is_checked(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=r"index \[1\]"):
        CheckpointReader(tmp_path).read_finite("w")


def test_only_pickles_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only pickled weights .*pytorch_model.bin.*convert them to safetensors"):
        CheckpointReader(tmp_path)


def test_pickles_beside_safetensors_do_no_harm(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2)})
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert CheckpointReader(tmp_path).names() == ["a"]


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no safetensors checkpoint"):
        CheckpointReader(tmp_path)


def test_an_index_of_another_name_is_found_and_two_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, max_shard_bytes=8)
    (tmp_path / INDEX_FILE).rename(tmp_path / "weights.safetensors.index.json")
    assert CheckpointReader(tmp_path).names() == ["a", "b"]
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:40],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: struct.pack("<Q", 1 << 62) + data[8:],
        lambda data: data.replace(b'"F32"', b'"F33"'),
        lambda data: data.replace(b"[3]", b"[4]"),
        lambda data: data.replace(b"[3]", b"[x]"),
        lambda data: data.replace(b"[0,12]", b"[4,16]"),
        lambda data: data.replace(b"[12,24]", b"[8,20] "[:7]),
        lambda data: struct.pack("<Q", 100_000) + b"[" * 100_000 + data,
    ],
)
def test_a_broken_file_is_named_with_the_remedy(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write(tmp_path, {"a": torch.ones(3), "b": torch.ones(3)})
    file = tmp_path / SINGLE_FILE
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        CheckpointReader(tmp_path)


def test_a_truncated_shard_is_named_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(8), "b": torch.ones(8)}, max_shard_bytes=32)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.*download or copy the file again"):
        CheckpointReader(tmp_path)


def edited_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    write(folder, {"a": torch.ones(8), "b": torch.ones(8)}, max_shard_bytes=32)
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    edited_index(tmp_path, lambda index: index["weight_map"].update(c="model-00003-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="model-00003-of-00002"):
        CheckpointReader(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path: Path) -> None:
    edited_index(tmp_path, lambda index: index["weight_map"].update(c="model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="'c' in model-00001-of-00002"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", 3, None])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: object) -> None:
    edited_index(tmp_path, lambda index: index["weight_map"].update(a=shard))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "{", "[" * 99999])
def test_a_broken_index_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="not a valid index"):
        CheckpointReader(tmp_path)


def test_an_unknown_tensor_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2)})
    reader = CheckpointReader(tmp_path)
    assert "b" not in reader
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        reader.read("b")


def test_a_file_cut_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(8)})
    reader = CheckpointReader(tmp_path)
    file = tmp_path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends inside tensor 'a'"):
        reader.read("a")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).half()), ("c", torch.ones(2))],
)
def test_the_writer_takes_only_the_next_declared_tensor(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    writer = ShardWriter(tmp_path)
    writer.declare("a", torch.float32, (2,))
    writer.declare("b", torch.float32, (2,))
    with pytest.raises(ValueError, match="is next"), writer:
        writer.write(name, tensor)


def test_the_writer_refuses_an_unfinished_checkpoint(tmp_path: Path) -> None:
    def unfinished() -> None:
        with ShardWriter(tmp_path) as writer:
            writer.declare("a", torch.float32, (2,))
            writer.declare("b", torch.float32, (2,))
            writer.write("a", torch.ones(2))

    with pytest.raises(ValueError, match="'b' was declared and not written"):
        unfinished()


def test_the_writer_refuses_late_double_and_unknown_declarations(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.declare("a", torch.float32, (2,))
    with pytest.raises(ValueError, match="declared twice"):
        writer.declare("a", torch.float32, (2,))
    with pytest.raises(ValueError, match="reserved"):
        writer.declare("__metadata__", torch.float32, (2,))
    with pytest.raises(ValueError, match=r"no torch\.complex128"):
        writer.declare("b", torch.complex128, (2,))
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="after the first was written"):
        writer.declare("b", torch.float32, (2,))
    with pytest.raises(ValueError, match="was not declared"):
        writer.write("b", torch.ones(2))
    writer.close()
    assert CheckpointReader(tmp_path).read("a").tolist() == [1, 1]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("quantkit.checkpoint.writer.os.fsync", refuse)
    with pytest.raises(OutputError, match="free some disk space"):
        write(tmp_path, {"a": torch.ones(2)})
