"""The reverse walk: a model forward and backward, with one segment's weights in memory at a time.

Forward, every batch goes through the model's own code, segment by segment; each segment is loaded once for all batches
and run without a graph, and what it was given is kept. At the end the loss is asked for with the logits of some tokens
at a time. Then the segments are loaded again from the last to the first, run anew on what they were given, this time
with a graph, and hand the gradient of their inputs down.

What lies between segments is the model's: usually nothing, elsewhere a norm, a scale, a concatenation. It runs with a
graph, in which each segment is a boundary that holds no activation. So nothing is assumed of what blocks give one
another, what they write into mappings that they share (keys and values of Gemma 3n) included.

Two use it: whoever looks at gradients, by hooks on the layers of a segment (:mod:`quantkit.engine.fisher`), and whoever
trains, by tensors that stand in for a segment's parameters (:func:`standing_in`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from greenlet import getcurrent
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from quantkit.engine.batches import Batch
from quantkit.engine.kept_calls import Keep, KeepingPass, on_device
from quantkit.engine.passes import AtSegment, Pass, told
from quantkit.engine.segment import Segment, WeightReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantizationError

CHUNK_LOGITS = 1 << 24
"""Logits that are made at a time: tokens times the vocabulary."""
PROVEN = {torch.float32: 1e-4, torch.float16: 5e-2}
"""Difference of logits, relative to them, that counts as rounding, in float32 and in dtypes of 16 bits."""

Loaded = Callable[[Segment, bool], AbstractContextManager[None]]
"""Inside the block a segment has its weights. The flag: it is run for gradients, not for its outputs alone."""
Loss = Callable[[torch.Tensor, Batch, torch.Tensor], torch.Tensor]
"""A loss, 0-d, summed over tokens: of logits ``[tokens, vocabulary]`` as the model gives them, the batch, and which of
its tokens these are, int64 ``[tokens]``, counted without padding."""


# Weights


def from_checkpoint(skeleton: Skeleton, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Segments as the checkpoint has them, each loaded when it is run and unloaded behind that."""

    @contextmanager
    def loaded(segment: Segment, _for_gradients: bool) -> Iterator[None]:
        skeleton.load(segment, reader, device, dtype)
        try:
            yield
        finally:
            skeleton.unload(segment)

    return loaded


