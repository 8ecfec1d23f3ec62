"""Names and row orders of tensors in GGUF files, beside those of transformers."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import torch

SUFFIXES = (".weight", ".bias")


def namer(architecture: str, blocks: int) -> Callable[[str], str | None]:
    """From a parameter's name in transformers to its name in a GGUF file; None for what has no place there.

    Args:
        architecture: as GGUF files call it.
        blocks: number of decoder blocks.
    """
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, blocks)

    def stored(name: str) -> str | None:
        found = names.get_name(name, try_suffixes=SUFFIXES)
        return None if found is None else str(found)

    return stored


def rotated_heads(architecture: str, name: str, heads: int, key_heads: int) -> int | None:
    """Heads of a tensor whose rows GGUF files keep in another order: a llama's queries and keys; None for others.

    llama.cpp rotates neighbouring rows of a head there, and transformers rows that are half a head apart.

    Args:
        architecture: as GGUF files call it.
        name: of the parameter in transformers.
        heads: of the queries.
        key_heads: of the keys.
    """
    layer = name.split(".")[-2] if "." in name else ""
    return {"q_proj": heads, "k_proj": key_heads}.get(layer) if architecture == "llama" else None


def in_transformers_order(tensor: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows of a GGUF file's tensor, packed or not, in the order of transformers; see :func:`rotated_heads`."""
    if heads is None:
        return tensor
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def in_gguf_order(tensor: torch.Tensor, heads: int | None) -> torch.Tensor:
    """The inverse of :func:`in_transformers_order`."""
    if heads is None:
        return tensor
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
