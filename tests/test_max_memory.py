"""What a recipe lets its stages take of each device, and activations that wait where there is room."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from quantkit.engine import parking
from quantkit.engine.kept_calls import Fetch, OnDisk
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import RecipeError
from quantkit.evaluation import EvaluationJob
from quantkit.quantization import Job, memory_use, quantize
from quantkit.quantization.memory_use import choose_parking, choose_strategy, waiting_bytes
from quantkit.recipe import EvaluationSpec, Recipe, VariantSpec
from quantkit.system.artifacts import file_sha256
from quantkit.system.free_memory import free_bytes, give_back
from quantkit.system.memory_bounds import MemoryBounds
from quantkit.system.validation import parse_section
from tests.tiny import make_model, tiny_rows

CPU = torch.device("cpu")
RECIPE = "name: run\nmodel: ./model\nvariants: [{name: int4}]\nmax_memory: "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


def bounds(text: str) -> MemoryBounds:
    return Recipe.parse(RECIPE + text).max_memory


def test_bounds_are_written_as_users_of_accelerate_know_them() -> None:
    found = bounds("{cuda:0: 20GiB, 1: 10GB, cpu: 60GiB, disk: ./scratch}")
    assert found.of(torch.device("cuda", 0)) == 20 << 30
    assert found.of(torch.device("cuda", 1)) == 10**10
    assert found.of(torch.device("cuda", 2)) is None
    assert found.of(CPU) == 60 << 30
    assert found.disk == Path("scratch")
    assert bounds("{gpu: 1GiB, cuda:1: 2GiB}").of(torch.device("cuda", 0)) == 1 << 30


def test_bounds_survive_being_written_and_sent() -> None:
    recipe = Recipe.parse(RECIPE + "{cuda:0: 20GiB, cpu: 1GiB, disk: there}")
    assert Recipe.parse(recipe.to_yaml()).max_memory == recipe.max_memory
    assert recipe.resolved()["max_memory"] == {"cuda:0": 20 << 30, "cpu": 1 << 30, "disk": "there"}
    job = EvaluationJob(Path("x"), EvaluationSpec(), bounds=recipe.max_memory)
    assert EvaluationJob.from_json(job.to_json()).bounds == recipe.max_memory


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{tpu: 1GiB}", "'tpu' is not a device (give cpu, cuda:N"),
        ("{cuda:0: much}", "'much' is not a size"),
        ("{0: 1GiB, cuda:0: 2GiB}", "cuda:0 is there twice"),
        ("{cpu: 0}", "cpu may have no memory at all"),
        ("{disk: 5}", "disk is 5, which is no folder"),
        ("8GiB", "max_memory: '8GiB' is no mapping of devices to sizes (write {cpu: 8GiB})"),
    ],
)
def test_a_mistake_is_one_line(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as raised:
        bounds(text)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


# What is free


def test_a_bound_counts_what_the_process_holds() -> None:
    resident = psutil.Process().memory_info().rss
    left = free_bytes(CPU, MemoryBounds({"cpu": resident + (64 << 20)}))
    assert 0 < left <= 96 << 20
    assert free_bytes(CPU, MemoryBounds({"cpu": 1})) == 0
    assert free_bytes(CPU, MemoryBounds({"cuda": 1})) > 96 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give back by themselves, or never")
def test_what_was_freed_between_what_is_kept_is_given_back() -> None:
    kept = [bytearray(os.urandom(100_000)) for _ in range(1000)]
    del kept[::2]
    before = psutil.Process().memory_info().rss
    give_back()
    assert psutil.Process().memory_info().rss < before - (25 << 20)


# What follows from it


def test_less_memory_is_another_strategy(model: Path) -> None:
    skeleton, resident = Skeleton(model), psutil.Process().memory_info().rss
    waiting = waiting_bytes(skeleton.text.get_input_embeddings().weight.shape[1], 10**5, 4)
    for free, strategy, parks in ((200, "one-pass", False), (4, "recompute", False), (1, "recompute", True)):
        bound = MemoryBounds({"cpu": resident + free * waiting}, Path("scratch"))
        assert choose_strategy(skeleton, 10**5, torch.float32, CPU, bounds=bound) == strategy
        found, told = choose_parking(skeleton, 10**5, torch.float32, CPU, bounds=bound)
        assert (found is not None) == parks
        assert ("the rest in scratch" in told) == parks
    assert choose_parking(skeleton, 10**5, torch.float32, CPU, tuned=True, bounds=bound) == (None, "")


def digests(out: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in out.glob("*.safetensors")}


@pytest.mark.parametrize(
    "keys",
    [{"method": "gptq", "correction": True}, {"method": "awq+gptq"}, {"method": "gptq", "inputs": "float"}],
    ids=["correction", "awq", "float"],
)
def test_activations_on_disk_change_no_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    inputs: Any = keys.get("inputs", "quantized")
    own = {key: value for key, value in keys.items() if key != "inputs"}
    spec = parse_section(VariantSpec, {"name": "v", "group_size": 32, **own}, "test")
    rows = [row * 4 for row in tiny_rows()]
    job = Job(model, {"reference": "tiny"}, "float32", rows, "0" * 64, inputs=inputs, device="cpu")
    quantize(job, spec, tmp_path / "whole")
    read: list[int] = []
    monkeypatch.setattr(parking, "SMALL", 1)

    class Counted(OnDisk):
        def __call__(self, tensor: torch.Tensor) -> Fetch:
            read.append(1)
            return super().__call__(tensor)

    monkeypatch.setattr(parking, "OnDisk", Counted)
    monkeypatch.setattr(memory_use, "free_bytes", lambda *_: 0)
    notes: list[str] = []
    quantize(job, spec, tmp_path / "parked", on_note=notes.append)
    assert read
    assert any("wait in memory and the rest in" in note for note in notes)
    assert digests(tmp_path / "parked") == digests(tmp_path / "whole")
    assert not list(tmp_path.rglob("activations-*"))
