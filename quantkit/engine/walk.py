"""The walk: segment by segment, gather the statistics of every input, solve, go on with the result.

Within a segment the layers that share an input form a group. With quantized inputs (``inputs: quantized``) all
passes pause before the first layer of a group; when every pass stands there or beyond, the statistics are
complete, the group is solved, its weights are replaced, and the same passes go on with them: true
sequential calibration in one forward pass. Where the activations of all batches inside a segment would not
fit in memory, the segment is run anew for each group instead, one batch at a time. With float inputs nothing
is replaced and nothing pauses, so that any number of variants is solved from the same statistics.

The experts of a layer are solved together: first what reads the layer's input in all of them, then what reads that.
Their statistics are known when the whole segment has run, so that with quantized inputs a segment with experts is run
anew for each step. Where they would not fit in memory they come in parts.

Batches may leave a segment out, as text leaves out layers that look at images. One that no batch comes to is solved
from its weights alone.

The input embedding, where a task quantizes it, comes before the first segment and is solved from its weight alone: what
it is read with are token ids.

Transforms are asked what they do to the whole model before the first segment, and what they do to a segment before its
first layer is solved, from its statistics as it is; with quantized inputs these are gathered by one more run of it.
Where one mixes channels, passes run through what transforms make of the whole model with float inputs too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.calibrating import Calibration
from quantkit.engine.crew import ALONE, Crew
from quantkit.engine.gathering import Gathering
from quantkit.engine.input_rounding import take_rounders
from quantkit.engine.input_turning import take_turns
from quantkit.engine.originals import Originals
from quantkit.engine.parking import Parking
from quantkit.engine.pausing import pause_at
from quantkit.engine.routing import ROUTED, ExpertSettings
from quantkit.engine.segment import Segment, WeightReader
from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.solver import Solver
from quantkit.engine.tasks import VariantTask
from quantkit.engine.twins import Twins

Inputs = Literal["quantized", "float"]
Strategy = Literal["one-pass", "recompute"]


@dataclass(frozen=True, slots=True)
class WalkSettings:
    """How a walk computes.

    Attributes:
        device: where segments are loaded and solved.
        dtype: of weights and activations in the forward passes; layers are solved in float32.
        inputs: what a layer is calibrated on, see :class:`quantkit.recipe.CalibrationSpec`.
        strategy: ``one-pass`` keeps the activations of all batches alive at a pause, ``recompute`` those of one.
        parking: where activations wait between segments; None where they are.
        tries_again: a GPU that is full ends the walk, and whoever runs it tries with less; without, it is the failure
            of the task whose own work it is.
        experts: how experts are calibrated.
        room: bytes that statistics of experts may take at a time; None for no limit.
        sensitivity: what is known of the model's loss; None for nothing.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    inputs: Inputs = "quantized"
    strategy: Strategy = "one-pass"
    parking: Parking | None = None
    tries_again: bool = False
    experts: ExpertSettings = ROUTED
    room: int | None = None
    sensitivity: Sensitivity | None = None


