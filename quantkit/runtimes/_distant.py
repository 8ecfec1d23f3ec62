"""A model that a process of another interpreter has loaded, and how it is asked.

The process is one of a script that imports nothing of quantkit, such as ``_vllm_script.py``. Each request is a line of
JSON on its standard input and each answer one on its standard output; logits come in a safetensors file. Its standard
input is its lifeline too (:mod:`quantkit.system.worker`), so that it ends with this process, however that ends. All
that it prints goes to this process's standard error.
"""

from __future__ import annotations

import json
import os
import queue
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quantkit.errors import EvaluationError
from quantkit.runtimes.base import LoadedModel, Throughput
from quantkit.system import processes
from quantkit.system.child import BEAT, Child
from quantkit.system.child_log import BoundedLog, last_line
from quantkit.system.ending import Ending, Kind

LOGITS = "logits.safetensors"
"""The file of logits in a process's folder, with one tensor of that name."""
GENERIC_REMEDY = "free some memory, lower evaluation.context_length, or take smaller evaluation.batch_sizes"
ELSEWHERE = "score it with loader auto or reference"
SILENCE = 3600.0
"""Seconds: a process that neither answers nor prints for so long hangs."""
WORDS = {
    "load": "load the checkpoint",
    "logits": "give logits",
    "generate": "continue texts",
    "begin": "begin a text",
    "more": "go on with a text",
    "weights": "tell what its weights take",
}
"""Requests, as a person reads them."""


class Server:
    """A process that answers requests.

    Args:
        name: of the runtime, for messages.
        command: its command line, to which its folder is appended.
        environment: all variables that it has.
        no_memory: what can be done where it runs out of memory.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], no_memory: str = GENERIC_REMEDY
    ) -> None:
        self.name, self._no_memory = name, no_memory
        self._folder = tempfile.TemporaryDirectory(prefix=f"quantkit-{name}-")
        self.folder = Path(self._folder.name)
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._log = _Echoed(self.folder / "log")
        self._killed_before = processes.killed_for_memory()
        self._failure: EvaluationError | None = None
        self._child: Child | None = None
        try:
            self._child = Child(
                [*command, str(self.folder)], environment, self._answers.put, log=self._log, cwd=self.folder
            )
        except OSError as error:
            self.close()
            raise EvaluationError(f"{name} cannot be started by {command[0]}: {error.strerror}") from error
        self.pid = self._child.process.pid

    def ask(self, do: str, **keys: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            EvaluationError: it cannot do what is asked, with its reason; or it has ended, and how; or it hangs.
        """
        if self._child is None:
            closed = EvaluationError(f"{self.name} has been closed, and cannot {WORDS[do]}")
            raise closed if self._failure is None else EvaluationError(self._failure.problem, self._failure.remedy)
        answer = self._answer(self._child, do, json.dumps({"do": do, **keys}).encode() + b"\n")
        if not answer:
            raise self._ended(self._child, do)
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise EvaluationError(
                f"{self.name} cannot {WORDS[do]}: {found['error']}", self._no_memory if found.get("memory") else ""
            )
        return found

    def _answer(self, child: Child, do: str, request: bytes) -> bytes:
        """The line that comes; an empty one where the process has ended.

        What it has started may live on and hold its standard output, so that the end of that tells nothing.
        """
        asked = time.monotonic()
        with suppress(OSError):  # it has ended, as the lack of an answer says
            child.send(request)
        while True:
            try:
                answer = self._answers.get(timeout=BEAT)
            except queue.Empty:
                if child.has_ended():
                    return b""
                if time.monotonic() - max(asked, self._log.heard) > SILENCE:
                    raise self._failed(self._hangs(do), ELSEWHERE) from None
            else:
                return answer if answer.endswith(b"\n") else b""

    def _hangs(self, do: str) -> str:
        last = last_line(self.folder / "log")
        return f"{self.name} was asked to {WORDS[do]} and said nothing for {SILENCE / 60:.0f} minutes; last: {last}"

    def _ended(self, child: Child, do: str) -> EvaluationError:
        """Why there is no answer."""
        child.end(patient=False)
        status = int(child.process.returncode)
        by_kernel = status < 0 and processes.killed_for_memory() > self._killed_before
        kind = Kind.NO_MEMORY if by_kernel else Kind.SIGNAL if status < 0 else Kind.ERROR
        ending = Ending(kind, status, 0.0, 0, "", None, self.folder / "log")
        guess = "" if kind is Kind.NO_MEMORY else "the system most likely ran out of memory: "
        remedy = f"{guess}{self._no_memory}" if ending.how.startswith("SIGKILL") else ""
        found = f"{self.name} was asked to {WORDS[do]} and ended ({ending.how}): {ending.last_error()}"
        return self._failed(found, remedy)

    def _failed(self, problem: str, remedy: str) -> EvaluationError:
        """Close it; whoever asks from now on is told the same."""
        self.close()
        self._failure = EvaluationError(problem, remedy)
        return self._failure

    def close(self) -> None:
        """End the process, and take its files away."""
        child, self._child = self._child, None
        if child is not None:
            child.end(patient=False)
        if self.folder.is_dir():
            with suppress(OSError):  # the disk is full, and the log goes anyway
                self._log.close()
            self._folder.cleanup()


