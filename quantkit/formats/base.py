"""What a format is: codes in, tensors and a config out, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.schemes import IntScheme, QuantizedWeight

if TYPE_CHECKING:
    import torch


class Format(ABC):
    """Stores quantized weights as a runtime expects them.

    Attributes:
        name: what recipes call it.
        summary: one line for ``quantkit formats``.
        runtimes: who loads it.
        requires: the packages without which transformers cannot load it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    runtimes: ClassVar[tuple[str, ...]]
    requires: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def check(cls, scheme: IntScheme) -> None:
        """Refuse a scheme that this format cannot store.

        Raises:
            SchemeError: with the schemes that it can.
        """

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors that stand for one layer's ``weight``, by the suffix of their names."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: IntScheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`, from tensors as they were read from disk."""

    @abstractmethod
    def layer_suffixes(self, scheme: IntScheme) -> tuple[str, ...]:
        """The suffixes that :meth:`pack` uses for a scheme."""

    @abstractmethod
    def quantization_config(self, layers: Mapping[str, IntScheme | None]) -> dict[str, Any]:
        """``quantization_config`` of ``config.json``; layers that stay float map to None."""

    def remarks(self, schemes: Collection[IntScheme]) -> tuple[str, ...]:
        """What someone who loads a checkpoint with these schemes should know."""
        return ()
