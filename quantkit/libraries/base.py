"""What a library plugin is.

A plugin's file is imported in two places: by quantkit, which reads what it declares, and by the worker, a process in
the library's own environment, which calls :meth:`Library.quantize`. quantkit's own dependencies are absent there, so
a plugin imports nothing at its top but the standard library, this module and :mod:`quantkit.errors`; the library
itself is imported inside :meth:`~Library.quantize`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Progress = Callable[[str, int, int], None]
"""Called with a step such as ``layer``, how many are done and their total."""

CODES = "codes"
"""What a plugin writes whose library has no file that others read: the codes alone, in any format of quantkit."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One method of a library.

    Attributes:
        method: its name in a recipe, such as ``gptq``.
        bits: widths that a recipe may ask for; the first is the default.
        writes: name of the quantkit format in which the library writes its checkpoint, or :data:`CODES`.
        calibrated: it needs calibration tokens.
        factorizes: it factorizes the Gram matrix of each layer's inputs, which wants more tokens than it has columns.
        grouped: it takes ``group_size``; otherwise one scale a channel, or the grid's own blocks.
        symmetric: what ``symmetric`` may be; the first is the default.
        devices: where it quantizes.
        options: further options with their defaults, whose types those given must have.
        by_bits: of a width, the defaults of options that are others there.
        scores_only: why it cannot quantize here at all, for a library that is only loaded and scored; else empty.
    """

    method: str
    bits: tuple[int, ...]
    writes: str
    calibrated: bool = False
    grouped: bool = True
    symmetric: tuple[bool, ...] = (True,)
    devices: tuple[str, ...] = ("cpu", "cuda")
    options: Mapping[str, Any] = field(default_factory=dict)
    by_bits: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    scores_only: str = ""
    factorizes: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is asked to do.

    Attributes:
        model: folder of the float checkpoint, with its tokenizer; a GGUF file where the plugin takes one.
        tokens: calibration token ids, row by row; empty for a method that needs none.
        out: empty folder in which the checkpoint is written.
        method, bits, group_size, symmetric: what to do; ``group_size`` -1 is one scale a channel.
        ignore: regular expressions of layers that stay float.
        dtype: of the float checkpoint: ``float32``, ``float16`` or ``bfloat16``.
        device: ``cpu`` or ``cuda:N``.
        options: of the method, with defaults filled in.
        progress: is told how far it is.
    """

    model: Path
    tokens: Sequence[Sequence[int]]
    out: Path
    method: str
    bits: int
    group_size: int
    symmetric: bool
    ignore: tuple[str, ...]
    dtype: str
    device: str
    options: Mapping[str, Any]
    progress: Progress


@dataclass(frozen=True, slots=True)
class Used:
    """What a library did with what it was given.

    Attributes:
        samples: calibration rows that it really ran.
        tokens: calibration tokens that it really ran, padding left out.
        notes: what someone who compares should know, such as that rows were concatenated.
    """

    samples: int = 0
    tokens: int = 0
    notes: tuple[str, ...] = ()


class Library(ABC):
    """A quantizer of the field.

    Attributes:
        name: in recipes.
        summary: one line.
        distribution: the package on PyPI whose version is recorded.
        requirements: what its environment holds, pinned and tested; the lock file ``NAME.lock`` beside the plugin's
            module has all that they need, with hashes.
        offers: its methods.
        takes: whether :attr:`Request.model` is a ``folder`` or a ``gguf`` file.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    distribution: ClassVar[str]
    requirements: ClassVar[tuple[str, ...]]
    offers: ClassVar[tuple[Offer, ...]]
    takes: ClassVar[Literal["folder", "gguf"]] = "folder"

    @classmethod
    def variables(cls, cores: int, device: str) -> dict[str, str]:
        """Environment variables that the worker starts with, and that are recorded.

        Args:
            cores: processors that the worker may use.
            device: ``cpu`` or ``cuda:N``.
        """
        return {}

    @abstractmethod
    def quantize(self, request: Request) -> Used:
        """Quantize in the library's environment and write the checkpoint into ``request.out``.

        The folder must be one that quantkit's exports read in the offer's format: safetensors, ``config.json`` with
        the library's ``quantization_config``, the tokenizer. For :data:`CODES`, see
        :func:`quantkit.libraries._codes.write_codes`.

        Raises:
            Exception: anything; it becomes the variant's row, with the worker's log.
        """
