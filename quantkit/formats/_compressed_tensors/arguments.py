"""What the ``weights`` and ``input_activations`` of a config group say, as a scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import SchemeError
from quantkit.schemes import PER_CHANNEL, Fp8Scheme, IntScheme, Mxfp4Scheme, Nvfp4Scheme, Scheme
from quantkit.schemes.floating import BLOCK

GET_AGAIN = "config and tensors do not fit each other: get the checkpoint again"
READ = "quantkit reads int of 1 to 8 bits by group, channel or tensor, 8-bit float, mxfp4 and nvfp4"
GROUPS_OF_COLUMNS = ("group", True)
"""``actorder`` of files whose groups gather columns, and store ``weight_g_idx``; ``static`` and ``weight`` do not."""


def scheme_of(group: Mapping[str, Any]) -> tuple[Scheme, tuple[str, ...]]:
    """The scheme of a group's weights, and what it asks of a runtime beyond that.

    Raises:
        SchemeError: quantkit has no such scheme.
        KeyError, TypeError, ValueError: the group is broken.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    scheme = _weights(weights, inputs)
    if inputs is None or scheme.activations is not None:
        return scheme, ()
    how = "with static scales" if inputs.get("dynamic") is False else "as they come"
    note = (
        f"runtimes round the inputs of {scheme.describe()} layers to {inputs['num_bits']}-bit {inputs['type']} {how}; "
        "quantkit reads the weights alone"
    )
    return scheme, (note,)


def _weights(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Scheme:
    match weights["type"], int(weights["num_bits"]):
        case "int", bits:
            return _integers(bits, weights, inputs)
        case "float", 8:
            return _floats(weights, inputs)
        case "float", 4:
            return _four_bit_floats(weights)
    raise SchemeError(f"quantkit has no {weights['num_bits']}-bit {weights['type']}", READ)


def _integers(bits: int, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Scheme:
    symmetric = bool(weights.get("symmetric", True))
    if weights["strategy"] in ("channel", "tensor"):
        rounds = bits == 8 and symmetric and _rounds_tokens(inputs, "int")
        return IntScheme(bits, PER_CHANNEL, symmetric, activations="dynamic" if rounds else None)
    if weights["strategy"] == "group":
        return IntScheme(
            bits, int(weights["group_size"]), symmetric, desc_act=weights.get("actorder") in GROUPS_OF_COLUMNS
        )
    raise SchemeError(f"quantkit has no integers by {weights['strategy']}", READ)


def _floats(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Scheme:
    strategy = weights["strategy"]
    if strategy == "block" and list(weights["block_structure"]) != [BLOCK, BLOCK]:
        raise SchemeError(f"quantkit has no fp8 blocks of {weights['block_structure']}", f"it has {BLOCK} x {BLOCK}")
    if strategy not in ("tensor", "channel", "block"):
        raise SchemeError(f"quantkit has no 8-bit float by {strategy}", READ)
    rounds = _rounds_tokens(inputs, "float", BLOCK if strategy == "block" else None)
    return Fp8Scheme(strategy, "dynamic" if rounds else None)


def _four_bit_floats(weights: Mapping[str, Any]) -> Scheme:
    match weights["strategy"], weights["group_size"]:
        case "group", 32:
            return Mxfp4Scheme()
        case "tensor_group", 16:
            return Nvfp4Scheme()
    raise SchemeError(f"quantkit has no 4-bit float by {weights['strategy']} of {weights['group_size']}", READ)


def _rounds_tokens(inputs: Mapping[str, Any] | None, kind: str, block: int | None = None) -> bool:
    """Whether inputs are rounded to 8 bits by scales of each token, or of each token's blocks."""
    if inputs is None or inputs.get("dynamic") is not True or not inputs.get("symmetric", True):
        return False
    shape = ("token", None) if block is None else ("group", block)
    return (inputs["type"], int(inputs["num_bits"])) == (kind, 8) and (
        (inputs.get("strategy"), inputs.get("group_size")) == shape
    )
