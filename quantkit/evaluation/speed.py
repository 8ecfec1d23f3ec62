"""How fast a model reads prompts and writes tokens, one row at a time or several at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from quantkit.errors import EvaluationError
from quantkit.runtimes.base import LoadedModel
from quantkit.system.os_errors import cpu_ran_out

T = TypeVar("T")

FEWEST_RUNS, PREFILL_RUNS, DECODE_RUNS = 2, 5, 4
"""Runs at least, and at most of each."""
ENOUGH = 2.0
"""Seconds after which no further run begins: one of so many tells as much as several that are short."""
BATCH_RUNS = 2
PROMPT_TOKENS = 64
NEW_TOKENS = 16


def measure_speed(
    model: LoadedModel,
    ids: torch.Tensor,
    batch_sizes: Sequence[int] = (1,),
    *,
    is_warm: bool = False,
    briefly: bool = False,
) -> dict[str, Any]:
    """Prefill and decode tokens per second, after one run of each to warm up.

    Prefill reads ``ids`` at once. Decode continues the first 64 of them greedily with the KV cache; its figure
    is the inverse of the median time per token over all runs. ``seconds_per_token`` of both holds one figure a run,
    from which the noise of the two is told. Both are of one row; ``batches`` has the figures of other sizes.

    Args:
        model: as a runtime has loaded it.
        ids: int64 ``[length]``, one window.
        batch_sizes: rows at once, for each of which figures are taken.
        is_warm: it has read the window and continued a prompt before.
        briefly: as few runs as tell a noise, as of a model whose speed says little.

    Raises:
        EvaluationError: the model keeps no KV cache, so its decode speed cannot be taken.
    """
    sizes = [size for size in batch_sizes if size > 1]
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
        **({"batches": [_batch(model, ids, prompt, size) for size in sizes]} if sizes else {}),
        "threads": model.facts().get("threads", torch.get_num_threads()),
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


def _batch(model: LoadedModel, ids: torch.Tensor, prompt: torch.Tensor, size: int) -> dict[str, Any]:
    """Tokens per second of ``size`` rows at once, all of them together; or why there are none."""
    windows, prompts = (torch.stack([row.roll(-shift) for shift in range(size)]) for row in (ids, prompt))
    try:
        read = [model.throughput(windows, 0).prefill for _ in range(1 + BATCH_RUNS)][1:]
        written = [model.throughput(prompts, NEW_TOKENS).steps for _ in range(1 + BATCH_RUNS)][1:]
    except EvaluationError as error:
        return {"size": size, "missing": error.problem}
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and not cpu_ran_out(error):
            raise
        return {"size": size, "missing": f"{model.device} has not enough memory for so many rows"}
    return {
        "size": size,
        "prefill_tokens_per_second": windows.numel() / statistics.median(read),
        "decode_tokens_per_second": size / statistics.median([seconds for run in written for seconds in run]),
        "runs": BATCH_RUNS,
    }


def _prefill_seconds(model: LoadedModel, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    model.prefill(ids)
    return time.perf_counter() - started
