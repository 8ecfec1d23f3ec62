"""Faults of disks, memory, models and clocks, injected where the real call is made; docs/reliability.md lists them."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.solver import Solver
from quantkit.engine.walk import Walk
from quantkit.errors import CalibrationError, CheckpointError, OutputError, QuantizationError
from quantkit.quantization import Job, Wanted, quantize, quantize_together
from quantkit.quantization import walk_variants as walking
from quantkit.quantization.resume import layers_folder
from quantkit.recipe import VariantSpec
from quantkit.records import files
from quantkit.system.artifacts import read_json
from tests.commands import quantize_arguments
from tests.runs import hidden_names
from tests.tiny import make_model, tiny_rows

ASKED = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 12.00 MiB is "
    "free. Process 1 has 79.09 GiB memory in use."
)


def job(model: Path, inputs: str = "quantized", **changes: Any) -> Job:
    given: dict[str, Any] = {"rows": tiny_rows(), "calibration_sha256": "0" * 64, "device": "cpu", "inputs": inputs}
    return Job(model, {"reference": "tiny"}, "float32", **(given | changes))


def variant(method: str = "gptq", **keys: Any) -> VariantSpec:
    return VariantSpec.model_validate({"name": "v", "method": method, "group_size": 32, **keys})


def rewrite(model: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


# Disks

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv = ["quantkit", *sys.argv[2:]]
from quantkit.cli import main
main()
"""


@pytest.mark.parametrize(("limit", "place", "kept"), [(12_000, ".out.layers/", False), (70_000, "partial-", True)])
def test_a_full_disk_is_one_line_and_what_is_saved_stays(
    model: Path, records: Path, tmp_path: Path, limit: int, place: str, kept: bool
) -> None:
    """The limit on the size of a file fails the real write: of a segment, or of the checkpoint's shard."""
    arguments = [str(each) for each in quantize_arguments(model, records, tmp_path / "out", "--method", "rtn")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: cannot write ")
    assert place in last
    assert "File too large (the file system or a limit of this session" in last
    assert "Traceback" not in done.stderr
    assert (tmp_path / ".out.layers").exists() == kept
    assert not (tmp_path / "out").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_read_error_names_the_shard_and_what_is_saved_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model", shards=3)
    broken = CheckpointReader(model).file_of("model.layers.1.mlp.up_proj.weight")
    fill = CheckpointReader._fill

    def failing(self: CheckpointReader, view: memoryview, entry: Any, name: str) -> None:
        if name == "model.layers.1.mlp.up_proj.weight":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(entry.file))
        fill(self, view, entry, name)

    monkeypatch.setattr(CheckpointReader, "_fill", failing)
    with pytest.raises(CheckpointError) as caught:
        quantize(job(model), variant(), tmp_path / "out")
    line = str(caught.value)
    assert f"{broken} cannot be read at tensor 'model.layers.1.mlp.up_proj.weight': Input/output error" in line
    assert layers_folder(tmp_path / "out").exists()
    monkeypatch.undo()
    assert quantize(job(model), variant(), tmp_path / "out").facts["resumed"] == 1
    assert hidden_names(tmp_path) == []


