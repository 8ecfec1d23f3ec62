"""An adapter: the folder that it lies in, what its files hold, and whether it is whole, found out from the headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantkit.checkpoint.adapter_folder import CONFIG, PREFIX, WEIGHTS
from quantkit.checkpoint.wrapped_names import without_wrappers
from quantkit.errors import SourceError
from quantkit.exports.adapter import AdapterReader
from quantkit.merging.archives import SUFFIXES, is_archive, unpack
from quantkit.merging.config import WITH_PEFT, AdapterConfig
from quantkit.merging.stacks import Stack
from quantkit.recipe.model import HUB_REFERENCE
from quantkit.source import hub
from quantkit.system.artifacts import file_sha256

PICKLE = "adapter_model.bin"
AGAIN = "the adapter is broken: save or download it again"
_LORA_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(?P<tail>\.weight)?"
)
_NAMED = re.compile(
    r"(?<=\.lora_[AB])\.\w+(?=\.(weight|bias)$)|(?<=\.lora_embedding_[AB])\.\w+$"
    r"|(?<=\.lora_magnitude_vector)\.(?!weight$)\w+"
)
"""The adapter's name, which a state dict has that PEFT did not save itself."""
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
WRAPPED_BASE = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)\.")
_WRAPPED_COPY = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
"""What PEFT adds to a module that is trained whole; PEFT itself takes it off when it saves, and a trainer may not."""


