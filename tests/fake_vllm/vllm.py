"""A stand-in for vLLM: what quantkit's script asks of the package, computed by the reference decoder.

A file ``fails`` in the folder of a checkpoint says how it fails: ``load``, ``memory``, ``kill``, or ``kill later``,
``fork and kill later`` and ``hang later``; with anything else in it the model is none.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

__version__ = "0.0.1"


@dataclass
class SamplingParams:
    """How a prompt goes on."""

    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool
    prompt_logprobs: int | None = None


def TokensPrompt(prompt_token_ids: list[int]) -> list[int]:  # noqa: N802 - vLLM's name
    """A prompt."""
    return prompt_token_ids


class EngineArgs:
    """Arguments that the engine takes."""

    language_model_only = False


class DefaultModelLoader:
    """Reads a checkpoint's tensors."""

    def get_all_weights(self, config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Two tensors."""
        yield from {"used": torch.ones(2), "passed": torch.ones(3)}.items()


class Nothing:
    """What has the parts of a model that are looked at before it is asked for more."""

    dtype = torch.float32

    def parameters(self) -> Iterator[torch.Tensor]:
        """One."""
        yield torch.ones(1)

    def buffers(self) -> Iterator[torch.Tensor]:
        """None."""
        yield from ()

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Of five tokens."""
        return torch.ones(len(ids), 5)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return hidden


class Model:
    """A decoder whose hidden states are its logits."""

    def __init__(self, path: str, dtype: str) -> None:
        from quantkit.runtimes import RUNTIMES
        from quantkit.runtimes.base import LoadOptions

        dtype = "float32" if dtype == "auto" else dtype
        loaded = RUNTIMES.get("reference").load(Path(path), LoadOptions(dtype=dtype))
        self.logits, self.dtype, module = loaded.logits, getattr(torch, loaded.dtype), vars(loaded)["model"]
        copied = torch.zeros(2)
        for name, tensor in DefaultModelLoader().get_all_weights(None, None):
            if name == "used":
                copied.copy_(tensor)
        self.parameters, self.buffers = module.parameters, module.buffers

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return hidden


@dataclass
class Request:
    """A prompt at work."""

    name: str
    ids: list[int]
    settings: SamplingParams
    found: list[int] = field(default_factory=list)


class Engine:
    """Serves requests, a token of each at a step."""

    def __init__(self, path: str, given: dict[str, Any]) -> None:
        fails = Path(path, "fails")
        self._fails = fails.read_text(encoding="utf-8") if fails.is_file() else ""
        if self._fails == "load":
            raise ValueError("1 validation error\nUnknown quantization method: made-up")
        if self._fails == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if self._fails == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self._model: Any = Nothing() if self._fails else Model(path, given["dtype"])
        self._room, self._rows = given["max_model_len"], given["max_num_seqs"]
        self._requests: dict[str, Request] = {}
        self.model_config = SimpleNamespace(dtype=self._model.dtype)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self._model))
        self.model_executor = SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))

    def add_request(self, name: str, ids: list[int], settings: SamplingParams) -> None:
        """Ask for what follows a prompt."""
        if len(ids) + settings.max_tokens > self._room:
            raise ValueError(f"the context length is {self._room} tokens, and {len(ids)} are given")
        if self._fails.endswith("later") and len(ids) > 2:
            if self._fails == "hang later" or (self._fails.startswith("fork") and os.fork() == 0):
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        self._requests[name] = Request(name, ids, settings)

    def abort_request(self, names: list[str]) -> None:
        """Forget requests."""
        for name in names:
            self._requests.pop(name, None)

    def step(self) -> list[Any]:
        """A token of each of the first requests, those that are new one after another."""
        at_work = list(self._requests.values())[: self._rows]
        new = [each for each in at_work if not each.found][:2]
        outputs = []
        for each in [*(each for each in at_work if each.found), *new]:
            hidden = self._model.logits(torch.tensor(each.ids + each.found))
            token = int(self._model.compute_logits(hidden[-1:]).argmax())
            if not each.found and each.settings.prompt_logprobs is not None and len(each.ids) > 1:
                self._model.compute_logits(hidden[:-1])
            each.found.append(token)
            finished = len(each.found) == each.settings.max_tokens
            if finished:
                del self._requests[each.name]
            output = SimpleNamespace(token_ids=list(each.found))
            outputs.append(SimpleNamespace(request_id=each.name, outputs=[output], finished=finished))
        return outputs


class LLM:
    """An engine with a checkpoint."""

    def __init__(self, path: str, **given: Any) -> None:
        self.llm_engine = Engine(path, given)


def _registered(name: str, **names: Any) -> None:
    module = ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module


for each in ("vllm.engine", "vllm.model_executor", "vllm.model_executor.model_loader"):
    _registered(each)
_registered("vllm.engine.arg_utils", EngineArgs=EngineArgs)
_registered("vllm.model_executor.model_loader.default_loader", DefaultModelLoader=DefaultModelLoader)
