"""The quantized model of a training: its weights, what of them is trained, and how the result is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import nn

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.layers import Layer
from quantkit.engine.segment import Segment
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError, QuantizationError
from quantkit.exports.base import Export
from quantkit.exports.content import Stored
from quantkit.exports.layer_store import LayerStore
from quantkit.exports.rewriting import content_of, float_dtype, floats_that_stay, model_of, origin_folder, write_again
from quantkit.exports.writing import write_export
from quantkit.formats import FORMATS
from quantkit.numerics.group_adapter import GroupAdapter, can_adapt
from quantkit.numerics.low_rank import aligned
from quantkit.numerics.trainable import Trainable, can_train
from quantkit.numerics.trained_codes import TrainedCodes, can_train_codes
from quantkit.recipe.recovering import RecoverOptions, Trained
from quantkit.recovery.parts import Part, TrainedVector, TrainedWeight, with_stored
from quantkit.recovery.training import FRAME
from quantkit.transforms.base import Changes

NEAR = 0.2
"""How far from the codes of the file the numbers behind them begin at most, in steps of the grid.

Nearer to the rounding boundary, at 0.5, so many cross it in the first steps, by gradients that are mostly noise, that
the divergence doubles before it falls.
"""


class StudentWeights:
    """The weights of a quantized checkpoint where a model is filled with them.

    Args:
        export: the checkpoint.
        trained: layers, and tensors by their names, for which something else stands in; they are not decoded.
    """

    def __init__(self, export: Export, trained: set[str]) -> None:
        self._export = export
        self._trained = trained
        self._floats = set(export.float_names())
        self._blank: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._floats or name.removesuffix(".weight") in self._export.schemes

    def dtype(self, name: str) -> torch.dtype:
        """Of a packed layer float32, in which it is decoded."""
        return self._export.float_dtype(name) if name in self._floats else torch.float32

    def read(self, name: str) -> torch.Tensor:
        """A tensor; nothing but the shape of one for which something stands in."""
        layer = name.removesuffix(".weight")
        is_float = name in self._floats
        if (name if is_float else layer) in self._trained:
            if name not in self._blank:
                shape = self._export.float_tensor(name).shape if is_float else self._export.shape(layer)
                self._blank[name] = torch.zeros(()).expand(shape)
            return self._blank[name]
        return self._export.float_tensor(name) if is_float else self._export.decodable(layer).dequantize(torch.float32)

    def read_finite(self, name: str) -> torch.Tensor:
        """The same: an export was checked when it was written."""
        return self.read(name)


@dataclass(slots=True)
class Student:
    """A quantized model that is trained.

    Args:
        export: its checkpoint, a folder or GGUF file that quantkit wrote.
        work: a folder for what it needs meanwhile.
        original: the float model of the same class.
        weights: of the float model.
        options: what is trained.
        device: where.
        trust_remote_code: run Python code that comes with the model.
        changes: what transforms made of the whole float model before it was quantized.

    Attributes:
        skeleton: the model.
        reader: its weights.
        parts: what is trained, by the prefixes of segments.
        left: names of packed layers of which nothing is trained.

    Raises:
        QuantizationError: nothing of it can be trained.
        CheckpointError: a layer has another shape in the float model.
    """

    export: Export
    work: Path
    original: Skeleton
    weights: CheckpointReader
    options: RecoverOptions
    device: torch.device
    trust_remote_code: bool = False
    changes: Changes = field(default_factory=Changes)
    skeleton: Skeleton = field(init=False)
    reader: StudentWeights = field(init=False)
    parts: dict[str, list[Part]] = field(init=False)
    left: list[str] = field(init=False)
    _origin: Path = field(init=False)

    def __post_init__(self) -> None:
        self._origin = origin_folder(self.export, self.work / "origin")
        self.skeleton, _ = model_of(self.export, self._origin, self.trust_remote_code)
        self.reader = StudentWeights(self.export, set())
        head = self.skeleton.head
        segments = [*self.skeleton.segments, *([head] if head is not None else [])]
        self.parts = {each.prefix: [*self._layers(each), *self._vectors(each)] for each in segments}
        self.parts[FRAME] = list(self._frame_vectors(segments))
        held = {part.name for parts in self.parts.values() for part in parts}
        self.left = [name for name in self.export.schemes if name not in held]
        self.reader = StudentWeights(self.export, held)
        if not any(part.leaves() for parts in self.parts.values() for part in parts):
            asked = ", ".join(self.options.train or ("scales", "norms"))
            raise QuantizationError(
                f"{self.export.path} stores nothing of {asked} that can be trained: its format is {self.export.format}",
                "integer codes with scales of their own can be: gptq, awq, compressed-tensors, hqq, Q4_0 and Q8_0",
            )

    # What is trained

    def _layers(self, segment: Segment) -> Iterator[TrainedWeight]:
        """The packed layers of a segment whose weight no other segment has."""
        for layer in segment.layers:
            inside = layer.path.removeprefix(segment.prefix).removeprefix(".")
            scheme = self.export.schemes.get(layer.name)
            if scheme is None or inside in segment.shared or not can_train(scheme):
                continue
            kinds: tuple[Trained, ...] = ("codes", "scales", "zeros", "qa-lora")
            wanted = frozenset(each for each in kinds if self.options.trains(each, scheme.bits))
            weight = self.export.weight(layer.name).to(self.device)
            made: Trainable | TrainedCodes | GroupAdapter
            if "qa-lora" in wanted:
                if not can_adapt(scheme):
                    continue
                made = GroupAdapter.of(weight, self.options.rank)
            elif "codes" in wanted and can_train_codes(scheme):
                within = NEAR if self.options.codes_from == "file" else None
                origin = aligned(self._float_weight(layer), weight.dequantize(torch.float32))
                made = TrainedCodes.of(weight, origin, zeros="zeros" in wanted, within=within)
            else:
                made = Trainable.of(weight, zeros="zeros" in wanted)
            for leaf in made.parameters().values():
                leaf.requires_grad = False
            part = TrainedWeight(layer.name, f"{inside}.weight".removeprefix("."), made, wanted)
            for _, leaf in part.leaves().values():
                leaf.requires_grad = True
            yield part

    def _float_weight(self, layer: Layer) -> torch.Tensor:
        """The float weight that a layer stands for, float32, but for factors of channels."""
        found = self.original.read(f"{layer.path}.weight", self.weights.read_finite)
        if tuple(found.shape) != layer.shape:
            raise CheckpointError(
                f"{layer.name} is {list(layer.shape)} in {self.export.path} and {list(found.shape)} in the float model",
                "give the float model that the checkpoint was made of",
            )
        return self.changes.apply(layer.path, "weight", found.to(self.device, torch.float32))

    def _vectors(self, segment: Segment) -> Iterator[TrainedVector]:
        for owner, module in segment.module.named_modules():
            if owner not in segment.shared:
                yield from self._vectors_of(segment.prefix, owner, module)

    def _frame_vectors(self, segments: list[Segment]) -> Iterator[TrainedVector]:
        """Norms and biases around the blocks, such as the last norm."""
        inside = {id(module) for segment in segments for module in segment.module.modules()}
        towers = {id(module) for segment in self.skeleton.towers for module in segment.module.modules()}
        around = {id(module) for module in self.skeleton.text.modules()}
        for owner, module in self.skeleton.model.named_modules():
            if id(module) in around - inside - towers:
                yield from self._vectors_of("", owner, module)

    def _vectors_of(self, prefix: str, owner: str, module: nn.Module) -> Iterator[TrainedVector]:
        """The norms and biases that a module has itself, where the checkpoint holds them as they are."""
        for leaf, parameter in module.named_parameters(recurse=False):
            kind = _kind(module, leaf, parameter)
            inside = f"{owner}.{leaf}".removeprefix(".")
            full = f"{prefix}.{inside}".removeprefix(".")
            if kind is None or not self.options.trains(kind, 0):
                continue
            name = self.skeleton.names.written(full)
            if name not in self.export.float_names() or self.skeleton.names.sources(full) != [name]:
                continue
            value = self.export.float_tensor(name)
            if value.shape == parameter.shape and torch.equal(self.skeleton.read(full, self.reader.read), value):
                yield TrainedVector.of(name, inside, kind, value.to(self.device))

    # What is written

    def write(self, best: Path, folder: Path) -> None:
        """Write the checkpoint with what a training found best.

        Args:
            best: file with what is stored of each part, see :class:`quantkit.recovery.training.Trained`.
            folder: an empty one.

        Raises:
            OutputError: the folder cannot be written.
            CheckpointError: what was read back is not what was written.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(best).items():
            part, _, piece = name.rpartition("|")
            found.setdefault(part, {})[piece] = tensor
        layers = {name: each for name, each in found.items() if name in self.export.schemes}
        vectors = {name: each["value"] for name, each in found.items() if name not in layers}
        store = FORMATS.get(self.export.format)
        if store.container == "gguf":
            self._write_file(layers, vectors, folder)
            return
        changed = dict(vectors)
        packing = store(float_dtype(self.export))
        for name, stored in layers.items():
            packed = packing.pack(packing.fitted(with_stored(self.export.weight(name), stored)))
            changed |= {f"{name}.{suffix}": each.contiguous() for suffix, each in packed.items()}
        write_again(self.export, folder, changed)

    def _write_file(
        self, layers: Mapping[str, Mapping[str, torch.Tensor]], vectors: Mapping[str, torch.Tensor], folder: Path
    ) -> None:
        """Write a GGUF file."""
        target, dtype = FORMATS.get(self.export.format), float_dtype(self.export)
        kept = LayerStore(self.work / "layers", target(dtype), self.export.embedding)
        for name in self.export.schemes:
            weight = self.export.weight(name)
            kept.keep(name, with_stored(weight, layers[name]) if name in layers else weight)
            kept.flush(name)
        floats = floats_that_stay(self.export, self.skeleton, target)
        schemes, code = self.export.schemes, self.trust_remote_code
        content = content_of(self.export, self._origin, self.skeleton, schemes, kept, floats, code=code)
        changed = {name: Stored(each.dtype, tuple(each.shape), each.clone) for name, each in vectors.items()}
        write_export(replace(content, floats={**content.floats, **changed}), target(dtype), folder)


def _kind(module: nn.Module, leaf: str, parameter: torch.Tensor) -> Literal["norms", "biases"] | None:
    """Whether a parameter is a norm or a bias; None for others."""
    if parameter.ndim != 1:
        return None
    is_norm = "norm" in type(module).__name__.lower()
    if leaf == "weight" and is_norm:
        return "norms"
    return "biases" if leaf == "bias" and (is_norm or isinstance(module, nn.Linear)) else None
