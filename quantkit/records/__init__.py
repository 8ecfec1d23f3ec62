"""Records: the texts and conversations that calibration and evaluation read.

A data set is a file, a hub data set or a name of quantkit's registry; :func:`load` takes any of them. What it
cannot use it lists, with the reason. :func:`encode` turns a record into the tokens that the model expects.

Nothing here imports torch, transformers or datasets before a function needs them.
"""

from __future__ import annotations

from quantkit.records.dataset import Message, Record, RecordSet, Skipped
from quantkit.records.files import read_file
from quantkit.records.hub import read_hub
from quantkit.records.named import NamedDataset, dataset_names, named_dataset, read_named
from quantkit.records.references import identify, load
from quantkit.records.render import (
    describe_template,
    encode,
    encode_question,
    render,
    render_question,
    template_text,
)

__all__ = [
    "Message",
    "NamedDataset",
    "Record",
    "RecordSet",
    "Skipped",
    "dataset_names",
    "describe_template",
    "encode",
    "encode_question",
    "identify",
    "load",
    "named_dataset",
    "read_file",
    "read_hub",
    "read_named",
    "render",
    "render_question",
    "template_text",
]
