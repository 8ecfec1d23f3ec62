"""Transforms in a walk: they are asked, their changes put where weights are read, handed over, and restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from quantkit.engine.skeleton import Segment, Skeleton, WeightReader
from quantkit.engine.smoothing import SmoothingFinder, Trial
from quantkit.engine.tasks import MODEL, SavedChange, VariantTask
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics
from quantkit.transforms.base import Change, Changes, SegmentView, SmoothingPlace, Transform


@dataclass(frozen=True, slots=True)
class Originals:
    """The parameters of the checkpoint in float32, whatever the passes compute in."""

    skeleton: Skeleton
    reader: WeightReader
    device: torch.device

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model."""
        return self.skeleton.read(name, self.reader.read).to(self.device).float()

    def weight(self, path: str) -> torch.Tensor:
        """The weight of the layer at a place of the model, ``[out_features, in_features]``."""
        return self.parameter(f"{path}.weight")


@dataclass(frozen=True, slots=True)
class _Model:
    """See :class:`quantkit.transforms.base.ModelView`."""

    originals: Originals
    before: Changes

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
        live: the passes run through what a task's transforms make of the model, as with quantized inputs; otherwise
            they run through the model as it is, and statistics follow from its own.
    """

    originals: Originals
    live: bool
    _models: dict[str, Changes] = field(default_factory=dict)
    _segments: dict[str, list[Change | None]] = field(default_factory=dict)
    _places: list[SmoothingPlace] = field(default_factory=list)

    # What a task's weights become

    def of(self, task: VariantTask) -> Changes:
        """All changes of a task at the segment at which the walk stands."""
        return Changes((*self._model(task).parts, *_made(self._segments.get(task.name, []))))

    def statistics(self, task: VariantTask, layer: str, found: InputStatistics) -> InputStatistics:
        """The statistics of a layer's input for a task, from those that were gathered."""
        return found if self.live else self.of(task).statistics(layer, found)

    # The whole model

    def begin(self, task: VariantTask) -> None:
        """Ask a task's transforms what they do to the whole model, and give its sink what no segment will."""
        changes: list[Change | None] = []
        for transform in task.transforms:
            changes.append(transform.of_model(_Model(self.originals, Changes(_made(changes)))))
        self._models[task.name] = Changes(_made(changes))
        if task.memory is not None and task.transforms:
            task.memory.remember_changes(MODEL, [SavedChange.of(change) for change in changes])
        self._check_tied(task)
        self._hand_over_rest(task)

    def apply_to_frame(self, task: VariantTask) -> None:
        """Put what a task changes outside the segments into the parameters through which the passes run."""
        for name in self._model(task).touches():
            module = self.originals.skeleton.model.get_submodule(name)
            if self._segment_of(name) is None and not any(each.is_meta for each in module.parameters(recurse=False)):
                self._put(self._model(task), name, module)

    # A segment

    def find(self, trial: Trial) -> None:
        """Find where the inputs of a segment can be scaled; what held in the last segment is tried first."""
        finder, inputs = SmoothingFinder(trial), [tuple(layers) for layers in trial.inputs]
        same = bool(self._places) and all(place.balance_layers in inputs for place in self._places)
        if not (same and finder.confirms(self._places)):
            self._places = finder.find()

    def has_work(self, tasks: Sequence[VariantTask]) -> bool:
        """Whether some transform can do something in the segment: one that does more than to smooth, or has a place."""
        asked = [transform for task in tasks for transform in task.transforms if transform.needs]
        return any(bool(self._places) or not transform.smooths for transform in asked)

    def choose(self, task: VariantTask, segment: Segment, known: Mapping[str, InputStatistics]) -> None:
        """Ask a task's transforms what they do to a segment, from the gathered statistics of each layer's input."""
        done = self._segments[task.name] = []
        for transform in task.transforms:
            view = self._view(task, transform, segment, known)
            done.append(transform.of_segment(view) if transform.needs else None)

    def _view(
        self, task: VariantTask, transform: Transform, segment: Segment, known: Mapping[str, InputStatistics]
    ) -> SegmentView:
        """A segment as a transform finds it after those before it."""
        before, new = self.of(task), Changes(_made(self._segments[task.name]))
        gathered = {layer.path: known[layer.name] for layer in segment.layers if layer.name in known}
        seen = new if self.live else before
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
        )

    def apply(self, task: VariantTask, segment: Segment) -> None:
        """Put a task's changes into the parameters of the segment through which the passes run."""
        changes = self.of(task)
        for name in changes.touches():
            if name == segment.prefix or name.startswith(f"{segment.prefix}."):
                self._put(changes, name, self.originals.skeleton.model.get_submodule(name))

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

    def _put(self, changes: Changes, name: str, module: nn.Module) -> None:
        for leaf, parameter in module.named_parameters(recurse=False):
            changed = changes.apply(name, leaf, self.originals.parameter(f"{name}.{leaf}"))
            parameter.data = changed.to(parameter.dtype)

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

    def _check_tied(self, task: VariantTask) -> None:
        """Refuse changes by which a head and an embedding that share a weight would have to differ.

        Raises:
            QuantizationError: the transforms change one of them only, or each in its way.
        """
        skeleton, changes = self.originals.skeleton, self._model(task)
        outside = [each.prefix for each in (skeleton.embedding, skeleton.head) if each is not None]
        if not skeleton.tied or any(name in task.schemes for name in skeleton.tied) or not changes.parts:
            return
        original = self.originals.weight(outside[0])
        first, second = (changes.apply(path, "weight", original) for path in outside)
        if not torch.equal(first, second):
            raise QuantizationError(
                f"{task.name}: the transforms change the input embedding and the output head, which share a weight, "
                "each in its own way",
                "quantize one of them, which makes two weights of it: embeddings, or ignore without lm_head",
            )


def _made(changes: Sequence[Change | None]) -> tuple[Change, ...]:
    return tuple(change for change in changes if change is not None)


def _changed(changes: Changes, parameter: str, value: torch.Tensor) -> torch.Tensor:
    module, _, leaf = parameter.rpartition(".")
    return changes.apply(module, leaf, value)
