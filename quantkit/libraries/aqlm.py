"""AQLM (Yandex Research, Egiazarian et al. 2024, arXiv:2401.06118): additive codebooks of groups of weights.

The package of that name has the kernels alone, for checkpoints that transformers loads; its authors quantize with the
scripts of a repository that is no package. quantkit reads such checkpoints itself, see :mod:`quantkit.formats.aqlm`.
See https://github.com/Vahe1994/AQLM, read in release 1.1.7.
"""

from __future__ import annotations

from quantkit.errors import SchemeError
from quantkit.libraries import LIBRARIES
from quantkit.libraries.base import Library, Offer, Request, Used

NO_QUANTIZER = (
    "the aqlm package runs checkpoints that exist and has no quantizer, as its authors use scripts that are no "
    "package; quantkit inspects and evaluates checkpoints that exist, as format aqlm"
)


@LIBRARIES.register
class Aqlm(Library):
    """What transformers 4 needs beside itself to load AQLM checkpoints; quantkit reads them without it."""

    name = "aqlm"
    summary = "additive codebooks of 1 to 4 bits a weight; for checkpoints that exist"
    distribution = "aqlm"
    requirements = ("aqlm[cpu]==1.1.7", "torch==2.14.1", "transformers==4.57.6")
    offers = (Offer("aqlm", (2, 1, 3, 4), "aqlm", grouped=False, devices=("cuda",), scores_only=NO_QUANTIZER),)

    def quantize(self, request: Request) -> Used:
        """Raise a SchemeError; recipes refuse a library that cannot quantize.

        Raises:
            SchemeError: always.
        """
        raise SchemeError(
            f"aqlm cannot quantize: {NO_QUANTIZER}",
            "get a checkpoint that its authors made, and inspect or evaluate that",
        )
