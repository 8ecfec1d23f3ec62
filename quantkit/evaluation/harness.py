"""A loaded model as lm-evaluation-harness asks it: likelihoods of continuations, and texts.

The class has the interface of ``lm_eval.api.model.LM`` and gives what that package's own ``HFLM`` gives, from whatever
runtime loaded the model; it does not inherit, so that this module imports without the package.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from quantkit import records
from quantkit.calibration.model import added_bos
from quantkit.errors import EvaluationError
from quantkit.evaluation.generation import continuation
from quantkit.runtimes.base import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256
"""Where a task says nothing, as in ``HFLM``."""
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
Pair = tuple[list[int], list[int]]
"""Context and continuation, as token ids."""


@dataclass(frozen=True)
class HarnessModel:
    """A model with its tokenizer.

    Attributes:
        model: as a runtime has loaded it.
        tokenizer: the model's.
        ends: ids that end a text.
        max_length: tokens of context and continuation together; a longer context loses its beginning.
        on_progress: called with how many requests of the present kind are done, and how many there are.
    """

    model: LoadedModel
    tokenizer: PreTrainedTokenizerBase
    ends: Collection[int]
    max_length: int
    on_progress: Callable[[int, int], None]
    rank: int = 0
    world_size: int = 1

    @property
    def tokenizer_name(self) -> str:
        """What tells its prompts from another model's."""
        return str(self.tokenizer.name_or_path)

    @property
    def prefix(self) -> int:
        """What stands before a text without a context.

        Raises:
            EvaluationError: the tokenizer has neither a beginning nor an end of a text.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise EvaluationError("the tokenizer has neither a BOS nor an EOS token, which tasks need", "mend its config")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template in use, for the record."""
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it, with the beginning of the answer.

        Raises:
            EvaluationError: the task begins the answer itself.
            CalibrationError: the template fails.
        """
        if not add_generation_prompt:
            raise EvaluationError("the task begins the answers itself (gen_prefix)", "set its chat_template to false")
        messages = tuple(records.Message(turn["role"], turn["content"]) for turn in chat_history)
        return records.render(records.Record(messages=messages), self.tokenizer, awaits_answer=True)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each ``(context, continuation)`` its log-likelihood in nats, and whether it is the greedy one."""
        return self._scores([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each text its log-likelihood in nats, in disjoint windows of ``max_length``."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[list[Pair]] = []
        for request in requests:
            ids = self._encoded(request.args[0])
            cut = get_rolling_token_windows(ids, self.prefix, self.max_length, context_len=1)
            windows.append([make_disjoint_window(window) for window in cut])
        scores = iter(self._scores([pair for each in windows for pair in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each ``(context, options)`` what the model says, greedily, to the first stop word or end.

        Raises:
            EvaluationError: a task wants its texts drawn at random, or longer than ``max_length``.
        """
        texts = []
        self.on_progress(0, len(requests))
        for done, request in enumerate(requests, start=1):
            context, options = request.args
            count, stops = self._limits(options)
            prompt = self._encoded(context)[-(self.max_length - count) :]
            texts.append(continuation(self.model, self.tokenizer, prompt, count, ends=self.ends, stops=stops))
            self.on_progress(done, len(requests))
        return texts

    def _limits(self, options: Mapping[str, Any]) -> tuple[int, list[str]]:
        """Tokens to generate at most, and the words that end a text."""
        if options.get("do_sample") or float(options.get("temperature") or 0) > 0:
            raise EvaluationError(
                "the task wants answers that are drawn at random, and quantkit takes the likeliest",
                "write a task file that includes it, with 'do_sample: false' and 'temperature: 0'",
            )
        count = int(next((options[key] for key in _COUNTS if options.get(key) is not None), MAX_NEW_TOKENS))
        if count >= self.max_length:
            raise EvaluationError(
                f"the task writes up to {count} tokens, and max_length is {self.max_length}", "raise its max_length"
            )
        until = options.get("until") or []
        words = [until] if isinstance(until, str) else list(until)
        return count, [word for word in words if word]

    def _pair(self, context: str, text: str) -> Pair:
        """Spaces at the end of a context belong to what follows, as its tokens were learnt."""
        begun = self._encoded(context.rstrip()) if context else []
        if begun:
            whole = self._encoded(context + text)
            pair = (whole[: len(begun)], whole[len(begun) :])
        else:
            ids = self._encoded(context + text, special=False)
            pair = ([self.prefix], ids) if ids[:1] != [self.prefix] else (ids[:1], ids[1:])
        if not pair[1]:
            raise EvaluationError(f"the tokenizer has no tokens for the continuation {text!r}", "change the task")
        return pair

    def _encoded(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with those that the tokenizer adds by itself unless the text begins with BOS already."""
        bos = added_bos(self.tokenizer)
        begun = bos is not None and text.startswith(str(self.tokenizer.decode([bos])))
        added = special and not begun
        return [int(each) for each in self.tokenizer(text, add_special_tokens=added, verbose=False).input_ids]

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Likelihoods; contexts that several continuations share to their last token but one are read once."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (context, text) in enumerate(pairs):
            tokens = (context + text)[-(self.max_length + 1) : -1]
            places.setdefault(tuple(tokens), []).append(place)
        scores: dict[int, tuple[float, bool]] = {}
        self.on_progress(0, len(pairs))
        for read, logits in self._read(sorted(places, key=len, reverse=True)):
            for place in places[read]:
                scores[place] = _score(logits, pairs[place][1][-self.max_length :])
            self.on_progress(len(scores), len(pairs))
        return [scores[place] for place in range(len(pairs))]

    def _read(self, texts: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        rows = [torch.tensor(text, dtype=torch.int64) for text in texts]
        return zip(texts, self.model.logits_of(rows), strict=True)


def _score(logits: torch.Tensor, text: Sequence[int]) -> tuple[float, bool]:
    """Of a text whose last token but one gave the last row of logits."""
    log_probs = torch.log_softmax(logits[-len(text) :].float(), dim=-1)
    if not log_probs.amin().isfinite():
        raise EvaluationError(
            "the model gives NaN or infinite logits on a task",
            "its weights are broken, or its activations overflow: try evaluation.dtype float32",
        )
    targets = torch.tensor(text, device=log_probs.device)
    found = log_probs.gather(1, targets.unsqueeze(1)).sum().item()
    return found, bool((log_probs.argmax(dim=-1) == targets).all())
