"""Runs the proof: ``python benchmarks/gpu_proof``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_proof.proof import main

if __name__ == "__main__":
    main()
