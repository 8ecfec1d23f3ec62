"""Facts of a report, pairs of a label and its words: the model, the calibration set, a variant, the machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.recipe.evaluation import STREAMED
from quantkit.report.columns import Record, reference_name
from quantkit.report.numbers import ABSENT, count, duration, figure, fixed, in_bytes, parameters, pick, significant
from quantkit.schemes.mix import mix_of
from quantkit.system.units import finite

Facts = list[tuple[str, str]]
LOADERS = {
    "reference": "the reference decoder, as float weights",
    STREAMED: "the reference decoder, a block at a time",
}
"""Who loaded a checkpoint to score it, in words; the others have names that say it."""
ENVIRONMENTS = {"own": "an environment of its own", "current": "quantkit's environment"}
ESTIMATED = {
    "weights": "weights in memory",
    "prefill": "memory taken at prefill",
    "decode": "memory taken at decode",
    "process_prefill": "the process at prefill",
    "process_decode": "the process at decode",
}
"""The figures of memory that have an estimate beside them."""


def present(*facts: tuple[str, str]) -> Facts:
    """The facts that say something."""
    return [(label, value) for label, value in facts if value not in (ABSENT, "")]


def words(value: Any) -> str:
    """``value`` as it is shown: text as it stands, anything else as JSON."""
    if value is None:
        return ABSENT
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def source_facts(report: Record) -> Facts:
    """Where the float model comes from."""
    source = report.get("source") or {}
    return present(
        ("Model", words(source.get("reference"))),
        ("Revision", words(source.get("revision"))),
        ("Kind", words(source.get("kind"))),
        ("Decoded from", words(source.get("decoded"))),
        ("Parameters", parameters(figure(source, "parameters"))),
        ("Size of the source", in_bytes(figure(source, "size_bytes"))),
        ("Dtype", words(source.get("note") or source.get("dtype"))),
        *_merge_facts(source.get("merge") or {}),
        ("Compared with", reference_name(report)),
        ("Size of that model", in_bytes(figure(report, "baseline", "size_bytes"))),
        ("Its scoring", "; ".join(pick(report, "baseline", "scoring_notes") or ()) or ABSENT),
    )


def _merge_facts(merge: Record) -> list[tuple[str, str]]:
    """Which adapters were merged into what, and how far the result is from PEFT's own model."""
    if not merge:
        return []
    adapters = [
        f"{each.get('source')}, weight {significant(finite(each.get('weight')), 3)}" for each in merge["adapters"]
    ]
    check = merge.get("check") or {}
    told = significant(figure(check, "relative_difference"), 2)
    return [
        ("Adapters merged", "; ".join(adapters)),
        (
            "Merged into",
            "the model's own weights" if merge["base_weights"] == "original" else "its NF4 weights, decoded",
        ),
        ("Logits against PEFT's, relative difference", told),
        *(("Of the merge", words(note)) for note in merge.get("notes") or ()),
    ]


def calibration_facts(report: Record) -> Facts:
    """The audit of the calibration set: origin, what was read, used and left out."""
    audit = report.get("calibration") or {}
    records = audit.get("records") or {}
    lengths = audit.get("length") or {}
    origin = audit.get("origin") or {}
    length = ", ".join(f"{name} {significant(figure(lengths, name), 4)}" for name in ("min", "mean", "median", "max"))
    return present(
        *((f"Origin: {words(key)}", words(value)) for key, value in origin.items()),
        ("Records", ", ".join(f"{count(n)} {key}" for key, n in records.items() if finite(n) is not None)),
        *_by_reason("Skipped", records.get("skipped_indices")),
        *_by_reason("Dropped", records.get("dropped_indices")),
        *_by_reason("Changed", records.get("changed")),
        ("Rows", count(audit.get("rows"))),
        ("Tokens", count(audit.get("tokens"))),
        ("Tokens before rows that begin within records", count(audit.get("cropped_tokens"))),
        ("Tokens cut off by max_length", count(audit.get("truncated_tokens"))),
        *calibration_run(report),
        ("Record length, tokens", length if lengths else ABSENT),
        *((name, words(audit.get(name))) for name in ("seed", "packing", "max_length", "chat_template")),
        ("SHA-256 of the token ids", words(audit.get("token_ids_sha256"))),
    )


def _by_reason(label: str, groups: Record | None) -> Iterator[tuple[str, str]]:
    """How many records were lost or changed for each reason."""
    return ((f"{label}: {reason}", count(figure(group, "count"))) for reason, group in (groups or {}).items())


def variant_facts(variant: Record) -> Facts:
    """A variant's checkpoint and the options of its method."""
    options, loader = variant.get("options") or {}, variant.get("loaded_by")
    return present(
        ("checkpoint", words(variant.get("checkpoint"))),
        ("loaded by", words(LOADERS.get(str(loader), loader))),
        ("computed with inputs rounded to", ", ".join(variant.get("rounded_inputs") or []) or ABSENT),
        *_mix_facts(variant),
        *((label, _beside_estimate(variant, name)) for name, label in ESTIMATED.items()),
        *((str(key), words(value)) for key, value in options.items()),
        *library_facts(variant),
    )


def _mix_facts(variant: Record) -> Facts:
    """What a mix was made for, and what it is predicted to lose."""
    mix = mix_of(variant.get("allocation"))
    if mix is None:
        return []
    return [
        *([("budget", mix.budget)] if mix.budget else []),
        ("layers", mix.words),
        ("predicted loss", f"{significant(mix.predicted)} nats per token"),
    ]


def _beside_estimate(variant: Record, name: str) -> str:
    """What was measured, beside what was expected of it before it was there."""
    found = pick(variant, "memory", "estimates", name)
    measured, estimated, ratio = (figure(found, key) for key in ("measured_bytes", "estimated_bytes", "ratio"))
    if measured is None or estimated is None:
        return ABSENT
    return f"estimated {in_bytes(estimated)}, measured {in_bytes(measured)}, ratio {fixed(ratio, 3)}"


def environment_facts(report: Record) -> Facts:
    """The machine and the packages."""
    environment = report.get("environment") or {}
    packages = environment.get("packages") or {}
    known = [(key, words(environment.get(key))) for key in ("platform", "cpu", "cores")]
    return present(
        *known,
        ("memory", in_bytes(figure(environment, "memory_bytes"))),
        ("device", words(environment.get("device"))),
        ("python", words(environment.get("python"))),
        *((str(name), words(version)) for name, version in packages.items()),
    )


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
