"""The walk on a GPU gives what it gives on the CPU, in bounded memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import make_batches
from quantkit.engine.precision import pass_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.walk import Inputs, Strategy, Walk, WalkSettings
from quantkit.exports.content import same_values
from quantkit.formats import FORMATS
from quantkit.methods.base import Method
from quantkit.numerics.grid_search import encode, quantized, search_grid
from quantkit.schemes import Fp4Scheme, Fp8Scheme, IntScheme, Mxfp4Scheme, Nf4Scheme, Nvfp4Scheme, Scheme
from tests.architectures import make
from tests.test_fake_cuda import STORED
from tests.tiny import (
    FAMILIES,
    Collected,
    Forgetful,
    TinySteps,
    make_model,
    tiny_rows,
    tiny_steps,
    tiny_task,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROWS = tiny_rows(count=8, shortest=32, longest=96)


SCHEMES: list[Scheme] = [Nf4Scheme(32), Fp4Scheme(32, False), Fp8Scheme("tensor"), Fp8Scheme(), Fp8Scheme("block")]
SCHEMES += [Mxfp4Scheme(), Nvfp4Scheme(), IntScheme(8, -1, True, activations="dynamic")]


def solve(
    folder: Path, method: Method | TinySteps, device: str, scheme: Scheme | None = None, **settings: Any
) -> Collected:
    place = torch.device(device)
    skeleton = Skeleton(folder)
    task, sink = tiny_task(skeleton, method, scheme, head=True)
    batches = make_batches(ROWS, place, may_pad=True)
    Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(place, **settings)).run()
    return sink


def assert_close(found: Collected, expected: Collected, tolerance: float) -> None:
    assert list(found.results) == list(expected.results)
    for name, result in found.results.items():
        assert result.weight.codes.device.type == "cuda"
        assert result.tokens == expected.results[name].tokens
        assert result.error.item() == pytest.approx(expected.results[name].error.item(), rel=tolerance), name


@pytest.mark.parametrize("strategy", ["one-pass", "recompute"])
@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_errors_are_those_of_the_cpu(tmp_path: Path, family: str, inputs: Inputs, strategy: Strategy) -> None:
    own: dict[str, Any] = {"sliding_window": 16} if family == "mistral" else {}
    folder = make_model(tmp_path, family, tie_word_embeddings=True, **own)
    expected = solve(folder, tiny_steps(), "cpu", inputs=inputs, strategy=strategy)
    found = solve(folder, tiny_steps(), "cuda", inputs=inputs, strategy=strategy)
    assert_close(found, expected, tolerance=0.05)


@pytest.mark.parametrize("checkpoint", [torch.float32, torch.float16, torch.bfloat16])
def test_sixteen_bit_passes_cost_little(tmp_path: Path, checkpoint: torch.dtype) -> None:
    folder = make_model(tmp_path, dtype=checkpoint)
    dtype = pass_dtype(torch.device("cuda"), checkpoint)
    assert dtype.itemsize == 2
    expected = solve(folder, tiny_steps(), "cpu")
    assert_close(solve(folder, tiny_steps(), "cuda", dtype=dtype), expected, tolerance=0.1)


def test_round_to_nearest_is_that_of_the_cpu(tmp_path: Path) -> None:
    # But for scales at the edge between two float16 numbers: a GPU divides by multiplying with the inverse.
    folder = make_model(tmp_path)
    expected, found = (solve(folder, tiny_steps("rtn"), device) for device in ("cpu", "cuda"))
    for name, result in found.results.items():
        other = expected.results[name].weight
        assert (result.weight.codes.cpu() != other.codes).float().mean() < 0.01, name
        torch.testing.assert_close(result.weight.scales.cpu(), other.scales, rtol=2**-9, atol=0)


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("method", ["awq", "awq+gptq", "hqq"])
def test_every_method_has_the_errors_of_the_cpu(tmp_path: Path, method: str, inputs: Inputs) -> None:
    folder, scheme = make_model(tmp_path), IntScheme(4, 32, False)
    expected = solve(folder, tiny_steps(method), "cpu", scheme, inputs=inputs)
    found = solve(folder, tiny_steps(method), "cuda", scheme, inputs=inputs)
    assert_close(found, expected, tolerance=0.05)
    assert found.replaced.keys() == expected.replaced.keys()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
def test_every_scheme_has_the_errors_of_the_cpu(tmp_path: Path, scheme: Scheme, method: str) -> None:
    folder = make_model(tmp_path)
    expected = solve(folder, tiny_steps(method), "cpu", scheme)
    assert_close(solve(folder, tiny_steps(method), "cuda", scheme), expected, tolerance=0.05)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq", "hqq"])
def test_two_runs_give_the_same_bytes(tmp_path: Path, method: str) -> None:
    folder, scheme = make_model(tmp_path), IntScheme(4, 32, False)
    first, second = (solve(folder, tiny_steps(method), "cuda", scheme) for _ in range(2))
    for name, result in first.results.items():
        assert torch.equal(result.weight.codes, second.results[name].weight.codes), name
        assert torch.equal(result.weight.scales, second.results[name].weight.scales), name


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_experts_are_solved_as_on_the_cpu_and_alike_every_time(tmp_path: Path, architecture: str) -> None:
    make(tmp_path, architecture)
    found: list[Collected] = []
    for device in ("cpu", "cuda", "cuda"):
        skeleton = Skeleton(tmp_path)
        task, sink = tiny_task(skeleton, tiny_steps())
        batches = make_batches(ROWS, torch.device(device), may_pad=False)
        Walk(skeleton, CheckpointReader(tmp_path), batches, [task], WalkSettings(torch.device(device))).run()
        found.append(sink)
    cpu, first, second = found
    assert_close(first, cpu, tolerance=0.05)
    for name, result in first.results.items():
        assert torch.equal(result.weight.codes, second.results[name].weight.codes), name


@pytest.mark.parametrize(("name", "scheme"), STORED, ids=lambda given: str(getattr(given, "kind", given)))
def test_formats_decode_on_the_device_what_they_packed(name: str, scheme: Scheme) -> None:
    """So that codes do not go to the CPU to be compared there."""
    device = torch.device("cuda", 0)
    matrix = torch.randn(256, 128, device=device)
    grid = search_grid(matrix, None, scheme, torch.float16, 4)
    store = FORMATS.get(name)("float16")
    weight = store.fitted(quantized(encode(matrix, grid, scheme), grid, scheme))
    packed = {suffix: tensor.contiguous().to(device) for suffix, tensor in store.pack(weight).items()}
    with device:
        assert same_values(store.unpack(packed, weight.scheme), weight)


def peak_of(folder: Path, method: TinySteps, inputs: Inputs) -> int:
    device = torch.device("cuda")
    skeleton = Skeleton(folder)
    task, _ = tiny_task(skeleton, method, IntScheme(4, 64, True))
    task = replace(task, sink=Forgetful())
    batches = make_batches(ROWS, device, may_pad=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(device, inputs=inputs)).run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_peak_memory_does_not_grow_with_the_blocks(
    tmp_path: Path, method: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    few = make_model(tmp_path / "few", num_hidden_layers=2, **shape)
    many = make_model(tmp_path / "many", num_hidden_layers=6, **shape)
    peak_of(few, tiny_steps(method), inputs)  # the libraries' workspaces are allocated once
    expected, found = (peak_of(folder, tiny_steps(method), inputs) for folder in (few, many))
    assert found <= 1.05 * expected
    monkeypatch.setattr(Skeleton, "unload", lambda *_: None)
    assert peak_of(many, tiny_steps(method), inputs) > 1.05 * expected
