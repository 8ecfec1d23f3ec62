"""What a checkpoint whose schemes are mixed says of itself, by the allocation that lies beside its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.schemes.mix import MIX_FILE, Mix, mix_of
from quantkit.system.artifacts import read_json


def allocation_file(path: Path) -> Path | None:
    """The allocation of a checkpoint, which is a folder or a file in one; None where there is none."""
    file = (path if path.is_dir() else path.parent) / MIX_FILE
    return file if file.is_file() else None


def mix_in(path: Path) -> Mix | None:
    """The mix that a checkpoint's allocation tells; None where there is none, or it cannot be read."""
    file = allocation_file(path)
    if file is None:
        return None
    try:
        return mix_of(read_json(file))
    except (OSError, ValueError):
        return None  # which is told as a problem


def mix_facts(mix: Mix) -> dict[str, Any]:
    """A mix as a mapping that JSON holds.

    Returns:
        ``budget`` in words; ``predicted``, the divergence that it is predicted to have, in nats a
        token; ``bits_per_weight``; ``choices``, layers, weights, bytes and bits a weight of each; ``kinds``, of each
        kind of layer the end of its name in ``layers``, in how many blocks it has which of the ``choices``, ``least``
        and ``most`` bits a weight, and ``blocks``, a character each as :data:`quantkit.schemes.mix.DIGITS` has them.
    """
    return {
        "budget": mix.budget,
        "predicted": mix.predicted,
        "bits_per_weight": mix.bits_per_weight,
        "choices": {
            part.choice: {
                "layers": part.layers,
                "weights": part.weights,
                "bytes": part.nbytes,
                "bits_per_weight": part.bits,
            }
            for part in mix.parts
        },
        "kinds": [
            {
                "layers": kind.label,
                "choices": dict(kind.choices),
                "least": kind.least,
                "most": kind.most,
                "blocks": kind.digits,
            }
            for kind in mix.kinds()
        ],
    }


def mix_problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint's allocation."""
    broken = allocation_file(path) is not None and mix_in(path) is None
    return [f"{MIX_FILE} is no allocation: what its layers were chosen by is not known"] if broken else []
