"""A quantized checkpoint on disk: its packed layers by name, and everything else as it lies there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from quantkit.schemes import Decodable, QuantizedWeight, Scheme
from quantkit.schemes.rounding import CacheRounding, InputRounding


class Export(ABC):
    """A quantized checkpoint that quantkit or another tool wrote.

    Layers and tensors have the names that they have in the float model of transformers, whatever the file calls them.

    Attributes:
        path: the folder, or the file of a checkpoint that is one file.
        format: name of its format.
        made_by: who wrote it, such as ``quantkit 0.1.0`` or ``gptqmodel 7.7.0``; ``unknown`` where it does not say.
        schemes: full name of each packed layer to its scheme.
        embedding: which of them is the input embedding.
        cache: how it asks runtimes to store keys and values; None where it does not.
        turns: full names of the layers whose inputs it asks runtimes to turn, with the size of the Hadamard matrices.
    """

    path: Path
    format: str
    made_by: str
    schemes: Mapping[str, Scheme]
    embedding: str | None = None
    cache: CacheRounding | None = None
    turns: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """``config.json`` of the float model that the checkpoint stands for, without ``quantization_config``."""

    @abstractmethod
    def tokenizer_folder(self) -> Path:
        """A folder with the tokenizer, for transformers."""

    @abstractmethod
    def weight(self, layer: str) -> QuantizedWeight:
        """A packed layer.

        Raises:
            CheckpointError: the file is broken.
            SchemeError: its codes stand for groups of weights, so that it can only be decoded.
        """

    def decodable(self, layer: str) -> Decodable:
        """A packed layer of any scheme, to be decoded.

        Raises:
            CheckpointError: the file is broken.
        """
        return self.weight(layer)

    def input_rounding(self, layer: str) -> InputRounding | None:
        """How runtimes round what a packed layer is given; None where they leave it as it is."""
        return self.schemes[layer].input_rounding

    def input_scale(self, layer: str) -> torch.Tensor | None:
        """The static scale of what a packed layer is given, float32 ``[1]``; None where it has none.

        Raises:
            CheckpointError: the file is broken.
        """
        return None

    def cache_scales(self) -> list[str]:
        """Names of the tensors by which :attr:`cache` is rounded, ``k_scale`` and ``v_scale`` of each attention."""
        return []

    @abstractmethod
    def float_names(self) -> list[str]:
        """Names of the tensors that belong to no packed layer."""

    @abstractmethod
    def float_shape(self, name: str) -> tuple[int, ...]:
        """Shape of such a tensor."""

    @abstractmethod
    def float_dtype(self, name: str) -> torch.dtype:
        """Dtype of such a tensor."""

    @abstractmethod
    def float_tensor(self, name: str) -> torch.Tensor:
        """Such a tensor."""

    @abstractmethod
    def shape(self, layer: str) -> tuple[int, int]:
        """``(out_features, in_features)`` of a packed layer, told without reading its codes."""

    @abstractmethod
    def layer_bytes(self, layer: str) -> int:
        """Bytes that all tensors of a packed layer take on disk."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that hold tensors."""

    def size_bytes(self) -> int:
        """Bytes of these files."""
        return sum(file.stat().st_size for file in self.files())
