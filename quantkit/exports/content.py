"""What a checkpoint is made of, before it is written in any container."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError
from quantkit.schemes import QuantizedWeight, Scheme
from quantkit.schemes.rounding import INPUT_SCALE, CacheRounding
from quantkit.system.host import all_finite


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is read when its turn comes.

    Attributes:
        dtype: of the tensor.
        shape: of the tensor.
        read: gives it, on the CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, reader: CheckpointReader, name: str, *, finite: bool = False) -> Stored:
        """A tensor of a checkpoint; with ``finite`` it is refused if it holds a NaN or an infinity."""
        read = reader.read_finite if finite else reader.read
        return cls(reader.dtype(name), reader.shape(name), lambda: read(name))

    def cast(self, dtype: torch.dtype, name: str) -> Stored:
        """The same in another float dtype, if it is a float; refused when it is read and the dtype does not hold it.

        Args:
            dtype: the other.
            name: of the tensor, for the message.
        """
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return Stored(dtype, self.shape, lambda: _cast(self.read(), dtype, name))


@dataclass(frozen=True, slots=True)
class Content:
    """A quantized model, every tensor by its name in the float model of transformers.

    Attributes:
        origin: folder of the float model: its ``config.json``, tokenizer and what else goes along.
        dtype: of the float model.
        linears: every linear layer with its scheme, None where it stays float.
        packed: the packed tensors of each quantized layer by suffix.
        floats: every other tensor.
        digests: of each quantized layer, see :func:`digest`.
        embedding: name and scheme of the input embedding where that is quantized.
        name: of the model; empty where it is that of the folder ``origin``.
        cache: how runtimes are asked to store keys and values, by scales that are among the floats; None for as usual.
        turns: names of the layers whose inputs runtimes are asked to turn, with the size of the Hadamard matrices.
        unties: head and embedding no longer share one weight, whatever the origin's config says.
        changes: keys of ``config.json`` that differ from the origin's.
        runs_code: the model comes with Python code, which goes along.
        paths: layers that the model of transformers calls otherwise than the checkpoint, to its own names.
        alone: those that it calls otherwise where it loads the language model of several parts alone, likewise.
        preset: of llama.cpp, by which the whole file was made, such as ``Q4_K_M``; None where there is none.
        others: what has a matrix and is no linear layer of the model; servers may take it for one.
    """

    origin: Path
    dtype: str
    linears: Mapping[str, Scheme | None]
    packed: Mapping[str, Mapping[str, Stored]]
    floats: Mapping[str, Stored]
    digests: Mapping[str, str]
    embedding: tuple[str, Scheme] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    runs_code: bool = False
    paths: Mapping[str, str] = field(default_factory=dict)
    alone: Mapping[str, str] = field(default_factory=dict)
    preset: str | None = None
    others: Collection[str] = ()
    unties: bool = False
    cache: CacheRounding | None = None
    turns: Mapping[str, int] = field(default_factory=dict)
    name: str = ""

    @property
    def spelled(self) -> dict[str, Scheme | None]:
        """The linear layers by every name that a loader may look for: that of the tensors, and the model's own.

        Other matrices are float layers here, but for those whose names are part of a packed layer's, by which loaders
        that look for parts of names would miss that.
        """
        packed = "\n".join(self.schemes)
        return {
            **{name: None for name in self.others if name not in packed},
            **self.linears,
            **{
                path: self.linears[name]
                for called in (self.paths, self.alone)
                for name, path in called.items()
                if name in self.linears
            },
        }

    @property
    def spelled_turns(self) -> dict[str, int]:
        """The layers whose inputs are turned, by every name that a loader may look for; see :attr:`spelled`."""
        others = [(name, path) for called in (self.paths, self.alone) for name, path in called.items()]
        return {**self.turns, **{path: self.turns[name] for name, path in others if name in self.turns}}

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The quantized layers with their schemes, the embedding first."""
        found = {} if self.embedding is None else {self.embedding[0]: self.embedding[1]}
        return found | {name: scheme for name, scheme in self.linears.items() if scheme is not None}


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    found = tensor.to(dtype)
    if not all_finite(found):
        largest = tensor.abs().max().item()
        raise CheckpointError(
            f"tensor {name} reaches {largest:g}, which {str(dtype).removeprefix('torch.')} does not hold",
            "use bfloat16",
        )
    return found


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 over the bytes of a layer's packed tensors, in their order; they lie on the CPU."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # of a single column that has another stride too
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def same_values(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two weights have the same codes, scales, zero points, groups of columns and scales of inputs."""

    def parts(weight: QuantizedWeight) -> list[torch.Tensor]:
        beside = [weight.parts[name].float() for name in ("g_idx", INPUT_SCALE) if name in weight.parts]
        return [weight.codes, weight.scales.float(), weight.zeros.float(), *beside]

    found, wanted = parts(one), parts(other)
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))
