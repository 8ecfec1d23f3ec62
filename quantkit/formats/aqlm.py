"""aqlm: additive codebooks (Egiazarian et al. 2024, arXiv:2401.06118) as their authors' checkpoints hold them.

A layer is ``codes``, ``[out / out_group, in / in_group, codebooks]``, int8 up to 8 bits and int16 up to 16, where the
upper half of the codes is stored as negative numbers; ``codebooks``, ``[codebooks, 2**bits, out_group, in_group]``; and
``scales``, ``[out / out_group, 1, 1, 1]``. See ``aqlm/inference.py`` and ``utils.py`` of the package aqlm 1.1.7.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import FORMATS
from quantkit.formats._per_layer import BROKEN, require
from quantkit.formats.base import Format, PackedShapes
from quantkit.schemes import AdditiveScheme, AdditiveWeight, QuantizedWeight, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint import CheckpointReader

SUFFIXES = ("codes", "codebooks", "scales")
KEYS = {
    "codebooks": "num_codebooks",
    "code_bits": "nbits_per_codebook",
    "in_group": "in_group_size",
    "out_group": "out_group_size",
}
"""What ``quantization_config`` calls the keys of the scheme; where it lacks one, the default is the scheme's too."""
KEPT = "linear_weights_not_to_quantize"
WHO_LOADS = (
    "aqlm: transformers 4 (4.57 was tried) loads it with the packages aqlm and accelerate; transformers 5, up to 5.23 "
    "at least, takes layers that the config lists as float, such as lm_head.weight, for packed ones and leaves them at "
    "random numbers, so that quantkit's evaluation decodes the file itself"
)


@FORMATS.register
class AqlmFormat(Format):
    """The layout of the package aqlm, one scheme for all packed layers."""

    name = "aqlm"
    summary = "additive codebooks of AQLM checkpoints, which quantkit reads and does not write"
    runtimes = ("transformers 4",)
    requires = ("accelerate", "aqlm")
    read_only = "its codes are learned together with their codebooks, which no method of quantkit does"

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse all."""
        _refuse()

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether ``quant_method`` is aqlm."""
        return str(config.get("quant_method")).lower() == cls.name

    @classmethod
    def schemes_in(cls, config: Mapping[str, Any], reader: CheckpointReader) -> dict[str, Scheme]:
        """The layers that have codes or codebooks, with the one scheme of the config."""
        scheme = _scheme_in(config)
        layers = dict.fromkeys(
            layer for name in reader.names() for layer, _, leaf in (name.rpartition("."),) if leaf in SUFFIXES[:2]
        )
        if not layers:
            raise CheckpointError(f"{reader.folder} says that it is of aqlm, and no tensor is called codes", BROKEN)
        kept = config.get(KEPT) or []
        if not isinstance(kept, list):
            raise CheckpointError(f"'{KEPT}' of quantization_config is no list", BROKEN)
        for layer in layers:
            if f"{layer}.weight" in kept:
                raise CheckpointError(f"layer {layer} has codes, and '{KEPT}' of the config keeps it float", BROKEN)
            _check_tensors(layer, scheme, reader)
        return dict.fromkeys(layers, scheme)

    def layer_shape(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """From the shapes of the packed tensors; see :meth:`Format.layer_shape`."""
        return _shape(_additive(scheme), shapes["codes"])

    def decodable(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> AdditiveWeight:
        """Codes, codebooks and scales as they lie on disk.

        Raises:
            ValueError: a code is beyond its codebook.
        """
        found, codes = _additive(scheme), tensors["codes"]
        size = 1 << found.code_bits
        low, high = (int(end) for end in codes.aminmax())
        if low < -size // 2 or high >= size:
            raise ValueError(f"a code is {high if high >= size else low}, and a codebook has {size} vectors")
        return AdditiveWeight(found, codes, tensors["codebooks"], tensors["scales"])

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """Raise a SchemeError: its codes stand for groups of weights, see :meth:`decodable`."""
        _refuse()

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Raise a SchemeError: quantkit does not write this format."""
        _refuse()

    def packed_shapes(self, scheme: Scheme, out_features: int, in_features: int) -> PackedShapes:
        """A code for each group and codebook, the codebooks, and a scale for each row of groups."""
        found = _additive(scheme)
        down, across = out_features // found.out_group, in_features // found.in_group
        vectors = (found.codebooks, 1 << found.code_bits, found.out_group, found.in_group)
        return {
            "codes": ("int8" if found.code_bits <= 8 else "int16", (down, across, found.codebooks)),
            "codebooks": (self.dtype, vectors),
            "scales": (self.dtype, (down, 1, 1, 1)),
        }

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """Codes, codebooks and scales."""
        return SUFFIXES

    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """Raise a SchemeError: quantkit does not write this format."""
        _refuse()

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Who loads it."""
        return (WHO_LOADS,)


def _refuse() -> NoReturn:
    raise SchemeError(
        f"quantkit reads the aqlm format and does not write it: {AqlmFormat.read_only}",
        "choose another format, or get a checkpoint that AQLM's authors made",
    )


def _additive(scheme: Scheme) -> AdditiveScheme:
    if isinstance(scheme, AdditiveScheme):
        return scheme
    raise SchemeError(f"an aqlm checkpoint has no {scheme.describe()} layers", "get the checkpoint again")


def _scheme_in(config: Mapping[str, Any]) -> AdditiveScheme:
    given = {name: config[key] for name, key in KEYS.items() if key in config}
    try:
        return AdditiveScheme(**given)
    except SchemeError as error:
        raise CheckpointError(f"quantization_config cannot be read: {error.problem}", error.remedy) from error


def _shape(scheme: AdditiveScheme, codes: tuple[int, ...]) -> tuple[int, int]:
    """``(out_features, in_features)`` of a layer by the shape of its codes."""
    return codes[0] * scheme.out_group, codes[1] * scheme.in_group


def _check_tensors(layer: str, scheme: AdditiveScheme, reader: CheckpointReader) -> None:
    """Check the tensors of a layer by the headers of their files.

    Raises:
        CheckpointError: one is not there, or is not as the config and the others ask for.
    """
    import torch

    for suffix in SUFFIXES:
        if f"{layer}.{suffix}" not in reader:
            raise CheckpointError(f"layer {layer} in {reader.folder} has no tensor '{suffix}'", BROKEN)
    codes = reader.shape(f"{layer}.codes")
    if len(codes) != 3 or 0 in codes:
        raise CheckpointError(f"tensor {layer}.codes has shape {list(codes)}, not one for rows, groups, codes", BROKEN)
    floats = (torch.float16, torch.bfloat16, torch.float32)
    for suffix, (dtype, shape) in AqlmFormat().packed_shapes(scheme, *_shape(scheme, codes)).items():
        allowed = (getattr(torch, dtype),) if suffix == "codes" else floats
        require(reader, f"{layer}.{suffix}", allowed, shape)
