"""A model without its weights, filled one segment at a time.

A segment is a decoder block, or the output head or the input embedding where these are to be quantized. Its weights
come from the checkpoint when the walk reaches it and go again when the walk moves on, so that memory holds one segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantkit.errors import CheckpointError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightReader(Protocol):
    """Where weights come from: a checkpoint's tensors by name."""

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a tensor called ``name``."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor on CPU."""

    def dtype(self, name: str) -> torch.dtype:
        """Its dtype."""

    def read_finite(self, name: str) -> torch.Tensor:
        """The tensor on CPU; raises CheckpointError if it holds NaN or infinities."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the model that is loaded as one.

    Attributes:
        prefix: its name in the model and the checkpoint, such as ``model.layers.3``.
        module: the module, on meta until loaded.
        linears: full names of its Linear layers, in the order of the model.
    """

    prefix: str
    module: nn.Module
    linears: tuple[str, ...]


class Skeleton:
    """A causal language model whose parameters lie on meta until asked for.

    Args:
        folder: checkpoint folder with ``config.json``.
        trust_remote_code: run model code that comes with the checkpoint.

    Attributes:
        model: the whole model.
        blocks: its list of decoder blocks.
        segments: the blocks, each to be loaded by itself.
        head: the output head, if it is a Linear.
        embedding: the input embedding, if it is an Embedding.

    Raises:
        SourceError: transformers cannot build the model, or it has no decoder blocks.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.model = empty_model(folder, trust_remote_code)
        prefix, self.blocks = find_blocks(self.model)
        self.segments = [segment_of(f"{prefix}.{index}", block) for index, block in enumerate(self.blocks)]
        self.head = self._head()
        self.embedding = self._embedding()
        self._twins = self._tied_names()
        self._persistent = frozenset(self.model.state_dict())
        self._empty: dict[str, nn.Parameter] = {}

    def _head(self) -> Segment | None:
        module = self.model.get_output_embeddings()
        return segment_of(self._name(module), module) if isinstance(module, nn.Linear) else None

    def _embedding(self) -> Segment | None:
        module = self.model.get_input_embeddings()
        return Segment(self._name(module), module, ()) if isinstance(module, nn.Embedding) else None

    @property
    def tied(self) -> tuple[str, ...]:
        """Full names of the head and the embedding where they share one weight; else empty."""
        return tuple(name.removesuffix(".weight") for name in self._twins)

    def _tied_names(self) -> dict[str, str]:
        """The weights of a tied head and its embedding, each to the other."""
        embedding = self.model.get_input_embeddings()
        if self.head is None or embedding is None or embedding.weight is not self.head.module.weight:
            return {}
        head, tied = f"{self.head.prefix}.weight", f"{self._name(embedding)}.weight"
        return {head: tied, tied: head}

    def _name(self, module: nn.Module) -> str:
        names: dict[nn.Module, str] = {candidate: name for name, candidate in self.model.named_modules()}
        return names[module]

    def all_linears(self) -> list[str]:
        """Full names of every Linear of the model."""
        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    def has_routed_layers(self) -> bool:
        """Whether blocks hold lists of modules, as experts are, whose members may be given some tokens only."""
        return any(isinstance(module, nn.ModuleList) for block in self.blocks for module in block.modules())

    def load(self, segment: Segment, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
        """Fill a segment from the checkpoint.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
        """
        self._fill(segment.prefix, segment.module, reader, device, dtype)

    def unload(self, segment: Segment) -> None:
        """Send a segment's parameters back to meta."""
        for name, _ in list(segment.module.named_parameters()):
            owner, leaf = _owner(segment.module, name)
            setattr(owner, leaf, self._empty.pop(_joined(segment.prefix, name)))

    def load_frame(self, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> None:
        """Fill what runs before, between and after the blocks: embeddings, norms; not the head.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
        """
        inside = {id(module) for segment in self.segments for module in segment.module.modules()}
        if self.head is not None:
            inside.add(id(self.head.module))
        for name, module in self.model.named_modules():
            if id(module) not in inside:
                self._fill(name, module, reader, device, dtype, recurse=False)

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
            value = self._read(_joined(prefix, name), parameter, reader)
            self._empty.setdefault(_joined(prefix, name), parameter)
            owner, leaf = _owner(module, name)
            setattr(owner, leaf, nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=recurse)):
            full, value = _joined(prefix, name), buffer
            if full in self._persistent and (buffer.is_meta or full in reader):
                value = self._read(full, buffer, reader)
                value = value.to(dtype) if value.is_floating_point() else value
            owner, leaf = _owner(module, name)
            setattr(owner, leaf, value.to(device))

    def _read(self, name: str, like: torch.Tensor, reader: WeightReader) -> torch.Tensor:
        stored = self.stored_name(name, reader)
        value = reader.read_finite(stored)
        if value.shape != like.shape:
            raise CheckpointError(
                f"tensor {stored} has shape {tuple(value.shape)}, the model expects {tuple(like.shape)}",
                "config.json and the weights are of different models",
            )
        return value

    def stored_name(self, name: str, reader: WeightReader) -> str:
        """The name under which the checkpoint holds a tensor: its own, or that of the one it is tied to.

        Raises:
            CheckpointError: it does not hold it.
        """
        if name in reader:
            return name
        twin = self._twins.get(name)
        if twin is not None and twin in reader:
            return twin
        raise CheckpointError(
            f"tensor {name} is not in the checkpoint", "download it again, or check that config.json belongs to it"
        )


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder's ``config.json``, its large tensors on meta and its small ones computed.

    Raises:
        SourceError: there is no ``config.json``, or transformers cannot build a causal language model of it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        with _ParametersOnMeta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
            )
    except (
        OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
        ImportError, StrictDataclassError,
    ) as error:  # fmt: skip  # of a config that no check foresaw
        raise SourceError(
            f"transformers cannot build the model of {folder / 'config.json'}: {error}",
            "check that it is a decoder-only language model that the installed transformers knows",
        ) from error
    return model.eval()


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: the outermost ModuleList that holds the most Linear layers.

    Raises:
        SourceError: there is none.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            linears = sum(isinstance(child, nn.Linear) for child in module.modules())
            if linears and (best is None or linears > best[0]):
                best = (linears, name, module)
    if best is None:
        raise SourceError(
            f"{type(model).__name__} has no list of decoder blocks with Linear layers",
            "quantkit quantizes decoder-only transformers",
        )
    return best[1], best[2]


def segment_of(prefix: str, module: nn.Module) -> Segment:
    """A segment with the full names of its Linear layers."""
    linears = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return Segment(prefix, module, tuple(_joined(prefix, name) for name in linears))


def linear_modules(segment: Segment) -> Iterator[tuple[str, nn.Linear]]:
    """Full name and module of each Linear of a segment."""
    for name, module in segment.module.named_modules():
        if isinstance(module, nn.Linear):
            yield _joined(segment.prefix, name), module


class _ParametersOnMeta(TorchFunctionMode):
    """Makes ``torch.empty`` give meta tensors: parameters are made so, computed buffers are not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
