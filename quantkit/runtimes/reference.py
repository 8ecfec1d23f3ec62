"""The reference decoder: every format that quantkit reads, decoded to a float model that transformers runs."""

from __future__ import annotations

from pathlib import Path

from quantkit.formats.base import Format
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadedModel, LoadOptions, Runtime
from quantkit.system.distribution import NAME


@RUNTIMES.register
class Reference(Runtime):
    """Decodes the packed layers with the formats' own code; a float checkpoint is its own reference."""

    name = "reference"
    summary = "decodes any format that quantkit reads into a float model; says what the file means"
    install = f"pip install {NAME}"
    packed = False
    adapters = True

    @classmethod
    def missing(cls) -> str | None:
        """Nothing: it is quantkit's own."""
        return None

    @classmethod
    def loads(cls, store: type[Format]) -> bool:
        """All that quantkit reads."""
        return True

    @classmethod
    def load(cls, path: Path, options: LoadOptions) -> LoadedModel:
        """Load a checkpoint as the float model that it stands for."""
        from quantkit.runtimes._choice import is_float
        from quantkit.runtimes._decoded import load_decoded
        from quantkit.runtimes._packed import load_packed

        return load_packed(path, options) if is_float(path) else load_decoded(path, options)
