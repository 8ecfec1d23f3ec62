"""The plan of a run: its stages and the estimated bytes of its variants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration import load
from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.precision import pass_dtype
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantkitError
from quantkit.isolation.forecast import library_forecast
from quantkit.merging import merged_source
from quantkit.pipeline import needs_calibration, quantize_job
from quantkit.pipeline.duration import foreseen
from quantkit.pipeline.mixing import given_back, known_choice, mixed_scheme, prospect
from quantkit.pipeline.preflight import preflight
from quantkit.pipeline.stage_needs import check_bounds, stage_needs
from quantkit.quantization.calibration_need import few_tokens
from quantkit.quantization.foreseen import planned_bytes
from quantkit.quantization.generated import generated_tokens, widest_input
from quantkit.quantization.job import Job, finished_variant, made_from
from quantkit.quantization.memory_use import choose_strategy
from quantkit.quantization.plan import Layers, plan_layers
from quantkit.recipe import AutoSpec, LibrarySpec, Recipe, RecoverSpec, VariantSpec
from quantkit.system.artifacts import STAGE_FILE
from quantkit.system.devices import resolve_device
from quantkit.system.progress import Silent
from quantkit.system.units import in_units

BARRED = "cannot run"
"""How the state of a variant begins that cannot."""


def forecast(recipe: Recipe) -> dict[str, Any]:
    """The stages of a run and the estimated bytes of its variants.

    Returns:
        ``folder``, ``source``, ``calibration`` (or None), ``baseline``, ``warnings``, ``time`` (None, or the
        ``seconds`` that the run takes from its baseline on, between ``low`` and ``high``, ``by`` what that is known,
        and its ``stages``), ``precision`` (None, or ``asked`` and ``max_tokens``), ``stages`` (what each takes, see
        :meth:`quantkit.estimation.stages.StageNeed.to_json`; none
        for a model that transformers does not build), and ``variants``, each with
        ``name``, ``state`` (beginning with ``finished``, ``to do`` or ``cannot run``), ``method``, ``format``,
        ``scheme``, ``schemes`` (each that occurs to its number of layers), ``layers`` (quantized, all), ``share`` (of
        the weights in the blocks' matrices that is quantized, or None), ``notes`` (what stays float and why),
        ``size_bytes`` (of its files with tensors, headers too; None where a library alone knows it) and ``strategy``.
    """
    preflight(recipe)
    model = merged_source(recipe.model, recipe.merge, recipe.folder, Silent())
    skeleton = Skeleton(model.folder, recipe.model.trust_remote_code)
    skeleton.check_blocks()
    reader = CheckpointReader(model.folder)
    calibrated = recipe.folder / "calibration"
    found = load(calibrated) if needs_calibration(recipe) and (calibrated / STAGE_FILE).exists() else None
    tokens = recipe.calibration.samples * recipe.calibration.max_length if found is None else found.tokens
    job = quantize_job(recipe, model, found)
    variants = _Variants(recipe.folder, job, resolve_device(job.device), skeleton, tokens)
    found_of: dict[str, dict[str, Any]] = {}
    for variant in recipe.variants:
        found_of[variant.name] = (
            _trained(variants, variant, found_of[variant.recover])
            if isinstance(variant, RecoverSpec)
            else _told(variants, variant)
        )
    told = list(found_of.values())
    able = [spec for spec, each in zip(recipe.variants, told, strict=True) if not each["state"].startswith(BARRED)]
    narrowed = recipe.model_copy(update={"variants": tuple(able)})
    needs = stage_needs(narrowed, model, job, tokens)
    check_bounds(needs or (), recipe)
    ahead = foreseen(narrowed, model, job, tokens)
    return {
        "folder": str(recipe.folder),
        "source": {
            "reference": model.reference,
            "folder": str(model.folder),
            "size_bytes": sum(reader.nbytes(name) for name in reader.names()),
            "dtype": model.dtype,
        },
        "calibration": _calibration_state(recipe, calibrated),
        "baseline": _evaluation_state(recipe.folder / "baseline"),
        "warnings": [*recipe.warnings(), *filter(None, [model.note]), *model.notes],
        "time": None if ahead is None else ahead.to_json(),
        "precision": _precision(recipe),
        "stages": [need.to_json() for need in needs or ()],
        "variants": told,
    }


def _precision(recipe: Recipe) -> dict[str, Any] | None:
    spec = recipe.evaluation
    return None if spec.precision is None else {"asked": spec.precision, "max_tokens": spec.max_tokens}


def _told(variants: _Variants, variant: VariantSpec | LibrarySpec) -> dict[str, Any]:
    """A variant, or the reason why it cannot run, which is no reason to say nothing of the others."""
    try:
        return variants.of(variant)
    except QuantkitError as error:
        scheme = variant.base_scheme().describe() if isinstance(variant, VariantSpec) else ""
        scheme = mixed_scheme(variant) if isinstance(variant, AutoSpec) else scheme
        return {
            "name": variant.name,
            "state": f"{BARRED}: {error}",
            "method": variant.chain if isinstance(variant, VariantSpec) else variant.label,
            "format": variant.format if isinstance(variant, VariantSpec) else variant.stores(),
            "scheme": scheme,
            "schemes": {},
            "layers": (0, 0),
            "share": None,
            "notes": [],
            "size_bytes": None,
            "strategy": "",
        }


def _trained(variants: _Variants, variant: RecoverSpec, original: Mapping[str, Any]) -> dict[str, Any]:
    """What a training makes of another variant: a file of the same size."""
    barred = str(original["state"]).startswith(BARRED)
    there = (variants.folder / variant.name / STAGE_FILE).exists()
    return {
        **original,
        "name": variant.name,
        "state": f"{BARRED}: {variant.recover} cannot" if barred else "there, to be checked" if there else "to do",
        "method": f"{original['method']}+{variant.chain}",
        "notes": [],
        "strategy": "trained, a block in memory",
    }


@dataclass(frozen=True, slots=True)
class _Variants:
    """What is to be told of the variants of a run.

    Attributes:
        run: the folder of the run.
        job: which they share.
        device: on which they are quantized.
        skeleton: the model.
        tokens: with which they are calibrated.
    """

    run: Path
    job: Job
    device: torch.device
    skeleton: Skeleton
    tokens: int

    @property
    def folder(self) -> Path:
        """In which they lie, or will."""
        return self.run / "variants"

    def of(self, variant: VariantSpec | LibrarySpec) -> dict[str, Any]:
        """One of them, see :func:`forecast`."""
        if isinstance(variant, LibrarySpec):
            return library_forecast(self.job, variant, self.skeleton, self.folder / variant.name)
        if isinstance(variant, AutoSpec):
            return self._mixed(variant)
        return self._plain(variant)

    def _mixed(self, spec: AutoSpec) -> dict[str, Any]:
        """One that is mixed: as it was chosen by an earlier run, or what there is to choose from."""
        known = known_choice(self.job, spec, self.run)
        if known is None and spec.allocation is not None:
            known = given_back(self.job, spec, self.skeleton)
        if known is not None:
            return {**self._plain(known.variant), "scheme": mixed_scheme(spec), "notes": [known.line()]}
        found = prospect(self.job, spec, self.skeleton)
        names = ", ".join(spec.choice_patches())
        told = [
            f"a choice for each of {found.layers} layers, to be measured: {names}",
            f"the file takes {in_units(found.least)} to {in_units(found.most)} by what is chosen",
        ]
        return {
            **self._plain(found.smallest),
            "scheme": mixed_scheme(spec),
            "schemes": {},
            "notes": told,
            "size_bytes": found.wanted,
        }

    def _plain(self, variant: VariantSpec) -> dict[str, Any]:
        """One of which the scheme of each layer is known."""
        layers = plan_layers(self.skeleton, variant)
        stored = finished_variant(self.folder / variant.name, made_from(self.job, variant))
        return {
            "name": variant.name,
            "state": _variant_state(stored is not None, calibrated=variant.calibrated),
            "method": variant.chain,
            "format": variant.format,
            "scheme": variant.base_scheme().describe(),
            "schemes": dict(Counter(scheme.describe() for scheme in layers.quantized.values()).most_common()),
            "layers": (len(layers.quantized), len(layers.schemes)),
            "share": layers.share,
            "notes": [*layers.notes, *self._few_tokens(variant, layers), *self._generated(variant)],
            "size_bytes": planned_bytes(self.job, self.skeleton, variant, layers),
            "strategy": self._strategy(variant),
        }

    def _few_tokens(self, variant: VariantSpec, layers: Layers) -> list[str]:
        """What is to be said where even the whole calibration set is small for a variant."""
        shapes = {name: layers.shapes[name] for name in layers.quantized if name != layers.embedding}
        return few_tokens(variant.build_method(), variant.build_transforms(), shapes, self._tokens(variant))

    def _tokens(self, variant: VariantSpec) -> int:
        """With which a variant is calibrated, those that the float model writes among them."""
        return self.tokens + generated_tokens(self.job, variant, self.tokens, widest_input(self.skeleton))

    def _generated(self, variant: VariantSpec) -> list[str]:
        """What is to be said where the float model writes tokens."""
        written = self._tokens(variant) - self.tokens
        return [f"the float model writes up to {written:,} tokens to calibrate on"] if written else []

    def _strategy(self, variant: VariantSpec) -> str:
        if not variant.calibrated:
            return "weights only"
        if self.job.inputs == "float":
            return "one walk for all"
        dtype = pass_dtype(self.device, FLOATS[self.job.dtype])
        corrected, tuned = variant.build_method().corrects, variant.tune is not None
        return choose_strategy(
            self.skeleton, self._tokens(variant), dtype, self.device, corrected, tuned, self.job.bounds
        )


def _variant_state(finished: bool, calibrated: bool) -> str:
    if not finished:
        return "to do"
    return "finished, for the calibration set that is there" if calibrated else "finished"


def _calibration_state(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    if not needs_calibration(recipe):
        return None
    spec = recipe.calibration
    state = "there, to be checked" if (folder / STAGE_FILE).exists() else "to do"
    return {"dataset": spec.dataset, "samples": spec.samples, "max_length": spec.max_length, "state": state}


def _evaluation_state(folder: Path) -> str:
    if not (folder / STAGE_FILE).exists():
        return "to do"
    return "there, to be checked"
