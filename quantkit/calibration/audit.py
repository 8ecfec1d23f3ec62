"""The audit: what became of every record and every token, as JSON data, and in lines for people."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from quantkit.calibration.model import ModelLimits
from quantkit.calibration.rows import Drawn, Dropped, Packed
from quantkit.recipe import CalibrationSpec
from quantkit.records import RecordSet
from quantkit.records.fields import UNKNOWN_FORMAT

HISTOGRAM_BINS = 10
MUCH = 0.1
"""The share of records or tokens of which a loss is worth a warning."""
REASONS_SHOWN = 3
KEEP_TOKENS = "'packing: full' or a larger max_length uses them"
COLUMNS_HELP = "say what other columns are: 'columns: {prompt: COLUMN, response: COLUMN}', or {messages: COLUMN}"
_INDICES_SHOWN = 20


def make_audit(
    spec: CalibrationSpec,
    found: RecordSet,
    drawn: Drawn,
    packed: Packed,
    *,
    template: str | dict[str, str],
    limits: ModelLimits,
    sha256: str,
) -> dict[str, Any]:
    """The audit of a calibration set.

    Of records: ``read = usable + skipped`` and ``usable = used + dropped + unused``. Of tokens:
    ``encoded_tokens = tokens + cropped_tokens + truncated_tokens + dropped_tokens``, where ``encoded_tokens`` counts
    the records that were drawn and the separators between them. ``images`` counts rows with images, where there are
    any. ``length`` is that of the used records before they were cut or packed.
    """
    dropped = [*drawn.dropped, *packed.dropped]
    separate = sum(record.tokens for record in drawn.dropped)
    return {
        "dataset": {"name": found.name, **found.origin, "sha256": found.sha256},
        "records": _records(found, packed, dropped),
        "encoded_tokens": sum(len(record.ids) for record in drawn.encoded) + separate + packed.separators,
        "separator_tokens": packed.separators,
        "cropped_tokens": packed.cropped_tokens,
        "truncated_tokens": packed.truncated_tokens,
        "dropped_tokens": separate + packed.remainder_tokens,
        "rows": len(packed.rows),
        "tokens": sum(map(len, packed.rows)),
        **({"images": images} if (images := sum(bool(record.inputs) for record in packed.used)) else {}),
        "length": _lengths([len(record.ids) for record in packed.used]),
        "token_ids_sha256": sha256,
        "seed": spec.seed,
        "samples": spec.samples,
        "packing": spec.packing,
        "max_length": spec.max_length,
        "chat_template": template,
        "warnings": _warnings(spec, found, packed, dropped, template, limits),
    }


def _records(found: RecordSet, packed: Packed, dropped: list[Dropped]) -> dict[str, Any]:
    used, usable = len(packed.used), len(found.records)
    return {
        "read": found.read,
        "usable": usable,
        "used": used,
        "unused": usable - used - len(dropped),
        "cropped": packed.cropped,
        "truncated": len(packed.truncated),
        "dropped": dict(sorted(Counter(record.reason for record in dropped).items())),
        "skipped": len(found.skipped),
        "used_indices": [record.index for record in packed.used],
        "truncated_lengths": {str(record.index): len(record.ids) for record in packed.truncated},
        "dropped_indices": _by_reason((record.index, record.reason) for record in dropped),
        "skipped_indices": _with_keys(found),
        "changed": _by_reason((record.index, change) for record in packed.used for change in record.changes),
    }


def _with_keys(found: RecordSet) -> dict[str, dict[str, Any]]:
    """The rows that were skipped by reason, with the keys of the first that has it."""
    groups = _by_reason((row.index, row.reason) for row in found.skipped)
    keys = {row.index: row.keys for row in found.skipped}
    return {reason: {**group, "keys": keys[group["first"][0]]} for reason, group in groups.items()}


def _by_reason(rows: Iterable[tuple[int, str]]) -> dict[str, dict[str, Any]]:
    """For each reason how many rows have it, and the first of their indices."""
    groups: dict[str, list[int]] = {}
    for index, reason in rows:
        groups.setdefault(reason, []).append(index)
    return {
        reason: {"count": len(groups[reason]), "first": sorted(groups[reason])[:_INDICES_SHOWN]}
        for reason in sorted(groups)
    }


def _lengths(lengths: list[int]) -> dict[str, Any]:
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // HISTOGRAM_BINS)
    counts = Counter((length - low) // width for length in lengths)
    bins = range((high - low) // width + 1)
    return {
        "min": low,
        "mean": statistics.fmean(lengths),
        "median": statistics.median(lengths),
        "max": high,
        "histogram": [
            {"from": low + place * width, "to": low + (place + 1) * width - 1, "count": counts[place]} for place in bins
        ],
    }


def _warnings(
    spec: CalibrationSpec,
    found: RecordSet,
    packed: Packed,
    dropped: list[Dropped],
    template: str | dict[str, str],
    limits: ModelLimits,
) -> list[str]:
    used, longest = len(packed.used), max(map(len, packed.rows))
    chats = any(record.messages for record in found.records)
    encoded = sum(len(record.ids) for record in packed.used)
    checks = {
        f"fewer records than asked for: {used} of {spec.samples}": used < spec.samples,
        f"records skipped as unusable: {len(found.skipped)} of {found.read}": len(found.skipped) > MUCH * found.read,
        f"files not compared with the hub, whose hashes are not to be had: {', '.join(found.unchecked)}": (
            bool(found.unchecked)
        ),
        f"records dropped: {len(dropped)} of {used + len(dropped)}": len(dropped) > MUCH * (used + len(dropped)),
        f"records cut to {spec.max_length} tokens: {len(packed.truncated)} of {used}": len(packed.truncated)
        > MUCH * used,
        f"tokens cut off: {packed.truncated_tokens:,} of {encoded:,}; {KEEP_TOKENS}": (
            packed.truncated_tokens > MUCH * encoded
        ),
        f"the model has no chat template{_written_by(limits)}: messages are joined plainly": (
            chats and spec.chat_template == "auto" and template == "none"
        ),
        f"rows of {longest} tokens exceed the model's {limits.positions} positions": (
            limits.positions is not None and longest > limits.positions
        ),
    }
    return [text for text, holds in checks.items() if holds]


def _written_by(limits: ModelLimits) -> str:
    """The package that would write the chat template, where one would."""
    package = limits.template_package
    return f" of its own, and {package} would write it (pip install {package})" if package else ""


def audit_lines(audit: dict[str, Any]) -> list[str]:
    """An audit in lines: what was used, what was left out, changed and cut, and what deserves a warning."""
    records = audit["records"]
    used = f"{records['used']} of {_counted(records['read'], 'record')}, {_counted(audit['tokens'], 'token')}"
    lines = [f"calibration: {used} in {_counted(audit['rows'], 'row')}"]
    for kind, groups in {
        "skipped": records["skipped_indices"],
        "dropped": records["dropped_indices"],
        "changed": records.get("changed", {}),
    }.items():
        lines += [f"calibration: {kind} {line}" for line in _reason_lines(groups)]
        if any(reason.startswith(UNKNOWN_FORMAT) for reason in groups):
            lines.append(f"calibration: {COLUMNS_HELP}")
    if records["cropped"]:
        tokens = f"{audit['cropped_tokens']:,} of {audit['encoded_tokens']:,} tokens"
        later = _counted(records["cropped"], "row")
        lines.append(f"calibration: {later} begin within their records, {tokens}")
    if records["truncated"]:
        tokens = f"{audit['truncated_tokens']:,} of {audit['encoded_tokens']:,} tokens"
        cut = _counted(records["truncated"], "record")
        lines.append(f"calibration: cut {cut} to {audit['max_length']} tokens, {tokens}")
    return [*lines, *(f"warning: calibration: {text}" for text in audit["warnings"])]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _reason_lines(groups: dict[str, dict[str, Any]]) -> list[str]:
    """The most frequent reasons, each with how many records have it and the first of them."""
    most = sorted(groups, key=lambda reason: -groups[reason]["count"])
    lines = []
    for reason in most[:REASONS_SHOWN]:
        group = groups[reason]
        keys = f" (keys: {group['keys']})" if group.get("keys") and "(keys: " not in reason else ""
        lines.append(f"{group['count']}: {reason}; first in record {group['first'][0]}{keys}")
    rest = sum(groups[reason]["count"] for reason in most[REASONS_SHOWN:])
    return [*lines, *([f"{rest} for other reasons; see the audit"] if rest else [])]
