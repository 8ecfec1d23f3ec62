"""How fast a model reads a prompt and writes tokens."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from quantkit.runtimes.base import LoadedModel

PREFILL_RUNS = 5
DECODE_RUNS = 4
PROMPT_TOKENS = 64
NEW_TOKENS = 32


def measure_speed(model: LoadedModel, ids: torch.Tensor) -> dict[str, Any]:
    """Prefill and decode tokens per second, batch size 1, after one run of each to warm up.

    Prefill reads ``ids`` at once. Decode continues the first 64 of them greedily with the KV cache; its figure
    is the inverse of the median time per token over all runs. ``seconds_per_token`` of both holds one figure a run,
    from which the noise of the two is told.

    Args:
        model: as a runtime has loaded it.
        ids: int64 ``[length]``, one window.

    Raises:
        EvaluationError: the model keeps no KV cache, so its decode speed cannot be taken.
    """
    prompt = ids.repeat(-(-PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]
    prefill = [_prefill_seconds(model, ids) for _ in range(1 + PREFILL_RUNS)][1:]
    decode = [model.decode(prompt, NEW_TOKENS)[1] for _ in range(1 + DECODE_RUNS)][1:]
    return {
        "prefill": {
            "tokens_per_second": len(ids) / statistics.median(prefill),
            "tokens": len(ids),
            "runs": PREFILL_RUNS,
            "seconds_per_token": [seconds / len(ids) for seconds in prefill],
        },
        "decode": {
            "tokens_per_second": 1 / statistics.median([seconds for run in decode for seconds in run]),
            "tokens": NEW_TOKENS,
            "prompt_tokens": PROMPT_TOKENS,
            "runs": DECODE_RUNS,
            "seconds_per_token": [statistics.median(run) for run in decode],
        },
        "threads": torch.get_num_threads(),
        "device": model.device,
        "dtype": model.dtype,
    }


def _prefill_seconds(model: LoadedModel, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    model.prefill(ids)
    return time.perf_counter() - started
