"""The bytes of every tensor of an exported file, from shapes and schemes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quantkit.errors import SchemeError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.lines import Line, written
from quantkit.formats import FORMATS
from quantkit.formats.base import BYTES, Container, Format
from quantkit.quantization.choosing import Candidate, choose, choose_embedding, shares_tensor
from quantkit.quantization.left_float import Left, check_left
from quantkit.recipe import VariantSpec
from quantkit.schemes import PlainScheme, Scheme
from quantkit.schemes.rounding import CACHES


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized layer: its scheme, shape and bytes."""

    scheme: Scheme
    shape: tuple[int, int]
    nbytes: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Stored:
    """An exported file.

    Attributes:
        container: of the file.
        dtype: in which its float tensors are, but for those that the container has rules for.
        packed: the quantized layers by name.
        floats: every other tensor by name, with its number of values and its bytes.
        embedding: full name of the input embedding.
        head: full name of the output head.
    """

    container: Container
    dtype: str
    packed: Mapping[str, Packed]
    floats: Mapping[str, tuple[int, int]]
    embedding: str
    head: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.packed.values()) + sum(nbytes for _, nbytes in self.floats.values())

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized layers, None where there are none."""
        weights = sum(each.weights for each in self.packed.values())
        return sum(each.nbytes for each in self.packed.values()) * 8 / weights if weights else None

    def lines(self) -> tuple[Line, ...]:
        """Quantized layers by scheme, then the embedding, the head and the rest that are float."""
        schemes = dict.fromkeys(each.scheme for name, each in self.packed.items() if name != self.embedding)
        found = [self._packed_line(f"{scheme.describe()} layers", scheme) for scheme in schemes]
        if self.embedding in self.packed:
            scheme = self.packed[self.embedding].scheme
            found.append(self._packed_line(f"{scheme.describe()} embedding", scheme, embedding=True))
        return (*found, *self._float_lines())

    def _packed_line(self, name: str, scheme: Scheme, *, embedding: bool = False) -> Line:
        layers = [
            each
            for layer, each in self.packed.items()
            if each.scheme == scheme and (layer == self.embedding) == embedding
        ]
        weights, nbytes = sum(each.weights for each in layers), sum(each.nbytes for each in layers)
        count = (
            f"{written(weights)} weights in {len(layers)} layers" if len(layers) > 1 else f"{written(weights)} weights"
        )
        return Line(name, nbytes, f"{count} x {nbytes * 8 / weights:.4f} bits / 8")

    def _float_lines(self) -> Iterator[Line]:
        places = {"embedding": f"{self.embedding}.weight", "head": f"{self.head}.weight"}
        for name, tensor in places.items():
            if tensor in self.floats:
                count, nbytes = self.floats[tensor]
                yield Line(f"float {name}", nbytes, f"{written(count)} values x {nbytes // count} bytes")
        rest = [each for name, each in self.floats.items() if name not in places.values()]
        if rest:
            count, nbytes = (sum(column) for column in zip(*rest, strict=True))
            what = f"{written(count)} values in {len(rest)} tensors"
            yield Line("float layers, norms and biases", nbytes, f"{what} x {written(nbytes / count)} bytes")


def schemes_of(anatomy: Anatomy, variant: VariantSpec) -> dict[str, Scheme | None]:
    """The scheme of every linear layer, and first of the input embedding if it gets one; None stays float.

    Raises:
        SchemeError: layers do not suit; see :func:`quantkit.quantization.choosing.choose`.
    """
    linears = anatomy.linears()
    if isinstance(variant.base_scheme(), PlainScheme):
        return dict.fromkeys(linears)
    found: dict[str, Scheme | None] = {}
    called = anatomy.head if anatomy.tied else anatomy.embedding
    embedding, _ = choose_embedding(variant, anatomy.embedding, called, anatomy.head_shape, anatomy.blocks)
    if embedding is not None:
        found[anatomy.embedding] = embedding
    kept = anatomy.keeps_float()
    candidates = {
        name: Candidate(name, shape, block, kept.get(name), is_head=name == anatomy.head)
        for name, (shape, block) in linears.items()
    }
    if anatomy.tied and shares_tensor(variant):
        candidates.pop(anatomy.head, None)
    total = anatomy.in_blocks()
    chosen = choose(variant, candidates, anatomy.blocks, total)
    inside = [name for name in chosen.float_for if candidates[name].block is not None]
    check_left(variant, [Left(each, _numel(candidates[each].shape), chosen.float_for[each]) for each in inside], total)
    return found | dict(chosen.schemes)


def stored(anatomy: Anatomy, variant: VariantSpec, dtype: str | None = None) -> Stored:
    """What a variant's file holds.

    Args:
        anatomy: the model.
        variant: what is done to it.
        dtype: of the float model; the anatomy's own by default.

    Raises:
        SchemeError: the variant does not suit the model.
    """
    dtype, kind = dtype or anatomy.dtype, FORMATS.get(variant.format)
    store, whole = kind(dtype), variant.base_scheme()
    shapes = {name: shape for name, (shape, _) in anatomy.linears().items()} | {anatomy.embedding: anatomy.head_shape}
    packed = {
        name: _packed(f"{variant.name}: {name}", _packing(store, name == anatomy.embedding), scheme, shapes[name])
        for name, scheme in schemes_of(anatomy, variant).items()
        if scheme is not None
    }
    cast = (whole.dtype if isinstance(whole, PlainScheme) else None) or dtype
    floats = {
        name: (_numel(shape), _numel(shape) * float_bytes(kind.container, cast, shape))
        for name, shape in _kept(anatomy, packed, kind, parted=variant.parts_tied).items()
    }
    if kind.container == "gguf" and anatomy.rope_factors:
        floats["rope_freqs"] = (anatomy.rope_factors, anatomy.rope_factors * BYTES["float32"])
    if variant.kv_cache is not None:
        scales = [each.heads if CACHES[variant.kv_cache].per_head else 2 for each in anatomy.caches if each.values]
        floats["KV scales"] = (sum(scales), sum(scales) * BYTES["float32"])
    return Stored(kind.container, cast, packed, floats, anatomy.embedding, anatomy.head)


def taken_in(dtype: str) -> str:
    """The dtype in which a float model of ``dtype`` is quantized and served where nobody asks for another."""
    return "bfloat16" if dtype == "float32" else dtype


def float_bytes(container: Container, dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a value of a float tensor: GGUF files have matrices in 16 bits and vectors in 32."""
    if container == "gguf":
        return 2 if len(shape) > 1 else 4
    return BYTES[dtype]


