"""Which scheme each layer gets, and which layers stay float."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass

from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.base import EXPERT, Format
from quantkit.quantization.left_float import IGNORED
from quantkit.recipe import VariantSpec
from quantkit.recipe.variant import HEAD
from quantkit.schemes import GgmlMixture, Scheme
from quantkit.system.units import percentage

NONE_LEFT = "'ignore' matches every Linear layer, or the others are such as stay float; see quantkit plan"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer that may get a scheme.

    Attributes:
        path: its name in the model.
        shape: ``(out_features, in_features)``.
        block: index of the decoder block that holds it; None for the head and for layers of models beside the blocks.
        keeps_float: why it stays float unless the recipe asks for it; None where it does not.
        is_head: whether it is the output head.
    """

    path: str
    shape: tuple[int, int]
    block: int | None
    keeps_float: str | None = None
    is_head: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The schemes of layers.

    Attributes:
        schemes: by name, None where the layer stays float.
        float_for: by the names of those that stay float why they do.
        fused: the quantized layers that runtimes of the format load as one matrix.
    """

    schemes: Mapping[str, Scheme | None]
    float_for: Mapping[str, str]
    fused: tuple[tuple[str, ...], ...]


def choose(variant: VariantSpec, layers: Mapping[str, Candidate], blocks: int, total: int) -> Choice:
    """Give each layer its scheme, or the reason for which it stays float.

    A layer whose shape suits neither scheme nor format stays float as well, unless the variant is strict, together with
    what runtimes load as one with it.

    Args:
        variant: whose schemes are given.
        layers: by name.
        blocks: number of decoder blocks.
        total: number of weights in all matrices of the blocks.

    Raises:
        SchemeError: a layer does not suit and the variant is strict, none of those that an override names suits,
            layers that a runtime fuses differ, or none is left.
    """
    asked = _asked_for(variant, layers)
    schemes: dict[str, Scheme | None] = dict.fromkeys(layers)
    float_for: dict[str, str] = {}
    misfits: dict[str, SchemeError] = {}
    for name, layer in layers.items():
        scheme = variant.scheme_of(name, layer.block, blocks, layer.path)
        if scheme is None or (layer.is_head and variant.ignores(HEAD)):
            float_for[name] = IGNORED
        elif layer.keeps_float and name not in asked:
            float_for[name] = layer.keeps_float
        else:
            try:
                schemes[name] = _suited(variant, name, layer, scheme, blocks)
            except SchemeError as error:
                misfits[name] = error
    _check_misfits(variant, misfits, layers, total, none_left=not any(schemes.values()))
    float_for |= {name: why_float(error, _place(variant, name)) for name, error in misfits.items()}
    _experts_alike(variant, schemes, float_for)
    fused = _fused_alike(variant, schemes, float_for)
    _check_experts(variant, schemes)
    if not any(schemes.values()):
        raise SchemeError(f"{variant.name}: no layer is left to quantize", NONE_LEFT)
    return Choice(schemes, float_for, fused)


def why_float(error: SchemeError, place: str) -> str:
    """What a refusal says, as the reason why a layer stays float; ``place`` is what its line begins with."""
    problem = error.problem.removeprefix(place)
    return f"{problem} ({error.remedy})" if error.remedy else problem


def _place(variant: VariantSpec, name: str) -> str:
    return f"{variant.name}: {name}: "


def _asked_for(variant: VariantSpec, layers: Mapping[str, Candidate]) -> set[str]:
    """The layers that stay float by default and that an override names: one that matches no other layer."""
    found: set[str] = set()
    for pattern in variant.overrides:
        matched = {name for name, each in layers.items() if re.search(pattern, name) or re.search(pattern, each.path)}
        found |= matched if all(layers[name].keeps_float for name in matched) else set()
    return found


def _suited(variant: VariantSpec, name: str, layer: Candidate, scheme: Scheme, blocks: int) -> Scheme:
    """The scheme that a layer gets where one was asked for; refused where its shape does not suit."""
    place = _place(variant, name).removesuffix(": ")
    try:
        found = scheme.for_layer(name, layer.block, blocks, layer.shape)
    except SchemeError as error:
        raise SchemeError(f"{place}: {error.problem}", error.remedy) from error
    check_layer(place, FORMATS.get(variant.format), found, layer.shape)
    return found


def _check_misfits(
    variant: VariantSpec,
    misfits: Mapping[str, SchemeError],
    layers: Mapping[str, Candidate],
    total: int,
    *,
    none_left: bool,
) -> None:
    """Refuse misfits where the variant is strict, or where a pattern of it, or all of it, would come to nothing."""
    if not misfits:
        return
    if variant.strict or none_left:
        raise _commonest(variant, misfits, layers, total)
    for pattern in variant.overrides:
        named = [
            name
            for name, each in layers.items()
            if variant.override_of(name, each.path) == pattern
            and not (variant.ignores(name) or variant.ignores(each.path))
        ]
        if named and all(name in misfits for name in named):
            raise misfits[named[0]]


def _commonest(
    variant: VariantSpec, misfits: Mapping[str, SchemeError], layers: Mapping[str, Candidate], total: int
) -> SchemeError:
    """The refusal of most weights, with what becomes of them where the variant is not strict."""
    weights: dict[str, int] = {}
    for name, each in misfits.items():
        reason = each.problem.removeprefix(_place(variant, name))
        weights[reason] = weights.get(reason, 0) + math.prod(layers[name].shape)
    commonest = max(weights, key=lambda reason: weights[reason])
    error = next(each for each in misfits.values() if each.problem.endswith(commonest))
    if not variant.strict:
        return error
    share = percentage(sum(weights.values()) / max(1, total))
    way_out = f"or leave out strict: true, and weights like {share} of the blocks' stay float"
    return SchemeError(error.problem, f"{error.remedy}; {way_out}" if error.remedy else way_out)


def _experts_alike(
    variant: VariantSpec, schemes: MutableMapping[str, Scheme | None], float_for: MutableMapping[str, str]
) -> None:
    """Experts that runtimes load as one tensor stay float together, where the shape of one does not suit."""
    for members in expert_stacks(FORMATS.get(variant.format), schemes).values():
        alone = next((name for name in members if float_for.get(name, IGNORED) != IGNORED), None)
        taken = [] if alone is None else [name for name in members if schemes[name] is not None]
        schemes.update(dict.fromkeys(taken))
        float_for.update(dict.fromkeys(taken, f"runtimes load them as one with {alone}" if alone else ""))


def expert_stacks(store: type[Format], names: Collection[str]) -> dict[str, list[str]]:
    """The experts that runtimes of a format load as one tensor, by what they are called together."""
    alike = store.experts
    found: dict[str, list[str]] = {}
    for name in names:
        match = EXPERT.match(name)
        if match and alike != "none":
            stack = match["stack"] if alike == "all" else f"{match['stack']}.N.{match['leaf']}"
            found.setdefault(stack, []).append(name)
    return found


def _fused_alike(
    variant: VariantSpec, schemes: MutableMapping[str, Scheme | None], float_for: MutableMapping[str, str]
) -> tuple[tuple[str, ...], ...]:
    """The quantized layers that runtimes load as one matrix; one that stays float by default takes the others along.

    Raises:
        SchemeError: they differ, because the recipe says so.
    """
    found = []
    for names in fused_layers(FORMATS.get(variant.format), schemes):
        alone = next((name for name in names if float_for.get(name, IGNORED) != IGNORED), None)
        if alone is not None:
            taken = [name for name in names if schemes[name] is not None]
            schemes.update(dict.fromkeys(taken))
            float_for.update(dict.fromkeys(taken, f"servers load them as one matrix with {alone.rpartition('.')[2]}"))
        _check_fused(variant, {name: schemes[name] for name in names})
        found += [] if schemes[names[0]] is None else [names]
    return tuple(found)


def fused_layers(store: type[Format], names: Collection[str]) -> list[tuple[str, ...]]:
    """The layers that runtimes of a format load as one matrix, by their full names."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    found = [
        tuple(f"{parent}.{leaf}" for leaf in leaves if f"{parent}.{leaf}" in names)
        for parent in parents
        for leaves in store.fused
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


