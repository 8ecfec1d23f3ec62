"""transformers: float checkpoints, and packed ones of the formats that it has integrations for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadedModel, LoadOptions, Runtime

if TYPE_CHECKING:
    from quantkit.formats.base import Format
    from quantkit.schemes import Scheme


@RUNTIMES.register
class Transformers(Runtime):
    """Loads the files as they are, with the packages that their format needs."""

    name = "transformers"
    summary = "loads safetensors as they are; packed weights stay packed"
    install = "pip install transformers"
    adapters = True

    @classmethod
    def missing(cls) -> str | None:
        """Nothing: quantkit depends on it."""
        return None

    @classmethod
    def computes_in(cls, store: type[Format], schemes: Collection[Scheme], device: str) -> tuple[str, ...]:
        """The dtypes that the format names."""
        return store.computes_in(schemes)

    @classmethod
    def requires(cls, store: type[Format]) -> tuple[str, ...]:
        """The packages that the format names."""
        return store.requires

    @classmethod
    def load(cls, path: Path, options: LoadOptions) -> LoadedModel:
        """Load a checkpoint as transformers does, every tensor in its place."""
        from quantkit.runtimes._packed import load_packed

        return load_packed(path, options)
