"""A variant that was cut short goes on where it was, and its bytes are those of a run that nobody disturbed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.engine.segment import Segment
from quantkit.engine.solver import Solver
from quantkit.errors import OutputError, QuantizationError
from quantkit.quantization import Job, Quantized, Wanted, quantize, quantize_together
from quantkit.quantization import job as jobs
from quantkit.quantization import resume as resuming
from quantkit.quantization import walk_variants as walking
from quantkit.quantization.resume import layers_folder
from quantkit.quantization.segments import save_segment
from quantkit.quantization.solved_layers import EXACT
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import file_sha256, read_json
from quantkit.system.locks import held
from quantkit.system.shutdown import Terminated, request
from tests.runs import edit_json, hidden_names
from tests.tiny import make_model, tiny_rows

BLOCKS = 3
INT4 = {"group_size": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", **INT4},
    "awq+gptq": {"method": "awq+gptq", **INT4, "ignore": ["lm_head", "o_proj"]},
    "awq": {"method": "awq", **INT4, "ignore": []},
    "hqq": {"method": "hqq", "symmetric": False, **INT4},
    "order": {"method": "gptq", "desc_act": True, "format": "gptq", **INT4},
    "correction": {"method": "gptq", "correction": True, **INT4},
    "middle": {"method": "gptq", "ignore": [r"layers\.1\."], **INT4},
    "gguf": {"method": "gptq", "format": "gguf", "embeddings": {"bits": 8}, **INT4},
    "gguf1": {"method": "gptq", "format": "gguf", "symmetric": False, "zeros": "float", **INT4},
    "int8": {"method": "gptq", "bits": 8, "group_size": -1, "format": "bitsandbytes", "activations": "dynamic"},
    "nvfp4": {"method": "gptq", "scheme": "nvfp4", "activations": "static"},
    "rtn": {"method": "rtn", **INT4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=BLOCKS)


def job(model: Path, inputs: str = "quantized", **changes: Any) -> Job:
    given: dict[str, Any] = {"rows": tiny_rows(), "calibration_sha256": "0" * 64, "device": "cpu", "inputs": inputs}
    return Job(model, {"reference": "tiny"}, "float32", **(given | changes))


def variant(name: str, **changes: Any) -> VariantSpec:
    return VariantSpec.model_validate({"name": name.replace("+", "-"), **VARIANTS[name], **changes})


def cut_after(blocks: int) -> Callable[[int, int], None]:
    def on_segment(done: int, total: int) -> None:
        if done == blocks:
            raise KeyboardInterrupt

    return on_segment


def digests(folder: Path) -> dict[str, str]:
    """Every file but the one that tells times."""
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != "stage.json"}


def facts(folder: Path) -> Any:
    """What does not depend on time and interruptions."""
    found = read_json(folder / "stage.json")["facts"]
    own = ("seconds", "seconds_own", "seconds_shared", "walk_variants", "resumed")
    kept = {key: value for key, value in found.items() if key not in own}
    return kept | {"notes": [note for note in found["notes"] if "went on after" not in note]}


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a variant that nobody interrupted; each is made once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return lambda name: quantize(job(model), variant(name), folder / name / "out").folder


@pytest.mark.parametrize(
    ("name", "blocks"), [("gptq", 1), ("gptq", 3), ("awq+gptq", 1), *((name, 2) for name in VARIANTS)]
)
def test_a_variant_goes_on_where_it_was_cut_short(
    model: Path,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    blocks: int,
) -> None:
    whole = undisturbed(name)
    solved: list[str] = []
    solve = Solver.solve

    def counted(self: Solver, segment: Segment, *given: Any, **keys: Any) -> None:
        solved.append(segment.prefix)
        solve(self, segment, *given, **keys)

    monkeypatch.setattr(Solver, "solve", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), variant(name), tmp_path / "cut" / "out", on_segment=cut_after(blocks))
    before = set(solved)
    solved.clear()
    notes: list[str] = []
    done = quantize(job(model), variant(name), tmp_path / "cut" / "out", on_note=notes.append)
    assert not before & set(solved)
    assert digests(tmp_path / "cut" / "out") == digests(whole)
    assert facts(tmp_path / "cut" / "out") == facts(whole)
    assert hidden_names(tmp_path) == []
    if done.facts["resumed"]:
        assert f"went on after a run that ended early, with {done.facts['resumed']} of" in notes[0]
        assert notes[0].removeprefix(f"{variant(name).name}: ") in done.facts["notes"]


def test_what_a_format_cannot_hold_exactly_lies_beside_what_it_stores(model: Path, tmp_path: Path) -> None:
    for name, has_exact in (("gptq", False), ("int8", True)):
        with pytest.raises(KeyboardInterrupt):
            quantize(job(model), variant(name), tmp_path / name, on_segment=cut_after(BLOCKS))
        blocks = (layers_folder(tmp_path / name) / f"model.layers.{index}" for index in range(BLOCKS))
        headers = [(block / "model.safetensors").read_bytes() for block in blocks]
        # of int8 scales the format holds all but one of a hundred and thirty exactly: a block may have none
        assert any(f".{EXACT}codes".encode() in header for header in headers) == has_exact


@pytest.mark.parametrize("name", ["gptq", "awq+gptq", "correction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_either_strategy_goes_on_from_the_other(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(walking, "pass_dtype", lambda *_: dtype)
    monkeypatch.setattr(jobs, "pass_dtype", lambda *_: dtype)
    quantize(job(model), variant(name), tmp_path / "whole" / "out")
    monkeypatch.setattr(walking, "choose_strategy", lambda *_: "recompute")
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), variant(name), tmp_path / "cut" / "out", on_segment=cut_after(1))
    monkeypatch.setattr(walking, "choose_strategy", lambda *_: "one-pass")
    assert quantize(job(model), variant(name), tmp_path / "cut" / "out").facts["resumed"] == 1
    assert digests(tmp_path / "cut" / "out") == digests(tmp_path / "whole" / "out")


def test_seconds_are_the_sum_of_what_was_spent(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), variant("gptq"), tmp_path / "out", on_segment=cut_after(2))
    records = [layers_folder(tmp_path / "out") / f"model.layers.{block}" / "segment.json" for block in range(2)]
    assert all(seconds > 0 for record in records for seconds in read_json(record)["seconds"])
    edit_json(records[1], lambda record: record.update(seconds=[1000.0, 500.0]))
    found = quantize(job(model), variant("gptq"), tmp_path / "out").facts
    assert 1000 < found["seconds_own"] < 1400
    assert 500 < found["seconds_shared"] < 900
    assert found["seconds"] == pytest.approx(found["seconds_own"] + found["seconds_shared"])


# Sweeps


def swept(job: Job, out: Path, names: list[str], **keys: Any) -> dict[str, Quantized | Exception]:
    wanted = [Wanted(variant(name), out / name) for name in names]
    return dict(zip(names, quantize_together(job, wanted, **keys), strict=True))


def test_a_sweep_goes_on_from_the_block_that_the_last_of_its_variants_misses(model: Path, tmp_path: Path) -> None:
    names = ["gptq", "awq+gptq", "awq", "hqq", "gguf", "rtn"]
    inputs = job(model, "float")
    whole = swept(inputs, tmp_path / "whole", names)
    with pytest.raises(KeyboardInterrupt):
        swept(inputs, tmp_path / "cut", names[:4], on_segment=cut_after(1))
    with pytest.raises(KeyboardInterrupt):
        swept(inputs, tmp_path / "cut", names[:2], on_segment=cut_after(2))
    notes: list[str] = []
    cut = swept(inputs, tmp_path / "cut", names, on_note=notes.append)
    for name in names:
        here, there = cut[name], whole[name]
        assert isinstance(here, Quantized), here
        assert isinstance(there, Quantized), there
        assert digests(here.folder) == digests(there.folder), name
        assert facts(here.folder) == facts(there.folder), name
        assert here.facts["resumed"] == {"gptq": 2, "awq+gptq": 2, "awq": 1, "hqq": 1}.get(name, 0)
    assert len([note for note in notes if "went on after a run" in note]) == 3
    assert notes[0].startswith("gptq, awq-gptq: went on after a run that ended early, with 2 of 3 segments")
    assert hidden_names(tmp_path) == []


def test_a_variant_whose_segments_are_all_there_needs_no_walk(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), variant("gptq"), tmp_path / "out", on_segment=cut_after(BLOCKS))

    def never(*_: Any) -> None:
        raise AssertionError("a segment was loaded")

    monkeypatch.setattr("quantkit.engine.skeleton.Skeleton.load", never)
    assert quantize(job(model), variant("gptq"), tmp_path / "out").facts["resumed"] == BLOCKS


# What does not fit, and what is broken


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"calibration_sha256": "1" * 64}, "the calibration tokens changed since"),
        ({"source_facts": {"reference": "another"}}, "the model changed since"),
        ({"inputs": "float"}, "calibration.inputs changed since"),
    ],
)
def test_what_was_made_from_something_else_is_not_taken_up(
    model: Path, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), variant("gptq"), tmp_path / "out", on_segment=cut_after(2))
    notes: list[str] = []
    changed = replace(job(model), **change)
    done = quantize(changed, variant("gptq"), tmp_path / "out", on_note=notes.append)
    assert done.facts["resumed"] == 0
    assert notes[0] == f"gptq: starts afresh: an earlier run saved segments, and {reason}"
    quantize(changed, variant("gptq"), tmp_path / "whole" / "out")
    assert digests(done.folder) == digests(tmp_path / "whole" / "out")
    assert hidden_names(tmp_path) == []


def test_other_options_threads_and_versions_are_not_taken_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(**keys: Any) -> list[str]:
        notes: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            quantize(
                job(model), variant("gptq", **keys), tmp_path / "out", on_segment=cut_after(1), on_note=notes.append
            )
        return [note.partition(" segments, and ")[2] for note in notes if "starts afresh" in note]

    assert noted() == []
    assert noted(bits=8) == ["the variant's options changed since"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert noted(bits=8) == ["the processor, its threads or the precision changed since"]
    monkeypatch.setattr(resuming, "version_of", lambda name: "0.0.1")
    assert noted(bits=8) == ["versions of packages changed since"]


@pytest.mark.parametrize("damage", ["a bit", "cut short", "no record", "half a record"])
def test_a_damaged_segment_is_found_and_what_follows_it_dropped(
    model: Path, undisturbed: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), variant("gptq"), tmp_path / "out", on_segment=cut_after(3))
    segment = layers_folder(tmp_path / "out") / "model.layers.1"
    tensors, record = segment / "model.safetensors", segment / "segment.json"
    content = bytearray(tensors.read_bytes())
    if damage == "a bit":
        content[-7] ^= 1
        tensors.write_bytes(content)
    elif damage == "cut short":
        tensors.write_bytes(content[: len(content) // 2])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:40])
    notes: list[str] = []
    done = quantize(job(model), variant("gptq"), tmp_path / "out", on_note=notes.append)
    assert done.facts["resumed"] == 1
    assert "with 1 of 3 segments already solved (a saved one was damaged: " in notes[0]
    assert "model.layers.1/" in notes[0]
    assert digests(done.folder) == digests(undisturbed("gptq"))


def test_a_layer_store_whose_identity_cannot_be_read_is_not_taken_up(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), variant("gptq"), tmp_path / "out", on_segment=cut_after(1))
    (layers_folder(tmp_path / "out") / "identity.json").write_text("[")
    notes: list[str] = []
    assert quantize(job(model), variant("gptq"), tmp_path / "out", on_note=notes.append).facts["resumed"] == 0
    assert notes[0] == "gptq: starts afresh: what an earlier run saved cannot be read"


# Written one behind


def test_a_segment_is_written_while_the_next_is_solved(
    model: Path, undisturbed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is not done before the second is at work, and the third waits for it: one is on its way, no more."""
    whole = undisturbed("gptq")
    begun = {f"model.layers.{block}": threading.Event() for block in range(BLOCKS)}
    saved: list[str] = []
    solve = Solver.solve

    def solving(self: Solver, segment: Segment, *given: Any, **keys: Any) -> None:
        if segment.prefix == "model.layers.2":
            assert "model.layers.0" in saved
        begun[segment.prefix].set()
        solve(self, segment, *given, **keys)

    def saving(folder: Path, *given: Any) -> Any:
        following = begun.get(f"model.layers.{int(folder.name[-1]) + 1}")
        assert following is None or following.wait(60), "nothing was solved while a segment was written"
        saved.append(folder.name)
        return save_segment(folder, *given)

    monkeypatch.setattr(Solver, "solve", solving)
    monkeypatch.setattr("quantkit.quantization.solved_layers.save_segment", saving)
    done = quantize(job(model), variant("gptq"), tmp_path / "out")
    assert saved == list(begun)
    assert digests(done.folder) == digests(whole)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_what_goes_wrong_in_writing_fails_its_variant_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    def full(folder: Path, *given: Any) -> Any:
        if folder == layers_folder(tmp_path / "gptq") / f"model.layers.{block}":
            raise OutputError("No space left on device", "free some disk space")
        return save_segment(folder, *given)

    monkeypatch.setattr("quantkit.quantization.solved_layers.save_segment", full)
    found = swept(job(model, "float"), tmp_path, ["gptq", "rtn"])
    assert "No space left" in str(found["gptq"])
    assert isinstance(found["rtn"], Quantized)
    assert hidden_names(tmp_path) == []


