"""Estimates for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit.system.units import in_units

if TYPE_CHECKING:
    from rich.table import Table

    from quantkit.estimation.anatomy import Anatomy
    from quantkit.estimation.estimate import Estimate
    from quantkit.estimation.fitting import CardFit, Fit


def estimate_table(found: Estimate) -> Table:
    """Every line of every part, with its formula."""
    from rich.table import Table

    what = f"{found.anatomy.name}, {found.variant.chain}, {found.scheme}, {found.variant.format}"
    title = f"{what}\n{_parameters(found.anatomy)}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("how")
    for part in found.parts:
        table.add_section()
        table.add_row(f"[bold]{part.title}", f"[bold]{in_units(part.nbytes)}", "; ".join(part.notes))
        for line in part.lines:
            table.add_row(f"  {line.name}", in_units(line.nbytes), line.formula)
    return table


def _parameters(anatomy: Anatomy) -> str:
    """How many there are, and how many of them a token of text computes with, where that is not all."""
    words = [f"{anatomy.parameters:,} parameters"]
    words += [f"{anatomy.active:,} of them active for a token of text"] if anatomy.active != anatomy.parameters else []
    words += [f"{anatomy.towers:,} in parts that text does not pass"] if anatomy.towers else []
    return ", ".join(words)


def fits_table(found: Sequence[Fit]) -> Table:
    """A row for each way, the best expected quality first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title_justify="left", title=_fits_title(found), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for name in ("method", "scheme", "format"):
        table.add_column(name, no_wrap=name != "scheme", overflow="fold")
    for name in ("bits per\nweight", "takes", "longest\ncontext"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for fit in found:
        data = fit.to_json()
        context = f"{data['longest_context']:,}" if data["longest_context"] else "none"
        table.add_row(
            data["method"],
            data["scheme"],
            data["format"],
            f"{data['bits_per_weight']:.2f}",
            in_units(fit.nbytes),
            context,
            "yes" if fit.fits else "no",
        )
    return table


def cards_table(found: Sequence[CardFit]) -> Table:
    """A row for each card."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 0), show_edge=False)
    for name in ("card", "best that fits", "format"):
        table.add_column(name, no_wrap=name != "best that fits", overflow="fold")
    for name in ("takes", "longest\ncontext", "QLoRA on\nNF4"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        trains = "fits" if row.trains else "does not fit"
        if row.best is None:
            table.add_row(row.card.name, "nothing", "", "", "", trains)
            continue
        data = row.best.to_json()
        scheme = f"{data['method']} {data['scheme']}" if data["method"] != "none" else data["scheme"]
        table.add_row(
            row.card.name, scheme, data["format"], in_units(row.best.nbytes), f"{data['longest_context']:,}", trains
        )
    return table


def _fits_title(found: Sequence[Fit]) -> str:
    if not found:
        return "nothing suits the model"
    first = found[0]
    return f"{first.anatomy.name} in {in_units(first.memory)}, batch {first.use.batch}, {first.use.context:,} tokens"
