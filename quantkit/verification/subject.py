"""What there is to know of a checkpoint before it is verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.exports import open_export
from quantkit.runtimes._checkpoint import load_config
from quantkit.runtimes._choice import is_float
from quantkit.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Subject:
    """What is verified.

    Attributes:
        path: the checkpoint.
        format: its format, ``float`` for one that is not quantized.
        dtype: of its float tensors.
        schemes: of its packed layers.
        layers: all linear layers by full name, packed or float.
    """

    path: Path
    format: str
    dtype: str
    schemes: Mapping[str, Scheme]
    layers: frozenset[str]


def read_subject(path: Path, *, trust_remote_code: bool) -> Subject:
    """What there is to know of a checkpoint before it is loaded.

    Raises:
        QuantkitError: there is none, or it is broken.
    """
    if is_float(path):
        config = load_config(path, trust_remote_code=trust_remote_code)
        return Subject(path, "float", str(config.dtype or "float32").removeprefix("torch."), {}, frozenset())
    export = open_export(path)
    floats = {name.removesuffix(".weight") for name in export.float_names() if len(export.float_shape(name)) == 2}
    own = export.config()
    dtype = str(own.get("dtype") or own.get("torch_dtype") or "float32").removeprefix("torch.")
    return Subject(path, export.format, dtype, export.schemes, frozenset({*export.schemes, *floats}))
