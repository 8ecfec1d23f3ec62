"""Libraries in environments of their own: the environments, the worker process in them, and what it leaves."""

from __future__ import annotations
