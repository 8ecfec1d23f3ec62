"""GGUF files in parts: read as one by any command, by the name of any part, and a missing part is told."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import QuantkitError
from quantkit.evaluation.memory import checkpoint_bytes
from quantkit.exports import find_gguf, open_export
from quantkit.gguf.head import GGUFTensor, read_head
from quantkit.gguf.writer import Entry, Raw, write_file
from quantkit.recipe import ModelSpec
from quantkit.source import resolve
from tests.runs import load_model


def write_parts(whole: Path, folder: Path, count: int) -> list[Path]:
    """The file in parts, as ``llama-gguf-split`` writes them."""
    folder.mkdir()
    head = read_head(whole)
    names = list(head.tensors)
    files = [folder / f"tiny-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, file in enumerate(files):
        own = head.metadata if number == 0 else {"general.architecture": head.architecture}
        marks = {
            "split.no": Raw(struct.pack("<IH", 2, number)),
            "split.count": Raw(struct.pack("<IH", 2, count)),
            "split.tensors.count": Raw(struct.pack("<Ii", 5, len(names))),
        }
        write_file(file, {**own, **marks}, [entry(head.tensors[name]) for name in names[number::count]])
    return files


def entry(tensor: GGUFTensor) -> Entry:
    def raw() -> NDArray[Any]:
        return numpy.fromfile(tensor.file, dtype=numpy.uint8, count=tensor.nbytes, offset=tensor.start)

    return Entry(tensor.name, int(tensor.kind), tensor.shape, tensor.nbytes, raw)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = quantkit.quantize(model, out=tmp_path_factory.mktemp("whole") / "out", method="rtn", format="gguf")
    file = find_gguf(out)
    assert file is not None
    return file


@pytest.fixture(scope="module")
def parts(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_parts(whole, tmp_path_factory.mktemp("parts") / "tiny", 3)


def test_a_source_is_read_by_any_part_or_its_folder(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    wanted = CheckpointReader(resolve(ModelSpec(source=str(whole)), tmp_path / "whole").folder)
    for number, named in enumerate((*parts, parts[0].parent)):
        source = resolve(ModelSpec(source=str(named)), tmp_path / str(number))
        found = CheckpointReader(source.folder)
        assert found.names() == wanted.names()
        assert all(torch.equal(found.read(name), wanted.read(name)) for name in wanted.names())
        assert list(source.sha256) == [part.name for part in parts]


def test_it_is_inspected_converted_and_loaded_as_one(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    one, several = quantkit.inspect(whole), quantkit.inspect(parts[1])
    assert one["layers"] == several["layers"]
    assert one["floats"] == several["floats"]
    assert several["bytes"] == sum(part.stat().st_size for part in parts) == checkpoint_bytes(parts[2])
    quantkit.convert(parts[2], "gptq", out=tmp_path / "gptq")
    layer = "model.layers.0.mlp.up_proj"
    wanted, found = (open_export(place).weight(layer).dequantize(torch.float32) for place in (whole, tmp_path / "gptq"))
    torch.testing.assert_close(wanted, found, rtol=0.01, atol=0)
    ids = torch.arange(8).view(1, -1)
    logits = [load_model(place, "reference")(ids).logits for place in (whole, parts[1])]
    assert torch.equal(logits[0], logits[1])


def test_llama_cpp_loads_it_by_any_part(parts: list[Path]) -> None:
    pytest.importorskip("xllamacpp")
    verdict = quantkit.evaluate(parts[1], metrics=["perplexity"], texts=["prose"], max_tokens=64, context_length=32)
    assert verdict["loaded_by"] == "llama.cpp"


def test_a_missing_part_is_told_by_its_name(parts: list[Path], tmp_path: Path) -> None:
    for part in (parts[0], parts[2]):
        shutil.copy(part, tmp_path)
    for command in (quantkit.inspect, lambda place: resolve(ModelSpec(source=str(place)), tmp_path / "work")):
        with pytest.raises(QuantkitError, match=r"is one of 3 parts, and tiny-00002-of-00003\.gguf is not beside it"):
            command(tmp_path / parts[2].name)
    (tmp_path / parts[0].name).unlink()
    with pytest.raises(QuantkitError, match=r"tiny-00001-of-00003\.gguf, tiny-00002-of-00003\.gguf are not beside it"):
        quantkit.inspect(tmp_path / parts[2].name)
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    with pytest.raises(QuantkitError, match=r"its name does not tell the others .*NAME-00001-of-00003"):
        quantkit.inspect(tmp_path / "renamed.gguf")
