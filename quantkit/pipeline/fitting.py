"""One command from a model to the file to ship: what `quantkit fit` does.

It takes stock, runs a recipe of candidates that fit and that the runtime loads, and keeps the one that comes nearest to
the float model on the user's data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.pipeline.fit_candidates import MIX, Candidate, Stock, candidates, nothing_fits
from quantkit.pipeline.fit_files import DATA, MODEL, RECIPE, clear_run, ship, split_data
from quantkit.pipeline.fit_stock import anatomy_for, content_of
from quantkit.pipeline.plan import forecast
from quantkit.pipeline.preflight import longest_input
from quantkit.pipeline.recorded import recorded_run
from quantkit.recipe import CalibrationSpec, Recipe
from quantkit.recipe.fitting import STAGE, FitSpec
from quantkit.recipe.targets import runtime_of
from quantkit.report.losses import Loss, loss
from quantkit.report.recommendation import breakage, least_loss
from quantkit.run_history.store import History
from quantkit.system.artifacts import read_stage, translated_os_errors, write_stage, write_text
from quantkit.system.locks import held
from quantkit.system.progress import Logged, Observer
from quantkit.system.units import in_units
from quantkit.system.validation import parse_section

VERSION = 1
"""Part of the fingerprint: raised when the same arguments would give another file."""
ROW = 512
"""Tokens of a calibration row and of a scored window, where the model reads as many."""
GOOD = 0.05
"""Nats per token of divergence up to which `quick` tries nothing else: a loss that is hard to see in what is said."""


def fit(
    model: str | Path,
    *,
    out: str | Path,
    memory: str | int | None = None,
    size: str | int | None = None,
    context: int = 4096,
    runtime: str = "vllm",
    data: str | Path | Mapping[str, Any] | CalibrationSpec | None = None,
    adapter: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = (),
    max_tokens: int = 8192,
    quick: bool = False,
    keep: bool = False,
    device: str = "auto",
    decode: bool = False,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Make the file of a model that fits a budget and comes nearest to the model on one's own data.

    Args:
        model: hub id, folder, GGUF file or ``package:`` reference; see :class:`quantkit.recipe.ModelSpec`.
        out: folder of the results; see :mod:`quantkit.pipeline.fit_files`. A fit that was stopped goes on there.
        memory: bytes that serving may take, or a text such as ``8GiB``: weights, the cache of one sequence, activations
            and what the device's runtime takes.
        size: bytes that the file may have, or a text such as ``5GiB``; beside ``memory`` or in its place.
        context: tokens of the sequence.
        runtime: who shall load the file: ``vllm``, ``llama.cpp``, ``transformers``, ``ollama`` ...
        data: a data set, or the keys of a recipe's ``calibration`` section. A fifth of its records is held out: the
            candidates are scored on them, and none is calibrated on them.
        adapter: LoRA adapters to merge first; see :class:`quantkit.recipe.AdapterSpec`.
        max_tokens: to score on, at most.
        quick: try the likeliest candidate, and others only if that loses more than 0.05 nats per token.
        keep: leave the other candidates in ``out/run``.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        decode: decode a model that a tool has quantized.
        trust_remote_code: run Python code that comes with the model.
        observer: is told what happens.

    Returns:
        ``checkpoint``, ``variant``, ``format``, ``scheme``, ``size_bytes``, ``memory_bytes``, ``kl_divergence``,
        ``words``, ``reason``, ``budget``, ``float`` (``size_bytes``, ``memory_bytes`` and ``fits`` of the model in 16
        bits), ``candidates``, ``notes``, ``recipe`` (a file), ``recipe_text`` and ``report`` (a file).

    Raises:
        QuantkitError: nothing fits the budget, with the smallest that does; or what else is wrong, and the remedy.
    """
    budget = {"memory": memory, "size": size, "context": context}
    given = {"source": str(model), "adapter": adapter, "decode": decode, "trust_remote_code": trust_remote_code}
    asked = {
        "model": given,
        "out": str(out),
        "budget": {key: value for key, value in budget.items() if value is not None},
        "runtime": runtime,
        "data": data,
        "max_tokens": max_tokens,
        "device": device,
        "quick": quick,
        "keep": keep,
    }
    return fitted(parse_section(FitSpec, asked, "fit"), observer or Logged())