# Cleaning up, and others


def test_segments_stay_where_the_same_command_can_go_on_and_go_where_it_would_fail_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = Solver.solve

    def failing(error: Exception) -> Any:
        def at_the_last_block(self: Solver, segment: Segment, *given: Any, **keys: Any) -> None:
            if segment.prefix.endswith(".2"):
                raise error
            solve(self, segment, *given, **keys)

        return at_the_last_block

    monkeypatch.setattr(Solver, "solve", failing(QuantizationError("the numbers went wrong")))
    with pytest.raises(QuantizationError):
        quantize(job(model), variant("gptq"), tmp_path / "out")
    assert hidden_names(tmp_path) == []
    monkeypatch.setattr(Solver, "solve", failing(MemoryError()))
    with pytest.raises(MemoryError):
        quantize(job(model), variant("gptq"), tmp_path / "out")
    assert layers_folder(tmp_path / "out").exists()
    monkeypatch.setattr(Solver, "solve", solve)
    assert quantize(job(model), variant("gptq"), tmp_path / "out").facts["resumed"] == 2
    assert hidden_names(tmp_path) == []


def test_segments_that_a_killed_run_left_beside_a_finished_checkpoint_are_removed(model: Path, tmp_path: Path) -> None:
    done = quantize(job(model), variant("gptq"), tmp_path / "out")
    (layers_folder(done.folder) / "model.layers.0").mkdir(parents=True)
    assert quantize(job(model), variant("gptq"), tmp_path / "out").reused
    assert hidden_names(tmp_path) == []


