"""The first decoder blocks of a model, as a model of its own: for trying libraries in minutes instead of hours.

    python benchmarks/cut_model.py MODEL OUT --blocks 4

MODEL is a folder, hub id, GGUF file or ``package:`` reference. What comes of it talks nonsense, but its matrices and
the activations that reach them are those of the model.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.checkpoint.companions import copy_companions
from quantkit.recipe import ModelSpec
from quantkit.source import resolve
from quantkit.system.artifacts import new_folder, read_json, write_json, write_stage

BLOCK = re.compile(r"^model\.layers\.(\d+)\.")
PER_BLOCK = ("layer_types", "mlp_layer_types")
"""Lists of ``config.json`` with an entry for each block."""


def cut(model: Path, out: Path, blocks: int) -> list[str]:
    """Write the first blocks of the float model in ``model`` to ``out``; returns the names of its tensors."""
    reader, config = CheckpointReader(model), read_json(model / "config.json")
    kept = []
    for name in reader.names():
        found = BLOCK.match(name)
        if found is None or int(found[1]) < blocks:
            kept.append(name)
    config["num_hidden_layers"] = blocks
    config |= {key: config[key][:blocks] for key in PER_BLOCK if isinstance(config.get(key), list)}
    with new_folder(out) as folder:
        copy_companions(model, folder)
        with ShardWriter(folder) as writer:
            for name in kept:
                writer.declare(name, reader.dtype(name), reader.shape(name))
            for name in kept:
                writer.write(name, reader.read(name))
        write_json(folder / "config.json", config)
        write_stage(folder, "cut", {"model": str(model), "blocks": blocks})
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = resolve(ModelSpec(source=given.model), Path(scratch))
        kept = cut(source.folder, given.out, given.blocks)
    print(f"{given.out}: {given.blocks} blocks, {len(kept)} tensors")


if __name__ == "__main__":
    main()
