"""What runs inside vLLM's own interpreter: ``PYTHON _vllm_script.py JOB.json``.

It imports nothing of quantkit, because vLLM pins other versions of torch and transformers, and follows the protocol of
:mod:`quantkit.verification.job`: it reads the job, and writes the logits as float32 ``[tokens of all prompts,
vocabulary]`` (``.npy``) and then the result (JSON).

vLLM gives log-probabilities of a few tokens, not logits. So the engine runs in this process, prompts ask for
log-probabilities of their own tokens, for which vLLM computes the logits of every position, and what the model's
``compute_logits`` returns is kept.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENGINE_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is reached in this process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # computes the logits of a prompt in one piece
    "VLLM_CPU_INT4_W4A8": "0",  # on CPUs, 4-bit layers would round their inputs to 8 bits
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Environment of the engine; what the user has set already stands."""


QUESTIONS = {"__get__", "dim", "element_size", "numel", "size", "stride"}
"""What can be asked of a tensor without a use of it, if the answer is no tensor."""


class Tap:
    """Keeps what a model's ``compute_logits`` returns, float32 on the CPU."""

    def __init__(self, model: Any) -> None:
        self._original = model.compute_logits
        self.kept: list[Any] = []
        model.compute_logits = self._compute

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        logits = self._original(*args, **kwargs)
        if logits is not None:
            self.kept.append(logits.detach().float().cpu().clone())
        return logits

    def take(self) -> list[Any]:
        """What came since the last call."""
        taken, self.kept = self.kept, []
        return taken


class Reads:
    """Which tensors of the checkpoint the model's loader used, and which it was given and passed over."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        self.used: set[str] = set()

    def watch(self, weights: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The same tensors, each of which says when an operation takes it; what comes of that is a plain tensor."""
        import torch

        used = self.used

        class Watched(torch.Tensor):
            checkpoint_name = ""

            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                with torch._C.DisableTorchFunctionSubclass():
                    result = func(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor) or func.__name__ not in QUESTIONS:
                    flat = [part for each in args for part in (each if isinstance(each, list | tuple) else [each])]
                    used.update(part.checkpoint_name for part in flat if isinstance(part, Watched))
                # torch makes a parameter only of what stays of its class when it is detached
                return result.as_subclass(cls) if func.__name__ == "detach" else result

        for name, tensor in weights:
            self.given.add(name)
            watched: Any = tensor.as_subclass(Watched)
            watched.checkpoint_name = name
            yield name, watched


def main(arguments: list[str]) -> int:
    """Carry out the job in the file ``arguments[0]``; returns the exit code."""
    own = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != own]  # has a module named vllm
    _live_no_longer_than_the_parent()
    job_file = Path(arguments[0])
    job = json.loads(job_file.read_text(encoding="utf-8"))
    for key, value in ENGINE_SETTINGS.items():
        os.environ.setdefault(key, value)
    result = perform(job)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _live_no_longer_than_the_parent() -> None:
    """By quantkit's own file for it, which imports nothing of quantkit."""
    spec = importlib.util.spec_from_file_location(
        "worker", Path(__file__).resolve().parents[1] / "system" / "worker.py"
    )
    if spec is None or spec.loader is None:
        raise ImportError("quantkit's worker.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.live_no_longer_than_the_parent()


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint, write the logits of all prompts, and continue one of them."""
    import numpy as np
    import torch
    import vllm  # type: ignore[import-not-found]  # it lives in the other interpreter

    ask_for_tiles()
    reads, started = Reads(), time.perf_counter()
    engine = load(job, reads)
    seconds = time.perf_counter() - started
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    tap, rows = Tap(model), []
    for ids in job["prompts"]:
        tap.take()
        continued(engine, ids, 1, prompt_logprobs=0)
        rows.append(prompt_logits(tap.take(), len(ids)))
    np.save(job["logits"], torch.cat(rows).numpy())
    new = job["new_tokens"]
    return {
        "generated": continued(engine, job["prompts"][job["generate"]], new) if new else [],
        "load_seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "dtype": str(engine.llm_engine.model_config.dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "vocabulary": rows[0].shape[1],
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "settings": {name: os.environ[name] for name in ENGINE_SETTINGS},
        "dropped": sorted(reads.given - reads.used),
    }


def ask_for_tiles() -> None:
    """Have the process be granted AMX tiles, which the system gives on request alone.

    torch asks at its first product in bfloat16. The 4-bit kernel of vLLM's CPU build (0.32) does not ask: where its
    product is the first of the process, as in a very small model, the process dies of an illegal instruction.
    """
    import torch

    small = torch.ones(64, 64, dtype=torch.bfloat16)
    torch.mm(small, small)


def load(job: dict[str, Any], reads: Reads) -> Any:
    """The engine with the checkpoint, one prompt at a time, without compilation or reuse of prompts' beginnings.

    Of a model that sees or hears, too, it is the language model, as prompts are text.
    """
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs  # type: ignore[import-not-found]  # as above
    from vllm.model_executor.model_loader.default_loader import (  # type: ignore[import-not-found]  # as above
        DefaultModelLoader,
    )

    original = DefaultModelLoader.get_all_weights
    DefaultModelLoader.get_all_weights = lambda self, config, model: reads.watch(original(self, config, model))
    alone = {"language_model_only": True} if hasattr(EngineArgs, "language_model_only") else {}
    return LLM(
        job["checkpoint"],
        **alone,
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        max_model_len=job["context_length"],
        max_num_batched_tokens=max(job["context_length"], 2048),
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        trust_remote_code=job["trust_remote_code"],
    )


def continued(engine: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """The ``count`` tokens that follow a prompt greedily."""
    from vllm import SamplingParams, TokensPrompt

    settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **options)
    found = engine.generate(TokensPrompt(prompt_token_ids=ids), settings, use_tqdm=False)
    return list(found[0].outputs[0].token_ids)


def prompt_logits(kept: list[Any], count: int) -> Any:
    """The logits of a prompt's tokens in order: the engine computes the last position's apart from the others'."""
    import torch

    last = [part for part in kept if part.shape[0] == 1]
    others = [part for part in kept if part.shape[0] == count - 1]
    if len(kept) != 2 or len(last) != 1 or len(others) != 1:
        shapes = [list(part.shape) for part in kept]
        raise RuntimeError(f"this version of vLLM computes the logits of {count} tokens as {shapes}")
    return torch.cat([others[0], last[0]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
