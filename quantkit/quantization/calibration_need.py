"""How many calibration tokens a variant needs, and what is said where it has fewer."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from quantkit.methods.base import MEANS_TOKENS, Method
from quantkit.transforms.base import Transform

MORE = "raise calibration.samples or max_length, or give more records"


def few_tokens(
    method: Method, transforms: Collection[Transform], shapes: Mapping[str, tuple[int, int]], tokens: int
) -> list[str]:
    """What is to be said where fewer tokens were seen than a method or a transform wants; nothing where they suffice.

    Args:
        method: of the variant.
        transforms: before it.
        shapes: of the layers that it quantizes and that are calibrated.
        tokens: in the calibration set.
    """
    if not shapes:
        return []
    layer = max(shapes, key=lambda name: shapes[name][1])
    width = shapes[layer][1]
    wanted = method.tokens_wanted(width)
    if method.factorizes and tokens <= width:
        return [gram_note(method.name, tokens, layer, width)]
    if tokens < wanted:
        return [means_note(method.name, tokens)]
    names = [each.name for each in transforms if each.needs]
    return [means_note(names[0], tokens)] if names and tokens < MEANS_TOKENS else []


def gram_note(name: str, tokens: int, layer: str, width: int) -> str:
    """What is said of a method that factorizes a Gram matrix of more columns than tokens."""
    return (
        f"warning: {tokens:,} calibration tokens, and {name} wants more than {width:,}, the width of the input of "
        f"{layer}: with fewer its Gram matrix has no full rank; {MORE}"
    )


def means_note(name: str, tokens: int) -> str:
    """What is said of a method that takes means of too few tokens."""
    return (
        f"warning: {tokens:,} calibration tokens, and {name} wants {MEANS_TOKENS:,} or more: means of fewer are "
        f"rough; {MORE}"
    )
