from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.engine.batches import BATCH_TOKENS
from quantkit.engine.crew import Crew
from quantkit.engine.routing import ExpertSettings
from quantkit.engine.solver import Solver
from quantkit.errors import QuantizationError, RecipeError
from quantkit.quantization import Job, Wanted, helpers, quantize_together
from quantkit.quantization.resume import layers_folder
from quantkit.recipe import QuantizationSpec, VariantSpec
from quantkit.system import post
from quantkit.system.artifacts import write_json
from quantkit.system.child import Child
from quantkit.system.devices import resolve_devices
from quantkit.system.validation import parse_section
from tests.architectures import make
from tests.tiny import make_model, tiny_rows, tiny_tokenizer

BATCH = 192
"""Tokens of a batch, so that tiny rows make several."""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", BATCH)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers are forks of this process, which have imported all that they need."""
    monkeypatch.setattr(helpers, "_helper", _forked)
    monkeypatch.setattr(helpers, "live_no_longer_than_the_parent", lambda: None)


class _Fork:
    """What :mod:`quantkit.quantization.helpers` asks of a child."""

    def __init__(self, job: Path) -> None:
        self._process = get_context("fork").Process(target=lambda: sys.exit(helpers.main([str(job)])))
        self._process.start()
        self.process = self
        self.returncode: int | None = None

    def has_ended(self) -> bool:
        return self._process.exitcode is not None

    def end(self, *, patient: bool = False) -> None:
        self._process.kill()
        self._process.join()
        self.returncode = self._process.exitcode


@contextmanager
def _forked(folder: Path, rank: int, devices: list[torch.device], *, nccl: bool) -> Iterator[Any]:
    job = folder / f"{rank}.json"
    given = {"rank": rank, "size": len(devices), "device": "cpu", "nccl": nccl, "threads": torch.get_num_threads()}
    write_json(job, given)
    (folder / f"{rank}.log").touch()
    made = _Fork(job)
    try:
        yield made
    finally:
        made.end()


def variant(method: str = "gptq", **keys: Any) -> VariantSpec:
    name = method.replace("+", "-")
    return parse_section(VariantSpec, {"name": name, "method": method, "group_size": 32, **keys}, "test")


def job(model: Path, devices: int | None, rows: int = 24, **changes: Any) -> Job:
    given: dict[str, Any] = {"rows": tiny_rows(rows), "calibration_sha256": "0" * 64, "device": "cpu"}
    return Job(model, {"reference": "tiny"}, "float32", **(given | {"devices": devices} | changes))


def quantized(given: Job, variants: list[VariantSpec], out: Path) -> dict[str, bytes]:
    """The tensors of each variant, as their files have them."""
    for each in quantize_together(given, [Wanted(spec, out / spec.name) for spec in variants]):
        if isinstance(each, Exception):
            raise each
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in sorted(out.glob("*/*.safetensors"))}


CASES: dict[str, tuple[str, dict[str, Any], list[VariantSpec], int]] = {
    "true sequential, corrected": ("llama", {}, [variant()], 2),
    "true sequential, inputs and caches rounded": (
        "llama",
        {},
        [variant(bits=8, group_size=-1, activations="static", kv_cache="fp8_head")],
        2,
    ),
    "scaled and corrected, more devices than a turn fills": ("llama", {}, [variant("awq+gptq")], 3),
    "several variants": (
        "llama",
        {"inputs": "float"},
        [variant(), variant("awq"), variant("rtn", range="weighted"), variant("hqq")],
        2,
    ),
    "experts": ("mixtral", {}, [variant(ignore=["lm_head"])], 2),
    "experts, float inputs, shown all": (
        "mixtral",
        {"inputs": "float", "experts": ExpertSettings("all", 0.5)},
        [variant(ignore=["lm_head"])],
        3,
    ),
}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("case", CASES)
def test_several_processes_write_the_bytes_of_one(case: str, llama: Path, tmp_path: Path) -> None:
    family, changes, variants, devices = CASES[case]
    model = llama
    if family != "llama":
        model = tmp_path / family
        made = make(model, family)
        made.save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
    wanted = quantized(job(model, None, **changes), variants, tmp_path / "one")
    assert quantized(job(model, devices, **changes), variants, tmp_path / "several") == wanted
    assert len(wanted) == len(variants)


