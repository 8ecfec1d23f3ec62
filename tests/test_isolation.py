"""Workers: every way in which one ends is told apart, and none leaves a process or a folder behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantkit.errors import QuantkitError, SchemeError
from quantkit.exports import open_export
from quantkit.inspection import inspect
from quantkit.isolation.attempt import Attempt
from quantkit.isolation.launch import WORKER, WorkerFailedError
from quantkit.isolation.stage import quantize_by_library
from quantkit.libraries import LIBRARIES
from quantkit.quantization import Job, Quantized
from quantkit.recipe import LibrarySpec
from quantkit.schemes import IntScheme
from quantkit.system.validation import parse_section
from tests.faulty_library import CHILD, Faulty
from tests.runs import Notebook, config_of, hidden_names
from tests.tiny import make_model, tiny_rows

LIMITS = {"time": "60s", "memory": "2GiB"}


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    LIBRARIES.names()
    monkeypatch.setattr(LIBRARIES, "_entries", {**LIBRARIES._entries, "faulty": Faulty})


@pytest.fixture
def job(float_model: Path) -> Job:
    rows = tiny_rows()
    return Job(float_model, {"reference": "tiny"}, "float32", rows, "some rows", device="cpu")


def spec(method: str, **keys: Any) -> LibrarySpec:
    given = {"name": "v", "library": "faulty", "method": method, "group_size": 32, "env": "current", "limits": LIMITS}
    return parse_section(LibrarySpec, {**given, **keys}, "test")


def quantized(job: Job, folder: Path, method: str, observer: Notebook | None = None, **keys: Any) -> Quantized:
    variant = spec(method, **keys)
    return quantize_by_library(Attempt(job, variant, folder / "out", folder / "v.log", observer or Notebook()))


def failure(job: Job, folder: Path, method: str, **keys: Any) -> WorkerFailedError:
    """How a worker failed, of which nothing is left but its log."""
    with pytest.raises(WorkerFailedError) as caught:
        quantized(job, folder, method, **keys)
    assert not (folder / "out").exists()
    assert hidden_names(folder) == []
    assert (folder / "v.log").is_file()
    assert str(folder / "v.log") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ".out.library-" not in str(caught.value)
    return caught.value


ENDINGS = {
    "raises": ("error", "faulty raises failed: ValueError: layer 3 has a shape that nobody expected"),
    "has_no_memory": ("out of memory", "ran out of memory: MemoryError: you tried to allocate 99 GiB"),
    "is_killed": ("signal", "was killed by SIGKILL; last line of its log: about to go"),
    "crashes": ("signal", "was killed by SIGSEGV"),
    "leaves": ("no result", "ended with exit code 0 and without a result"),
    "leaves_a_child": ("error", "ValueError: and went"),
    "prints": ("error", "ValueError: that was all"),
    "writes_nothing": ("bad output", "reported success, but it wrote no codes"),
    "gives_scales_of_another_shape": ("bad output", "has scales of shape [32, 1] in place of [32, 2]"),
    "gives_other_shapes": ("bad output", "has shape [31, 64] in place of [32, 64]"),
    "gives_nan": ("bad output", "has scales that are not finite"),
    "writes_float": ("bad output", "reported success, but"),
    "writes_half": ("bad output", "bytes where its header says"),
    "writes_another_format": ("bad output", "of the format compressed-tensors in place of gptq"),
    "lacks_a_norm": ("bad output", "its checkpoint lacks the tensor model.norm.weight"),
}


@pytest.mark.parametrize("method", ENDINGS)
def test_every_way_to_fail_is_told_apart(job: Job, tmp_path: Path, method: str) -> None:
    ending, words = ENDINGS[method]
    error = failure(job, tmp_path, method)
    assert error.facts["ending"] == ending
    assert words in str(error)


def test_memory_without_end_stops_at_the_limit(job: Job, tmp_path: Path) -> None:
    error = failure(job, tmp_path, "allocates", limits={"memory": "400MiB"})
    assert error.facts["ending"] == "memory limit"
    assert "and its limit is 400.00 MiB" in str(error)
    assert 400 << 20 < error.facts["peak_bytes"] < 2 << 30


def test_the_memory_of_what_a_worker_starts_is_its_own(job: Job, tmp_path: Path) -> None:
    error = failure(job, tmp_path, "lets_children_allocate", limits={"memory": "700MiB"})
    assert error.facts["ending"] == "memory limit"


@pytest.mark.parametrize("method", ["sleeps", "ignores_signals"])
def test_a_hang_ends_at_the_time_limit(job: Job, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.system.processes.GRACE", 0.5)
    started = time.monotonic()
    error = failure(job, tmp_path, method, limits={"time": "1.5s"})
    assert error.facts["ending"] == "time limit"
    assert "it was not done after 1.5 s" in str(error)
    assert time.monotonic() - started < 60


def test_no_process_is_left(job: Job, tmp_path: Path, float_model: Path) -> None:
    failure(job, tmp_path, "leaves_a_child")
    child = int((float_model / CHILD).read_text())
    (float_model / CHILD).unlink()
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_worker_sees_no_token_and_nothing_of_the_caller_but_what_is_said(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SOME_API_KEY", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    error = failure(job, tmp_path, "tells")
    assert "secret" not in str(error)
    told = json.loads(str(error).partition("RuntimeError: ")[2].rpartition(" (the traceback")[0])
    fixed = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "FAULTY_CORES": "1"}
    assert fixed.items() <= told["env"].items()
    assert told["sid"] != os.getsid(0)
    assert "pydantic" not in told["modules"]
    assert not any(Path(entry).name in ("isolation", "tests") for entry in told["path"])


def test_what_works_is_a_checkpoint_like_any_other(job: Job, tmp_path: Path) -> None:
    observer = Notebook()
    done = quantized(job, tmp_path, "works", observer, limits=LIMITS)
    export = open_export(done.folder)
    assert set(export.schemes.values()) == {IntScheme(4, 32, True)}
    assert len(export.schemes) == 14
    assert export.format == "compressed-tensors"
    assert inspect(done.folder)["problems"] == []
    assert observer.steps[-1] == ("layer", 14, 14)
    library = done.facts["library"]
    assert library["calibration"]["given"] == library["calibration"]["used"]
    assert done.facts["notes"][:2] == ["faulty works ran with the library's own options", "a note of the library"]
    assert library["versions"]["torch"]
    assert all(0 < layer["error_after"] < 0.02 for layer in done.facts["layers"])
    assert quantized(job, tmp_path, "works").reused


def test_what_a_library_leaves_in_its_working_folder_is_not_left_with_the_user(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = tmp_path / "user"
    user.mkdir()
    monkeypatch.chdir(user)
    quantized(job, Path("results"), "litters")
    assert [path.name for path in user.iterdir()] == ["results"]
    assert not (user / "results" / "logs").exists()


def test_what_a_library_wrote_itself_is_kept_as_it_is(job: Job, tmp_path: Path) -> None:
    done = quantized(job, tmp_path, "writes_packed", bits=8)
    export = open_export(done.folder)
    assert set(export.schemes.values()) == {IntScheme(8, -1, True)}
    assert export.made_by.startswith("faulty ")
    assert done.facts["format"] == "compressed-tensors"
    assert inspect(done.folder)["problems"] == []


@pytest.mark.parametrize("form", ["gptq", "hqq", "gguf"])
def test_codes_go_into_the_format_that_is_asked_for(job: Job, tmp_path: Path, form: str) -> None:
    done = quantized(job, tmp_path, "works", format=form, bits=4)
    usual = quantized(job, tmp_path / "usual", "works")
    layer = "model.layers.0.mlp.down_proj"
    assert open_export(done.folder).format == form
    found, wanted = (open_export(each.folder).weight(layer).codes for each in (done, usual))
    assert bool((found == wanted).all())


def test_a_head_that_the_model_ties_to_its_embedding_is_its_own_where_a_library_quantizes_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "tied", tie_word_embeddings=True)
    tied = Job(folder, {"reference": "tied"}, "float32", tiny_rows(), "some rows", device="cpu")
    done = quantized(tied, tmp_path, "quantizes_the_head")
    assert "lm_head" in open_export(done.folder).schemes
    assert config_of(done.folder)["tie_word_embeddings"] is False
    assert inspect(done.folder)["problems"] == []


def test_a_format_that_cannot_store_the_grid_is_said(job: Job, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="the awq format does not store int8 g32 sym"):
        quantized(job, tmp_path, "works", format="awq", bits=8)
    assert hidden_names(tmp_path) == []


def test_tokens_that_a_library_did_not_run_are_noted(job: Job, tmp_path: Path) -> None:
    done = quantized(job, tmp_path, "drops_rows")
    given, used = (done.facts["library"]["calibration"][key] for key in ("given", "used"))
    assert used["samples"] == given["samples"] - 1
    assert done.facts["notes"][0] == (
        f"of 6 calibration rows with {given['tokens']} tokens the library ran 5 with {used['tokens']}"
    )


CHANGES: dict[str, dict[str, Any]] = {
    "options": {"speed": 2.5},
    "bits": {"bits": 8},
    "ignore": {"ignore": ["lm_head", "layers.0"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_taken_for_a_result(job: Job, tmp_path: Path, change: str) -> None:
    quantized(job, tmp_path, "works")
    assert quantized(job, tmp_path, "works", limits={"time": "61s"}).reused
    assert not quantized(job, tmp_path, "works", **CHANGES[change]).reused


def test_other_tokens_or_another_plugin_make_another_result(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(job, tmp_path, "works")
    assert not quantized(replace(job, calibration_sha256="others"), tmp_path, "works").reused
    monkeypatch.setattr("quantkit.isolation.attempt.file_sha256", lambda path: "another plugin")
    assert not quantized(replace(job, calibration_sha256="others"), tmp_path, "works").reused


def test_a_result_of_before_is_kept_when_its_successor_fails(job: Job, tmp_path: Path) -> None:
    """The folder then holds what another recipe made, which nobody takes for this one's."""
    quantized(job, tmp_path, "works")
    with pytest.raises(WorkerFailedError):
        quantized(job, tmp_path, "raises")
    assert quantized(job, tmp_path, "works").reused


