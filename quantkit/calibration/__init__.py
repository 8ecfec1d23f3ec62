"""The calibration stage: records to token rows, drawn and packed the same way every time, with an audit.

:func:`build` writes the stage's folder or reuses it, :func:`load` reads it back.
"""

from __future__ import annotations

from quantkit.calibration.audit import audit_lines
from quantkit.calibration.stage import CODE_VERSION, CalibrationSet, build, load, token_ids_sha256

__all__ = ["CODE_VERSION", "CalibrationSet", "audit_lines", "build", "load", "token_ids_sha256"]
