"""Signed checkpoints: a minisign signature of ``manifest.json``, which holds the hash of every file.

The format is https://jedisct1.github.io/minisign, so that the ``minisign`` program makes the keys and checks the
signatures as well. The package ``py-minisign``, by minisign's author, does the cryptography.
"""

from __future__ import annotations

from quantkit.signing.sign import sign
from quantkit.signing.verify import Verified, verify_signature

__all__ = ["Verified", "sign", "verify_signature"]
