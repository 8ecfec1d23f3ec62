"""Where passes pause: before each segment and behind the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from quantkit.engine.passes import AtEnd, AtSegment, pause
from quantkit.engine.segment import Segment


def pause_at(segments: Sequence[Segment], head: nn.Module | None, cleanup: ExitStack) -> None:
    """Let every pass pause before each segment and behind the last.

    Args:
        segments: in their order; a pass may leave some out, as text leaves out layers that look at images.
        head: what no pass goes through, unless it is a segment.
        cleanup: lets them no longer.
    """
    for index, segment in enumerate(segments):
        hook = segment.module.register_forward_pre_hook(_pause_before(index), with_kwargs=True)
        cleanup.callback(hook.remove)
    cleanup.callback(segments[-1].module.register_forward_hook(lambda *_: pause(AtEnd())).remove)
    if head is not None and all(head is not segment.module for segment in segments):
        cleanup.callback(head.register_forward_pre_hook(lambda *_: pause(AtEnd())).remove)


def _pause_before(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pause(AtSegment(index, args, kwargs))

    return hook
