"""Config groups of compressed-tensors files that other tools wrote: which layer has which scheme and layout.

A target of a group is the full name of a layer, ``re:`` and a pattern that its name begins with, or the name of a
class, for which ``Linear`` stands as good as always. A name takes precedence over a pattern, a pattern over a class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats._compressed_tensors.fp4 import Mxfp4Packed, Nvfp4Packed
from quantkit.formats._compressed_tensors.layout import GET_AGAIN, Layout, rounding_args
from quantkit.formats._compressed_tensors.packed import PackQuantized
from quantkit.formats._compressed_tensors.plain import FloatQuantized, IntQuantized
from quantkit.formats._compressed_tensors.turning import turns_in
from quantkit.schemes import PER_CHANNEL, Fp8Scheme, IntScheme, Mxfp4Scheme, Nvfp4Scheme, Scheme, make_scheme
from quantkit.schemes.floating import BLOCK
from quantkit.system.patterns import why_refused

if TYPE_CHECKING:
    from quantkit.checkpoint import CheckpointReader

PATTERN = "re:"
NAIVE = "naive-quantized"


@dataclass(frozen=True, slots=True)
class Group:
    """A config group.

    Attributes:
        targets: names, patterns and classes.
        scheme: of its weights.
        layout: how they are stored.
        notes: what the group asks of a runtime that the scheme does not say.
    """

    targets: tuple[str, ...]
    scheme: Scheme
    layout: Layout
    notes: tuple[str, ...] = ()

    def rank(self, layer: str) -> int:
        """3 for a layer that is named, 2 for one that a pattern matches, 1 for one that a class may hold, else 0."""
        if layer in self.targets:
            return 3
        if any(matches(target, layer) for target in self.targets):
            return 2
        return int(any(_is_class(target) for target in self.targets))


def groups_in(config: Mapping[str, Any]) -> list[Group]:
    """The groups of a ``quantization_config``.

    Raises:
        CheckpointError: a group is broken, or has what quantkit does not read.
    """
    _check_whole(config)
    found = config.get("config_groups")
    if not isinstance(found, dict) or not all(isinstance(group, dict) for group in found.values()):
        raise CheckpointError("the config_groups of compressed-tensors are no mapping of groups", GET_AGAIN)
    groups = [_group(name, group, config) for name, group in found.items() if group.get("weights") is not None]
    by_scheme: dict[Scheme, str] = {}
    for group in groups:
        if by_scheme.setdefault(group.scheme, group.layout.name) != group.layout.name:
            raise CheckpointError(
                f"{group.scheme.describe()} is stored as {by_scheme[group.scheme]} and as {group.layout.name}",
                "quantkit reads files that store a scheme in one way",
            )
    return groups


def layers_in(groups: Sequence[Group], ignore: Iterable[str], reader: CheckpointReader) -> dict[str, Scheme]:
    """The packed layers with their schemes, checked against the shapes of their tensors.

    Raises:
        CheckpointError: a packed layer has no group, a named layer is not packed, or tensors do not fit.
    """
    names = _packed_layers(reader)
    ignored = tuple(ignore)
    found: dict[str, Scheme] = {}
    for layer in names:
        group = _group_of(layer, groups, reader)
        if layer in ignored or any(matches(pattern, layer) for pattern in ignored):
            raise CheckpointError(f"{layer} is packed, and the config says that it is not quantized", GET_AGAIN)
        _check_tensors(layer, group.layout, reader)
        found[layer] = group.scheme
    named = [target for group in groups for target in group.targets if not _is_class(target) and target not in found]
    for target in named:
        if not target.startswith(PATTERN):
            raise CheckpointError(f"the config says that {target} is quantized, and it is not packed", GET_AGAIN)
    if not found:
        raise CheckpointError(
            f"{reader.folder} says that it is quantized with compressed-tensors, and holds no packed layer",
            "save it compressed: with llm-compressor, save_compressed=True",
        )
    return found


def matches(target: str, layer: str) -> bool:
    """Whether a ``re:`` target matches a layer's name.

    Raises:
        CheckpointError: it is no pattern.
    """
    if not target.startswith(PATTERN):
        return False
    pattern = target.removeprefix(PATTERN)
    refused = why_refused(pattern)
    if refused is not None:
        raise CheckpointError(f"the target '{target}' of compressed-tensors is no pattern: {refused}", GET_AGAIN)
    return re.match(pattern, layer) is not None


def _is_class(target: str) -> bool:
    """Whether a target can only be a class: full names of layers have dots, but for a few heads."""
    return not target.startswith(PATTERN) and "." not in target and target[:1].isupper()


def _check_whole(config: Mapping[str, Any]) -> None:
    """Refuse what weights alone do not tell."""
    sparsity = config.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(
            f"the file is stored sparse ({sparsity['format']}), which quantkit does not read",
            "decompress it with compressed-tensors first",
        )
    turns_in(config.get("transform_config"))  # raises for what quantkit does not do


def _group(name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> Group:
    try:
        scheme, notes = _scheme_of(group)
        layout = _layout(group.get("format") or config.get("format"), scheme)
        targets = tuple(str(target) for target in group["targets"])
    except SchemeError as error:
        raise CheckpointError(f"{name} of compressed-tensors: {error.problem}", error.remedy) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{name} of compressed-tensors cannot be read: {error!r}", GET_AGAIN) from error
    return Group(targets, scheme, layout, notes)


def _layout(name: Any, scheme: Scheme) -> Layout:
    """The layout of a format's name; a mixed file of early versions names none for a group."""
    match scheme:
        case Fp8Scheme() if name in (FloatQuantized.name, NAIVE, "mixed-precision"):
            return FloatQuantized(scheme)
        case IntScheme() if name in (IntQuantized.name, NAIVE):
            return IntQuantized(scheme)
        case IntScheme() if name in (PackQuantized.name, "mixed-precision"):
            return PackQuantized(scheme)
        case Mxfp4Scheme() if name == Mxfp4Packed.name:
            return Mxfp4Packed(scheme)
        case Nvfp4Scheme() if name == Nvfp4Packed.name:
            return Nvfp4Packed(scheme)
    raise SchemeError(
        f"quantkit does not read {scheme.describe()} in the format '{name}'",
        "it reads pack-, int-, float- and naive-quantized, mxfp4- and nvfp4-pack-quantized",
    )


