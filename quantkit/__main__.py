"""The command line as a module: `python -m quantkit`."""

from __future__ import annotations

from quantkit.cli import main

if __name__ == "__main__":
    main()
