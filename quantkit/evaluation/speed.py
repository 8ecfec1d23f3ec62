"""How fast a model reads a prompt and writes tokens."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation.memory import device_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_RUNS = 3
DECODE_RUNS = 2
PROMPT_TOKENS = 64
NEW_TOKENS = 32


@torch.inference_mode()
def measure_speed(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """Prefill and decode tokens per second, batch size 1, after one run of each to warm up.

    Prefill reads ``ids`` at once. Decode continues the first 64 of them greedily with the KV cache; its figure
    is the inverse of the median time per token over all runs.

    Args:
        model: in evaluation mode, on its device.
        ids: int64 ``[length]``, one window.

    Raises:
        EvaluationError: the model keeps no KV cache, so its decode speed cannot be taken.
    """
    ids = ids.to(model.device).unsqueeze(0)
    prompt = ids.repeat(1, -(-PROMPT_TOKENS // ids.shape[1]))[:, :PROMPT_TOKENS]
    prefill = [_timed(model.device, lambda: forward(model, ids)) for _ in range(1 + PREFILL_RUNS)][1:]
    decode = [_decode_times(model, prompt) for _ in range(1 + DECODE_RUNS)][1:]
    return {
        "prefill": {
            "tokens_per_second": ids.shape[1] / statistics.median(prefill),
            "tokens": ids.shape[1],
            "runs": PREFILL_RUNS,
        },
        "decode": {
            "tokens_per_second": 1 / statistics.median([seconds for run in decode for seconds in run]),
            "tokens": NEW_TOKENS,
            "prompt_tokens": PROMPT_TOKENS,
            "runs": DECODE_RUNS,
        },
        "threads": torch.get_num_threads(),
        "device": device_name(model.device),
        "dtype": dtype_name(model),
    }


def dtype_name(model: PreTrainedModel) -> str:
    """The dtype that a model computes in."""
    return str(model.dtype).removeprefix("torch.")


@torch.inference_mode()
def forward(model: PreTrainedModel, ids: torch.Tensor, **state: Any) -> Any:
    """One forward pass over ``[1, length]`` ids with KV cache, as a server does it.

    Where the model's class allows, logits are computed for the last position alone.
    """
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=True, **last_only, **state)


def _decode_times(model: PreTrainedModel, prompt: torch.Tensor) -> list[float]:
    """Seconds for each of the new tokens of one greedy continuation."""
    state = forward(model, prompt)
    if state.get("past_key_values") is None:
        raise EvaluationError(
            f"{type(model).__name__} keeps no KV cache, so its decode speed cannot be taken",
            "leave 'speed' out of evaluation.metrics",
        )

    def step() -> None:
        nonlocal state
        token = state["logits"][:, -1:].argmax(dim=-1)
        state = forward(model, token, past_key_values=state["past_key_values"])

    return [_timed(model.device, step) for _ in range(NEW_TOKENS)]


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes, until its results are there."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
