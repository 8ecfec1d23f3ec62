"""The history: a record of every run in one SQLite file, which any SQLite tool reads."""

from __future__ import annotations

from quantkit.run_history.record import RunRecord
from quantkit.run_history.store import Accepted, History, Wanted

__all__ = ["Accepted", "History", "RunRecord", "Wanted"]
