"""Commands that make one checkpoint: of adapters merged, of a model quantized, of a quantized one trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.base import (
    AsJson,
    DryRun,
    TrustsCode,
    app,
    bits_given,
    complete_method,
    console,
    names_in,
    say,
)
from quantkit.cli.given import columns_of, settings_of, several, weighted
from quantkit.cli.running import PANEL, show_plan


@app.command(rich_help_panel=PANEL)
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Hub id, folder, GGUF file or package: reference.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder, hub id or archive of a LoRA adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the merged model.")],
    weight: Annotated[float, typer.Option(help="What the adapter's change is multiplied with.")] = 1.0,
    further: Annotated[
        list[str] | None, typer.Option("--with", metavar="ADAPTER[=WEIGHT]", help="One more adapter; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, float16 or bfloat16.")] = "auto",
    base_weights: Annotated[str, typer.Option(help="original, or nf4 for a QLoRA adapter.")] = "original",
    any_base: Annotated[bool, typer.Option("--any-base", help="Though an adapter names another base.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode a base that a tool has quantized.")] = False,
    trust_remote_code: TrustsCode = False,
) -> None:
    """Merge LoRA adapters into a float model."""
    import quantkit
    from quantkit.cli.display import Display

    adapters = [{"source": adapter, "weight": weight}, *(weighted(each, "--with") for each in further or [])]
    with Display(console(stderr=True)) as display:
        found = quantkit.merge(
            base,
            adapters,
            out=out,
            observer=display,
            dtype=dtype,
            base_weights=base_weights,
            any_base=any_base,
            decode=decode,
            trust_remote_code=trust_remote_code,
        )
    for note in found["notes"]:
        say(f"note: {note}", stderr=True)
    say(f"merged: {found['folder']}")


@app.command(rich_help_panel=PANEL)
def quantize(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or package: reference.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="See 'quantkit methods'; what goes with scheme and format, or gptq.",
            autocompletion=complete_method,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="See 'quantkit methods'; what goes with method and format, or int.", autocompletion=names_in("schemes")
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="Width of an integer code: 1 to 8, 4 by default; auto chooses by layer.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="With bits auto: bits per weight, as 4.0, or the size of the file, as 5GiB."),
    ] = None,
    choices: Annotated[
        str | None, typer.Option(help="With bits auto: what layers may get, as int3,int4,int8; by default what suits.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="With bits auto: an allocation.json that is given back, maybe edited.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 is per channel.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Store zero points.")] = False,
    further: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any further key of a variant or its method; repeatable."),
    ] = None,
    format: Annotated[  # noqa: A002 - a recipe key
        str | None,
        typer.Option(
            help="See 'quantkit formats'; what goes with the others, or compressed-tensors.",
            autocompletion=names_in("formats"),
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="WHO", help="Instead: who will load it: ollama, vllm, transformers ..."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="ADAPTER[=WEIGHT]", help="A LoRA adapter to merge first; repeatable."),
    ] = None,
    calibration: Annotated[str, typer.Option(help="Data set or file of records.")] = "alpaca_gpt4",
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME=COLUMN", help="Column of the records, as prompt=ask; repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration records.")] = 128,
    max_length: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
    packing: Annotated[str, typer.Option(help="none is one record a row; full fills every row.")] = "none",
    experts: Annotated[str, typer.Option(help="Tokens that an expert is calibrated on: routed or all.")] = "routed",
    generated: Annotated[
        int | None,
        typer.Option(help="Tokens that the float model writes to calibrate on; by default as many as tuning wants."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    devices: Annotated[
        str | None, typer.Option(help="Several, over which the walk is dealt: all, how many, or names with commas.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of scales and float tensors: auto (16 bits), own, or a dtype.")] = "auto",
    decode: Annotated[bool, typer.Option("--decode", help="Decode a model that a tool has quantized.")] = False,
    trust_remote_code: TrustsCode = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Quantize a model into one checkpoint."""
    import quantkit
    from quantkit.cli.display import Display
    from quantkit.exports.manifest import read_manifest
    from quantkit.system.units import percentage

    given: dict[str, Any] = {
        "bits": bits_given(bits),
        "group_size": group_size,
        "symmetric": False if asymmetric else None,
    }
    given |= {"budget": budget, "choices": choices and choices.split(","), "allocation": allocation}
    options = {key: value for key, value in given.items() if value is not None} | settings_of(further or [])
    keys = {"method": method, "scheme": scheme, "format": format, **options}
    records = {
        "dataset": calibration,
        "samples": samples,
        "max_length": max_length,
        "packing": packing,
        "experts": experts,
        "generated": generated,
        "columns": columns_of(columns or []),
    }
    merged = [weighted(each, "--adapter") for each in adapter or []]
    if dry_run:
        source = {"source": model, "adapter": merged, "dtype": dtype, "decode": decode}
        source["trust_remote_code"] = trust_remote_code
        _plan_one(source, keys, records, {"device": device, "devices": several(devices)}, target, out)
        return
    with Display(console(stderr=True)) as display:
        folder = quantkit.quantize(
            model,
            out=out,
            target=target,
            adapter=merged,
            calibration=records,
            device=device,
            devices=several(devices),
            dtype=dtype,
            decode=decode,
            trust_remote_code=trust_remote_code,
            observer=display,
            **keys,
        )
    facts = read_manifest(folder) or {}
    if as_json:
        say(json.dumps(_told(folder, facts), indent=2))
        return
    if facts.get("share") is not None:
        told = f"{facts['bits_per_weight_file']:.4g} bits per weight of the file"
        say(f"{percentage(facts['share'])} of the block weights quantized, {told}", stderr=True)
    say(f"checkpoint: {folder}")


