"""The float model that adapters are merged into: its tensors, and which of its layers mean what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.names import Names
from quantkit.engine.layers import adaptable_modules
from quantkit.engine.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Base:
    """A float checkpoint and what the merge asks of its model.

    Attributes:
        folder: of the checkpoint.
        reader: its tensors.
        names: what the model's parameters are called there.
        layers: names of all layers that LoRA can be put on.
        linears: of these, the Linear layers but the output head: what bitsandbytes quantizes.
        embedding: name of the input embedding; None if there is none.
        head: name of the output head; None if there is none.
        tied: whether the two share one weight.
    """

    folder: Path
    reader: CheckpointReader
    names: Names
    layers: tuple[str, ...]
    linears: frozenset[str]
    embedding: str | None
    head: str | None
    tied: bool

    def parameters(self) -> list[str]:
        """The names of all parameters, in the order of the checkpoint; of tied weights the embedding's."""
        head, embedding = f"{self.head}.weight", f"{self.embedding}.weight"
        known = self.names.parameters()
        names = [known.get(name, name) for name in self.reader.names()]
        if not self.tied:
            return names
        return list(dict.fromkeys(embedding if name == head else name for name in names))

    def stored(self, name: str) -> str | None:
        """The tensor of the checkpoint that holds a parameter; None if there is none."""
        twin = self.twin(name)
        parameters = [name] if twin is None or not self.tied else [f"{self.embedding}.weight", f"{self.head}.weight"]
        candidates = [self.names.tensor(parameter) for parameter in parameters]
        return next((candidate for candidate in [*candidates, name] if candidate in self.reader), None)

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
    linears = [layer.path for layer in skeleton.layers()]
    reader = CheckpointReader(folder)
    head = skeleton.head.prefix if skeleton.head else None
    return Base(
        folder=folder,
        reader=reader,
        names=skeleton.names,
        layers=tuple(adaptable_modules(skeleton.model)),
        linears=frozenset(path for path in linears if path != head and not skeleton.names.is_part(f"{path}.weight")),
        embedding=skeleton.embedding.prefix if skeleton.embedding else None,
        head=head,
        tied=bool(skeleton.tied),
    )
