"""Keys of minisign, read from files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import MissingDependencyError, OutputError, QuantkitError
from quantkit.system.distribution import requirement
from quantkit.system.os_errors import translated_os_errors

if TYPE_CHECKING:
    from minisign import PublicKey, SecretKey

MAX_BYTES = 1 << 16
"""Of a key or a signature."""


def require_minisign() -> None:
    """Check that the package is there.

    Raises:
        MissingDependencyError: it is not.
    """
    if find_spec("minisign") is None:
        raise MissingDependencyError("py-minisign", "signing", requirement("signing"))


def small_file(path: Path, what: str, remedy: str) -> bytes:
    """The content of a file that can only be small.

    Raises:
        QuantkitError: it is missing, no plain file, or large.
    """
    if not path.is_file():
        raise QuantkitError(f"there is no {what} {path}", remedy)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise QuantkitError(f"cannot read the {what} {path}: {error.strerror}", remedy) from error
    if len(content) > MAX_BYTES:
        raise QuantkitError(f"{path} is too large to be a {what}", remedy)
    return content


def public_key(given: str) -> PublicKey:
    """The public key in a file, or written out as minisign prints it.

    Raises:
        QuantkitError: it is none.
    """
    from minisign import Error, PublicKey

    remedy = "give the .pub file that 'minisign -G' wrote, or the line that begins with RW"
    try:
        if not Path(given).exists() and given.startswith("RW"):
            return PublicKey.from_base64(given)
        return PublicKey.from_bytes(small_file(Path(given), "public key", remedy))
    except (Error, ValueError) as error:
        raise QuantkitError(f"{given[:80]} is no public key of minisign: {error}", remedy) from error


def secret_key(path: Path, password: str | None) -> SecretKey:
    """The secret key in a file, unlocked.

    Raises:
        QuantkitError: it is none, or the password is missing or wrong.
    """
    from minisign import Error, SecretKey

    remedy = "give the key that 'minisign -G' or 'quantkit keygen' wrote"
    try:
        key = SecretKey.from_bytes(small_file(path, "secret key", remedy))
        if key.is_encrypted():
            if password is None:
                raise QuantkitError(
                    f"the secret key {path} has a password", "set the environment variable QUANTKIT_KEY_PASSWORD"
                )
            key.decrypt(password)
    except (Error, ValueError, MemoryError) as error:
        raise QuantkitError(f"the secret key {path} cannot be used: {error}", remedy) from error
    return key


def new_pair(folder: Path, name: str, password: str | None) -> tuple[Path, Path]:
    """Write a new pair of keys: ``NAME.key``, which only its owner may read, and ``NAME.pub``.

    Raises:
        OutputError: a file is there already, or cannot be written.
    """
    import os

    from minisign import KeyPair

    pair = KeyPair.generate()
    if password is not None:
        pair.secret_key.encrypt(password)
    secret, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (secret, public):
        if path.exists():
            raise OutputError(f"{path} is there already", "name other keys, or remove it yourself")
    with translated_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(pair.secret_key) + b"\n")
        public.write_bytes(bytes(pair.public_key) + b"\n")
    return secret, public
