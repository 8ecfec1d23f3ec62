"""A model without its weights, filled one segment at a time.

A segment is a decoder block, or the output head or the input embedding where these are to be quantized. Its weights
come from the checkpoint when the walk reaches it and go again when the walk moves on, so that memory holds one segment.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from quantkit.checkpoint.conversions import Read
from quantkit.engine.outline import Outline, joined
from quantkit.engine.segment import Segment, WeightReader
from quantkit.errors import CheckpointError


class Skeleton(Outline):
    """A causal language model whose parameters lie on meta until asked for; see :class:`Outline`."""

    def __init__(
        self,
        folder: Path,
        trust_remote_code: bool = False,
        stored: Collection[str] | None = None,
        packed: Collection[str] = (),
    ) -> None:
        super().__init__(folder, trust_remote_code, stored, packed)
        self._became: dict[str, torch.Tensor] = {}
        self._persistent = frozenset(self.model.state_dict())
        self._empty: dict[str, nn.Parameter] = {}

    def load(self, segment: Segment, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
        """Fill a segment from the checkpoint.

        What it shares with an earlier segment is as it was when that was unloaded.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
        """
        self._fill(segment.prefix, segment.module, reader, device, dtype)

    def unload(self, segment: Segment) -> None:
        """Send a segment's parameters back to meta, and let go of what was read for them.

        In a model that goes through its blocks again they stay.
        """
        self.names.forget()
        if self._stays:
            return
        for name, _ in list(segment.module.named_parameters()):
            owner, leaf = _owner(segment.module, name)
            full = joined(segment.prefix, name)
            if full in self._first:
                self._became[self._first[full]] = getattr(owner, leaf).data
            setattr(owner, leaf, self._empty.pop(full))

    def load_frame(
        self,
        reader: WeightReader,
        device: torch.device,
        dtype: torch.dtype,
        *,
        towers: bool = False,
        apart: Collection[Segment] = (),
    ) -> None:
        """Fill what runs before, between and after the blocks: embeddings, norms; not the head.

        Args:
            reader: where weights come from.
            device: where they go.
            dtype: in which they are held.
            towers: fill models of images and sound, too, for batches that have them.
            apart: blocks of theirs that are loaded by themselves.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
        """
        left = {id(module) for segment in [*self.segments, *apart] for module in segment.module.modules()}
        if not towers:
            left |= {id(module) for tower in self._towers() for module in tower.modules()}
        if self.head is not None:
            left.add(id(self.head.module))
        for name, module in self.model.named_modules():
            if id(module) not in left:
                self._fill(name, module, reader, device, dtype, recurse=False)
        self._fill_first(reader, device, dtype)

    def unload_frame(self) -> None:
        """Send all that is loaded back to meta, when nothing runs any more."""
        for full, parameter in self._empty.items():
            owner, leaf = _owner(self.model, full)
            setattr(owner, leaf, parameter)
        self._empty.clear()
        self._became.clear()
        self.names.forget()

    def _fill_first(self, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
        """Fill the first parameter of each model around the blocks: transformers asks it where the model lies."""
        models = [(name, module) for name, module in self.model.named_modules() if isinstance(module, PreTrainedModel)]
        towers = self._towers()
        for name, module in models:
            first, parameter = next(module.named_parameters(), ("", None))
            if parameter is not None and parameter.is_meta and module not in towers:
                owner = joined(name, first.rpartition(".")[0])
                self._fill(owner, self.model.get_submodule(owner), reader, device, dtype, recurse=False)

    def _fill(
        self,
        prefix: str,
        module: nn.Module,
        reader: WeightReader,
        device: torch.device,
        dtype: torch.dtype,
        recurse: bool = True,
    ) -> None:
        for name, parameter in list(module.named_parameters(recurse=recurse)):
            full = joined(prefix, name)
            first = self._first.get(full, full)
            again = first != full and first in self._became
            value = self._became[first] if again else self._read(full, parameter, reader)
            self._empty.setdefault(full, parameter)
            owner, leaf = _owner(module, name)
            setattr(owner, leaf, nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=recurse)):
            full, value = joined(prefix, name), buffer
            if full in self._persistent and (buffer.is_meta or full in reader):
                value = self._read(full, buffer, reader)
                value = value.to(dtype) if value.is_floating_point() else value
            owner, leaf = _owner(module, name)
            setattr(owner, leaf, value.to(device))

    def _read(self, name: str, like: torch.Tensor, reader: WeightReader) -> torch.Tensor:
        value = self.read(name, reader.read_finite)
        if value.shape != like.shape:
            stored = self.stored_name(name)
            raise CheckpointError(
                f"tensor {stored} has shape {tuple(value.shape)}, the model expects {tuple(like.shape)}",
                "config.json and the weights are of different models",
            )
        return value

    def read(self, parameter: str, read: Read) -> torch.Tensor:
        """A parameter of the model as the checkpoint has it: its own, or that of the one it is tied to.

        Raises:
            CheckpointError: it does not hold it, or what it is made of does not fit together.
        """
        alone = self._by_layer(parameter)
        return self.names.read(self._there(parameter), read) if alone is None else read(alone)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
