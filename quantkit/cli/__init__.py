"""The command line: one thin command per public function."""

from __future__ import annotations

import signal
from importlib import import_module

from quantkit.cli.base import app

__all__ = ["app", "main"]

EXIT_TERMINATED = 143

for _module in ("running", "checkpoints", "listings"):  # each adds its commands, in the order of the help
    import_module(f"quantkit.cli.{_module}")


def main() -> None:
    """The entry point; a request to terminate unwinds the run, so that nothing half-written stays."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(_number: int, _frame: object) -> None:
    raise SystemExit(EXIT_TERMINATED)
