"""Lattices: the arithmetic of the schemes. One file a family."""

from __future__ import annotations

from functools import cache

from quantkit.numerics.lattices.base import Grid, Lattice, Snap
from quantkit.numerics.lattices.blockfloat import Mxfp4Lattice, Nvfp4Lattice
from quantkit.numerics.lattices.codebook import CodebookLattice
from quantkit.numerics.lattices.floating import Fp8Lattice
from quantkit.numerics.lattices.ggml import GgmlLattice
from quantkit.numerics.lattices.integer import IntLattice
from quantkit.schemes.base import Scheme

__all__ = ["Grid", "Lattice", "Snap", "lattice_of"]

LATTICES: dict[str, type[Lattice]] = {
    "int": IntLattice,
    "nf4": CodebookLattice,
    "fp4": CodebookLattice,
    "fp8": Fp8Lattice,
    "mxfp4": Mxfp4Lattice,
    "nvfp4": Nvfp4Lattice,
    **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl"), GgmlLattice),
}


@cache
def lattice_of(scheme: Scheme) -> Lattice:
    """The arithmetic of a scheme."""
    return LATTICES[scheme.kind](scheme)
