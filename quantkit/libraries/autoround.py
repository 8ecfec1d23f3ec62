"""auto-round (Intel): rounding and ranges tuned block by block with signed gradients, written as compressed-tensors.

See SignRound (Cheng et al. 2023, arXiv:2309.05516) and https://github.com/intel/auto-round; what is said here of the
library was read in release 0.16.1.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from quantkit.libraries import LIBRARIES
from quantkit.libraries.base import Library, Offer, Request, Used

FORMAT = "llm_compressor"
BITS = (4, 2, 3, 8)
TUNING = {
    "iters": 200,
    "lr": 0.0,
    "minmax_lr": 0.0,
    "batch_size": 8,
    "gradient_accumulate_steps": 1,
    "enable_minmax_tuning": True,
    "enable_quanted_input": True,
    "enable_alg_ext": False,
    "seed": 42,
}
"""Options of ``AutoRound`` and ``SignRoundConfig`` with their defaults; a rate of 0 is None there: its own choice."""
RATES = ("lr", "minmax_lr")
LAST_TOKEN = "auto-round leaves the last token of each row, and those before it that are the same, out of its loss"
ONE_BY_ONE = "rows differ in length: batches of {} became as many accumulated steps of one row"


@LIBRARIES.register
class AutoRoundLibrary(Library):
    """``AutoRound(...).quantize_and_save`` in its format ``llm_compressor``.

    Rows shorter than ``seqlen`` would be dropped, so that it is told the length of the shortest; rows of tensors are
    not cut. A batch joins rows of one length only.
    """

    name = "autoround"
    summary = "SignRound of Intel's auto-round: rounding and ranges tuned block by block"
    distribution = "auto-round"
    requirements = ("auto-round==0.16.1", "compressed-tensors==0.20.0", "torch==2.14.1", "transformers==5.23.0")
    offers = (
        Offer("autoround", BITS, "compressed-tensors", calibrated=True, symmetric=(True, False), options=TUNING),
        Offer("rtn", BITS, "compressed-tensors", calibrated=True, symmetric=(True, False)),
    )

    def quantize(self, request: Request) -> Used:
        """Quantize, and put what it saved where it is looked for."""
        from auto_round import AutoRound

        from quantkit.libraries._blocks import telling
        from quantkit.libraries._counting import Counter
        from quantkit.libraries._layers import kept_float
        from quantkit.libraries._models import copy_tokenizer, linear_layers, load

        model = load(request)
        ignored = kept_float(linear_layers(model), request.ignore)
        settings = settings_for(request, ignored)
        counter = Counter(request.tokens)
        with counter.watching(model), telling(model, request.progress):
            rounding = AutoRound(model, _tokenizer(request.model), dataset=rows_of(request), **settings)
            rounding.quantize_and_save(str(request.out), format=FORMAT)
        lift(request.out)
        copy_tokenizer(request.model, request.out)
        return counter.used(*notes(request, settings))


def settings_for(request: Request, ignored: list[str]) -> dict[str, Any]:
    """Arguments of ``AutoRound`` beside model, tokenizer and rows; ``ignored`` are names of layers that stay float."""
    lengths = {len(row) for row in request.tokens}
    options = {key: value for key, value in request.options.items() if key not in RATES or value}
    if request.method == "rtn":
        options = {"iters": 0, "batch_size": 1}
    elif len(lengths) > 1:
        options["gradient_accumulate_steps"] *= options["batch_size"]
        options["batch_size"] = 1
    return {
        "format": FORMAT,
        "scheme": "W4A16",
        "bits": request.bits,
        "group_size": request.group_size,
        "sym": request.symmetric,
        "seqlen": min(lengths),
        "nsamples": len(request.tokens),
        "ignore_layers": ",".join(ignored),
        "quant_lm_head": "lm_head" not in ignored,
        "device_map": request.device,
        "enable_torch_compile": False,
        "trust_remote_code": False,
        **options,
    }


def rows_of(request: Request) -> list[dict[str, Any]]:
    """Rows as the library takes them without a tokenizer."""
    import torch

    rows = [torch.tensor([list(row)]) for row in request.tokens]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def notes(request: Request, settings: dict[str, Any]) -> list[str]:
    """What someone who compares should know."""
    if request.method == "rtn":
        return []
    asked = request.options["batch_size"]
    return [LAST_TOKEN, *([ONE_BY_ONE.format(asked)] if settings["batch_size"] != asked else [])]


def lift(folder: Path) -> None:
    """Move the files of the only folder in ``folder``, which auto-round names after the model, into it."""
    inner = next((path for path in folder.iterdir() if path.is_dir()), None)
    if inner is None or (folder / "config.json").exists():
        return
    for path in inner.iterdir():
        shutil.move(path, folder / path.name)
    inner.rmdir()


def _tokenizer(folder: Path) -> Any:
    """The tokenizer without a padding token, which auto-round would leave out of its loss wherever it stands."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    return tokenizer