@contextmanager
def standing_in(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside the block, tensors stand in for parameters of a module; behind it their gradients go into what made them.

    The graph of each is run backward once, however many batches went through the module.

    Args:
        module: a segment's, or one inside it.
        tensors: by the names of its parameters, in the shape, dtype and on the device of these. One without a graph
            and without ``requires_grad`` just stands in.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            before.append((owner, leaf, owner._parameters[leaf]))
            own = tensor.detach().requires_grad_(tensor.requires_grad)
            leaves.append((tensor, own))
            owner._parameters[leaf] = own  # type: ignore[assignment]  # any tensor will do for its forward
        yield
    finally:
        for owner, leaf, parameter in before:
            owner._parameters[leaf] = parameter
    reached = [(tensor, own.grad) for tensor, own in leaves if own.grad is not None]
    if reached:
        torch.autograd.backward([tensor for tensor, _ in reached], [grad for _, grad in reached])


# The walk


@dataclass(slots=True)
class ReverseWalk:
    """A model that is run forward and backward, segment by segment; a context manager.

    Gradients are added to ``.grad`` of whatever leaves the weights are made of, those of the frame (embeddings, the
    last norm) among them. Batches may be others at each run, which is a step of training then.

    Args:
        skeleton: the model; it should not be walked through by anything else meanwhile.
        reader: where the frame's weights come from.
        device: where it is computed.
        dtype: of weights and activations.
        loaded: gives segments their weights, see :func:`from_checkpoint`, the default. The output head is a segment
            where it is a linear layer.
        keep: where what segments are given waits, see :func:`quantkit.engine.kept_calls.on_device`, the default.
        sees: batches have images or the like, whose models are loaded with the frame.
        on_step: called with the number of segments that were run and how many there are, forward and backward.
        parks: where what passes that leave no gradients hold waits while others go through a segment; None for where it
            is.
        holds: asked before a segment is run forward whether it keeps its weights and its graph until it is run back,
            on which no gradient depends. Those of a model that goes through its blocks again never do.
        on_output: called with the index of a segment and what it gave, ``[rows, length, width]`` as a rule, each time
            that a batch went through it, forward. A gradient that is run back from there reaches the segment with
            those that come from behind it.

    Attributes:
        batch: the one that is run.
        chunk: while the head is run for a loss, which of its tokens, counted without padding.
    """

    skeleton: Skeleton
    reader: WeightReader
    device: torch.device
    dtype: torch.dtype
    loaded: Loaded | None = None
    keep: Keep = on_device
    sees: bool = False
    on_step: Callable[[int, int], None] = lambda _done, _total: None
    parks: Keep | None = None
    holds: Callable[[], bool] = lambda: False
    on_output: Callable[[int, torch.Tensor], None] | None = None
    batch: Batch | None = field(init=False, default=None)
    chunk: torch.Tensor | None = field(init=False, default=None)
    _cleanup: ExitStack = field(init=False, default_factory=ExitStack)
    _read: torch.Tensor | None = field(init=False, default=None)
    _own: set[int] = field(init=False, default_factory=set)

    def __enter__(self) -> ReverseWalk:
        """Load the frame, and let passes stand before segments.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: the model has no output head.
        """
        text, block = self.skeleton.text, self.skeleton.blocks[0]
        head = text.get_output_embeddings()
        decoders = [each for each in text.modules() if _is_decoder(each, block, head)]
        if head is None or not decoders:
            name = type(text).__name__
            raise QuantizationError(f"{name} has no output head beside its decoder", "it cannot be run backward")
        self.skeleton.load_frame(self.reader, self.device, self.dtype, towers=self.sees)
        self._own = {id(each) for each in chain(text.parameters(), text.buffers())}
        for index, segment in enumerate(self.skeleton.segments):
            self._replace(segment.module, partial(self._segment, index))
        self._replace(head, self._head)
        for decoder in decoders:
            self._replace(decoder, self._decoder)
        return self

    def __exit__(self, *_: object) -> None:
        """Give modules their own functions back."""
        self._cleanup.close()

    def _replace(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Let a function stand in for a module's forward, which it is given first."""
        own = vars(module).get("forward")
        module.forward = partial(function, module.forward)
        if own is None:
            self._cleanup.callback(delattr, module, "forward")
        else:
            self._cleanup.callback(setattr, module, "forward", own)

    def _segment(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if not isinstance(current, KeepingPass):
            return forward(*args, **kwargs)
        made = current.through(index, forward, args, kwargs)
        first = made[0] if isinstance(made, tuple | list) and made else made
        if self.on_output is not None and isinstance(first, torch.Tensor):
            self.on_output(index, first)
        return made

    def _head(self, forward: Callable[..., Any], hidden: torch.Tensor) -> Any:
        current = getcurrent()
        if isinstance(current, KeepingPass):
            current.ends(hidden)
            with self._loaded_head(False):
                return forward(hidden)
        return forward(hidden if self._read is None else self._read.to(hidden.dtype))

    def _decoder(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._read is None else _Ended(last_hidden_state=self._read)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits ``[tokens, vocabulary]`` of what the head is given, ``[tokens, width]``, by the model's own code.

        The head must be loaded, as it is while a loss is asked for.

        Raises:
            QuantizationError: the model's code fails on them.
        """
        self._read = hidden[None]
        try:
            ids = torch.zeros(self._read.shape[:2], dtype=torch.int64, device=self.device)
            with told(self.skeleton.text):
                found: torch.Tensor = self.skeleton.text(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._read = None
        return found

    def hidden(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """What the head is given of each token of each batch, ``[tokens, width]``, padding left out; nothing is kept.

        Raises:
            QuantizationError: the model's code fails on the batches.
        """
        with torch.no_grad():
            passes, _ = self._forward(batches, None)
        return [each.read() for each in passes]

    def proven_hidden(self, batches: Sequence[Batch], proof: Batch) -> Iterator[torch.Tensor]:
        """What :meth:`hidden` gives, one batch after another, each fetched from where it waits.

        Args:
            batches: they are run together.
            proof: one more, of few tokens, that the model's own code reads to the end: its logits must be those that
                :meth:`logits` makes of what its head was given.

        Raises:
            QuantizationError: they are not, or the model's code fails on the batches.
        """
        with torch.no_grad():
            first, *passes = self._forward([proof, *batches], None, proves=True)[0]
            self._check_logits(first)
        while passes:
            each = passes.pop(0)
            each.fetch()
            yield each.read()

    def _check_logits(self, proof: KeepingPass) -> None:
        proof.fetch()
        expected = proof.batch.tokens_of(proof.logits.flatten(0, 1))[0].float()
        with self._loaded_head(False):
            found = self.logits(proof.read()).float()
        within = PROVEN.get(self.dtype, PROVEN[torch.float16])
        if found.shape != expected.shape or not bool((found - expected).norm() <= within * expected.norm()):
            raise QuantizationError(
                f"the logits of {type(self.skeleton.text).__name__} are not made of the last hidden states alone",
                "load the whole model",
            )

    def run(self, batches: Sequence[Batch], loss: Loss) -> float:
        """One run forward and backward; gradients are added to those that are there.

        Args:
            batches: they are run together, each segment loaded once for all.
            loss: asked for with some tokens of a batch at a time, in their order.

        Returns:
            The sum of the losses.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: the model's code fails on the batches.
        """
        with ExitStack() as held:
            with torch.enable_grad():
                passes, rounds = self._forward(batches, self.keep, held)
            with self._loaded_head(True):
                total = sum(self._end(each, loss) for each in passes)
            self.on_step(len(rounds) + 1, 2 * len(rounds) + 1)
            for done, (segment, here, weights) in enumerate(reversed(rounds)):
                with weights or self._loaded(segment, True):
                    for each in here:
                        self.batch = each.batch
                        with told(self.skeleton.text):
                            each.calls.pop().backward(segment.module)
                self.on_step(len(rounds) + done + 2, 2 * len(rounds) + 1)
        return total

    def _loaded(self, segment: Segment, for_gradients: bool) -> AbstractContextManager[None]:
        loaded = self.loaded or from_checkpoint(self.skeleton, self.reader, self.device, self.dtype)
        return loaded(segment, for_gradients)

    def _loaded_head(self, for_gradients: bool) -> AbstractContextManager[None]:
        return nullcontext() if self.skeleton.head is None else self._loaded(self.skeleton.head, for_gradients)

    def _forward(
        self, batches: Sequence[Batch], keep: Keep | None, held: ExitStack | None = None, *, proves: bool = False
    ) -> tuple[list[KeepingPass], list[_Round]]:
        """Bring all batches up to the head.

        Args:
            batches: they are run together.
            keep: where what segments are given waits; None for nowhere.
            held: takes the weights of segments that keep their graphs; None where none does.
            proves: the first runs through the head.

        Returns:
            The passes, and each segment that was loaded with those that went through it.
        """
        rounds = list[_Round]()
        passes = [KeepingPass(self.skeleton.text, batch, keep) for batch in batches]
        passes[0].proves = proves
        with ExitStack() as cleanup:
            for each in passes:
                cleanup.callback(each.stop)
            self._resume(passes)
            self._through_segments(passes, rounds, held)
            self._resume([each for each in passes if each.proves])
        return passes, rounds

    def _through_segments(self, passes: Sequence[KeepingPass], rounds: list[_Round], held: ExitStack | None) -> None:
        """Load each segment before which passes stand, and bring them to the next."""
        segments = self.skeleton.segments
        while standing := [each for each in passes if isinstance(each.place, AtSegment)]:
            index = min(_index(each) for each in standing)
            here = [each for each in standing if _index(each) == index]
            holds = held is not None and self.skeleton.runs_once and self.holds()
            with ExitStack() as loaded:
                loaded.enter_context(self._loaded(segments[index], holds))
                for each in here:
                    each.holds = holds
                self._resume(here)
                weights = loaded.pop_all() if held is not None and holds else None
            if held is not None and weights is not None:
                held.push(weights)
            rounds.append((segments[index], here, weights))
            self.on_step(len(rounds), 2 * max(len(rounds), len(segments)) + 1)

    def _resume(self, passes: Sequence[KeepingPass]) -> None:
        for each in passes:
            self.batch = each.batch
            each.fetch()
            with told(self.skeleton.text):
                each.resume()
            if self.parks is not None and not torch.is_grad_enabled():
                each.park(self.parks, self._own)

    def _end(self, each: KeepingPass, loss: Loss) -> float:
        """Ask for the loss of a batch, and run its gradient back to the last segment."""
        self.batch, hidden, total = each.batch, each.read(), 0.0
        gradient = torch.zeros_like(hidden)
        size = max(1, CHUNK_LOGITS // self.vocabulary)
        for start in range(0, len(hidden), size):
            places = self.chunk = torch.arange(start, min(start + size, len(hidden)), device=hidden.device)
            chunk = hidden[start : start + size].requires_grad_()
            with torch.enable_grad():
                value = loss(self.logits(chunk), each.batch, places)
            torch.autograd.backward(value)
            if chunk.grad is not None:
                gradient[start : start + size] = chunk.grad
            total += float(value.detach())
        self.chunk = None
        each.back(gradient)
        return total

    @property
    def vocabulary(self) -> int:
        """How many logits there are of a token, about: rows of the input embedding."""
        weight: torch.Tensor = self.skeleton.text.get_input_embeddings().weight
        return len(weight)


_Round = tuple[Segment, list[KeepingPass], ExitStack | None]
"""A segment that was loaded, the passes that went through it, and its weights where it keeps them."""


def _index(each: Pass) -> int:
    return each.place.index if isinstance(each.place, AtSegment) else -1


def _is_decoder(module: nn.Module, block: nn.Module, head: nn.Module) -> bool:
    """Whether a module is a model that holds the blocks and not the head."""
    inside = list(module.modules()) if isinstance(module, PreTrainedModel) else []
    return any(each is block for each in inside) and all(each is not head for each in inside)


class _Ended(MoeModelOutputWithPast):  # type: ignore[misc]  # untyped where transformers is not installed
    """What a decoder gives: hidden states, and nothing else that a model may ask for."""

    def __getattr__(self, _name: str) -> None:
        return None
