"""How long a run will take: its steps with the seconds that each is expected to take, and from what that is known.

What an earlier run in the history took, of the same model on the same machine by the same settings, counts where there
is one. All else is told from :mod:`quantkit.pipeline.machine_rates`, which is right to a factor of about three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from quantkit.allocation.measuring import HELD_OUT_TOKENS
from quantkit.checkpoint import FLOATS
from quantkit.engine.precision import pass_dtype
from quantkit.errors import QuantkitError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.measured import known_anatomy
from quantkit.estimation.streaming import Scored, fits_whole, whole_scoring
from quantkit.estimation.tuning import step_tokens
from quantkit.evaluation.job import compute_dtype
from quantkit.methods.tuning import TuneOptions
from quantkit.pipeline.context import BASELINE, BASELINE_SERVED, SERVED
from quantkit.pipeline.machine_rates import Rates, disk_rate, rates, solving_seconds
from quantkit.pipeline.mixing import costs_folder, measured_alike, plain_or_like
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
from quantkit.quantization import Job, walks
from quantkit.quantization.generated import generated_tokens
from quantkit.quantization.job import finished_variant, made_from
from quantkit.recipe import AutoSpec, EvaluationSpec, LibrarySpec, Recipe, RecoverSpec, VariantSpec
from quantkit.recipe.evaluation import AUTO, STREAMED
from quantkit.run_history.record import RunRecord, private
from quantkit.run_history.store import History
from quantkit.run_history.store import Wanted as WantedRuns
from quantkit.runtimes._writing import ROWS
from quantkit.system.artifacts import STAGE_FILE, fingerprint
from quantkit.system.devices import resolve_device
from quantkit.system.environment import describe
from quantkit.system.free_memory import free_bytes
from quantkit.system.pace import Ahead

if TYPE_CHECKING:
    from quantkit.source import SourceModel

ROUGH, KNOWN = 3.0, 1.3
"""Factors by which a measured stage may take more or less, and one that an earlier run tells."""
ATTENTION = 1.5
"""What a pass takes beside the products of its weights."""
START, END = 6.0, 1.5
"""Seconds in which a process that scores is there, and is gone."""
SERVER_START = 30.0
"""Seconds in which a server of another interpreter has begun."""
CALL = 5e-4
"""Seconds that a block takes for a single token beside reading its weights."""
TASK_DOCUMENTS, TASK_TOKENS = 1000, 200
"""Of a task that has no limit; tokens of all that is read for a document."""
TRANSFORMED = 3.0
"""How much longer solving takes with a transform that searches its factors."""
STEP = 3.0
"""Forward passes of the same tokens that a step of tuning takes."""
LOOKS = 5
"""How often all that is held out is run."""
GROUPS = 4
"""How often a block is run anew for the groups of its layers, and for the float model."""
BACKWARD = 4
"""Forward passes that a pass backward takes beside the first."""
DECODED = 60.0
"""Bytes that are moved for a weight when it is decoded and gets a gradient."""


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
    past = _past(recipe, model)
    spent = {stage: sum(step.seconds for step in steps if step.stage == stage) for stage in past}
    moved = [
        replace(step, seconds=step.seconds * past[step.stage][1] / spent[step.stage]) if spent.get(step.stage) else step
        for step in steps
    ]
    there = {stage: number for stage, (number, _) in past.items() if spent.get(stage)}
    return Foreseen(tuple(moved), there, work.pass_rates, work.disk)


class _Work:
    """The work of a run: how much of what there is, and how long that takes here."""

    def __init__(self, recipe: Recipe, anatomy: Anatomy, job: Job, tokens: int) -> None:
        self.recipe, self.anatomy, self.job, self.tokens = recipe, anatomy, job, tokens
        device, scored_on = resolve_device(job.device), resolve_device(recipe.evaluation.device)
        widths = (anatomy.hidden, max(anatomy.wide, anatomy.hidden))
        self.device = str(device)
        dtype = pass_dtype(device, FLOATS[job.dtype])
        self.pass_rates, self.job_bytes = rates(self.device, dtype, *widths), dtype.itemsize
        scored_in = torch.float32 if scored_on.type == "cpu" else torch.bfloat16
        self.scoring_rates = rates(str(scored_on), scored_in, *widths)
        self.disk = disk_rate(recipe.folder)
        self.scored_bytes = 4 if scored_on.type == "cpu" else 2
        self.streams = _streams(recipe, anatomy, scored_on)
        self.mixes = measured_alike(recipe.own_variants)
        self.own = [plain_or_like(job, variant, recipe.folder) for variant in recipe.own_variants]
        linear = [weight for weight in anatomy.weights if weight.kind == "linear" and weight.block is not None]
        self.shapes = [weight.matrix for weight in linear]
        self.active = sum(weight.numel * weight.share for weight in linear)

    def steps(self) -> Iterator[Ahead]:
        """All of them, in the order of a run."""
        yield from self._scorings(BASELINE_TITLE, BASELINE)
        own = self.own
        if self.recipe.calibration.wants_sensitivity:
            seconds = self._passing((1 + BACKWARD) * self.tokens)
            yield Ahead(SENSITIVITY_TITLE, "block", seconds, SENSITIVITY_TITLE)
        for mixes in self.mixes:
            yield Ahead(mixing_title(mixes), "block", self._measuring(mixes[0]), "choose bits")
        for places in walks(self.job, own):
            group = [own[place] for place in places]
            like = "quantize " + ", ".join(variant.chain for variant in group)
            yield Ahead(walk_title(group), "block", self._walk(group), like)
            for variant in group:
                yield from self._scorings(evaluation_title(variant.name), variant.name)
        for library in self.recipe.library_variants:
            yield Ahead(library_title(library), "", self._library(), "library")
            yield from self._scorings(evaluation_title(library.name), library.name)
        for trained in self.recipe.recover_variants:
            yield Ahead(recover_title(trained), "step", self._training(trained), "recover")
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
        read, written = self._reading, self._writing
        size = self.anatomy.parameters * 2
        if self.streams and not spec.is_served:
            yield from self._streamed(title, spec, size)
            return
        yield Ahead(title, "load", START + size / self.disk, "load")
        if "speed" in spec.metrics or "memory" in spec.metrics:
            yield Ahead(title, "", read(4 * spec.context_length) + written(96), "speed")
        for text in spec.texts:
            beside = spec.max_tokens * self.anatomy.vocabulary * 20 / self.scoring_rates.nbytes
            yield Ahead(title, text.name, read(spec.max_tokens) + beside, f"text {text.name}")
        for task in spec.tasks:
            yield Ahead(title, task.label, read((task.limit or TASK_DOCUMENTS) * TASK_TOKENS), f"task {task.label}")
        yield from self._written(title, spec)

    def _streamed(self, title: str, spec: EvaluationSpec, size: int) -> Iterator[Ahead]:
        """The same of a model that is read a block at a time, once for all texts."""
        tokens = len(spec.texts) * spec.max_tokens
        yield Ahead(title, "load", START, "load")
        yield Ahead(title, "blocks", self._reading(tokens) + size / self.disk, "blocks")
        rows, columns = self.anatomy.head_shape
        for text in spec.texts:
            head = spec.max_tokens * 2 * rows * columns / self.scoring_rates.products
            beside = spec.max_tokens * rows * 20 / self.scoring_rates.nbytes
            yield Ahead(title, text.name, head + beside, f"text {text.name}")
        for task in spec.tasks:
            tokens = (task.limit or TASK_DOCUMENTS) * TASK_TOKENS
            yield Ahead(title, task.label, self._reading(tokens) + size / self.disk, f"task {task.label}")
        yield Ahead(title, "", END, "close")

    def _written(self, title: str, spec: EvaluationSpec) -> Iterator[Ahead]:
        if spec.answers is not None:
            count = spec.answers.samples
            seconds = self._reading(64 * count) + self._writing(count * spec.answers.max_new_tokens)
            yield Ahead(title, "answers", seconds, "answers")
        if spec.samples is not None:
            count = spec.samples.count or len(spec.samples.prompts) or spec.samples.DRAWN
            yield Ahead(title, "samples", self._writing(count * spec.samples.max_new_tokens), "samples")
        yield Ahead(title, "", END, "close")

    def _reading(self, tokens: int) -> float:
        """Seconds in which a model that is scored reads tokens."""
        return tokens * 2 * self.anatomy.active * ATTENTION / self.scoring_rates.products

    def _writing(self, tokens: int) -> float:
        """Seconds in which it writes tokens one by one, each of which reads all weights."""
        moved = 2 * self.anatomy.active * self.scored_bytes / self.scoring_rates.nbytes
        return tokens * (moved + CALL * self.anatomy.blocks)

    def _walk(self, variants: Sequence[VariantSpec]) -> float:
        """Seconds of a walk: the passes, what is gathered of them, and what each variant's method takes."""
        found = 0.0
        width = max((width for _, width in self.shapes), default=0)
        written = max(generated_tokens(self.job, variant, self.tokens, width) for variant in variants)
        tokens = self.tokens + written
        if written:
            found += self._generating(written)
        if any(variant.calibrated for variant in variants):
            found += self._passing(tokens)
        if any(variant.needs() for variant in variants):
            found += self._gathering(tokens)
        weights = sum(height * width for height, width in self.shapes)
        for variant in variants:
            solved = solving_seconds(variant, self.shapes, self.device)
            transforms = TRANSFORMED if variant.build_transforms() else 1.0
            found += transforms * (weights * 100 / self.pass_rates.nbytes if solved is None else solved)
            found += weights * 12 / self.pass_rates.nbytes + weights / self.disk
            found += 0.0 if variant.tune is None else self._tuning(variant.tune, tokens)
        return found

    def _measuring(self, spec: AutoSpec) -> float:
        """Seconds in which it is measured what choices cost: a walk, what each takes to solve, the model backward."""
        solved = [spec.uniform(name) for name, scheme in spec.choice_schemes().items() if scheme is not None]
        weights = sum(height * width for height, width in self.shapes)
        each = [solving_seconds(variant, self.shapes, self.device) for variant in solved]
        seconds = [weights * 100 / self.pass_rates.nbytes if known is None else known for known in each]
        passes = self._passing(self.tokens + BACKWARD * min(self.tokens, HELD_OUT_TOKENS))
        return (
            passes + self._gathering(self.tokens) + sum(seconds) + len(solved) * weights * 12 / self.pass_rates.nbytes
        )

    def _passing(self, tokens: float) -> float:
        """Seconds of a pass of tokens through the blocks."""
        return tokens * 2 * self.active * ATTENTION / self.pass_rates.products

    def _generating(self, tokens: int) -> float:
        """Seconds in which the float model is loaded and writes tokens, many rows at a time."""
        size = self.job_bytes
        moved = tokens / ROWS * (self.anatomy.active * size / self.pass_rates.nbytes + CALL * self.anatomy.blocks)
        return START + self.anatomy.parameters * size / self.disk + self._passing(tokens) + moved

    def _tuning(self, options: TuneOptions, tokens: int) -> float:
        """Seconds in which every block is tuned: further passes, the steps, and what is held out to judge them.

        At each step all weights of the block are decoded, and have gradients.
        """
        weights = sum(height * width for height, width in self.shapes)
        widest = max((width for _, width in self.shapes), default=0)
        steps = options.steps_for(rounding=options.rounds(tokens, widest))
        stepped = steps * step_tokens(options, tokens) * STEP
        passed = (GROUPS + LOOKS * options.held_out) * tokens
        moved = steps * weights * DECODED / self.pass_rates.nbytes
        return self._passing(passed + stepped) + moved

    def _gathering(self, tokens: int) -> float:
        """Seconds in which products of inputs with themselves are summed."""
        shapes = {weight.layer: weight.matrix for weight in self.anatomy.weights if weight.kind == "linear"}
        widths = [shapes[each.layers[0]][1] for each in self.anatomy.inputs if each.layers[0] in shapes]
        one = sum(tokens * 2 * width**2 for width in widths)
        return self.anatomy.blocks * one / self.pass_rates.products

    def _training(self, variant: RecoverSpec) -> float:
        """Seconds of a training: the float model, and forward, again forward and backward through the quantized one."""
        tokens, head = variant.steps * variant.batch_tokens, self.anatomy.vocabulary * self.anatomy.hidden
        return tokens * 2 * (5 * self.active * ATTENTION + 4 * head) / self.pass_rates.products

    def _library(self) -> float:
        """Seconds of another library, of which nothing is known: twice what a pass with its statistics takes."""
        weights = sum(height * width for height, width in self.shapes)
        return START + 2 * (self._passing(self.tokens) + self._gathering(self.tokens)) + weights / self.disk


