"""What a format is: codes in, tensors and a config out, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import SchemeError
from quantkit.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    import torch


class Format(ABC):
    """Stores quantized weights as a runtime expects them.

    Args:
        dtype: of the float model.

    Attributes:
        name: what recipes call it.
        summary: one line for ``quantkit formats``.
        runtimes: who loads it.
        requires: the packages without which transformers cannot load it.
        native: whether transformers loads it, with these packages.
        fused: names of layers beside each other that runtimes load as one matrix, so that they must agree in scheme.
        embeddings: whether it stores a quantized input embedding, in the schemes of :meth:`check_embedding`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    runtimes: ClassVar[tuple[str, ...]]
    requires: ClassVar[tuple[str, ...]] = ()
    native: ClassVar[bool] = True
    fused: ClassVar[tuple[tuple[str, ...], ...]] = ()
    embeddings: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse a scheme that this format cannot store.

        Raises:
            SchemeError: with the schemes that it can.
        """

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype

    @classmethod
    def check_embedding(cls, scheme: Scheme) -> None:
        """Refuse a scheme in which this format cannot store the input embedding.

        Raises:
            SchemeError: with the formats that store embeddings at all, or the schemes in which this one does.
        """
        from quantkit.formats import FORMATS

        if not cls.embeddings:
            able = ", ".join(each.name for each in FORMATS if each.embeddings)
            raise SchemeError(
                f"format {cls.name} does not store quantized embeddings", f"leave it out, or use one that does: {able}"
            )
        cls.check(scheme)

    def for_embeddings(self) -> Format:
        """What packs and unpacks the input embedding, where that differs from what does so for linear layers."""
        return self

    def with_embedding(self, config: dict[str, Any], name: str, scheme: Scheme) -> dict[str, Any]:
        """A ``quantization_config`` of linear layers with what there is to say of a quantized input embedding."""
        return config

    @classmethod
    def check_together(cls, schemes: Collection[Scheme]) -> None:
        """Refuse schemes that one checkpoint cannot hold side by side.

        Raises:
            SchemeError: with the way out.
        """

    @classmethod
    def computes_in(cls, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """The dtypes in which transformers runs a checkpoint with these schemes."""
        return ("float32", "float16", "bfloat16")

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors that stand for one layer's ``weight``, by the suffix of their names."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`, from tensors as they were read from disk."""

    @abstractmethod
    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes that :meth:`pack` uses for a scheme."""

    @abstractmethod
    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """``quantization_config`` of ``config.json``; layers that stay float map to None."""

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """What someone who loads a checkpoint with these schemes should know."""
        return ()
