"""What runs inside vLLM's own interpreter: ``PYTHON _vllm_script.py FOLDER``, the other side of :mod:`_distant`.

It imports nothing of quantkit, because vLLM pins other versions of torch and transformers. Each line of its standard
input is a request, JSON with ``do``, and is answered by a line. The first is ``load``, the others are methods of
:class:`Engine`. Logits go to a safetensors file in the folder, in the dtype that the engine gives them in.

vLLM gives log-probabilities of a few tokens, not logits. So the engine runs in this process, prompts ask for
log-probabilities of their own tokens, for which vLLM computes the logits of every position, and what the model's
``compute_logits`` returns is kept.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ENGINE_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is reached in this process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # computes the logits of a prompt in one piece
    "VLLM_CPU_INT4_W4A8": "0",  # on CPUs, 4-bit layers would round their inputs to 8 bits
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # the token that is drawn after the longest prompt is not read
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Environment of the engine; what the user has set already stands."""
CACHE_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""GiB that vLLM takes for its KV cache on a CPU."""
TOKENS_AT_ONCE = 2048
"""Tokens that the engine reads in one step, if prompts are not longer."""
BLOCK = 128
"""Tokens of a block of the cache on a CPU, of which each row fills its last in part."""
LOGITS = "logits.safetensors"
LONGEST_ERROR = 500
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "larger than the available kv cache memory")
"""What engines and allocators say where memory does not suffice, in lower case."""
QUESTIONS = {"__get__", "dim", "element_size", "numel", "size", "stride"}
"""What can be asked of a tensor without a use of it, if the answer is no tensor."""


class Tap:
    """Keeps what a model's ``compute_logits`` returns, on the CPU."""

    def __init__(self, model: Any) -> None:
        self._original = model.compute_logits
        self.kept: list[Any] | None = None
        model.compute_logits = self._compute

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        logits = self._original(*args, **kwargs)
        if logits is not None and self.kept is not None:
            self.kept.append(logits.detach().to("cpu", copy=True))
        return logits

    def open(self) -> None:
        """Keep from now on."""
        self.kept = []

    def take(self) -> list[Any]:
        """What came since, and no more."""
        taken, self.kept = self.kept or [], None
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


class Engine:
    """A checkpoint in vLLM; what can be asked of it are its methods, with the keys of a request, and give the answer.

    Args:
        job: ``checkpoint``, ``dtype``, ``context_length`` (of a prompt with what follows it), ``batch`` (rows at once
            at most) and ``trust_remote_code``.
        folder: for logits.
    """

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        started, reads = time.perf_counter(), Reads()
        self._file = folder / LOGITS
        self._engine = load(job, reads).llm_engine
        seconds = time.perf_counter() - started
        self._model = self._engine.model_executor.driver_worker.worker.model_runner.model
        self._tap = Tap(self._model)
        self._room, self._asked = job["context_length"], 0
        self._going = ""
        self._coming: list[int] = []
        self._told = 0
        self.facts = {**self.logits([0, 0]), **self._described(), "load_seconds": seconds}
        self.facts["dropped"] = sorted(reads.given - reads.used)

    def _described(self) -> dict[str, Any]:
        import torch
        import vllm  # type: ignore[import-not-found]  # it lives in the other interpreter

        device = next(self._model.parameters()).device
        return {
            **self.weights(),
            "dtype": str(self._engine.model_config.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "settings": {name: os.environ[name] for name in (*ENGINE_SETTINGS, CACHE_SPACE) if name in os.environ},
            "threads": torch.get_num_threads(),
        }

    def weights(self) -> dict[str, Any]:
        """``weights_bytes``: of the storages behind all parameters and buffers; what is shared counts once."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        storages = {(each.device, each.untyped_storage().data_ptr()): each.untyped_storage() for each in tensors}
        return {"weights_bytes": sum(each.nbytes() for each in storages.values())}

    def logits(self, ids: list[int]) -> dict[str, Any]:
        """The logits after each token, in the file; ``vocabulary``, how many after one."""
        from safetensors.torch import save_file

        self._tap.open()
        try:
            self.generate([ids], 1, prompt_logprobs=0)
        finally:
            kept = self._tap.take()
        found = prompt_logits(kept, len(ids))
        save_file({"logits": found}, self._file)
        return {"vocabulary": found.shape[1]}

    def generate(self, rows: list[list[int]], count: int, **options: Any) -> dict[str, Any]:
        """Each row goes on greedily by ``count`` tokens, by vLLM's own sampler; ends of turns are not looked at.

        Returns:
            ``ids`` of each row, and ``seconds``: until every row has its first token, and then of each step in which
            every row got another.
        """
        started = time.perf_counter()
        names: list[str] = []
        try:
            names.extend(self._add(row, count, **options) for row in rows)  # keeps those before one that fails
            found, times = self._run(len(names))
        except BaseException:
            self._engine.abort_request(names)  # the next request is not to find these still at work
            raise
        seconds = [later - former for former, later in pairwise([started, *times])]
        return {"ids": [found[name] for name in names], "seconds": seconds}

    def _run(self, count: int) -> tuple[dict[str, list[int]], list[float]]:
        """Step until ``count`` rows have ended: their tokens, and when each step ended that gave every row one."""
        found: dict[str, list[int]] = {}
        ended: set[str] = set()
        times: list[float] = []
        while len(ended) < count:
            whole = not ended
            for output in self._engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
                ended |= {output.request_id} if output.finished else set()
            if len(found) == count and (whole or not times):
                times.append(time.perf_counter())
        return found, times

    def begin(self, ids: list[int]) -> dict[str, Any]:
        """Begin to go on greedily after a prompt, for :meth:`more`."""
        self._coming, self._told = [], 0
        self._going = self._add(ids, self._room - len(ids)) if len(ids) < self._room else ""
        return {}

    def more(self) -> dict[str, Any]:
        """``id``, the next token after the prompt; None where there is no room for another."""
        while self._going and self._told == len(self._coming):
            for output in self._engine.step():
                self._coming = list(output.outputs[0].token_ids)
                if output.finished:
                    self._going = ""
        self._told += 1
        return {"id": self._coming[self._told - 1] if self._told <= len(self._coming) else None}

    def _add(self, ids: list[int], count: int, **options: Any) -> str:
        """Ask the engine to go on after a prompt, and for nothing that it was at before; gives the request's name."""
        from vllm import SamplingParams, TokensPrompt

        if self._going:
            self._engine.abort_request([self._going])
            self._going = ""
        settings = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **options)
        self._asked += 1
        self._engine.add_request(str(self._asked), TokensPrompt(prompt_token_ids=ids), settings)
        return str(self._asked)


