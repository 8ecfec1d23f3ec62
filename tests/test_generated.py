"""Calibration tokens that the float model writes itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.engine.precision import pass_dtype
from quantkit.engine.walk import Walk
from quantkit.errors import EvaluationError, QuantizationError
from quantkit.methods.tuning import GENERATED
from quantkit.quantization import Job, generated, quantize, walks
from quantkit.quantization.generated import generated_tokens
from quantkit.quantization.job import made_from
from quantkit.quantization.resume import layers_folder
from quantkit.recipe import VariantSpec
from quantkit.runtimes._model import TransformersModel
from quantkit.runtimes._writing import Writing, write_rows
from quantkit.system.artifacts import file_sha256, read_json
from tests.runs import edit_json
from tests.tiny import make_model, tiny_rows

TUNED: dict[str, Any] = {"method": "gptq", "tune": {"steps": 2}}
QUICK = {"search": 1, "refinements": 0, "correction": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("model"), "qwen2")
    edit_json(folder / "config.json", lambda config: config.update(bos_token_id=1, eos_token_id=[2, 3]))
    return folder


@pytest.fixture(autouse=True)
def forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "_written", {})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The rows of each walk, as it was given them."""
    walked: list[list[list[int]]] = []
    run = Walk.run

    def ran(self: Walk) -> None:
        lengths = [batch.lengths or [batch.token_ids.shape[1]] * len(batch.rows) for batch in self.batches]
        pairs = zip(self.batches, lengths, strict=True)
        walked.append([row[:n].tolist() for batch, some in pairs for row, n in zip(batch.token_ids, some, strict=True)])
        run(self)

    monkeypatch.setattr(Walk, "run", ran)
    return walked


def job(model: Path, **changes: Any) -> Job:
    given: dict[str, Any] = {"rows": tiny_rows(), "calibration_sha256": "0" * 64, "device": "cpu"}
    return Job(model, {"reference": "tiny"}, "float32", **(given | changes))


def variant(name: str = "v", **keys: Any) -> VariantSpec:
    quick = QUICK if "gptq" in keys["method"] else {}
    return VariantSpec.model_validate({"name": name, "group_size": 32, **quick, **keys})


def asked(model: Path, **changes: Any) -> Writing:
    given: dict[str, Any] = {"rows": 4, "length": 20, "firsts": (5, 6, 7, 8), "threads": 1}
    return Writing(str(model), "cpu", "float32", **(given | changes))


def test_a_model_writes_the_same_rows_again(model: Path) -> None:
    rows = write_rows(asked(model))
    assert rows == write_rows(asked(model))
    assert [len(row) for row in rows] == [20] * 4
    assert [row[0] for row in rows] == [5, 2, 7, 3], "a row of the data set, the end of a text, and so on"
    assert len({token for row in rows for token in row}) > 20, "tokens are drawn, not the likeliest one again and again"


def test_a_tuned_variant_is_calibrated_on_rows_of_both_kinds(model: Path, tmp_path: Path, seen: list[Any]) -> None:
    rows = tiny_rows()
    done = quantize(job(model), variant(**TUNED), tmp_path / "tuned")
    tokens = sum(map(len, rows))
    (walked,) = seen
    assert all(row in walked for row in rows)
    written = [row for row in walked if row not in rows]
    assert tokens // 2 - len(written) < sum(map(len, written)) <= tokens // 2
    assert {row[0] for row in written} <= {row[0] for row in rows} | {1, 2, 3}
    told = f"calibrated also on {sum(map(len, written)):,} tokens that the float model wrote itself"
    assert told in done.facts["notes"]


def test_who_is_calibrated_on_what_the_model_writes(model: Path) -> None:
    tuned, plain, rounded = (variant(method=method) for method in ("gptq+tune", "gptq", "rtn"))
    numbers = {
        given: [generated_tokens(job(model, generated=given), each, 90_000, 11_008) for each in (tuned, plain, rounded)]
        for given in (None, 0, 500)
    }
    assert numbers == {None: [GENERATED, 0, 0], 0: [0, 0, 0], 500: [500, 500, 0]}
    few, enough = (generated_tokens(job(model), tuned, tokens, 64) for tokens in (300, 1024))
    assert (few, enough) == (150, 0)


def test_a_number_that_was_asked_for_is_written_for_every_method(model: Path, tmp_path: Path, seen: list[Any]) -> None:
    quantize(job(model, generated=100, audit={"rows": 6}), variant(method="gptq"), tmp_path / "out")
    assert sum(map(len, seen[0])) == sum(map(len, tiny_rows())) + 100
    assert read_json(tmp_path / "out" / "calibration.json") == {"rows": 6, "generated_tokens": 100}
    assert read_json(tmp_path / "out" / "manifest.json")["generated_tokens"] == 100