def _streams(recipe: Recipe, anatomy: Anatomy, device: torch.device) -> bool:
    """Whether the float model will be read a block at a time to be scored."""
    spec = recipe.evaluation
    if spec.loader != AUTO:
        return spec.loader == STREAMED
    dtype = compute_dtype(spec.dtype, device.type) or anatomy.dtype
    scored = Scored(len(spec.texts) * spec.max_tokens, spec.context_length, dtype, device.type)
    return not fits_whole(whole_scoring(anatomy, scored, pages=False), free_bytes(device, recipe.max_memory))


def _past(recipe: Recipe, model: SourceModel) -> dict[str, tuple[int, float]]:
    """By stage the number of the newest run like this one and the seconds that it took there."""
    try:
        runs = History(recipe.history_file).runs(WantedRuns()) if recipe.history_file.exists() else []
    except QuantkitError:
        return {}  # what cannot be read tells nothing here; who needs it is told
    machine, given = describe(), private(recipe.resolved())
    source = fingerprint(model.made_from())
    here = (str(machine["cpu"] or ""), machine["cores"], machine["device"], source)
    found: dict[str, tuple[int, float]] = {}
    for run in runs:
        if (run.cpu, run.cores, run.device, run.source_fingerprint) == here and run.id is not None:
            found |= {stage: (run.id, seconds) for stage, seconds in _stages(recipe, run, given)}
    return found


