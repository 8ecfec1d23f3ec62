"""Gates: conditions such as ``kl_divergence.prose.mean <= 0.05`` that every variant must meet.

A gate is ``PATH OPERATOR NUMBER[UNIT]``. The path leads into a variant of the report, with ``metrics.``
implied. Where a metric is taken on several texts and the gate names none, the worst text counts. A figure
that is missing or not finite never passes.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from quantkit.errors import RecipeError, did_you_mean

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
BYTE_UNITS = {
    "B": Decimal(1),
    "KB": Decimal(10**3),
    "MB": Decimal(10**6),
    "GB": Decimal(10**9),
    "KiB": Decimal(2**10),
    "MiB": Decimal(2**20),
    "GiB": Decimal(2**30),
}
SHAPE = "PATH <= NUMBER, with <=, <, >= or >, such as 'kl_divergence.mean <= 0.05' or 'size_bytes <= 4GiB'"
_GATE = re.compile(
    r"\s*(?P<path>[A-Za-z0-9_][A-Za-z0-9_.-]*)\s*(?P<operator><=|>=|<|>)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>%|[A-Za-z]*)\s*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Metric:
    """What a gate may ask of one metric.

    Attributes:
        fields: the names below it, one of which the path must end in; none if it is a number itself.
        per_text: it is taken on every text, whose name stands before the field.
        units: the units that its number may carry, each with its factor.
    """

    fields: tuple[str, ...] = ()
    per_text: bool = False
    units: Mapping[str, Decimal] = field(default_factory=dict)


METRICS = {
    "perplexity": Metric(per_text=True),
    "kl_divergence": Metric(("mean", "stderr", "median", "p99"), per_text=True),
    "top1_agreement": Metric(per_text=True, units={"%": Decimal("0.01")}),
    "size_bytes": Metric(units=BYTE_UNITS),
    "bits_per_weight": Metric(),
    "memory": Metric(("weights_bytes", "peak_bytes"), units=BYTE_UNITS),
    "speed": Metric(("prefill_tokens_per_second", "decode_tokens_per_second")),
    "seconds": Metric(("quantize", "evaluate")),
}


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate, read.

    Attributes:
        text: as it was given.
        metric: a key of :data:`METRICS`.
        on: the text's name, or None for the worst of all.
        figure: the name below the metric, or None.
        comparison: ``<=``, ``<``, ``>=`` or ``>``.
        bound: the number with its unit applied.
    """

    text: str
    metric: str
    on: str | None
    figure: str | None
    comparison: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` meets the bound."""
        return OPERATORS[self.comparison](value, self.bound)

    def write(self, value: float) -> str:
        """``value`` as messages show it."""
        return f"{value:,.0f} bytes" if METRICS[self.metric].units is BYTE_UNITS else f"{value:.6g}"

    def worst(self, values: Mapping[str, float]) -> str:
        """The text whose value is furthest from meeting the bound."""
        choose = max if self.comparison.startswith("<") else min
        return choose(sorted(values), key=lambda text: values[text])


def parse_gate(gate: str) -> Gate:
    """Read a gate.

    Raises:
        RecipeError: it is not a gate; the remedy says what is allowed.
    """
    match = _GATE.fullmatch(gate)
    if match is None:
        raise RecipeError(f"gate '{gate}' is not a condition", f"write {SHAPE}")
    metric, _, rest = match["path"].removeprefix("metrics.").partition(".")
    if metric not in METRICS:
        raise RecipeError(f"gate '{gate}': unknown metric '{metric}'", did_you_mean(metric, METRICS))
    on, figure = _text_and_figure(gate, metric, rest)
    bound = float(Decimal(match["number"]) * _factor(gate, metric, match["unit"]))
    if not math.isfinite(bound):
        raise RecipeError(f"gate '{gate}': the number is too large")
    return Gate(" ".join(gate.split()), metric, on, figure, match["operator"], bound)


def check_gate_syntax(gate: str, texts: Collection[str] | None = None) -> None:
    """Check a gate before anything is measured.

    Args:
        gate: the condition.
        texts: names of the texts that will be scored; if given, the gate may name no other.

    Raises:
        RecipeError: it is not a gate, or names a metric, field, unit or text that is not there; the
            remedy says what is allowed and the nearest match.
    """
    on = parse_gate(gate).on
    if on is not None and texts is not None and on not in texts:
        raise RecipeError(f"gate '{gate}': no text is called '{on}'", did_you_mean(on, texts))


def evaluate_gates(gates: Sequence[str], variants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The verdict of every gate on every variant, gate by gate.

    Args:
        gates: the conditions.
        variants: as the report has them; a failed one fails all gates.

    Returns:
        For each pair ``{"gate", "variant", "value", "passed", "reason"}``; ``value`` is None where there
        is no figure, and then the gate is failed.

    Raises:
        RecipeError: a gate cannot be read.
    """
    verdicts = []
    for gate in map(parse_gate, gates):
        texts = sorted({text for variant in variants for text in _by_text(gate, variant)})
        verdicts += [_verdict(gate, variant, texts if gate.on is None else [gate.on]) for variant in variants]
    return verdicts


def _verdict(gate: Gate, variant: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    value, reason = _figure(gate, variant, texts)
    passed = value is not None and gate.holds(value)
    if value is not None:
        verb = "is" if passed else "is not"
        reason = f"{gate.write(value)}{reason} {verb} {gate.comparison} {gate.write(gate.bound)}"
    return {
        "gate": gate.text,
        "variant": str(variant.get("name")),
        "value": value,
        "passed": passed,
        "reason": reason,
    }


def _figure(gate: Gate, variant: Mapping[str, Any], texts: Sequence[str]) -> tuple[float | None, str]:
    """The figure that the gate is about, with the text it is of; or None and why there is none."""
    if variant.get("status") != "ok":
        return None, "the variant failed"
    if not METRICS[gate.metric].per_text:
        value = _number(variant.get(gate.metric), gate.figure)
        return value, "" if value is not None else f"no finite figure for {_path(gate.metric, gate.figure)}"
    found = _by_text(gate, variant)
    values: dict[str, float] = {}
    for text in texts:
        value = _number(found.get(text), gate.figure)
        if value is None:
            return None, f"no finite figure for {_path(gate.metric, text, gate.figure)}"
        values[text] = value
    if not values:
        return None, f"no finite figure for {_path(gate.metric, gate.figure)}"
    worst = gate.worst(values)
    note = "" if gate.on is not None else f" on {worst}" if len(values) == 1 else f" on {worst}, its worst text,"
    return values[worst], note


def _by_text(gate: Gate, variant: Mapping[str, Any]) -> Mapping[str, Any]:
    metrics = variant.get("metrics")
    found = metrics.get(gate.metric) if isinstance(metrics, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _text_and_figure(gate: str, metric: str, rest: str) -> tuple[str | None, str | None]:
    """Split what follows the metric; a text's name may itself hold dots."""
    about = METRICS[metric]
    if not about.fields:
        if rest and not about.per_text:
            raise RecipeError(f"gate '{gate}': {metric} is a number and has no '{rest}'", f"write {metric}")
        return rest or None, None
    text, _, figure = rest.rpartition(".")
    if figure not in about.fields or (text and not about.per_text):
        begin = f"{metric}.{rest}" if about.per_text and rest else metric
        remedy = did_you_mean(figure, about.fields)
        raise RecipeError(f"gate '{gate}': name a figure of {metric}, such as {begin}.{about.fields[0]}", remedy)
    return text or None, figure


def _factor(gate: str, metric: str, unit: str) -> Decimal:
    allowed = METRICS[metric].units
    if not unit:
        return Decimal(1)
    if unit not in allowed:
        remedy = did_you_mean(unit, allowed) if allowed else "write the number alone"
        raise RecipeError(f"gate '{gate}': '{unit}' is not a unit of {metric}", remedy)
    return allowed[unit]


def _number(found: Any, figure: str | None) -> float | None:
    value = found if figure is None else found.get(figure) if isinstance(found, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _path(*parts: str | None) -> str:
    return ".".join(part for part in parts if part)
