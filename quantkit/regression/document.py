"""What a check found, as typed data: the content of ``check.json``.

A share is a fraction of one: a difference of 0.012 is 1.2 %. Figures that nobody could take are None. All moments are
UTC, ISO 8601. Differences are signed so that a positive one is worse, whichever way the figure gets better.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.gates.results import GateResult, Outcome

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Reference:
    """The accepted run that a variant is compared with.

    Attributes:
        variant: whose reference it is.
        run: number of the run in the history.
        started: when that run began.
        accepted: when it was accepted.
        quantkit: version that made it.
        checkpoint: where its file is kept, if retention has kept it.
    """

    variant: str
    run: int
    started: str
    accepted: str
    quantkit: str
    checkpoint: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Something that is not as it was in the accepted run.

    Attributes:
        area: ``model``, ``calibration``, ``evaluation``, ``recipe``, ``package``, ``environment`` or ``file``.
        key: what, such as ``torch`` or ``variants.int4.damping``.
        before, after: written; None where it was not there.
        variants: which variants it is about; empty for all.
    """

    area: str
    key: str
    before: str | None
    after: str | None
    variants: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of the file beside the accepted run's, whether or not a gate is about it.

    ``difference`` is a share, positive is worse; None where the two runs are not comparable, and ``reason`` says why.
    ``real`` says whether it lies outside its noise; None where none is known.
    """

    variant: str
    metric: str
    text: str | None
    unit: str
    before: float | None
    after: float | None
    difference: float | None
    low: float | None
    high: float | None
    real: bool | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LayerShift:
    """A layer whose error is not what it was: squared error of its output over that of the output itself.

    ``ratio`` is after over before. Layers that only one of the runs has, or whose scheme changed, have both schemes.
    """

    variant: str
    layer: str
    before: float | None
    after: float | None
    ratio: float | None
    scheme_before: str | None
    scheme_after: str | None


@dataclass(frozen=True, slots=True)
class TokenExample:
    """A position where the file departs far from the float model.

    Attributes:
        position: of the token within its window, counted from 0.
        divergence: KL of the float model's distribution from the file's, nats.
        nll: of the text's own token, nats.
        context: the text before it, some characters of it.
        token: what the text says there.
        expected: the float model's likeliest token.
        predicted: the file's likeliest token.
    """

    position: int
    divergence: float
    nll: float
    context: str
    token: str
    expected: str
    predicted: str


@dataclass(frozen=True, slots=True)
class WindowShift:
    """A window of a text that got worse: means over its tokens in nats, before and after, and its furthest tokens."""

    window: int
    before: float
    after: float
    tokens: tuple[TokenExample, ...]


@dataclass(frozen=True, slots=True)
class TextShift:
    """A text on which a variant got worse.

    Attributes:
        variant, text: which.
        metric: ``kl_divergence``, or ``perplexity`` where no divergence was taken; the windows' means are of the
            divergence or of the negative log-likelihood, in nats.
        before, after: the figure over the whole text.
        difference, low, high: the worsening as a share, with its 95 % interval.
        windows: those that got worse most, the worst first.
    """

    variant: str
    text: str
    metric: str
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    windows: tuple[WindowShift, ...]


@dataclass(frozen=True, slots=True)
class TrendPoint:
    """A figure of one run; ``comparable`` says whether it may stand beside the newest one.

    ``run`` is None for a run that could not be recorded.
    """

    run: int | None
    started: str
    value: float
    stderr: float | None
    accepted: bool
    comparable: bool
    verdict: str | None


@dataclass(frozen=True, slots=True)
class Trend:
    """A figure over the last runs, oldest first; the last point is the run that is judged."""

    variant: str
    metric: str
    text: str | None
    unit: str
    lower_is_better: bool
    points: tuple[TrendPoint, ...]


@dataclass(frozen=True, slots=True)
class VariantState:
    """A variant of the run. ``checkpoint`` is where its file is now; None if it failed."""

    name: str
    status: str
    error: str | None
    scheme: str
    checkpoint: str | None


@dataclass(frozen=True, slots=True)
class Check:
    """A run, judged.

    Attributes:
        schema: :data:`SCHEMA`.
        name: of the recipe.
        run: number of the run in the history; None if it could not be recorded.
        started: when the run began.
        seconds: how long it took.
        quantkit: version.
        device: what it was scored on.
        verdict: ``regressed`` if any gate is, else ``unknown`` if any cannot be told, else ``passed``.
        exit_code: 0 passed, 1 regressed, 2 cannot be told or could not be recorded.
        summary: the verdict in words, one line.
        variants: of the recipe, in its order.
        references: the accepted run of each variant that has one.
        gates: in the order of the recipe, variant by variant.
        metrics: every figure beside the accepted run's.
        changes: what is not as it was in the accepted runs.
        layers: the layers whose errors moved most, of all variants, the worst first.
        texts: texts that got worse, the worst first.
        trends: figures over the last runs.
        notes: what the reader should know beside the verdict: a gate that this much text is too little for, a history
            that could not be written.
        removed: folders of earlier runs that retention has removed.
    """

    schema: int
    name: str
    run: int | None
    started: str
    seconds: float
    quantkit: str
    device: str
    verdict: Outcome
    exit_code: int
    summary: str
    variants: tuple[VariantState, ...]
    references: tuple[Reference, ...]
    gates: tuple[GateResult, ...]
    metrics: tuple[Metric, ...]
    changes: tuple[Change, ...]
    layers: tuple[LayerShift, ...]
    texts: tuple[TextShift, ...]
    trends: tuple[Trend, ...]
    notes: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