# Models


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, method: str, value: str) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float(value)

    model = rewrite(make_model(tmp_path / "model"), spoil)
    with pytest.raises(CheckpointError) as caught:
        quantize(job(model), variant(method), tmp_path / "out")
    assert (
        f"tensor 'model.layers.1.mlp.up_proj.weight' of {model / 'model.safetensors'} is {value} at index [5, 7]"
        in (str(caught.value))
    )
    assert hidden_names(tmp_path) == []


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_activations_that_overflow_name_layer_and_calibration_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str, method: str
) -> None:
    """What one token is looked up as overflows; only one row holds that token."""
    look_up = torch.nn.Embedding.forward

    def overflowing(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        return look_up(self, ids).masked_fill((ids == 7).unsqueeze(-1), float("inf"))

    monkeypatch.setattr(torch.nn.Embedding, "forward", overflowing)
    rows = [[each if each != 7 else 8 for each in row] for row in tiny_rows()]
    rows[4][11] = 7
    with pytest.raises(QuantizationError) as caught:
        quantize(job(model, inputs, rows=rows), variant(method), tmp_path / "out")
    line = str(caught.value)
    assert "its input is NaN or infinite for token 11 of calibration row 4" in line
    assert "model.layers." in line
    assert hidden_names(tmp_path) == []


def test_a_matrix_that_cannot_be_factorized_is_named_with_the_damping_tried(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sweep the variant fails alone."""
    real = torch.linalg.cholesky_ex

    def failing(matrix: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        real(matrix, out=out)
        out[1].fill_(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    wanted = [Wanted(variant(damping=0.03), tmp_path / "v"), Wanted(variant("rtn", name="rtn"), tmp_path / "rtn")]
    failed, fine = quantize_together(job(model, "float"), wanted)
    assert str(failed).startswith(
        "v: model.layers.0.self_attn.q_proj: the statistics of a layer's inputs cannot be factorized at any damping "
        "from 0.03 to 10"
    )
    assert not isinstance(fine, Exception)
    assert hidden_names(tmp_path) == []


# Clocks and changing files


def test_a_clock_that_jumps_back_breaks_no_seconds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    monkeypatch.setattr(time, "time_ns", lambda: next(now) * 10**9)
    facts = quantize(job(model), variant(), tmp_path / "out").facts
    assert 0 < facts["seconds_own"] < 600
    assert 0 < facts["seconds_shared"] < 600


def test_durations_are_never_taken_from_the_wall_clock() -> None:
    package = Path(walking.__file__).parents[1]
    sources = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert [path.name for path, text in sources.items() if "time.time(" in text or "import time as" in text] == []


def test_a_calibration_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n')
    from quantkit.records.dataset import collect

    def slow(*given: Any) -> Any:
        data.write_text('{"text": "one"}\n{"text": "two"}\n')
        return collect(*given)

    monkeypatch.setattr(files, "collect", slow)
    with pytest.raises(CalibrationError, match=r"data.jsonl changed while it was read \(run the same command when"):
        files.read_file(data)


# The memory of the GPU; the CPU stands in for it


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """Strategy, batches and offload of each walk that is begun."""
    found: list[tuple[str, int, bool]] = []
    run = Walk.run

    def noted(self: Walk) -> None:
        found.append((self.settings.strategy, len(self.batches), self.settings.parking is not None))
        run(self)

    monkeypatch.setattr(Walk, "run", noted)
    return found


def full_until(monkeypatch: pytest.MonkeyPatch, attempts: list[Any], count: int, block: int = 1) -> None:
    """Solving a block runs out of memory in so many walks."""
    solve = Solver.solve

    def full(self: Solver, segment: Any, *given: Any, **keys: Any) -> None:
        if len(attempts) <= count and segment.prefix.endswith(f".{block}"):
            raise torch.OutOfMemoryError(ASKED)
        solve(self, segment, *given, **keys)

    monkeypatch.setattr(Solver, "solve", full)


ROWS = tiny_rows(count=64, shortest=48, longest=48)
STEPS = [
    ("one-pass", 3, False),
    ("recompute", 3, False),
    ("recompute", 4, False),
    ("recompute", 8, False),
    ("recompute", 14, False),
    ("recompute", 14, True),
]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_less_memory_is_tried_step_by_step_from_the_block_where_it_ran_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[Any], steps: int
) -> None:
    whole = quantize(job(model, rows=ROWS), variant(), tmp_path / "whole" / "out")
    attempts.clear()
    full_until(monkeypatch, attempts, steps)
    notes: list[str] = []
    segments: list[tuple[int, int]] = []
    done = quantize(
        job(model, rows=ROWS),
        variant(),
        tmp_path / "out",
        on_note=notes.append,
        on_segment=lambda *counts: segments.append(counts),
    )
    assert attempts == STEPS[: steps + 1]
    assert segments == [(1, 2)] * (steps + 1) + [(2, 2)]
    assert len(notes) == steps
    assert notes == [note for note in done.facts["notes"] if note.startswith("the memory of cpu ran out: ")]
    assert any("bytes may differ" in note for note in notes) == (steps > 1)
    if steps == 1:
        for name in ("model.safetensors", "manifest.json"):
            assert (done.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert hidden_names(tmp_path) == []


def test_a_run_that_goes_on_after_less_memory_sums_as_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[Any]
) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=3)
    full_until(monkeypatch, attempts, 2)
    undisturbed = quantize(job(model, rows=ROWS), variant(), tmp_path / "whole" / "out")

    def cut(done: int, total: int) -> None:
        if done == 2 and len(attempts) == 3:
            raise KeyboardInterrupt

    attempts.clear()
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model, rows=ROWS), variant(), tmp_path / "out", on_segment=cut)
    assert attempts == STEPS[:3]
    notes: list[str] = []
    done = quantize(job(model, rows=ROWS), variant(), tmp_path / "out", on_note=notes.append)
    assert attempts == [*STEPS[:3], STEPS[2]]
    assert "batches of 1024 tokens instead of 2048" in notes[1]
    for name in ("model.safetensors", "manifest.json"):
        assert (done.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()
    assert read_json(done.folder / "manifest.json")["batch_tokens"] == [2048, 1024]
    assert done.facts["batch_tokens"] == [2048, 1024]


def test_where_nothing_helps_the_line_has_the_numbers_and_what_is_saved_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[Any]
) -> None:
    full_until(monkeypatch, attempts, len(STEPS))
    with pytest.raises(QuantizationError) as caught:
        quantize(job(model, rows=ROWS), variant(), tmp_path / "out")
    assert attempts == STEPS
    assert str(caught.value).startswith(
        "the memory of cpu is too small even for small batches with activations on the CPU: 20.00 MiB were asked for, "
        "12.00 MiB of 79.10 GiB are free (close what else uses the device"
    )
    assert layers_folder(tmp_path / "out").exists()
    attempts[:] = [None] * len(STEPS)
    assert quantize(job(model, rows=ROWS), variant(), tmp_path / "out").facts["resumed"] == 1


def test_a_variant_whose_own_work_does_not_fit_fails_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError(ASKED)

    monkeypatch.setattr("quantkit.methods.gptq.Gptq.quantize", full)
    wanted = [Wanted(variant(), tmp_path / "v"), Wanted(variant("rtn", name="rtn"), tmp_path / "rtn")]
    failed, fine = quantize_together(job(model, "float"), wanted)
    assert str(failed).startswith("v: the memory of cpu is too small even for small batches")
    assert not isinstance(fine, Exception)


def test_activations_that_wait_elsewhere_change_no_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.engine.parking import Parking
    from quantkit.engine.passes import AtSegment, Pass
    from quantkit.quantization.oom import FallbackStep

    moved: set[int] = set()

    def spied(_: Parking, each: Pass) -> None:
        if isinstance(each.place, AtSegment):
            moved.add(each.place.index)
            hidden = each.place.args[0]
            hidden.data = hidden.data.clone()  # as a move does: another memory behind the same tensor

    whole = quantize(job(model), variant("awq+gptq"), tmp_path / "whole" / "out")
    monkeypatch.setattr(Parking, "park", spied)
    only = FallbackStep(2048, "recompute", offload=True, is_last=True)
    monkeypatch.setattr(walking, "fallback_steps", lambda *_, **__: [only])
    done = quantize(job(model), variant("awq+gptq"), tmp_path / "out")
    assert moved == {0, 1}
    assert (done.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def test_a_full_disk_is_told_from_a_mistake(tmp_path: Path) -> None:
    from quantkit.system.os_errors import may_pass, translated_os_errors

    with pytest.raises(OutputError) as caught, translated_os_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert may_pass(caught.value)
    assert may_pass(KeyboardInterrupt())
    assert not may_pass(QuantizationError("the numbers went wrong"))
