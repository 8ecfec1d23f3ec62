"""Where the work of a run is done: elsewhere at the same time, and on nodes of a cluster that die."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel
from typer.testing import CliRunner

import quantkit
from quantkit import pipeline
from quantkit.cli import app
from quantkit.cli.display import Display
from quantkit.engine.empty_model import empty_model
from quantkit.errors import OutputError, QuantkitError, RecipeError
from quantkit.evaluation import stage as scores
from quantkit.pipeline import cluster as clusters
from quantkit.pipeline.cluster_task import Done, Sent, perform
from quantkit.pipeline.several import run_several
from quantkit.pipeline.workers import Here, Task, Work
from quantkit.quantization import Job, Wanted, quantize_together
from quantkit.recipe import Recipe, VariantSpec
from quantkit.system.artifacts import new_folder, write_stage
from quantkit.system.distribution import own_version
from quantkit.system.locks import break_lock, check_held, held, lock_file
from quantkit.system.progress import Named, Observer, Silent, row_of
from quantkit.system.validation import parse_section
from tests.runs import make_recipe, recipe_data, score_here, write_recipe
from tests.tiny import make_model, tiny_rows

VARIANTS: list[dict[str, Any]] = [
    {"name": "gptq", "method": "gptq"},
    {"name": "rtn", "method": "rtn"},
    {"name": "hqq", "method": "hqq"},
    {"name": "misfit", "method": "rtn", "group_size": 128},
    {"name": "q8", "method": "rtn", "bits": 8, "format": "gguf"},
]


class Threads(Here):
    """Has everything asked for at the same time, and does it by what came through pickle, in any order.

    One task is under way at a time: on a cluster each has a process of its own, and here they share one, of which
    ``from_pretrained`` replaces ``PreTrainedModel.tie_weights`` and the default dtype for as long as it runs. Two at
    once could leave it so, and no later model of this process would have its head tied.
    """

    parallel = 3

    def __init__(self) -> None:
        self.titles: list[str] = []
        self._process = threading.Lock()

    def do(self, task: Task, work: Work[Any], observer: Observer) -> Any:
        self.titles.append(task.title)
        assert all(file.is_file() for file in task.reads), task
        row = row_of(observer, task.title)
        row.placed("there")
        try:
            with self._process:
                return pickle.loads(pickle.dumps(work))(row)
        finally:
            row.close()

    def each(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        return [wait() for wait in [self.soon(job) for job in jobs]]

    def soon(self, job: Callable[[], Any]) -> Callable[[], Any]:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(job()))
        thread.start()

        def result() -> Any:
            thread.join()
            return found[0]

        return result


def tensors(folder: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in sorted(folder.glob("variants/*/*.safetensors"))}


def test_a_run_whose_work_is_done_elsewhere_has_the_same_report(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    changes = {"calibration": {"dataset": str(records), "samples": 12, "max_length": 48, "inputs": "float"}}
    here = pipeline.run(make_recipe(model, records, tmp_path / "here", VARIANTS, **changes), Silent())
    workers = Threads()
    there = pipeline.run(
        make_recipe(model, records, tmp_path / "there", VARIANTS, **changes), Silent(), workers=workers
    )
    walks = [title for title in workers.titles if title.startswith("quantize")]
    assert "quantize: gptq" in walks  # what needs no calibration goes apart
    assert {"baseline: the float model", "evaluate: gptq", "checks"} < set(workers.titles)
    kept = ("name", "status", "metrics", "bits_per_weight", "size_bytes")
    assert [{key: row.get(key) for key in kept} for row in there["variants"]] == [
        {key: row.get(key) for key in kept} for row in here["variants"]
    ]
    assert there["status"] == "failed"  # the misfit
    assert tensors(tmp_path / "there") == tensors(tmp_path / "here")
    events = (tmp_path / "there/logs/events.jsonl").read_text()
    assert '"event": "placed", "task": "quantize: gptq", "host": "there"' in events


def test_several_recipes_run_at_the_same_time(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    recipes = [
        Recipe.of(recipe_data(model, records, tmp_path / name, VARIANTS[1:2]) | {"name": name}) for name in ("b", "a")
    ]
    found = run_several(recipes, Silent(), workers=Threads())
    assert [(each["name"], each["status"]) for each in found["runs"]] == [("b", "ok"), ("a", "ok")]
    assert (tmp_path / "runs.html").is_file()


# Locks of who is given up


def test_who_is_given_up_finds_its_lock_gone_and_leaves_that_of_the_next(tmp_path: Path) -> None:
    out, folders = tmp_path / "out", threading.Barrier(2)
    told: list[BaseException] = []

    def given_up() -> None:
        try:
            with new_folder(out) as folder:
                write_stage(folder, "test", {"by": "the first"})
                folders.wait()
                folders.wait()
        except OutputError as error:
            told.append(error)

    first = threading.Thread(target=given_up)
    first.start()
    folders.wait()
    break_lock(out)
    with held(out, "the second"):
        check_held(out)
        folders.wait()
        first.join()
        assert "was taken over by process" in str(told[0])
        assert not out.exists()
        assert lock_file(out).exists()
        check_held(out)


def test_a_folder_that_is_gone_is_told_in_one_line(tmp_path: Path) -> None:
    with held(tmp_path / "shared/run", "a run", inside=True):
        check_held(tmp_path / "shared/run", inside=True)
        shutil.move(tmp_path / "shared", tmp_path / "gone")
        with pytest.raises(OutputError, match=r"the lock of .*shared/run is gone on .*, and maybe the folder with it"):
            check_held(tmp_path / "shared/run", inside=True)


# A cluster of nodes on this machine


def slow_walk(job: Job, wanted: Sequence[Wanted], log: Path, observer: Observer) -> Any:
    """A walk that takes a second a block from the second on, and notes the blocks that it solved."""

    def on_segment(done: int, total: int) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {done}\n")
        observer.progress("block", done, total)
        time.sleep(0.1 if done == 1 else 1.0)

    done = quantize_together(job, wanted, on_segment=on_segment)
    observer.note("last words")
    return done


class Seen(Silent):
    """Calls a function at each step of progress, and keeps notes."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.notes: list[str] = []
        self._on_step = on_step

    def progress(self, step: str, done: int, total: int) -> None:
        self._on_step(done)

    def note(self, text: str) -> None:
        self.notes.append(text)