class _Echoed(BoundedLog):
    """A log that this process prints as well.

    Attributes:
        heard: when the last of it came, of :func:`time.monotonic`.
    """

    heard = 0.0

    def write(self, piece: bytes) -> None:
        """Add some bytes."""
        self.heard = time.monotonic()
        super().write(piece)
        with suppress(OSError):  # nobody need read it; who is not read from stands still
            os.write(2, piece)


class DistantModel(LoadedModel):
    """A checkpoint that a server has loaded.

    Args:
        server: that is asked; it is closed with the model, or where it cannot load.
        job: what it is to load: ``checkpoint``, ``dtype``, ``context_length``, ``batch``, ``trust_remote_code``. It
            answers with ``vocabulary``, ``dtype``, ``device``, ``weights_bytes``, ``threads``, ``versions``,
            ``settings`` and ``dropped``.

    Raises:
        EvaluationError: it cannot be loaded.
    """

    def __init__(self, server: Server, job: Mapping[str, Any]) -> None:
        self._server = server
        self.process = server.pid
        try:
            self._told = server.ask("load", **job)
        except BaseException:
            server.close()
            raise
        self._context = int(job["context_length"])
        self.vocabulary = int(self._told["vocabulary"])
        self.dtype, self.device = str(self._told["dtype"]), str(self._told["device"])
        self.settings, self.dropped = dict(self._told["settings"]), tuple(self._told["dropped"])

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits as the runtime's own kernels give them, on the CPU; see :meth:`LoadedModel.logits`.

        Raises:
            EvaluationError: it cannot, or its file of them is broken.
        """
        self._server.ask("logits", ids=ids.tolist())
        try:
            found: torch.Tensor = load_file(self._server.folder / LOGITS)["logits"]
        except (SafetensorError, OSError, KeyError) as error:
            raise EvaluationError(f"{self._server.name} wrote no logits that can be read: {error}") from error
        return found

    def prefill(self, ids: torch.Tensor) -> None:
        """Read the tokens and draw one; see :meth:`LoadedModel.prefill`."""
        self._server.ask("generate", rows=[ids.tolist()], count=1)

    def decode(self, prompt: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        """Continue greedily by the runtime's own sampler; see :meth:`LoadedModel.decode`."""
        found = self._server.ask("generate", rows=[prompt.tolist()], count=count + 1)
        return found["ids"][0][:count], found["seconds"][1:]

    def throughput(self, rows: torch.Tensor, count: int) -> Throughput:
        """Seconds by the clock of the process; see :meth:`LoadedModel.throughput`."""
        found = self._server.ask("generate", rows=rows.tolist(), count=count + 1)
        if count and len(found["seconds"]) < 2:
            raise EvaluationError(f"{self._server.name} never had all rows at work at once")
        return Throughput(found["seconds"][0], tuple(found["seconds"][1:]))

    def greedy(self, prompt: torch.Tensor) -> Iterator[int]:
        """One token after another by the runtime's own sampler; see :meth:`LoadedModel.greedy`.

        Raises:
            EvaluationError: there is no room for another.
        """
        self._server.ask("begin", ids=prompt.tolist())
        while True:
            token = self._server.ask("more")["id"]
            if token is None:
                raise EvaluationError(f"{self._server.name} was given room for {self._context} tokens, which are full")
            yield int(token)

    def weights_bytes(self) -> int:
        """Bytes of the weights in the memory of the process."""
        return int(self._server.ask("weights")["weights_bytes"])

    def facts(self) -> dict[str, Any]:
        """Versions of the packages of the other interpreter, and its threads."""
        return {**self._told["versions"], "threads": self._told["threads"]}

    def close(self) -> None:
        """End the process."""
        self._server.close()