def fitted(asked: FitSpec, observer: Observer) -> dict[str, Any]:
    """Do what is asked for, or go on with it; see :func:`fit`."""
    asked.check_files()
    made_from = _made_from(asked)
    with held(asked.folder, STAGE), translated_os_errors(asked.folder):
        done = read_stage(asked.folder, STAGE, made_from)
        if done is not None and "result" in done and (asked.folder / MODEL).is_dir():
            observer.note(f"{asked.folder} has the result of these arguments already: remove it to have it made anew")
            result: dict[str, Any] = done["result"]
            return result
        stock, able = take_stock(asked, observer)
        asked.folder.mkdir(parents=True, exist_ok=True)
        write_stage(asked.folder, STAGE, made_from)
        recipe, content = _run(asked, stock, able, observer)
        result = _shipped(asked, stock, recipe, content)
        write_stage(asked.folder, STAGE, made_from, result=result)
        if not asked.keep:
            clear_run(asked.folder)
        return result


def planned(asked: FitSpec, observer: Observer) -> dict[str, Any]:
    """What :func:`fitted` would do; nothing stays of what has to be written for that.

    Returns:
        ``model``, ``runtime``, ``budget``, ``words`` (the budget), ``float``, ``candidates`` (``name``, ``method``,
        ``format``, ``scheme``, ``state``, ``size_bytes``, ``memory_bytes``), ``quick`` (the candidate that is tried
        first), ``time`` (as of :func:`quantkit.plan`) and ``warnings``.

    Raises:
        QuantkitError: as of :func:`fit`.
    """
    asked.check_files()
    stock, able = take_stock(asked, observer)
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        found = forecast(_recipe(asked, able, Path(scratch)))
    told = {variant["name"]: variant for variant in found["variants"]}
    rows = [
        {key: told[each.name][key] for key in ("name", "method", "format", "scheme", "state")}
        | {"size_bytes": each.size, "memory_bytes": each.memory}
        for each in able
    ]
    return {
        "model": asked.model.source,
        "runtime": asked.runtime,
        "budget": asked.budget.model_dump(mode="json"),
        "words": stock.words(),
        "float": _float(stock),
        "candidates": rows,
        "quick": _likeliest(able).name if asked.quick else None,
        "time": found["time"],
        "warnings": found["warnings"],
    }


def take_stock(asked: FitSpec, observer: Observer) -> tuple[Stock, list[Candidate]]:
    """What there is, and the candidates that fit.

    Raises:
        QuantkitError: nothing fits, with the smallest that does.
    """
    observer.stage(f"take stock: {asked.model.source}")
    stock = Stock(anatomy_for(asked.model, observer), runtime_of(asked.runtime), asked.budget)
    for note in stock.notes():
        observer.note(note)
    return stock, candidates(stock)


def _made_from(asked: FitSpec) -> dict[str, Any]:
    """What the result depends on, as far as it can be told without reading the model."""
    given = asked.model_dump(mode="json", exclude={"out", "keep", "device"})
    return {"code": VERSION, **given, "files": content_of(asked.model, asked.data)}


def _recipe(asked: FitSpec, able: Sequence[Candidate], folder: Path) -> Recipe:
    parts = None if asked.data is None else split_data(asked.data, folder / DATA)
    row = min(ROW, longest_input(asked.model.source) or ROW)
    return asked.recipe([candidate.variant() for candidate in able], folder, parts, row)


def _run(asked: FitSpec, stock: Stock, able: Sequence[Candidate], observer: Observer) -> tuple[Recipe, dict[str, Any]]:
    """Run the recipe of the candidates; of `quick` that of the likeliest first."""
    if asked.quick and len(able) > 1:
        recipe = _recipe(asked, [_likeliest(able)], asked.folder)
        content = recorded_run(recipe, observer)
        found = _within(stock, content)
        distance = loss(content, found[0]) if found else None
        if distance is not None and distance.value <= GOOD:
            observer.note(f"quick: {found[0]['name']} is good enough ({distance.words}), and no other is tried")
            return recipe, content
        observer.note(f"quick: {_likeliest(able).name} is not good enough, and the others are tried")
    recipe = _recipe(asked, able, asked.folder)
    return recipe, recorded_run(recipe, observer)


