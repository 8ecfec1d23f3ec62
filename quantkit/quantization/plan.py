"""What a variant does to a model, known before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil
import torch

from quantkit.engine.skeleton import Skeleton
from quantkit.engine.walk import Strategy
from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.recipe import VariantSpec
from quantkit.schemes import PlainScheme, Scheme

FLOAT_NOTED, FLOAT_ALLOWED = 0.01, 0.5
"""Shares of the blocks' weights in no layer: above the first a note says so, above the second a variant has to."""
SPARE_MEMORY = 0.5
"""Share of the free memory that paused activations may take."""


@dataclass(frozen=True, slots=True)
class Layers:
    """Every Linear layer of a model under one variant, and the input embedding if that is quantized.

    Attributes:
        schemes: full name to scheme, None where the layer stays float.
        shapes: full name to ``(out_features, in_features)``, of an embedding the tokens and the width.
        fused: full names of quantized layers that runtimes of the variant's format load as one matrix.
        embedding: full name of the input embedding if it is quantized.
        tied: full names of the head and the embedding where the source gives both one weight.
        paths: the names of layers that the model of transformers calls otherwise than the checkpoint, to its own.
        stacks: tensors of the source that are no layer's own, such as stacked experts, to the layers that they hold.
        notes: what the user should know of it.
        unloaded: layers for which transformers has no place where they are packed.
        cast: the dtype in which every float tensor is stored; None leaves each as it is.
    """

    schemes: Mapping[str, Scheme | None]
    shapes: Mapping[str, tuple[int, int]]
    fused: tuple[tuple[str, ...], ...] = ()
    embedding: str | None = None
    tied: tuple[str, ...] = ()
    cast: str | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unloaded: Collection[str] = ()

    @property
    def linears(self) -> dict[str, Scheme | None]:
        """The Linear layers, without the embedding."""
        return {name: scheme for name, scheme in self.schemes.items() if name != self.embedding}

    @property
    def unties(self) -> bool:
        """Whether a weight that the head and the embedding share is quantized for one of them, or for each."""
        return any(name in self.quantized for name in self.tied)

    def kept(self, names: Collection[str], changed: Collection[str] = ()) -> dict[str, str]:
        """The tensors that stay float, each with the name under which the source holds it.

        Args:
            names: of the source's tensors; of a weight that the head and the embedding share there may be one only.
            changed: layers that stay float and are not as the source has them.
        """
        apart = {*self.quantized, *changed}
        broken = {name for name, layers in self.stacks.items() if any(layer in apart for layer in layers)}
        kept = {
            name: name for name in names if name not in broken and name.removesuffix(".weight") not in self.quantized
        }
        tied = [f"{name}.weight" for name in self.tied]
        if self.unties:
            stored = next(name for name in tied if name in names)
            left = (name for name in tied if name.removesuffix(".weight") not in self.quantized)
            kept |= {name: stored for name in left if name not in names}
        return kept

    def cut_out(self, changed: Collection[str] = ()) -> list[str]:
        """The layers that stay float and are written by themselves, as some of their stack are quantized or changed."""
        apart = {*self.quantized, *changed}
        broken = [layers for layers in self.stacks.values() if any(layer in apart for layer in layers)]
        return [layer for layers in broken for layer in layers if layer not in self.quantized]

    @property
    def quantized(self) -> dict[str, Scheme]:
        """The layers that are quantized."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme is not None}

    @property
    def transformers_loads(self) -> bool:
        """Whether transformers has a place for every quantized layer."""
        return not any(name in self.quantized for name in self.unloaded)

    def weights(self) -> int:
        """Number of weights in quantized layers."""
        return sum(rows * columns for rows, columns in (self.shapes[name] for name in self.quantized))

    def quantized_bytes(self, store: Format) -> int:
        """Bytes of the quantized layers as a format stores them; see :meth:`Format.packed_shapes`."""
        return sum(
            (store.for_embeddings() if name == self.embedding else store).layer_bytes(scheme, *self.shapes[name])
            for name, scheme in self.quantized.items()
        )


def plan_layers(skeleton: Skeleton, variant: VariantSpec) -> Layers:
    """Give every linear layer its scheme, and the input embedding if it gets one.

    Raises:
        SchemeError: a scheme does not suit a layer, a pattern matches nothing, there are fewer blocks than the
            variant names, layers that a runtime fuses differ, there is no embedding to quantize, no layer is left, or
            more than half of the blocks is in none.
    """
    paths = {layer.name: layer.path for layer in skeleton.layers() if layer.name != layer.path}
    alone = [layer.name for layer in skeleton.layers() if not skeleton.names.loads_alone(f"{layer.path}.weight")]
    return replace(_plan(skeleton, variant), paths=paths, stacks=skeleton.stacks(), unloaded=alone)


def _plan(skeleton: Skeleton, variant: VariantSpec) -> Layers:
    shapes = {layer.name: layer.shape for layer in skeleton.layers()}
    _check_blocks(variant, len(skeleton.segments))
    schemes: dict[str, Scheme | None] = dict.fromkeys(shapes)
    paths = {layer.name: layer.path for layer in skeleton.layers()}
    _check_patterns(variant, [*paths, *paths.values()])
    whole = variant.base_scheme()
    if isinstance(whole, PlainScheme):
        return Layers(schemes, shapes, tied=skeleton.tied, cast=whole.kind)
    blocks = len(skeleton.segments)
    for name, block in _reachable(skeleton).items():
        scheme = variant.scheme_of(name, block, blocks, paths[name])
        schemes[name] = None if scheme is None else scheme.for_layer(name, block, blocks, shapes[name])
    store = FORMATS.get(variant.format)
    for name, scheme in schemes.items():
        if scheme is not None:
            _check_layer(f"{variant.name}: {name}", store, scheme, shapes[name])
    if not any(schemes.values()):
        raise SchemeError(f"{variant.name}: no layer is left to quantize", "'ignore' matches every Linear layer")
    store().quantization_config(schemes)  # raises for what one checkpoint cannot hold
    siblings = _fused(variant, schemes)
    for names in siblings:
        _check_fused(variant, {name: schemes[name] for name in names})
    fused = tuple(names for names in siblings if schemes[names[0]] is not None)
    notes = _float_notes(skeleton, variant)
    embedding = _plan_embedding(skeleton, variant)
    if embedding is None:
        return Layers(schemes, shapes, fused, tied=skeleton.tied, notes=notes)
    name, scheme, shape = embedding
    shared = store.shares_head and not any(schemes.get(each) for each in skeleton.tied)
    tied = () if shared else skeleton.tied
    return Layers({name: scheme} | schemes, {name: shape} | shapes, fused, name, tied, notes=notes)


def _float_notes(skeleton: Skeleton, variant: VariantSpec) -> tuple[str, ...]:
    """What is to be said of the blocks' matrices that are in no layer, such as bare parameters.

    Raises:
        SchemeError: they are more than half of the blocks, and the variant does not allow it.
    """
    total, left = 0, dict[str, int]()
    layers = {id(layer.weight) for segment in skeleton.segments for layer in segment.layers}
    for segment in skeleton.segments:
        for name, parameter in segment.module.named_parameters():
            if parameter.ndim >= 2:
                total += parameter.numel()
                left |= {} if id(parameter) in layers else {f"{segment.prefix}.{name}": parameter.numel()}
    share = sum(left.values()) / max(1, total)
    if share <= FLOAT_NOTED:
        return ()
    largest = max(left, key=lambda name: left[name])
    text = f"{share:.0%} of the blocks' weights are in no layer that can be quantized, such as {largest}"
    if share > FLOAT_ALLOWED and not variant.allow_float:
        remedy = f"add allow_float: true to variant {variant.name} for a file that is mostly float"
        raise SchemeError(f"{variant.name}: {text}", remedy)
    return (f"{text}, and stay float",)


def _plan_embedding(skeleton: Skeleton, variant: VariantSpec) -> tuple[str, Scheme, tuple[int, int]] | None:
    """Name, scheme and shape of the input embedding; None where it stays float."""
    scheme, segment = variant.embedding_scheme(), skeleton.embedding
    if scheme is None:
        return None
    if segment is None:
        raise SchemeError(
            f"{variant.name}: the input embedding of {type(skeleton.model).__name__} is no torch.nn.Embedding",
            "leave out 'embeddings'",
        )
    (layer,) = segment.layers
    rows, columns = layer.shape
    name = skeleton.head.linears[0] if skeleton.tied and skeleton.head else layer.name
    scheme = scheme.for_layer(name, None, len(skeleton.segments), (rows, columns))
    _check_layer(f"{variant.name}: {layer.name}", FORMATS.get(variant.format), scheme, (rows, columns))
    return layer.name, scheme, (rows, columns)


def _reachable(skeleton: Skeleton) -> dict[str, int | None]:
    """The layers that the walk comes to, with the index of the block that holds them; None for the head."""
    found: dict[str, int | None] = {
        name: index for index, segment in enumerate(skeleton.segments) for name in segment.linears
    }
    return found if skeleton.head is None else found | {skeleton.head.linears[0]: None}


def _check_layer(place: str, store: type[Format], scheme: Scheme, shape: tuple[int, int]) -> None:
    try:
        scheme.check_layer(*shape)
        store.check_layer(scheme, *shape)
    except SchemeError as error:
        raise SchemeError(f"{place}: {error.problem}", error.remedy) from error


def _check_blocks(variant: VariantSpec, blocks: int) -> None:
    counts = {
        key: patch.count
        for key, patch in (("first_blocks", variant.first_blocks), ("last_blocks", variant.last_blocks))
        if patch is not None
    }
    if sum(counts.values()) > blocks:
        asked = " and ".join(f"{key}.count {count}" for key, count in counts.items())
        raise SchemeError(f"{variant.name}: {asked}, and the model has {blocks} decoder blocks", "lower the count")


def _check_patterns(variant: VariantSpec, names: list[str]) -> None:
    for pattern in variant.overrides:
        if not any(re.search(pattern, name) for name in names):
            raise SchemeError(
                f"{variant.name}: the override '{pattern}' matches no Linear layer", f"a layer's name is {names[0]}"
            )


def _fused(variant: VariantSpec, names: Collection[str]) -> list[tuple[str, ...]]:
    """The layers that the runtimes of the variant's format load as one matrix, by their full names."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    found = [
        tuple(f"{parent}.{leaf}" for leaf in leaves if f"{parent}.{leaf}" in names)
        for parent in parents
        for leaves in FORMATS.get(variant.format).fused
    ]
    return [members for members in found if len(members) > 1]