def test_a_device_that_a_library_does_not_know_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="faulty needs_cuda quantizes on cuda alone, and the device here is cpu"):
        quantized(job, tmp_path, "needs_cuda")


@pytest.fixture
def terminating() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_request_to_terminate_ends_the_worker_too(job: Job, tmp_path: Path, terminating: None) -> None:
    def terminate_once_it_runs() -> None:
        while not (found := [each for each in psutil.Process().children() if str(WORKER) in each.cmdline()]):
            time.sleep(0.05)
        workers.extend(found)
        os.kill(os.getpid(), signal.SIGTERM)

    workers: list[psutil.Process] = []
    thread = threading.Thread(target=terminate_once_it_runs)
    thread.start()
    with pytest.raises(SystemExit):
        quantized(job, tmp_path, "sleeps")
    thread.join()
    assert workers
    assert not any(worker.is_running() for worker in workers)
    assert hidden_names(tmp_path) == []


PARENT = """
import sys
from pathlib import Path
from quantkit.isolation.launch import Place, launch
from quantkit.system.child import Limits
from tests.faulty_library import Faulty
scratch = Path(sys.argv[1])
request = {"model": ".", "tokens": [], "out": ".", "method": "sleeps", "bits": 4, "group_size": 32, "symmetric": True}
request |= {"ignore": [], "dtype": "float32", "device": "cpu", "options": {}}
place = Place(Path(sys.executable), own=False)
told = lambda step, done, total: None
launch(Faulty, place, request, {}, scratch=scratch, limits=Limits(600), log=scratch / "log", on_progress=told)
"""


def test_a_worker_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    own = psutil.Process(parent.pid)
    while not (workers := [each for each in own.children() if "worker.py" in " ".join(each.cmdline())]):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert gone
    assert not alive
