"""``python -m tests.audit``: look the installed packages up in the data base of known holes (pip-audit).

A hole ends it with 1. Where the data cannot be reached it says so and ends with 0, so that work goes on offline.
"""

from __future__ import annotations

import json
import subprocess
import sys

SECONDS = 300


def main() -> int:
    """Run pip-audit and tell what came of it."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        packages = json.loads(done.stdout)["dependencies"]
    except (OSError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
        return _say(f"audit: could not run: {type(error).__name__}; no package was looked up", 0)
    looked_up = [package for package in packages if "vulns" in package]
    holes = [
        f"{package['name']} {package['version']}: {hole['id']}"
        for package in packages
        for hole in package.get("vulns", [])
    ]
    if not looked_up:
        return _say("audit: could not run: its data cannot be reached from here; no package was looked up", 0)
    told = "".join(f"\n  {hole}" for hole in holes)
    return _say(
        f"audit: {len(looked_up)} of {len(packages)} packages looked up, {len(holes)} known holes{told}",
        int(bool(holes)),
    )


def _say(text: str, code: int) -> int:
    sys.stdout.write(text + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