def _stages(recipe: Recipe, run: RunRecord, given: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The stages of a recipe that a run did by the same settings, with their seconds."""
    alike = {key: run.recipe.get(key) == given[key] for key in ("evaluation", "calibration", "quantization")}
    then = {each.get("name"): each for each in run.recipe.get("variants", ())}
    now = {each["name"]: each for each in given["variants"]}
    if alike["evaluation"] and run.baseline is not None:
        yield from _seconds(BASELINE_TITLE, run.baseline.figures.get(("seconds", "", "evaluate")), START + END)
    shared = recipe.calibration.inputs == "float"
    for variant in recipe.variants:
        record = run.variant(variant.name)
        if record is None or then.get(variant.name) != now.get(variant.name):
            continue
        if alike["evaluation"]:
            seconds = record.figures.get(("seconds", "", "evaluate"))
            yield from _seconds(evaluation_title(variant.name), seconds, START + END)
        apart = isinstance(variant, LibrarySpec | RecoverSpec) or (variant.calibrated and not shared)
        alone = apart or len(recipe.variants) == 1
        if alone and alike["calibration"] and alike["quantization"]:
            title = (
                library_title(variant)
                if isinstance(variant, LibrarySpec)
                else recover_title(variant)
                if isinstance(variant, RecoverSpec)
                else walk_title([variant])
            )
            yield from _seconds(title, record.figures.get(("seconds", "", "quantize")))


def _seconds(stage: str, seconds: float | None, around: float = 0.0) -> Iterator[tuple[str, float]]:
    """A stage and its seconds, those of the process around what was timed with them."""
    if seconds:
        yield stage, seconds + around
