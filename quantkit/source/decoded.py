"""A tensor of a float model that is decoded when it is read, part by part where it is a stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from quantkit.checkpoint import CheckpointReader


@dataclass(frozen=True, slots=True)
class DecodedTensor:
    """A tensor of the float model that a quantized checkpoint stands for.

    Attributes:
        name: in the float model's checkpoint.
        shape: of it.
        dtype: of it.
        parts: gives it whole, or one entry of its first axis after another, in this dtype or one that holds more.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterator[torch.Tensor]]

    @classmethod
    def plain(cls, reader: CheckpointReader, name: str, dtype: torch.dtype) -> DecodedTensor:
        """One that lies in the file as it is, but perhaps for its dtype."""
        return cls(name, reader.shape(name), dtype, lambda: iter([reader.read(name).to(dtype)]))

    def cast(self, dtype: torch.dtype) -> DecodedTensor:
        """The same in another dtype if it is one of floats; whoever writes its parts converts them."""
        return replace(self, dtype=dtype) if self.dtype.is_floating_point else self
