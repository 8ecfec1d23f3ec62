"""The base that an adapter names, where the user asks for it: of a 4-bit copy its float original."""

from __future__ import annotations

import tempfile
from pathlib import Path

from quantkit.checkpoint.adapter_folder import CONFIG
from quantkit.errors import SourceError
from quantkit.merging.adapter import adapter_folder
from quantkit.merging.config import AdapterConfig
from quantkit.recipe import ModelSpec
from quantkit.recipe.model import NAMED_BY_ADAPTER
from quantkit.source.float_names import float_name
from quantkit.source.hub import Snapshot
from quantkit.system.progress import Observer


def with_named_base(model: ModelSpec, observer: Observer) -> ModelSpec:
    """The model with a base in the place of ``source: auto``: the one that its first adapter was trained on.

    Raises:
        SourceError: the adapter names none, or cannot be had.
    """
    if model.source != NAMED_BY_ADAPTER:
        return model
    adapter = model.adapter[0].source
    with tempfile.TemporaryDirectory(prefix="quantkit-adapter-") as scratch:
        found = adapter_folder(adapter, Path(scratch))
        named = AdapterConfig(found.folder if isinstance(found, Snapshot) else found, adapter).base
    if not named:
        raise SourceError(f"{CONFIG} of adapter {adapter} does not name its base", "give the base as model.source")
    original = float_name(named)
    observer.note(f"base: {original}, the float original of {named}" if original else f"base: {named}")
    return model.model_copy(update={"source": original or named})
