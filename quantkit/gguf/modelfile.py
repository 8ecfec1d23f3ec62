"""The ``Modelfile`` from which Ollama makes a model of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable


def modelfile(name: str, stops: Iterable[str]) -> str:
    """A Modelfile beside a GGUF file.

    There is no TEMPLATE: without one Ollama takes the chat template of the file.

    Args:
        name: of the file.
        stops: the tokens that end a turn.
    """
    lines = [f"FROM ./{name}", *(f"PARAMETER stop {_quoted(stop)}" for stop in stops)]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'