def _check_experts(variant: VariantSpec, schemes: Mapping[str, Scheme | None]) -> None:
    """Refuse different schemes for experts that runtimes load as one tensor."""
    store = FORMATS.get(variant.format)
    for stack, names in expert_stacks(store, schemes).items():
        first = names[0]
        other = next((name for name in names if schemes[name] != schemes[first]), None)
        if other is not None:
            own = len(stack.partition(".N.")[0]) + 1
            both = {name[own:]: schemes[name] for name in (first, other)}
            words = [f"{name} is {each.describe() if each else 'float'}" for name, each in both.items()]
            raise SchemeError(
                f"{variant.name}: in {stack}, {' and '.join(words)}, and runtimes of the format {store.name} load "
                f"{'all experts of a block' if store.experts == 'all' else 'a projection of all experts'} "
                "in one scheme",
                "name all of them by a pattern, such as '\\.experts\\.', in overrides and in ignore",
            )


def shares_tensor(variant: VariantSpec) -> bool:
    """Whether a head and an embedding of one weight stay one quantized tensor, as in what llama.cpp mixes."""
    mixes = variant.embeddings is not None and isinstance(variant.base_scheme(), GgmlMixture)
    return mixes and not variant.parts_tied


def choose_embedding(
    variant: VariantSpec, name: str, called: str, shape: tuple[int, int], blocks: int
) -> tuple[Scheme | None, str]:
    """The scheme of the input embedding, or None with the reason why it stays float.

    Args:
        variant: whose scheme is given.
        name: of the embedding.
        called: by which its scheme knows it: of one that is tied to the head, the name of the head.
        shape: tokens and width.
        blocks: number of decoder blocks.

    Raises:
        SchemeError: the shape does not suit, and the variant is strict.
    """
    scheme, place = variant.embedding_scheme(), f"{variant.name}: {name}"
    if scheme is None:
        return None, ""
    try:
        scheme = scheme.for_layer(called, None, blocks, shape)
        check_layer(place, FORMATS.get(variant.format), scheme, shape)
    except SchemeError as error:
        if variant.strict:
            raise
        return None, why_float(error, f"{place}: ")
    return scheme, ""


