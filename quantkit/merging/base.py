"""The float model that adapters are merged into: its tensors, and which of its layers mean what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Base:
    """A float checkpoint and what the merge asks of its model.

    Attributes:
        folder: of the checkpoint.
        reader: its tensors.
        aliases: names of tensors that the checkpoint calls otherwise than the model does, to the model's names.
        layers: names of all layers that LoRA can be put on.
        linears: of these, the Linear layers but the output head: what bitsandbytes quantizes.
        embedding: name of the input embedding; None if there is none.
        head: name of the output head; None if there is none.
        tied: whether the two share one weight.
    """

    folder: Path
    reader: CheckpointReader
    aliases: Mapping[str, str]
    layers: tuple[str, ...]
    linears: frozenset[str]
    embedding: str | None
    head: str | None
    tied: bool

    def parameters(self) -> list[str]:
        """The names of all parameters, in the order of the checkpoint; of tied weights the embedding's."""
        head, embedding = f"{self.head}.weight", f"{self.embedding}.weight"
        names = [self.aliases.get(name, name) for name in self.reader.names()]
        if not self.tied:
            return names
        return list(dict.fromkeys(embedding if name == head else name for name in names))

    def stored(self, name: str) -> str | None:
        """The tensor of the checkpoint that holds a parameter; None if there is none."""
        candidates = [name, *self._aliases_of(name)]
        twin = self.twin(name)
        if self.tied and twin is not None:
            candidates = [f"{self.embedding}.weight", f"{self.head}.weight", *candidates, *self._aliases_of(twin)]
        return next((candidate for candidate in candidates if candidate in self.reader), None)

    def _aliases_of(self, name: str) -> list[str]:
        return [stored for stored, alias in self.aliases.items() if alias == name]

    def twin(self, name: str) -> str | None:
        """The weight of the head for that of the embedding, and the other way round; None for others."""
        pair = (f"{self.embedding}.weight", f"{self.head}.weight")
        if self.embedding is None or self.head is None or name not in pair:
            return None
        return pair[1 - pair.index(name)]


def open_base(folder: Path, *, trust_remote_code: bool) -> Base:
    """Read what the merge asks of a float model.

    Raises:
        SourceError: transformers cannot build the model.
        CheckpointError: the checkpoint is broken.
    """
    skeleton = Skeleton(folder, trust_remote_code)
    modules = dict(skeleton.model.named_modules())
    reader = CheckpointReader(folder)
    head = skeleton.head.prefix if skeleton.head else None
    return Base(
        folder=folder,
        reader=reader,
        aliases=_aliases(skeleton, reader),
        layers=tuple(name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)),
        linears=frozenset(name for name in skeleton.all_linears() if name != head),
        embedding=skeleton.embedding.prefix if skeleton.embedding else None,
        head=head,
        tied=bool(skeleton.tied),
    )


def _aliases(skeleton: Skeleton, reader: CheckpointReader) -> dict[str, str]:
    """Tensors that the checkpoint calls otherwise than the model does, to the model's names.

    A checkpoint may leave out the name of the outermost module, and one single tensor, as GPT-NeoX's head, may have
    another name if its shape is that of the one parameter that is missing.
    """
    known, prefix = skeleton.model.state_dict(), skeleton.model.base_model_prefix
    unknown = [name for name in reader.names() if name not in known]
    found = {name: f"{prefix}.{name}" for name in unknown if f"{prefix}.{name}" in known}
    shared = {f"{name}.weight" for name in skeleton.tied}
    missing = [name for name in known if name not in reader and name not in found.values() and name not in shared]
    rest = [name for name in unknown if name not in found]
    if len(missing) == len(rest) == 1 and reader.shape(rest[0]) == tuple(known[missing[0]].shape):
        found[rest[0]] = missing[0]
    return found
