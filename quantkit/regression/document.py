"""What a check found, as typed data: the content of ``check.json``, written and read again.

A share is a fraction of one: a difference of 0.012 is 1.2 %. Figures that nobody could take are None. All moments are
UTC, ISO 8601. Differences are signed so that a positive one is worse, whichever way the figure gets better.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quantkit.errors import QuantkitError
from quantkit.gates.results import GateResult, Outcome
from quantkit.system.artifacts import write_json
from quantkit.system.distribution import upgrade_line

SCHEMA = 1
CHECK_FILE = "check.json"


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
class Drift:
    """How far a figure of a variant moved since the accepted run, and how far the float model's own did.

    All are shares, positive is worse. ``model`` is the float model's, with its 95 % interval where one is known;
    ``file`` the file's; ``quantization`` what is left of it: the file's figure over the float model's, now beside
    then.
    """

    variant: str
    metric: str
    text: str | None
    model: float
    low: float | None
    high: float | None
    file: float
    quantization: float


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
    """A figure over the last runs, oldest first; the last point is the run that is judged.

    ``model`` has the float model's own figure in each of these runs, None where it has none; it is empty where it can
    have none, as of a divergence from it.
    """

    variant: str
    metric: str
    text: str | None
    unit: str
    lower_is_better: bool
    points: tuple[TrendPoint, ...]
    model: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class VariantState:
    """A variant of the run. ``checkpoint`` is where its file is now; None if it failed."""

    name: str
    status: str
    error: str | None
    scheme: str
    checkpoint: str | None


@dataclass(frozen=True, slots=True, repr=False)
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
        drifts: figures that moved, beside the float model's own.
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
    drifts: tuple[Drift, ...] = ()

    def __repr__(self) -> str:
        return f"Check({self.name!r}, run {self.run}: {self.verdict}; {self.summary})"


def to_json(check: Check) -> dict[str, Any]:
    """A check as JSON data; a figure that is not finite is null."""
    data: dict[str, Any] = _finite(asdict(check))
    return data


def write_check(check: Check, folder: Path) -> Path:
    """Write ``check.json`` into a folder and return its path.

    Raises:
        OutputError: the folder cannot be written.
    """
    file = folder / CHECK_FILE
    write_json(file, to_json(check))
    return file


def read_check(path: Path) -> Check:
    """Read a check again.

    Args:
        path: a ``check.json``, or the folder that holds one.

    Raises:
        QuantkitError: there is none, it is not one, or a newer quantkit wrote it.
    """
    file = path / CHECK_FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuantkitError(f"cannot read {file}: {error.strerror}", "name a folder with a check.json") from error
    except (ValueError, RecursionError) as error:
        raise QuantkitError(f"{file} is not the result of a check: not JSON", "name a check.json") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise QuantkitError(f"{file} has schema {schema}, and this quantkit reads up to {SCHEMA}", upgrade_line())
    try:
        return TypeAdapter(Check).validate_python(content)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "its content"
        raise QuantkitError(f"{file} is not the result of a check: {place} is wrong", "run the check again") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
