"""The keys by which older releases read a model's files, beside those that transformers 5 writes.

transformers 5 writes ``rope_parameters`` where releases before it read ``rope_theta`` and ``rope_scaling``, and take
10,000 if they are not there, without a word: huggingface/transformers 42390, vllm-project/vllm 28542 and 42624,
sgl-project/sglang 14745. It writes ``dtype`` where those before 4.56 read ``torch_dtype``; ``TokenizersBackend`` as the
class of a tokenizer, which those before it do not have (huggingface/transformers 47553, unslothai/unsloth 8444);
``extra_special_tokens`` as a list where they want a mapping and read such a list as ``additional_special_tokens``; and
leaves to ``tokenizer.json`` whether a text begins with BOS and ends with EOS, which tokenizers of Llama's kind before 5
take from ``add_bos_token`` and ``add_eos_token``, true and false if these are not there. What is written here was read
by 4.46.3 and 4.57.6 as by 5.23.

Which older keys a model has is not looked up but asked: the model's own class of transformers still reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.system.artifacts import read_json, write_json

ROPE = "rope_parameters"
THETAS = ("rope_theta", "rotary_emb_base", "global_rope_theta")
"""What the base frequency was called; of GPT-NeoX the second, of ModernBERT the last."""
FACTORS = ("partial_rotary_factor", "rotary_pct")
LOCAL_THETAS = ("rope_local_base_freq", "local_rope_theta")
"""What the base frequency of layers with a window was called; of ModernBERT the latter."""
GLOBAL_LAYERS, LOCAL_LAYERS = "full_attention", "sliding_attention"
OLD_KINDS = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3"})
"""Kinds of rotary embeddings that releases before 5 compute."""
ORIGINAL = "original_max_position_embeddings"
USUAL = 10_000.0
"""The base frequency that releases take which find none."""
PROBE = 31_337.0
"""A base frequency and, a millionth of it, a factor that no model has."""
NEW_TOKENIZERS = frozenset({"TokenizersBackend"})
"""Classes that read ``tokenizer.json`` and nothing else, as PreTrainedTokenizerFast does in every release."""
FRAMING_TOKENIZERS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Classes that before 5 put BOS and EOS as their config says, whatever ``tokenizer.json`` does."""
FRAMES = ("add_bos_token", "add_eos_token")
TOKENIZER_CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config, and those of its parts, with the older keys that mean the same; nothing is taken away."""
    found = {
        key: with_older_keys(each) if isinstance(each, dict) and key != ROPE else each for key, each in config.items()
    }
    if isinstance(found.get("dtype"), str):
        found.setdefault("torch_dtype", found["dtype"])
    with _quiet():
        return found | _older_rope(found)


def newer_than(config: Mapping[str, Any], tokenizer: Mapping[str, Any] | None = None) -> list[str]:
    """What releases before transformers 5 misread of a model's files, since no older keys say it too; empty for none.

    Args:
        config: ``config.json``.
        tokenizer: ``tokenizer_config.json``.
    """
    parts = [("", config), *((f"{key}.", each) for key, each in config.items() if isinstance(each, dict))]
    parts = [(name, part) for name, part in parts if "vocab_size" in part]  # what sees or hears turned as its code said
    found = [
        f"{name}{ROPE}, beside which no older keys stand"
        for name, part in parts
        if _turns(part) and not any(key in part for key in (*THETAS, "rope_scaling"))
    ]
    chosen = str((tokenizer or {}).get("tokenizer_class", ""))
    return [*found, *([f"the tokenizer class {chosen}"] if chosen.endswith("Backend") else [])]


def add_older_tokenizer_keys(folder: Path) -> None:
    """Rewrite ``tokenizer_config.json`` of a folder in words that every release of transformers reads alike.

    Raises:
        OutputError: the file cannot be written.
    """
    file = folder / TOKENIZER_CONFIG
    given = read_json(file) if file.is_file() else {}
    if not isinstance(given, dict):
        return
    config = dict(given)
    if config.get("tokenizer_class") in NEW_TOKENIZERS and (folder / TOKENIZER).is_file():
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if str(config.get("tokenizer_class")).removesuffix("Fast") in FRAMING_TOKENIZERS:
        config = {**_frames(folder / TOKENIZER), **config}
    if isinstance(config.get("extra_special_tokens"), list) and not config.get("additional_special_tokens"):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config != given:
        write_json(file, config)


def _frames(file: Path) -> dict[str, bool]:
    """What ``tokenizer.json`` puts around a text, in keys of the config, where that is not BOS before it alone."""
    from tokenizers import Tokenizer

    if not file.is_file():
        return {}
    whole = Tokenizer.from_file(str(file))
    framed, plain = whole.encode("a").ids, whole.encode("a", add_special_tokens=False).ids
    place = next((start for start in range(len(framed)) if framed[start : start + len(plain)] == plain), 0)
    found = dict(zip(FRAMES, (place > 0, place + len(plain) < len(framed)), strict=True))
    return {} if found == dict(zip(FRAMES, (True, False), strict=True)) else found


def _turns(part: Mapping[str, Any]) -> bool:
    """Whether a part of a config has a rotary embedding that is not what releases take that find none."""
    rope = part.get(ROPE)
    if not isinstance(rope, dict):
        return False
    kinds = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    return any(
        each.get("rope_theta", USUAL) != USUAL or each.get("rope_type", "default") != "default" for each in kinds
    )


def _older_rope(part: Mapping[str, Any]) -> dict[str, Any]:
    """The older keys of a part's rotary embedding; empty where its class does not read from them what it says."""
    rope = part.get(ROPE)
    said = any(part.get(key) is not None for key in (*THETAS, "rope_scaling"))
    if not isinstance(rope, dict) or not rope or said or "auto_map" in part:
        return {}
    nested = rope.get(GLOBAL_LAYERS)
    whole: dict[str, Any] = nested if isinstance(nested, dict) else rope
    kind = str(whole.get("rope_type") or whole.get("type") or "default")
    if kind not in OLD_KINDS or not isinstance(whole.get("rope_theta"), int | float):
        return {}
    rest = {key: each for key, each in part.items() if key != ROPE}
    scaling = _scaling(whole, kind, part)
    found: dict[str, Any] = {"rope_scaling": scaling}
    found |= _read_as(rest | found, FACTORS, "partial_rotary_factor", whole.get("partial_rotary_factor"))
    found |= _read_as(rest | found, THETAS, "rope_theta", whole["rope_theta"])
    local = rope.get(LOCAL_LAYERS)
    if isinstance(local, dict) and whole is not rope:
        found |= _read_as(rest | found, LOCAL_THETAS, "rope_theta", local.get("rope_theta"))
    wanted = _understood(part)
    alike = wanted is not None and _understood(rest | found) == wanted == _understood({**part, **found})
    return found if alike else {}