def _likeliest(able: Sequence[Candidate]) -> Candidate:
    """The candidate that is tried first: the mix, which is there where 8 bits do not fit; else that of most bits."""
    return next((candidate for candidate in able if candidate.width == MIX), able[0])


def _within(stock: Stock, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that are whole, and within the budget by the bytes of their files."""
    rows = [row for row in content["variants"] if row["status"] == "ok"]
    return [row for row in rows if stock.fits(row["format"], row["size_bytes"])]


def _shipped(asked: FitSpec, stock: Stock, recipe: Recipe, content: dict[str, Any]) -> dict[str, Any]:
    """The nearest file within the budget, put where it is shipped from, and what is to be told of it."""
    rows = _within(stock, content)
    if not rows:
        raise _no_row(stock, content)
    chosen, reason = least_loss(content, rows, stock.words())
    history = History(recipe.history_file)
    history.accept(history.latest(recipe.name), [chosen["name"]])
    ship(recipe, content, chosen, asked.folder)
    text = asked.weekly(recipe, str(chosen["name"]), stock.room(chosen["format"])).to_yaml()
    write_text(asked.folder / RECIPE, text)
    broken, distance, size = breakage(content, chosen), loss(content, chosen), int(chosen["size_bytes"])
    warning = f"{chosen['name']} is broken ({broken}): the budget is too small for this model"
    return {
        "checkpoint": str(asked.folder / MODEL),
        **{key: chosen[key] for key in ("format", "scheme", "size_bytes")},
        "variant": chosen["name"],
        "memory_bytes": stock.memory(chosen["format"], size),
        "kl_divergence": None if distance is None else distance.value,
        "words": _words(stock, chosen, distance),
        "reason": reason,
        "budget": asked.budget.model_dump(mode="json"),
        "float": _float(stock),
        "candidates": [_told(stock, content, row) for row in content["variants"]],
        "notes": [*stock.notes(), *([] if broken is None else [f"warning: {warning}"])],
        "recipe": str(asked.folder / RECIPE),
        "recipe_text": text,
        "report": str(asked.folder / "report.html"),
    }


def _no_row(stock: Stock, content: Mapping[str, Any]) -> QuantkitError:
    """What to say where no candidate came out within the budget."""
    made = [row for row in content["variants"] if row["status"] == "ok"]
    if not made:
        failed = content["variants"][0]
        return QuantkitError(f"no candidate could be made and scored; {failed['name']}: {failed['error']}")
    least = min(made, key=lambda row: int(row["size_bytes"]))
    size = int(least["size_bytes"])
    way = Candidate(str(least["name"]), {"format": least["format"]}, "", size, stock.memory(least["format"], size))
    return nothing_fits(stock, [way])


def _told(stock: Stock, content: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A candidate in the result."""
    told = {key: row.get(key) for key in ("name", "status", "error", "method", "format", "scheme", "size_bytes")}
    if row["status"] != "ok":
        return told | {"fits": False}
    distance, size = loss(content, row), row["size_bytes"]
    return told | {
        "memory_bytes": stock.memory(row["format"], size),
        "fits": stock.fits(row["format"], size),
        "kl_divergence": None if distance is None else distance.value,
    }


def _words(stock: Stock, row: Mapping[str, Any], distance: Loss | None) -> str:
    """A file in words: its size, its memory, its loss."""
    size = int(row["size_bytes"])
    memory = f"{in_units(stock.memory(row['format'], size))} of memory at {stock.use.context:,} tokens"
    return "; ".join([in_units(size), memory, *([] if distance is None else [distance.words])])


def _float(stock: Stock) -> dict[str, Any]:
    """The model in 16 bits, beside the budget."""
    size = stock.float_size
    return {"size_bytes": size, "memory_bytes": stock.memory("float", size), "fits": stock.fits("float", size)}
