"""The merge stage: LoRA adapters into float weights, one tensor at a time.

PEFT supplies the arithmetic of every layer; the checkpoint streams from the base's shards to the merged model's, so
that memory holds one tensor. The result is compared with PEFT's own un-merged model on one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit import source
from quantkit.checkpoint import CheckpointReader
from quantkit.recipe import MergeSpec, ModelSpec
from quantkit.source import SourceModel
from quantkit.source.halving import WIDE, halved
from quantkit.source.hashes import tell_unchecked
from quantkit.system.artifacts import check_writable
from quantkit.system.progress import Observer, Silent
from quantkit.system.scratch import workplace
from quantkit.system.validation import parse_section

__all__ = ["MergedModel", "merge_model", "merged_source", "other_merge"]


@dataclass(frozen=True)
class MergedModel(SourceModel):
    """A float model that adapters were merged into.

    Attributes:
        content: what its values and tokens depend on.
        merge: ``base``, ``base_weights``, ``adapters`` (``source``, ``weight``, ``rank``, ``layers``), ``notes`` and
            ``check``, see :func:`quantkit.merging.check.check_merge`.
    """

    content: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)

    def made_from(self) -> dict[str, Any]:
        """The base, the adapters, and how they were merged."""
        return self.content


def merged_source(model: ModelSpec, merge: MergeSpec, work: Path, observer: Observer) -> SourceModel:
    """The float checkpoint that a recipe's model means, with its adapters merged where it has some.

    The merged model lies in ``work/merged-original`` or ``work/merged-nf4`` and is made once for the same content.

    Raises:
        SourceError: model or adapter cannot be had, or do not fit each other, with the remedy.
        CheckpointError: a file is broken, or the merged model does not compute what PEFT's does.
        OutputError: ``work`` cannot be written.
    """
    if not model.adapter:
        return _resolved(model, work, observer)
    return _merged(model, merge, work, observer)


def other_merge(model: ModelSpec, merge: MergeSpec, work: Path, observer: Observer) -> MergedModel:
    """The same adapters merged into the base that ``merge.compare`` names.

    Raises:
        ValueError: it names none.
        QuantkitError: see :func:`merged_source`.
    """
    if merge.compare is None:
        raise ValueError("merge.compare names no base")
    return _merged(model, merge.model_copy(update={"base": merge.compare, "compare": None}), work, observer)


def _merged(model: ModelSpec, merge: MergeSpec, work: Path, observer: Observer) -> MergedModel:
    from quantkit.merging.named_base import with_named_base
    from quantkit.merging.stage import merge_into

    model = with_named_base(model, observer)
    base = _resolved(model.model_copy(update={"dtype": "own", "adapter": ()}), work, observer)
    if model.dtype == "auto" and base.dtype in WIDE:
        chosen = halved(map(CheckpointReader(base.folder).read, CheckpointReader(base.folder).names()))
        note = chosen.note(base.reference, base.dtype)
        observer.note(note)
        half = model.model_copy(update={"dtype": chosen.dtype})
        return replace(merge_into(base, half, merge, work / f"merged-{merge.base}", observer), note=note)
    return merge_into(base, model, merge, work / f"merged-{merge.base}", observer)


def _resolved(model: ModelSpec, work: Path, observer: Observer) -> SourceModel:
    found = source.resolve(model, work)
    tell_unchecked(found.reference, found.unchecked, observer)
    if found.note:
        observer.note(found.note)
    for note in found.notes:
        observer.note(f"source: {note}")
    return found


def merge_model(
    base: str,
    adapters: str | Sequence[str | Mapping[str, Any]],
    out: Path,
    *,
    dtype: str = "auto",
    base_weights: str = "original",
    any_base: bool = False,
    decode: bool = False,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Merge adapters into a float model without a recipe.

    Args:
        base: hub id, folder, GGUF file or ``package:`` reference, or ``auto`` for the one that the first adapter names;
            see :class:`quantkit.recipe.ModelSpec`.
        adapters: a folder, hub id or archive, or several, each such a reference or a mapping with ``source`` and
            ``weight``.
        out: folder of the merged model; it appears when it is whole.
        dtype: of the merged weights: ``auto`` (the base's own), ``float32``, ``float16`` or ``bfloat16``.
        base_weights: ``original`` or ``nf4``, see :class:`quantkit.recipe.MergeSpec`.
        any_base: merge although an adapter names another base.
        decode: decode a base that a tool has quantized.
        trust_remote_code: run Python code that comes with the model.
        observer: is told what happens; nobody by default.

    Returns:
        ``folder``, ``dtype``, ``base``, ``base_weights``, ``adapters``, ``notes`` and ``check``, see
        :class:`MergedModel`.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    from quantkit.merging.named_base import with_named_base
    from quantkit.merging.stage import merge_into

    watching = observer or Silent()
    given = {"source": base, "adapter": adapters, "dtype": dtype, "decode": decode}
    given["trust_remote_code"] = trust_remote_code
    model = parse_section(ModelSpec, given, "merge")
    merge = parse_section(MergeSpec, {"base": base_weights, "any_base": any_base}, "merge")
    check_writable(out, stage="merge", source=base)
    with workplace(out, "merge") as work:
        model = with_named_base(model, watching)
        watching.stage(f"source: {model.source}")
        found = _resolved(model.model_copy(update={"dtype": "own", "adapter": ()}), work, watching)
        merged = merge_into(found, model, merge, out, watching)
    return {"folder": str(merged.folder), "dtype": merged.dtype, **merged.merge}
