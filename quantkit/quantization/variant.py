"""A variant's life, from top to bottom: it is planned, begun, solved by a walk, written, and left."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.checkpoint.companions import asks_for_code
from quantkit.engine.cache_rounding import check_cache
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import MODEL, VariantTask
from quantkit.errors import QuantizationError
from quantkit.exports import IMATRIX
from quantkit.exports.content import Content
from quantkit.exports.manifest import CALIBRATION, public_reference, write_manifest
from quantkit.exports.writing import bits_of_file, check_origin, origin_remarks, write_export
from quantkit.formats import FORMATS
from quantkit.quantization.calibration_need import few_tokens
from quantkit.quantization.expert_tokens import expert_notes, expert_tokens
from quantkit.quantization.foreseen import file_content, float_tensors, names_in_file
from quantkit.quantization.generated import generated_notes, keep
from quantkit.quantization.job import STAGE, Job, Quantized, Wanted, Written, made_from
from quantkit.quantization.plan import plan_layers
from quantkit.quantization.resume import TakenUp, drop_layers, is_worth_keeping, layers_folder, resume_identity, take_up
from quantkit.quantization.solved_layers import SolvedLayers
from quantkit.quantization.solving_notes import correction_notes, sensitivity_notes, tuning_notes
from quantkit.recipe import VariantSpec
from quantkit.schemes.rounding import CACHES
from quantkit.source.model import DECODED_FROM, decoded_from
from quantkit.system.artifacts import STAGE_FILE, check_writable, new_folder, write_json, write_stage
from quantkit.system.distribution import version_of
from quantkit.system.locks import alone, check_held
from quantkit.system.os_errors import may_pass
from quantkit.transforms.base import Transform

Describe = Callable[[Path, str], None]
"""Called with the folder of a checkpoint when all but its mark is written, and with the name that it will have."""


@dataclass(frozen=True, slots=True)
class WalkFacts:
    """What a finished walk was for one of its variants.

    Attributes:
        shared: seconds of all that its variants share.
        own: seconds of this variant's own work.
        variants: how many shared it.
        strategy: of its passes, as it was in the end.
        notes: what the user should know of all of its variants.
    """

    shared: float
    own: float
    variants: int
    strategy: str
    notes: Sequence[str]


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
        started = time.perf_counter()
        self.solved.settle()
        identity = made_from(self._job, self._variant)
        with new_folder(self._out, guests=True) as folder:
            content = self._content()
            write_export(content, self._store, folder)
            self._write_importance(folder, content)
            facts = self._facts(walk, folder, time.perf_counter() - started)
            self._write_records(folder, identity, facts)
            describe(folder, self._out.name)
            write_stage(folder, STAGE, identity, facts=facts)
        drop_layers(self._out)
        return Quantized(self._out, facts, reused=False)

    def _content(self) -> Content:
        """What the checkpoint is made of.

        Tensors of the source that were not quantized are taken as they are, but for those that the variant replaces,
        and those that follow from the config.
        A weight that the head and the embedding shared is there for each of them once one is quantized.
        """
        job, solved, skeleton = self._job, self.solved, self._skeleton
        layers = self.layers = replace(self.layers, parted=self._is_parted())
        reader = CheckpointReader(job.source)
        changed = [name for held in layers.stacks.values() for name in held if solved.replaces(f"{name}.weight")]
        floats = float_tensors(skeleton, layers, reader, names_in_file(skeleton, reader, self._store), changed)
        self._check_parts(floats)
        floats |= {name: solved.stored(name) for name in floats if solved.replaces(name)}
        floats |= {name: solved.stored(name) for name in solved.cache_scales()}
        packed = {layer: solved.packed(layer) for layer in layers.quantized}
        content = file_content(job, skeleton, self._variant, layers, packed, floats)
        decoded = None if layers.quantized else decoded_from(job.source_facts)
        changes = content.changes if decoded is None else {**content.changes, DECODED_FROM: decoded}
        return replace(content, digests=solved.digests(), changes=changes, cache=self._cache, turns=self._turns())

    def _turns(self) -> dict[str, int]:
        """The layers whose inputs runtimes have to turn, by their names in the checkpoint."""
        model, names = self.solved.transformed(MODEL), self._skeleton.names
        turned = [transform.turned(model[place]) for place, transform in enumerate(self._transforms)]
        return {names.layer(f"{module}.weight"): size for each in turned for module, size in each.items()}

    def _is_parted(self) -> bool:
        """Whether transforms made two weights of one that the head and the embedding share."""
        changed = [self.solved.stored(f"{name}.weight") for name in self.layers.tied if self._replaces(name)]
        if len(changed) < 2 or any(name in self.layers.quantized for name in self.layers.tied):
            return bool(changed)
        first, second = (each.read() for each in changed)
        return not torch.equal(first, second)

    def _replaces(self, layer: str) -> bool:
        return self.solved.replaces(f"{layer}.weight")

    def _check_parts(self, floats: Collection[str]) -> None:
        """Refuse a change of what lies in a tensor that is written whole, such as the biases of stacked experts."""
        names = self._skeleton.names
        parts = (names.written(part) for members in names.parts().values() for part in members)
        lost = next((name for name in parts if self.solved.replaces(name) and name not in floats), None)
        if lost is not None:
            raise QuantizationError(
                f"{self.name}: a transform changes {lost}, which lies in a tensor that is written whole",
                "leave out the transform",
            )

    def _write_importance(self, folder: Path, content: Content) -> None:
        """Write ``imatrix.gguf``, for ``llama-quantize --imatrix``, if layers of the checkpoint have an importance."""
        weighed = {layer: packed["importance"] for layer, packed in content.packed.items() if "importance" in packed}
        if not weighed:
            return
        from quantkit.gguf.imatrix import Importance, write_imatrix

        tokens = self.solved.tokens()
        write_imatrix(
            folder / IMATRIX,
            {layer: Importance(stored.read(), tokens[layer]) for layer, stored in weighed.items()},
            origin=content.origin,
            datasets=[f"quantkit calibration set {self._job.calibration_sha256}"],
            chunk_size=max(map(len, self._job.all_rows)),
        )

    def _facts(self, walk: WalkFacts, folder: Path, writing: float) -> dict[str, Any]:
        """What ``stage.json`` and the report say of the variant.

        Args:
            walk: that solved it.
            folder: where it was written.
            writing: seconds of writing it.
        """
        own_before, shared_before = self.solved.seconds_before
        own, shared = own_before + walk.own + writing, shared_before + walk.shared
        layers = self.solved.layers()
        tuning = self.solved.tuning()
        experts = expert_tokens(self.solved.experts(), self.layers.shapes)
        notes = [
            *origin_remarks(self._store, self._job.source, self._job.dtype),
            *self._remarks(),
            *self.layers.notes,
            *self._few_tokens(),
            *filter(None, [self.resumed.note]),
            *walk.notes,
            *(generated_notes(self._job.written) if self._variant.calibrated else []),
            *expert_notes(experts, self._job.experts),
            *correction_notes(layers),
            *sensitivity_notes(layers, self.layers.shapes),
            *tuning_notes(tuning),
            *self._transform_notes(),
            *dict.fromkeys(f"{layer['name']}: {note}" for layer in layers for note in layer["notes"]),
        ]
        stored = self.solved.stored_bytes
        return {
            "bits_per_weight": stored * 8 / self.layers.weights() if self.layers.quantized else 16.0,
            "bits_per_weight_file": bits_of_file(folder, self._job.source),
            "share": self.layers.share,
            "layers": layers,
            **({"tuning": tuning} if self._variant.tune is not None else {}),
            "experts": [each.to_json() for each in experts],
            "notes": notes,
            "resumed": len(self.resumed.segments),
            "seconds": shared + own,
            "seconds_shared": shared,
            "seconds_own": own,
            "walk_variants": walk.variants,
            "batch_tokens": self.solved.batch_tokens,
            "strategy": walk.strategy if self._is_replayed else "none",
        }

    def _transformed(self) -> Iterator[tuple[Transform, dict[str, Any]]]:
        """Each transform and what it did to each segment that holds quantized layers, the embedding aside."""
        prefixes = [prefix for prefix in self._segments() if prefix != self.layers.embedding]
        for place, transform in enumerate(self._transforms):
            yield transform, {prefix: self.solved.transformed(prefix)[place] for prefix in prefixes}

    def _transform_notes(self) -> Iterator[str]:
        """What the transforms have to say of what they did."""
        model = self.solved.transformed(MODEL)
        for place, (transform, done) in enumerate(self._transformed()):
            yield from transform.model_notes(model[place])
            yield from transform.notes(list(done.values()))

    def _transform_records(self) -> list[dict[str, Any]]:
        """What the manifest says of the transforms."""
        model = self.solved.transformed(MODEL)
        return [
            {
                "name": transform.name,
                "options": transform.options.model_dump(mode="json"),
                "model": model[place],
                "segments": {prefix: data for prefix, data in done.items() if data is not None},
            }
            for place, (transform, done) in enumerate(self._transformed())
        ]

    def _remarks(self) -> list[str]:
        """What the format has to say of the linear layers, and of a quantized embedding."""
        layers = self.layers
        remarks = self._store.remarks({scheme for scheme in layers.linears.values() if scheme is not None})
        if layers.embedding is None:
            return list(remarks)
        further = self._store.for_embeddings().remarks({layers.quantized[layers.embedding]})
        return list(dict.fromkeys((*remarks, *further)))

    def _write_records(self, folder: Path, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write the recipe of this checkpoint, and its manifest."""
        job, variant = self._job, self._variant
        text = yaml.safe_dump(variant.resolved(), sort_keys=False)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        if variant.calibrated and job.audit is not None:
            write_json(folder / CALIBRATION, {**job.audit, **self._generated()})
        for name, data in self.wanted.documents.items():
            write_json(folder / name, data)
        versions = {name: version_of(name) for name in ("quantkit", "torch", "transformers", "safetensors", "numpy")}
        write_manifest(
            folder,
            {
                "schema": 1,
                "created_by": f"quantkit {versions['quantkit']}",
                "source": {**job.source_facts, "reference": public_reference(job.source_facts.get("reference"))},
                "calibration_sha256": identity["calibration"],
                "inputs": identity["inputs"],
                **self._generated(),
                "format": variant.format,
                "layers": {name: scheme.to_json() for name, scheme in self.layers.quantized.items()},
                "share": self.layers.share,
                "float": self.layers.left_by_reason(),
                "embedding": self.layers.embedding,
                "transformers_loads": self.layers.transformers_loads,
                "remote_code": job.trust_remote_code and asks_for_code(job.source),
                "transforms": self._transform_records(),
                "versions": {"python": platform.python_version(), **versions},
                "bits_per_weight": facts["bits_per_weight"],
                "bits_per_weight_file": facts["bits_per_weight_file"],
                "batch_tokens": facts["batch_tokens"],
                "stage_file": STAGE_FILE,
            },
        )

    def _generated(self) -> dict[str, int]:
        """How many tokens the float model wrote, where it was to write some."""
        return (
            {"generated_tokens": self._job.all_tokens - self._job.tokens} if self._job.generates(self._variant) else {}
        )

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
