"""Tell a tracking server of a run: parameters, figures, versions, and the report.

The record is made of ``report.json`` alone, so that a run can be told of when it ends, or later. What speaks with the
server runs in a process of its own, with MLflow's usage statistics switched off.
"""

from __future__ import annotations

from quantkit.tracking.process import check_tracking, track, track_after, track_again

__all__ = ["check_tracking", "track", "track_after", "track_again"]
