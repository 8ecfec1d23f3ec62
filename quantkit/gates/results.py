"""What a gate found: its verdict on a variant, with the comparison behind it.

A share is a fraction of one: a difference of 0.012 is 1.2 %. Differences are signed so that a positive one is worse,
whichever way the figure gets better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit.gates.syntax import Kind

Outcome = Literal["passed", "regressed", "unknown"]
"""``unknown`` is what cannot be told: a figure is missing or not comparable. It never counts as passed."""
Noise = Literal["windows", "timings", "stderr", "exact"]
"""What the interval comes from: paired windows, repeated timings, standard errors, or nothing since it is exact."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure beside what it is held against.

    Attributes:
        text: the text that the figure is of; None for a figure that is of no text.
        outcome: of this figure alone.
        value: the figure now.
        reference: what it is compared with: the bound of an absolute gate, else the other's figure.
        difference: by how much ``value`` is worse, as a share of ``reference``; of an absolute gate ``value`` beyond
            the bound, in the figure's own unit.
        low, high: the 95 % interval of ``difference``; None where no noise is known.
        detectable: the smallest worsening, a share, that this much data finds in four runs of five.
        noise: what the interval comes from; None where there is none.
        samples: windows, timings or answers that it comes from.
        reason: in words, one line.
    """

    text: str | None
    outcome: Outcome
    value: float | None
    reference: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    noise: Noise | None = None
    samples: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GateResult:
    """The verdict of a gate on a variant.

    Attributes:
        gate: as the recipe has it.
        variant: which one.
        kind: what it compares with.
        metric: what it is about, as a path such as ``kl_divergence.mean`` or ``size_bytes``.
        unit: of the figures: ``bytes``, ``nats``, ``share``, ``tokens/s``, ``seconds``, ``bits`` or empty.
        lower_is_better: which way the figure gets better.
        allowed: how much worse a relative gate lets it be, as a share; the bound of an absolute one.
        outcome: the worst of ``comparisons``.
        comparisons: one for each text that it is about; the worst first.
        reason: in words, one line.
    """

    gate: str
    variant: str
    kind: Kind
    metric: str
    unit: str
    lower_is_better: bool
    allowed: float
    outcome: Outcome
    comparisons: tuple[Comparison, ...]
    reason: str

    @property
    def worst(self) -> Comparison | None:
        """The comparison that decided; None where there was nothing to compare."""
        return self.comparisons[0] if self.comparisons else None
