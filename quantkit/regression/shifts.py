"""Which layers and texts moved between the accepted run and this one."""

from __future__ import annotations

import math
from collections.abc import Iterator

from quantkit.gates.compare import compare
from quantkit.gates.record import (
    LayerRecord,
    TextRecord,
    TokenRecord,
    VariantRecord,
)
from quantkit.regression.document import LayerShift, TextShift, TokenExample, WindowShift
from quantkit.regression.judging import Beside
from quantkit.run_history.record import RunRecord

LAYERS_SHOWN = 20
TEXTS_SHOWN = 10
WINDOWS_SHOWN = 3
SMALLEST_MOVE = 0.05
"""Relative change of a layer's error from which on it is told."""


def layer_shifts(run: RunRecord, beside: Beside) -> list[LayerShift]:
    """The layers whose errors moved most, the worst first."""
    found = [
        shift
        for now in run.variants
        if now.status == "ok" and (then := beside.variant(now.name)) is not None
        for shift in _layers(now, then)
    ]
    largest = sorted(found, key=lambda shift: -_size(shift))[:LAYERS_SHOWN]
    return sorted(largest, key=lambda shift: -(shift.ratio or math.inf))


def text_shifts(run: RunRecord, beside: Beside) -> list[TextShift]:
    """The texts on which a variant got worse by more than its noise, the worst first."""
    found = [
        shift
        for now in run.variants
        if now.status == "ok" and (then := beside.variant(now.name)) is not None
        for text in now.texts
        if (shift := _text(text, now, then)) is not None
    ]
    return sorted(found, key=lambda shift: -shift.difference)[:TEXTS_SHOWN]


def _layers(now: VariantRecord, then: VariantRecord) -> Iterator[LayerShift]:
    here = {layer.name: layer for layer in now.layers}
    there = {layer.name: layer for layer in then.layers}
    for name in here | there:
        new, old = here.get(name), there.get(name)
        after, before = new.error_after if new else None, old.error_after if old else None
        ratio = after / before if after is not None and before else None
        moved = ratio is not None and abs(ratio - 1) > SMALLEST_MOVE
        if moved or _scheme(new) != _scheme(old):
            yield LayerShift(now.name, name, before, after, ratio, _scheme(old), _scheme(new))


def _scheme(layer: LayerRecord | None) -> str | None:
    return layer.scheme if layer else None


def _size(shift: LayerShift) -> float:
    return abs(math.log(shift.ratio)) if shift.ratio else math.inf


def _text(name: str, now: VariantRecord, then: VariantRecord) -> TextShift | None:
    figure = "mean" if now.texts[name].kl is not None else None
    metric = "perplexity" if figure is None else "kl_divergence"
    found = compare(metric, figure, name, now, then)
    if isinstance(found, str) or not found.is_worse:
        return None
    key = (metric, name, figure or "")
    return TextShift(
        variant=now.name,
        text=name,
        metric=metric,
        before=then.figures[key],
        after=now.figures[key],
        difference=found.value,
        low=found.low,
        high=found.high,
        windows=_windows(now.texts[name], then.texts[name]),
    )


def _windows(now: TextRecord, then: TextRecord) -> tuple[WindowShift, ...]:
    here, there = (now.kl, then.kl) if now.kl is not None and then.kl is not None else (now.nll, then.nll)
    apart = sorted(range(len(here)), key=lambda window: there[window] - here[window])[:WINDOWS_SHOWN]
    return tuple(
        WindowShift(
            window,
            there[window] / now.tokens_per_window,
            here[window] / now.tokens_per_window,
            tuple(_example(token) for token in now.departures if token.window == window),
        )
        for window in apart
        if here[window] > there[window]
    )


def _example(token: TokenRecord) -> TokenExample:
    return TokenExample(
        position=token.position,
        divergence=token.kl_divergence,
        nll=token.nll,
        context=token.context,
        token=token.token,
        expected=token.expected,
        predicted=token.predicted,
    )
