"""A tiny model that has learned something, so that damage to it shows in its perplexity."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.tiny import make_model, tiny_tokenizer

PROSE = Path(__file__).parent.parent / "quantkit" / "eval_data" / "prose.txt"
ROWS, LENGTH = 16, 64


def make_trained(folder: Path, steps: int = 150) -> Path:
    """Write a tiny Llama that has read the bundled prose to ``folder``."""
    make_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    ids = torch.tensor(tiny_tokenizer()(PROSE.read_text(encoding="utf-8")).input_ids)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - LENGTH, (ROWS,), generator=draw)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    return folder
