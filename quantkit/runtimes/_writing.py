"""The float model writes rows of tokens: ``python -m quantkit.runtimes._writing JOB.json``.

Each token is drawn by its probability, at temperature 1, from the whole vocabulary; a row has a given length and goes
on behind the end of a text. The draws are those of a generator of its own, so that the same model on the same machine
writes the same rows.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.system.worker import Report, serve

SEED = 0x9E37
KEPT_BYTES = 1 << 30
"""That keys and values of the rows which are written together take, if attention is as wide as the model."""
ROWS = 64
"""Rows that are written together at most."""
PLACEHOLDERS = ("image", "video", "audio", "vision")
"""What names of tokens in a config begin with that stand for what is no text."""


@dataclass(frozen=True, slots=True)
class Writing:
    """What a float model is to write.

    Attributes:
        model: folder of its checkpoint.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: in which it computes.
        rows: how many rows.
        length: tokens of each, with the one that it begins with.
        firsts: the tokens that calibration rows begin with.
        threads: of the processor.
        trust_remote_code: run Python code that comes with the model.
    """

    model: str
    device: str
    dtype: str
    rows: int
    length: int
    firsts: tuple[int, ...]
    threads: int
    trust_remote_code: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def write_rows(asked: Writing, report: Report = lambda step, done, total: None) -> list[list[int]]:
    """Load the model and have it write.

    Raises:
        EvaluationError: it cannot be loaded, or keeps no KV cache.
        RuntimeError: and whatever else the model's own code may raise.
    """
    import torch

    from quantkit.runtimes import RUNTIMES
    from quantkit.runtimes.base import LoadOptions

    options = LoadOptions(asked.device, asked.dtype, asked.length, asked.trust_remote_code)
    model: Any = RUNTIMES.get("transformers").load(Path(asked.model), options)
    config = model.model.config
    generator = torch.Generator(asked.device).manual_seed(SEED)
    starts = _starts(asked, config)
    barred = _placeholders(config)
    found: list[list[int]] = []
    together = _together(asked.length, config.get_text_config(), model.model.dtype.itemsize)
    while len(found) < asked.rows:
        batch = torch.tensor(starts[len(found) : len(found) + together])
        found += model.sample(batch, asked.length, generator, barred).tolist()
        report("written", len(found), asked.rows)
    return found


def _starts(asked: Writing, config: Any) -> list[list[int]]:
    """What rows begin with: by turns a first token of calibration rows, and a token that ends a text, or begins one.

    A model writes other things behind either, and what begins alike in all rows teaches less of other texts.
    """
    spread = [asked.firsts[place * len(asked.firsts) // asked.rows] for place in range(asked.rows)]
    marks = _tokens(config, "eos_token_id") or _tokens(config, "bos_token_id") or spread
    return [[spread[place]] if place % 2 == 0 else [marks[place // 2 % len(marks)]] for place in range(asked.rows)]


def _tokens(config: Any, key: str) -> list[int]:
    """The tokens that a config names under a key, which may be one, several or none."""
    text = config.get_text_config()
    given = getattr(text, key, None)
    given = getattr(config, key, None) if given is None else given
    listed = given if isinstance(given, list | tuple) else [given]
    return [token for token in listed if isinstance(token, int) and 0 <= token < text.vocab_size]


def _placeholders(config: Any) -> list[int]:
    """Tokens in whose place a picture or a sound belongs, which is not there."""
    named = {key: value for key, value in config.to_dict().items() if key.startswith(PLACEHOLDERS)}
    ids = [value for key, value in named.items() if key.endswith(("_token_id", "_token_index"))]
    return [each for each in ids if isinstance(each, int) and 0 <= each < config.get_text_config().vocab_size]


def _together(length: int, config: Any, size: int) -> int:
    """How many rows are written together: no free memory decides it, so that the same rows come of it."""
    token = 2 * int(config.num_hidden_layers) * int(config.hidden_size) * size
    return max(1, min(ROWS, KEPT_BYTES // (token * length)))


def perform(job: Any, report: Report) -> dict[str, Any]:
    """Write; the result has ``rows``."""
    import torch

    asked = Writing(**{**job, "firsts": tuple(job["firsts"])})
    torch.set_num_threads(asked.threads)
    return {"rows": write_rows(asked, report)}


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], perform))