def check_layer(place: str, store: type[Format], scheme: Scheme, shape: tuple[int, int]) -> None:
    """Refuse a shape that a scheme or its format cannot have.

    Args:
        place: the variant and the layer, for the message.
        store: the format.
        scheme: of the layer.
        shape: ``(out_features, in_features)``.

    Raises:
        SchemeError: with the way out.
    """
    try:
        scheme.check_layer(*shape)
        store.check_layer(scheme, *shape)
    except SchemeError as error:
        raise SchemeError(f"{place}: {error.problem}", error.remedy) from error


def check_names(variant: VariantSpec, blocks: int, names: list[str]) -> None:
    """Refuse a variant that speaks of blocks or layers that a model does not have.

    Args:
        variant: it.
        blocks: number of decoder blocks.
        names: of all linear layers, in the checkpoint and in the model.

    Raises:
        SchemeError: there are fewer blocks, or a pattern matches nothing.
    """
    counts = {
        key: patch.count
        for key, patch in (("first_blocks", variant.first_blocks), ("last_blocks", variant.last_blocks))
        if patch is not None
    }
    if sum(counts.values()) > blocks:
        asked = " and ".join(f"{key}.count {count}" for key, count in counts.items())
        raise SchemeError(f"{variant.name}: {asked}, and the model has {blocks} decoder blocks", "lower the count")
    for pattern in variant.overrides:
        if not any(re.search(pattern, name) for name in names):
            raise SchemeError(
                f"{variant.name}: the override '{pattern}' matches no Linear layer", f"a layer's name is {names[0]}"
            )
