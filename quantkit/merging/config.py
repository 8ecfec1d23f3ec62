"""``adapter_config.json``: what PEFT says of an adapter, and what of that can be merged."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from quantkit.checkpoint.adapter_folder import CONFIG, latest_within
from quantkit.errors import SourceError
from quantkit.system.artifacts import read_json
from quantkit.system.patterns import why_refused

SAVED_BY_PEFT = "give the folder that PEFT's save_pretrained wrote"
WITH_PEFT = "merge it with PEFT's merge_and_unload and give the folder that this saves"
NOT_MERGED = {
    "layer_replication": "repeats layers of its base (layer_replication)",
    "alora_invocation_tokens": "is active on a part of the tokens alone (aLoRA), which no merge can be",
    "arrow_config": "routes its tokens (Arrow), which no merge can do",
    "corda_config": "was made from statistics of its base (CorDA)",
    "kasa_config": "changes its base (KaSA)",
    "megatron_config": "belongs to Megatron's own layers",
    "monteclora_config": "is a distribution over adapters (MonteCLoRA)",
    "use_bdlora": "is block-diagonal (BD-LoRA)",
    "use_qalora": "pools its inputs (QA-LoRA)",
    "velora_config": "compresses its activations (VeLoRA)",
}
"""Keys of PEFT's configuration that stand for an arithmetic which is not merged here."""
OF_LAYERS = ("target_modules", "exclude_modules")
"""Keys whose patterns say which layers the adapter has, which its own tensors tell too."""
CHANGES_BASE = ("pissa", "olora")
"""Initializations that take the adapter's beginning out of the base, which PEFT repeats when it loads one."""
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")


