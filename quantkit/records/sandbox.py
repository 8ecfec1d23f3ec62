"""Templates and patterns, handled by a process of their own that has little time, little memory and nothing to reach.

A chat template is code of whoever published the model, and that of a task of whoever wrote the task. Jinja's sandbox
keeps it from Python's internals, and cannot keep it from never ending: one operation, such as ``9 ** 9 ** 9``, is a
single call that no signal, trace function or other thread can end. A process can be ended, whatever it does and from
whichever thread it was asked. The same holds for a regular expression that tries every way of matching. The process is
started once, serves every template and pattern, and is started again where it had to be ended.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.system.child import Child

WORKER = Path(__file__).with_name("sandbox_worker.py")
SECONDS = 10.0
"""Seconds that one text may take."""
START_SECONDS = 60.0
"""Seconds that the process may take to start, on a loaded machine."""
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
"""Variables that the process inherits; tokens and passwords stay here."""


class TemplateFailure(Exception):  # noqa: N818 - told to people by who asked, as an error of theirs
    """A template or pattern was refused, failed, or was ended; the text says which."""


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], seconds: float | None = None
) -> str:
    """The text that a chat template makes of a conversation, as ``apply_chat_template`` of transformers makes it.

    Args:
        template: Jinja source.
        messages: mappings with ``role`` and ``content``, a text or a list of parts.
        variables: further variables, as JSON data: special tokens, ``add_generation_prompt``.
        seconds: that it may take; ``SECONDS`` by default.

    Raises:
        TemplateFailure: it is broken, does what it may not, or takes more time, memory or room than a text needs.
    """
    given = {"tools": None, "documents": None, **variables, "messages": list(messages)}
    return _rendered({"kind": "chat", "template": template, "given": given}, seconds)


def render_task(template: str, document: Mapping[str, Any], seconds: float | None = None) -> str:
    """The text that a template of a task makes of a document, as ``apply_template`` of lm-evaluation-harness makes it.

    Args:
        template: Jinja source.
        document: variables; those that are no JSON data, such as dates, are given as their texts.
        seconds: that it may take; ``SECONDS`` by default.

    Raises:
        TemplateFailure: as for :func:`render_chat`.
    """
    return _rendered({"kind": "task", "template": template, "given": dict(document)}, seconds)


def find_all(pattern: str, text: str, flags: int) -> list[Any]:
    """As :func:`re.findall`.

    Args:
        pattern: of whoever wrote the task.
        text: to search.
        flags: of :mod:`re`.

    Raises:
        TemplateFailure: the pattern is broken, or takes more time or memory than a text needs.
    """
    request = {"kind": "find", "pattern": pattern, "text": text, "flags": flags}
    found = _asked(request, "found")
    return [tuple(each) if isinstance(each, list) else each for each in found]


def substitute(pattern: str, replacement: str, text: str, flags: int) -> str:
    """As :func:`re.sub`; see :func:`find_all`."""
    request = {"kind": "replace", "pattern": pattern, "replacement": replacement, "text": text, "flags": flags}
    return str(_asked(request, "text"))


def _rendered(request: dict[str, Any], seconds: float | None) -> str:
    return str(_asked(request, "text", seconds))


def _asked(request: dict[str, Any], wanted: str, seconds: float | None = None) -> Any:
    answer = _RENDERER.ask(request, seconds or SECONDS)
    if wanted not in answer:
        failure = TemplateEnded if answer.get("ended") else TemplateFailure
        raise failure(str(answer["error"]))
    return answer[wanted]


class TemplateEnded(TemplateFailure):
    """A template or pattern had to be ended, as it took more time or memory than there is."""


class _Renderer:
    """The process, started when it is first asked; one asks at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._owner = 0
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer, or one that says why there is none."""
        with self._lock:
            child = self._running()
            try:
                return self._asked(child, json.dumps(request, default=str).encode() + b"\n", seconds)
            except BaseException:
                self.close()
                raise

    def _asked(self, child: Child, line: bytes, seconds: float) -> dict[str, Any]:
        try:
            child.send(line)
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.close()
            return {"error": f"it takes more than {seconds:g} seconds", "ended": True}
        except OSError:
            answer = b""
        if not answer:
            self.close()
            return {"error": "it takes more memory or time than a text needs", "ended": True}
        found: dict[str, Any] = json.loads(answer)
        return found

    def _running(self) -> Child:
        if self._child is None or self._owner != os.getpid() or self._child.has_ended():
            return self._start()
        return self._child

    def _start(self) -> Child:
        if self._owner == os.getpid():
            self.close()
        else:  # the first in this process; the one of a process that forked this one is that one's
            atexit.register(self.close)
        self._owner, self._answers = os.getpid(), queue.SimpleQueue()
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        child = self._child = Child([sys.executable, "-P", str(WORKER)], kept, self._answers.put)
        try:
            ready = self._answers.get(timeout=START_SECONDS)
        except queue.Empty:
            ready = b""
        if not ready:
            self.close()
            raise TemplateFailure("the process that renders templates does not start")
        return child

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.end(patient=False)


_RENDERER = _Renderer()
