"""Changes since the accepted run: of the recipe, the data, the packages, the machine and the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantkit.gates.record import VariantRecord
from quantkit.regression.document import Change
from quantkit.regression.judging import Beside
from quantkit.run_history.record import RunRecord

SHORT_HASH = 12
SCHEMES_SHOWN = 4
FLOAT = "float"
_NOT_COMPARED = ("name", "defaults", "report", "history", "retention", "gates", "variants", "model")
"""Keys of a recipe that change nothing of a file, or are told in another way."""


def changes(run: RunRecord, beside: Beside) -> list[Change]:
    """What differs between a run and the accepted runs of its variants, each difference once."""
    groups: dict[int, list[str]] = {}
    for name, reference in beside.references.items():
        groups.setdefault(reference.id or 0, []).append(name)
    found: list[Change] = []
    for names in groups.values():
        about = () if len(groups) == 1 and len(names) == len(run.variants) else tuple(names)
        found += [
            Change(area, key, _written(before), _written(after), about)
            for area, key, before, after in _differences(run, beside.references[names[0]])
        ]
        found += [change for name in names for change in _of_variant(name, run, beside.references[name])]
    return found


Difference = tuple[str, str, Any, Any]


def _differences(now: RunRecord, then: RunRecord) -> Iterator[Difference]:
    yield from _unlike("model", _flat(then.recipe.get("model")), _flat(now.recipe.get("model")))
    if now.source_fingerprint != then.source_fingerprint:
        yield "model", "content", _short(then.source_fingerprint), _short(now.source_fingerprint)
    if now.calibration_fingerprint != then.calibration_fingerprint:
        yield "calibration", "tokens", _short(then.calibration_fingerprint), _short(now.calibration_fingerprint)
    for section in now.recipe.keys() | then.recipe.keys():
        if section not in _NOT_COMPARED:
            area = section if section in ("calibration", "evaluation") else "recipe"
            prefix = "" if area == section else f"{section}."
            yield from _unlike(area, _flat(then.recipe.get(section)), _flat(now.recipe.get(section)), prefix)
    yield from _unlike("package", then.packages, now.packages)
    machine = ("device", "cpu", "cores", "driver", "platform")
    yield from _unlike(
        "environment", {key: getattr(then, key) for key in machine}, {key: getattr(now, key) for key in machine}
    )


def _of_variant(name: str, now: RunRecord, then: RunRecord) -> Iterator[Change]:
    here, there = now.variant(name), then.variant(name)
    if here is None or there is None:
        return
    for _, key, before, after in _unlike("recipe", _settings(then, name), _settings(now, name)):
        yield Change("recipe", f"variants.{name}.{key}", _written(before), _written(after), (name,))
    yield from _of_layers(name, here, there)
    for text in here.texts.keys() & there.texts.keys():
        before, after = there.texts[text].token_ids_sha256, here.texts[text].token_ids_sha256
        if before != after:
            yield Change("evaluation", f"texts.{text}.tokens", _short(before), _short(after), (name,))
    for key, old, new in (
        ("loaded by", there.loaded_by, here.loaded_by),
        ("content", _short(there.content), _short(here.content)),
    ):
        if old != new:
            yield Change("file", key, old, new, (name,))


def _of_layers(name: str, here: VariantRecord, there: VariantRecord) -> Iterator[Change]:
    """Of a file whose layers have several schemes, now or then, how many layers have another one."""
    now, then = ({layer.name: layer.scheme for layer in record.layers} for record in (here, there))
    if not now or not then or len({*now.values()}) == len({*then.values()}) == 1:
        return
    every = now | then
    pairs = [(then.get(layer, FLOAT), now.get(layer, FLOAT)) for layer in every]
    changed = [pair for pair in pairs if pair[0] != pair[1]]
    if changed:
        before, after = (_counted(side) for side in zip(*changed, strict=True))
        yield Change("file", f"schemes of {len(changed)} of {len(every)} layers", before, after, (name,))


def _counted(schemes: Sequence[str]) -> str:
    """Schemes, the most frequent first, with in how many layers each is."""
    counted = Counter(schemes).most_common()
    shown = ", ".join(f"{scheme} in {count}" for scheme, count in counted[:SCHEMES_SHOWN])
    return f"{shown} and {len(counted) - SCHEMES_SHOWN} more" if len(counted) > SCHEMES_SHOWN else shown


def _settings(run: RunRecord, variant: str) -> dict[str, Any]:
    variants = run.recipe.get("variants") or ()
    return _flat(next((settings for settings in variants if settings.get("name") == variant), None))


def _unlike(area: str, before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[Difference]:
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield area, f"{prefix}{key}", before.get(key), after.get(key)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of mappings with a name, as one mapping from path to value."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        value = {str(item["name"]): item for item in value}
    if not isinstance(value, Mapping):
        return {} if value is None and not prefix else {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _written(value: Any) -> str | None:
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(digest: str | None) -> str | None:
    return digest and digest[:SHORT_HASH]
