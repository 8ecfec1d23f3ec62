"""The importance matrix that llama.cpp's quantizer was given, beside the file that it made."""

from __future__ import annotations

from pathlib import Path

from quantkit.exports import IMATRIX
from quantkit.exports.content import Content
from quantkit.quantization.job import Job


def write_importance(folder: Path, job: Job, content: Content, tokens: dict[str, int]) -> None:
    """Write ``imatrix.gguf``, for ``llama-quantize --imatrix``, if layers of the checkpoint have an importance.

    Args:
        folder: the checkpoint.
        job: names the calibration set.
        content: its layers.
        tokens: calibration tokens that reached each layer.

    Raises:
        OutputError: the folder cannot be written.
    """
    weighed = {layer: packed["importance"] for layer, packed in content.packed.items() if "importance" in packed}
    if not weighed:
        return
    from quantkit.gguf.imatrix import Importance, write_imatrix

    write_imatrix(
        folder / IMATRIX,
        {layer: Importance(stored.read(), tokens[layer]) for layer, stored in weighed.items()},
        origin=content.origin,
        datasets=[f"quantkit calibration set {job.calibration_sha256}"],
        chunk_size=max(map(len, job.rows)),
    )
