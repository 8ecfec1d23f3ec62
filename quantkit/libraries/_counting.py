"""Count the calibration tokens that a library really runs.

Runs in the worker, so it needs torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantkit.libraries.base import Used


class Counter:
    """What came through a model's input embedding.

    Rows are told by their content, so that a library that runs each several times is counted once.

    Args:
        rows: that were given, to tell those that were used from others.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.given = len(rows)
        self.given_tokens = sum(map(len, rows))
        self._seen: dict[tuple[int, ...], int] = {}

    def see(self, ids: torch.Tensor, padding: int | None = None) -> None:
        """Note a batch of token ids ``[rows, length]``; ``padding`` at a row's ends is left out."""
        for row in ids.reshape(-1, ids.shape[-1]).tolist():
            stripped = _stripped(row, padding)
            if stripped:
                self._seen[tuple(stripped)] = len(stripped)

    @contextmanager
    def watching(self, model: nn.Module, padding: int | None = None) -> Iterator[None]:
        """Inside the block, every call of the model's input embedding is noted."""
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # of transformers' models

        def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.see(arguments[0], padding)

        hook = embedding.register_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def used(self, *notes: str) -> Used:
        """What was really run."""
        from quantkit.libraries.base import Used

        return Used(len(self._seen), sum(self._seen.values()), notes)


def _stripped(row: list[int], padding: int | None) -> list[int]:
    if padding is None:
        return row
    first, last = 0, len(row)
    while first < last and row[first] == padding:
        first += 1
    while last > first and row[last - 1] == padding:
        last -= 1
    return row[first:last]