def _packing(store: Format, is_embedding: bool) -> Format:
    return store.for_embeddings() if is_embedding else store


def _packed(place: str, store: Format, scheme: Scheme, shape: tuple[int, int]) -> Packed:
    try:
        scheme.check_layer(*shape)
        store.check_layer(scheme, *shape)
    except SchemeError as error:
        raise SchemeError(f"{place}: {error.problem}", error.remedy) from error
    return Packed(scheme, shape, store.layer_bytes(scheme, *shape))


def _kept(
    anatomy: Anatomy, packed: Mapping[str, Packed], store: type[Format], *, parted: bool
) -> dict[str, tuple[int, ...]]:
    """The tensors that stay float; what a head and an embedding share is there for each once one is packed,
    but for formats in which the packed embedding is the head as well, and where transforms part them.

    GGUF files have no towers.
    """
    there = (weight for weight in anatomy.weights if not (weight.kind == "tower" and store.container == "gguf"))
    found = {weight.name: weight.shape for weight in there if weight.layer not in packed}
    both = (anatomy.embedding, anatomy.head)
    shared = store.shares_head and anatomy.head not in packed
    if anatomy.tied and (parted or (any(name in packed for name in both) and not shared)):
        found |= {f"{name}.weight": anatomy.head_shape for name in both if name not in packed}
    return found


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
