"""Where an adapter lies: a folder, a hub id or an archive, as a folder on disk."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import SourceError
from quantkit.merging.archives import SUFFIXES, is_archive, unpack
from quantkit.recipe.model import HUB_REFERENCE
from quantkit.source import hub


def adapter_folder(reference: str, scratch: Path) -> Path | hub.Snapshot:
    """The folder of an adapter, or a revision of the hub that is one.

    Args:
        reference: folder, archive, or hub id ``org/name`` or ``org/name@revision``.
        scratch: an empty folder; an archive is unpacked into it.

    Raises:
        SourceError: there is no such adapter, its archive cannot be used, or a file is not what the hub states.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and is_archive(path):
        return unpack(path, scratch)
    if path.exists():
        raise SourceError(
            f"adapter {path} is neither a folder nor an archive",
            f"give the folder that holds adapter_config.json, or an archive of it ({', '.join(SUFFIXES)})",
        )
    if HUB_REFERENCE.fullmatch(reference) and not is_archive(path):
        return hub.download(reference, None, trust_remote_code=False)
    raise SourceError(
        f"there is no adapter {path}", "give a folder, an archive, or the hub id org/name of a PEFT adapter"
    )