def _plan_one(
    model: dict[str, Any],
    variant: dict[str, Any],
    records: dict[str, Any],
    where: dict[str, Any],
    target: str | None,
    out: Path,
) -> None:
    """Print what quantizing one checkpoint would do; what has to be converted for that is put away again."""
    import tempfile

    from quantkit.recipe.single import single_recipe

    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        recipe, lines = single_recipe(
            model, variant, calibration=records, **where, target=target, folder=Path(scratch) / "plan"
        )
        for line in lines:
            say(line, stderr=True)
        show_plan(recipe, out=out)


@app.command(rich_help_panel=PANEL)
def recover(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint of quantkit.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new checkpoint.")],
    data: Annotated[str, typer.Option(help="Data set or file of records to train on.")] = "alpaca_gpt4",
    source: Annotated[
        str | None, typer.Option(help="The float model; the one that the checkpoint was made of by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Records.")] = 512,
    max_length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    train: Annotated[
        list[str] | None,
        typer.Option(help="codes, scales, zeros, norms or biases; repeatable. What suits the width by default."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer; 300 by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of scales, relative to their size.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Make a LoRA for the codes as they are instead.")] = False,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    untrained: Annotated[bool, typer.Option("--untrained", help="The adapter as its closed form gives it.")] = False,
    further: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any further option of docs/recover.md; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: TrustsCode = False,
    as_json: AsJson = False,
) -> None:
    """Train what a quantized checkpoint stores: closer to the float model, in the same format and size."""
    import quantkit
    from quantkit.cli.display import Display

    given = {"train": train, "steps": steps, "learning_rate": learning_rate}
    options = {key: value for key, value in given.items() if value is not None} | settings_of(further or [])
    records = {"dataset": data, "samples": samples, "max_length": max_length, "packing": "full"}
    with Display(console(stderr=True)) as display:
        found = quantkit.recover(
            checkpoint,
            data=records,
            out=out,
            source=source,
            adapter={"rank": rank, "trained": not untrained} if adapter else None,
            device=device,
            trust_remote_code=trust_remote_code,
            observer=display,
            **options,
        )
    if as_json:
        say(json.dumps(found, indent=2))
        return
    if adapter:
        size, error, left = found["bytes"] / 2**20, found["error"], found["error_left"]
        say(f"adapter: {found['adapter']} ({found['layers']} layers, {size:.1f} MiB)")
        say(f"error of the layers' outputs at the start: {error:.3g} without it, {left:.3g} with it")
        for note in found["notes"]:
            say(note)
        return
    say(f"checkpoint: {found['checkpoint']} ({found['notes'][0]})")


def _told(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What ``quantize --json`` prints of a checkpoint: its folder, its sizes, its notes and the calibration audit."""
    from quantkit.exports.manifest import CALIBRATION
    from quantkit.system.artifacts import STAGE_FILE, read_json

    stage = read_json(folder / STAGE_FILE)["facts"]
    audit = folder / CALIBRATION
    return {
        "checkpoint": str(folder),
        **{key: facts.get(key) for key in ("format", "share", "bits_per_weight", "bits_per_weight_file")},
        "notes": stage["notes"],
        "calibration": read_json(audit) if audit.is_file() else None,
    }