def test_a_variant_that_somebody_else_writes_fails_alone(model: Path, tmp_path: Path) -> None:
    inputs = job(model, "float")
    begun, over = threading.Event(), threading.Event()

    def other() -> None:
        with held(tmp_path / "gptq", "somebody's work"):
            begun.set()
            over.wait()

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    found = swept(inputs, tmp_path, ["gptq", "rtn"])
    over.set()
    thread.join()
    assert "is being written by process" in str(found["gptq"])
    assert "(somebody's work)" in str(found["gptq"])
    assert isinstance(found["rtn"], Quantized)
    assert hidden_names(tmp_path) == []


# A request to stop


def test_a_request_to_stop_waits_for_the_end_of_the_block(model: Path, tmp_path: Path) -> None:
    assert not request()  # nobody would look
    asked: list[bool] = []

    def ask(done: int, total: int) -> None:
        asked.extend([request(), request()])

    with pytest.raises(Terminated) as caught:
        quantize(job(model), variant("gptq"), tmp_path / "out", on_segment=ask)
    assert caught.value.code == 143
    assert asked == [True, False]
    assert json.loads((layers_folder(tmp_path / "out") / "model.layers.0" / "segment.json").read_text())["layers"]
    assert quantize(job(model), variant("gptq"), tmp_path / "out").facts["resumed"] == 1
    assert not request()
