"""A variant's life, from top to bottom: it is planned, begun, solved by a walk, written, and left."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.cache_rounding import check_cache
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import VariantTask
from quantkit.errors import QuantizationError
from quantkit.exports.writing import check_origin
from quantkit.formats import FORMATS
from quantkit.quantization.calibration_need import few_tokens
from quantkit.quantization.foreseen import names_in_file
from quantkit.quantization.generated import keep
from quantkit.quantization.job import Job, Quantized, Wanted, Written
from quantkit.quantization.plan import plan_layers
from quantkit.quantization.resume import TakenUp, drop_layers, is_worth_keeping, layers_folder, resume_identity, take_up
from quantkit.quantization.solved_layers import SolvedLayers
from quantkit.quantization.solved_variant import Describe, SolvedVariant, WalkFacts
from quantkit.recipe import VariantSpec
from quantkit.schemes.rounding import CACHES
from quantkit.system.artifacts import check_writable
from quantkit.system.locks import alone, check_held
from quantkit.system.os_errors import may_pass


class VariantRun:
    """One variant on its way to a checkpoint.

    It is planned and checked when it is made, then begun, solved by a walk through its :attr:`task`, and finished. At
    the end, however that comes, it is left.

    Args:
        job: what is quantized.
        skeleton: of the model.
        wanted: the variant and its folder.

    Attributes:
        layers: its plan.
        solved: its layers on disk, once it is begun.
        resumed: what an earlier run left of it, once it is begun.

    Raises:
        SchemeError: the variant does not suit the model's layers.
        QuantizationError: it needs calibration rows and there are none.
        OutputError: its folder cannot be written.
    """

    solved: SolvedLayers
    resumed: TakenUp

    def __init__(self, job: Job, skeleton: Skeleton, wanted: Wanted) -> None:
        self._job = job
        self._skeleton = skeleton
        self._variant = wanted.variant
        self._out = wanted.out
        self._method = wanted.variant.build_method()
        self._transforms = wanted.variant.build_transforms()
        self._store = FORMATS.get(wanted.variant.format)(job.dtype)
        self.wanted = wanted
        self.layers = plan_layers(skeleton, wanted.variant)
        if wanted.variant.calibrated and not job.rows:
            text = f"{self.name}: method {wanted.variant.chain} needs calibration rows"
            raise QuantizationError(text, "give a data set")
        check_writable(self._out)
        check_model(job, skeleton, wanted.variant)
        self._cache = CACHES.get(wanted.variant.kv_cache or "")
        if self._cache is not None:
            check_cache(skeleton, self.layers.quantized)
            if job.inputs == "float" and self._transforms:
                raise QuantizationError(
                    f"{self.name}: float inputs do not show what {self._variant.chain} makes of keys and values, for "
                    "which kv_cache needs scales",
                    "set calibration.inputs: quantized",
                )

    @property
    def name(self) -> str:
        """Of the variant."""
        return self._variant.name

    def told(self) -> list[str]:
        """What its user should know before anything is solved."""
        return [*self.layers.share_told(), *self.layers.notes, *self._few_tokens()]

    def _few_tokens(self) -> list[str]:
        """What is to be said where the calibration set is small for the variant."""
        shapes = {name: self.layers.shapes[name] for name in self.layers.quantized if name != self.layers.embedding}
        return few_tokens(self._method, self._transforms, shapes, self._job.all_tokens)

    def lock(self, locks: ExitStack) -> None:
        """See that nobody else writes the variant until ``locks`` is closed.

        Raises:
            OutputError: its folder cannot be written, or another process writes it.
        """
        locks.enter_context(alone(self._out, f"quantize {self.name}"))

    def begin(self, written: Written) -> None:
        """Open the folder in which solved layers wait, with what an earlier run left there.

        Args:
            written: rows that the float model wrote, on which it is calibrated too.

        Raises:
            OutputError: its folder cannot be written.
        """
        self._job = replace(self._job, written=written)
        folder = self.store
        self.resumed = take_up(folder, resume_identity(self._job, self._variant), self._segments())
        if self._variant.calibrated:
            keep(folder, written)
        self.solved = SolvedLayers(
            folder,
            self._store,
            self.layers.quantized,
            self.layers.embedding,
            replays=self._is_replayed,
            guard=partial(check_held, self._out),
        )
        self.solved.take_up(self.resumed.segments)

    @property
    def store(self) -> Path:
        """The folder in which its solved layers wait."""
        return layers_folder(self._out)

    @property
    def _is_replayed(self) -> bool:
        """Whether a later walk will ask for what this one solved, as one with quantized inputs does."""
        return self._variant.calibrated and self._job.inputs == "quantized"

    def _segments(self) -> list[str]:
        """The prefixes of the segments that hold quantized layers, in the order in which a walk solves them."""
        head = [] if self._skeleton.head is None else [self._skeleton.head]
        quantized, embedding = set(self.layers.quantized), self.layers.embedding
        holding = [
            each.prefix
            for each in [*self._skeleton.towers, *self._skeleton.segments, *head]
            if set(each.linears) & quantized
        ]
        first = self._skeleton.embedding
        return holding if embedding is None or first is None else [first.prefix, *holding]

    def begin_walk(self, batch_tokens: int) -> None:
        """A walk begins, the first or one with less memory, whose batches have so many tokens at most."""
        self.solved.begin_walk(batch_tokens if self._variant.calibrated else None)

    @property
    def task(self) -> VariantTask:
        """What a walk solves of it, and where it puts that."""
        scale_dtype = FLOATS[self._store.scale_dtype(self._job.dtype)]
        return VariantTask(
            name=self.name,
            method=self._method,
            schemes=self.layers.quantized,
            scale_dtype=scale_dtype,
            sink=self.solved,
            fused=self.layers.fused,
            memory=self.solved,
            transforms=self._transforms,
            tune=self._variant.tune,
            cache=self._cache,
            roundings={each: self._store.input_rounding(each) for each in set(self.layers.quantized.values())},
        )

    def finish(self, walk: WalkFacts, describe: Describe) -> Quantized:
        """Write the checkpoint of a variant whose layers are solved, and read it back.

        Raises:
            CheckpointError: a tensor of the source is broken, a layer's format does not give back what it was given, or
                what was read back is not what was written.
            OutputError: the folder cannot be written.
        """
        solved = SolvedVariant(
            self._job,
            self._skeleton,
            self._variant,
            self.wanted.documents,
            self.layers,
            self._store,
            self._transforms,
            self._cache,
            self.solved,
            self.resumed,
            self._segments(),
            self._few_tokens(),
            self._is_replayed,
        )
        return solved.write(self._out, walk, describe)

    def leave(self, outcome: Quantized | BaseException | None) -> None:
        """Keep what was solved for the next run, unless the variant is finished or would fail again.

        Args:
            outcome: what became of the variant, or of the work on all.
        """
        self.solved.close()
        fails_again = isinstance(outcome, BaseException) and not may_pass(outcome)
        folder = layers_folder(self._out)
        if folder.exists() and (fails_again or not is_worth_keeping(folder)):
            drop_layers(self._out)


def check_model(job: Job, skeleton: Skeleton, variant: VariantSpec) -> None:
    """Refuse what a variant cannot be made of, before anything is run.

    Raises:
        QuantizationError: its blocks are to be tuned, and share weights.
        SourceError: its format cannot hold the model.
    """
    if variant.tune is not None and not skeleton.runs_once:
        text = f"{variant.name}: the blocks of this model share weights or run again and again, and are not tuned"
        raise QuantizationError(text, "leave out tune")
    store = FORMATS.get(variant.format)(job.dtype)
    check_origin(type(store), job.source, names_in_file(skeleton, CheckpointReader(job.source), store))
