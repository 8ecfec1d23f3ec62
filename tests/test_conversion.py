"""The same codes from one format to another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.errors import CheckpointError, QuantkitError, SchemeError
from quantkit.exports import Export, open_export
from quantkit.exports.convert import convert
from quantkit.exports.manifest import is_whole
from tests.tiny import make_model

SYMMETRIC = {"method": "rtn", "bits": 4, "group_size": 32}
ASYMMETRIC = {**SYMMETRIC, "symmetric": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float16)


def exported(model: Path, out: Path, **keys: Any) -> Path:
    return quantkit.quantize(model, out=out, **{"dtype": "own", **keys})


def same_values(one: Export, other: Export) -> None:
    assert one.schemes.keys() == other.schemes.keys()
    for layer in one.schemes:
        first, second = one.weight(layer), other.weight(layer)
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.dequantize(torch.float32), second.dequantize(torch.float32))
    for name in one.float_names():
        assert torch.equal(one.float_tensor(name), other.float_tensor(name))


@pytest.mark.parametrize("keys", [SYMMETRIC, ASYMMETRIC, {**SYMMETRIC, "bits": 8, "group_size": -1}])
def test_there_and_back_is_where_it_began(model: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    first = exported(model, tmp_path / "first", **keys)
    there = convert(first, "hqq", tmp_path / "hqq")
    back = convert(tmp_path / "hqq", "compressed-tensors", tmp_path / "back")
    assert (there["largest_shift"], back["largest_shift"]) == (0.0, 0.0)
    assert (there["from"], there["format"]) == ("compressed-tensors", "hqq")
    same_values(open_export(first), open_export(tmp_path / "hqq"))
    same_values(open_export(first), open_export(tmp_path / "back"))
    assert is_whole(tmp_path / "back")
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("form", "keys"),
    [
        ("gptq", SYMMETRIC),
        ("gptq", {**ASYMMETRIC, "bits": 8}),
        ("awq", ASYMMETRIC),
        ("gguf", SYMMETRIC),
        ("gguf", {**SYMMETRIC, "bits": 8}),
        ("gguf", {"method": "rtn", "scheme": "mxfp4"}),
    ],
)
def test_every_format_that_has_the_grid_takes_the_codes(
    model: Path, tmp_path: Path, form: str, keys: dict[str, Any]
) -> None:
    first = exported(model, tmp_path / "first", **keys)
    told = convert(first, form, tmp_path / "there")
    there = open_export(tmp_path / "there")
    assert there.format == form
    for layer, scheme in open_export(first).schemes.items():
        before, after = open_export(first).weight(layer), there.weight(layer)
        assert torch.equal(before.codes, after.codes), scheme
        assert torch.equal(before.dequantize(torch.float32), after.dequantize(torch.float32))
    assert told["largest_shift"] == 0
    convert(tmp_path / "there", "compressed-tensors", tmp_path / "back")
    back = open_export(tmp_path / "back")
    for layer in back.schemes:
        assert torch.equal(back.weight(layer).codes, there.weight(layer).codes)


def test_zero_points_become_minimums_of_16_bits_in_gguf(model: Path, tmp_path: Path) -> None:
    first = exported(model, tmp_path / "first", **ASYMMETRIC)
    told = convert(first, "gguf", tmp_path / "there")
    there = open_export(tmp_path / "there")
    assert 0 < told["largest_shift"] < 0.01
    for layer in there.schemes:
        before, after = open_export(first).weight(layer), there.weight(layer)
        assert torch.equal(before.codes, after.codes)
        moved = (before.dequantize(torch.float32) - after.dequantize(torch.float32)).abs()
        steps = before.scales.float().abs().repeat_interleave(32, dim=1)
        assert (moved <= told["largest_shift"] * steps * 1.001).all()


def test_a_grid_that_the_format_lacks_is_refused_with_the_layer_and_the_reason(model: Path, tmp_path: Path) -> None:
    first = exported(model, tmp_path / "first", **SYMMETRIC)
    with pytest.raises(SchemeError, match=r"q_proj: the bitsandbytes format does not store int4 g32 sym"):
        convert(first, "bitsandbytes", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    nf4 = exported(model, tmp_path / "nf4", method="rtn", scheme="nf4", format="bitsandbytes")
    with pytest.raises(SchemeError, match="compressed-tensors cannot store nf4"):
        convert(nf4, "compressed-tensors", tmp_path / "out")


def test_scales_of_fewer_bits_may_move_weights_a_little_and_not_much(tmp_path: Path) -> None:
    model = make_model(tmp_path / "float32", dtype=torch.float32)
    first = exported(model, tmp_path / "first", **{**SYMMETRIC, "bits": 8})
    told = convert(first, "gptq", tmp_path / "gptq")
    assert 0 < told["largest_shift"] < 128 * 2**-11
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.formats.gptq.GptqFormat.scale_dtype", classmethod(lambda cls, dtype: "bfloat16"))
        with pytest.raises(SchemeError, match=r"q_proj: a weight of int8 g32 sym would move by 0\.\d+ steps"):
            convert(first, "gptq", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_is_no_quantized_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized"):
        convert(model, "hqq", tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        convert(tmp_path / "nothing", "hqq", tmp_path / "out")
    first = exported(model, tmp_path / "first", **SYMMETRIC)
    with pytest.raises(QuantkitError, match="unknown format 'gguff'"):
        convert(first, "gguff", tmp_path / "out")


def test_progress_tells_every_layer(model: Path, tmp_path: Path) -> None:
    first = exported(model, tmp_path / "first", **SYMMETRIC)
    told: list[tuple[int, int]] = []
    convert(first, "hqq", tmp_path / "out", on_layer=lambda done, total: told.append((done, total)))
    assert told == [(number, 14) for number in range(1, 15)]


KILLED = """
import os, signal, sys
from pathlib import Path
from quantkit.exports.convert import convert

def killed(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), "hqq", Path(sys.argv[2]), on_layer=killed)
"""


def test_what_a_killed_conversion_leaves_lies_beside_its_output_until_the_next(model: Path, tmp_path: Path) -> None:
    first, out, elsewhere = exported(model, tmp_path / "first", **SYMMETRIC), tmp_path / "out", tmp_path / "temporary"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(first), str(out)],
        env={**os.environ, "TMPDIR": str(elsewhere)},
        cwd=Path(quantkit.__file__).parents[1],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert list(elsewhere.iterdir()) == []
    assert list((tmp_path / ".out.work" / "convert" / "layers").iterdir())
    convert(first, "hqq", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "temporary"]
    same_values(open_export(first), open_export(out))


def test_a_conversion_that_is_stopped_leaves_nothing(model: Path, tmp_path: Path) -> None:
    first = exported(model, tmp_path / "first", **SYMMETRIC)

    def stopped(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(first, "hqq", tmp_path / "out", on_layer=stopped)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