def main(arguments: list[str]) -> int:
    """Answer requests until there is nobody to answer."""
    own = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != own]  # has a module named vllm
    folder = Path(arguments[0])
    requests, answer = _worker().requests_and_answers(lambda: shutil.rmtree(folder, ignore_errors=True))
    for key, value in ENGINE_SETTINGS.items():
        os.environ.setdefault(key, value)
    engines: list[Engine] = []
    while True:
        request = json.loads(requests.get())
        try:
            answer(answered(request, engines, folder))
        except Exception as error:  # vLLM and what it is built on raise whatever befalls them
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            answer({"error": text[:LONGEST_ERROR], "memory": any(each in text.lower() for each in NO_MEMORY)})


def answered(request: dict[str, Any], engines: list[Engine], folder: Path) -> dict[str, Any]:
    """What a request gives: of the first, ``load``, the facts of an engine, which then has the others."""
    do = request.pop("do")
    if do == "load":
        ask_for_tiles()
        engines.append(Engine(request, folder))
        return engines[0].facts
    found: dict[str, Any] = getattr(engines[0], do)(**request)
    return found


def _worker() -> Any:
    """Quantkit's own file for it, which imports nothing of quantkit."""
    spec = importlib.util.spec_from_file_location(
        "worker", Path(__file__).resolve().parents[1] / "system" / "worker.py"
    )
    if spec is None or spec.loader is None:
        raise ImportError("quantkit's worker.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask_for_tiles() -> None:
    """Have the process be granted AMX tiles, which the system gives on request alone.

    torch asks at its first product in bfloat16. The 4-bit kernel of vLLM's CPU build (0.32) does not ask: where its
    product is the first of the process, as in a very small model, the process dies of an illegal instruction.
    """
    import torch

    small = torch.ones(64, 64, dtype=torch.bfloat16)
    torch.mm(small, small)


def load(job: dict[str, Any], reads: Reads) -> Any:
    """The engine with the checkpoint, without compilation or reuse of prompts' beginnings.

    Of a model that sees or hears, too, it is the language model, as prompts are text.
    """
    os.environ.setdefault(CACHE_SPACE, str(cache_gib(job)))
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
        max_num_batched_tokens=max(job["context_length"], TOKENS_AT_ONCE),
        max_num_seqs=job["batch"],
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        trust_remote_code=job["trust_remote_code"],
    )


def cache_gib(job: dict[str, Any]) -> int:
    """GiB that the keys and values of all rows take in 16 bits, at least one."""
    config = json.loads(Path(job["checkpoint"], "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads") or 1
    width = text.get("head_dim") or text.get("hidden_size", 0) // heads
    token = 4 * text.get("num_hidden_layers", 0) * (text.get("num_key_value_heads") or heads) * width
    found: int = math.ceil(token * job["batch"] * (job["context_length"] + BLOCK) / 2**30)
    return max(1, found)


def prompt_logits(kept: list[Any], count: int) -> Any:
    """The logits of a prompt's tokens in order: the engine computes those of the last before those of the others."""
    import torch

    shapes = [list(part.shape) for part in kept]
    if [part.shape[0] for part in kept] != [1, count - 1][: min(count, 2)]:
        raise RuntimeError(f"this version of vLLM computes the logits of {count} tokens as {shapes}")
    return torch.cat([*kept[1:], kept[0]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
