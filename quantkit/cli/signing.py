"""Commands about signatures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.base import app, say

PANEL = "Signatures"
PASSWORD = "QUANTKIT_KEY_PASSWORD"

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint.")]


@app.command(rich_help_panel=PANEL)
def keygen(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the keys: NAME.key and NAME.pub are written.")],
) -> None:
    """Make a pair of minisign keys; QUANTKIT_KEY_PASSWORD sets a password."""
    import os

    from quantkit.publishing.signature_keys import new_pair, require_minisign

    require_minisign()
    place = Path(name)
    secret, public = new_pair(place.parent, place.name, os.environ.get(PASSWORD))
    say(f"secret key: {secret} (keep it to yourself)")
    say(f"public key: {public}")


@app.command(rich_help_panel=PANEL)
def sign(
    checkpoint: Checkpoint,
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Secret key of minisign.")],
) -> None:
    """Sign a checkpoint's manifest, which holds the hash of every file."""
    import os

    from quantkit.publishing import signatures

    say(f"signature: {signatures.sign(checkpoint, key, password=os.environ.get(PASSWORD))}")


@app.command("verify-signature", rich_help_panel=PANEL)
def verify_signature(
    checkpoint: Checkpoint,
    key: Annotated[str, typer.Option("--key", metavar="FILE|KEY", help="Public key of minisign.")],
) -> None:
    """Check a checkpoint's signature, and every file against its hash."""
    from quantkit.publishing import signatures

    found = signatures.verify_signature(checkpoint, key)
    say(f"signed by this key: {checkpoint} ({found.files} files are as they were signed; {found.comment})")
