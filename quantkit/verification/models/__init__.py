"""What becomes of each architecture: found by quantizing a small model of it, and kept as data.

``models.json`` beside this file is written by ``python -m tests.models_file``; a test does it again and compares.
"""

from __future__ import annotations

from quantkit.verification.models.table import MODELS_FILE, chosen, models_markdown, models_table, read_models

__all__ = ["MODELS_FILE", "chosen", "models_markdown", "models_table", "read_models"]
