"""Commands about one exported checkpoint, and about the signatures of checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.base import EXIT_FAILED, AsJson, DryRun, TrustsCode, app, console, names_in, say

PANEL = "Checkpoints"
SIGNATURES = "Signatures"
PASSWORD = "QUANTKIT_KEY_PASSWORD"

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint, or a GGUF file.")]
Folder = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint.")]


@app.command(rich_help_panel=PANEL)
def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or GGUF file; of a float model also a hub id.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="See 'quantkit formats'; or float16, bfloat16, float32.",
            autocompletion=names_in("formats"),
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new checkpoint.")],
    dtype: Annotated[str, typer.Option(help="Of floats: auto (16 bits), own, or a dtype.")] = "auto",
    trust_remote_code: TrustsCode = False,
) -> None:
    """Write a model in another format: codes as they are or decoded to float, or a float model as a float file."""
    import quantkit
    from quantkit.cli.display import Display

    with Display(console(stderr=True)) as display:
        found = quantkit.convert(
            checkpoint, to, out=out, dtype=dtype, trust_remote_code=trust_remote_code, observer=display
        )
    for note in found["notes"]:
        say(f"note: {note}", stderr=True)
    if found.get("float"):
        decoded = f", decoded from {found['decoded']}" if found["decoded"] else ""
        say(f"checkpoint: {out} (float, {found['dtype']}{decoded})")
        return
    moved = found["largest_shift"]
    exact = "every weight as it was" if moved == 0 else f"no weight moved by more than {moved:.2g} steps of its grid"
    say(f"checkpoint: {out} ({found['bits_per_weight']:.4g} bits per weight, {exact})")


@app.command("inspect", rich_help_panel=PANEL)
def inspect_(
    checkpoint: Checkpoint,
    deep: Annotated[bool, typer.Option(help="Decode every layer, to find outliers and bad scales.")] = True,
    as_json: AsJson = False,
) -> None:
    """Tell what a checkpoint holds, whoever wrote it, and what will load it."""
    import quantkit
    from quantkit.inspection import inspect_tables

    found = quantkit.inspect(checkpoint, deep=deep)
    if as_json:
        say(json.dumps(found, indent=2))
        return
    for each in inspect_tables(found):
        console().print(each)


@app.command(rich_help_panel=PANEL)
def verify(
    checkpoint: Checkpoint,
    runtime: Annotated[
        str, typer.Option(help="See 'quantkit runtimes'.", autocompletion=names_in("runtimes"))
    ] = "transformers",
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Interpreter of the environment that vllm lives in.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; the runtime's usual one.")] = None,
    time_limit: Annotated[str, typer.Option(help="That a runtime may take: 90s, 30min, 2h.")] = "1h",
    trust_remote_code: TrustsCode = False,
    as_json: AsJson = False,
) -> None:
    """Load a checkpoint in a runtime and compare its logits with those of the reference decoder."""
    import quantkit
    from quantkit.cli.display import Display
    from quantkit.verification import verdict_lines

    with Display(console(stderr=True)) as display:
        verdict = quantkit.verify(
            checkpoint,
            runtime=runtime,
            python=python,
            device=device,
            dtype=dtype,
            time_limit=time_limit,
            trust_remote_code=trust_remote_code,
            observer=display,
        )
    for line in [json.dumps(verdict, indent=2)] if as_json else verdict_lines(verdict):
        say(line)
    if not verdict["passed"]:
        raise typer.Exit(EXIT_FAILED)


@app.command(rich_help_panel=PANEL)
def push(
    checkpoint: Folder,
    repository: Annotated[str, typer.Argument(metavar="NAME", help="org/name of the repository on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Anyone may read it; private by default.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Upload a checkpoint with its model card to the Hugging Face hub, with the token of HF_TOKEN."""
    import quantkit

    if dry_run:
        from quantkit.publishing.push import files_to_push
        from quantkit.system.units import in_units

        for name, file in files_to_push(checkpoint).items():
            say(f"{name} ({in_units(file.stat().st_size)}) to {repository}")
        return
    say(quantkit.push(checkpoint, repository, private=not public, revision=revision))


@app.command(rich_help_panel=SIGNATURES)
def keygen(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the keys: NAME.key and NAME.pub are written.")],
) -> None:
    """Make a pair of minisign keys; QUANTKIT_KEY_PASSWORD sets a password."""
    from quantkit.publishing.signature_keys import new_pair, require_minisign

    require_minisign()
    place = Path(name)
    secret, public = new_pair(place.parent, place.name, os.environ.get(PASSWORD))
    say(f"secret key: {secret} (keep it to yourself)")
    say(f"public key: {public}")


@app.command(rich_help_panel=SIGNATURES)
def sign(
    checkpoint: Folder,
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Secret key of minisign.")],
) -> None:
    """Sign a checkpoint's manifest, which holds the hash of every file."""
    from quantkit.publishing import signatures

    say(f"signature: {signatures.sign(checkpoint, key, password=os.environ.get(PASSWORD))}")


@app.command("verify-signature", rich_help_panel=SIGNATURES)
def verify_signature(
    checkpoint: Folder,
    key: Annotated[str, typer.Option("--key", metavar="FILE|KEY", help="Public key of minisign.")],
) -> None:
    """Check a checkpoint's signature, and every file against its hash."""
    from quantkit.publishing import signatures

    found = signatures.verify_signature(checkpoint, key)
    say(f"signed by this key: {checkpoint} ({found.files} files are as they were signed; {found.comment})")
