"""A model that is larger than the memory: its weights are read a block at a time, for all rows of text together.

Rows go through the model's own code, block by block, by the passes of :mod:`quantkit.engine.reverse`; what they hold
between blocks waits on the device, in the memory of the CPU or on disk. At the end the head makes logits of a few
tokens at a time. A quantized checkpoint of any format is decoded tensor by tensor as blocks are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.batches import Batch, make_batches
from quantkit.engine.kept_calls import Fetch, Keep
from quantkit.engine.reverse import CHUNK_LOGITS, ReverseWalk
from quantkit.engine.segment import Segment, WeightReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import (
    CheckpointError,
    EvaluationError,
    QuantizationError,
    QuantkitError,
    SchemeError,
    SourceError,
)
from quantkit.exports import open_export
from quantkit.exports.adapter import adapter_beside, read_terms
from quantkit.exports.decoded_reader import DecodedReader
from quantkit.exports.rewriting import model_of, origin_folder
from quantkit.runtimes._checkpoint import check_checkpoint
from quantkit.runtimes._choice import is_float
from quantkit.runtimes._rounding import check_layers, put_cache_rounders, put_rounders, put_turns, rounders_of
from quantkit.runtimes.base import LoadedModel, LoadOptions
from quantkit.system.devices import device_name
from quantkit.system.products import fast_linears

PROOF_TOKENS = 8
"""Of the row that the model's own code reads to its end, to see that its logits are made of the last hidden states."""
BATCH_TOKENS = {"cpu": 0, "cuda": 16384}
"""Tokens of rows that are read together: a row at a time on a CPU, to which it makes no difference."""
TOGETHER = 1 << 18
"""Tokens of the rows of a task that go through the blocks together, where there is room for what they hold."""
LOAD_WHOLE = "set evaluation.loader: whole"
WRITES_NOT = "a model that is read a block at a time reads all its weights for every token that it writes"


