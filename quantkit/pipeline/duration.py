"""How long a run will take: its steps with the seconds that each is expected to take, and from what that is known.

What an earlier run in the history took, of the same model on the same machine by the same settings, counts where there
is one. All else is told from :mod:`quantkit.pipeline.machine_rates`, which is right to a factor of about three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.measured import known_anatomy
from quantkit.estimation.streaming import Scored, fits_whole, whole_scoring
from quantkit.evaluation.job import compute_dtype
from quantkit.pipeline.context import BASELINE, BASELINE_SERVED, SERVED
from quantkit.pipeline.machine_rates import Rates
from quantkit.pipeline.mixing import costs_folder, measured_alike, plain_or_like
from quantkit.pipeline.past_seconds import past_seconds
from quantkit.pipeline.titles import (
    BASELINE_TITLE,
    SENSITIVITY_TITLE,
    evaluation_title,
    library_title,
    mixing_title,
    recover_title,
    served_title,
    walk_title,
)
from quantkit.pipeline.work_seconds import END, START, Seconds
from quantkit.quantization import Job, walks
from quantkit.quantization.job import finished_variant, made_from
from quantkit.recipe import EvaluationSpec, Recipe, VariantSpec
from quantkit.recipe.evaluation import AUTO, STREAMED
from quantkit.system.artifacts import STAGE_FILE
from quantkit.system.devices import resolve_device
from quantkit.system.free_memory import free_bytes
from quantkit.system.pace import Ahead

if TYPE_CHECKING:
    from quantkit.source import SourceModel

ROUGH, KNOWN = 3.0, 1.3
"""Factors by which a measured stage may take more or less, and one that an earlier run tells."""
SERVER_START = 30.0
"""Seconds in which a server of another interpreter has begun."""
TASK_DOCUMENTS, TASK_TOKENS = 1000, 200
"""Of a task that has no limit; tokens of all that is read for a document."""


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a run will take.

    Attributes:
        ahead: its steps.
        past: by stage the number of the run in the history that it is known from.
        rates: that the others are told from.
        disk: bytes that the disk gives in a second.
    """

    ahead: tuple[Ahead, ...]
    past: Mapping[str, int]
    rates: Rates
    disk: float

    def to_json(self) -> dict[str, Any]:
        """``seconds``, ``low``, ``high``, ``by``, and ``stages`` with ``stage``, ``seconds`` and ``by`` of each."""
        stages: dict[str, float] = {}
        for step in self.ahead:
            stages[step.stage] = stages.get(step.stage, 0.0) + step.seconds
        factors = {stage: KNOWN if stage in self.past else ROUGH for stage in stages}
        return {
            "seconds": sum(stages.values()),
            "low": sum(seconds / factors[stage] for stage, seconds in stages.items()),
            "high": sum(seconds * factors[stage] for stage, seconds in stages.items()),
            "by": self._by(stages),
            "stages": [
                {"stage": stage, "seconds": seconds, "by": self._by([stage])} for stage, seconds in stages.items()
            ],
        }

    def _by(self, stages: Mapping[str, float] | Sequence[str]) -> str:
        runs = sorted({self.past[stage] for stage in stages if stage in self.past})
        told = [f"run {', '.join(map(str, runs))} of the history"] if runs else []
        if any(stage not in self.past for stage in stages):
            speed = f"{self.rates.products / 1e9:,.0f} GFLOP/s in {self.rates.dtype} on {self.rates.device}"
            told.append(f"a short measurement on this machine ({speed}, {self.disk / 1e6:,.0f} MB/s of disk)")
        return " and ".join(told)


