"""Lattices: the arithmetic of the schemes. One file a family."""

from __future__ import annotations

from functools import cache

from quantkit.schemes.base import Scheme
from quantkit.schemes.grids.base import Grid, Lattice, Snap
from quantkit.schemes.grids.blockfloat import Mxfp4Lattice, Nvfp4Lattice
from quantkit.schemes.grids.codebook import CodebookLattice
from quantkit.schemes.grids.floating import Fp8Lattice
from quantkit.schemes.grids.ggml import GgmlLattice
from quantkit.schemes.grids.integer import IntLattice

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
