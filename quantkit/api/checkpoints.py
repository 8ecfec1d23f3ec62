"""A checkpoint that is there: converted, inspected, verified, uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.system.progress import Logged, Observer
from quantkit.system.units import parse_seconds


def convert(
    checkpoint: str | Path,
    to: str,
    *,
    out: str | Path,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Write a model in another format: a quantized checkpoint with the same codes or decoded, or a float model.

    Args:
        checkpoint: folder or GGUF file, quantkit's or another tool's; of a float model also a hub id.
        to: name of a format, or ``float16``, ``bfloat16`` or ``float32``; with ``float`` or these codes are decoded.
        out: folder of the new checkpoint; it appears when it is whole.
        dtype: of a float checkpoint or file, see :class:`quantkit.recipe.ModelSpec`.
        trust_remote_code: run Python code that comes with the checkpoint.
        observer: is told what happens.

    Returns:
        ``from``, ``format``, ``layers``, ``bits_per_weight``, ``largest_shift`` in steps of the grid, and ``notes``;
        of floats ``float``, ``dtype``, and ``decoded``, what they were decoded from, or None.

    Raises:
        QuantkitError: the format cannot tell a layer's grid, with the reason; the checkpoint is broken.
    """
    from quantkit.pipeline.converting import convert_any

    watching = observer or Logged()
    watching.stage(f"convert: {checkpoint} to {to}")
    return convert_any(
        str(checkpoint), to, Path(out).expanduser(), watching, dtype=dtype, trust_remote_code=trust_remote_code
    )


def inspect(checkpoint: str | Path, *, deep: bool = True) -> dict[str, Any]:
    """Tell what a checkpoint holds, whoever wrote it, and what will load it.

    Args:
        checkpoint: folder or GGUF file.
        deep: decode every layer, to find outliers and bad scales; without it headers alone are read.

    Returns:
        See :func:`quantkit.inspection.inspect`.

    Raises:
        QuantkitError: it is no checkpoint that quantkit reads, or a broken one.
    """
    from quantkit.inspection import inspect as inspect_checkpoint

    return inspect_checkpoint(Path(checkpoint).expanduser(), deep=deep)


def verify(
    checkpoint: str | Path,
    *,
    runtime: str = "transformers",
    python: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    time_limit: str = "1h",
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Load a checkpoint in a runtime and compare its logits with those of the reference decoder.

    The verdict is also written into the manifest of a checkpoint that quantkit exported.

    Args:
        checkpoint: folder or GGUF file.
        runtime: name of a runtime.
        python: interpreter of the environment that the runtime lives in, for one that has its own.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: compute dtype; the runtime's usual one by default.
        time_limit: such as ``90s``, ``30min``, ``2h``: that the runtime may take, and the reference.
        trust_remote_code: run Python code that comes with the checkpoint.
        observer: is told what happens.

    Returns:
        The verdict, see :func:`quantkit.verification.verify`; ``passed`` is its heart.

    Raises:
        QuantkitError: the checkpoint or the runtime cannot be used at all.
    """
    from quantkit.verification import verify as verify_checkpoint

    return verify_checkpoint(
        Path(checkpoint).expanduser(),
        runtime,
        python=python,
        device=device,
        dtype=dtype,
        seconds=parse_seconds(time_limit),
        trust_remote_code=trust_remote_code,
        observer=observer or Logged(),
    )


def push(checkpoint: str | Path, repository: str, *, private: bool = True, revision: str | None = None) -> str:
    """Upload a checkpoint with its model card to the Hugging Face hub.

    The token is that of ``huggingface_hub``: the variable ``HF_TOKEN``, or a login.

    Args:
        checkpoint: folder that quantkit exported.
        repository: ``org/name``; made if it is not there.
        private: of a new repository.
        revision: branch.

    Returns:
        The address of the commit.

    Raises:
        QuantkitError: the folder is not whole, the hub refuses or cannot be reached.
    """
    from quantkit.publishing import push as push_checkpoint

    return push_checkpoint(Path(checkpoint).expanduser(), repository, private=private, revision=revision)
