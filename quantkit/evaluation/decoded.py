"""The reference decoder: an exported checkpoint as a float model, by the code of its own format.

The packed layers are decoded with :meth:`quantkit.formats.base.Format.unpack` and
:meth:`quantkit.schemes.QuantizedWeight.dequantize`, one at a time as transformers asks for them; every other tensor
comes as it lies on disk. So any format can be scored, on any device, whether or not a runtime for it is at hand.
What it computes is what the file says; its memory and speed are those of a float model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch

from quantkit.artifacts import read_json
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import EvaluationError
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.schemes import Scheme, scheme_from_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Packing:
    """How the layers of an exported checkpoint are packed, as its manifest says.

    Attributes:
        format: name of the format.
        schemes: full name of each packed layer to its scheme.
        embedding: which of them is the input embedding.
    """

    format: str
    schemes: dict[str, Scheme]
    embedding: str | None = None


class Promise:
    """A tensor that is read, and decoded, when it is asked for by ``promise[...]``, as a slice of a file is."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        return self._read()


def read_packing(folder: Path) -> Packing | None:
    """What the manifest of a checkpoint says of its layers; None where quantkit wrote none, or an older one.

    Raises:
        EvaluationError: the manifest is broken.
        SchemeError: it names a scheme that quantkit does not have.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file} cannot be read: {error}", "export the checkpoint again") from error
    name, layers = (content.get(key) for key in ("format", "layers")) if isinstance(content, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(layers, dict):
        return None
    if not all(isinstance(scheme, dict) for scheme in layers.values()):
        raise EvaluationError(f"{file}: 'layers' does not map layers to schemes", "export the checkpoint again")
    schemes = {layer: scheme_from_json(scheme) for layer, scheme in layers.items()}
    return Packing(name, schemes, content.get("embedding"))


def decoded_state(folder: Path, packing: Packing, dtype: torch.dtype) -> dict[str, Promise]:
    """The state dict of the float model that a checkpoint stands for, none of its tensors read yet.

    Args:
        folder: the checkpoint.
        packing: how its layers are packed.
        dtype: of the decoded weights; other tensors come as they are.

    Raises:
        RecipeError: there is no such format.
        CheckpointError: the files are broken, or lack a tensor of a packed layer.
    """
    linear, reader = FORMATS.get(packing.format)(), CheckpointReader(folder)
    state: dict[str, Promise] = {}
    taken: set[str] = set()
    for layer, scheme in packing.schemes.items():
        store = linear.for_embeddings() if layer == packing.embedding else linear
        names = {suffix: f"{layer}.{suffix}" for suffix in store.layer_suffixes(scheme)}
        for name in names.values():
            reader.shape(name)  # raises for a tensor that is not there
        taken.update(names.values())
        state[f"{layer}.weight"] = Promise(_decoder(store, reader, names, scheme, dtype))
    for name in reader.names():
        if name not in taken:
            state[name] = Promise(_plain(reader, name))
    return state


def load_decoded(
    folder: Path, packing: Packing, *, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The float model that a checkpoint stands for, on the CPU.

    Args:
        folder: the checkpoint.
        packing: how its layers are packed.
        dtype: in which it computes; None is the checkpoint's own.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        The model, and the names of missing, unexpected and mismatched tensors as transformers gives them.

    Raises:
        QuantkitError: the format is unknown, or the files are broken.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    chosen = dtype or config.dtype or torch.float32
    with torch.device("meta"):
        cls = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    model, found = cls.from_pretrained(
        None,
        config=config,
        state_dict=decoded_state(folder, packing, chosen),
        dtype=chosen,
        ignore_mismatched_sizes=True,  # they are reported by who asks, by name
        output_loading_info=True,
    )
    return model, found


def _decoder(
    store: Format, reader: CheckpointReader, names: dict[str, str], scheme: Scheme, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        weight = store.unpack({suffix: reader.read(name) for suffix, name in names.items()}, scheme)
        return weight.dequantize(torch.float32).to(dtype)

    return read


def _plain(reader: CheckpointReader, name: str) -> Callable[[], torch.Tensor]:
    return lambda: reader.read(name)