@dataclass(slots=True)
class Walk:
    """One walk over a model.

    Args:
        skeleton: the model.
        reader: where weights come from.
        batches: the calibration tokens, on the device of the walk.
        tasks: what is solved; quantized inputs is the stream of one variant and takes one task.
        settings: how.
        on_segment: called with the number of finished segments and how many there are.
        crew: the processes that walk together, of which this is one.
    """

    skeleton: Skeleton
    reader: WeightReader
    batches: Sequence[Batch]
    tasks: Sequence[VariantTask]
    settings: WalkSettings
    on_segment: Callable[[int, int], None] = lambda _done, _total: None
    crew: Crew = ALONE
    _solver: Solver = field(init=False)
    _streams: Gathering = field(init=False)
    _twins: Twins | None = field(init=False, default=None)
    _calibration: Calibration = field(init=False)

    def __post_init__(self) -> None:
        originals = Originals(self.skeleton, self.reader, self.settings.device)
        self._solver = Solver(
            self.tasks,
            originals,
            self._is_quantized,
            self.settings.tries_again,
            any(task.mixing for task in self._reading()),
            self.settings.sensitivity,
            self.crew,
        )
        settings = self.settings
        room = settings.room
        self._streams = Gathering(
            self.skeleton.text,
            self.batches,
            settings.parking,
            self.crew,
            needs=self._solver.needs(),
            experts=settings.experts,
            room=room if room is None or self.crew.is_alone else room // 2,  # sums, and a turn's
            sensitivity=settings.sensitivity,
        )
        tunes = self._solver.tunes()
        if self._is_quantized and (tunes or self._solver.corrects()) and self.skeleton.runs_once:
            self._twins = Twins(self.skeleton.text, self.batches, settings.parking, all_paired=tunes, crew=self.crew)
        self._calibration = Calibration(
            self._solver,
            self._streams,
            self._twins,
            quantized=self._is_quantized,
            one_pass=settings.strategy == "one-pass",
            device=settings.device,
            crew=self.crew,
        )

    @property
    def failures(self) -> dict[str, Exception]:
        """By name the tasks that failed and were dropped while others went on."""
        return self._solver.failures

    @property
    def seconds(self) -> dict[str, float]:
        """By name what each task's own work took; the rest of the walk is shared."""
        return self._solver.seconds()

    @property
    def _is_quantized(self) -> bool:
        return self.settings.inputs == "quantized"

    def run(self) -> None:
        """Walk through all segments.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: a layer cannot be solved, and no other task is left that can.
            torch.OutOfMemoryError: the GPU is full.
        """
        if self._is_quantized and len(self.tasks) > 1:
            raise ValueError("quantized inputs is the stream of one variant: give one task per walk")
        if len({str([(each.name, each.options) for each in task.mixing]) for task in self._reading()}) > 1:
            raise ValueError("what mixes channels is the same for all tasks of a walk")
        segments = self._wanted_segments()
        if not self._is_left(segments):
            return
        calibrated = bool(self._reading()) and bool(self.batches)
        with torch.no_grad(), ExitStack() as cleanup:
            layers = [layer.module for segment in segments for layer in segment.layers]
            cleanup.callback(take_rounders, layers)
            cleanup.callback(take_turns, layers)
            self._solver.begin()
            self._solver.agree()
            if calibrated:
                self._load_frame()
                pause_at(segments, self.skeleton.text.get_output_embeddings(), cleanup)
                if self._twins is not None:
                    self._twins.start(segments, cleanup)
            self._solve_embedding(live=calibrated)
            self._solver.agree()
            if calibrated:
                self._streams.start(segments, cleanup)
            for index, segment in enumerate(segments):
                started = self._solver.clock()
                if calibrated or self._solver.at_work(segment):
                    self._pass(segment, calibrated, last=index == len(segments) - 1)
                self._solver.finish(segment, started)
                self._solver.agree()
                self.on_segment(index + 1, len(segments))

    def _reading(self) -> list[VariantTask]:
        """The tasks for which passes run: those that are calibrated, and all where batches that are held out judge."""
        judged = any(batch.held_out for batch in self.batches)
        return [task for task in self.tasks if task.calibrated or judged]

    def _load_frame(self) -> None:
        """Load what runs before, between and after the blocks, as the transforms make it where the passes see that."""
        sees = any(batch.inputs for batch in self.batches)
        apart = self._wanted_towers()
        self.skeleton.load_frame(self.reader, self.settings.device, self.settings.dtype, towers=sees, apart=apart)
        if self._solver.transforming.mixed:
            self._solver.transforming.apply_to_frame(self._solver.alive()[0])

    def _pass(self, segment: Segment, calibrated: bool, last: bool) -> None:
        """Load a segment, solve what is still to be solved of it, and go on."""
        self.skeleton.load(segment, self.reader, self.settings.device, self.settings.dtype)
        self._solver.enter(segment)
        try:
            at_work = bool(self._solver.at_work(segment))
            if not calibrated or (at_work and not self._streams.comes_to(segment)):
                self._calibration.solve_uncalibrated(segment)
            elif at_work:
                self._calibration.calibrate(segment, last)
            else:
                self._calibration.repeat(segment, last)
        finally:
            self.skeleton.unload(segment)

    def _wanted_segments(self) -> list[Segment]:
        head = self.skeleton.head
        wants_head = head is not None and any(head.linears[0] in task.schemes for task in self.tasks)
        return [*self._wanted_towers(), *self.skeleton.segments, *([head] if head is not None and wants_head else [])]

    def _wanted_towers(self) -> list[Segment]:
        """The blocks of models of images and sound of which a task quantizes some; all of a model, in their order."""
        towers = self.skeleton.towers
        asked = {name for task in self.tasks for name in task.schemes}
        wanted = {_list_of(each) for each in towers if not asked.isdisjoint(each.linears)}
        return [each for each in towers if _list_of(each) in wanted]

    def _is_left(self, segments: Sequence[Segment]) -> bool:
        """Whether some task still has something to solve."""
        embedding = self.skeleton.embedding
        places = [(segment.prefix, segment.linears) for segment in segments]
        places += [] if embedding is None else [(embedding.prefix, embedding.linears)]
        return any(task.lacks(prefix, layers) for task in self.tasks for prefix, layers in places)

    def _solve_embedding(self, live: bool) -> None:
        """Solve the input embedding for the tasks that want it.

        Args:
            live: the passes will read it, so that it is loaded and with quantized inputs gives way to the result.
        """
        segment = self.skeleton.embedding
        if segment is None or not any(segment.linears[0] in task.schemes for task in self.tasks):
            return
        if not live:
            self.skeleton.load(segment, self.reader, self.settings.device, self.settings.dtype)
            self.skeleton.unload(segment)
        self._solver.solve_embedding(segment, replace=live and self._is_quantized)


def _list_of(segment: Segment) -> str:
    """The name of the list that a block is in."""
    return segment.prefix.rpartition(".")[0]
