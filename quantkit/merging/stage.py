"""The merge as a stage: from a float model and adapters to a float checkpoint, once for the same content."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.checkpoint import FLOATS, CheckpointReader, ShardWriter
from quantkit.checkpoint.adapter_folder import made_for
from quantkit.errors import CheckpointError, SourceError
from quantkit.exports.adapter import digest_of
from quantkit.merging import MergedModel
from quantkit.merging.adapter import Adapter, adapter_folder
from quantkit.merging.base import check_base, open_base
from quantkit.merging.check import check_merge
from quantkit.merging.tensors import MergedTensors
from quantkit.merging.vocabulary import check_tokenizer, tokenizer_files, write_companions
from quantkit.recipe import AdapterSpec, MergeSpec, ModelSpec
from quantkit.source import KEEPING, SourceModel
from quantkit.source.hashes import tell_unchecked
from quantkit.source.hub import Snapshot
from quantkit.system.artifacts import new_folder, read_stage, translated_os_errors, write_stage
from quantkit.system.progress import Observer

STAGE = "merge"
MERGER = 1
"""Raised when a merge would write other values than before."""


def merge_into(base: SourceModel, model: ModelSpec, merge: MergeSpec, out: Path, observer: Observer) -> MergedModel:
    """Merge the adapters of ``model`` into ``base`` and write the result to ``out``, unless it is there already.

    Raises:
        QuantkitError: see :func:`quantkit.merging.merged_source`.
    """
    observer.stage(f"merge: {', '.join(adapter.source for adapter in model.adapter)}")
    with _opened(model.adapter, out, observer) as adapters:
        _check_made_for(adapters, base)
        notes = [] if merge.any_base else _names_checked(adapters, base)
        content = _content(base, adapters, model, merge)
        done = read_stage(out, STAGE, content)
        if done is None or not _is_whole(out):
            tensors = _tensors(base, adapters, model, merge)
            with new_folder(out, guests=True) as partial:
                done = {"base": base.reference, "base_weights": content["base_weights"]}
                done |= _write(tensors, model, content["dtype"], notes, partial, observer)
                write_stage(partial, STAGE, content, **done)
    for note in done["notes"]:
        observer.note(f"merge: {note}")
    return MergedModel(
        folder=out,
        reference=model.source,
        kind=base.kind,
        relative_to=base.relative_to,
        dtype=content["dtype"],
        sha256=base.sha256,
        revision=base.revision,
        unchecked=base.unchecked,
        decoded=base.decoded,
        content=content,
        merge={key: done[key] for key in ("base", "base_weights", "adapters", "notes", "check")},
    )


@contextmanager
def _opened(adapters: Sequence[AdapterSpec], out: Path, observer: Observer) -> Iterator[tuple[Adapter, ...]]:
    """The adapters, checked by themselves; those in archives lie in a temporary folder meanwhile."""
    parent = out.absolute().parent
    with translated_os_errors(out):
        parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=parent, prefix=".adapters-")
    with scratch as name:
        opened = []
        for number, adapter in enumerate(adapters):
            folder = Path(name) / str(number)
            folder.mkdir()
            found = adapter_folder(adapter.source, folder)
            if isinstance(found, Snapshot):
                tell_unchecked(adapter.source, found.unchecked, observer)
                opened.append(Adapter(found.folder, adapter.source, adapter.weight, found.sha256))
            else:
                opened.append(Adapter(found, adapter.source, adapter.weight, {}))
        yield tuple(opened)


def _check_made_for(adapters: tuple[Adapter, ...], base: SourceModel) -> None:
    """Refuse an adapter that takes up what quantization lost, but on the decoded codes that it was made for.

    Raises:
        SourceError: the base is another one; no setting lets it pass.
    """
    for adapter in adapters:
        wanted = made_for(adapter.folder)
        if wanted is not None and wanted != digest_of(base.sha256):
            named = adapter.config.base
            raise SourceError(
                f"adapter {adapter.origin} takes up what quantization lost in '{named}', and '{base.reference}' holds "
                "other weights, which it would damage",
                f"load it on that checkpoint with PEFT, or merge it into its decoded codes: quantkit merge {named} "
                f"{adapter.origin} OUT --decode",
            )


def _names_checked(adapters: tuple[Adapter, ...], base: SourceModel) -> list[str]:
    return [
        note
        for adapter in adapters
        for note in check_base(adapter.origin, adapter.config.base, base.reference, base.folder)
    ]


def _content(base: SourceModel, adapters: tuple[Adapter, ...], model: ModelSpec, merge: MergeSpec) -> dict[str, Any]:
    return {
        "merger": MERGER,
        "dtype": base.dtype if model.dtype in KEEPING else model.dtype,
        "stored": model.dtype,
        "base": base.made_from(),
        "base_weights": merge.base if merge.base == "original" else f"{merge.base} {merge.nf4_dtype}",
        "adapters": [
            {
                "weight": adapter.weight,
                "sha256": adapter.sha256(*(file.name for file in tokenizer_files(adapter))),
            }
            for adapter in adapters
        ],
    }


def _tensors(base: SourceModel, adapters: tuple[Adapter, ...], model: ModelSpec, merge: MergeSpec) -> MergedTensors:
    opened = open_base(base.folder, trust_remote_code=model.trust_remote_code)
    dtype = None if model.dtype in KEEPING else FLOATS[model.dtype]
    return MergedTensors(opened, adapters, dtype, FLOATS[merge.nf4_dtype] if merge.base == "nf4" else None)


def _write(
    tensors: MergedTensors, model: ModelSpec, dtype: str, notes: list[str], folder: Path, observer: Observer
) -> dict[str, Any]:
    """Write the merged model, compare it with PEFT's, and return its facts; ``notes`` come before its own."""
    base, adapters, trusted = tensors.base, tensors.adapters, model.trust_remote_code
    stored = None if model.dtype in KEEPING else model.dtype
    untied = False if base.tied and not tensors.tied else None
    notes += write_companions(base.folder, adapters, folder, rows=tensors.rows, tied=untied, dtype=stored)
    if untied is False:
        notes.append("the adapter trained one of head and embedding, which were tied: they no longer are")
    notes += [
        f"adapter {adapter.origin}: its target_modules are a pattern that is not matched, for it could take for ever; "
        "merged is what it holds tensors for"
        for adapter in adapters
        if not adapter.config.tells_layers
    ]
    rows = _write_tensors(tensors, folder, observer)
    if tensors.rows is not None or any(tokenizer_files(adapter) for adapter in adapters):
        check_tokenizer(folder, rows, trust_remote_code=trusted)
    check = check_merge(folder, tensors, dtype=dtype, trust_remote_code=trusted)
    if "skipped" in check:
        notes.append(f"not compared with PEFT: {check['skipped']}")
    if "unmerged_difference" in check:
        notes.append(
            "computes what PEFT's merged model does, from which PEFT's un-merged one differs by "
            f"{check['unmerged_difference']:.2g}: the model's code reads weights past PEFT's layers"
        )
    return {"adapters": [_adapter_facts(adapter) for adapter in adapters], "notes": notes, "check": check}


def _write_tensors(tensors: MergedTensors, folder: Path, observer: Observer) -> int:
    """Write all tensors, one or an expert of one in memory at a time; returns the rows of the embedding."""
    planned = list(tensors.plan())
    rows = 0
    with ShardWriter(folder) as writer:
        for tensor in planned:
            writer.declare(tensor.name, tensor.dtype, tensor.shape)
        for done, tensor in enumerate(planned, start=1):
            writer.write_parts(tensor.name, tensors.read(tensor))
            observer.progress("tensor", done, len(planned))
            if tensor.parameter == f"{tensors.base.embedding}.weight":
                rows = tensor.shape[0]
    if not rows:
        raise SourceError(f"{tensors.base.folder} holds no input embedding", "is this a language model?")
    return rows


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    lora = adapter.config.lora
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    return {
        "source": adapter.origin,
        "weight": adapter.weight,
        "kind": kind,
        "rank": lora.r,
        "layers": len(adapter.contents.lora) + len(adapter.contents.stacks),
        "replaced": sorted((*adapter.contents.whole, *adapter.contents.tokens)),
        "trained_on": adapter.config.base,
    }


def _is_whole(folder: Path) -> bool:
    try:
        CheckpointReader(folder)
    except CheckpointError:
        return False
    return True
