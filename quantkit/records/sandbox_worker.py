"""The process that renders templates and matches patterns: run as a file, it imports Jinja and nothing of quantkit.

A chat template has the environment of transformers' ``apply_chat_template``: its filters, functions and tags, with
Jinja's immutable sandbox beneath; a template of a task has that of lm-evaluation-harness, in Jinja's sandbox. A request
is one line of JSON and so is an answer.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from datetime import datetime
from functools import lru_cache
from types import ModuleType
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows: the time alone is limited, from outside
    resource = None

MEMORY = 512 << 20
"""Bytes that the process may take on top of those at its start."""
CPU_SECONDS = 30
"""Seconds of the processor for one text; the other process ends this one long before, if that still lives."""
MAX_TEXT = 32 << 20
"""Characters of a text."""


class TooLongError(Exception):
    """The text has more characters than any conversation."""


class Generation(Extension):
    """``{% generation %}``: what an assistant says; its content is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Any) -> Any:
        """The block's content, as a call of nothing but itself."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        return str(caller())


class TemplateDict:
    """``dict``, without the attributes of the class."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        """As of ``dict``."""
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As of ``dict``."""
        return dict.fromkeys(*args)


def main() -> None:
    """Answer until the input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    environments = {"chat": _chat_environment(), "task": _task_environment()}
    for sample in ("{{ 1 | tojson }}", "{{ nothing.at.all }}", "{% for %}"):  # what Jinja imports late is imported now
        for kind in environments:
            _answered(environments, {"kind": kind, "template": sample, "given": {}})
    _limit()
    _answer(answers, {"ready": True})
    for line in requests:
        _more_time()
        random.seed(line)  # so that a template that draws gives the same text each time
        _answer(answers, _answered(environments, json.loads(line)))


def _answer(stream: Any, content: dict[str, Any]) -> None:
    stream.write(json.dumps(content).encode() + b"\n")
    stream.flush()


def _answered(environments: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a template or a pattern, or the error that says why there is none."""
    try:
        match request["kind"]:
            case "find":
                return {"found": re.findall(request["pattern"], request["text"], request["flags"])}
            case "replace":
                pattern, text = request["pattern"], request["text"]
                return {"text": re.sub(pattern, request["replacement"], text, flags=request["flags"])}
            case kind:
                return {"text": _rendered(_compiled(environments[kind], request["template"]), request["given"])}
    except MemoryError:
        return {"error": "it takes more memory than a text needs"}
    except RecursionError:
        return {"error": "it calls itself too often"}
    except (jinja2.TemplateError, re.error) as error:
        return {"error": str(error)[:500] or type(error).__name__}
    except Exception as error:  # a template may raise whatever it likes
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _rendered(template: Any, given: dict[str, Any]) -> str:
    parts: list[str] = []
    length = 0
    for part in template.generate(given):
        length += len(part)
        if length > MAX_TEXT:
            raise TooLongError(f"its text has more than {MAX_TEXT} characters")
        parts.append(part)
    return "".join(parts)


@lru_cache(maxsize=8)
def _compiled(environment: Any, source: str) -> Any:
    return environment.from_string(source)


def _task_environment() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace
    return environment


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    return re.sub(pattern, repl, string, count=count)


def _chat_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["dict"] = TemplateDict()
    environment.globals["namespace"] = Namespace
    return environment


class Namespace(jinja2.utils.Namespace):
    """``namespace``, without names that begin with an underscore."""

    def __init__(*args: Any, **named: Any) -> None:
        attributes = dict(*args[1:], **named)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _limit() -> None:
    """Limit memory, and allow no file of any size and no further process, where the system can."""
    if resource is None:
        return
    limits = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0, resource.RLIMIT_CORE: 0}
    size = _address_space()
    if size is not None:
        limits[resource.RLIMIT_AS] = size + MEMORY
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (wanted, wanted))


def _address_space() -> int | None:
    """Bytes of address space that the process takes; None where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - pathlib is not imported here
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _more_time() -> None:
    """Give the next text its time on the processor."""
    if resource is None:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = int(usage.ru_utime + usage.ru_stime) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    main()
