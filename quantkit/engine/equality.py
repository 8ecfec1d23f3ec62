"""Whether a model computes what it did: logits of a few tokens, of the model as it is and as a change makes it.

Two float32 passes go through the model side by side, one block in memory at a time.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch

from quantkit.engine.originals import Originals, inside
from quantkit.engine.passes import AtSegment, Pass, told
from quantkit.engine.pausing import pause_at
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.structure import trial_batch
from quantkit.errors import QuantizationError
from quantkit.system.host import number
from quantkit.transforms.base import Change

ALLOWED = 1e-4
"""Relative difference of a token's logits."""


def check_logits(originals: Originals, change: Change, name: str) -> None:
    """Refuse a change of the whole model that does not leave its logits as they are.

    Nothing is asked where no pass of text goes through the model to an output head.

    Args:
        originals: the model.
        change: it.
        name: of the transform, for the message.

    Raises:
        QuantizationError: some token's logits differ by more than :data:`ALLOWED`.
        CheckpointError: a tensor is missing, of the wrong shape, or not finite.
    """
    if originals.skeleton.head is None:
        return
    difference = largest_difference(originals, change)
    if not difference <= ALLOWED:
        raise QuantizationError(
            f"{name} changes what the float model computes: logits differ by {difference:.1e} of their size in "
            f"float32, and {ALLOWED:.0e} is allowed",
            f"leave out {name}",
        )


def largest_difference(originals: Originals, change: Change) -> float:
    """By how much the logits of a token differ at most, relative to their size."""
    skeleton, device = originals.skeleton, originals.device
    batch = trial_batch(skeleton, device)
    if skeleton.head is None:
        raise ValueError("a model without a head gives no logits")
    segments = [*skeleton.segments, skeleton.head]
    touched = list(change.touches())
    around = [name for name in touched if not any(inside([name], each.prefix) for each in segments)]
    with torch.no_grad(), ExitStack() as cleanup:
        skeleton.load_frame(originals.reader, device, torch.float32)
        pause_at(segments, skeleton.head.module, cleanup)
        passes = [Pass(skeleton.text, batch) for _ in range(2)]
        for each in passes:
            cleanup.callback(each.stop)
        with told(skeleton.text):
            _resume(passes, originals, change, around)
            tables = [name for name in around if _is_table(skeleton, name)]
            around = [name for name in around if name not in tables]
            for index, segment in enumerate(segments):
                if not all(isinstance(each.place, AtSegment) and each.place.index == index for each in passes):
                    continue
                skeleton.load(segment, originals.reader, device, torch.float32)
                own = inside(touched, segment.prefix)
                if segment.is_layer:
                    given = [each.place.args[0] for each in passes if isinstance(each.place, AtSegment)]
                    before = segment.module(given[0]).float()
                    with originals.changed(change, own):
                        after = segment.module(given[1]).float()
                    skeleton.unload(segment)
                    return number(((after - before).norm(dim=-1) / before.norm(dim=-1)).amax())
                _resume(passes, originals, change, [*around, *own])
                skeleton.unload(segment)
    raise QuantizationError(
        f"{type(skeleton.model).__name__} does not come to its head, so that its logits cannot be compared",
        "leave out the transform",
    )


def _resume(passes: list[Pass], originals: Originals, change: Change, names: list[str]) -> None:
    passes[0].resume()
    with originals.changed(change, names):
        passes[1].resume()


def _is_table(skeleton: Skeleton, name: str) -> bool:
    return any(parameter.ndim > 1 for parameter in skeleton.model.get_submodule(name).parameters(recurse=False))
