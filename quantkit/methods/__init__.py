"""Methods: how the codes of a weight are chosen. One file each."""

from __future__ import annotations

from quantkit.methods.base import Method
from quantkit.system.registry import Registry

ALSO = {"round-to-nearest": "rtn", "nearest": "rtn", "ggml": "llama.cpp", "unquantized": "none"}
METHODS = Registry[Method]("method", "quantkit.methods", "quantkit.methods", without=("base", "tuning"), also=ALSO)