def _check_fused(variant: VariantSpec, schemes: Mapping[str, Scheme | None]) -> None:
    """Refuse fused layers of different schemes."""
    if len(set(schemes.values())) == 1:
        return
    parent = next(iter(schemes)).rpartition(".")[0]
    leaves = {name.rpartition(".")[2]: scheme for name, scheme in schemes.items()}
    words = [f"{leaf} is {scheme.describe() if scheme else 'float'}" for leaf, scheme in leaves.items()]
    raise SchemeError(
        f"{variant.name}: in {parent}, {', '.join(words)}, and servers such as vLLM load these layers of "
        f"a {variant.format} checkpoint as one matrix of one scheme",
        f"use one pattern for all of them, such as '({'|'.join(leaves)})', in overrides and in ignore",
    )


def paused_bytes(skeleton: Skeleton, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of activations alive at the widest pause: what the widest layer reads, and the stream beside it."""
    widest = max((layer.shape[1] for layer in skeleton.layers()), default=0)
    hidden: int = skeleton.model.get_input_embeddings().weight.shape[1]
    # At down_proj a block holds the gate, its activation and the product, and the residual stream twice.
    return tokens * (3 * widest + 2 * hidden) * dtype.itemsize


def choose_strategy(skeleton: Skeleton, tokens: int, dtype: torch.dtype, device: torch.device) -> Strategy:
    """One pass where the paused activations fit into half of the free memory, else a run per group."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return "one-pass" if paused_bytes(skeleton, tokens, dtype) <= SPARE_MEMORY * free else "recompute"
