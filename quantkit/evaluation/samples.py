"""Continuations to read side by side: a few prompts, what the float model writes after them, and where a file parts.

Every continuation is greedy, by the model as its scorer has loaded it. A file that goes with the float model reads its
continuation first, at once: as far as its own likeliest tokens are the same there is nothing to write anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit import records
from quantkit.errors import CalibrationError, EvaluationError
from quantkit.evaluation.answers import Question, question_of
from quantkit.evaluation.texts import Windows
from quantkit.recipe import SampleSpec
from quantkit.records import Message, Record
from quantkit.runtimes.base import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORT, LONGEST_DRAWN = 64, 256
"""Tokens of a prompt that is drawn and not given: longer ones than the first are taken where there are not enough of
them, and longer ones than the second not at all. They take time, and nobody reads them."""
PLAIN_TOKENS = 24
"""Tokens of a plain text that are a prompt."""
LONGEST_SHOWN = 600


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the models are given.

    Attributes:
        origin: ``evaluation.samples``, the name of its file, ``evaluation.answers``, or the text that they are from.
        texts: of each prompt what people read.
        ids: and what the model does, token ids.
        new_tokens: to write after each, at most.
    """

    origin: str
    texts: list[str]
    ids: list[list[int]]
    new_tokens: int

    @property
    def context_length(self) -> int:
        """Tokens that the runtime has to have room for."""
        return max(map(len, self.ids), default=0) + self.new_tokens


def sample_prompts(
    spec: SampleSpec,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    *,
    questions: Sequence[Question],
    conversations: Mapping[str, Sequence[Record]],
    windows: Mapping[str, Windows],
) -> Prompts:
    """The prompts of a recipe; without any, some of what the evaluation has read anyway.

    These are the questions of ``evaluation.answers``; or the conversations of the first text that has some, up to their
    last answers; or the first tokens of windows of the first text, as far apart as they lie.

    Args:
        spec: the recipe's section.
        tokenizer: the model's.
        longest: tokens that the model reads at most.
        questions: that the model is asked.
        conversations, windows: of each text.

    Raises:
        EvaluationError: a prompt of the recipe's and its continuation are longer than the model reads.
        CalibrationError: the file cannot be read, or the chat template refuses a prompt of the recipe's.
    """
    if spec.prompts or spec.file:
        given = [_turn(prompt, tokenizer) for prompt in spec.prompts] or _of_file(spec, tokenizer)
        found = [question_of(record, tokenizer) for record in given[: spec.count or None]]
        _check_length(found, longest - spec.max_new_tokens)
        return _prompts(Path(spec.file).name if spec.file else "evaluation.samples", found, spec)
    count, longest = spec.count or SampleSpec.DRAWN, min(LONGEST_DRAWN, longest - spec.max_new_tokens)
    drawn = _shortest(questions, longest)
    if drawn:
        return _prompts("evaluation.answers", drawn[:count], spec)
    for name, held in conversations.items():
        drawn = _shortest(_asked(held, tokenizer), longest)
        if drawn:
            return _prompts(name, drawn[:count], spec)
    first = next(iter(windows.values()))
    places = range(0, len(first.ids), max(1, len(first.ids) // count))
    ids = [first.ids[place, : min(PLAIN_TOKENS, longest)].tolist() for place in places][:count]
    return Prompts(first.name, [_text(tokenizer, each, special=False) for each in ids], ids, spec.max_new_tokens)


def samples(
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    ends: Collection[int],
    beside: Sequence[Mapping[str, Any]] | None,
    on_sample: Callable[[int, int], None],
) -> dict[str, Any]:
    """What the model writes after each prompt.

    Args:
        model: as its runtime has loaded it.
        tokenizer: the model's.
        prompts: what it is given.
        ends: ids that end a text.
        beside: the float model's ``items``; None for the float model itself.
        on_sample: called with the number of prompts done and their total.

    Returns:
        ``origin``, ``max_new_tokens`` and ``items``, each with ``prompt``, ``prompt_tokens``, ``token_ids``, ``end``
        (the token that ended it, or None), ``parts_at`` (how many tokens it has in common with the float model's; None
        where all) and ``pieces``: the text before the token at which they part, of that token, and after it.

    Raises:
        EvaluationError: ``beside`` is of other prompts.
    """
    if beside is not None and [each["prompt"] for each in beside] != [_shown(text) for text in prompts.texts]:
        raise EvaluationError("the float model was given other prompts than this file", "score the float model again")
    items, guesses = [], True
    for place, (text, ids) in enumerate(zip(prompts.texts, prompts.ids, strict=True)):
        other = None if beside is None else _with_end(beside[place])
        written = _continued(model, ids, prompts.new_tokens, ends, other if other and guesses else ())
        tokens, end = (written[:-1], written[-1]) if written and written[-1] in ends else (written, None)
        parts = None if other is None else _parting(written, other)
        guesses = parts is None or 2 * parts >= prompts.new_tokens
        items.append(
            {
                "prompt": _shown(text),
                "prompt_tokens": len(ids),
                "token_ids": tokens,
                "end": end,
                "parts_at": parts,
                "pieces": _pieces(tokenizer, tokens, parts),
            }
        )
        on_sample(place + 1, len(prompts.ids))
    return {"origin": prompts.origin, "max_new_tokens": prompts.new_tokens, "items": items}


def _continued(
    model: LoadedModel, prompt: Sequence[int], count: int, ends: Collection[int], guess: Sequence[int]
) -> list[int]:
    """The likeliest tokens one after another, ``count`` of them or to one of ``ends``, which is then the last.

    ``guess`` is read at once, and where the model would have written the same, it has.
    """
    ids = list(guess[: _agreeing(model, prompt, guess)])
    if len(ids) == count or (ids and ids[-1] in ends):
        return ids
    for token in islice(model.greedy(torch.tensor([*prompt, *ids], dtype=torch.int64)), count - len(ids)):
        ids.append(token)
        if token in ends:
            break
    return ids


@torch.inference_mode()
def _agreeing(model: LoadedModel, prompt: Sequence[int], guess: Sequence[int]) -> int:
    """How many tokens of a guess are what the model finds likeliest after those before them."""
    if not guess:
        return 0
    logits = model.logits(torch.tensor([*prompt, *guess[:-1]], dtype=torch.int64))[len(prompt) - 1 :]
    same = logits.argmax(dim=-1).cpu() == torch.tensor(guess)
    return len(guess) if bool(same.all()) else int(same.int().argmin())


def _parting(ids: Sequence[int], other: Sequence[int]) -> int | None:
    common = _common(ids, other)
    return None if common == len(ids) == len(other) else common


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], parts: int | None) -> list[str]:
    """A text in three: before a token, of that token, after it. A character of several tokens is not cut."""
    whole = _text(tokenizer, ids)
    if parts is None:
        return [whole, "", ""]
    before = until = _common(_text(tokenizer, ids[:parts]), whole)
    while until == before and parts < len(ids):
        parts += 1
        until = _common(_text(tokenizer, ids[:parts]), whole)
    return [whole[:before], whole[before:until], whole[until:]]