class StreamedModel(LoadedModel):
    """A model of which one block is in memory.

    Args:
        skeleton: the model.
        reader: its weights.
        device: where it computes.
        dtype: in which.
        keep: where what rows hold between blocks waits; None for where it is.
        together: tokens of the rows of a task that go through the blocks together.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or not finite.
        QuantizationError: the model has no head beside its decoder.
    """

    writes = False

    def __init__(
        self,
        skeleton: Skeleton,
        reader: WeightReader,
        device: torch.device,
        dtype: torch.dtype,
        keep: Keep | None,
        together: int,
    ) -> None:
        self._skeleton, self._reader, self._device, self._dtype, self._keep = skeleton, reader, device, dtype, keep
        self._together = together
        self.vocabulary = int(skeleton.model.config.get_text_config().vocab_size)
        self.dtype, self.device = str(dtype).removeprefix("torch."), device_name(device)
        self._ready: dict[bytes, list[Fetch]] = {}
        self._most = 0
        self._on_step: Callable[[int, int], None] = lambda _done, _total: None
        self._walk = ReverseWalk(
            skeleton,
            reader,
            device,
            dtype,
            self._loaded,
            parks=keep,
            on_step=lambda done, total: self._step(done, total),
        )
        self._walk.__enter__()
        self._head = ExitStack()
        self._most = self._weighed()

    def _step(self, done: int, total: int) -> None:
        self._on_step(done, total // 2)  # it counts the way back, which is not taken

    def read_ahead(self, rows: Sequence[torch.Tensor], on_step: Callable[[int, int], None]) -> None:
        """Bring rows through all blocks, each of which is read once.

        Raises:
            EvaluationError: the model's code fails on them, or makes its logits of more than the last hidden states.
            OutputError: the disk on which they wait is full.
        """
        self._head.close()
        self._on_step = on_step
        batches = make_batches([row.tolist() for row in rows], self._device, False, BATCH_TOKENS[self._device.type])
        with torch.inference_mode(False), _as_evaluation(), fast_linears():
            hidden = self._walk.proven_hidden(batches, _proof(rows[0], self._device))
            for batch, found in zip(batches, hidden, strict=True):
                parts = torch.split(found, list(batch.row_lengths()))
                for place, part in zip(batch.rows, parts, strict=True):
                    self._ready.setdefault(_key(rows[place]), []).append(self._kept(part))

    def _kept(self, hidden: torch.Tensor) -> Fetch:
        return (lambda: hidden) if self._keep is None else self._keep(hidden)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of a row; of one that was not read ahead, all blocks are read for it."""
        return torch.cat(list(self.logits_in_parts(ids)))

    def logits_in_parts(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """The same, for some of its tokens at a time."""
        if _key(ids) not in self._ready:
            self.read_ahead([ids], lambda _done, _total: None)
        waiting = self._ready[_key(ids)]
        hidden = waiting.pop()()
        if not waiting:
            del self._ready[_key(ids)]
        if self._skeleton.head is not None and self._skeleton.head.module.weight.is_meta:
            self._head.enter_context(self._loaded(self._skeleton.head, False))
        for part in torch.split(hidden, max(1, CHUNK_LOGITS // self.vocabulary)):
            with torch.no_grad(), fast_linears():
                found = self._walk.logits(part)
            yield found

    def logits_of(self, rows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Rows together, as many as there is room for."""
        start = 0
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and sum(map(len, rows[start : stop + 1])) <= self._together:
                stop += 1
            self.read_ahead(rows[start:stop], lambda _done, _total: None)
            yield from map(self.logits, rows[start:stop])
            start = stop

    def prefill(self, ids: torch.Tensor) -> None:
        """One pass of ``ids`` through all blocks."""
        self.logits(ids)

    def decode(self, prompt: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        """It does not write.

        Raises:
            EvaluationError: always.
        """
        raise EvaluationError(WRITES_NOT, "leave 'speed' out of evaluation.metrics")

    def greedy(self, prompt: torch.Tensor) -> Iterator[int]:
        """It does not write.

        Raises:
            EvaluationError: always.
        """
        raise EvaluationError(WRITES_NOT, "leave out answers, samples and tasks that write")

    def weights_bytes(self) -> int:
        """Bytes of the weights that were in memory at once, at most."""
        return self._most

    def facts(self) -> dict[str, Any]:
        """The version of transformers."""
        import transformers

        return {"transformers": transformers.__version__}

    @contextmanager
    def _loaded(self, segment: Segment, _for_gradients: bool) -> Iterator[None]:
        """A segment with its weights; a tied head has those of the embedding, which lie there."""
        skeleton, module = self._skeleton, segment.module
        shares = segment is skeleton.head and skeleton.tied and not skeleton.names.has(f"{segment.prefix}.weight")
        if shares:
            empty, module.weight = module.weight, skeleton.text.get_input_embeddings().weight
        else:
            skeleton.load(segment, self._reader, self._device, self._dtype)
        self._most = max(self._most, self._weighed())
        try:
            yield
        finally:
            if shares:
                module.weight = empty
            else:
                skeleton.unload(segment)

    def _weighed(self) -> int:
        model = self._skeleton.model
        tensors = [each for each in chain(model.parameters(), model.buffers()) if not each.is_meta]
        return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def load_streamed(path: Path, options: LoadOptions, keep: Keep | None, together: int = TOGETHER) -> StreamedModel:
    """A checkpoint, float or of any format that quantkit reads, to be read a block at a time.

    Args:
        path: the checkpoint.
        options: how it is loaded.
        keep: where what rows hold between blocks waits; None for where it is.
        together: tokens of the rows of a task that go through the blocks together.

    Raises:
        EvaluationError: its model cannot be run so, with the reason.
    """
    check_checkpoint(path)
    device, wanted = torch.device(options.device), FLOATS[options.dtype] if options.dtype else None
    with _as_evaluation(CheckpointError), TemporaryDirectory(prefix="quantkit-streamed-") as scratch:
        reader: WeightReader
        rounded: tuple[str, ...] = ()
        if is_float(path):
            skeleton, reader = Skeleton(path, options.trust_remote_code), CheckpointReader(path)
        else:
            export, adapter = open_export(path), adapter_beside(path)
            reader = DecodedReader(export, {} if adapter is None else read_terms(adapter))
            origin = origin_folder(export, Path(scratch) / "origin")
            skeleton, _ = model_of(export, origin, options.trust_remote_code)
            rounders, paths = rounders_of(export), {layer.name: layer.path for layer in skeleton.layers()}
            check_layers(skeleton.model, rounders, paths)
            put_turns(skeleton.model, export, paths)
            rounded = put_rounders(skeleton.model, rounders, paths)
            rounded += put_cache_rounders(skeleton.model, export, paths)
        skeleton.check_blocks()
        own = getattr(skeleton.model.config, "dtype", None)
        model = StreamedModel(skeleton, reader, device, wanted or own or torch.float32, keep, together)
        model.rounded_inputs = rounded
        return model


@contextmanager
def _as_evaluation(*further: type[QuantkitError]) -> Iterator[None]:
    """Turn what the engine says of a model, and further errors, into what an evaluation says of it."""
    known: tuple[type[QuantkitError], ...] = (SourceError, QuantizationError, SchemeError, *further)
    try:
        yield
    except known as error:
        problem = error.problem.replace("the calibration rows", "the text")
        raise EvaluationError(f"the model cannot be read a block at a time: {problem}", LOAD_WHOLE) from error


def _proof(row: torch.Tensor, device: torch.device) -> Batch:
    return make_batches([row[:PROOF_TOKENS].tolist()], device, False)[0]


def _key(ids: torch.Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()
