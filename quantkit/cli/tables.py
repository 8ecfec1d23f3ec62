"""The tables of the command line: methods and schemes, formats, and the plan of a run."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from quantkit.cli.catalogue import (
    Option,
    bits_taken,
    needs_of,
    options_of,
    scheme_keys,
    schemes_taken,
    shown_bits,
    statistics_words,
    written,
)
from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.isolation.catalogue import library_facts, offer_facts
from quantkit.libraries import LIBRARIES
from quantkit.methods import METHODS, tuning
from quantkit.recipe.steps import is_method, steps_of
from quantkit.runtimes import RUNTIMES
from quantkit.schemes import SCHEMES, GgmlMixture, Scheme
from quantkit.schemes.kinds import all_kinds
from quantkit.system.fitted_table import FittedTable, Shown
from quantkit.system.pace import about
from quantkit.system.units import in_units, percentage
from quantkit.transforms import TRANSFORMS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from quantkit.formats.base import Format

_PLAN_COLUMNS = (
    ("stage", 0, False),
    ("what", 1, False),
    ("estimated size", 0, True),
    ("calibration pass", 3, False),
    ("state", 2, False),
)
"""Titles of the columns of a plan, the rank of each, and whether it is a number, which is never wrapped."""
_STAGE_COLUMNS = (
    ("stage", 0, False),
    ("memory", 0, True),
    ("CPU memory beside", 2, True),
    ("disk", 2, True),
    ("time", 1, True),
    ("how it gets by", 1, False),
)
"""The same of its stages."""
BESIDE = 2
"""The place of the column that only a GPU has."""
LABEL_WIDTH, LINE_WIDTH = 14, 118


def method_lines() -> Iterator[str]:
    """Each method with what it needs, takes and costs, and its options; then transforms, libraries and schemes."""
    for method in METHODS:
        yield f"{method.name}: {method.summary}"
        yield from _facts(
            {
                "needs": needs_of(steps_of(method.name)),
                "schemes": ", ".join(schemes_taken(method.check)),
                "bits": bits_taken(method.check),
                "source": method.source,
                "cost": method.cost,
            }
        )
        yield from _options("options", options_of(steps_of(method.name).Options))
        yield ""
    yield from _broken(METHODS.broken())
    yield from _transform_lines()
    yield from _tuning_lines()
    yield from _library_lines()
    yield "Schemes, the key 'scheme' of a variant (bits per weight as they are by default, with their scales):"
    yield ""
    for kind in all_kinds():
        scheme = SCHEMES.get(kind)
        yield f"{kind}: {scheme.summary}"
        width = f"{shown_bits(kind):.4g} per weight"
        mixed = issubclass(scheme, GgmlMixture)
        yield from _facts(
            {"bits": f"{width} in most layers, more in others" if mixed else width, "source": scheme.source}
        )
        yield from _options("keys", scheme_keys(kind))
        yield ""


def _transform_lines() -> Iterator[str]:
    """Each transform with what it needs and its options, and before which methods it can stand."""
    yield "Transforms, which change the weights before a method (keys 'transforms' and 'method' of a variant):"
    yield ""
    for transform in TRANSFORMS:
        yield f"{transform.name}: {transform.summary}"
        joined = [f"{transform.name}+{name}" for name in METHODS.names() if name != "none"]
        yield from _facts(
            {
                "needs": statistics_words(transform.needs),
                "source": transform.source,
                "in short": ", ".join(name for name in joined if is_method(name)),
            }
        )
        yield from _options("options", options_of(transform.Options))
        yield ""
    yield from _broken(TRANSFORMS.broken())


def _tuning_lines() -> Iterator[str]:
    """Block polish with what it needs and its options, and behind which methods it can stand."""
    yield "Tuning, which comes behind a method (key 'tune' of a variant, or the end of 'method'):"
    yield ""
    yield f"{tuning.TUNE}: {tuning.SUMMARY}"
    yield from _facts(
        {
            "needs": "calibration rows",
            "schemes": ", ".join(schemes_taken(_check_tuned)),
            "source": tuning.SOURCE,
            "cost": tuning.COST,
            "in short": ", ".join(f"{name}+{tuning.TUNE}" for name in METHODS.names() if name != "none"),
        }
    )
    yield from _options("options", options_of(tuning.TuneOptions))
    yield ""


def _check_tuned(scheme: Scheme) -> None:
    if not tuning.TuneOptions().trains(scheme):
        raise SchemeError(f"{scheme.describe()} has nothing that is trained by default")


def _library_lines() -> Iterator[str]:
    """Each library with its methods, and those that cannot be used."""
    yield "Libraries, the key 'library' of a variant; see docs/plugins.md:"
    yield ""
    for library in LIBRARIES:
        yield f"{library.name}: {library.summary}"
        yield from _facts(library_facts(library))
        for offer in library.offers:
            yield from _wrapped(f"    {offer.method:<{LABEL_WIDTH}}", offer_facts(offer))
            options = ", ".join(f"{name} = {written(value)}" for name, value in offer.options.items())
            yield from _wrapped(" " * (LABEL_WIDTH + 4), f"options: {options}") if options else ()
        yield ""
    yield from _broken(LIBRARIES.broken())


def format_lines() -> Iterator[str]:
    """Each format with who loads it and the schemes that it stores."""
    for each in FORMATS:
        yield f"{each.name}: {each.summary}"
        yield from _facts(
            {
                "schemes": ", ".join(schemes_taken(each.check)),
                "read only": each.read_only,
                "bits: auto": _mixes_of(each),
                "runtimes": ", ".join(each.runtimes),
                "packages": ", ".join(each.requires),
                "evaluated by": _evaluated_by(each),
            }
        )
        yield ""
    yield from _broken(FORMATS.broken())


def runtime_lines() -> Iterator[str]:
    """Each runtime with the formats that it loads, and whether it can be used here."""
    for each in RUNTIMES:
        yield f"{each.name}: {each.summary}"
        missing = each.missing()
        facts = {"formats": ", ".join(each.formats()), "here": "yes" if missing is None else f"no: {missing}"}
        yield from _facts(facts if missing is None else {**facts, "install": each.install})
        yield ""
    yield from _broken(RUNTIMES.broken())


def _mixes_of(store: type[Format]) -> str:
    """Among which schemes a mix chooses by default, and for which runtimes among fewer."""
    usual = store.choices()
    fewer = {name: found for name in store.runtimes if (found := store.choices(name)) and found != usual}
    return "; ".join([", ".join(usual), *(f"for {name} {', '.join(found)}" for name, found in fewer.items())])


def _evaluated_by(store: type[Format]) -> str:
    if store.container == "gguf":
        return "llama.cpp if it is installed, else the reference decoder"
    return (
        "transformers if the packages are installed, else the reference decoder"
        if store.loads_in("transformers")
        else "the reference decoder"
    )


def plan_table(found: Mapping[str, Any]) -> FittedTable:
    """The result of :func:`quantkit.plan` as a table."""
    from rich.text import Text

    source, calibration = found["source"], found["calibration"]
    rows = []
    if calibration is not None:
        passes = f"{calibration['samples']} records, {calibration['max_length']} tokens each at most"
        rows.append(["calibration", calibration["dataset"], "", passes, calibration["state"]])
    rows.append(["baseline", "float model", _size(source["size_bytes"]), "", found["baseline"]])
    for variant in found["variants"]:
        size = "by the library" if variant["size_bytes"] is None else _size(variant["size_bytes"])
        if cannot_run(variant):
            what = f"{variant['method']} {variant['scheme']} {variant['format']}"
            rows.append([variant["name"], what, "", "", "cannot run, see below"])
            continue
        rows.append([variant["name"], _what(variant), size, variant["strategy"], variant["state"]])
    shown = [
        Shown(title, [Text(cell) for cell in column], rank, number)
        for (title, rank, number), column in zip(_PLAN_COLUMNS, zip(*rows, strict=True), strict=True)
    ]
    title = f"{source['reference']} ({source['dtype']}, {_size(source['size_bytes'])})"
    return FittedTable(shown, title=title, notes=[Text(f"results in {found['folder']}")], remedy="--json has all")


def stages_table(found: Mapping[str, Any]) -> FittedTable:
    """What each stage of a plan takes: memory, disk and time."""
    from rich.text import Text

    times = {stage["stage"]: float(stage["seconds"]) for stage in (found["time"] or {"stages": ()})["stages"]}
    rows = [
        [
            stage["stage"],
            "not known" if stage["bytes"] is None else in_units(stage["bytes"]),
            in_units(stage["cpu_bytes"]) if stage["cpu_bytes"] else "",
            in_units(stage["disk_bytes"]) if stage["disk_bytes"] else "",
            about(times[stage["stage"]]) if stage["stage"] in times else "",
            stage["how"],
        ]
        for stage in found["stages"]
    ]
    columns = [
        Shown(title, [Text(row[place]) for row in rows], rank, number)
        for place, (title, rank, number) in enumerate(_STAGE_COLUMNS)
        if place != BESIDE or any(row[place] for row in rows)
    ]
    devices = dict.fromkeys(str(stage["device"]) for stage in found["stages"])
    own = f"what stages take at most on {' and '.join(devices)}, beside Python and its packages"
    return FittedTable(columns, title="memory, disk and time of each stage", notes=[Text(own)], remedy="--json has all")


def rehearsal_table(found: Mapping[str, Any]) -> FittedTable:
    """What a rehearsal took, and what the whole run will take by that."""
    from rich.text import Text

    def size(nbytes: int | None) -> str:
        return "" if nbytes is None else in_units(nbytes)

    titles = (
        *(("stage", 0, False), ("took", 0, True), ("expected", 1, True), ("seconds", 1, True)),
        *(("whole run", 0, True), ("its time", 0, True)),
    )
    rows = [
        [
            each["stage"],
            size(each["measured_bytes"]),
            size(each["estimated_bytes"]),
            f"{each['seconds']:.1f}",
            size(each["whole_bytes"]),
            "" if each["whole_seconds"] is None else about(each["whole_seconds"]),
        ]
        for each in found["stages"]
    ]
    columns = [
        Shown(title, [Text(row[place]) for row in rows], rank, number)
        for place, (title, rank, number) in enumerate(titles)
    ]
    title = f"rehearsed with {found['blocks']} of {found['of_blocks']} blocks and one batch"
    return FittedTable(columns, title=title, remedy="--json has all")


def rehearsal_notes(found: Mapping[str, Any]) -> Iterator[str]:
    """What went wrong in a rehearsal, and what was not tried."""
    for name, error in found["failures"].items():
        yield f"{name} would fail: {error}"
    if found["left_out"]:
        yield f"not rehearsed: {', '.join(found['left_out'])}"


def cannot_run(variant: Mapping[str, Any]) -> bool:
    """Whether a variant of a plan would fail."""
    return str(variant["state"]).startswith("cannot run")


def plan_notes(found: Mapping[str, Any]) -> Iterator[str]:
    """How long it will take; why variants cannot run; what stays float and the like, and of whom that is said."""
    if found["time"] is not None:
        yield time_words(found["time"])
    if found["precision"] is not None:
        asked, most = found["precision"]["asked"], found["precision"]["max_tokens"]
        yield f"texts are scored until all files are known to {asked:.2%}, to {most:,} tokens at most, which is counted"
    variants = [variant for variant in found["variants"] if not cannot_run(variant)]
    for variant in found["variants"]:
        if cannot_run(variant):
            yield f"{variant['name']} {variant['state']}"
    for note in dict.fromkeys(note for variant in variants for note in variant["notes"]):
        names = [variant["name"] for variant in variants if note in variant["notes"]]
        yield note if len(names) == len(variants) else f"{', '.join(names)}: {note}"


def time_words(found: Mapping[str, Any]) -> str:
    """How long a run will take, within what, and how that is known."""
    if not found["stages"]:
        return "nothing is left to do but the report"
    between = f"between {about(found['low'])} and {about(found['high'])}"
    longest = sorted(found["stages"], key=lambda stage: -float(stage["seconds"]))[:3]
    most = "; ".join(f"{stage['stage']}, {about(stage['seconds'])}" for stage in longest)
    return f"about {about(found['seconds'])} in all, {between}, by {found['by']}; most of it: {most}"


def _what(variant: Mapping[str, Any]) -> str:
    quantized, linears = variant["layers"]
    kinds = variant["schemes"]
    told = kinds if len(kinds) == 1 else [f"{name} ({count})" for name, count in kinds.items()]
    scheme = ", ".join(told) or variant["scheme"]
    share = "" if variant["share"] is None else f", {percentage(variant['share'])} of the block weights"
    return f"{variant['method']} {scheme} {variant['format']}, {quantized} of {linears} linear layers{share}"


def _facts(facts: Mapping[str, str]) -> Iterator[str]:
    for label, text in facts.items():
        if text:
            yield from _wrapped(f"    {label:<{LABEL_WIDTH}}", text)


def _options(title: str, options: list[Option]) -> Iterator[str]:
    if not options:
        return
    yield f"    {title}"
    width = max(len(f"{option.name} = {option.default}") for option in options) + 2
    for option in options:
        yield from _wrapped(f"      {f'{option.name} = {option.default}':<{width}}", option.meaning)


def _wrapped(label: str, text: str) -> Iterator[str]:
    lines = textwrap.wrap(text, LINE_WIDTH - len(label)) or [""]
    yield f"{label}{lines[0]}".rstrip()
    yield from (" " * len(label) + line for line in lines[1:])


def _broken(reasons: Mapping[str, str]) -> Iterator[str]:
    for name, reason in reasons.items():
        yield f"{name}: cannot be used: {reason}"
        yield ""


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
