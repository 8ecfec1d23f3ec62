"""A cluster, by Ray: pieces of work become tasks, and what was at work on a node that dies is taken up by another.

A task is a function with its arguments; what it makes lies in the run's folder, which all nodes share. Ray repeats
nothing by itself: a task that is lost is sent again from here, after the locks of its outputs are taken from whoever
may still live there and not know that it is given up. That one finds the lock gone before it writes again, and ends.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quantkit.errors import OutputError, QuantkitError
from quantkit.pipeline.cluster_task import Board, Done, Sent, perform, ready
from quantkit.pipeline.store import Store
from quantkit.pipeline.store_workers import ThroughStore
from quantkit.pipeline.workers import HERE, Task, Work, Workers
from quantkit.system import threads as threads_of
from quantkit.system.distribution import install_line, own_version
from quantkit.system.locks import break_lock
from quantkit.system.progress import Observer, Row, row_of
from quantkit.system.shutdown import Terminated, heed, patient

T = TypeVar("T")
ATTEMPTS = 4
"""How often a task is begun at most, if its node dies each time."""
BEAT = 0.25
"""Seconds between two looks at tasks and at what they tell."""
LAST_WORDS = 10.0
"""Seconds that what a task told at its end is waited for."""
LOOK_AT_NODES = 2.0
"""Seconds between two looks at which nodes live."""
DESERTED = 60.0
"""Seconds without any node that could work, after which nobody waits for one."""
NODE = "ray.io/node-id"
"""The label by which Ray knows a node."""


@dataclass(slots=True)
class _Running:
    """A task under way: where it is shown, where it runs once that is known, and how much was heard of it."""

    row: Row
    node: str = ""
    host: str = ""
    heard: int = 0


class _LostError(Exception):
    """A task is lost with its node."""


class Cluster:
    """The nodes of a Ray cluster; see :class:`quantkit.pipeline.workers.Workers`.

    Args:
        ray: the module, connected.
        threads: of each task.

    Raises:
        QuantkitError: no node has as many processors.
    """

    def __init__(self, ray: Any, threads: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._threads = ray, threads
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        self._remote = ray.remote(perform)
        self._marks: list[Path] = []
        self._running: dict[str, _Running] = {}
        self._blind: set[str] = set()
        self._dead: set[str] = set()
        self._stopped = threading.Event()
        self._inhabited = time.monotonic()
        self._broken: Exception | None = None
        self.parallel = int(sum(node["Resources"].get("CPU", 0) // threads for node in self._nodes()))
        if not self.parallel:
            raise QuantkitError(
                f"no node of the cluster has {threads} processors, which each task takes", f"set {threads_of.COUNT}=1"
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._begin()

    def _begin(self) -> None:
        """Have each worker load its packages, while this process reads the model; how that ends is nobody's concern."""
        options = {**self._options(Task("", "cpu")), "num_gpus": 0}
        for _ in range(self.parallel):
            self._ray.remote(ready).options(**options).remote()

    def close(self) -> None:
        """End what is still under way."""
        self._stopped.set()
        self._listener.join()
        with suppress(Exception):  # the cluster may be gone
            self._ray.kill(self._board)

    # Work

    @contextmanager
    def share(self, folder: Path) -> Iterator[None]:
        """Inside the block, nodes work that see a file in the folder of the run."""
        mark = folder.absolute() / f".shared-{uuid.uuid4().hex}.lock"
        mark.touch()
        self._marks.append(mark)
        try:
            yield
        finally:
            self._marks.remove(mark)
            mark.unlink(missing_ok=True)

    def keep(self, files: Sequence[Path]) -> None:
        """They lie beside folders that all share."""

    def do(self, task: Task, work: Work[T], observer: Observer) -> T:
        """Have it done by a node, and by another one where that dies.

        Raises:
            QuantkitError: no node can do it, or each that tried died.
        """
        row = row_of(observer, task.title)
        try:
            for _ in range(ATTEMPTS):
                running = _Running(row)
                try:
                    done = self._attempted(task, work, running)
                except _LostError as error:
                    where = f"on node {running.host}" if running.host else "with its node"
                    row.note(f"it was lost {where} and is begun again: {error}")
                    for output in task.outputs:
                        break_lock(output)
                    continue
                if done.error is not None:
                    raise done.error
                value: T = done.value
                return value
        finally:
            row.close()
        raise QuantkitError(f"{task.title}: it was lost {ATTEMPTS} times", "look at the logs of the cluster")

    def each(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Call functions in threads of their own, which wait for what they have done elsewhere."""
        if not jobs:
            return []
        with ThreadPoolExecutor(len(jobs)) as pool, self._ending():
            futures = [pool.submit(job) for job in jobs]
            self._await(futures)
            return [future.result() for future in futures]

    def soon(self, job: Callable[[], T]) -> Callable[[], T]:
        """Call a function in a thread of its own."""
        pool = ThreadPoolExecutor(1)
        future = pool.submit(job)
        pool.shutdown(wait=False)

        def result() -> T:
            with self._ending():
                self._await([future])
            return future.result()

        return result

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """A request to stop, which comes to the main thread, ends all that is under way."""
        is_main = threading.current_thread() is threading.main_thread()
        try:
            with patient() if is_main else nullcontext():
                yield
        except (KeyboardInterrupt, SystemExit):
            self._stopped.set()
            raise

    def _await(self, futures: Sequence[Future[Any]]) -> None:
        while wait(futures, timeout=BEAT).not_done:
            if threading.current_thread() is threading.main_thread():
                heed()

    # A task

    def _attempted(self, task: Task, work: Work[Any], running: _Running) -> Done:
        """How an attempt ended, when all that it told was heard."""
        key = uuid.uuid4().hex  # of its own, as one that is given up may still tell something
        self._running[key] = running
        try:
            done, until = self._outcome(task, work, key), time.monotonic() + LAST_WORDS
            while running.heard < done.told and self._broken is None and time.monotonic() < until:
                time.sleep(BEAT / 5)
            return done
        finally:
            self._running.pop(key)

    def _outcome(self, task: Task, work: Work[Any], key: str) -> Done:
        """How it ended on a node that sees what it needs."""
        while True:
            marks = (*self._marks, *(path.absolute() for path in task.reads))
            sent = Sent(work, own_version(), self._threads, marks, Path.cwd())
            reference = self._remote.options(**self._options(task)).remote(sent, key, self._board)
            done = self._awaited(reference, key)
            if done.missing is None:
                return done
            reads = (path.absolute() for path in task.reads)
            if done.missing not in (*self._marks, *reads):
                continue  # it was the mark of a run that ended while this waited for a node
            folder = done.missing.parent
            if done.missing.is_file():
                self._blind.add(done.node)
            if not (self._usable() and done.missing.is_file()):  # where it is not even here, no node is to blame
                raise OutputError(
                    f"no node of the cluster sees {folder}", "give report.folder and the model a shared folder"
                )
            self._running[key].row.note(f"node {done.host} does not see {folder} and is left out")

    def _awaited(self, reference: Any, key: str) -> Done:
        while True:
            if self._stopped.is_set():
                self._cancel(reference)
                raise Terminated
            if self._broken is not None:
                self._cancel(reference)
                raise self._broken
            try:
                if self._ray.wait([reference], timeout=BEAT)[0]:
                    found: Done = self._ray.get(reference)
                    return found
            except self._ray.exceptions.RayTaskError as error:  # what cannot be sent here or there
                said = str(error).strip().splitlines()[-1]
                raise QuantkitError(f"the task could not be run on a node: {said}") from error
            except self._ray.exceptions.RayError as error:
                raise _LostError(_first_line(error)) from error
            if self._running[key].node in self._dead:
                self._cancel(reference)
                raise _LostError("Ray counts it as dead")
            if not self._running[key].node and time.monotonic() - self._inhabited > DESERTED:
                self._cancel(reference)
                raise QuantkitError("no node is left in the cluster, or Ray does not answer", "see 'ray status'")

    def _cancel(self, reference: Any) -> None:
        with suppress(Exception):  # it may have ended, and so may its node
            self._ray.cancel(reference, force=True)

    def _options(self, task: Task) -> dict[str, Any]:
        """What Ray is asked for."""
        usable = self._usable()
        gpus = self._gpus(task, max((node["Resources"].get("GPU", 0) for node in usable), default=0))
        most = max((node["Resources"].get("memory", 0) for node in usable), default=0)
        variables = {threads_of.COUNT: str(self._threads), **threads_of.PASSIVE, "TQDM_DISABLE": "1"}
        left_out = sorted(self._blind | self._dead)
        return {
            "num_cpus": self._threads,
            "num_gpus": gpus,
            "memory": 0 if gpus else int(min(task.memory, most)),
            "max_retries": 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": variables},
            **({"label_selector": {NODE: f"!in({','.join(left_out)})"}} if left_out else {}),
        }

    def _gpus(self, task: Task, most: float) -> int:
        """How many GPUs a task takes; ``auto`` takes one where nodes have some."""
        named = task.devices if isinstance(task.devices, tuple) else ()
        if "cpu" in (task.device, *named) or (not most and task.device == "auto" and not named):
            return 0
        wanted = int(most) if task.devices == "all" else task.devices if isinstance(task.devices, int) else 1
        wanted = len(named) or wanted
        if wanted > most:
            raise QuantkitError(
                f"{task.title} asks for {wanted} GPUs, and no node has more than {int(most)}",
                "set quantization.device and evaluation.device to cpu or auto",
            )
        return wanted

    # Nodes

    def _nodes(self) -> list[dict[str, Any]]:
        """The nodes that live."""
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _usable(self) -> list[dict[str, Any]]:
        """Those that see the folders, and have processors."""
        nodes = [node for node in self._nodes() if node["Resources"].get("CPU", 0) >= self._threads]
        return [node for node in nodes if node["NodeID"] not in self._blind]

    def _listen(self) -> None:
        """Pass on what tasks tell, and see which nodes die."""
        looked, asked = 0.0, None
        while not self._stopped.wait(BEAT):
            asked = self._board.take.remote() if asked is None else asked
            try:
                if self._ray.wait([asked], timeout=LOOK_AT_NODES)[0]:  # what was taken is in no other answer
                    told, asked = self._ray.get(asked), None
                    for event in told:
                        self._hear(*event)
            except self._ray.exceptions.RayError:
                asked = None  # whoever waits for a task hears of it
            except Exception as error:  # an observer's, which those that wait for tasks raise
                self._broken = error
                return
            if time.monotonic() - looked >= LOOK_AT_NODES:
                looked = time.monotonic()
                with suppress(Exception):  # as long as Ray does not answer there is no node
                    self._dead |= {node["NodeID"] for node in self._ray.nodes() if not node["Alive"]}
                    self._inhabited = looked if self._usable() else self._inhabited

    def _hear(self, key: str, kind: str, *told: Any) -> None:
        running = self._running.get(key)
        if running is None:
            return
        if kind == "placed":
            running.node, running.host = told
            running.row.placed(running.host)
        else:
            running.heard += 1
            getattr(running.row, kind)(*told)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def joined_through(address: str | None, url: str | None) -> Iterator[Workers]:
    """Inside the block, the cluster at an address, whose nodes share object storage, or folders without a ``url``.

    Without an address it is this process that works.

    Raises:
        QuantkitError: a store is named and no cluster; see :func:`joined` and :class:`quantkit.pipeline.store.Store`.
    """
    if address is None and url is not None:
        raise QuantkitError("a store lies between the nodes of a cluster, and none is named", "add --cluster ADDRESS")
    if address is None:
        yield HERE
        return
    store = None if url is None else Store(url)
    with joined(address) as found:
        yield found if store is None else ThroughStore(found, store)


@contextmanager
def joined(address: str) -> Iterator[Cluster]:
    """Inside the block, the cluster at an address; ``auto`` is the one to which this machine belongs.

    Raises:
        QuantkitError: Ray is not installed, there is no cluster, or its nodes are too small.
    """
    try:
        import ray
    except ImportError as error:
        raise QuantkitError("a cluster is reached by Ray, which is not installed", install_line("cluster")) from error
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise QuantkitError(
                f"no Ray cluster at {address}: {_first_line(error)}",
                "start one with 'ray start --head', or name its address",
            ) from error
    try:
        found = Cluster(ray, _threads(ray))
        try:
            yield found
        finally:
            found.close()
    finally:
        if is_ours:
            ray.shutdown()


def _threads(ray: Any) -> int:
    """Threads of a task: as told for processes here, or as many as the smallest node has processors."""
    asked = os.environ.get(threads_of.COUNT, "").partition(",")[0].strip()
    sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return int(asked) if asked.isdecimal() and int(asked) else min((size for size in sizes if size), default=1)
