"""What reads and writes the residual stream, and where heads of values are: found by a run of a few tokens.

No table of model names: a float32 pass of random tokens goes through the blocks, each of which is loaded for the time.

- The **stream** is what a block is given, and whatever is this and a sum of what modules inside it give. What norms are
  given and what the block returns must be such sums; the modules in the sums write to the stream.
- What **reads** it are the layers and routers whose inputs are rows of a norm's output, or of the stream itself.
- Then the block is tried: turned by an orthogonal matrix in all that reads and writes, and given turned hidden states,
  it must return turned ones. Whatever else minds which channel is which shows there, and the stream is left alone.
- **Heads of values** are found as smoothing places are (:mod:`quantkit.engine.smoothing`), where the channels of a head
  may be turned together: the largest pieces for which the block adds what it did.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.calls import hidden_states, recorded, rows_of, same, with_hidden
from quantkit.engine.experts import showing_all
from quantkit.engine.groups import shared_inputs
from quantkit.engine.originals import Originals, inside
from quantkit.engine.passes import AtSegment, Pass, told
from quantkit.engine.pausing import pause_at
from quantkit.engine.segment import Segment
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.smoothing import SmoothingFinder, Trial
from quantkit.engine.stream import NUMBER, Hindrance, Stream
from quantkit.numerics.orthogonal import Orthogonal, hadamard_rotation, random_rotation
from quantkit.system.host import decide
from quantkit.transforms.base import SmoothingPlace, Structure, ValueHeads
from quantkit.transforms.rotate import Rotation

TOKENS = 48
"""Random tokens of the run."""
SPECIAL = re.compile("token_(id|index)$")


def trial_batch(skeleton: Skeleton, device: torch.device) -> Batch:
    """A row of random tokens of a model, without those that stand for images, sound and the like."""
    vocabulary = skeleton.text.get_input_embeddings().weight.shape[0]
    special = {value for key, value in _numbers(skeleton.model.config.to_dict()) if SPECIAL.search(key)}
    draws = torch.randint(vocabulary, (8 * TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = [token for token in draws if token not in special] or draws
    return Batch(torch.tensor([plain[:TOKENS]], device=device), None)


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, int):
            yield str(key), value
        else:
            yield from _numbers(value)


def find_structure(originals: Originals) -> Structure:
    """What a run of a few tokens through the model shows of it.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or not finite.
        QuantizationError: the model's code does not run.
    """
    return _Search(originals).run()


@dataclass(slots=True)
class _Search:
    originals: Originals
    _stream: Stream | None = None
    _why: str = ""
    _heads: list[ValueHeads] = field(default_factory=list)
    _known: list[tuple[SmoothingPlace, int]] = field(default_factory=list)

    def run(self) -> Structure:
        skeleton, reader, device = self.originals.skeleton, self.originals.reader, self.originals.device
        self._why = hindrance(skeleton)
        blocks = skeleton.segments
        segments = [*blocks, *([skeleton.head] if skeleton.head is not None else [])]
        with torch.no_grad(), ExitStack() as cleanup:
            skeleton.load_frame(reader, device, torch.float32)
            pause_at(segments, skeleton.text.get_output_embeddings(), cleanup)
            walker = Pass(skeleton.text, trial_batch(skeleton, device))
            cleanup.callback(walker.stop)
            self._enter(walker, segments)
            for index, segment in enumerate(segments):
                if not isinstance(walker.place, AtSegment) or walker.place.index != index:
                    self._leave(f"text does not reach {segment.prefix}, which may read it")
                    continue
                skeleton.load(segment, reader, device, torch.float32)
                with told(skeleton.text):
                    if segment.is_layer:
                        self._head(segment, walker.place)
                    else:
                        self._block(segment, walker.place)
                        self._go_on(walker, segments, last=index == len(blocks) - 1)
                skeleton.unload(segment)
        if self._why or self._stream is None:
            return Structure(None, self._why, tuple(self._heads))
        return Structure(self._stream.found(), "", tuple(self._heads))

    def _leave(self, why: str) -> None:
        """The stream cannot be turned; the first reason counts."""
        self._why = self._why or why

    # The residual stream

    def _enter(self, walker: Pass, segments: Sequence[Segment]) -> None:
        """Run up to the first block: the stream begins with what embeddings give."""
        with told(self.originals.skeleton.text):
            width = self.originals.skeleton.text.get_input_embeddings().weight.shape[1]
            with recorded(_frame(self.originals.skeleton, segments), width) as moments:
                walker.resume()
            if not isinstance(walker.place, AtSegment):
                return
            hidden = hidden_states(walker.place.args, walker.place.kwargs, width)
            if hidden is None:
                self._leave("the first block is not given what the embedding gives")
                return
            self._stream = Stream(self.originals, rows_of(hidden, width, hidden), tried_with(width))
            self._try(lambda stream: stream.begin(moments))

    def _go_on(self, walker: Pass, segments: Sequence[Segment], *, last: bool) -> None:
        """Run through a block; behind the last one the norm before the head is looked at."""
        stream = self._stream
        if stream is None or self._why:
            walker.resume()
            return
        width = stream.now.shape[-1]
        with recorded(_frame(self.originals.skeleton, segments) if last else (), width) as moments:
            walker.resume()
        if last:
            self._try(lambda stream: stream.follow(moments))
            return
        place = walker.place
        given = hidden_states(place.args, place.kwargs, width) if isinstance(place, AtSegment) else None
        if given is not None and not same(rows_of(given, width, given), stream.now):
            self._leave("something is done to the hidden states between blocks")

    def _try(self, work: Any) -> None:
        if self._stream is not None and not self._why:
            try:
                work(self._stream)
            except Hindrance as hindrance:
                self._leave(str(hindrance))

    def _head(self, segment: Segment, place: AtSegment) -> None:
        self._try(lambda stream: stream.end(segment, place.args[0]))

    def _block(self, segment: Segment, place: AtSegment) -> None:
        """Look at a block before which the pass stands: who reads and writes the stream, and its heads."""

        def look(stream: Stream) -> None:
            width = stream.now.shape[-1]
            named = [
                (f"{segment.prefix}.{name}".rstrip("."), module) for name, module in segment.module.named_modules()
            ]
            with recorded(named, width) as moments, showing_all(segment.module):
                segment.module(*place.args, **place.kwargs)
            before = stream.now
            added = stream.follow(moments, segment)
            self._check(segment, place, before, stream, added)

        self._try(look)
        self._find_heads(segment, place)

    def _check(self, segment: Segment, place: AtSegment, before: torch.Tensor, stream: Stream, added: Rotation) -> None:
        """A block that is turned and given turned hidden states must return turned ones."""
        given = hidden_states(place.args, place.kwargs, before.shape[-1])
        args, kwargs = with_hidden(place.args, place.kwargs, given, stream.matrix.columns(before))
        with self.originals.changed(added, inside(added.touches(), segment.prefix)):
            found = rows_of(segment.module(*args, **kwargs), before.shape[-1], before)
        wanted = stream.matrix.columns(stream.now)
        allowed = 1e-3 * (stream.now - before).norm(dim=-1) + 1e-5 * stream.now.norm(dim=-1)
        if not decide(((found - wanted).norm(dim=-1) <= allowed).all()):
            raise Hindrance(f"something in {segment.prefix} reads it that is no linear layer behind a norm")

    # Heads of values

    def _find_heads(self, segment: Segment, place: AtSegment) -> None:
        tokens = place_tokens(place)
        positions: dict[str, int] = {}

        def run() -> Any:
            return segment.module(*place.args, **place.kwargs)

        groups = shared_inputs({layer.path: layer for layer in segment.layers}, run, positions)
        start = len(segment.prefix) + 1
        inputs = [[name[start:] for name in names] for names in groups if positions[names[0]] == tokens]
        inputs = [names for names in inputs if not any(NUMBER.search(f".{name}") for name in names)]
        given = [each for each in (*place.args, *place.kwargs.values()) if isinstance(each, torch.Tensor)]
        trial = Trial(segment.module, inputs, run, given, segment.shared)
        before = trial.update()
        if not self._known or not all(self._turns(trial, before, segment, *each) for each in self._known):
            places = [each for each in SmoothingFinder(trial).find() if len(each.balance_layers) == 1]
            sizes = [(each, self._largest(trial, before, segment, each)) for each in places]
            self._known = [(each, size) for each, size in sizes if size > 1]
        for each, size in self._known:
            full = each.inside(segment.prefix)
            self._heads.append(ValueHeads(full.smooth_layer, full.balance_layers[0], size))

    def _largest(self, trial: Trial, before: torch.Tensor, segment: Segment, place: SmoothingPlace) -> int:
        """The most channels that may be turned together; 1 for none."""
        maker, reader = (trial.module.get_submodule(name) for name in (place.smooth_layer, place.balance_layers[0]))
        if not isinstance(maker, nn.Linear) or not isinstance(reader, nn.Linear):
            return 1
        most = gcd(maker.weight.shape[0], reader.weight.shape[1])
        sizes = [size for size in range(most, 1, -1) if most % size == 0 and _in_pieces(place, most, size)]
        if not sizes or not self._turns(trial, before, segment, place, sizes[-1]):
            return 1
        return next(size for size in sizes if self._turns(trial, before, segment, place, size))

    def _turns(self, trial: Trial, before: torch.Tensor, segment: Segment, place: SmoothingPlace, size: int) -> bool:
        """Whether the block adds what it did when all pieces of so many channels are turned and turned back."""
        names = [place.smooth_layer, place.balance_layers[0]]
        shapes = dict(trial.module.named_parameters())
        if not all(f"{name}.weight" in shapes for name in names):
            return False
        made, read = (shapes[f"{name}.weight"].shape for name in names)
        if made[0] % size or read[1] % size:
            return False
        maker, reader = (f"{segment.prefix}.{name}" for name in names)
        matrix = tried_with(size, keeps_mean=False)
        with self.originals.changed(Rotation({reader: [matrix]}, {maker: [matrix]}), [maker, reader]):
            found = trial.update()
        allowed = 1e-4 * before.norm(dim=-1) + 1e-6 * trial.hidden_like(before).norm(dim=-1)
        return decide(((found - before).norm(dim=-1) <= allowed).all())


def _in_pieces(place: SmoothingPlace, width: int, size: int) -> bool:
    """Whether pieces of the reader's channels are pieces of the maker's, in the same order."""
    if place.channels is None:
        return True
    pieces = place.channels.cpu().view(-1, size)
    return decide((pieces == pieces[:, :1] + torch.arange(size)).all() & (pieces[:, 0] % size == 0).all())


def place_tokens(place: AtSegment) -> int:
    """How many tokens a pass stands before a block with."""
    first = next(each for each in (*place.args, *place.kwargs.values()) if isinstance(each, torch.Tensor))
    return first.numel() // first.shape[-1]


def tried_with(size: int, *, keeps_mean: bool = True) -> Orthogonal:
    """A matrix to try with."""
    return hadamard_rotation(size, 0, keeps_mean=keeps_mean) or random_rotation(size, 0, keeps_mean=keeps_mean)


def hindrance(skeleton: Skeleton) -> str:
    """Why the stream of a model cannot be turned, as far as that is known without a run; empty for nothing."""
    towers = list(skeleton.tower_weights())
    if towers:
        return f"what {towers[0]} makes of images or sound is written to it"
    if not skeleton.runs_once:
        return "blocks share weights or run again and again"
    if skeleton.head is None or skeleton.embedding is None:
        return f"the {'head' if skeleton.head is None else 'embedding'} of the model is no plain layer"
    return ""


def _frame(skeleton: Skeleton, segments: Sequence[Segment]) -> list[tuple[str, nn.Module]]:
    """The modules around the blocks."""
    apart = {id(module) for segment in segments for module in segment.module.modules()}
    return [(name, module) for name, module in skeleton.model.named_modules() if name and id(module) not in apart]
