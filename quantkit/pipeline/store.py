"""Object storage, by fsspec: objects below an address, and one line where they cannot be reached.

Credentials come from where each provider's package looks for them, such as ``AWS_ACCESS_KEY_ID``; an address has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from quantkit.errors import OutputError, QuantkitError
from quantkit.system.distribution import install_line
from quantkit.system.redaction import redacted

T = TypeVar("T")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"} | dict.fromkeys(
    ("abfs", "abfss", "az"), "adlfs"
)
"""What fsspec needs for a kind of address, by its scheme."""
GOES_ON = "see that this machine and all nodes reach it with their credentials; the same command goes on"


class Store:
    """The objects below an address.

    Args:
        url: such as ``s3://bucket/folder``.

    Attributes:
        url: it, without a slash at its end.

    Raises:
        QuantkitError: it is no address of a kind that fsspec knows, it holds credentials, or the provider's package is
            not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._system, self._root = _opened(self.url)

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none.

        Raises:
            OutputError: the store does not answer, or refuses.
        """
        try:
            found: bytes = self._system.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        except Exception as error:  # of the provider's package, whatever that raises
            raise self._refused("read", name, error) from error
        return found

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, which appears whole."""
        self._told("write", name, lambda path: self._system.pipe_file(path, content))

    def put(self, file: Path, name: str) -> None:
        """Write an object from a file."""
        self._told("write", name, lambda path: self._system.put_file(str(file), path))

    def get(self, name: str, file: Path) -> None:
        """Write a file from an object, which must be there."""
        self._told("read", name, lambda path: self._system.get_file(path, str(file)))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, as far as they are there."""
        for name in names:
            try:
                self._system.rm_file(self._path(name))
            except FileNotFoundError:
                continue
            except Exception as error:  # whatever fsspec's file systems raise
                raise self._refused("remove", name, error) from error

    def names(self, folder: str) -> list[str]:
        """The names of all objects below a folder, sorted."""

        def found(path: str) -> list[str]:
            self._system.invalidate_cache()
            return sorted(each[len(self._root) :].lstrip("/") for each in self._system.find(path))

        try:
            return found(self._path(folder))
        except FileNotFoundError:
            return []
        except Exception as error:  # whatever fsspec's file systems raise
            raise self._refused("list", folder, error) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _told(self, action: str, name: str, call: Callable[[str], object]) -> None:
        try:
            call(self._path(name))
        except Exception as error:  # a bucket that is not there is a FileNotFoundError
            raise self._refused(action, name, error) from error

    def _refused(self, action: str, name: str, error: Exception) -> OutputError:
        lines = [line for line in redacted(str(error)).splitlines() if line.strip()]
        told = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
        return OutputError(f"cannot {action} {self.url}/{name}: {told}", GOES_ON)


def _opened(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path of the address in it."""
    parts = urlsplit(url)
    if not re.match(r"\w[\w+.-]*://.", url):
        raise QuantkitError(f"{redacted(url)} is no address of object storage", "give one such as s3://bucket/folder")
    if (parts.username or parts.password or parts.query) and parts.scheme not in ("abfs", "abfss"):
        raise QuantkitError(
            f"the address {parts.scheme}://{parts.hostname or ''}/... holds more than a place",
            "leave credentials to the environment and the files of the provider's package",
        )
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        missing = "object storage is reached by fsspec, which is not installed"
        raise QuantkitError(missing, install_line("cluster")) from error
    options = {"auto_mkdir": True} if parts.scheme in ("file", "local") else {}
    try:
        system, root = url_to_fs(url, **options)
    except ImportError as error:
        package = PACKAGES.get(parts.scheme, "")
        remedy = f"pip install {package}, here and on all nodes" if package else redacted(str(error))
        raise QuantkitError(f"{parts.scheme}:// needs a package that is not installed", remedy) from error
    except Exception as error:  # whatever fsspec's file systems raise
        raise QuantkitError(f"{url} cannot be used: {redacted(str(error))}", GOES_ON) from error
    return system, str(root).rstrip("/")
