"""What a report says of variants that libraries quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantkit.report.columns import Record
from quantkit.report.facts import Facts, present, words
from quantkit.report.numbers import count, duration, figure, in_bytes, pick

ENVIRONMENTS = {"own": "an environment of its own", "current": "quantkit's environment"}


def library_facts(variant: Record) -> Facts:
    """The library, its environment, and what its worker took; nothing for quantkit's own variants."""
    library = variant.get("library") or {}
    worker = library or variant.get("worker") or {}
    if not worker:
        return []
    variables = library.get("variables") or {}
    seconds, peak = figure(worker, "seconds"), figure(worker, "peak_bytes")
    return present(
        ("library runs in", words(ENVIRONMENTS.get(str(library.get("env"))))),
        ("its versions", ", ".join(f"{name} {version}" for name, version in (library.get("versions") or {}).items())),
        ("its variables", ", ".join(f"{name}={value}" for name, value in variables.items())),
        ("its worker", f"{duration(seconds)}, {in_bytes(peak)} of memory at its peak"),
        ("its ending", "" if library else words(worker.get("ending"))),
        ("its log", words(worker.get("log"))),
    )


def calibration_run(report: Record) -> Iterator[tuple[str, str]]:
    """For each library that was given the calibration set, how much of it was run."""
    for variant in report.get("variants") or []:
        calibration = pick(variant, "library", "calibration")
        if isinstance(calibration, Mapping):
            given, used = calibration["given"], calibration["used"]
            yield (
                f"Run by {variant['name']}",
                f"{count(used['samples'])} of {count(given['samples'])} rows, "
                f"{count(used['tokens'])} of {count(given['tokens'])} tokens",
            )
