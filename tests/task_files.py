"""A task file with its data, for the tests of tasks."""

from __future__ import annotations

import json
from pathlib import Path

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{prompt}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GENERATE = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
PERPLEXITY = """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: data.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity}
"""


def write_data(folder: Path, count: int = 12) -> Path:
    """Documents with a question, three choices of unlike length, and the number of the right one."""
    rows = [
        {"question": f"What is {n} and {n}?", "choices": [str(2 * n), "a lot more", f"not {n}"], "right": n % 3}
        for n in range(count)
    ]
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_task(folder: Path, prompt: str = "Question: {{question}}\\nAnswer:", *, name: str = "sums") -> Path:
    """A task of multiple choice with its data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    file = folder / f"{name}.yaml"
    file.write_text(TASK.format(name=name, prompt=prompt), encoding="utf-8")
    return file
