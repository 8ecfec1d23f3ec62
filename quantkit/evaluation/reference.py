"""The float model's distributions on disk: computed once for a recipe, read by every variant.

A text's file is a NumPy array, float16 ``[positions, vocabulary]``, of which a reader reads some rows at a time. A row
holds a position's log-probabilities minus the largest of them. Zero is the likeliest token, so float16 is
finest where the probability is, and whoever reads a row normalizes it again; the divergence of a
distribution from itself as stored stays below 1e-6 nats. Beside it lie the negative log-likelihoods of the text's own
tokens, exact. ``reference.json``, written last, names the texts.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation.texts import Windows
from quantkit.system.artifacts import read_json, translated_os_errors, write_json

INDEX_FILE = "reference.json"
LIKELIHOODS = "likelihoods"
"""Folder of the negative log-likelihoods, a NumPy array a text: float64 ``[positions]``, nats."""
STORED = np.dtype("<f2")
LOWEST = -60000.0
"""Log-probability of tokens that a model masks out; float16 ends at -65504."""


def reference_bytes(windows: Mapping[str, Windows], vocabulary: int) -> int:
    """Bytes that the distributions of all texts take on disk."""
    return sum(text.positions for text in windows.values()) * vocabulary * STORED.itemsize


def prepare_folder(folder: Path, windows: Mapping[str, Windows], vocabulary: int, limit: int) -> None:
    """Check before any work that the distributions may and can be stored, and make the folder.

    A reference that stood there before is no longer complete.

    Raises:
        EvaluationError: they need more than ``limit`` bytes, or than the disk has.
        OutputError: the folder cannot be written.
    """
    needed = reference_bytes(windows, vocabulary)
    if needed > limit:
        raise EvaluationError(
            f"the float model's log-probabilities need {needed} bytes, and reference_limit is {limit}",
            "lower evaluation.max_tokens or raise evaluation.reference_limit",
        )
    with translated_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise EvaluationError(
            f"the float model's log-probabilities need {needed} bytes, and {folder} has {free} free",
            "free some disk space or lower evaluation.max_tokens",
        )


class TextWriter:
    """Appends the distributions of one text to its file.

    Args:
        file: open for writing.
        positions: rows that will come.
        vocabulary: log-probabilities in a row.
    """

    def __init__(self, file: IO[bytes], positions: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._file = file
        self._missing = positions
        self.nll: list[torch.Tensor] = []
        header = {"descr": STORED.str, "fortran_order": False, "shape": (positions, vocabulary)}
        np.lib.format.write_array_header_1_0(file, header)

    def append(self, log_probs: torch.Tensor, nll: torch.Tensor) -> None:
        """Store float ``[rows, vocabulary]`` log-probabilities, and keep ``[rows]`` of the text's own tokens."""
        shifted = (log_probs - log_probs.amax(dim=-1, keepdim=True)).clamp_(min=LOWEST)
        self._file.write(shifted.half().cpu().numpy().astype(STORED, copy=False).tobytes())
        self.nll.append(nll.double().cpu())
        self._missing -= len(log_probs)

    def copy(self, known: TextReader) -> None:
        """Begin with the rows of another file."""
        known.write_to(self._file)
        self.nll.append(known.nll)
        self._missing -= len(known.nll)

    def close(self) -> None:
        """Check that the rows that were announced have come.

        Raises:
            ValueError: there are more or fewer.
        """
        if self._missing:
            raise ValueError(f"{self._missing} of the announced rows did not come")


@contextmanager
def text_writer(folder: Path, text: Windows, vocabulary: int, known: TextReader | None = None) -> Iterator[TextWriter]:
    """A writer for one text's file in ``folder``, which begins with the rows of ``known``.

    Raises:
        OutputError: the file cannot be written.
    """
    path = folder / _file_name(text.name)
    with translated_os_errors(path), path.open("wb") as file:
        writer = TextWriter(file, text.positions, vocabulary)
        if known is not None:
            writer.copy(known)
        yield writer
        writer.close()
        path.parent.joinpath(LIKELIHOODS).mkdir(exist_ok=True)
        np.save(_likelihoods(folder, text.name), torch.cat(writer.nll).numpy())


def write_index(folder: Path, windows: Mapping[str, Windows], vocabulary: int, known: Path | None = None) -> None:
    """Write ``reference.json``, which says that the folder is complete.

    Args:
        folder: with the files of all texts.
        windows: the texts.
        vocabulary: log-probabilities in a row.
        known: folder of the reference with whose rows the files begin; its texts may still be compared with.
    """
    before: Mapping[str, Any] = {} if known is None else read_json(known / INDEX_FILE)["texts"]
    texts = {}
    for name, text in windows.items():
        then = before.get(name)
        beginnings = [] if then is None else [*then["beginnings"], then["token_ids_sha256"]]
        texts[name] = {"token_ids_sha256": text.sha256, "positions": text.positions, "beginnings": beginnings}
    write_json(folder / INDEX_FILE, {"vocabulary": vocabulary, "texts": texts})


def check_reference(folder: Path, windows: Mapping[str, Windows], vocabulary: int) -> None:
    """Check that a finished reference is there and was made from the same tokens, or begins with them.

    Raises:
        EvaluationError: it is absent or incomplete, lacks a text, or its tokens or vocabulary differ.
    """
    try:
        index: dict[str, Any] = read_json(folder / INDEX_FILE)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{folder} holds no complete reference of the float model", "score the float model first"
        ) from error
    for name, text in windows.items():
        stored = index["texts"].get(name)
        if stored is None:
            raise EvaluationError(f"{folder} holds no reference for text '{name}'", "score the float model again")
        if text.sha256 not in (stored["token_ids_sha256"], *stored.get("beginnings", ())):
            raise EvaluationError(
                f"the token ids of text '{name}' differ from the float model's, so the two cannot be compared",
                "the tokenizers disagree: copy the float model's tokenizer files to the checkpoint",
            )
    if index["vocabulary"] != vocabulary:
        raise EvaluationError(
            f"the model has {vocabulary} logits a token and the float model {index['vocabulary']}",
            "compare checkpoints of the same model",
        )


class TextReader:
    """The stored distributions of one text.

    Attributes:
        vocabulary: log-probabilities in a row.
        nll: float64 ``[positions]``, of the text's own tokens.
    """

    def __init__(self, folder: Path, text: Windows) -> None:
        self._file = folder / _file_name(text.name)
        mapped = np.load(self._file, mmap_mode="r", allow_pickle=False)
        self._begins: int = mapped.offset
        self.vocabulary: int = mapped.shape[1]
        self.nll = torch.from_numpy(np.load(_likelihoods(folder, text.name), allow_pickle=False))

    def write_to(self, file: IO[bytes]) -> None:
        """Copy all rows to a file that is open for writing."""
        with self._file.open("rb") as own:
            own.seek(self._begins)
            shutil.copyfileobj(own, file, 1 << 22)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Float16 ``[stop - start, vocabulary]``: log-probabilities minus the largest of their row.

        They are read and not mapped: pages of a mapped file stay in the resident set, in the end those of all rows.
        """
        row = self.vocabulary * STORED.itemsize
        found = np.fromfile(self._file, STORED, (stop - start) * self.vocabulary, offset=self._begins + start * row)
        return torch.from_numpy(found.reshape(stop - start, self.vocabulary).astype(np.float16, copy=False))


def _likelihoods(folder: Path, text: str) -> Path:
    return folder / LIKELIHOODS / _file_name(text)


def _file_name(text: str) -> str:
    return f"{text}.npy"