def foreseen(recipe: Recipe, model: SourceModel, job: Job, tokens: int, *, anew: bool = False) -> Foreseen | None:
    """What a run will take from its baseline on.

    Args:
        recipe: what is run.
        model: its source.
        job: of quantizing.
        tokens: of the calibration set.
        anew: files are scored although their results are there.

    Returns:
        None for a model that transformers does not build by itself, of which nothing is known.
    """
    anatomy = known_anatomy(model.folder)
    if anatomy is None:
        return None
    work = _Work(recipe, anatomy, job, tokens)
    steps = [step for step in work.steps() if not work.is_done(step.stage, anew)]
    past = past_seconds(recipe, model)
    spent = {stage: sum(step.seconds for step in steps if step.stage == stage) for stage in past}
    moved = [
        replace(step, seconds=step.seconds * past[step.stage][1] / spent[step.stage]) if spent.get(step.stage) else step
        for step in steps
    ]
    there = {stage: number for stage, (number, _) in past.items() if spent.get(stage)}
    return Foreseen(tuple(moved), there, work.takes.pass_rates, work.takes.disk)


class _Work:
    """The work of a run: how much of what there is, and how long that takes here."""

    def __init__(self, recipe: Recipe, anatomy: Anatomy, job: Job, tokens: int) -> None:
        self.recipe, self.anatomy, self.job, self.tokens = recipe, anatomy, job, tokens
        self.takes = Seconds(recipe, anatomy, job, tokens)
        self.streams = _streams(recipe, anatomy, resolve_device(recipe.evaluation.device))
        self.mixes = measured_alike(recipe.own_variants)
        self.own = [plain_or_like(job, variant, recipe.folder) for variant in recipe.own_variants]

    def steps(self) -> Iterator[Ahead]:
        """All of them, in the order of a run."""
        yield from self._scorings(BASELINE_TITLE, BASELINE)
        own = self.own
        if self.recipe.calibration.wants_sensitivity:
            yield Ahead(SENSITIVITY_TITLE, "block", self.takes.sensitivity(), SENSITIVITY_TITLE)
        for mixes in self.mixes:
            yield Ahead(mixing_title(mixes), "block", self.takes.measuring(mixes[0]), "choose bits")
        for places in walks(self.job, own):
            group = [own[place] for place in places]
            like = "quantize " + ", ".join(variant.chain for variant in group)
            yield Ahead(walk_title(group), "block", self.takes.walk(group), like)
            for variant in group:
                yield from self._scorings(evaluation_title(variant.name), variant.name)
        for library in self.recipe.library_variants:
            yield Ahead(library_title(library), "", self.takes.library(), "library")
            yield from self._scorings(evaluation_title(library.name), library.name)
        for trained in self.recipe.recover_variants:
            yield Ahead(recover_title(trained), "step", self.takes.training(trained), "recover")
            yield from self._scorings(evaluation_title(trained.name), trained.name)

    def is_done(self, stage: str, anew: bool) -> bool:
        """Whether a stage's result lies there, so that it will hardly take time."""
        if stage == BASELINE_TITLE:
            return not anew and (self.recipe.folder / BASELINE / STAGE_FILE).exists()
        own, folder = self.own, self.recipe.folder
        server = self.recipe.evaluation.as_served
        if server is not None and stage == served_title(BASELINE, server.loader):
            return not anew and (folder / BASELINE_SERVED / STAGE_FILE).exists()
        if stage == SENSITIVITY_TITLE:
            return (folder / SENSITIVITY_TITLE / STAGE_FILE).exists()
        for mixes in self.mixes:
            if stage == mixing_title(mixes):
                return (costs_folder(mixes[0], folder) / STAGE_FILE).exists() or mixes[0].allocation is not None
        for places in walks(self.job, own):
            group = [own[place] for place in places]
            if stage == walk_title(group):
                return all(map(self._is_made, group))
        scored = folder / "evaluations"
        every = [*self.recipe.variants, *own]
        names = {evaluation_title(each.name): each for each in every}
        if server is not None and stage not in names:
            scored = folder / SERVED
            names = {served_title(each.name, server.loader): each for each in every}
        variant = names.get(stage)
        made = isinstance(variant, VariantSpec) and self._is_made(variant)
        return not anew and variant is not None and made and (scored / variant.name / STAGE_FILE).exists()

    def _is_made(self, variant: VariantSpec) -> bool:
        folder = self.recipe.folder / "variants" / variant.name
        return finished_variant(folder, made_from(self.job, variant)) is not None

    def _scorings(self, title: str, name: str) -> Iterator[Ahead]:
        """The scoring of a file, and the one as it is served."""
        spec = self.recipe.evaluation
        yield from self._evaluation(title, spec)
        if spec.as_served is not None:
            served = served_title(name, spec.as_served.loader)
            yield Ahead(served, "", SERVER_START, "server")
            yield from self._evaluation(served, spec.as_served)

    def _evaluation(self, title: str, spec: EvaluationSpec) -> Iterator[Ahead]:
        read, written = self.takes.reading, self.takes.writing
        size = self.anatomy.parameters * 2
        if self.streams and not spec.is_served:
            yield from self._streamed(title, spec, size)
            return
        yield Ahead(title, "load", START + size / self.takes.disk, "load")
        if "speed" in spec.metrics or "memory" in spec.metrics:
            yield Ahead(title, "", read(4 * spec.context_length) + written(96), "speed")
        for text in spec.texts:
            beside = spec.max_tokens * self.anatomy.vocabulary * 20 / self.takes.scoring_rates.nbytes
            yield Ahead(title, text.name, read(spec.max_tokens) + beside, f"text {text.name}")
        for task in spec.tasks:
            yield Ahead(title, task.label, read((task.limit or TASK_DOCUMENTS) * TASK_TOKENS), f"task {task.label}")
        yield from self._written(title, spec)

    def _streamed(self, title: str, spec: EvaluationSpec, size: int) -> Iterator[Ahead]:
        """The same of a model that is read a block at a time, once for all texts."""
        tokens = len(spec.texts) * spec.max_tokens
        yield Ahead(title, "load", START, "load")
        yield Ahead(title, "blocks", self.takes.reading(tokens) + size / self.takes.disk, "blocks")
        rows, columns = self.anatomy.head_shape
        for text in spec.texts:
            head = spec.max_tokens * 2 * rows * columns / self.takes.scoring_rates.products
            beside = spec.max_tokens * rows * 20 / self.takes.scoring_rates.nbytes
            yield Ahead(title, text.name, head + beside, f"text {text.name}")
        for task in spec.tasks:
            tokens = (task.limit or TASK_DOCUMENTS) * TASK_TOKENS
            yield Ahead(title, task.label, self.takes.reading(tokens) + size / self.takes.disk, f"task {task.label}")
        yield Ahead(title, "", END, "close")

    def _written(self, title: str, spec: EvaluationSpec) -> Iterator[Ahead]:
        if spec.answers is not None:
            count = spec.answers.samples
            seconds = self.takes.reading(64 * count) + self.takes.writing(count * spec.answers.max_new_tokens)
            yield Ahead(title, "answers", seconds, "answers")
        if spec.samples is not None:
            count = spec.samples.count or len(spec.samples.prompts) or spec.samples.DRAWN
            yield Ahead(title, "samples", self.takes.writing(count * spec.samples.max_new_tokens), "samples")
        yield Ahead(title, "", END, "close")


def _streams(recipe: Recipe, anatomy: Anatomy, device: torch.device) -> bool:
    """Whether the float model will be read a block at a time to be scored."""
    spec = recipe.evaluation
    if spec.loader != AUTO:
        return spec.loader == STREAMED
    dtype = compute_dtype(spec.dtype, device.type) or anatomy.dtype
    scored = Scored(len(spec.texts) * spec.max_tokens, spec.context_length, dtype, device.type)
    return not fits_whole(whole_scoring(anatomy, scored, pages=False), free_bytes(device, recipe.max_memory))
