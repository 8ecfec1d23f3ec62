"""A plugin of pytest: how long the slow test files took, all processes together."""

from __future__ import annotations

from collections import defaultdict

import pytest

LEAST_SECONDS = 10.0


class SlowFiles:
    """Sums the time of each file's tests, fixtures included, and lists the slow files at the end.

    Under pytest-xdist the process that started the others hears of every test, and it alone has a summary.

    Args:
        least: seconds from which on a file is listed.
    """

    def __init__(self, least: float = LEAST_SECONDS) -> None:
        self.least = least
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a phase of a test: its set-up, its call or its tear-down."""
        self.seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List the slow files, the slowest first."""
        slow = sorted((taken, name) for name, taken in self.seconds.items() if taken >= self.least)
        if slow:
            terminalreporter.section(f"files of {self.least:g} seconds and more")
            for taken, name in reversed(slow):
                terminalreporter.write_line(f"{taken:8.1f} s  {name}")
