"""How fast a model reads a prompt and writes tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from quantkit.runtimes.base import LoadedModel

T = TypeVar("T")

FEWEST_RUNS, PREFILL_RUNS, DECODE_RUNS = 2, 5, 4
"""Runs at least, and at most of each."""
ENOUGH = 2.0
"""Seconds after which no further run begins: one of so many tells as much as several that are short."""
PROMPT_TOKENS = 64
NEW_TOKENS = 32


def measure_speed(
    model: LoadedModel, ids: torch.Tensor, *, is_warm: bool = False, briefly: bool = False
) -> dict[str, Any]:
    """Prefill and decode tokens per second, batch size 1, after one run of each to warm up.

    Prefill reads ``ids`` at once. Decode continues the first 64 of them greedily with the KV cache; its figure
    is the inverse of the median time per token over all runs. ``seconds_per_token`` of both holds one figure a run,
    from which the noise of the two is told.

    Args:
        model: as a runtime has loaded it.
        ids: int64 ``[length]``, one window.
        is_warm: it has read the window and continued a prompt before.
        briefly: as few runs as tell a noise, as of a model whose speed says little.

    Raises:
        EvaluationError: the model keeps no KV cache, so its decode speed cannot be taken.
    """
    prompt = ids.repeat(-(-PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]
    warm_up, longest = 0 if is_warm else 1, 0.0 if briefly else ENOUGH
    prefill = _repeated(lambda: _prefill_seconds(model, ids), PREFILL_RUNS, longest, warm_up)
    decode = _repeated(lambda: model.decode(prompt, NEW_TOKENS)[1], DECODE_RUNS, longest, warm_up)
    return {
        "prefill": {
            "tokens_per_second": len(ids) / statistics.median(prefill),
            "tokens": len(ids),
            "runs": len(prefill),
            "seconds_per_token": [seconds / len(ids) for seconds in prefill],
        },
        "decode": {
            "tokens_per_second": 1 / statistics.median([seconds for run in decode for seconds in run]),
            "tokens": NEW_TOKENS,
            "prompt_tokens": PROMPT_TOKENS,
            "runs": len(decode),
            "seconds_per_token": [statistics.median(run) for run in decode],
        },
        "threads": torch.get_num_threads(),
        "device": model.device,
        "dtype": model.dtype,
    }


def _repeated(run: Callable[[], T], most: int, longest: float, warm_up: int) -> list[T]:
    """What runs gave, as many as fit into so many seconds: at least :data:`FEWEST_RUNS`, at most ``most``."""
    for _ in range(warm_up):
        run()
    started, found = time.perf_counter(), list[T]()
    while len(found) < FEWEST_RUNS or (len(found) < most and time.perf_counter() - started < longest):
        found.append(run())
    return found


def _prefill_seconds(model: LoadedModel, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    model.prefill(ids)
    return time.perf_counter() - started
