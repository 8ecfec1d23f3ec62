"""The metrics that a gate can name, with their units and where their noise is told from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from quantkit.system.names import chosen
from quantkit.system.units import UNITS

BYTE_UNITS = {unit: Decimal(size) for unit, size in UNITS.items() if unit}
Spread = Literal["likelihood", "divergence", "agreement", "timings", "stderr", "exact"]
"""Where the noise of a figure is told from: sums of each window, repeated timings, its standard error, or none."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What a gate may ask of one metric.

    Attributes:
        fields: the names below it, one of which the path must end in; none if it is a number itself.
        per_text: it is taken on every text, whose name stands before the field.
        units: the units that its number may carry, each with its factor.
        lower_is_better: which way it gets better.
        unit: what its figures are written in.
        spread: where the noise of its figures is told from; None if a relative gate cannot be about it.
        comparable: the fields that a relative gate may be about; all if empty.
        versus_float: whether it compares with the float model already, so that a gate relative to that means nothing.
        implied: the field that is meant where the path names none; what stands for the text is then the name of a
            figure, such as ``arc_easy.acc``.
        usual: of several fields the one that is meant where the path names none.
    """

    fields: tuple[str, ...] = ()
    per_text: bool = False
    units: Mapping[str, Decimal] = field(default_factory=dict)
    lower_is_better: bool = True
    unit: str = ""
    spread: Spread | None = None
    comparable: tuple[str, ...] = ()
    versus_float: bool = False
    implied: str = ""
    usual: str = ""


METRICS = {
    "perplexity": Metric(per_text=True, spread="likelihood"),
    "kl_divergence": Metric(
        ("mean", "stderr", "median", "p99", "p999", "max"),
        per_text=True,
        unit="nats",
        spread="divergence",
        comparable=("mean",),
        versus_float=True,
        usual="mean",
    ),
    "top1_agreement": Metric(
        per_text=True,
        units={"%": Decimal("0.01")},
        lower_is_better=False,
        unit="share",
        spread="agreement",
        versus_float=True,
    ),
    "tasks": Metric(
        per_text=True, units={"%": Decimal("0.01")}, lower_is_better=False, spread="stderr", implied="value"
    ),
    "task_losses": Metric(per_text=True, spread="stderr", implied="value"),
    "answers": Metric(
        per_text=True, units={"%": Decimal("0.01")}, lower_is_better=False, spread="stderr", implied="value"
    ),
    "size_bytes": Metric(units=BYTE_UNITS, unit="bytes", spread="exact"),
    "bits_per_weight": Metric(unit="bits", spread="exact"),
    "memory": Metric(("weights_bytes", "peak_bytes"), units=BYTE_UNITS, unit="bytes", spread="exact"),
    "speed": Metric(
        ("prefill_tokens_per_second", "decode_tokens_per_second"),
        lower_is_better=False,
        unit="tokens/s",
        spread="timings",
    ),
    "seconds": Metric(("quantize", "evaluate"), unit="seconds"),
}


def full_path(path: str) -> str:
    """A path with its metric in quantkit's words: ``decode_tokens_per_second`` is a figure of ``speed``, ``ppl`` is
    ``perplexity``.
    """
    plain = path.removeprefix("metrics.")
    first, dot, rest = plain.partition(".")
    known = [*METRICS, *(name for metric in METRICS.values() if not metric.per_text for name in metric.fields)]
    plain = f"{chosen(first, known) or first}{dot}{rest}"
    owners = [name for name, metric in METRICS.items() if plain in metric.fields and not metric.per_text]
    return f"{owners[0]}.{plain}" if len(owners) == 1 else plain
