"""Names of a checkpoint's matrices, by which a plugin tells its library what stays float.

Runs in the worker, so it needs safetensors alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from quantkit.errors import SchemeError


def stored_layers(folder: Path) -> list[str]:
    """Full names of the modules of a float checkpoint that hold a matrix ``weight``, embeddings among them."""
    from safetensors import safe_open

    names = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            matrices = (key for key in shard.keys() if key.endswith(".weight"))  # noqa: SIM118 - no mapping
            names += [key.removesuffix(".weight") for key in matrices if len(shard.get_slice(key).get_shape()) == 2]
    return names


def in_blocks(names: Iterable[str]) -> list[str]:
    """Those that lie in a numbered block, which excludes embeddings and the head."""
    return [name for name in names if re.search(r"\.\d+\.", name)]


def kept_float(names: Iterable[str], ignore: Iterable[str]) -> list[str]:
    """The names in which one of the patterns of ``ignore`` is found."""
    patterns = [re.compile(pattern) for pattern in ignore]
    return [name for name in names if any(pattern.search(name) for pattern in patterns)]


def same_in_blocks(names: Iterable[str], ignore: Iterable[str], library: str) -> tuple[list[str], list[str]]:
    """Names within a block of the layers to quantize and of those that stay float, for libraries that know no others.

    Args:
        names: full names of all linear layers, of which those outside the blocks are left out.
        ignore: patterns of layers that stay float.
        library: for the message.

    Raises:
        SchemeError: blocks differ in what stays float, or nothing is left to quantize.
    """
    inside = in_blocks(names)
    kept = set(kept_float(inside, ignore))
    blocks: dict[str, tuple[list[str], list[str]]] = {}
    for name in inside:
        block, within = _split(name)
        blocks.setdefault(block, ([], []))[name in kept].append(within)
    found = list(blocks.values())
    if any(each != found[0] for each in found):
        raise SchemeError(
            f"{library} quantizes the same layers in every block, and 'ignore' names layers of some blocks alone",
            "use a pattern without a block's number, or library: gptqmodel",
        )
    if not found or not found[0][0]:
        raise SchemeError(f"'ignore' leaves {library} no layer to quantize", "keep fewer layers float")
    return found[0]


def _split(name: str) -> tuple[str, str]:
    """The number of a layer's block with all before it, and its name within the block."""
    parts = name.split(".")
    at = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])
