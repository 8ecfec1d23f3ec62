"""The grids of GGML's block types: what their codes stand for. Their codes are chosen by llama.cpp alone."""

from __future__ import annotations

from typing import NoReturn

import torch

from quantkit.errors import SchemeError
from quantkit.schemes.ggml import IQ4_NL_TABLE, GgmlScheme, Iq4NlScheme
from quantkit.schemes.grids.base import Grid, Grids, Rounder


class GgmlGrids(Grids):
    """Levels ``code - zero``, or the table of IQ4_NL; all that would choose codes is refused."""

    scheme: GgmlScheme

    def levels(self, codes: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``code - zero`` computed in ``dtype``, or the entries of the table."""
        if isinstance(self.scheme, Iq4NlScheme):
            table = torch.tensor(IQ4_NL_TABLE, dtype=dtype, device=codes.device)
            return table.index_select(0, codes.int().reshape(-1)).view(codes.shape)
        return codes.to(dtype) - zeros.to(dtype).unsqueeze(-1)

    def codes(self, levels: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Raise a SchemeError: quantkit does not choose these codes."""
        self._refuse()

    def nearest_(self, values: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Raise a SchemeError: quantkit does not choose these codes."""
        self._refuse()

    def encode(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Raise a SchemeError: quantkit does not choose these codes."""
        self._refuse()

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Raise a SchemeError: quantkit does not choose these codes."""
        self._refuse()

    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Raise a SchemeError: quantkit does not choose these codes."""
        self._refuse()

    def reach(self, grid: Grid) -> torch.Tensor:
        """Raise a SchemeError: quantkit does not choose these codes."""
        self._refuse()

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Raise a SchemeError: quantkit does not choose these codes."""
        self._refuse()

    def rounder(self, grid: Grid, rows: int, columns: int) -> Rounder:
        """Raise a SchemeError: quantkit does not choose these codes."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise SchemeError(
            f"only {self.scheme.quantizer}'s own quantizer chooses codes of {self.scheme.describe()}",
            f"use method: {self.scheme.quantizer}",
        )
