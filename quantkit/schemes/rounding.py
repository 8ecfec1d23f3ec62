"""How a runtime rounds what layers are given, and keys and values: to which numbers, and what shares a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Numbers = Literal["int8", "fp8", "nvfp4", "mxfp4"]
TOKEN = -1
"""In the place of a group's size: all inputs of a token share a scale."""
GROUPS = {"nvfp4": 16, "mxfp4": 32}
INPUT_SCALE = "input_scale"
"""The part of a weight that is the static scale of its inputs, float32 ``[1]``.

Of ``int8`` and ``fp8`` it is what codes are multiplied by, of ``nvfp4`` what the scales of blocks are divided by.
"""


CACHE_SCALES = (".k_scale", ".v_scale")
"""Ends of the names of the static scales of keys and values."""


@dataclass(frozen=True, slots=True)
class CacheRounding:
    """How a server stores keys and values in its cache: by calibrated scales.

    Attributes:
        numbers: 8-bit floats or integers.
        per_head: each head of keys and values has a scale; else all of a block share one.
    """

    numbers: Literal["fp8", "int8"]
    per_head: bool = False

    @property
    def name(self) -> str:
        """What recipes call it."""
        return f"{self.numbers}_head" if self.per_head else self.numbers

    def as_inputs(self) -> InputRounding:
        """The same numbers under a static scale."""
        return InputRounding(self.numbers, static=True)

    def describe(self) -> str:
        """A short name, such as ``KV cache fp8 per head``."""
        return f"KV cache {self.numbers} per {'head' if self.per_head else 'tensor'}"


@dataclass(frozen=True, slots=True)
class InputRounding:
    """The rounding of a layer's inputs.

    Attributes:
        numbers: 8-bit integers, 8-bit floats (E4M3), or 4-bit floats (E2M1) in blocks.
        group_size: inputs of a token that share a scale; of blocks their size.
        static: the file holds one scale for all tokens: of ``int8`` and ``fp8`` the only one, of ``nvfp4`` that above
            the scales of blocks, which come with each token.
        outliers: columns with a magnitude of so much or more in a batch stay as they are; 0 rounds all.
    """

    numbers: Numbers
    group_size: int = TOKEN
    static: bool = False
    outliers: float = 0.0

    @property
    def bits(self) -> int:
        """Width of a number."""
        return 4 if self.numbers in GROUPS else 8

    @property
    def highest(self) -> float:
        """The largest input over the static scale of a tensor; of ``nvfp4`` their product."""
        return {"int8": 127.0, "fp8": 448.0, "nvfp4": 448.0 * 6.0, "mxfp4": 6.0}[self.numbers]

    def describe(self) -> str:
        """A short name, such as ``int8 per token``."""
        if self.numbers in GROUPS:
            return self.numbers
        if self.static:
            return f"{self.numbers} per tensor"
        shared = "token" if self.group_size == TOKEN else f"{self.group_size} inputs"
        return f"{self.numbers} per {shared}{f' below {self.outliers:g}' if self.outliers else ''}"


_CACHED: tuple[Literal["fp8", "int8"], ...] = ("fp8", "int8")
CACHES = {
    each.name: each for each in (CacheRounding(numbers, per_head) for numbers in _CACHED for per_head in (False, True))
}
"""What a KV cache may be stored in, by the names that recipes have."""
