"""The float model that adapters are merged into: its tensors and layers, and whether an adapter was trained on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.names import Names
from quantkit.engine.layers import adaptable_modules
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import SourceError
from quantkit.source.float_names import float_name
from quantkit.system.artifacts import read_json

_CACHE = re.compile(r"(?:^|/)(?:models--)?(?:[^/]+?--)?(?P<name>[^/]+?)(?:/snapshots/[^/]+)?$")
"""The end of a path; of a folder of the hub's cache, or of ModelScope's, the model's own name."""
_DOT = "___"
"""What ModelScope writes for a dot in the folders of its cache."""
_QUANTIZED = re.compile(r"(gptq|awq|bnb|[48]-?bit|int[48]|fp8|hqq|gguf)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Base:
    """A float checkpoint and what the merge asks of its model.

    Attributes:
        folder: of the checkpoint.
        reader: its tensors.
        names: what the model's parameters are called there.
        layers: names of all layers that LoRA can be put on.
        linears: of these, the Linear layers but the output head: what bitsandbytes quantizes.
        transposed: names of the modules whose class says that their parameters lie transposed.
        embedding: name of the input embedding; None if there is none.
        head: name of the output head; None if there is none.
        tied: whether the two share one weight.
        left_out: tensors that follow from the config or served training alone.
    """

    folder: Path
    reader: CheckpointReader
    names: Names
    layers: tuple[str, ...]
    linears: frozenset[str]
    transposed: frozenset[str]
    embedding: str | None
    head: str | None
    tied: bool
    left_out: frozenset[str] = frozenset()

    def parameters(self) -> list[str]:
        """The names of all parameters, in the order of the checkpoint; of tied weights the embedding's."""
        head, embedding = f"{self.head}.weight", f"{self.embedding}.weight"
        known = self.names.parameters()
        names = [known.get(name, name) for name in self.reader.names() if name not in self.left_out]
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
        transposed=frozenset(
            name for name, module in skeleton.model.named_modules() if getattr(module, "is_transposed", False) is True
        ),
        embedding=skeleton.embedding.prefix if skeleton.embedding else None,
        head=head,
        tied=bool(skeleton.tied),
        left_out=frozenset(skeleton.left_out()),
    )


def check_base(origin: str, trained_on: str, reference: str, folder: Path) -> tuple[str, ...]:
    """Check that an adapter was trained on the base that is given, by name.

    Names are alike if their last parts are, whatever their case: an organization, the folders above, and the suffix
    with which 4-bit copies are published for QLoRA do not count.

    Args:
        origin: what messages call the adapter.
        trained_on: ``base_model_name_or_path`` of the adapter; may be empty.
        reference: what the user calls the base.
        folder: where the base lies, whose config may tell its name.

    Returns:
        What the user should know.

    Raises:
        SourceError: the names differ.
    """
    if not trained_on:
        return (f"adapter {origin} does not name the base that it was trained on; shapes alone were compared",)
    wanted = tail(trained_on)
    given = {tail(name) for name in _names(reference, folder)}
    if wanted in given:
        return ()
    if float_name(wanted) in given:
        return (
            f"adapter {origin} was trained on {trained_on}, a 4-bit copy of the base: "
            "merge.base: nf4 merges into weights like those",
        )
    original = float_name(trained_on)
    way_out = "give its float original, and" if _QUANTIZED.search(wanted) else "give that base, or"
    if original:
        way_out = f"give its float original {original}, or"
    raise SourceError(
        f"adapter {origin} was trained on '{trained_on}', and the base is '{reference}'",
        f"{way_out} set merge.any_base: true if the base holds the same weights",
    )


def tail(name: str) -> str:
    """The last part of a model's name or path in lower case; of a folder of a hub's cache the model's own name."""
    plain = name.replace("\\", "/").rstrip("/").partition("@")[0]
    found = _CACHE.search(plain)
    return (found["name"] if found else plain).replace(_DOT, ".").casefold()


def _names(reference: str, folder: Path) -> Iterator[str]:
    yield reference
    path = Path(reference).expanduser()
    if path.exists():
        yield str(path.resolve())
    config = folder / "config.json"
    named = read_json(config).get("_name_or_path") if config.is_file() else None
    if isinstance(named, str) and named:
        yield named
