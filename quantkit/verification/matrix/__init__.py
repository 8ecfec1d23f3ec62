"""Which methods, formats and runtimes go together: found by doing it, and kept as data.

``matrix.json`` beside this file is written by :mod:`quantkit.verification.matrix.build`; a test does it again and
compares.
"""

from __future__ import annotations

from quantkit.verification.matrix.table import MATRIX_FILE, matrix_markdown, matrix_table, read_matrix, reasons_markdown

__all__ = ["MATRIX_FILE", "matrix_markdown", "matrix_table", "read_matrix", "reasons_markdown"]