def adapter_folder(reference: str, scratch: Path) -> Path | hub.Snapshot:
    """The folder of an adapter, or a revision of the hub that is one.

    Args:
        reference: folder, archive, or hub id ``org/name`` or ``org/name@revision``.
        scratch: an empty folder; an archive is unpacked into it.

    Raises:
        SourceError: there is no such adapter, its archive cannot be used, or a file is not what the hub states.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and is_archive(path):
        return unpack(path, scratch)
    if path.exists():
        raise SourceError(
            f"adapter {path} is neither a folder nor an archive",
            f"give the folder that holds adapter_config.json, or an archive of it ({', '.join(SUFFIXES)})",
        )
    if HUB_REFERENCE.fullmatch(reference) and not is_archive(path):
        return hub.download(reference, None, trust_remote_code=False)
    raise SourceError(
        f"there is no adapter {path}", "give a folder, an archive, or the hub id org/name of a PEFT adapter"
    )


@dataclass(frozen=True, slots=True)
class Whole:
    """A parameter that the adapter carries whole.

    Attributes:
        key: of the tensor in the adapter.
        trained: whether its module was trained beside the original, which the original's twin does not follow; else
            the tensor takes the place of the base's own, as that of a resized embedding does.
    """

    key: str
    trained: bool


@dataclass(slots=True)
class Contents:
    """The tensors of an adapter, by the names of its base; until it is placed there, by its own.

    Attributes:
        lora: module to the keys of its parts.
        tokens: module to the key of its trained rows.
        whole: parameter to what replaces it.
        stacks: parameter to what is added to it, of those that are adapted themselves and not as layers.
        called: module of ``lora`` or ``tokens`` to what the adapter calls it.
        renamed: whether any name is not the one in the adapter's file.
    """

    lora: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    whole: dict[str, Whole] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    called: dict[str, str] = field(default_factory=dict)
    renamed: bool = False


class Adapter:
    """A checked adapter.

    Args:
        folder: where it lies.
        origin: what the user called it.
        weight: what its change is multiplied with.
        known: SHA-256 of its files, as far as they were read before.

    Attributes:
        origin: what the user called it.
        weight: what its change is multiplied with.
        folder: where it lies.
        config: its configuration.
        reader: its tensors.
        contents: what they are.

    Raises:
        SourceError: it is pickled, incomplete, or holds what is not merged.
        CheckpointError: its safetensors are broken.
    """

    def __init__(self, folder: Path, origin: str, weight: float, known: Mapping[str, str]) -> None:
        self.folder, self.origin, self.weight, self._known = folder, origin, weight, known
        self.config = AdapterConfig(folder, origin)
        if not (folder / WEIGHTS).is_file():
            raise _no_weights(folder, origin)
        self.reader = AdapterReader(folder / WEIGHTS)
        self._check_gathered()
        self.contents = self._sorted()
        for module, parts in self.contents.lora.items():
            self._check_parts(module, parts)
        self._check_weight()

    def sha256(self, *further: str) -> dict[str, str]:
        """File name to hash, of all that decides the weights, and of ``further`` files."""
        names = (CONFIG, WEIGHTS, *further)
        return {name: self._known.get(name) or file_sha256(self.folder / name) for name in names}

    def read(self, key: str) -> torch.Tensor:
        """A tensor, whose values are all finite.

        Raises:
            CheckpointError: they are not.
        """
        return self.reader.read_finite(key)

    def token_rows(self, module: str) -> list[int]:
        """The rows of an embedding that were trained.

        Raises:
            SourceError: the configuration does not name them.
        """
        given, called = self.config.lora.trainable_token_indices, self.contents.called.get(module, module)
        if isinstance(given, dict):
            given = next((rows for name, rows in given.items() if f".{called}".endswith(f".{name}")), None)
        if not given:
            raise SourceError(f"{CONFIG} of adapter {self.origin} does not name the trained tokens of {module}", AGAIN)
        return list(given)

    def _check_gathered(self) -> None:
        """Refuse tensors of no values, which DeepSpeed leaves of parameters that it has divided among processes."""
        names = self.reader.names()
        empty = [name for name in names if 0 in self.reader.shape(name)]
        if empty:
            raise SourceError(
                f"adapter {self.origin}: {len(empty)} of its {len(names)} tensors hold nothing, such as '{empty[0]}': "
                "it was saved under DeepSpeed ZeRO-3 without gathering its weights",
                "run zero_to_fp32.py of the training's checkpoint, or train on with "
                "stage3_gather_16bit_weights_on_model_save: true and save it again",
            )

    def _sorted(self) -> Contents:
        found = Contents()
        for key in self.reader.names():
            plain = _WRAPPED_COPY.sub("", _NAMED.sub("", without_wrappers(key)))
            if not plain.startswith(PREFIX) and self._is_raw(plain):
                plain = f"{PREFIX}{plain}"
            found.renamed |= plain != key
            if not plain.startswith(PREFIX):
                raise SourceError(
                    f"adapter {self.origin}: tensor '{key}' is not named as PEFT names those of a language model",
                    "convert the adapter to PEFT's layout",
                )
            name = plain.removeprefix(PREFIX)
            part, tokens = _LORA_PART.fullmatch(name), _TOKENS.fullmatch(name)
            if part:
                other = found.lora.setdefault(part["module"], {}).setdefault(part["part"], key)
                if other != key:
                    raise SourceError(
                        f"adapter {self.origin} holds '{other}' and '{key}', which are two adapters of one layer",
                        "save each of them in a folder of its own, with PEFT's save_pretrained",
                    )
            elif tokens:
                found.tokens[tokens["module"]] = key
            elif "lora_" in name:
                raise SourceError(f"adapter {self.origin}: tensor '{key}' is of an unknown kind", WITH_PEFT)
            else:
                self._place_whole(found, key, name)
        return found

    def _is_raw(self, name: str) -> bool:
        """Whether a name is one of the base's own, as trainers write them that do not go through PEFT."""
        part = _LORA_PART.fullmatch(name)
        return "." in part["module"] if part else self.config.saves(name.rpartition(".")[0])

    def _place_whole(self, found: Contents, key: str, name: str) -> None:
        """A parameter's trained value comes before its frozen one."""
        plain = WRAPPED_BASE.sub(".", name)
        trained = plain == name and self.config.saves(plain.rpartition(".")[0])
        if plain not in found.whole or trained:
            found.whole[plain] = Whole(key, trained)

    def _check_parts(self, module: str, parts: dict[str, str]) -> None:
        """Every part that PEFT's configuration asks for is there, and no other."""
        embedding = any(part.startswith("lora_embedding") for part in parts)
        pair = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        magnitude = ("lora_magnitude_vector",) if self.config.lora.use_dora else ()
        bias = ("lora_B.bias",) if self.config.lora.lora_bias and not embedding else ()
        wanted = (*pair, *magnitude, *bias)
        for part in wanted:
            if part not in parts:
                raise SourceError(f"adapter {self.origin} lacks the tensor '{PREFIX}{module}.{part}'", AGAIN)
        for part, key in parts.items():
            if part not in wanted:
                raise SourceError(
                    f"adapter {self.origin} holds the tensor '{key}', which its {CONFIG} does not ask for", AGAIN
                )

    def check_rank(self, module: str, parts: Mapping[str, str]) -> None:
        """Check that the parts of a layer have the rank that the configuration says.

        Args:
            module: as the adapter calls it.
            parts: keys of its parts.

        Raises:
            SourceError: they do not.
        """
        embedding = any(part.startswith("lora_embedding") for part in parts)
        pair = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        rank = self.config.rank(module)
        for part, axis in zip(pair, (0, 1), strict=True):
            shape = self.reader.shape(parts[part])
            if len(shape) != 2 or shape[axis] != rank:
                raise SourceError(
                    f"adapter {self.origin}: tensor '{parts[part]}' has the shape {list(shape)}, and the rank of its "
                    f"layer is {rank} by {CONFIG}",
                    AGAIN,
                )

    def _check_weight(self) -> None:
        if self.weight == 1:
            return
        if self.config.depends_on_base:
            raise SourceError(f"adapter {self.origin} is a DoRA, or began in its base: its weight can only be 1")
        trained = [place.key for place in self.contents.whole.values() if place.trained]
        for key in (*trained, *self.contents.tokens.values()):
            raise SourceError(
                f"adapter {self.origin}: tensor '{key}' replaces the base's, so its weight can only be 1",
                "leave its weight out",
            )


def _no_weights(folder: Path, origin: str) -> SourceError:
    if (folder / PICKLE).exists():
        return SourceError(
            f"adapter {origin} holds only pickled weights ({PICKLE}), which can run code when they are read",
            "load the adapter with PEFT where you trust it and call save_pretrained, which writes safetensors",
        )
    return SourceError(f"adapter {origin} holds no {WEIGHTS}", "give the folder that PEFT's save_pretrained wrote")
