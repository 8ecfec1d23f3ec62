"""Safetensors checkpoints, read and written one tensor at a time.

The file format is https://huggingface.co/docs/safetensors: eight bytes of little-endian header length, a
JSON header, then the tensors' bytes. It is read and written here directly, so that memory holds one tensor
and never a mapped file: one that becomes shorter is an error then and not the end of the process. It is as fast
as the package safetensors.
"""

from __future__ import annotations

from quantkit.checkpoint.header import FLOATS, INDEX_FILE, SINGLE_FILE
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.writer import ShardWriter

__all__ = ["FLOATS", "INDEX_FILE", "SINGLE_FILE", "CheckpointReader", "ShardWriter"]
