"""Where an adapter's tensors belong in a base, whatever the two call them.

An adapter has the names of the model that was trained: of the transformers of its day (version 4 has
``language_model.model.layers`` where version 5 has ``model.language_model.layers``), of the language model alone or of
one that sees, of compiled modules. A name is looked up as it is, among the model's parameters and the checkpoint's
tensors, and then without the parts that only wrap.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

from quantkit.errors import SourceError
from quantkit.merging.adapter import Adapter, Contents
from quantkit.merging.base import Base
from quantkit.merging.stacks import Stack, stack_of

WRAPPERS = frozenset({"model", "language_model", "text_model", "base_model", "module", "_orig_mod"})
"""Parts of names that wrap a language model, of which there is one."""
NESTED = ".base_layer"
"""What PEFT adds to a module's name for each parameter of it that is adapted beside the last."""
RIGHT_BASE = "give the base that it was trained on"


def without_wrappers(name: str) -> str:
    """A name without the parts that only wrap."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def tower(module: str) -> str:
    """The list of blocks that a module lies in, told by its name: all before the first number."""
    return re.split(r"\.\d+(?:\.|$)", without_wrappers(module), maxsplit=1)[0]


class _Places:
    """The parameters of a base by any of their names."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._known = base.names.parameters()
        stored = {name for name in base.names.shapes() if base.stored(name)}
        self._exact = {name: name for name in stored} | {
            name: self._known.get(name, name) for name in base.reader.names() if name not in stored
        }
        self._plain = _unique((without_wrappers(name), name) for name in stored)
        for plain, name in _unique((without_wrappers(key), value) for key, value in self._exact.items()).items():
            self._plain.setdefault(plain, name)

    def parameter(self, name: str) -> str | None:
        """What the base calls a parameter; None if it has none of that name, or several."""
        return self._exact.get(name) or self._plain.get(without_wrappers(name))

    def is_stack(self, parameter: str) -> bool:
        """Whether a parameter holds several matrices."""
        return len(self._base.names.shapes().get(parameter, ())) == 3

    def targeted(self, module: str, wanted: Iterable[str]) -> list[str]:
        """The parameters of a module that ``target_parameters`` name, in the module's own order."""
        plain = without_wrappers(module)
        found = []
        for name in self._base.names.shapes():
            own, _, leaf = name.rpartition(".")
            if without_wrappers(own) == plain and any(
                _ends(f"{own}.{leaf}", f"{module}.{leaf}", end) for end in wanted
            ):
                found.append(name)
        return found


def _ends(name: str, other: str, end: str) -> bool:
    """Whether a parameter is meant by an entry of ``target_parameters``, by either of its names."""
    return any(f".{each}".endswith(f".{end}") for each in (name, other))


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for plain, name in pairs:
        found.setdefault(plain, set()).add(name)
    return {plain: next(iter(names)) for plain, names in found.items() if len(names) == 1}


def place(adapter: Adapter, base: Base) -> Adapter:
    """The adapter with its tensors by the names of the base; what has no place there keeps its own.

    Raises:
        SourceError: a rank or shape does not fit, or two tensors belong to one place.
    """
    places, given = _Places(base), adapter.contents
    found = Contents(renamed=given.renamed)
    wanted = adapter.config.lora.target_parameters or ()
    nested: dict[str, dict[int, str]] = {}
    for module, parts in given.lora.items():
        target = None if module.endswith(NESTED) else places.parameter(f"{module}.weight")
        core = _unnested(module)
        if target is None and wanted and (core != module or places.targeted(core, wanted)):
            nested.setdefault(core, {})[(len(module) - len(core)) // len(NESTED)] = module
        elif target is not None and wanted and places.is_stack(target):
            found.stacks[target] = _stack(adapter, base, target, module, f"{module}.weight")
        else:
            adapter.check_rank(module, parts)
            own = target.removesuffix(".weight") if target else module
            _check_free(adapter, own, found.called, module)
            found.lora[own], found.called[own] = parts, module
    for module, key in given.tokens.items():
        own = (places.parameter(f"{module}.weight") or f"{module}.weight").removesuffix(".weight")
        found.tokens[own], found.called[own] = key, module
    for name, whole in given.whole.items():
        found.whole[places.parameter(name) or name] = whole
    for core, modules in nested.items():
        found.stacks |= _stacks(adapter, base, places, core, modules)
    found.renamed |= any(own != called for own, called in found.called.items())
    found.renamed |= found.whole.keys() != given.whole.keys()
    found.renamed |= any(name.rpartition(".")[0] != stack.module for name, stack in found.stacks.items())
    placed = copy.copy(adapter)
    placed.contents = found
    return placed


def _check_free(adapter: Adapter, own: str, called: dict[str, str], module: str) -> None:
    if own in called:
        raise SourceError(
            f"adapter {adapter.origin} holds '{called[own]}' and '{module}', which are both the base's '{own}'",
            "save the adapter again with one of them",
        )


def _stacks(adapter: Adapter, base: Base, places: _Places, core: str, modules: dict[int, str]) -> dict[str, Stack]:
    """The parameters of a module that are adapted: PEFT wraps the first one innermost."""
    parameters = places.targeted(core, adapter.config.lora.target_parameters or ())
    if sorted(modules) != list(range(len(parameters))):
        raise SourceError(
            f"adapter {adapter.origin} adapts {len(modules)} parameters of '{core}', and the base has "
            f"{len(parameters)} there that its target_parameters name",
            RIGHT_BASE,
        )
    found = {}
    for depth, module in modules.items():
        parameter = parameters[len(parameters) - 1 - depth]
        found[parameter] = _stack(adapter, base, parameter, module, f"{core}.{parameter.rpartition('.')[2]}")
    return found


def _stack(adapter: Adapter, base: Base, parameter: str, module: str, called: str) -> Stack:
    """What an adapter adds to a parameter.

    Args:
        adapter: it.
        base: that has the parameter.
        parameter: of the base.
        module: by which the adapter names its factors.
        called: what the adapter calls the parameter.
    """
    parts = adapter.contents.lora[module]
    keys = (parts["lora_A.weight"], parts["lora_B.weight"])
    return stack_of(
        keys,
        (adapter.reader.shape(keys[0]), adapter.reader.shape(keys[1])),
        base.names.shapes()[parameter],
        module=_unnested(module),
        rank=adapter.config.rank(called),
        scaling=adapter.config.scaling(called),
        transposed=parameter.rpartition(".")[0] in base.transposed,
        origin=adapter.origin,
    )


def _unnested(module: str) -> str:
    """The name of a module without what PEFT adds for further parameters of it."""
    while module.endswith(NESTED):
        module = module.removesuffix(NESTED)
    return module
