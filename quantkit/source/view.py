"""A checkpoint as loaders should see it: where it lies, or a folder of links without what would mislead them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.companions import copy_companions, copy_files, matching
from quantkit.checkpoint.leftovers import is_quantized, leftovers, misleads_loaders
from quantkit.checkpoint.reader import link_checkpoint
from quantkit.errors import QuantkitError
from quantkit.exports import find_gguf
from quantkit.exports.adapter import FOLDER
from quantkit.exports.manifest import MANIFEST
from quantkit.source.folder import FloatFolder
from quantkit.system.artifacts import read_json


@contextmanager
def loadable(path: Path, *, trust_remote_code: bool, tell: Callable[[str], None]) -> Iterator[Path]:
    """A folder from which every loader gets the model that a checkpoint's weights are, while the block lasts.

    Args:
        path: a checkpoint, float or quantized.
        trust_remote_code: run Python code that comes with it.
        tell: is told what lies there and is no part of the model.
    """
    if not path.is_dir() or find_gguf(path) is not None:
        yield path
        return
    with TemporaryDirectory(prefix="quantkit-view-") as scratch:
        try:
            view = _view(path, Path(scratch), trust_remote_code, tell)
        except (QuantkitError, OSError, ValueError):
            view = path  # what is wrong with it is told by who loads it
        yield view


def _view(path: Path, scratch: Path, trust_remote_code: bool, tell: Callable[[str], None]) -> Path:
    config = read_json(path / "config.json")
    if is_quantized(path, config):
        reader = CheckpointReader(path)
        for note in leftovers(path, config, reader):
            tell(note)
        if not misleads_loaders(path, reader):
            return path
        if (path / FOLDER).is_dir():
            (scratch / FOLDER).symlink_to((path / FOLDER).absolute(), target_is_directory=True)
        copy_companions(path, scratch, code=trust_remote_code)
        copy_files(matching(path, (MANIFEST, "quantize_config.json")), path, scratch)
        link_checkpoint(reader, scratch)
        return scratch
    found = FloatFolder(path, trust_remote_code=trust_remote_code)
    for note in found.notes:
        tell(note)
    if found.lies_as(found.dtype):
        return path
    found.copy_as(found.dtype, scratch)
    return scratch
