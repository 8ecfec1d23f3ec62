"""Tuning a segment all of whose layers are solved: what goes in by the places of the segment, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from quantkit.engine.originals import Originals
from quantkit.engine.segment import Segment
from quantkit.engine.tasks import Tuned, VariantTask
from quantkit.engine.transforming import Transforming
from quantkit.engine.tunable_floats import tunable_floats
from quantkit.engine.tuning import Example, Polish
from quantkit.schemes import QuantizedWeight
from quantkit.schemes.rounding import INPUT_SCALE


def tuned_segment(
    task: VariantTask,
    segment: Segment,
    examples: Sequence[Example],
    solved: Mapping[str, QuantizedWeight],
    transforming: Transforming,
) -> Tuned | None:
    """What tuning makes of a segment of a task; None where it trains nothing of it.

    Args:
        task: the variant.
        segment: it is loaded.
        examples: what batches bring to it and should leave it with.
        solved: by name what the method made of its layers.
        transforming: what the transforms of the task do at it.
    """
    options, originals = task.tune, transforming.originals
    if options is None or not solved:
        return None
    if len(examples) < 2:
        return Tuned(0.0, 0.0, 0, note="fewer than two batches of calibration rows came to it: it was not tuned")
    start = f"{segment.prefix}."
    places = {f"{layer.path.removeprefix(start)}.weight": layer.name for layer in segment.layers}
    weights = {place: solved[name] for place, name in places.items() if name in solved}
    changes = transforming.of(task)
    paths = {f"{layer.path.removeprefix(start)}.weight": layer.path for layer in segment.layers}
    origins = {place: changes.apply(paths[place], "weight", originals.weight(paths[place])) for place in weights}
    others: dict[str, torch.Tensor] = {}
    unseen = transforming.unseen(task)
    if unseen.parts:
        for name, value in segment.module.named_parameters():
            path, _, leaf = f"{start}{name}".rpartition(".")
            others |= {} if name in weights else {name: unseen.apply(path, leaf, value.data)}
    trained = tunable_floats(originals.skeleton, segment, options.train)
    floats = {name.removeprefix(start): each.data for name, each in trained.items()}
    floats |= {name: others.pop(name) for name in list(others) if name in floats}
    done = Polish(segment.module, weights, floats, options, examples, origins, others).run()
    if done is None:
        return None
    return replace(
        done,
        weights={places[place]: _with_scale_of(weights[place], weight) for place, weight in done.weights.items()},
        floats={f"{start}{name}": value for name, value in done.floats.items()},
    )


def hand_over_tuned(task: VariantTask, segment: Segment, done: Tuned, originals: Originals) -> None:
    """Give a task's sink what tuning made of a segment, in the place of what transforms made of its floats."""
    skeleton = originals.skeleton
    task.sink.tuned(segment.prefix, done)
    for parameter, value in done.floats.items():
        dtype = originals.reader.dtype(skeleton.stored_name(parameter))
        task.sink.replace(*skeleton.names.as_written(parameter, value.to(dtype).cpu()))


def _with_scale_of(solved: QuantizedWeight, tuned: QuantizedWeight) -> QuantizedWeight:
    """A tuned weight with the static scale of inputs that it had before."""
    kept = {name: part for name, part in solved.parts.items() if name == INPUT_SCALE}
    return replace(tuned, parts={**tuned.parts, **kept}) if kept else tuned
