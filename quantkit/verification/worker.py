"""The process that verifies: ``python -m quantkit.verification.worker JOB.json``.

It loads the checkpoint, or a process of another interpreter that it starts does.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from typing import Any

import numpy as np
import torch

from quantkit.evaluation.memory import peak_rss
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadedModel, LoadOptions
from quantkit.system.distribution import own_version
from quantkit.system.worker import serve
from quantkit.verification.job import VerificationJob


def perform(job: VerificationJob) -> dict[str, Any]:
    """Load the checkpoint, write the logits, and continue a prompt.

    Raises:
        QuantkitError: the runtime cannot load it.
    """
    started = time.perf_counter()
    options = LoadOptions(job.device, job.dtype, job.context_length, job.trust_remote_code, job.python)
    with closing(RUNTIMES.get(job.runtime).load(job.checkpoint, options)) as model:
        return _answer(job, model, time.perf_counter() - started)


def _answer(job: VerificationJob, model: LoadedModel, seconds: float) -> dict[str, Any]:
    _write_logits(job, model)
    prompt = torch.tensor(job.prompts[job.generate])
    facts = model.facts()
    return {
        "generated": model.decode(prompt, job.new_tokens)[0] if job.new_tokens else [],
        "load_seconds": seconds,
        "peak_bytes": peak_rss(model.process),
        "dtype": model.dtype,
        "device": model.device,
        "vocabulary": model.vocabulary,
        "versions": {"quantkit": own_version(), "torch": torch.__version__, **facts},
        "settings": {"threads": facts.get("threads", torch.get_num_threads()), **model.settings},
        "dropped": list(model.dropped),  # the loaders of this interpreter raise for a tensor that finds no place
    }


def _write_logits(job: VerificationJob, model: LoadedModel) -> None:
    shape = (sum(map(len, job.prompts)), model.vocabulary)
    rows = np.lib.format.open_memmap(job.logits, mode="w+", dtype=np.float32, shape=shape)
    place = 0
    for ids in job.prompts:
        found = model.logits(torch.tensor(ids)).float().cpu().numpy()
        rows[place : place + len(ids)] = found[:, : model.vocabulary]
        place += len(ids)
    rows.flush()


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], lambda job, report: perform(VerificationJob.from_json(job))))
