"""How far a library is, by the blocks of the model that it runs.

Runs in the worker, so it needs torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from quantkit.libraries.base import Progress


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a model of transformers: its list of as many modules as its config has layers."""
    from torch import nn

    config: Any = model.config
    count = int(config.get_text_config().num_hidden_layers)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, ()))


@contextmanager
def telling(model: nn.Module, progress: Progress, passes: int = 1) -> Iterator[None]:
    """Inside the block, the first run of each block of the model is told, and at its end that all are done.

    Args:
        model: that the library runs block by block, so that a block that starts has those before it done.
        progress: is told.
        passes: how often the library goes through the whole model.
    """
    blocks = blocks_of(model)
    total = len(blocks) * passes
    state = {"at": -1, "done": -1}

    def starts(index: int) -> None:
        if index == state["at"]:
            return
        state["at"] = index
        state["done"] += 1
        if state["done"] < total:
            progress("layer", state["done"], total)

    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: starts(index)) for index, block in enumerate(blocks)
    ]
    try:
        yield
        progress("layer", total, total)
    finally:
        for hook in hooks:
            hook.remove()
