"""What a variant does to a model, known before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from quantkit.engine.float_parts import FloatPart, block_weights, float_parts
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.text_alone import names_alone
from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.quantization.choosing import Candidate, Choice, check_names, choose, choose_embedding, shares_tensor
from quantkit.quantization.left_float import (
    IGNORED,
    TOWER,
    Left,
    by_reason,
    check_left,
    notes_of,
    notes_of_names,
    notes_of_rest,
    notes_of_towers,
    pattern_of,
    share_words,
)
from quantkit.quantization.packed_loading import loading_faults
from quantkit.recipe import VariantSpec
from quantkit.schemes import PlainScheme, Scheme


@dataclass(frozen=True)
class Layers:
    """Every Linear layer of a model under one variant, and the input embedding if that is quantized.

    Attributes:
        schemes: full name to scheme, None where the layer stays float.
        shapes: full name to ``(out_features, in_features)``, of an embedding the tokens and the width.
        fused: full names of quantized layers that runtimes of the variant's format load as one matrix.
        embedding: full name of the input embedding if it is quantized.
        tied: full names of the head and the embedding where the source gives both one weight.
        paths: the names of layers that the model of transformers calls otherwise than the checkpoint, to its own.
        alone: those that it calls otherwise where it loads the language model of several parts alone, likewise.
        stacks: tensors of the source that are no layer's own, such as stacked experts, to the layers that they hold.
        notes: what the user should know of it.
        faults: why transformers does not load the file, as it packs layers.
        cast: the dtype in which every float tensor is stored; None leaves each as it is.
        left: the matrices of the decoder blocks that stay float.
        apart: what was to be quantized outside the blocks, the head or the embedding, and stays float: name to reason.
        in_blocks: number of weights in all matrices of the blocks, each once.
        parted: transforms make two weights of one that the head and the embedding share.
    """

    schemes: Mapping[str, Scheme | None]
    shapes: Mapping[str, tuple[int, int]]
    fused: tuple[tuple[str, ...], ...] = ()
    embedding: str | None = None
    tied: tuple[str, ...] = ()
    cast: str | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    alone: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()
    apart: Mapping[str, str] = field(default_factory=dict)
    in_blocks: int = 0
    parted: bool = False

    @property
    def share(self) -> float | None:
        """The part of the weights in the blocks' matrices that is quantized; None where that is not asked for."""
        left = sum(each.weights for each in self.left)
        return 1 - left / self.in_blocks if self.in_blocks else None

    def share_told(self) -> list[str]:
        """That part in words, where not all of it is quantized."""
        if self.share is None or self.share == 1:
            return []
        return [share_words(self.share, dict.fromkeys(each.describe() for each in self.quantized.values()))]

    def left_by_reason(self) -> dict[str, list[str]]:
        """The names of the matrices that stay float as patterns, by the reason."""
        found = {
            reason: list(dict.fromkeys(pattern_of(each.name) for each in group))
            for reason, group in by_reason(self.left).items()
        }
        for name, reason in self.apart.items():
            found.setdefault(reason, []).append(name)
        return found

    @property
    def linears(self) -> dict[str, Scheme | None]:
        """The Linear layers, without the embedding."""
        return {name: scheme for name, scheme in self.schemes.items() if name != self.embedding}

    @property
    def unties(self) -> bool:
        """Whether a weight that the head and the embedding share is two, as it is quantized for one of them or each."""
        return bool(self.tied) and (self.parted or any(name in self.quantized for name in self.tied))

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

    @cached_property  # asked for by every layer, of which a model of experts has many thousands
    def quantized(self) -> dict[str, Scheme]:
        """The layers that are quantized."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme is not None}

    @property
    def transformers_loads(self) -> bool:
        """Whether transformers loads the file."""
        return not self.faults

    def weights(self) -> int:
        """Number of weights in quantized layers."""
        return sum(rows * columns for rows, columns in (self.shapes[name] for name in self.quantized))


def plan_layers(skeleton: Skeleton, variant: VariantSpec) -> Layers:
    """Give every linear layer its scheme, and the input embedding if it gets one.

    Raises:
        SchemeError: a scheme does not suit a layer, a pattern matches nothing, there are fewer blocks than the
            variant names, layers that a runtime fuses differ, there is no embedding to quantize, no layer is left, or
            more than half of the blocks would stay float.
    """
    paths = {layer.name: layer.path for layer in skeleton.layers() if layer.name != layer.path}
    found = _plan(skeleton, variant)
    faults = loading_faults(skeleton, FORMATS.get(variant.format), found.quantized)
    outside = (*notes_of_towers(skeleton, found.quantized), *notes_of_rest(skeleton))
    unknown = notes_of_names(skeleton, all_left_out=FORMATS.get(variant.format).container == "gguf")
    notes = (*found.notes, *outside, *unknown, *faults)
    stacks, alone = skeleton.stacks(), names_alone(skeleton)
    return replace(found, notes=notes, faults=faults, paths=paths, stacks=stacks, alone=alone)


def _plan(skeleton: Skeleton, variant: VariantSpec) -> Layers:
    shapes = {layer.name: layer.shape for layer in skeleton.layers()}
    check_names(variant, len(skeleton.segments), [*shapes, *(layer.path for layer in skeleton.layers())])
    whole = variant.base_scheme()
    if isinstance(whole, PlainScheme):
        return Layers(dict.fromkeys(shapes), shapes, tied=skeleton.tied, cast=whole.dtype)
    parts, total = float_parts(skeleton), block_weights(skeleton.segments)
    reasons = {name: part.reason for name, part in parts.items()}
    reasons |= FORMATS.get(variant.format).keeps_float(list(shapes), skeleton.model.config)
    candidates = _candidates(skeleton, reasons)
    if skeleton.tied and skeleton.head is not None and shares_tensor(variant):
        del candidates[skeleton.head.linears[0]]
    chosen = choose(variant, candidates, len(skeleton.segments), total)
    left = _left(skeleton, chosen, parts)
    check_left(variant, left, total)
    FORMATS.get(variant.format)().quantization_config(chosen.schemes)  # raises for what one checkpoint cannot hold
    layers = Layers(
        {**dict.fromkeys(shapes), **chosen.schemes},
        shapes,
        chosen.fused,
        tied=skeleton.tied,
        notes=notes_of(left, total),
        left=left,
        in_blocks=total,
    )
    embedding, left_for = _plan_embedding(skeleton, variant)
    apart = {
        name: reason for name, reason in chosen.float_for.items() if skeleton.head and name in skeleton.head.linears
    }
    apart = {name: reason for name, reason in apart.items() if reason != IGNORED} | left_for
    notes = (*layers.notes, *(f"float: {name}: {reason}" for name, reason in apart.items()))
    layers = replace(layers, apart=apart, notes=notes)
    if embedding is None:
        return layers
    name, scheme, shape = embedding
    shared = FORMATS.get(variant.format).shares_head and not any(layers.schemes.get(each) for each in skeleton.tied)
    shared = shared and not variant.parts_tied
    return replace(
        layers,
        schemes={name: scheme, **layers.schemes},
        shapes={name: shape} | shapes,
        embedding=name,
        tied=() if shared else skeleton.tied,
    )


def _candidates(skeleton: Skeleton, reasons: Mapping[str, str]) -> dict[str, Candidate]:
    """The layers that the walk may come to: those of the blocks, of models of images and sound, and the head.

    Args:
        skeleton: the model.
        reasons: by names why layers stay float.
    """
    found = {
        layer.name: Candidate(layer.path, layer.shape, block, reasons.get(layer.name))
        for block, segment in enumerate(skeleton.segments)
        for layer in segment.layers
    }
    head = () if skeleton.head is None else skeleton.head.layers
    towers = (layer for segment in skeleton.towers for layer in segment.layers)
    return {
        **{layer.name: Candidate(layer.path, layer.shape, None, TOWER) for layer in towers},
        **found,
        **{layer.name: Candidate(layer.path, layer.shape, None, is_head=True) for layer in head},
    }


def _left(skeleton: Skeleton, chosen: Choice, parts: Mapping[str, FloatPart]) -> tuple[Left, ...]:
    """The matrices of the blocks that stay float."""
    shapes = {layer.name: layer.shape for segment in skeleton.segments for layer in segment.layers}
    layers = [
        Left(name, math.prod(shapes[name]), chosen.float_for[name]) for name in shapes if name in chosen.float_for
    ]
    return (*layers, *(Left(each.name, each.weights, each.reason) for each in parts.values() if not each.is_layer))


def _plan_embedding(
    skeleton: Skeleton, variant: VariantSpec
) -> tuple[tuple[str, Scheme, tuple[int, int]] | None, dict[str, str]]:
    """Name, scheme and shape of the input embedding; None where it stays float, with the reason if it was asked for."""
    segment = skeleton.embedding
    if variant.embeddings is None or (segment is None and shares_tensor(variant)):  # a mixture takes what there is
        return None, {}
    if segment is None:
        raise SchemeError(
            f"{variant.name}: the input embedding of {type(skeleton.model).__name__} is no torch.nn.Embedding",
            "leave out 'embeddings'",
        )
    (layer,) = segment.layers
    rows, columns = layer.shape
    called = skeleton.head.linears[0] if skeleton.tied and skeleton.head else layer.name
    scheme, reason = choose_embedding(variant, layer.name, called, (rows, columns), len(skeleton.segments))
    if scheme is None:
        return None, {layer.name: reason}
    return (layer.name, scheme, (rows, columns)), {}
