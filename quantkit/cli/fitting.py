"""The command from a model to the file to ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.base import AsJson, DryRun, TrustsCode, app, console, say, warn
from quantkit.cli.given import columns_of, weighted

if TYPE_CHECKING:
    from quantkit.system.fitted_table import FittedTable

PANEL = "Runs"


def complete_runtime(incomplete: str) -> list[str]:
    """What a shell is told may follow ``--runtime``."""
    return [name for name in ("vllm", "llama.cpp", "ollama", "transformers") if name.startswith(incomplete)]


@app.command(rich_help_panel=PANEL)
def fit(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or package: reference.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")],
    memory: Annotated[
        str | None, typer.Option(help="What serving may take, such as 8GiB: weights, cache, activations, the runtime.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="What the file may take, such as 5GiB.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the sequence that is served.")] = 4096,
    runtime: Annotated[
        str, typer.Option(help="Who loads it: vllm, llama.cpp, ollama, transformers.", autocompletion=complete_runtime)
    ] = "vllm",
    data: Annotated[
        str | None, typer.Option(help="Your records: four fifths calibrate, the rest is held out and scored.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME=COLUMN", help="Column of the records, as prompt=ask; repeatable."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="ADAPTER[=WEIGHT]", help="A LoRA adapter to merge first; repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration records.")] = 128,
    max_length: Annotated[int | None, typer.Option(help="Tokens per calibration row; 512 by default.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens scored at most.")] = 8192,
    quick: Annotated[bool, typer.Option("--quick", help="Stop at the first good answer.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the other candidates.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N: where candidates are made.")] = "auto",
    decode: Annotated[bool, typer.Option("--decode", help="Decode a model that a tool has quantized.")] = False,
    trust_remote_code: TrustsCode = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Make the file of a model that fits a budget and loses least on your data, and choose it for you."""
    from quantkit.recipe.fitting import FitSpec
    from quantkit.system.validation import parse_section

    lengths = {} if max_length is None else {"max_length": max_length}
    records: dict[str, Any] = {"samples": samples, **lengths, "columns": columns_of(columns or [])}
    merged = [weighted(each, "--adapter") for each in adapter or []]
    given = {"source": model, "adapter": merged, "decode": decode, "trust_remote_code": trust_remote_code}
    budget = {"memory": memory, "size": size, "context": context}
    told = {
        "model": given,
        "out": str(out),
        "budget": {key: value for key, value in budget.items() if value is not None},
        "runtime": runtime,
        "data": None if data is None else {"dataset": data, **records},
        "max_tokens": max_tokens,
        "device": device,
        "quick": quick,
        "keep": keep,
    }
    asked = parse_section(FitSpec, told, "fit")
    asked.check_files()  # what can be told at once is, before all that computes is imported
    from quantkit.cli.display import Display
    from quantkit.pipeline.fitting import fitted, planned

    with Display(console(stderr=True)) as display:
        found = planned(asked, display) if dry_run else fitted(asked, display)
    if as_json:
        say(json.dumps(found, indent=2))
    elif dry_run:
        _show_plan(found, out)
    else:
        _show(found)


def _show_plan(found: dict[str, Any], out: Path) -> None:
    """Print the candidates with sizes, memory and time."""
    from quantkit.cli.tables import time_words

    warn(found["warnings"])
    console().print(_table(found, f"candidates for {found['runtime']} within {found['words']}"))
    if found["quick"] is not None:
        say(f"quick: {found['quick']} first, and the others only if it loses more than 0.05 nats per token")
    if found["time"] is not None:
        say(time_words(found["time"]))
    say(f"results in {out}")


def _show(found: dict[str, Any]) -> None:
    """Print the candidates, the one that was chosen and why, its recipe, and where all that lies."""
    console().print(_table(found, f"candidates of {found['variant']}"))
    for each in found["candidates"]:
        if each["error"]:
            say(f"{each['name']} failed: {each['error']}")
    warn(note.removeprefix("warning: ") for note in found["notes"])
    say(f"recipe ({found['recipe']}):")
    for line in found["recipe_text"].splitlines():
        say(f"  {line}")
    say(f"chosen: {found['variant']} ({found['words']})")
    say(f"  {found['reason']}")
    say(f"checkpoint: {found['checkpoint']}")
    say(f"report: {found['report']}")
    say(f"next week: quantkit check {found['recipe']}")


def _table(found: dict[str, Any], title: str) -> FittedTable:
    """The float model and the candidates as a table."""
    from rich.text import Text

    from quantkit.report.numbers import significant
    from quantkit.system.fitted_table import FittedTable, Shown
    from quantkit.system.units import in_units

    base = found["float"]
    rows = [["the model in 16 bits", "float", base["size_bytes"], base["memory_bytes"], base["fits"], None]]
    for each in found["candidates"]:
        what = f"{each['method']} {each['scheme']} {each['format']}"
        fits = each.get("fits", True)
        rows.append(
            [each["name"], what, each.get("size_bytes"), each.get("memory_bytes"), fits, each.get("kl_divergence")]
        )
    measured = any(row[-1] is not None for row in rows)
    titles = ["candidate", "what", "file", "memory", "fits", *(["KL divergence"] if measured else [])]
    cells = [
        [name, what, *("" if size is None else in_units(size) for size in (file, memory)), "yes" if fits else "no",
         *(["" if loss is None else significant(loss)] if measured else [])]
        for name, what, file, memory, fits, loss in rows
    ]  # fmt: skip
    numbers = {"file", "memory", "KL divergence"}
    shown = [
        Shown(name, [Text(cell) for cell in column], 0 if name in ("candidate", "file") else 1, name in numbers)
        for name, column in zip(titles, zip(*cells, strict=True), strict=True)
    ]
    return FittedTable(shown, title=title, notes=[], remedy="--json has all")
