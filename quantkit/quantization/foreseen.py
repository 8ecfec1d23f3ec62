"""The bytes of a file, told from the plan of its variant before anything is solved: tensors and what is around them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NoReturn

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader
from quantkit.engine.cache_rounding import scale_shapes
from quantkit.engine.layers import Layer
from quantkit.engine.skeleton import Skeleton
from quantkit.exports.content import Content, Stored
from quantkit.exports.manifest import model_name
from quantkit.exports.writing import bytes_of_export
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.quantization.job import Job
from quantkit.quantization.plan import Layers, plan_layers
from quantkit.recipe import VariantSpec
from quantkit.schemes.rounding import CACHES


def foreseen_bytes(job: Job, skeleton: Skeleton, variant: VariantSpec) -> int:
    """Bytes of a variant, see :func:`planned_bytes`.

    Raises:
        SchemeError: the variant does not suit the model's layers.
    """
    return planned_bytes(job, skeleton, variant, plan_layers(skeleton, variant))


def planned_bytes(job: Job, skeleton: Skeleton, variant: VariantSpec, layers: Layers) -> int:
    """Bytes that the files with tensors of a variant take at most, their headers, indexes and padding counted.

    It is what they take but for a few bytes of formats whose layers say something in words (:attr:`Format.varies`).
    A transform that changes a part of a stack of the source makes more of them, as the stack is taken apart then.

    Args:
        job: what is quantized.
        skeleton: of the model.
        variant: it.
        layers: the plan of it.
    """
    store = FORMATS.get(variant.format)(job.dtype)
    packed = {name: _packed(store, layers, name) for name in layers.quantized}
    reader = CheckpointReader(job.source)
    floats = float_tensors(skeleton, layers, reader, names_in_file(skeleton, reader, store))
    if variant.kv_cache is not None:
        scales = scale_shapes(skeleton, CACHES[variant.kv_cache])
        floats |= {name: Stored(torch.float32, shape, _unsolved) for name, shape in scales.items()}
    content = file_content(job, skeleton, variant, layers, packed, floats)
    return bytes_of_export(content, store) + store.varies * len(packed)


def names_in_file(skeleton: Skeleton, reader: CheckpointReader, store: Format | type[Format]) -> list[str]:
    """The tensors of the source that go into a file, packed or not."""
    dropped = set(skeleton.left_out(all_unknown=store.container == "gguf"))
    return [name for name in reader.names() if name not in dropped]


def float_tensors(
    skeleton: Skeleton, layers: Layers, reader: CheckpointReader, names: Collection[str], changed: Collection[str] = ()
) -> dict[str, Stored]:
    """The tensors that stay float.

    Args:
        skeleton: of the model.
        layers: the plan.
        reader: the source.
        names: those of its tensors that go into the file.
        changed: layers that stay float and are not as the source has them.
    """
    kept, apart = layers.kept(names, changed), layers.cut_out(changed)
    floats = {name: Stored.of(reader, source, finite=True) for name, source in kept.items()}
    parts = [layer for layer in skeleton.layers() if layer.name in apart]
    return floats | {f"{layer.name}.weight": _part(skeleton, reader, layer) for layer in parts}


def file_content(
    job: Job,
    skeleton: Skeleton,
    variant: VariantSpec,
    layers: Layers,
    packed: Mapping[str, Mapping[str, Stored]],
    floats: Mapping[str, Stored],
) -> Content:
    """What a variant's checkpoint is made of, without digests of its layers."""
    head, changes = skeleton.head, {}
    if layers.cast is not None:
        changes["dtype"] = layers.cast
        floats = {name: tensor.cast(FLOATS[layers.cast], name) for name, tensor in floats.items()}
    return Content(
        origin=job.source,
        dtype=layers.cast or job.dtype,
        linears=layers.linears,
        packed=packed,
        floats=floats,
        digests={},
        embedding=None if layers.embedding is None else (layers.embedding, layers.quantized[layers.embedding]),
        unties=layers.unties or (head is not None and head.linears[0] in layers.quantized),
        changes=changes,
        runs_code=job.trust_remote_code,
        paths=layers.paths,
        alone=layers.alone,
        preset=getattr(variant.base_scheme(), "preset", None),
        others=skeleton.others(),
        name=model_name(job.source_facts.get("reference")),
    )


def _part(skeleton: Skeleton, reader: CheckpointReader, layer: Layer) -> Stored:
    """A layer that is a part of a tensor of the source."""
    names, parameter = skeleton.names, f"{layer.path}.weight"
    dtype = reader.dtype(names.sources(parameter)[0])
    return Stored(dtype, layer.shape, lambda: names.read(parameter, reader.read_finite))


def _packed(store: Format, layers: Layers, name: str) -> dict[str, Stored]:
    """The packed tensors of a layer, of which there are no values yet."""
    packing = store.for_embeddings() if name == layers.embedding else store
    shapes = packing.packed_shapes(layers.quantized[name], *layers.shapes[name])
    return {suffix: Stored(getattr(torch, dtype), shape, _unsolved) for suffix, (dtype, shape) in shapes.items()}


def _unsolved() -> NoReturn:
    raise RuntimeError("a layer is read that is foreseen alone")
