"""Read gates: ``PATH <= NUMBER[UNIT]``, ``PATH <= baseline +1%``, ``PATH <= accepted +1%`` and ``PATH +1 %``."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast

from quantkit.errors import RecipeError, did_you_mean
from quantkit.gates.metrics import BYTE_UNITS, METRICS, Metric, full_path
from quantkit.system.names import chosen

Kind = Literal["absolute", "baseline", "accepted"]
_AGAINST = dict.fromkeys(("baseline", "float", "reference"), "baseline")
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
}
SHAPE = (
    "PATH <= NUMBER, with <=, <, >= or >, such as 'kl_divergence.mean <= 0.05' or 'size_bytes <= 4GiB', or relative as"
    " 'perplexity <= baseline +1%' and 'perplexity +1 %'"
)
_PATH = r"\s*(?P<path>\w[^\s<>=+%]*)"
"""The names of texts are of any script."""
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_ABSOLUTE = re.compile(rf"{_PATH}\s*(?P<operator><=|>=|<|>)\s*(?P<number>[+-]?{_NUMBER})\s*(?P<unit>%|[A-Za-z]*)\s*")
_RELATIVE = re.compile(
    rf"{_PATH}\s*(?P<operator><=|>=|<|>)\s*(?P<against>baseline|float|reference|accepted)\s*"
    rf"(?:(?P<sign>[+-])\s*(?P<number>{_NUMBER})\s*%)?\s*"
)
_SIGNS = {"≤": "<=", "≥": ">=", "=<": "<=", "=>": ">=", "−": "-"}  # noqa: RUF001 - a minus sign is meant
"""Other ways to write what a gate has."""
_SHORT = re.compile(rf"{_PATH}\s*(?P<sign>[+]|(?<=\s)-)\s*(?P<number>{_NUMBER})\s*%\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """A parsed gate.

    Attributes:
        text: as it was given.
        metric: a key of :data:`METRICS`.
        on: the text's name, or None for all of them, of which the worst counts.
        figure: the name below the metric, or None.
        comparison: ``<=``, ``<``, ``>=`` or ``>``.
        bound: the number with its unit applied; of a relative gate the signed share, ``0.01`` for ``+1%``.
        kind: what it compares with.
    """

    text: str
    metric: str
    on: str | None
    figure: str | None
    comparison: str
    bound: float
    kind: Kind = "absolute"

    @property
    def about(self) -> Metric:
        """What is known of its metric."""
        return METRICS[self.metric]

    @property
    def path(self) -> str:
        """Metric and figure, without the text."""
        return self.metric if self.figure in (None, self.about.implied) else f"{self.metric}.{self.figure}"

    @property
    def allowed(self) -> float:
        """How much worse a relative gate lets the figure be, as a share; negative where it has to get better."""
        return self.bound if self.about.lower_is_better else -self.bound

    def holds(self, value: float) -> bool:
        """Whether ``value`` meets the bound of an absolute gate."""
        return OPERATORS[self.comparison](value, self.bound)

    def write(self, value: float) -> str:
        """``value`` as messages show it."""
        return f"{value:,.0f} bytes" if self.about.units is BYTE_UNITS else f"{value:.6g}"

    def worst(self, values: Mapping[str, float]) -> str:
        """The text whose value is furthest from meeting the bound."""
        choose = max if self.comparison.startswith("<") else min
        return choose(sorted(values), key=lambda text: values[text])


def parse_gate(gate: str) -> Gate:
    """Read a gate.

    Raises:
        RecipeError: it is not a gate; the remedy says what is allowed.
    """
    plain = re.sub("|".join(_SIGNS), lambda sign: _SIGNS[sign[0]], gate)
    match = _ABSOLUTE.fullmatch(plain) or _RELATIVE.fullmatch(plain) or _SHORT.fullmatch(plain)
    if match is None:
        raise RecipeError(f"gate '{gate}' is not a condition", f"write {SHAPE}")
    metric, _, rest = full_path(match["path"]).partition(".")
    if metric not in METRICS:
        raise RecipeError(f"gate '{gate}': unknown metric '{metric}'", did_you_mean(metric, METRICS))
    on, figure = _text_and_figure(gate, metric, rest)
    parts = match.groupdict()
    if "unit" in parts:
        factor, kind = _factor(gate, metric, parts["unit"]), "absolute"
    else:
        factor, kind = Decimal(f"{parts['sign'] or '+'}0.01"), _AGAINST.get(str(parts.get("against")), "accepted")
    bound = float(Decimal(parts["number"] or 0) * factor)
    if not math.isfinite(bound):
        raise RecipeError(f"gate '{gate}': the number is too large")
    natural = "<=" if METRICS[metric].lower_is_better else ">="
    comparison = parts.get("operator") or natural
    read = Gate(" ".join(gate.split()), metric, on, figure, comparison, bound, cast("Kind", kind))
    if kind != "absolute":
        _check_relative(read, natural, short="operator" not in parts)
    return read


def check_gate_syntax(gate: str, texts: Collection[str] | None = None) -> None:
    """Check a gate before anything is measured.

    Args:
        gate: the condition.
        texts: names of the texts that will be scored; if given, the gate may name no other.

    Raises:
        RecipeError: it is not a gate, or names a metric, field, unit or text that is not there; the
            remedy says what is allowed and the nearest match.
    """
    read = parse_gate(gate)
    on = None if read.about.implied else read.on
    if on is not None and texts is not None and on not in texts:
        raise RecipeError(f"gate '{gate}': no text is called '{on}'", did_you_mean(on, texts))


def _check_relative(gate: Gate, natural: str, *, short: bool) -> None:
    about, text = gate.about, gate.text
    if about.spread is None:
        raise RecipeError(f"gate '{text}': {gate.metric} is taken once and its noise is not known", "write a number")
    if about.comparable and gate.figure not in about.comparable:
        remedy = f"write {gate.metric}.{about.comparable[0]}, or a number"
        raise RecipeError(f"gate '{text}': the noise of {gate.path} is not known", remedy)
    if gate.kind == "baseline" and about.versus_float:
        raise RecipeError(f"gate '{text}': {gate.metric} is relative to the float model already", "write a number")
    better = "lower" if about.lower_is_better else "higher"
    if short and gate.allowed < 0:
        sign = "+" if about.lower_is_better else "-"
        problem = f"gate '{text}': {gate.path} is better when it is {better}, so that this allows nothing worse"
        remedy = f"write '{gate.path} {sign}{abs(gate.bound):.6g}', or '{gate.path} {natural} accepted' and the share"
        raise RecipeError(problem, remedy.replace(f"{abs(gate.bound):.6g}", f"{100 * abs(gate.bound):.6g} %"))
    if gate.comparison != natural:
        problem = f"gate '{text}': {gate.path} is better when it is {better}"
        raise RecipeError(problem, f"write '{natural}' for what is relative to another run")


def _text_and_figure(gate: str, metric: str, rest: str) -> tuple[str | None, str | None]:
    """Split what follows the metric; a text's name may itself hold dots."""
    about = METRICS[metric]
    if not about.fields:
        if rest and not about.per_text:
            raise RecipeError(f"gate '{gate}': {metric} is a number and has no '{rest}'", f"write {metric}")
        return rest or None, about.implied or None
    text, _, last = rest.rpartition(".")
    figure = chosen(last, about.fields) or last
    if figure not in about.fields and about.usual and not difflib.get_close_matches(last, about.fields):
        return rest or None, about.usual
    if figure not in about.fields or (text and not about.per_text):
        named = text if about.usual else rest
        begin = f"{metric}.{named}" if about.per_text and named else metric
        remedy = did_you_mean(figure, about.fields)
        raise RecipeError(f"gate '{gate}': name a figure of {metric}, such as {begin}.{about.fields[0]}", remedy)
    return text or None, figure


def _factor(gate: str, metric: str, unit: str) -> Decimal:
    allowed = METRICS[metric].units
    if not unit:
        return Decimal(1)
    unit = next((each for each in allowed if each.casefold() == unit.casefold()), unit)
    if unit not in allowed:
        remedy = did_you_mean(unit, allowed) if allowed else "write the number alone"
        raise RecipeError(f"gate '{gate}': '{unit}' is not a unit of {metric}", remedy)
    return allowed[unit]
