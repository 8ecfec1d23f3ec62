"""A variant whose layers are solved becomes a checkpoint: what it is made of, what is said of it, and its records."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.companions import asks_for_code
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import MODEL
from quantkit.errors import QuantizationError
from quantkit.exports import IMATRIX
from quantkit.exports.content import Content
from quantkit.exports.manifest import CALIBRATION, public_reference, write_manifest
from quantkit.exports.writing import bits_of_file, origin_remarks, write_export
from quantkit.formats.base import Format
from quantkit.quantization.expert_tokens import expert_notes, expert_tokens
from quantkit.quantization.foreseen import file_content, float_tensors, names_in_file
from quantkit.quantization.generated import generated_notes
from quantkit.quantization.job import STAGE, Job, Quantized, made_from
from quantkit.quantization.plan import Layers
from quantkit.quantization.resume import TakenUp, drop_layers
from quantkit.quantization.solved_layers import SolvedLayers
from quantkit.quantization.solving_notes import correction_notes, sensitivity_notes, tuning_notes
from quantkit.recipe import VariantSpec
from quantkit.schemes.rounding import CacheRounding
from quantkit.source.model import DECODED_FROM, decoded_from
from quantkit.system.artifacts import STAGE_FILE, new_folder, write_json, write_stage
from quantkit.system.distribution import version_of
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


@dataclass(slots=True)
class SolvedVariant:
    """A variant whose layers are solved, on its way to a checkpoint.

    Attributes:
        job: what was quantized.
        skeleton: of the model.
        variant: it.
        documents: further files of the checkpoint, see :class:`quantkit.quantization.job.Wanted`.
        layers: its plan.
        store: its format.
        transforms: that changed the weights first.
        cache: how runtimes are asked to store keys and values.
        solved: its layers on disk.
        resumed: what an earlier run left of it.
        prefixes: of the segments that hold quantized layers.
        told: what its user was told before anything was solved of calibration sets that are small.
        replayed: a later walk would ask for what this one solved, as one with quantized inputs does.
    """

    job: Job
    skeleton: Skeleton
    variant: VariantSpec
    documents: Mapping[str, Any]
    layers: Layers
    store: Format
    transforms: Sequence[Transform]
    cache: CacheRounding | None
    solved: SolvedLayers
    resumed: TakenUp
    prefixes: Sequence[str]
    told: Sequence[str]
    replayed: bool

    def write(self, out: Path, walk: WalkFacts, describe: Describe) -> Quantized:
        """Write its checkpoint, and read it back.

        Args:
            out: its folder.
            walk: that solved it.
            describe: writes what is to be read of it.

        Raises:
            CheckpointError: a tensor of the source is broken, a layer's format does not give back what it was given, or
                what was read back is not what was written.
            OutputError: the folder cannot be written.
        """
        started = time.perf_counter()
        self.solved.settle()
        identity = made_from(self.job, self.variant)
        with new_folder(out, guests=True) as folder:
            content = self._content()
            write_export(content, self.store, folder)
            self._write_importance(folder, content)
            facts = self._facts(walk, folder, time.perf_counter() - started)
            self._write_records(folder, identity, facts)
            describe(folder, out.name)
            write_stage(folder, STAGE, identity, facts=facts)
        drop_layers(out)
        return Quantized(out, facts, reused=False)

    def _content(self) -> Content:
        """What the checkpoint is made of.

        Tensors of the source that were not quantized are taken as they are, but for those that the variant replaces,
        and those that follow from the config.
        A weight that the head and the embedding shared is there for each of them once one is quantized.
        """
        job, solved, skeleton = self.job, self.solved, self.skeleton
        layers = self.layers = replace(self.layers, parted=self._is_parted())
        reader = CheckpointReader(job.source)
        changed = [name for held in layers.stacks.values() for name in held if solved.replaces(f"{name}.weight")]
        floats = float_tensors(skeleton, layers, reader, names_in_file(skeleton, reader, self.store), changed)
        self._check_parts(floats)
        floats |= {name: solved.stored(name) for name in floats if solved.replaces(name)}
        floats |= {name: solved.stored(name) for name in solved.cache_scales()}
        packed = {layer: solved.packed(layer) for layer in layers.quantized}
        content = file_content(job, skeleton, self.variant, layers, packed, floats)
        decoded = None if layers.quantized else decoded_from(job.source_facts)
        changes = content.changes if decoded is None else {**content.changes, DECODED_FROM: decoded}
        return replace(content, digests=solved.digests(), changes=changes, cache=self.cache, turns=self._turns())

    def _turns(self) -> dict[str, int]:
        """The layers whose inputs runtimes have to turn, by their names in the checkpoint."""
        model, names = self.solved.transformed(MODEL), self.skeleton.names
        turned = [transform.turned(model[place]) for place, transform in enumerate(self.transforms)]
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
        names = self.skeleton.names
        parts = (names.written(part) for members in names.parts().values() for part in members)
        lost = next((name for name in parts if self.solved.replaces(name) and name not in floats), None)
        if lost is not None:
            raise QuantizationError(
                f"{self.variant.name}: a transform changes {lost}, which lies in a tensor that is written whole",
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
            datasets=[f"quantkit calibration set {self.job.calibration_sha256}"],
            chunk_size=max(map(len, self.job.all_rows)),
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
            *origin_remarks(self.store, self.job.source, self.job.dtype),
            *self._remarks(),
            *self.layers.notes,
            *self.told,
            *filter(None, [self.resumed.note]),
            *walk.notes,
            *(generated_notes(self.job.written) if self.variant.calibrated else []),
            *expert_notes(experts, self.job.experts),
            *correction_notes(layers),
            *sensitivity_notes(layers, self.layers.shapes),
            *tuning_notes(tuning),
            *self._transform_notes(),
            *dict.fromkeys(f"{layer['name']}: {note}" for layer in layers for note in layer["notes"]),
        ]
        stored = self.solved.stored_bytes
        return {
            "bits_per_weight": stored * 8 / self.layers.weights() if self.layers.quantized else 16.0,
            "bits_per_weight_file": bits_of_file(folder, self.job.source),
            "share": self.layers.share,
            "layers": layers,
            **({"tuning": tuning} if self.variant.tune is not None else {}),
            "experts": [each.to_json() for each in experts],
            "notes": notes,
            "resumed": len(self.resumed.segments),
            "seconds": shared + own,
            "seconds_shared": shared,
            "seconds_own": own,
            "walk_variants": walk.variants,
            "batch_tokens": self.solved.batch_tokens,
            "strategy": walk.strategy if self.replayed else "none",
        }

    def _transformed(self) -> Iterator[tuple[Transform, dict[str, Any]]]:
        """Each transform and what it did to each segment that holds quantized layers, the embedding aside."""
        prefixes = [prefix for prefix in self.prefixes if prefix != self.layers.embedding]
        for place, transform in enumerate(self.transforms):
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
        remarks = self.store.remarks({scheme for scheme in layers.linears.values() if scheme is not None})
        if layers.embedding is None:
            return list(remarks)
        further = self.store.for_embeddings().remarks({layers.quantized[layers.embedding]})
        return list(dict.fromkeys((*remarks, *further)))

    def _write_records(self, folder: Path, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write the recipe of this checkpoint, and its manifest."""
        job, variant = self.job, self.variant
        text = yaml.safe_dump(variant.resolved(), sort_keys=False)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        if variant.calibrated and job.audit is not None:
            write_json(folder / CALIBRATION, {**job.audit, **self._generated()})
        for name, data in self.documents.items():
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
        return {"generated_tokens": self.job.all_tokens - self.job.tokens} if self.job.generates(self.variant) else {}
