"""Reading a checkpoint one tensor at a time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from quantkit.checkpoint.header import COPY_AGAIN, INDEX_FILE, SINGLE_FILE, TensorEntry, read_header, read_index
from quantkit.errors import CheckpointError
from quantkit.system.artifacts import translated_os_errors, write_json
from quantkit.system.host import all_finite

AT_ONCE = 60
"""Seconds within which two checkpoints in a folder were written at the same time."""
TESTED = 1 << 20
"""Values that are looked through for a NaN or an infinity at once."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointReader:
    """The tensors of a folder that holds ``model.safetensors``, or an index and its shards.

    All headers are read and checked against the files' sizes at once; a tensor is read when it is asked for.

    Where both are there, they are compared: a single file that holds the same, or more, is read, as transformers does;
    one that holds a part of what the shards do is a leftover, and so are shards of which some are gone. Of two that
    differ that is a leftover which was written more than a minute before the other.

    Args:
        folder: the checkpoint's folder.
        file: the index or the single file in it, where that is known.

    Raises:
        CheckpointError: there is no checkpoint, only a pickled one, a broken or incomplete one, or two that differ.
    """

    def __init__(self, folder: Path, *, file: Path | None = None) -> None:
        self.folder = folder
        self.index = _find_index(folder) if file is None else file if file.suffix == ".json" else None
        if self.index is None:
            self._entries = read_header(folder / SINGLE_FILE)
            return
        placed = read_index(self.index)
        headers = {shard: read_header(folder / shard) for shard in dict.fromkeys(placed.values())}
        for name, shard in placed.items():
            if name not in headers[shard]:
                raise CheckpointError(
                    f"{self.index} places tensor '{name}' in {shard}, which does not hold it",
                    "download or copy both files again",
                )
        self._entries = {
            name: entry
            for shard, entries in headers.items()
            for name, entry in entries.items()
            if placed.get(name) == shard
        }

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All tensors' names, in the order in which they lie on disk."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes that a tensor takes on disk."""
        return self._entry(name).nbytes

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._entry(name).file

    def files(self) -> list[Path]:
        """The index, if there is one, and the files that hold the tensors."""
        shards = dict.fromkeys(entry.file for entry in self._entries.values())
        return [*([self.index] if self.index else []), *shards]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in memory of its own on the CPU.

        Raises:
            CheckpointError: there is no such tensor, or its file became shorter since the header was read or cannot be
                read.
        """
        return self._read(name, self._entry(name))

    def read_part(self, name: str, index: int) -> torch.Tensor:
        """One entry of the first axis of a tensor, such as an expert of a stack; see :meth:`read`."""
        whole = self._entry(name)
        nbytes = whole.nbytes // whole.shape[0]
        return self._read(
            name, replace(whole, shape=whole.shape[1:], start=whole.start + index * nbytes, nbytes=nbytes)
        )

    def _read(self, name: str, entry: TensorEntry) -> torch.Tensor:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            self._fill(view, entry, name)
        except OSError as error:
            raise CheckpointError(
                f"{entry.file} cannot be read at tensor '{name}': {error.strerror}", COPY_AGAIN
            ) from error
        return tensor

    def _fill(self, view: memoryview, entry: TensorEntry, name: str) -> None:
        """Read the bytes of a tensor."""
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < entry.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{entry.file} ends inside tensor '{name}'", COPY_AGAIN)
                done += count

    def read_finite(self, name: str) -> torch.Tensor:
        """A tensor, like :meth:`read`, whose values are all finite.

        Raises:
            CheckpointError: it holds a NaN or an infinity; names the tensor and the first such index.
        """
        tensor = self.read(name)
        first = first_not_finite(tensor)
        if first is None:
            return tensor
        index = [int(place) for place in torch.unravel_index(torch.tensor(first), tensor.shape)]
        raise CheckpointError(
            f"tensor '{name}' of {self.file_of(name)} is {tensor.flatten()[first].item()} at index {index}",
            "the checkpoint is broken: get it again from its source",
        )

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no tensor '{name}'", "is this the model you mean?") from None


def first_not_finite(tensor: torch.Tensor) -> int | None:
    """The place of the first NaN or infinity among the values of a contiguous tensor; None where there is none.

    It is looked for in some values at a time, as the test takes as much memory again as what is tested.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), TESTED):
        part = flat[start : start + TESTED]
        if not all_finite(part):
            finite = torch.isfinite(part.float() if part.itemsize == 1 else part)
            return start + int(finite.to(torch.uint8).argmin())
    return None