def _common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of what two sequences begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))


def _with_end(sample: Mapping[str, Any]) -> list[int]:
    return [*sample["token_ids"], *([] if sample["end"] is None else [sample["end"]])]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = True) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def _shown(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


def _prompts(origin: str, questions: Sequence[Question], spec: SampleSpec) -> Prompts:
    return Prompts(origin, [each.text for each in questions], [each.prompt for each in questions], spec.max_new_tokens)


def _asked(held: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Questions of conversations, in their order; what the template refuses is passed over."""
    found: list[Question] = []
    for record in held:
        try:
            found.append(question_of(record, tokenizer))
        except CalibrationError:
            continue  # the text itself was read; which of its records can be asked is not what people wait for
    return found


def _shortest(questions: Sequence[Question], longest: int) -> list[Question]:
    """Those of at most ``longest`` tokens in their order, short ones before the others."""
    fitting = [question for question in questions if len(question.prompt) <= longest]
    return sorted(fitting, key=lambda question: len(question.prompt) > SHORT)


def _check_length(questions: Sequence[Question], longest: int) -> None:
    for number, question in enumerate(questions, start=1):
        if len(question.prompt) > longest:
            raise EvaluationError(
                f"evaluation.samples: prompt {number} has {len(question.prompt)} tokens, and the model reads {longest}"
                " before a continuation",
                "shorten it, or lower evaluation.samples.max_new_tokens",
            )


def _turn(prompt: str, tokenizer: PreTrainedTokenizerBase) -> Record:
    """A prompt as a turn of the user's; for a model without a chat template as it stands."""
    if records.template_text("auto", tokenizer) is None:
        return Record(text=prompt)
    return Record(messages=(Message("user", prompt),))


def _of_file(spec: SampleSpec, tokenizer: PreTrainedTokenizerBase) -> list[Record]:
    """The prompts of a file: each line of a text, each record of a data set, of which answers are left out.

    Raises:
        CalibrationError: it cannot be read, or holds none.
    """
    path = Path(str(spec.file))
    layout = records.Layout(spec.columns or None, spec.tags, prompts=True)
    found = records.read_file(path, layout=layout).records
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for record in found for line in str(record.text).splitlines()]
        return [_turn(line, tokenizer) for line in lines if line]
    alone = [record.messages[0].content if len(record.messages) == 1 else record.text for record in found]
    return [record if text is None else _turn(text, tokenizer) for record, text in zip(found, alone, strict=True)]