def _scaling(whole: Mapping[str, Any], kind: str, part: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``rope_scaling`` was, None for positions that are not scaled."""
    apart = {"rope_theta", "partial_rotary_factor", *([ORIGINAL] if ORIGINAL in part else [])}
    rest = {key: each for key, each in whole.items() if key not in apart}
    if kind == "longrope":
        rest = {"type" if key == "rope_type" else key: each for key, each in rest.items()}
    return None if set(rest) <= {"rope_type", "type"} and kind == "default" else rest


def _read_as(rest: Mapping[str, Any], names: tuple[str, ...], meaning: str, value: Any) -> dict[str, Any]:
    """The names that a config's class reads as ``meaning``, with its value; none for a value that is not there."""
    if value is None:
        return {}
    probe = PROBE if meaning == "rope_theta" else PROBE / 1e6
    return {
        name: value for name in names if _reads(rest, name, meaning, probe) or _reads_alone(rest, name, meaning, value)
    }


def _reads(rest: Mapping[str, Any], name: str, meaning: str, value: Any) -> bool:
    """Whether a config's class takes ``meaning`` from a key."""
    return _holds(_understood({**rest, name: value}), meaning, value)


def _reads_alone(rest: Mapping[str, Any], name: str, meaning: str, value: Any) -> bool:
    """The same of a class that refuses other values, since factors for each frequency stand beside it (LongRoPE)."""
    refuses = _understood({**rest, name: PROBE / 1e6}) is None
    return refuses and _reads(rest, name, meaning, value)


def _holds(understood: Any, meaning: str, value: float) -> bool:
    if not isinstance(understood, dict):
        return False
    return understood.get(meaning) == value or any(_holds(each, meaning, value) for each in understood.values())


def _understood(part: Mapping[str, Any]) -> Any:
    """The rotary embedding that a config's class of transformers reads from it; None where there is no such class."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = part.get("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    try:
        return _one_name(CONFIG_MAPPING[kind].from_dict(numbers_of(copy.deepcopy(dict(part)))).to_dict().get(ROPE))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, StrictDataclassError):
        return None  # of values that nobody foresaw: the class reads nothing, so nothing is written


def _one_name(rope: Any) -> Any:
    """A rotary embedding without ``type``, the older name of ``rope_type``, where both are there."""
    if not isinstance(rope, dict):
        return rope
    return {key: _one_name(each) for key, each in rope.items() if key != "type" or "rope_type" not in rope}


def numbers_of(value: Any) -> Any:
    """A config with the numbers that JSON has no word for; transformers writes ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: numbers_of(each) for key, each in value.items()}
    return [numbers_of(each) for each in value] if isinstance(value, list) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of transformers about configs that only ask what it would read."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
