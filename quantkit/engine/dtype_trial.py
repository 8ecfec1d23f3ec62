"""Whether a model's own code computes in 16 bits; found by trying, not from a table of model names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.engine.causality import after_first_block
from quantkit.engine.segment import WeightReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError

LENGTH = 128
"""Tokens that are tried: enough for models that compute in chunks to come to their second."""


def dtype_that_runs(
    skeleton: Skeleton,
    reader: WeightReader,
    device: torch.device,
    wanted: torch.dtype,
    rows: Sequence[Sequence[int]],
) -> torch.dtype:
    """The dtype of passes on a CPU: the one that is wanted, or float32 where the first block fails in it.

    Some models mix float32 of their own with what they are given, which CUDA's users find out when they load them. On a
    CPU 16 bits are taken because they are fast, and nobody asked for them.

    Args:
        skeleton: the model; its first block is loaded for the time.
        reader: where weights come from.
        device: where passes compute.
        wanted: in which dtype.
        rows: of tokens, of which the longest is tried, or its beginning.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or not finite.
    """
    if device.type != "cpu" or wanted == torch.float32 or not rows:
        return wanted
    try:
        after_first_block(skeleton, reader, device, wanted, [max(rows, key=len)[:LENGTH]])
    except CheckpointError:
        raise
    except Exception:  # a model's own code may fail in any way; what is wrong in float32 too is told by the passes
        return torch.float32
    return wanted
