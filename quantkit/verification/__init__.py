"""Prove that a runtime computes what a checkpoint says: load it there, and compare with the reference decoder.

Runtime and reference each run in a fresh process, by one protocol: a job goes in as JSON
(:mod:`quantkit.verification.job`), a result comes out as JSON beside a file of logits. So runtimes that live in an
interpreter of their own take part as well.
"""

from __future__ import annotations

from quantkit.verification.verdict import verdict_lines, verify

__all__ = ["verdict_lines", "verify"]
