"""The seconds that pieces of a run's work take: counted products and bytes by the rates of this machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.allocation.measuring import HELD_OUT_TOKENS
from quantkit.checkpoint import FLOATS
from quantkit.engine.precision import pass_dtype
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.tuning import step_tokens
from quantkit.methods.tuning import TuneOptions
from quantkit.pipeline.machine_rates import disk_rate, rates, solving_seconds
from quantkit.quantization import Job
from quantkit.quantization.generated import generated_tokens
from quantkit.recipe import AutoSpec, EvaluationSpec, Recipe, RecoverSpec, VariantSpec
from quantkit.runtimes._writing import ROWS
from quantkit.system.devices import resolve_device

ATTENTION = 1.5
"""What a pass takes beside the products of its weights."""
START, END = 6.0, 1.5
"""Seconds in which a process that scores is there, and is gone."""
CALL = 5e-4
"""Seconds that a block takes for a single token beside reading its weights."""
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


class Seconds:
    """What this machine takes for pieces of the work of a run.

    Args:
        recipe: what is run.
        anatomy: of the model.
        job: of quantizing.
        tokens: of the calibration set.

    Attributes:
        pass_rates: of passes through the blocks while quantizing.
        scoring_rates: of models that are scored.
        disk: bytes that the disk gives in a second.
    """

    def __init__(self, recipe: Recipe, anatomy: Anatomy, job: Job, tokens: int) -> None:
        self.anatomy, self.job, self.tokens = anatomy, job, tokens
        device, scored_on = resolve_device(job.device), resolve_device(recipe.evaluation.device)
        widths = (anatomy.hidden, max(anatomy.wide, anatomy.hidden))
        self.device = str(device)
        dtype = pass_dtype(device, FLOATS[job.dtype])
        self.pass_rates, self.job_bytes = rates(self.device, dtype, *widths), dtype.itemsize
        scored_in = torch.float32 if scored_on.type == "cpu" else torch.bfloat16
        self.scoring_rates = rates(str(scored_on), scored_in, *widths)
        self.disk = disk_rate(recipe.folder)
        self.scored_bytes = 4 if scored_on.type == "cpu" else 2
        linear = [weight for weight in anatomy.weights if weight.kind == "linear" and weight.block is not None]
        self.shapes = [weight.matrix for weight in linear]
        self.active = sum(weight.numel * weight.share for weight in linear)

    def scoring(self, spec: EvaluationSpec) -> float:
        """Seconds in which a process reads the texts of an evaluation, from its start to its end."""
        return START + self.reading(spec.max_tokens * len(spec.texts)) + END

    def reading(self, tokens: int) -> float:
        """Seconds in which a model that is scored reads tokens."""
        return tokens * 2 * self.anatomy.active * ATTENTION / self.scoring_rates.products

    def writing(self, tokens: int) -> float:
        """Seconds in which it writes tokens one by one, each of which reads all weights."""
        moved = 2 * self.anatomy.active * self.scored_bytes / self.scoring_rates.nbytes
        return tokens * (moved + CALL * self.anatomy.blocks)

    def walk(self, variants: Sequence[VariantSpec]) -> float:
        """Seconds of a walk: the passes, what is gathered of them, and what each variant's method takes."""
        found = 0.0
        width = max((width for _, width in self.shapes), default=0)
        written = max(generated_tokens(self.job, variant, self.tokens, width) for variant in variants)
        tokens = self.tokens + written
        if written:
            found += self.generating(written)
        if any(variant.calibrated for variant in variants):
            found += self.passing(tokens)
        if any(variant.needs() for variant in variants):
            found += self.gathering(tokens)
        weights = sum(height * width for height, width in self.shapes)
        for variant in variants:
            solved = solving_seconds(variant, self.shapes, self.device)
            transforms = TRANSFORMED if variant.build_transforms() else 1.0
            found += transforms * (weights * 100 / self.pass_rates.nbytes if solved is None else solved)
            found += weights * 12 / self.pass_rates.nbytes + weights / self.disk
            found += 0.0 if variant.tune is None else self.tuning(variant.tune, tokens)
        return found

    def measuring(self, spec: AutoSpec) -> float:
        """Seconds in which it is measured what choices cost: a walk, what each takes to solve, the model backward."""
        solved = [spec.uniform(name) for name, scheme in spec.choice_schemes().items() if scheme is not None]
        weights = sum(height * width for height, width in self.shapes)
        each = [solving_seconds(variant, self.shapes, self.device) for variant in solved]
        seconds = [weights * 100 / self.pass_rates.nbytes if known is None else known for known in each]
        passes = self.passing(self.tokens + BACKWARD * min(self.tokens, HELD_OUT_TOKENS))
        return passes + self.gathering(self.tokens) + sum(seconds) + len(solved) * weights * 12 / self.pass_rates.nbytes

    def sensitivity(self) -> float:
        """Seconds of a pass of the calibration set forward and back."""
        return self.passing((1 + BACKWARD) * self.tokens)

    def passing(self, tokens: float) -> float:
        """Seconds of a pass of tokens through the blocks."""
        return tokens * 2 * self.active * ATTENTION / self.pass_rates.products

    def generating(self, tokens: int) -> float:
        """Seconds in which the float model is loaded and writes tokens, many rows at a time."""
        size = self.job_bytes
        moved = tokens / ROWS * (self.anatomy.active * size / self.pass_rates.nbytes + CALL * self.anatomy.blocks)
        return START + self.anatomy.parameters * size / self.disk + self.passing(tokens) + moved

    def tuning(self, options: TuneOptions, tokens: int) -> float:
        """Seconds in which every block is tuned: further passes, the steps, and what is held out to judge them.

        At each step all weights of the block are decoded, and have gradients.
        """
        weights = sum(height * width for height, width in self.shapes)
        widest = max((width for _, width in self.shapes), default=0)
        steps = options.steps_for(rounding=options.rounds(tokens, widest))
        stepped = steps * step_tokens(options, tokens) * STEP
        passed = (GROUPS + LOOKS * options.held_out) * tokens
        moved = steps * weights * DECODED / self.pass_rates.nbytes
        return self.passing(passed + stepped) + moved

    def gathering(self, tokens: int) -> float:
        """Seconds in which products of inputs with themselves are summed."""
        shapes = {weight.layer: weight.matrix for weight in self.anatomy.weights if weight.kind == "linear"}
        widths = [shapes[each.layers[0]][1] for each in self.anatomy.inputs if each.layers[0] in shapes]
        one = sum(tokens * 2 * width**2 for width in widths)
        return self.anatomy.blocks * one / self.pass_rates.products

    def training(self, variant: RecoverSpec) -> float:
        """Seconds of a training: the float model, and forward, again forward and backward through the quantized one."""
        tokens, head = variant.steps * variant.batch_tokens, self.anatomy.vocabulary * self.anatomy.hidden
        return tokens * 2 * (5 * self.active * ATTENTION + 4 * head) / self.pass_rates.products

    def library(self) -> float:
        """Seconds of another library, of which nothing is known: twice what a pass with its statistics takes."""
        weights = sum(height * width for height, width in self.shapes)
        return START + 2 * (self.passing(self.tokens) + self.gathering(self.tokens)) + weights / self.disk
