"""``transform_config``: what runtimes of compressed-tensors do to the inputs of layers.

A config group has a type of matrix and the places where it is applied, see ``TransformConfig``, ``TransformScheme`` and
``TransformArgs`` of the package (0.20). ``input`` is done by the runtime; ``weight_input`` and ``weight_output`` say
what the weights of the file have in them already, which loaders leave alone. Here the type is ``hadamard``: Sylvester's
matrix over the root of its size, ``head_dim``, along the diagonal, which needs no tensor in the file. vLLM applies it
by its kernel hadacore, on CUDA and without tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.errors import CheckpointError

NAME = "R4"
"""Of a config group, as llm-compressor calls it."""
FOLDED = ("weight_input", "weight_output")
"""Places of what is in the weights."""
REMEDY = "inspect and run it where it was made"


def transform_config(turns: Mapping[str, int]) -> dict[str, Any]:
    """What a file says of layers whose inputs are turned.

    Args:
        turns: full names, each with the size of its matrices.
    """
    groups = {}
    for place, size in enumerate(sorted(set(turns.values()))):
        targets = [name for name, own in turns.items() if own == size]
        groups[f"{NAME}_{place}" if place else NAME] = {
            "type": "hadamard",
            "apply": [
                {"targets": targets, "location": "input", "inverse": False, "ignore": []},
                {"targets": targets, "location": "weight_input", "inverse": True, "ignore": []},
            ],
            "randomize": False,
            "requires_grad": False,
            "head_dim": size,
            "precision": "torch.float32",
        }
    return {"config_groups": groups}


def turns_in(config: Any) -> dict[str, int]:
    """The layers whose inputs a ``transform_config`` has turned, with the size of the matrices.

    Raises:
        CheckpointError: it asks runtimes for what quantkit does not do, or is broken.
    """
    found: dict[str, int] = {}
    for name, group, where in _places(config):
        size, targets = group.get("head_dim"), where.get("targets")
        plain = group.get("type") == "hadamard" and not group.get("randomize") and where.get("location") == "input"
        named = isinstance(targets, list) and all(isinstance(each, str) and "." in each for each in targets)
        whole = isinstance(size, int) and size > 1 and not size & (size - 1)
        if not plain or not named or not whole or where.get("ignore") or any(map(_is_pattern, targets or ())):
            raise CheckpointError(
                f"the file needs transforms of activations at run time ({name} of transform_config) that quantkit does "
                "not have: it turns the inputs of layers, by their names, by Hadamard matrices of a size",
                REMEDY,
            )
        found |= dict.fromkeys(targets or (), size)
    return found


def _places(config: Any) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Of each group its name, it, and each place where a runtime has something to do."""
    groups = config.get("config_groups") if isinstance(config, dict) else None
    for name, group in (groups if isinstance(groups, dict) else {}).items():
        places = group.get("apply") if isinstance(group, dict) else None
        if not isinstance(places, list) or not all(isinstance(each, dict) for each in places):
            raise CheckpointError(f"{name} of transform_config cannot be read", REMEDY)
        yield from ((name, group, each) for each in places if each.get("location") not in FOLDED)


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")
