"""llama.cpp's importance matrix, for ``llama-quantize --imatrix``.

A GGUF file with two float32 tensors for each quantized tensor: ``NAME.in_sum2``, the sums of squares of the layer's
input columns, and ``NAME.counts``, the tokens over which they were taken; of a stack of experts a row for each. See
``IMatrixCollector::save_imatrix`` in ``tools/imatrix/imatrix.cpp`` of https://github.com/ggml-org/llama.cpp (commit
050fc7f).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch

from quantkit.gguf.config import read_model_config
from quantkit.gguf.names import Naming
from quantkit.gguf.writer import Entry, write_file


@dataclass(frozen=True, slots=True)
class Importance:
    """How strong the inputs of a layer are.

    Attributes:
        mean_square: of each input column, float32 ``[in_features]``.
        tokens: over which the mean was taken.
    """

    mean_square: torch.Tensor
    tokens: int


def write_imatrix(
    path: Path, importance: Mapping[str, Importance], *, origin: Path, datasets: Sequence[str], chunk_size: int
) -> None:
    """Write an importance matrix.

    Args:
        path: the file, which is replaced.
        importance: full name of a layer to the strength of its inputs.
        origin: folder of the float model, whose config tells the names.
        datasets: what the calibration texts were, for llama.cpp to write into the files that it makes.
        chunk_size: tokens of a row of the calibration set.

    Raises:
        SourceError: the model or a layer has no place in a GGUF file.
        OutputError: the file cannot be written.
    """
    naming = Naming.of(read_model_config(origin))
    named: dict[str, dict[int, Importance]] = {}
    for layer, found in importance.items():
        for place in naming.places(f"{layer}.weight"):
            named.setdefault(place.name, {})[place.index or 0] = found
    entries = [
        entry for name, rows in sorted(named.items()) for entry in _entries(name, [rows[each] for each in sorted(rows)])
    ]
    most = max((found.tokens for found in importance.values()), default=0)
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(datasets),
        "imatrix.chunk_count": most // chunk_size,
        "imatrix.chunk_size": chunk_size,
    }
    write_file(path, metadata, entries)


def _entries(name: str, rows: Sequence[Importance]) -> Iterator[Entry]:
    sums = torch.stack([(found.mean_square.double() * found.tokens).float() for found in rows])
    counts = torch.tensor([[float(found.tokens)] for found in rows])
    for suffix, tensor in (("in_sum2", sums), ("counts", counts)):
        kind, shape = gguf.GGMLQuantizationType.F32, tuple(tensor.shape)
        yield Entry(f"{name}.{suffix}", int(kind), shape, tensor.nbytes, tensor.numpy)