def test_the_number_is_of_the_identity_where_it_counts(model: Path) -> None:
    tuned, plain = variant(**TUNED), variant(method="gptq")
    identity = made_from(job(model), plain)
    assert identity == made_from(job(model, generated=0), plain) != made_from(job(model, generated=9), plain)
    assert len({str(made_from(job(model, generated=given), tuned)) for given in (None, 0, 9)}) == 3


def test_variants_on_generated_tokens_have_a_walk_of_their_own(model: Path) -> None:
    variants = [variant(method=method) for method in ("rtn", "gptq+tune", "gptq", "awq", "awq+tune")]
    assert walks(job(model, inputs="float"), variants) == [[0, 2, 3], [1, 4]]
    assert walks(job(model, inputs="float", generated=0), variants) == [[0, 2, 3], [1, 4]], "of batches of their own"
    assert walks(job(model, inputs="float", generated=64), variants) == [[0], [1, 4], [2, 3]]


def test_a_run_that_goes_on_has_the_rows_that_it_began_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(job(model), variant(**TUNED), tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), variant(**TUNED), tmp_path / "cut", on_segment=stop)
    assert (layers_folder(tmp_path / "cut") / generated.FILE).is_file()
    generated._written.clear()

    def never(*_: Any) -> Any:
        raise AssertionError("the rows are there")

    monkeypatch.setattr(generated, "write_rows", never)
    done = quantize(job(model), variant(**TUNED), tmp_path / "cut")
    assert done.facts["resumed"] == 1
    digests = [file_sha256(each.folder / "model.safetensors") for each in (whole, done)]
    assert digests[0] == digests[1]


def test_variants_of_a_process_share_what_was_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Writing] = []

    def counted(wanted: Writing) -> list[list[int]]:
        calls.append(wanted)
        return write_rows(wanted)

    monkeypatch.setattr(generated, "write_rows", counted)
    for bits in (4, 8):
        quantize(job(model), variant(**TUNED, bits=bits), tmp_path / str(bits))
    assert len(calls) == 1


@pytest.mark.parametrize("reason", ["memory", "code"])
def test_where_the_model_cannot_write_a_note_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Any], reason: str
) -> None:
    def broken(wanted: Writing) -> list[list[int]]:
        raise ZeroDivisionError("a bug\nof many lines")

    if reason == "memory":
        monkeypatch.setattr(generated, "free_bytes", lambda *_: 1000)
    else:
        monkeypatch.setattr(generated, "write_rows", broken)
    done = quantize(job(model), variant(**TUNED), tmp_path / "automatic")
    start = "the float model writes no calibration tokens: "
    dtype = str(pass_dtype(torch.device("cpu"), torch.float32)).removeprefix("torch.")
    ends = {"memory": f"in {dtype}, and 1000 B are free", "code": "ZeroDivisionError: a bug"}
    (note,) = [note for note in done.facts["notes"] if note.startswith(start)]
    assert note.endswith(ends[reason])
    assert sum(map(len, seen[0])) == sum(map(len, tiny_rows()))
    with pytest.raises(QuantizationError, match=start) as raised:
        quantize(job(model, generated=64), variant(method="gptq"), tmp_path / "asked")
    assert "--generated" in raised.value.remedy
    done = quantize(job(model, generated=64), variant(method="rtn"), tmp_path / "rtn")
    assert not [note for note in done.facts["notes"] if start in note], "what needs no rows wants none"


def test_a_larger_model_writes_in_a_process_of_its_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = generated._write(job(model), asked(model))
    assert here.rows
    monkeypatch.setattr(generated, "SMALL", 0)
    monkeypatch.setattr(generated, "write_rows", lambda wanted: [[0]])
    monkeypatch.setattr(generated, "KEPT_BYTES", 0)
    assert generated._write(job(model), asked(model)).rows == here.rows
    lost = generated._write(job(model), replace(asked(model), model=str(model / "lost")))
    assert (
        lost.note
        == f"the float model writes no calibration tokens: {model / 'lost'} is not a checkpoint: it has no config.json"
    )


def test_a_cache_that_says_other_things_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TransformersModel._forward

    def forgetful(self: TransformersModel, ids: torch.Tensor, **state: Any) -> Any:
        found = forward(self, ids, **state)
        found["logits"] = torch.randn_like(found["logits"])
        return found

    monkeypatch.setattr(TransformersModel, "_forward", forgetful)
    with pytest.raises(EvaluationError, match="says other things with its cache than without"):
        write_rows(asked(model))


def test_placeholders_of_pictures_are_never_written(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sees"
    shutil.copytree(model, folder)
    edit_json(folder / "config.json", lambda config: config.update(image_token_id=9, video_token_index=11))
    before = {token for row in write_rows(asked(model, rows=32)) for token in row}
    after = {token for row in write_rows(asked(folder, rows=32)) for token in row}
    assert {9, 11} <= before
    assert not {9, 11} & after