class AdapterConfig:
    """A checked ``adapter_config.json``.

    Attributes:
        origin: what messages call the adapter.
        lora: PEFT's own configuration.
        base: the base that the adapter was trained on, as it was called there; may be empty.
        tells_layers: whether its patterns of layers are matched; a pattern that could take for ever is not, so that the
            adapter's own tensors tell its layers.
        starts_from_base: whether the adapter's initialization changed the base.

    Raises:
        SourceError: the file is missing, broken, or of an adapter that is not merged.
    """

    def __init__(self, folder: Path, origin: str) -> None:
        self.origin = origin
        given = _read(folder, origin)
        if given.get("peft_type") != "LORA":
            raise SourceError(f"adapter {origin} is of the type {given.get('peft_type')}, not LORA", WITH_PEFT)
        start = str(given.get("init_lora_weights", True)).lower()
        self.starts_from_base = start.startswith(CHANGES_BASE)
        if not (self.starts_from_base or start in ("true", "false", *HARMLESS_STARTS)):
            raise SourceError(f"adapter {origin} was initialized by '{start}', which is not merged here", WITH_PEFT)
        for key, what in NOT_MERGED.items():
            if given.get(key):
                raise SourceError(f"adapter {origin} {what}", WITH_PEFT)
        patterns = [given[key] for key in OF_LAYERS if isinstance(given.get(key), str)]
        self.tells_layers = all(why_refused(pattern) is None for pattern in patterns)
        self.lora = _lora_config(given, origin)
        self.base = str(given.get("base_model_name_or_path") or "")

    @property
    def depends_on_base(self) -> bool:
        """Whether its change of a weight depends on that weight, so that no other adapter may come before it."""
        return bool(self.lora.use_dora) or self.starts_from_base

    def rank(self, module: str) -> int:
        """The rank of a module."""
        ranks = self.lora.rank_pattern or {}
        return int(ranks.get(get_pattern_key(list(ranks), module), self.lora.r))

    def alpha(self, module: str) -> float:
        """The alpha of a module."""
        alphas = self.lora.alpha_pattern or {}
        return float(alphas.get(get_pattern_key(list(alphas), module), self.lora.lora_alpha))

    def scaling(self, module: str) -> float:
        """What PEFT multiplies the low-rank product of a module with."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.lora.use_rslora else rank)

    def for_module(self, module: str) -> LoraConfig:
        """The configuration of one module alone: what decides its arithmetic, and no more."""
        lora = self.lora
        return LoraConfig(
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            rank_pattern=dict(lora.rank_pattern or {}),
            alpha_pattern=dict(lora.alpha_pattern or {}),
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            lora_bias=lora.lora_bias,
            fan_in_fan_out=lora.fan_in_fan_out,
            init_lora_weights=lora.init_lora_weights if self.starts_from_base else False,
            target_modules=[module],
        )

    def saves(self, module: str) -> bool:
        """Whether a module was trained whole beside its original (``modules_to_save``)."""
        parts = module.split(".")
        wanted = [name.split(".") for name in self.lora.modules_to_save or ()]
        return any(
            parts[start : start + len(name)] == name for name in wanted for start in range(len(parts) - len(name) + 1)
        )


def _read(folder: Path, origin: str) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise _no_adapter(folder, origin)
    try:
        content = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{CONFIG} of adapter {origin} cannot be read as JSON: {error}", "get it again") from error
    if not isinstance(content, dict):
        raise SourceError(f"{CONFIG} of adapter {origin} is not a JSON object", "get it again")
    return content


def _no_adapter(folder: Path, origin: str) -> SourceError:
    if (folder / "config.json").is_file():
        return SourceError(
            f"{origin} is a whole model and no adapter: it holds config.json and no {CONFIG}",
            "give it as the model, without an adapter; nothing is left to merge",
        )
    last = latest_within(folder)
    within = f"it is the folder of a training: give one of its checkpoints, such as {last}"
    return SourceError(f"adapter {origin} holds no {CONFIG}", within if last else SAVED_BY_PEFT)


def _check_types(given: dict[str, Any], origin: str) -> None:
    """Check what PEFT does not: that numbers and names are such, and that a search for a pattern ends."""
    alphas = given.get("alpha_pattern") or {}
    for key, value in {
        "lora_alpha": given.get("lora_alpha", 1),
        **(alphas if isinstance(alphas, dict) else {}),
    }.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SourceError(f"{CONFIG} of adapter {origin} says {value!r} for {key}, not a number", "get it again")
    patterns: list[Any] = []
    for key in ("target_modules", "modules_to_save", "exclude_modules", "layers_pattern"):
        value = given.get(key) or []
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SourceError(f"{CONFIG} of adapter {origin}: {key} is no list of names", "get it again")
        patterns += names if isinstance(value, str) and key not in OF_LAYERS else []
    for key in ("rank_pattern", "alpha_pattern"):
        value = given.get(key) or {}
        if not isinstance(value, dict):
            raise SourceError(f"{CONFIG} of adapter {origin}: {key} maps no names to numbers", "get it again")
        patterns += value
    for pattern in patterns:
        refused = why_refused(pattern)
        if refused is not None:
            raise SourceError(
                f"{CONFIG} of adapter {origin}: '{pattern[:80]}' is no pattern of names: {refused}",
                "write the names of the modules out",
            )


def _lora_config(given: dict[str, Any], origin: str) -> LoraConfig:
    known = {field.name for field in fields(LoraConfig)}
    foreign = sorted(key for key, value in given.items() if key not in known and value)
    if foreign:
        raise SourceError(
            f"{CONFIG} of adapter {origin} has the key '{foreign[0]}', which the installed PEFT does not know",
            "pip install --upgrade peft",
        )
    _check_types(given, origin)
    try:
        config = LoraConfig(**{key: value for key, value in given.items() if key in known})
        ranks = [config.r, *(config.rank_pattern or {}).values()]
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise SourceError(
            f"{CONFIG} of adapter {origin} is no configuration of PEFT: {error}", "get it again"
        ) from error
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise SourceError(f"{CONFIG} of adapter {origin} has a rank that is no count: {ranks}", "get it again")
    return config
