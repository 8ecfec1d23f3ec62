"""Transforms in a walk: they are asked, their changes put where weights are read, handed over, and restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.crew import ALONE, Crew
from quantkit.engine.equality import check_logits
from quantkit.engine.originals import Originals, inside
from quantkit.engine.passes import AtSegment
from quantkit.engine.segment import Segment
from quantkit.engine.segment_runs import SegmentRuns
from quantkit.engine.smoothing import SmoothingFinder, Trial
from quantkit.engine.structure import find_structure
from quantkit.engine.tasks import MODEL, SavedChange, VariantTask
from quantkit.methods.base import InputStatistics
from quantkit.transforms.base import Change, Changes, SegmentView, SmoothingPlace, Structure, Transform


@dataclass(frozen=True, slots=True)
class _Model:
    """See :class:`quantkit.transforms.base.ModelView`."""

    transforming: Transforming
    before: Changes

    @property
    def originals(self) -> Originals:
        return self.transforming.originals

    def structure(self) -> Structure:
        return self.transforming.structure()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        named = self.originals.skeleton.model.named_parameters(remove_duplicate=False)
        return {name: tuple(parameter.shape) for name, parameter in named}

    def parameter(self, name: str) -> torch.Tensor:
        return _changed(self.before, name, self.originals.parameter(name))


@dataclass(slots=True)
class Transforming:
    """What the transforms of all tasks do to the model, and to the segment at which a walk stands.

    Args:
        originals: the parameters of the checkpoint.
        live: the passes run through what a task's transforms make of each segment, as with quantized inputs; otherwise
            they run through the segment as it is, and statistics follow from its own.
        mixed: the passes run through what transforms make of the whole model, which is the same for all tasks; as they
            do with quantized inputs.
    """

    originals: Originals
    live: bool
    mixed: bool = False
    _models: dict[str, Changes] = field(default_factory=dict)
    _segments: dict[str, list[Change | None]] = field(default_factory=dict)
    _places: list[SmoothingPlace] = field(default_factory=list)
    _structure: Structure | None = None
    _asked: list[tuple[Sequence[Transform], list[Change | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mixed = self.mixed or self.live

    # What a task's weights become

    def of(self, task: VariantTask) -> Changes:
        """All changes of a task at the segment at which the walk stands."""
        return Changes((*self._model(task).parts, *_made(self._segments.get(task.name, []))))

    def statistics(self, task: VariantTask, layer: str, found: InputStatistics) -> InputStatistics:
        """The statistics of a layer's input for a task, from those that were gathered."""
        return self.unseen(task).statistics(layer, found)

    def unseen(self, task: VariantTask) -> Changes:
        """The changes of a task at the segment at which the walk stands through which the passes do not run."""
        model = () if self.mixed else self._model(task).parts
        return Changes((*model, *(() if self.live else _made(self._segments.get(task.name, [])))))

    def structure(self) -> Structure:
        """What a run of a few tokens through the model shows of it; found once."""
        if self._structure is None:
            self._structure = find_structure(self.originals)
        return self._structure

    # The whole model

    def begin(self, task: VariantTask) -> None:
        """Ask a task's transforms what they do to the whole model, and give its sink what no segment will."""
        changes = self._of_model(task.transforms)
        self._models[task.name] = Changes(_made(changes))
        if any(transform.learns for transform in task.transforms):
            self.structure()  # now: later it would take the place of what passes run through
        if task.memory is not None and task.transforms:
            task.memory.remember_changes(MODEL, [SavedChange.of(change) for change in changes])
        self._hand_over_rest(task)

    def of_model(self, transforms: Sequence[Transform]) -> Changes:
        """What transforms do to the whole model, which must compute what it did.

        Raises:
            QuantizationError: it does not.
        """
        return Changes(_made(self._of_model(transforms)))

    def _of_model(self, transforms: Sequence[Transform]) -> list[Change | None]:
        """The same, transform by transform; found once for all alike."""
        for asked, known in self._asked:
            if _alike(asked, transforms):
                return known
        changes: list[Change | None] = []
        for transform in transforms:
            changes.append(transform.of_model(_Model(self, Changes(_made(changes)))))
        made = [each.name for each, change in zip(transforms, changes, strict=True) if change is not None]
        if made:
            check_logits(self.originals, Changes(_made(changes)), "+".join(made))
        self._asked.append((transforms, changes))
        return changes

    def apply_to_frame(self, task: VariantTask) -> None:
        """Put what a task changes outside the segments into the parameters through which the passes run."""
        for name in self._model(task).touches():
            module = self.originals.skeleton.model.get_submodule(name)
            if self._segment_of(name) is None and not any(each.is_meta for each in module.parameters(recurse=False)):
                self.originals.put(self._model(task), name)

    # A segment

    def find(self, trial: Trial | None, crew: Crew = ALONE) -> None:
        """Find where the inputs of a segment can be scaled; what held in the last segment is tried first.

        Args:
            trial: the segment with a batch; None where none stands before it here.
            crew: the processes that are to find the same.
        """
        found = None if trial is None else self._found(trial)
        self._places = crew.agreed(found) or []

    def _found(self, trial: Trial) -> list[SmoothingPlace]:
        finder, inputs = SmoothingFinder(trial), [tuple(layers) for layers in trial.inputs]
        same = bool(self._places) and all(place.balance_layers in inputs for place in self._places)
        return self._places if same and finder.confirms(self._places) else finder.find()

    def has_work(self, tasks: Sequence[VariantTask]) -> bool:
        """Whether some transform can do something in the segment: one that does more than to smooth, or has a place."""
        asked = [transform for task in tasks for transform in task.transforms if transform.needs]
        return any(bool(self._places) or not transform.smooths for transform in asked)

    def choose(
        self,
        task: VariantTask,
        segment: Segment,
        known: Mapping[str, InputStatistics],
        places: Sequence[tuple[Batch, AtSegment]] = (),
    ) -> None:
        """Ask a task's transforms what they do to a segment.

        Args:
            task: it.
            segment: it is loaded.
            known: the gathered statistics of each layer's input.
            places: the batches that come to the segment, and with what, where a transform learns from them.
        """
        done = self._segments[task.name] = []
        for transform in task.transforms:
            view = self._view(task, transform, segment, known)
            if transform.learns and places:
                heads = [each for each in self.structure().heads if inside([each.values], segment.prefix)]
                view = replace(view, heads=heads, runs=SegmentRuns.of(segment, places))
            done.append(transform.of_segment(view) if transform.needs else None)

    def _view(
        self, task: VariantTask, transform: Transform, segment: Segment, known: Mapping[str, InputStatistics]
    ) -> SegmentView:
        """A segment as a transform finds it after those before it."""
        before, unseen = self.of(task), self.unseen(task)
        gathered = {layer.path: known[layer.name] for layer in segment.layers if layer.name in known}
        seen = Changes(_made(self._segments[task.name])) if self.live else unseen
        statistics = {path: seen.statistics(path, found) for path, found in gathered.items()}
        if before.parts:  # what was derived for variants that see the model as it is does not hold for its weights
            statistics = {path: replace(found, derived={}) for path, found in statistics.items()}
        return SegmentView(
            segment.prefix,
            [place.inside(segment.prefix) for place in self._places] if transform.smooths else [],
            {layer.path: task.schemes[layer.name] for layer in segment.layers if layer.name in task.schemes},
            task.scale_dtype,
            lambda name: _changed(before, name, self.originals.parameter(name)),
            {path: found.only(transform.needs) for path, found in statistics.items()},
            task.method,
            leaves=self._leaves,
        )

    def _leaves(self, module: str) -> list[str]:
        owner = self.originals.skeleton.model.get_submodule(module)
        return [leaf for leaf, _ in owner.named_parameters(recurse=False)]

    def apply(self, task: VariantTask, segment: Segment) -> None:
        """Put a task's changes into the parameters of the segment through which the passes run."""
        changes = self.of(task)
        for name in inside(changes.touches(), segment.prefix):
            self.originals.put(changes, name)

    def put_back(self, task: VariantTask, segment: Segment) -> None:
        """Put into the segment what an earlier walk's transforms made of its parameters."""
        if task.memory is not None and task.memory.has(segment.prefix):
            saved = zip(task.transforms, task.memory.changes(segment.prefix), strict=True)
            self._segments[task.name] = [
                None if each is None else self._restored(transform, each) for transform, each in saved
            ]
            self.apply(task, segment)
            del self._segments[task.name]

    def _restored(self, transform: Transform, saved: SavedChange) -> Change:
        tensors = {name: tensor.to(self.originals.device) for name, tensor in saved.tensors.items()}
        return transform.restore(tensors, saved.data)

    def hand_over(self, task: VariantTask, segment: Segment) -> None:
        """Give a task's sink the float tensors that it changes in a segment, and forget what it did there."""
        inside = [name for name in self.of(task).touches() if self._segment_of(name) == segment.prefix]
        self._replace(task, inside)
        changes = self._segments.pop(task.name, [None] * len(task.transforms))
        if task.memory is not None and task.transforms:
            task.memory.remember_changes(segment.prefix, [SavedChange.of(change) for change in changes])

    # What they share

    def _model(self, task: VariantTask) -> Changes:
        return self._models.get(task.name, Changes())

    def _segment_of(self, module: str) -> str | None:
        """The prefix of the segment that holds a module."""
        inside = (each.prefix for each in self._all_segments() if module.startswith(f"{each.prefix}."))
        return next(inside, None)

    def _all_segments(self) -> list[Segment]:
        skeleton = self.originals.skeleton
        return [*skeleton.towers, *skeleton.segments]

    def _hand_over_rest(self, task: VariantTask) -> None:
        """Give a task's sink what its transforms change where it solves nothing, unless an earlier walk did."""
        skeleton = self.originals.skeleton
        outside = [each for each in (skeleton.embedding, skeleton.head) if each is not None]
        blocks = {each.prefix for each in skeleton.segments if any(name in task.schemes for name in each.linears)}
        solved = [*blocks, *(each.prefix for each in outside if each.linears[0] in task.schemes)]
        if task.memory is None or not any(task.memory.has(prefix) for prefix in solved):
            touched = self._model(task).touches()
            self._replace(task, [name for name in touched if self._segment_of(name) not in blocks])

    def _replace(self, task: VariantTask, modules: Iterable[str]) -> None:
        """Give a task's sink the float parameters of modules that it changes."""
        skeleton, reader = self.originals.skeleton, self.originals.reader
        for module in modules:
            for leaf, _ in skeleton.model.get_submodule(module).named_parameters(recurse=False):
                parameter = f"{module}.{leaf}"
                original = self.originals.parameter(parameter)
                changed = self.of(task).apply(module, leaf, original)
                if changed is not original and not self._is_solved(task, parameter):
                    dtype = reader.dtype(skeleton.stored_name(parameter))
                    task.sink.replace(*skeleton.names.as_written(parameter, changed.to(dtype).cpu()))

    def _is_solved(self, task: VariantTask, parameter: str) -> bool:
        """Whether a parameter is the weight of a layer that a task quantizes."""
        return parameter.endswith(".weight") and self.originals.skeleton.names.layer(parameter) in task.schemes


def _made(changes: Sequence[Change | None]) -> tuple[Change, ...]:
    return tuple(change for change in changes if change is not None)


def _changed(changes: Changes, parameter: str, value: torch.Tensor) -> torch.Tensor:
    module, _, leaf = parameter.rpartition(".")
    return changes.apply(module, leaf, value)


def _alike(one: Sequence[Transform], other: Sequence[Transform]) -> bool:
    """Whether transforms are the same with the same options."""
    return [(type(each), each.options) for each in one] == [(type(each), each.options) for each in other]
