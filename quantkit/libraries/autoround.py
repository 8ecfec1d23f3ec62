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
    "amp": True,
    "seed": 42,
}
"""Options of ``AutoRound`` and ``SignRoundConfig`` with their defaults; a rate of 0 is what its recipe has."""
TWO_BITS = {"iters": 1000, "enable_alg_ext": True}
"""Its README recommends ``auto-round-best`` with ``enable_alg_ext`` for 2 bits."""
RATES = ("lr", "minmax_lr")
RECIPES = {50: ("auto-round-light", 5e-3), 200: ("auto-round", None), 1000: ("auto-round-best", None)}
"""By iterations, its recipe (``cli/main.py``, ``RECIPES``) and that one's rate; None is the library's own choice."""
LAST_TOKEN = "auto-round leaves the last token of each row, and those before it that are the same, out of its loss"
PADDED = (
    "rows were padded to {} tokens, as auto-round's batches need; padding counts neither in attention nor in its loss"
)
ONE_BY_ONE = "rows differ in length, and no token is free for padding: batches of {} became as many steps of one row"


@LIBRARIES.register
class AutoRoundLibrary(Library):
    """``AutoRound(...).quantize_and_save`` in its format ``llm_compressor``.

    Rows shorter than ``seqlen`` would be dropped, and a batch joins rows of one length only, so that rows are padded to
    the longest; its loss leaves out the tokenizer's padding token wherever it stands, so that one is taken that no row
    has.
    """

    name = "autoround"
    summary = "SignRound of Intel's auto-round: rounding and ranges tuned block by block"
    distribution = "auto-round"
    requirements = ("auto-round==0.16.1", "compressed-tensors==0.20.0", "torch==2.14.1", "transformers==5.23.0")
    offers = (
        Offer(
            "autoround",
            BITS,
            "compressed-tensors",
            calibrated=True,
            symmetric=(True, False),
            options=TUNING,
            by_bits={2: TWO_BITS},
        ),
        Offer("rtn", BITS, "compressed-tensors", calibrated=True, symmetric=(True, False)),
    )

    def quantize(self, request: Request) -> Used:
        """Quantize, and put what it saved where it is looked for."""
        from auto_round import AutoRound

        from quantkit.libraries._attention import own_arguments
        from quantkit.libraries._blocks import telling
        from quantkit.libraries._counting import Counter
        from quantkit.libraries._layers import kept_float
        from quantkit.libraries._models import copy_tokenizer, linear_layers, load

        model = load(request)
        ignored = kept_float(linear_layers(model), request.ignore)
        tokenizer = _tokenizer(request.model)
        padding = padding_token(request, len(tokenizer), tokenizer.pad_token_id)
        tokenizer.pad_token = None if padding is None else tokenizer.convert_ids_to_tokens(padding)
        settings = settings_for(request, ignored, padding)
        counter = Counter(request.tokens)
        with (
            own_arguments(model, request.tokens) as others,
            counter.watching(model, padding),
            telling(model, request.progress),
        ):
            rounding = AutoRound(model, tokenizer, dataset=rows_of(request, padding), **settings)
            rounding.quantize_and_save(str(request.out), format=FORMAT)
        lift(request.out)
        copy_tokenizer(request.model, request.out)
        return counter.used(*notes(request, settings, padding, others))


def settings_for(request: Request, ignored: list[str], padding: int | None) -> dict[str, Any]:
    """Arguments of ``AutoRound`` beside model, tokenizer and rows.

    Args:
        request: what to do.
        ignored: names of layers that stay float.
        padding: token with which rows are padded to the longest; None is none.
    """
    lengths = {len(row) for row in request.tokens}
    options = {key: value for key, value in request.options.items() if key not in RATES or value}
    if request.method == "rtn":
        options = {"iters": 0, "batch_size": 1}
    else:
        rate = RECIPES.get(options["iters"], ("", None))[1]
        options = options if rate is None else {"lr": rate, **options}
        if len(lengths) > 1 and padding is None:
            options["gradient_accumulate_steps"] *= options["batch_size"]
            options["batch_size"] = 1
    return {
        "format": FORMAT,
        "scheme": "W4A16",
        "bits": request.bits,
        "group_size": request.group_size,
        "sym": request.symmetric,
        "seqlen": min(lengths) if padding is None else max(lengths),
        "nsamples": len(request.tokens),
        "ignore_layers": ",".join(ignored),
        "quant_lm_head": "lm_head" not in ignored,
        "device_map": request.device,
        "enable_torch_compile": False,
        "trust_remote_code": False,
        **options,
    }


def padding_token(request: Request, vocabulary: int, usual: int | None) -> int | None:
    """The token to pad rows with, which none of them has: the ``usual`` one or another; None where no row needs any.

    A method that does not tune takes rows one by one. None too where every token is used.
    """
    if request.method == "rtn" or len({len(row) for row in request.tokens}) == 1:
        return None
    used = set().union(*request.tokens)
    free = [token for token in (usual, *reversed(range(vocabulary))) if token is not None and token not in used]
    return next(iter(free), None)


def rows_of(request: Request, padding: int | None) -> list[dict[str, Any]]:
    """Rows as the library takes them without a tokenizer, padded to the longest where there is a ``padding``."""
    import torch

    longest = max(map(len, request.tokens)) if padding is not None else 0
    rows = []
    for row in request.tokens:
        missing = max(longest - len(row), 0)
        ids = torch.tensor([[*row, *[padding] * missing]])
        rows.append({"input_ids": ids, "attention_mask": torch.tensor([[1] * len(row) + [0] * missing])})
    return rows


def notes(request: Request, settings: dict[str, Any], padding: int | None, others: int) -> list[str]:
    """What someone who compares should know; ``others`` are blocks that are called in another way than the first."""
    from quantkit.libraries._attention import OWN_ATTENTION

    told = [OWN_ATTENTION.format(others)] if others else []
    if request.method == "rtn":
        return told
    rows = PADDED.format(settings["seqlen"]) if padding is not None else LAST_TOKEN
    asked, ran = request.options["batch_size"], settings["batch_size"]
    return [recipe_note(request), rows, *([ONE_BY_ONE.format(asked)] if ran != asked else []), *told]


def recipe_note(request: Request) -> str:
    """Which of the library's recipes was run, or which its iterations are those of, and what is not as there."""
    iters = request.options["iters"]
    usual = {**TUNING, **(TWO_BITS if request.bits == 2 else {}), "iters": iters}
    changed = ", ".join(f"{key} {value}" for key, value in request.options.items() if usual.get(key) != value)
    but = f", but with {changed}" if changed else ""
    if iters not in RECIPES:
        return f"none of auto-round's recipes: {iters} iterations{but}"
    name, rate = RECIPES[iters]
    usual_rate = (2 if request.bits <= 3 and iters >= 1000 else 1) / iters  # ``SignRoundConfig._lr_for_bits``
    return f"auto-round's recipe {name}{but or f': {iters} iterations, lr {rate or usual_rate:g}, batches of 8'}"


def lift(folder: Path) -> None:
    """Move the files of the only folder in ``folder``, which auto-round names after the model, into it."""
    inner = next((path for path in folder.iterdir() if path.is_dir()), None)
    if inner is None or (folder / "config.json").exists():
        return
    for path in inner.iterdir():
        shutil.move(path, folder / path.name)
    inner.rmdir()


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