def _packed_layers(reader: CheckpointReader) -> list[str]:
    """Full names of the layers that have codes and scales."""
    layers = [name.removesuffix(".weight_packed") for name in reader.names() if name.endswith(".weight_packed")]
    scaled = [name.removesuffix(".weight_scale") for name in reader.names() if name.endswith(".weight_scale")]
    return [*layers, *(layer for layer in scaled if layer not in set(layers))]


def _group_of(layer: str, groups: Sequence[Group], reader: CheckpointReader) -> Group:
    """The group that targets a layer; among classes the one whose tensors it has."""
    ranked = {index: group.rank(layer) for index, group in enumerate(groups)}
    best = max(ranked.values(), default=0)
    candidates = [groups[index] for index, rank in ranked.items() if rank == best and best]
    if best == 1 and len(candidates) > 1:
        candidates = [
            group for group in candidates if all(f"{layer}.{suffix}" in reader for suffix in group.layout.suffixes)
        ]
    if not candidates:
        raise CheckpointError(f"{layer} is packed, and no config group of compressed-tensors targets it", GET_AGAIN)
    return candidates[0]


def _check_tensors(layer: str, layout: Layout, reader: CheckpointReader) -> None:
    """The tensors of a layer have the shapes and types that its scheme needs."""
    shapes = {suffix: reader.shape(f"{layer}.{suffix}") for suffix in layout.all_suffixes}
    try:
        rows, columns = layout.size(shapes, lambda suffix: reader.read(f"{layer}.{suffix}"))
        layout.scheme.check_layer(rows, columns)
    except (SchemeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{layer} is no layer of {layout.scheme.describe()}: {error}", GET_AGAIN) from error
    for suffix, allowed in layout.shapes(rows, columns).items():
        if shapes[suffix] not in allowed:
            raise CheckpointError(
                f"{layer}.{suffix} has the shape {list(shapes[suffix])}, and {layout.scheme.describe()} of "
                f"{rows} x {columns} weights needs {list(allowed[0])}",
                GET_AGAIN,
            )
    for suffix, dtype in layout.dtypes().items():
        if reader.dtype(f"{layer}.{suffix}") != dtype:
            raise CheckpointError(
                f"{layer}.{suffix} is {reader.dtype(f'{layer}.{suffix}')}, and {layout.name} needs {dtype}", GET_AGAIN
            )


READ = "quantkit reads int of 1 to 8 bits by group, channel or tensor, 8-bit float, mxfp4 and nvfp4"
ACTIVATIONS = ("dynamic", "static", "fp8")
"""What schemes may say of the inputs of layers."""
GROUPS_OF_COLUMNS = ("group", True)
"""``actorder`` of files whose groups gather columns, and store ``weight_g_idx``; ``static`` and ``weight`` do not."""


def _scheme_of(group: Mapping[str, Any]) -> tuple[Scheme, tuple[str, ...]]:
    """The scheme of a group's weights, and what it asks of a runtime beyond that.

    Raises:
        SchemeError: quantkit has no such scheme.
        KeyError, TypeError, ValueError: the group is broken.
    """
    inputs = group.get("input_activations")
    scheme = _weights(group["weights"])
    if inputs is None:
        return scheme, ()
    for activations in ACTIVATIONS:
        with suppress(SchemeError, TypeError):
            rounded = make_scheme(scheme.kind, {**keys(scheme), "activations": activations})
            if rounded.input_rounding is not None and _asks(inputs, rounding_args(rounded.input_rounding)):
                return rounded, ()
    how = "with static scales" if inputs.get("dynamic") is False else "as they come"
    note = (
        f"runtimes round the inputs of {scheme.describe()} layers to {inputs['num_bits']}-bit {inputs['type']} {how}; "
        "quantkit reads the weights alone"
    )
    return scheme, (note,)


def keys(scheme: Scheme) -> dict[str, Any]:
    """The keys of a scheme as a recipe gives them."""
    return {name: value for name, value in scheme.to_json().items() if name != "kind"}


def _asks(inputs: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether arguments of a config ask for a rounding of inputs; what they leave out is as usual."""
    usual = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": None, "group_size": None, "dynamic": False}
    return all(inputs.get(key, value) == wanted[key] for key, value in usual.items())


def _weights(weights: Mapping[str, Any]) -> Scheme:
    match weights["type"], int(weights["num_bits"]):
        case "int", bits:
            return _integers(bits, weights)
        case "float", 8:
            return _floats(weights)
        case "float", 4:
            return _four_bit_floats(weights)
    raise SchemeError(f"quantkit has no {weights['num_bits']}-bit {weights['type']}", READ)


def _integers(bits: int, weights: Mapping[str, Any]) -> Scheme:
    symmetric = bool(weights.get("symmetric", True))
    if weights["strategy"] in ("channel", "tensor"):
        return IntScheme(bits, PER_CHANNEL, symmetric)
    if weights["strategy"] == "group":
        return IntScheme(
            bits, int(weights["group_size"]), symmetric, desc_act=weights.get("actorder") in GROUPS_OF_COLUMNS
        )
    raise SchemeError(f"quantkit has no integers by {weights['strategy']}", READ)


def _floats(weights: Mapping[str, Any]) -> Scheme:
    strategy = weights["strategy"]
    if strategy == "block" and list(weights["block_structure"]) != [BLOCK, BLOCK]:
        raise SchemeError(f"quantkit has no fp8 blocks of {weights['block_structure']}", f"it has {BLOCK} x {BLOCK}")
    if strategy not in ("tensor", "channel", "block"):
        raise SchemeError(f"quantkit has no 8-bit float by {strategy}", READ)
    return Fp8Scheme(strategy)


def _four_bit_floats(weights: Mapping[str, Any]) -> Scheme:
    match weights["strategy"], weights["group_size"]:
        case "group", 32:
            return Mxfp4Scheme()
        case "tensor_group", 16:
            return Nvfp4Scheme()
    raise SchemeError(f"quantkit has no 4-bit float by {weights['strategy']} of {weights['group_size']}", READ)
