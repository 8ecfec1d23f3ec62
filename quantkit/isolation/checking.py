"""A look at what a library wrote, before anything of it is believed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import OutputError, QuantizationError, QuantkitError
from quantkit.exports import Export, open_export
from quantkit.isolation.launch import WorkerFailedError, ending_facts
from quantkit.schemes import Decodable
from quantkit.system.ending import Ending

BAD_OUTPUT = "bad output"
"""How a worker ended that reported success and left nothing that can be used."""
WEIGHTS_ALONE = "errors of layers are those of their weights, not of their outputs"
RESCALED = "the library moved factors from weights into other layers, so that errors of weights would say nothing"


HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte)\.weight$")


@dataclass(slots=True)
class Findings:
    """What was found of layers.

    Attributes:
        layers: name, scheme and errors of each, as the report has them.
        weights: quantized weights.
        packed_bytes: that they take.
        differs: whether any weight is not that of the float model.
    """

    layers: list[dict[str, Any]] = field(default_factory=list)
    weights: int = 0
    packed_bytes: int = 0
    differs: bool = False


@contextmanager
def as_bad_output(what: str, output: Path, ending: Ending) -> Iterator[None]:
    """Inside the block, whatever is wrong with the output of a library that reported success is said with its name.

    Raises:
        WorkerFailedError: in place of any mistake of the output.
    """
    try:
        yield
    except OutputError:
        raise
    except QuantkitError as error:
        problem = error.problem.replace(f"{output}/", "").replace(str(output), "its checkpoint")
        raise WorkerFailedError(
            f"{what} reported success, but {problem}",
            f"its log is {ending.log}",
            facts={**ending_facts(ending), "ending": BAD_OUTPUT},
        ) from error


def checked_export(
    folder: Path, writes: str, source: CheckpointReader, unknown: Collection[str] = ()
) -> tuple[Export, Findings]:
    """Open a checkpoint that a library wrote and decode every layer.

    Args:
        folder: where it was written.
        writes: the format that the library says it writes.
        source: the float model.
        unknown: its tensors that the model's class does not know, which libraries leave out.

    Raises:
        QuantkitError: there is nothing, it does not load, is of another format, quantizes nothing, lacks tensors of
            the model, or has layers of other shapes, that are not finite, or that are those of the float model.
    """
    if not any(folder.iterdir()):
        raise QuantizationError("it wrote nothing")
    links = [path.name for path in folder.rglob("*") if path.is_symlink()]
    if links:
        raise QuantizationError(f"{links[0]} is a link to a file elsewhere")
    export = open_export(folder)
    if export.format != writes:
        raise QuantizationError(f"it wrote a checkpoint of the format {export.format} in place of {writes}")
    if not export.schemes:
        raise QuantizationError("no layer of its checkpoint is quantized")
    rescaled = _check_floats(export, source, unknown)
    findings = Findings()
    for layer in export.schemes:
        check_layer(layer, export.decodable(layer), source, findings, errors=not rescaled)
        findings.packed_bytes += export.layer_bytes(layer)
    _check_differs(findings)
    return export, findings


def check_layer(
    layer: str, weight: Decodable, source: CheckpointReader, findings: Findings, *, errors: bool = True
) -> None:
    """Check one decoded layer against the float model's.

    Raises:
        QuantkitError: the model has no such layer, or one of another shape; a value is not finite.
    """
    original = source.read(_original(layer, source)).to(torch.float32)
    found = weight.dequantize(torch.float32)
    if found.shape != original.shape:
        raise QuantizationError(f"layer {layer} has shape {list(found.shape)} in place of {list(original.shape)}")
    if not found.isfinite().all():
        raise QuantizationError(f"layer {layer} has values that are not finite")
    error = float((found - original).square().sum() / original.square().sum().clamp(min=1e-30)) if errors else None
    findings.differs |= not torch.equal(found, original)
    findings.weights += original.numel()
    facts = {"name": layer, "scheme": weight.scheme.describe(), "tokens": 0, "notes": []}
    findings.layers.append({**facts, "error_before": error, "error_after": error})


def _original(layer: str, source: CheckpointReader) -> str:
    """The float model's tensor of a layer; of a head that it ties to the embedding, that of the embedding."""
    name = f"{layer}.weight"
    if name in source:
        return name
    shared = [each for each in source.names() if EMBEDDING.search(each)]
    if HEAD.search(layer) and len(shared) == 1:
        return shared[0]
    raise QuantizationError(f"it quantized {layer}, of which the float model has no weight")


def _check_differs(findings: Findings) -> None:
    if not findings.differs:
        raise QuantizationError("every weight of its checkpoint is that of the float model")


def _check_floats(export: Export, source: CheckpointReader, unknown: Collection[str]) -> bool:
    """Check the tensors that stay float; returns whether any of a norm is not the source's, as factors were moved.

    Raises:
        QuantkitError: one is missing, of another shape or not finite.
    """
    there, packed = set(export.float_names()), set(export.schemes)
    tied = bool(export.config().get("tie_word_embeddings"))
    changed = False
    for name in source.names():
        layer = name.removesuffix(".weight")
        if layer in packed:
            continue
        if name not in there:
            if (tied and HEAD.search(layer)) or name in unknown:
                continue
            raise QuantizationError(f"its checkpoint lacks the tensor {name}")
        found, wanted = export.float_tensor(name), source.read(name)
        if found.shape != wanted.shape:
            raise QuantizationError(f"tensor {name} has shape {list(found.shape)} in place of {list(wanted.shape)}")
        if found.is_floating_point() and not found.isfinite().all():
            raise QuantizationError(f"tensor {name} has values that are not finite")
        changed |= found.ndim == 1 and not torch.equal(found.float(), wanted.to(found.dtype).float())
    return changed