@contextmanager
def cluster_of_two() -> Iterator[Any]:
    """A head without processors, and two nodes of one each, of which Ray soon sees if they die."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    health = {"initial_delay_ms": 500, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 4}
    settings = {f"health_check_{name}": value for name, value in health.items()}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": settings}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, include_dashboard=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.mark.filterwarnings("default")  # Ray's own
@pytest.mark.skipif(sys.platform != "linux", reason="nodes are killed with their processes")
def test_a_walk_whose_node_is_killed_is_taken_up_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "180")  # on a machine that is busy
    model = make_model(tmp_path / "model", num_hidden_layers=6)
    spec = parse_section(VariantSpec, {"name": "gptq", "method": "gptq", "group_size": 32}, "test")
    job = Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, device="cpu")
    log, shared = tmp_path / "blocks", tmp_path / "shared"
    shared.mkdir()
    wanted = Wanted(spec, shared / "gptq")
    with cluster_of_two() as nodes, clusters.joined(nodes.address) as workers, workers.share(shared):
        by_id = {node.node_id: node for node in nodes.worker_nodes}
        killed: list[str] = []

        def kill(done: int) -> None:
            if done >= 2 and not killed:
                (running,) = workers._running.values()
                killed.append(running.node)
                node = by_id[running.node]
                raylets = [each.process for each in node.all_processes["raylet"]]
                inside = [child for each in raylets for child in psutil.Process(each.pid).children(recursive=True)]
                for each in [*raylets, *inside]:
                    os.kill(each.pid, signal.SIGKILL)

        observer = Seen(kill)
        task = Task("quantize: gptq", "cpu", memory=1 << 20, reads=(model / "config.json",), outputs=(wanted.out,))
        (done,) = workers.do(task, partial(slow_walk, job, [wanted], log), observer)
        assert killed
        assert any(note.startswith("quantize: gptq: it was lost on node ") for note in observer.notes)
        assert "quantize: gptq: last words" in observer.notes
        with pytest.raises(QuantkitError, match="asks for 1 GPUs, and no node has more than 0"):
            workers.do(Task("walk", "cuda"), partial(slow_walk, job, [wanted], log), Silent())
        shutil.move(shared, tmp_path / "elsewhere")
        with pytest.raises(OutputError, match=r"no node of the cluster sees .*shared"):
            workers.do(task, partial(slow_walk, job, [wanted], log), observer)
        shutil.move(tmp_path / "elsewhere", shared)
    solved = [line.split() for line in log.read_text().splitlines()]
    first = [int(block) for process, block in solved if process == solved[0][0]]
    second = [int(block) for process, block in solved if process != solved[0][0]]
    assert first == list(range(1, len(first) + 1))
    assert done.facts["resumed"] >= len(first)  # what was on disk was not solved again
    assert len(first) < 6
    assert second == [1, 2, 3, 4, 5, 6]
    undisturbed = quantize_together(job, [Wanted(spec, tmp_path / "alone")])[0]
    assert not isinstance(undisturbed, Exception)
    for file in undisturbed.folder.glob("*.safetensors"):
        assert file.read_bytes() == (done.folder / file.name).read_bytes()


def test_a_task_waits_for_nothing_of_ray_which_would_give_its_processor_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = SimpleNamespace(get_node_id=lambda: "a-node")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get_runtime_context=lambda: here))
    monkeypatch.chdir(tmp_path)
    told: list[tuple[Any, ...]] = []
    board = SimpleNamespace(put=SimpleNamespace(remote=lambda *event: told.append(event)))

    def work(observer: Observer) -> int:
        observer.note("at work")
        return 3

    done = perform(Sent(work, own_version(), torch.get_num_threads(), (), tmp_path), "key", board)
    assert (done.value, done.told) == (3, 1)
    assert [event[:2] for event in told] == [("key", "placed"), ("key", "note")]


def test_without_ray_the_extra_is_named(model: Path, records: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    data = recipe_data(model, records, tmp_path / "run", VARIANTS[1:2])
    with pytest.raises(QuantkitError, match=r"pip install 'quantkit-ptq\[cluster\]'"):
        quantkit.run(data, cluster="auto")
    written = str(write_recipe(tmp_path / "demo.yaml", data))
    for command in ([written], [written, "--json"], [written, "--page", str(tmp_path / "page.html")]):
        result = CliRunner().invoke(app, ["run", *command, "--cluster", "auto"])
        assert result.exit_code == 2
        assert "quantkit-ptq[cluster]" in result.stderr


def test_results_in_object_storage_are_refused() -> None:
    with pytest.raises(RecipeError, match="s3://bucket/run is not a folder of a disk"):
        Recipe.of({"name": "a", "model": "m", "variants": [{"name": "v"}], "report": {"folder": "s3://bucket/run"}})


@pytest.mark.parametrize("live", [True, False])
def test_the_table_says_what_runs_where(live: bool) -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=live, width=120)) as display:
        rows = [row_of(Named(display, "demo"), title) for title in ("quantize: a", "quantize: b")]
        for row, host in zip(rows, ("node-1", "node-2"), strict=True):
            row.placed(host)
            row.progress("block", 1, 3)
        rows[0].note("warning: something")
        if live:
            display._bars.refresh()
        for row in rows:
            row.close()
    told = out.getvalue()
    for host, title in (("node-1", "quantize: a"), ("node-2", "quantize: b")):
        assert f"demo: {title} on {host}" in told
        assert f"demo: {title}: ended after" in told
    assert "warning: demo: quantize: a: something" in told
    if live:
        assert "block 1/3" in told


# Who is to blame, without Ray


class Scripted(clusters.Cluster):
    """A cluster of nodes a and b without Ray, on which tasks end as told."""

    def __init__(self, ends: Callable[[Sent], Done]) -> None:
        self._ends, self._marks, self._running = ends, [], {}
        self._blind, self._dead, self._threads, self._board = set(), set(), 1, None
        self._stopped, self._inhabited, self._broken = threading.Event(), time.monotonic(), None
        self._ray = self._remote = self

    def options(self, **_: Any) -> Scripted:
        return self

    def remote(self, sent: Sent, *_: Any) -> Sent:
        return sent

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node, "Alive": True, "Resources": {"CPU": 1}} for node in "ab"]

    def _awaited(self, reference: Any, key: str) -> Done:
        return self._ends(reference)


def nothing(_: Observer) -> str:
    """What nobody calls."""
    return ""


def test_a_run_that_ends_blames_no_node_that_has_not_begun_with_another(tmp_path: Path) -> None:
    asked: list[int] = []
    ended = ExitStack()

    def ends(sent: Sent) -> Done:
        asked.append(len(sent.marks))
        ended.close()  # while the task waits for a processor
        missing = next((mark for mark in sent.marks if not mark.is_file()), None)
        return Done("a", "host-a", value="done", missing=missing)

    workers = Scripted(ends)
    (tmp_path / "first").mkdir()
    ended.enter_context(workers.share(tmp_path / "first"))
    with workers.share(tmp_path):
        assert workers.do(Task("walk"), nothing, Silent()) == "done"
    assert asked == [2, 1]
    assert not workers._blind


def test_a_node_that_sees_less_is_left_out_and_none_for_what_is_nowhere(tmp_path: Path) -> None:
    model = tmp_path / "config.json"
    nodes = iter("aab")

    def ends(sent: Sent) -> Done:
        node = next(nodes)
        return Done(node, f"host-{node}", value="done", missing=None if node == "b" else model)

    workers, observer = Scripted(ends), Seen(lambda _: None)
    with pytest.raises(OutputError, match="no node of the cluster sees"):
        workers.do(Task("walk", reads=(model,)), nothing, observer)
    assert not workers._blind
    model.touch()
    assert workers.do(Task("walk", reads=(model,)), nothing, observer) == "done"
    assert workers._blind == {"a"}
    assert any("node host-a does not see" in note for note in observer.notes)


def test_a_task_does_not_wait_for_a_cluster_without_nodes() -> None:
    workers = Scripted(lambda _: Done("a", "host-a"))
    workers.wait = lambda *_, **__: ([], [])  # type: ignore[attr-defined]
    workers.exceptions = SimpleNamespace(RayTaskError=QuantkitError, RayError=OSError)  # type: ignore[attr-defined]
    workers._running["key"] = clusters._Running(row_of(Silent(), "walk"))
    workers._inhabited -= 2 * clusters.DESERTED
    with pytest.raises(QuantkitError, match="no node is left in the cluster"):
        clusters.Cluster._awaited(workers, None, "key")


def test_what_a_slow_board_gives_is_heard_and_an_observer_that_fails_is_told() -> None:
    """An answer that takes long is waited for, and not asked for again."""
    answers = iter([False, True, True])
    asked: list[int] = []
    workers = Scripted(lambda _: Done("a", "host-a"))
    workers.exceptions = SimpleNamespace(RayTaskError=QuantkitError, RayError=OSError)  # type: ignore[attr-defined]

    def take() -> int:
        asked.append(1)
        return len(asked)

    workers._board = SimpleNamespace(take=SimpleNamespace(remote=take))
    told = {1: [("key", "placed", "a", "host-a"), ("key", "note", "first")], 2: [("key", "progress", "block", 1, 2)]}
    workers.wait = lambda refs, **_: (refs if next(answers) else [], [])  # type: ignore[attr-defined]
    workers.get = told.get  # type: ignore[attr-defined]

    def fail(_: int) -> None:
        raise ValueError("a display that is gone")

    observer = Seen(fail)
    workers._running["key"] = running = clusters._Running(row_of(observer, "walk"))
    workers._listen()
    assert observer.notes == ["walk: on host-a", "walk: first"]
    assert (running.node, running.heard, len(asked)) == ("a", 2, 2)
    with pytest.raises(ValueError, match="a display that is gone"):
        clusters.Cluster._awaited(workers, None, "key")


def test_runs_at_the_same_time_build_one_model_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers changes meanwhile is the whole process's: the default dtype, and how weights begin."""
    building, most = [0], []
    from_config = PreTrainedModel._from_config.__func__

    def watched(cls: Any, *given: Any, **keys: Any) -> Any:
        building[0] += 1
        most.append(building[0])
        time.sleep(0.05)
        made = from_config(cls, *given, **keys)
        building[0] -= 1
        return made

    monkeypatch.setattr(PreTrainedModel, "_from_config", classmethod(watched))
    threads = [threading.Thread(target=empty_model, args=(model,)) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert most == [1, 1, 1]