def _find_index(folder: Path) -> Path | None:
    """The index to read; None where the checkpoint is a single file."""
    if (folder / SINGLE_FILE).exists():
        return _one_of_two(folder) if (folder / INDEX_FILE).is_file() else None
    if (folder / INDEX_FILE).exists():
        return folder / INDEX_FILE
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return indices[0]
    if indices:
        names = ", ".join(index.name for index in indices)
        raise CheckpointError(f"{folder} holds several checkpoints: {names}", "keep one of them in the folder")
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are read",
            "convert them to safetensors: load the model where you trust it and call save_pretrained",
        )
    raise CheckpointError(
        f"{folder} holds no safetensors checkpoint", f"it needs {SINGLE_FILE}, or {INDEX_FILE} and its shards"
    )


def _one_of_two(folder: Path) -> Path | None:
    """Which of a single file and an index with its shards is the checkpoint, see :class:`CheckpointReader`."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    shards = _shards_there(index)
    if not shards:
        return None
    one, other = CheckpointReader(folder, file=single), CheckpointReader(folder, file=index)
    shapes, others = ({name: (each.dtype(name), each.shape(name)) for name in each.names()} for each in (one, other))
    if shapes.keys() < others.keys():
        return index
    if others.keys() < shapes.keys() or (shapes == others and _equal(one, other)):
        return None
    apart = single.stat().st_mtime - index.stat().st_mtime
    if abs(apart) > AT_ONCE:
        return index if apart < 0 else None
    raise CheckpointError(
        f"{folder} holds two checkpoints that differ: {SINGLE_FILE}, and {len(shards)} shards with {INDEX_FILE}",
        "both are equally old, and loaders do not agree which they read: remove the one that is a leftover",
    )


def _shards_there(index: Path) -> list[str]:
    """The shards that an index names, if all of them are there."""
    try:
        shards = sorted(set(read_index(index).values()))
    except CheckpointError:
        return []
    return shards if all((index.parent / shard).is_file() for shard in shards) else []


def _equal(one: CheckpointReader, other: CheckpointReader) -> bool:
    """Whether two checkpoints of the same names, dtypes and shapes hold the same bytes."""

    def read(reader: CheckpointReader, name: str) -> torch.Tensor:
        return reader.read(name).reshape(-1).view(torch.uint8)

    return all(torch.equal(read(one, name), read(other, name)) for name in one.names())


def link_checkpoint(reader: CheckpointReader, folder: Path) -> None:
    """Give a folder the files of a checkpoint under the names that loaders look for, without taking room for them.

    Where the system has no links they are copied.

    Raises:
        OutputError: the folder cannot be written.
    """
    for file in reader.files():
        if file != reader.index:
            link_file(file, folder / file.name)
    if reader.index is not None:
        total = sum(map(reader.nbytes, reader.names()))
        placed = {name: reader.file_of(name).name for name in reader.names()}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": placed})


def link_file(file: Path, place: Path) -> None:
    """A link to a file, or a copy where the system has none.

    Raises:
        OutputError: it cannot be written.
    """
    with translated_os_errors(place):
        try:
            place.symlink_to(file.resolve())
        except (NotImplementedError, PermissionError):
            shutil.copyfile(file, place)
