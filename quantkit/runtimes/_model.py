"""A model of transformers, as what a runtime has loaded."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.checkpoint.extra_tensors import of_quantization
from quantkit.checkpoint.model_class import text_part
from quantkit.errors import EvaluationError
from quantkit.runtimes.base import LoadedModel, Throughput
from quantkit.system.devices import device_name, synchronize
from quantkit.system.products import fast_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEYS_SHOWN = 5
LENGTH_TRIED = 8
PADDING_TOLERANCE = 0.02
"""Change of logits, relative to them, by one more token behind that counts as rounding."""
CACHES = ("past_key_values", "cache_params")
"""What a forward calls what it keeps of the tokens that it has read, of attention and of state-space models."""
CACHE_TOLERANCE = 0.5
"""Difference of logits with a cache and without, relative to them, that counts as rounding."""
LOGITS_AT_ONCE = 1 << 27
"""Logits of all rows of a batch: 512 MB of float32."""


class TransformersModel(LoadedModel):
    """A model of transformers, in evaluation mode on its device.

    Attributes:
        model: the module.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._text: Any = text_part(model)
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.device = device_name(model.device)
        keeps_last = "logits_to_keep" in inspect.signature(self._text.forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if keeps_last else {}

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """One forward pass without cache; logits in the model's dtype, on its device."""
        with fast_linears():
            found: torch.Tensor = self._text(input_ids=ids.to(self.model.device)[None], use_cache=False).logits[0]
        return found

    @torch.inference_mode()
    def logits_of(self, rows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Several rows in one forward pass, padded at their ends, where causal attention never looks.

        Where attention does look there, one after another.
        """
        together = len(rows) > 1 and self._ends_can_be_padded
        room = LOGITS_AT_ONCE // self.vocabulary if together else 1
        for batch in _batches(rows, room):
            ids = torch.nn.utils.rnn.pad_sequence(list(batch), batch_first=True)
            with fast_linears():
                found = self._text(input_ids=ids.to(self.model.device), use_cache=False).logits
            yield from (logits[: len(row)] for logits, row in zip(found, batch, strict=True))

    @cached_property
    def _ends_can_be_padded(self) -> bool:
        """Whether a token at the end of a row leaves the logits before it as they are."""
        short, long = (self.logits(torch.arange(1, length)).float() for length in (LENGTH_TRIED, LENGTH_TRIED + 1))
        found = long[:-1]
        return found.shape == short.shape and bool((found - short).norm() <= PADDING_TOLERANCE * short.norm())

    @torch.inference_mode()
    def greedy(self, prompt: torch.Tensor) -> Iterator[int]:
        """One token after another with the KV cache, where the model's class keeps one."""
        state = self._forward(prompt.unsqueeze(0))
        if state.get("past_key_values") is None:
            yield from super().greedy(prompt)
        while True:
            token = state["logits"][:, -1:].argmax(dim=-1)
            yield int(token)
            state = self._forward(token, past_key_values=state["past_key_values"])

    @torch.inference_mode()
    def sample(
        self, starts: torch.Tensor, length: int, generator: torch.Generator, barred: Sequence[int] = ()
    ) -> torch.Tensor:
        """Rows that go on from their starts, each token drawn by its probability; ends of texts are not looked at.

        Args:
            starts: int64 ``[rows, begun]``.
            length: of the rows in the end.
            generator: of the draws, on the device of the model.
            barred: tokens that are never drawn.

        Returns:
            int64 ``[rows, length]``, on the CPU.

        Raises:
            EvaluationError: the model keeps no KV cache, or says other things with it than without.
        """
        ids = starts.to(self.model.device)
        state = self._forward(ids)
        kept = next((name for name in CACHES if state.get(name) is not None), None)
        if kept is None:
            raise EvaluationError(f"{type(self.model).__name__} keeps no KV cache")
        while ids.shape[1] < length:
            if ids.shape[1] > starts.shape[1]:
                state = self._forward(ids[:, -1:], **{kept: state[kept]})
            logits = state["logits"][:, -1, : self.vocabulary].float()
            allowed = logits.clone()
            allowed[:, list(barred)] = -torch.inf
            drawn = torch.multinomial(allowed.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], dim=1)
        whole = self.logits(ids[0, :-1])[-1, : self.vocabulary].float()
        if float((whole - logits[0]).norm()) > CACHE_TOLERANCE * float(whole.norm()):
            raise EvaluationError(f"{type(self.model).__name__} says other things with its cache than without")
        return ids.cpu()

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> None:
        """One forward pass with cache; where the model's class allows, with the last logits alone."""
        self._forward(ids.unsqueeze(0))
        synchronize(self.model.device)

    @torch.inference_mode()
    def decode(self, prompt: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        """Read the prompt, then pick and read ``count`` tokens one by one with the KV cache."""
        state = self._forward(prompt.unsqueeze(0))
        if state.get("past_key_values") is None:
            raise EvaluationError(
                f"{type(self.model).__name__} keeps no KV cache, so its decode speed cannot be taken",
                "leave 'speed' out of evaluation.metrics",
            )
        device, ids, seconds = self.model.device, [], []
        for _ in range(count):
            synchronize(device)
            started = time.perf_counter()
            token = state["logits"][:, -1:].argmax(dim=-1)
            state = self._forward(token, past_key_values=state["past_key_values"])
            synchronize(device)
            seconds.append(time.perf_counter() - started)
            ids.append(int(token))
        return ids, seconds

    @torch.inference_mode()
    def throughput(self, rows: torch.Tensor, count: int) -> Throughput:
        """All rows in one forward pass, then one token of each at a time with the KV cache."""
        device, seconds = self.model.device, []
        synchronize(device)
        started = time.perf_counter()
        state = self._forward(rows)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        for _ in range(count):
            if state.get("past_key_values") is None:
                raise EvaluationError(f"{type(self.model).__name__} keeps no KV cache")
            started = time.perf_counter()
            state = self._forward(state["logits"][:, -1:].argmax(dim=-1), past_key_values=state["past_key_values"])
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        return Throughput(seconds[0], tuple(seconds[1:]))

    def weights_bytes(self) -> int:
        """Bytes of the storages behind all parameters and buffers; what is shared counts once."""
        storages = {
            (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
            for tensor in itertools.chain(self.model.parameters(), self.model.buffers())
            if tensor.device.type != "meta"
        }
        return sum(storages.values())

    def facts(self) -> dict[str, Any]:
        """The version of transformers."""
        import transformers

        return {"transformers": transformers.__version__}

    def _forward(self, ids: torch.Tensor, **state: Any) -> Any:
        return self._text(input_ids=ids.to(self.model.device), use_cache=True, **self._last_only, **state)


def _batches(rows: Sequence[torch.Tensor], room: int) -> Iterator[Sequence[torch.Tensor]]:
    """Rows beside each other, as many as have ``room`` tokens when padded to the longest of them; at least one."""
    start = longest = 0
    for place, row in enumerate(rows):
        longest = max(longest, len(row))
        if place > start and longest * (place + 1 - start) > room:
            yield rows[start:place]
            start, longest = place, len(row)
    if start < len(rows):
        yield rows[start:]


def whole(path: Path, model: PreTrainedModel, found: Mapping[str, Any], device: torch.device) -> TransformersModel:
    """A model whose every tensor found its place, on its device.

    Args:
        path: the checkpoint, for messages.
        model: as transformers made it.
        found: the names of missing, unexpected and mismatched tensors as transformers gives them.
        device: where it shall run.

    Raises:
        EvaluationError: a tensor is missing or of the wrong shape, or a part of a packed layer finds no place. What
            else the class does not know was never part of the float model.
    """
    missing = sorted(found["missing_keys"])
    unknown = sorted(of_quantization(found["unexpected_keys"]))
    kind = (getattr(model.config, "architectures", None) or [type(model).__name__])[0]
    if missing and kind != type(model).__name__ and all(_is_head(model, name) for name in missing):
        raise EvaluationError(
            f"{path} is a {kind}: it has no {missing[0]} with which a {type(model).__name__} gives the next token",
            "score it by its own task; 'quantkit quantize' quantizes it and keeps its own head",
        )
    problems = {
        "are missing": missing,
        "are not known to the model": unknown,
        "have the wrong shape": sorted(str(key[0]) for key in found["mismatched_keys"]),
        "could not be read": sorted(map(str, found["error_msgs"])),
    }
    texts = [f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names]
    if texts:
        raise EvaluationError(
            f"{path} did not load whole: of its tensors {'; '.join(texts)}",
            "export the checkpoint again; its files do not match its config.json",
        )
    return TransformersModel(model if model.device == device else model.to(device))


def _is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter is one of the output head."""
    return model.get_submodule(name.rpartition(".")[0]) is model.get_output_embeddings()


def listed(names: Sequence[str]) -> str:
    """The first of some names of tensors, and how many more there are."""
    rest = len(names) - KEYS_SHOWN
    return ", ".join(names[:KEYS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
