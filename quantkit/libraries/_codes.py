"""Codes of a library whose own files nobody else reads, on their way from the worker to a format of quantkit.

Runs in the worker, so it needs torch and safetensors alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CODES_FILE = "codes.safetensors"
SCHEMES_FILE = "schemes.json"


def write_codes(
    folder: Path, layers: Mapping[str, Mapping[str, torch.Tensor]], schemes: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write what a library chose, layer by layer; all other tensors are taken from the float checkpoint.

    Args:
        folder: of the request.
        layers: by full name of the Linear layer, ``codes`` (uint8, ``[out_features, in_features]``: code 0 is the
            smallest value of the grid), ``scales`` (float, ``[out_features, groups]``) and, for an asymmetric grid,
            ``zeros`` (``[out_features, groups]``, in steps of the grid; float where the scheme says so). A weight is
            ``(code - zero) * scale``, of a symmetric grid of integers with ``zero = 2 ** (bits - 1)``.
        schemes: by the same names the scheme as quantkit's recipes write it, such as
            ``{"scheme": "int", "bits": 4, "group_size": 64, "symmetric": False}``.
    """
    from safetensors.torch import save_file

    flat = {
        f"{name}.{part}": tensor.contiguous().cpu() for name, parts in layers.items() for part, tensor in parts.items()
    }
    save_file(flat, folder / CODES_FILE)
    (folder / SCHEMES_FILE).write_text(json.dumps(dict(schemes), indent=1), encoding="utf-8")
