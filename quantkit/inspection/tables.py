"""What :func:`quantkit.inspection.inspect` finds, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantkit.system.fitted_table import FittedTable, Shown

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

ABSENT = "-"


def inspect_tables(found: dict[str, Any]) -> list[RenderableType]:
    """Tables and texts in the order in which they are to be printed.

    These are the summary, schemes, of a mix the bits by block, layers, float tensors, what loads the checkpoint,
    remarks and problems.
    """
    from rich.text import Text

    shown: list[RenderableType] = [_summary(found)]
    if found["layers"]:
        shown += [_schemes(found), *([_kinds(found["allocation"])] if found["allocation"] else []), _layers(found)]
    shown.append(_floats(found))
    for title, key, style in (
        ("Loads it", "loads", ""),
        ("Remarks", "remarks", ""),
        ("Problems", "problems", "red"),
    ):
        if found[key]:
            lines = [Text(title, style="bold"), *(Text(f"  - {line}", style=style) for line in found[key])]
            shown.append(Text("\n").join(lines))
    return shown


def _summary(found: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text("Checkpoint"), title_justify="left", show_header=False)
    table.add_column(Text(""))
    table.add_column(Text(""), overflow="fold")
    bits = found["bits_per_weight"]
    facts = {
        "path": found["path"],
        "format": found["format"],
        "made by": found["made_by"],
        "size": _size(found["bytes"]),
        "parameters": f"{found['parameters']:,}",
        "quantized": f"{found['quantized_weights']:,} weights in {len(found['layers'])} layers",
        "bits per weight": ABSENT if bits is None else f"{bits:.3f}",
    }
    if found["allocation"] is not None:
        facts |= _mix_summary(found["allocation"])
    if found["tensor_parallel"] is not None:
        limits = found["tensor_parallel"]["limits"].items()
        sizes = ", ".join(map(str, found["tensor_parallel"]["sizes"]))
        facts["tensor parallel over"] = sizes + "".join(f" ({size}: {limit})" for size, limit in list(limits)[:1])
    if found["activation_scales"]:
        facts["scales of activations"] = f"{len(found['activation_scales'])} tensors"
    if found["kv_cache"] is not None:
        facts["stored by servers"] = f"{found['kv_cache']}, by scales of the file"
    if found["turned"]:
        facts["turned by the runtime"] = f"inputs of {found['turned']} layers, by Hadamard matrices"
    for name, text in facts.items():
        table.add_row(Text(name), Text(text))
    return table


def _fitted(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> FittedTable:
    """A table as wide as the terminal, with all its columns, the first ``words`` of which are texts."""
    from rich.text import Text

    shown = [
        Shown(name, [Text(row[place]) for row in rows], 0 if place < words else place, place >= words)
        for place, name in enumerate(columns)
    ]
    return FittedTable(shown, title=title, everything=True)


def _schemes(found: dict[str, Any]) -> FittedTable:
    rows = [
        (
            name, str(total["layers"]), f"{total['weights']:,}", _size(total["bytes"]),
            f"{total['bits_per_weight']:.3f}",
        )
        for name, total in found["schemes"].items()
    ]  # fmt: skip
    return _fitted("Schemes", ("Scheme", "Layers", "Weights", "Size", "Bits per weight"), rows)


def _mix_summary(mix: dict[str, Any]) -> dict[str, str]:
    """What a mix was made for and is predicted to lose."""
    budget = {"mixed within": mix["budget"]} if mix["budget"] else {}
    lost = {} if mix["predicted"] is None else {"predicted loss": f"{mix['predicted']:.3g} nats per token"}
    return budget | lost


def _kinds(mix: dict[str, Any]) -> FittedTable:
    """Bits of each kind of layer: the strip of the report, a character a block."""
    rows = []
    for kind in mix["kinds"]:
        named = ", ".join(f"{name} in {count}" for name, count in kind["choices"].items())
        least, most = f"{kind['least']:.2f}", f"{kind['most']:.2f}"
        rows.append((kind["layers"], named, kind["blocks"], least if least == most else f"{least} to {most}"))
    return _fitted("Bits by block; f is float", ("Layers", "Choices", "Blocks", "Bits per weight"), rows, words=3)


def _layers(found: dict[str, Any]) -> FittedTable:
    columns = ["Layer", "Scheme", "Shape", "Size", "Bits per weight"]
    if found["deep"]:
        columns += ["Beyond 6 std", "Largest", "At ends", "Bad scales"]
    predicted = any("nats" in layer for layer in found["layers"])
    columns += ["Nats a token"] if predicted else []
    rows = []
    for layer in found["layers"]:
        height, width = layer["shape"]
        bits = f"{layer['bits_per_weight']:.3f}"
        cells = (layer["name"], layer["scheme"], f"{height} x {width}", _size(layer["bytes"]), bits)
        nats = (f"{layer['nats']:.2e}" if "nats" in layer else ABSENT,) if predicted else ()
        rows.append((*cells, *(_decoded(layer) if found["deep"] else ()), *nats))
    return _fitted("Layers", columns, rows, words=2)


def _decoded(layer: dict[str, Any]) -> tuple[str, ...]:
    scales = layer["scales"]
    bad = scales["zero"] + scales["denormal"] + scales["non_finite"]
    far, largest, ends = layer["outliers"], layer["largest"], layer["at_ends"]
    return (
        ABSENT if far is None else f"{far:.2e}",
        ABSENT if largest is None else f"{largest:.1f} std",
        ABSENT if ends is None else f"{ends:.2%}",
        f"{bad} of {scales['count']}" if bad else "0",
    )


def _floats(found: dict[str, Any]) -> FittedTable:
    rows = [
        (dtype, str(total["tensors"]), f"{total['parameters']:,}", _size(total["bytes"]))
        for dtype, total in found["float_dtypes"].items()
    ]
    return _fitted("Float tensors", ("Dtype", "Tensors", "Parameters", "Size"), rows)


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