@pytest.mark.usefixtures("forked")
def test_groups_and_batches_are_dealt_out(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved, mine = [], []
    solve, dealt = Solver.solve, Crew.mine

    def counted(self: Solver, segment: Any, groups: Any, *rest: Any, **keys: Any) -> None:
        solved.append(len(groups))
        solve(self, segment, groups, *rest, **keys)

    def told(self: Crew, batches: Any) -> Any:
        mine.append((len(dealt(self, batches)), len(batches)))
        return dealt(self, batches)

    monkeypatch.setattr(Solver, "solve", counted)
    monkeypatch.setattr(Crew, "mine", told)
    quantized(job(llama, 2, inputs="float"), [variant()], tmp_path)
    assert 0 < sum(solved) < 2 * 4  # two blocks of four groups each
    assert all(0 < own < whole for own, whole in mine)


@pytest.mark.usefixtures("forked")
def test_a_failure_elsewhere_drops_the_variant_and_leaves_the_others(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, gptq = os.getpid(), type(variant().build_method())
    quantize = gptq.quantize

    def failing(self: Any, *given: Any) -> Any:
        if os.getpid() != here:
            raise QuantizationError("cannot be factorized")
        return quantize(self, *given)

    monkeypatch.setattr(gptq, "quantize", failing)
    wanted = [Wanted(variant(), tmp_path / "gptq"), Wanted(variant("hqq"), tmp_path / "hqq")]
    failed, done = quantize_together(job(llama, 2, inputs="float"), wanted)
    assert isinstance(failed, QuantizationError)
    assert "cannot be factorized" in str(failed)
    assert not isinstance(done, Exception)
    with pytest.raises(QuantizationError, match="cannot be factorized"):
        quantized(job(llama, 2, inputs="float"), [variant()], tmp_path / "alone")


def test_a_process_that_dies_is_one_line_and_the_next_run_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = quantized(job(llama, None), [variant()], tmp_path / "one")
    monkeypatch.setitem(BATCH_TOKENS, "cpu", BATCH)
    found: list[int] = []
    child = Child

    def noted(*given: Any, **keys: Any) -> Any:
        made = child(*given, **keys)
        found.append(made.process.pid)
        return made

    def kill(done: int, total: int) -> None:
        if done == 1:
            os.kill(found[-1], signal.SIGKILL)

    monkeypatch.setattr(helpers, "Child", noted)
    run: Callable[..., Any] = partial(quantize_together, job(llama, 2), [Wanted(variant(), tmp_path / "two" / "gptq")])
    (failed,) = _outcome(partial(run, on_segment=kill))
    told = "the process of device 2 of 2 (cpu) was ended by SIGKILL; the last that it said: (the log is empty)"
    assert str(failed).startswith(told)
    assert (layers_folder(tmp_path / "two" / "gptq") / "model.layers.0").is_dir()
    assert quantized(job(llama, None), [variant()], tmp_path / "two") == wanted


def test_a_process_that_dies_before_it_has_come_is_one_line(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child

    def killed(*given: Any, **keys: Any) -> Any:
        made = child(*given, **keys)
        os.kill(made.process.pid, signal.SIGKILL)
        return made

    monkeypatch.setattr(helpers, "Child", killed)
    (failed,) = _outcome(partial(quantize_together, job(llama, 2), [Wanted(variant(), tmp_path / "gptq")]))
    assert str(failed).startswith("the process of device 2 of 2 (cpu) was ended by SIGKILL")
    assert "beside the output" not in str(failed)


@pytest.mark.usefixtures("forked")
def test_a_device_that_is_full_while_others_send_is_told_as_that(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, sent, calls = os.getpid(), post.Post._sent, []

    def full(self: Any, *given: Any) -> Any:
        calls.append(1)
        if os.getpid() != here and len(calls) > 3:
            raise torch.OutOfMemoryError("no room for what was sent")
        return sent(self, *given)

    monkeypatch.setattr(post.Post, "_sent", full)
    (failed,) = _outcome(partial(quantize_together, job(llama, 2), [Wanted(variant(), tmp_path / "gptq")]))
    assert isinstance(failed.__cause__, torch.OutOfMemoryError)


def _outcome(run: Callable[[], Any]) -> list[Any]:
    try:
        found: list[Any] = run()
    except QuantizationError as error:
        return [error]
    return found


@pytest.mark.usefixtures("forked")
def test_what_cannot_be_dealt_runs_on_one_device(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "Post", None)  # which nobody may ask for
    notes: list[str] = []

    def told(given: Job, spec: VariantSpec, name: str) -> list[str]:
        notes.clear()
        quantize_together(given, [Wanted(spec, tmp_path / name)], on_note=notes.append)
        return [note for note in notes if "devices" in note]

    assert told(job(llama, 2), variant("rtn"), "rtn") == []
    few = "the walk takes 1 of 2 devices: it has no more than 1 batch"
    assert told(job(llama, 2, rows=1), variant(), "one") == [few]
    tuned = variant("rtn", tune={"steps": 1})
    why = "the walk takes 1 of 2 devices: what tunes or learns goes from batch to batch"
    assert told(job(llama, 2), tuned, "tuned") == [why]


def test_devices_of_a_recipe() -> None:
    def spec(**keys: Any) -> QuantizationSpec:
        return parse_section(QuantizationSpec, keys, "quantization")

    assert spec(devices=["gpu:0", "cuda1"]).devices == ("cuda:0", "cuda:1")
    assert spec(devices="all").devices == "all"
    assert spec(device="cpu", devices=2).devices == 2
    for wrong in (["cpu", "cuda:0"], ["auto"], 0, 65, "some", [], True, 2.5, ["cuda:x"], [1]):
        with pytest.raises(RecipeError) as caught:
            spec(devices=wrong)
        assert not caught.value.others, wrong
    with pytest.raises(RecipeError, match=r"devices: 0 is neither all, nor how many, from 1 to 64, nor a list"):
        spec(devices=0)
    with pytest.raises(RecipeError, match="not both"):
        spec(device="cpu", devices=["cpu"])
    cpu = torch.device("cpu")
    assert resolve_devices("cpu", 3) == [cpu] * 3
    assert resolve_devices("cpu", "all") == resolve_devices("cpu", None) == [cpu]


def _posted(rank: int, folder: Path) -> None:
    mine = post.Post(folder, rank, 3, torch.device("cpu"))
    others = [other for other in range(3) if other != rank]
    found = mine.exchange({to: {"who": (rank, to), "what": [torch.full((2, 3), 10.0 * rank + to)]} for to in others})
    right = all(
        got["who"] == (who, rank) and bool((got["what"][0] == 10.0 * who + rank).all()) for who, got in found.items()
    )
    empty = mine.exchange({}) == dict.fromkeys(others)
    failed = QuantizationError("it is over", "begin anew")
    try:
        if rank == 2:
            raise failed
        mine.exchange({})
        told = False
    except QuantizationError as error:
        told = str(error) == str(failed)
        if error is failed:
            mine.fail(error)
    os._exit(0 if right and empty and told else 1)


def test_processes_exchange_objects_and_hear_of_failures(tmp_path: Path) -> None:
    processes = [get_context("fork").Process(target=_posted, args=(rank, tmp_path)) for rank in range(3)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(60)
    assert [each.exitcode for each in processes] == [0, 0, 0]


def _forged(rank: int, folder: Path) -> None:
    mine = post.Post(folder, rank, 2, torch.device("cpu"))
    if rank == 1:
        mine._key = b"of somebody else"
    try:
        mine.exchange({1 - rank: "letter"})
    except post.LostError as error:
        if rank == 1:
            time.sleep(60)  # what it sent is to arrive
        os._exit(0 if "from another process" in str(error.__cause__) else 1)
    os._exit(1)


def _stopped(rank: int, folder: Path) -> None:
    mine = post.Post(folder, rank, 2, torch.device("cpu"))
    if rank == 1:
        time.sleep(60)  # it solves
        os._exit(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    begun = time.monotonic()
    try:
        mine.exchange({})
    except KeyboardInterrupt:
        os._exit(0 if time.monotonic() - begun < 30 else 1)
    os._exit(1)


@pytest.mark.parametrize("work", [_forged, _stopped])
def test_letters_are_signed_and_a_wait_hears_a_request_to_stop(work: Callable[..., None], tmp_path: Path) -> None:
    processes = [get_context("fork").Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for each in processes:
        each.start()
    processes[0].join(60)
    processes[1].kill()
    assert processes[0].exitcode == 0
