"""Memory while a model is loaded, reads and writes: on this machine's CPU, and on a CUDA device that is played."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation import memory as probes
from quantkit.evaluation.memory import HostProbe, MemoryWatch, peak_rss
from quantkit.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS
from quantkit.runtimes.base import LoadedModel
from tests.device import FakeCuda

MIB = 1 << 20
IDS = torch.arange(48)
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin a peak anew")


class Model:
    """Takes memory as it is told, and lets go of it."""

    process: int | None = None

    def __init__(self, take: Callable[[int], Any], prefill: int = 96, decode: int = 32) -> None:
        self._take, self._prefill, self._decode = take, prefill, decode
        self.prompts: list[int] = []

    def weights_bytes(self) -> int:
        return 5 * MIB

    def prefill(self, ids: torch.Tensor) -> None:
        self.prompts.append(len(ids))
        self._take(self._prefill * MIB)

    def decode(self, prompt: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        self.prompts.append(len(prompt))
        self._take(self._decode * MIB)
        return [0] * count, [0.0] * count


def watched(model: Model, device: torch.device, *, own_allocator: bool = False) -> dict[str, Any]:
    watch, loaded = MemoryWatch(device, own_allocator=own_allocator), cast(LoadedModel, model)
    watch.loaded(loaded)
    watch.run(loaded, IDS)
    return watch.figures(loaded)


def touch(nbytes: int) -> None:
    """Hold memory of the system for a moment; malloc might keep it, where its heap has a hole of that size."""
    with mmap.mmap(-1, nbytes) as taken:
        torch.frombuffer(taken, dtype=torch.uint8).fill_(1)


@linux
def test_every_phase_on_a_cpu_has_a_peak_of_its_own() -> None:
    model = Model(touch)
    found = watched(model, torch.device("cpu"))
    peaks = {name: phase["peak_bytes"] - found["baseline_bytes"] for name, phase in found["phases"].items()}
    assert list(peaks) == ["load", "prefill", "decode"]
    assert peaks["load"] < 32 * MIB
    assert 95 * MIB <= peaks["prefill"] < 128 * MIB  # some pages that were there before may have gone
    assert 31 * MIB <= peaks["decode"] < 64 * MIB
    assert found["phases"]["prefill"]["used_bytes"] - found["baseline_bytes"] < 32 * MIB
    assert found["peak_bytes"] >= max(phase["peak_bytes"] for phase in found["phases"].values())
    assert (found["peak_kind"], found["peaks_are_of"]) == ("RSS", "phase")
    assert found["phases"]["prefill"]["tokens"] == len(IDS)
    assert (found["phases"]["decode"]["prompt_tokens"], found["phases"]["decode"]["tokens"]) == (
        PROMPT_TOKENS,
        NEW_TOKENS,
    )
    assert model.prompts == [len(IDS), PROMPT_TOKENS]
    assert "process_bytes" not in found


@linux
def test_what_came_before_the_model_is_in_the_overall_peak_alone() -> None:
    touch(256 * MIB)
    before = peak_rss()
    found = watched(Model(touch), torch.device("cpu"))
    assert before <= found["peak_bytes"] < before + MIB
    assert all(phase["peak_bytes"] < before for phase in found["phases"].values())


def test_where_no_peak_can_begin_anew_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probes, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert not HostProbe().begin()
    found = watched(Model(touch), torch.device("cpu"))
    assert found["peaks_are_of"] == "process"
    peaks = [phase["peak_bytes"] for phase in found["phases"].values()]
    assert peaks == sorted(peaks)
    assert found["peak_bytes"] == peaks[-1]


def test_a_model_without_cache_has_no_figures_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Model, prompt: torch.Tensor, count: int) -> Any:
        raise EvaluationError("it keeps no KV cache", "leave it out")

    monkeypatch.setattr(Model, "decode", refuse)
    assert watched(Model(touch), torch.device("cpu"))["phases"]["decode"] == {"missing": "it keeps no KV cache"}


# On CUDA, played


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    found = FakeCuda(context=300 * MIB)
    for name in FakeCuda.ANSWERS:
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    monkeypatch.setitem(sys.modules, "pynvml", cast(ModuleType, found.nvml))
    return found


def test_every_phase_on_cuda_has_peaks_of_its_own(cuda: FakeCuda) -> None:
    found = watched(Model(cuda.take), cuda.device)
    phases = found["phases"]
    assert {name: phase["peak_bytes"] for name, phase in phases.items()} == {
        "load": 0,
        "prefill": 96 * MIB,
        "decode": 32 * MIB,
    }
    assert phases["prefill"]["reserved_bytes"] == 96 * MIB
    assert phases["prefill"]["process_bytes"] == (300 + 96) * MIB
    assert phases["decode"]["process_bytes"] == (300 + 32) * MIB
    assert (found["peak_bytes"], found["process_bytes"]) == (96 * MIB, 396 * MIB)
    assert (found["peak_kind"], found["peaks_are_of"], found["device"]) == ("CUDA allocator", "phase", "a card")


def test_nothing_is_read_from_cuda_before_its_work_is_done(cuda: FakeCuda) -> None:
    watched(Model(cuda.take), cuda.device)
    reading = ("max_memory_allocated", "memory_allocated", "max_memory_reserved", "reset_peak_memory_stats")
    for place, call in enumerate(cuda.calls):
        if call in reading:
            since = cuda.calls[:place]
            assert "synchronize" in since
            assert "take" not in since[len(since) - since[::-1].index("synchronize") :], cuda.calls
    assert cuda.calls.count("reset_peak_memory_stats") == 3


@pytest.mark.parametrize("why", ["no package", "an error", "another process", "no figure"])
def test_a_process_of_which_nvml_tells_nothing(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no package":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    elif why == "an error":
        cuda.fails = True
    elif why == "another process":
        cuda.pid = os.getpid() + 1
    else:
        cuda.context = None
    found = watched(Model(cuda.take), cuda.device)
    assert found["process_bytes"] is None
    assert all(phase["process_bytes"] is None for phase in found["phases"].values())
    assert found["peak_bytes"] == 96 * MIB


def test_of_a_runtime_with_its_own_allocator_the_process_is_told(cuda: FakeCuda) -> None:
    def take(nbytes: int) -> None:
        cuda.context = 300 * MIB + nbytes

    found = watched(Model(take), cuda.device, own_allocator=True)
    assert (found["peak_kind"], found["peak_bytes"], found["baseline_bytes"]) == ("NVML", 396 * MIB, 300 * MIB)
    assert found["phases"]["prefill"]["peak_bytes"] is None
    assert found["phases"]["prefill"]["process_bytes"] == 396 * MIB


def test_the_device_of_a_process_is_asked_for_by_its_uuid(cuda: FakeCuda) -> None:
    assert probes.process_bytes(cuda.device) == 300 * MIB
    assert cuda.asked == ["GPU-1234"]
    assert isinstance(cuda.nvml, SimpleNamespace)
