"""The units of a model: which layers are chosen for, which get one choice together, and what each choice takes.

A choice suits a layer where the plan of a variant that gives it to every layer quantizes that one. So what stays float
for any reason takes no part, and what runtimes load as one matrix or one stack is one unit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from quantkit.allocation.table import Unit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import SchemeError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.models import anatomy_of
from quantkit.estimation.weights import float_bytes, schemes_of, stored, taken_in
from quantkit.formats import FORMATS
from quantkit.quantization.choosing import expert_stacks, fused_layers
from quantkit.quantization.foreseen import foreseen_bytes
from quantkit.quantization.job import Job
from quantkit.quantization.plan import plan_layers
from quantkit.recipe import VariantSpec
from quantkit.recipe.mixing import AutoSpec
from quantkit.schemes import Scheme

PACKED_TENSORS, HEADER_BYTES, TOKEN_BYTES = 4, 192, 64
"""Where a file is not there to be told: tensors of a packed layer, bytes of a tensor in a header and of a token in a
GGUF file, as most take no more."""


@dataclass(frozen=True, slots=True)
class Part:
    """A layer that may be chosen for.

    Attributes:
        shape: ``(out_features, in_features)``; of an embedding the tokens and the width.
        float_bytes: that it takes in a safetensors file where it stays as it is.
        block: index of the decoder block that holds it; None outside the blocks.
        path: its name in the model.
    """

    shape: tuple[int, int]
    float_bytes: int
    block: int | None
    path: str

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class Model(ABC):
    """What a choice is made for.

    Attributes:
        dtype: of the float model, in which scales are stored.
        parts: the layers by their full names, the embedding first and the head last, where there are such.
        blocks: number of decoder blocks.
        embedding: full name of the input embedding, if it can be quantized.
        head: full name of the output head, if it can be quantized.
        tied: head and embedding are one weight.
    """

    dtype: str
    parts: Mapping[str, Part]
    blocks: int
    embedding: str | None
    head: str | None
    tied: bool

    @abstractmethod
    def quantized(self, variant: VariantSpec) -> Mapping[str, Scheme]:
        """The layers that a variant quantizes, with their schemes, the embedding too.

        Raises:
            SchemeError: it suits no layer.
        """

    @abstractmethod
    def file_bytes(self, variant: VariantSpec) -> int:
        """Bytes that the files of a variant take at most, headers, tokenizer and padding counted where they have such.

        Raises:
            SchemeError: it does not suit the model.
        """

    @property
    @abstractmethod
    def anatomy(self) -> Anatomy:
        """What estimates of memory go by.

        Raises:
            SourceError: transformers does not build the model.
        """


class CheckpointModel(Model):
    """A model whose weights are there.

    Args:
        job: what is quantized.
        skeleton: of it.
    """

    def __init__(self, job: Job, skeleton: Skeleton) -> None:
        reader = CheckpointReader(job.source)
        around = [None if each is None else (None, each) for each in (skeleton.embedding, skeleton.head)]
        places = [around[0], *enumerate(skeleton.segments), around[1]]
        self.job, self.skeleton, self.dtype = job, skeleton, job.dtype
        self.parts = {
            layer.name: Part(
                layer.shape,
                math.prod(layer.shape) * reader.dtype(skeleton.stored_name(f"{layer.path}.weight")).itemsize,
                block,
                layer.path,
            )
            for block, segment in filter(None, places)
            for layer in segment.layers
        }
        self.blocks = len(skeleton.segments)
        self.embedding = None if skeleton.embedding is None else skeleton.embedding.linears[0]
        self.head = None if skeleton.head is None else skeleton.head.linears[0]
        self.tied = bool(skeleton.tied)

    def quantized(self, variant: VariantSpec) -> Mapping[str, Scheme]:
        """By the plan of the variant."""
        return plan_layers(self.skeleton, variant).quantized

    def file_bytes(self, variant: VariantSpec) -> int:
        """Of a variant, to a few bytes; see :func:`quantkit.quantization.foreseen.foreseen_bytes`."""
        return foreseen_bytes(self.job, self.skeleton, variant)

    @cached_property
    def anatomy(self) -> Anatomy:
        """By the config."""
        return anatomy_of(str(self.job.source), trust_remote_code=self.job.trust_remote_code)


class AnatomyModel(Model):
    """A model whose weights need not be there.

    Args:
        anatomy: of it.
        dtype: of the float model; by default the one in which it is quantized if nobody asks for another.
    """

    def __init__(self, anatomy: Anatomy, dtype: str | None = None) -> None:
        self._anatomy, self.dtype = anatomy, dtype or taken_in(anatomy.dtype)
        linears: dict[str, tuple[tuple[int, int], int | None]] = anatomy.linears()
        if anatomy.embedding:
            linears = {anatomy.embedding: (anatomy.head_shape, None)} | linears
        self.parts = {
            name: Part(shape, math.prod(shape) * float_bytes("safetensors", self.dtype, shape), block, name)
            for name, (shape, block) in linears.items()
        }
        self.blocks, self.tied = anatomy.blocks, anatomy.tied
        self.embedding, self.head = anatomy.embedding or None, anatomy.head

    def quantized(self, variant: VariantSpec) -> Mapping[str, Scheme]:
        """As estimates have it."""
        return {name: scheme for name, scheme in schemes_of(self.anatomy, variant).items() if scheme is not None}

    def file_bytes(self, variant: VariantSpec) -> int:
        """Of a variant, with more for headers and a tokenizer than most take, as nothing is known of them."""
        found = stored(self.anatomy, variant, self.dtype)
        tensors = len(found.floats) + PACKED_TENSORS * len(found.packed)
        tokenizer = self.anatomy.vocabulary * TOKEN_BYTES if found.container == "gguf" else 0
        return found.nbytes + tensors * HEADER_BYTES + tokenizer

    @property
    def anatomy(self) -> Anatomy:
        """As it was given."""
        return self._anatomy


def units_of(model: Model, spec: AutoSpec) -> list[Unit]:
    """The units of a model, in its order, without costs.

    A head that is the embedding in the file as well is in no unit; its embedding is. Where formats have a tensor for
    each, leaving a tied head as it is takes no bytes, and it counts no weights then.

    Args:
        model: it.
        spec: the variant, which says what there is to choose from and which layers take part.

    Raises:
        SchemeError: no choice suits any layer.
    """
    schemes = _suited(model, spec)
    names = [name for name in model.parts if any(name in found for found in schemes.values())]
    units = (_unit(model, spec, schemes, members) for members in _tied(spec, names))
    return [unit for unit in units if unit.sizes]


def _suited(model: Model, spec: AutoSpec) -> dict[str, Mapping[str, Scheme]]:
    """By choice the layers that take part and that it suits, with the scheme that each of them gets."""
    found: dict[str, Mapping[str, Scheme]] = {}
    refusal: SchemeError | None = None
    for name, scheme in spec.choice_schemes().items():
        if scheme is None:
            continue
        try:
            planned = model.quantized(spec.uniform(name, tied=model.tied))
        except SchemeError as error:
            refusal = error  # which suits no layer is no choice; what suits none is told if all are such
            continue
        found[name] = {
            layer: of_layer
            for layer, of_layer in planned.items()
            if _takes_part(model, spec, layer) and _is_tried(model, spec, layer, of_layer)
        }
    if any(found.values()):
        return found
    if refusal is not None:
        raise refusal
    raise SchemeError(f"{spec.name}: no layer takes part", "leave out the overrides that name all layers")


def _takes_part(model: Model, spec: AutoSpec, layer: str) -> bool:
    if layer == model.embedding:
        return spec.embeddings_take_part
    part = model.parts.get(layer)  # one of images or sound has none, and is quantized by a key of the variant alone
    return part is not None and spec.takes_part(layer, part.block, model.blocks, part.path)


def _is_tried(model: Model, spec: AutoSpec, layer: str, scheme: Scheme) -> bool:
    """Whether a choice that suits is tried: all that the recipe names are, of the usual ones what the format says."""
    return spec.choices is not None or FORMATS.get(spec.format).tries(scheme, *model.parts[layer].shape)


def _tied(spec: AutoSpec, names: Collection[str]) -> list[list[str]]:
    """The layers in groups that get one choice, as runtimes of the format load them as one; in their order."""
    store = FORMATS.get(spec.format)
    owner = {name: name for name in names}
    for members in (*fused_layers(store, names), *expert_stacks(store, names).values()):
        first = _root(owner, members[0])
        for name in members[1:]:
            owner[_root(owner, name)] = first
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_root(owner, name), []).append(name)
    return list(groups.values())


def _root(owner: Mapping[str, str], name: str) -> str:
    while owner[name] != name:
        name = owner[name]
    return name


def _unit(model: Model, spec: AutoSpec, schemes: Mapping[str, Mapping[str, Scheme]], members: Iterable[str]) -> Unit:
    store = FORMATS.get(spec.format)(model.dtype)
    layers = tuple(members)
    weights = sum(model.parts[name].weights for name in layers)
    sizes = {}
    for choice, scheme in spec.choice_schemes().items():
        if scheme is None:
            sizes[choice] = _left_float(model, spec, layers)
            weights = weights if sizes[choice] else 0
        elif all(name in schemes.get(choice, {}) for name in layers):
            sizes[choice] = sum(
                (store.for_embeddings() if name == model.embedding else store).layer_bytes(
                    schemes[choice][name], *model.parts[name].shape
                )
                for name in layers
            )
    return Unit(layers, weights, {}, sizes)


def _left_float(model: Model, spec: AutoSpec, layers: tuple[str, ...]) -> int:
    """Bytes of layers that stay as they are; none of a head whose weight is there as the embedding's anyway."""
    store = FORMATS.get(spec.format)
    if model.tied and layers == (model.head,) and not spec.embeddings_take_part:
        return 0
    if store.container == "gguf":
        shapes = (model.parts[name].shape for name in layers)
        return sum(math.prod(shape) * float_bytes("gguf", model.dtype, shape) for shape in shapes)
    return sum(model.parts[name].float_bytes for name in layers)
