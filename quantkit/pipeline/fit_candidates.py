"""What fits into a budget and is served by a runtime: the candidates of `quantkit fit`, by estimates alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.allocation.budget import allocated
from quantkit.allocation.units import AnatomyModel, units_of
from quantkit.errors import QuantkitError, SchemeError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.inference import served
from quantkit.estimation.use import Use
from quantkit.formats import FORMATS
from quantkit.gguf.architecture import model_types
from quantkit.recipe import AutoSpec, BudgetSpec, VariantSpec
from quantkit.schemes import PER_CHANNEL
from quantkit.system.units import UNITS, in_units
from quantkit.system.validation import parse_section

MADE = ("compressed-tensors", "bitsandbytes", "gguf")
"""The formats of candidates, in the order in which they are looked at."""
GROUPS = (32, 64, 128)
"""Sizes of groups, the most precise first."""
GGUF_KINDS = ("q6_k_mix", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m", "q3_k_s", "q2_k_mix")
UNIFORM = 3
"""Candidates of one scheme throughout of the first format that is served; of a further one there is one."""
NEXT_TO_NOTHING = "8"
"""The width that loses so little that no mix is tried where it fits."""
MIX = "mix"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to quantize the model.

    Attributes:
        name: of the variant.
        keys: of the variant, as a recipe has them.
        width: bits of most weights, and in what, or :data:`MIX`; those of one width differ in their groups alone.
        size: bytes of its files, estimated.
        memory: bytes in use, estimated.
    """

    name: str
    keys: Mapping[str, Any]
    width: str
    size: int
    memory: int

    def variant(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {"name": self.name, **self.keys}


@dataclass(frozen=True, slots=True)
class Stock:
    """What there is, and what is asked of it.

    Attributes:
        anatomy: the model.
        runtime: who shall load the file.
        budget: what it may take.
    """

    anatomy: Anatomy
    runtime: str
    budget: BudgetSpec

    def notes(self) -> list[str]:
        """What the user should know of the budget: what counts of the context, and whether nothing need be done."""
        longest, found = self.anatomy.context, []
        if self.budget.memory is not None and longest is not None and self.budget.context > longest:
            asked = f"{self.budget.context:,} tokens were asked for"
            found.append(f"the model reads {longest:,} tokens at most, which count where {asked}")
        if self.fits("float", self.float_size):
            memory = in_units(self.memory("float", self.float_size))
            taken = f"{in_units(self.float_size)} in 16 bits, {memory} of memory"
            found.append(f"the model fits {self.words()} as it is ({taken})")
        return found

    @property
    def use(self) -> Use:
        """One sequence of the context that was asked for, on a card."""
        return Use(context=min(self.budget.context, self.anatomy.context or self.budget.context))

    def memory(self, store: str, size: int) -> int:
        """Bytes in use with files of a format that have ``size`` bytes.

        transformers decodes compressed-tensors as a whole when it first computes, and other formats layer by layer.
        """
        kind = FORMATS.get(store)
        if self.runtime == "transformers" and kind.packed_as:
            size = self.float_size if kind.decoded_at_first_use else size + self._largest_layer
        return served(self.anatomy, size, self.use, llama_cpp=kind.container == "gguf").nbytes

    def fits(self, store: str, size: int) -> bool:
        """Whether files of a format that have ``size`` bytes are within the budget."""
        limit, memory = self.budget.size, self.budget.memory
        return (limit is None or size <= limit) and (memory is None or self.memory(store, size) <= memory)

    def room(self, store: str) -> int | None:
        """Bytes that the files of a format may have; None where the budget does not tell."""
        limits = [] if self.budget.size is None else [self.budget.size]
        if self.budget.memory is not None and self.memory(store, 1) > self.memory(store, 0):
            limits.append(self.budget.memory - self.memory(store, 0))
        return min(limits, default=None)

    @property
    def float_size(self) -> int:
        """Bytes of the model in 16 bits."""
        return 2 * self.anatomy.parameters

    @property
    def _largest_layer(self) -> int:
        return max(2 * rows * columns for (rows, columns), _ in self.anatomy.linears().values())

    def words(self) -> str:
        """The budget in words."""
        memory, size = self.budget.memory, self.budget.size
        told = [f"{in_units(memory)} of memory at {self.use.context:,} tokens"] if memory is not None else []
        return " and ".join([*told, *([f"{in_units(size)} of file"] if size is not None else [])])


def candidates(stock: Stock) -> list[Candidate]:
    """The best that fits of each width, the most bits first, of the formats that the runtime loads, and a mix of them.

    Where 8 bits fit, there is no mix.

    Raises:
        QuantkitError: the runtime loads no format of those that are made, or nothing fits: with the smallest that does.
    """
    stores = [store for store in MADE if stock.runtime in FORMATS.get(store).runtimes and not _barred(stock, store)]
    found: list[Candidate] = []
    every: list[Candidate] = []
    mixes: list[Candidate] = []
    for store in stores:
        ways = list(_ways(stock, store))
        able = [way for way in ways if stock.fits(store, way.size)]
        widths = dict.fromkeys(way.width for way in able)
        best = [next(way for way in able if way.width == width) for width in widths]
        found += best[: UNIFORM if not found else 1]
        every += ways
        mixes += _mixes(stock, store)
    if all(candidate.width != NEXT_TO_NOTHING for candidate in found):
        found += [mix for mix in mixes if stock.fits(_store(mix), mix.size)][:1]
    every += mixes
    if not every:
        raise QuantkitError(
            f"fit makes no file of {stock.anatomy.name} for {stock.runtime}",
            f"it makes files for {', '.join(_runtimes())}; quantize --for knows more of them",
        )
    if not found:
        raise nothing_fits(stock, every)
    return found


def nothing_fits(stock: Stock, every: list[Candidate]) -> QuantkitError:
    """What to say where nothing is within the budget: the least budget that something is within."""
    budget = stock.budget
    least_file = min(every, key=lambda way: way.size)
    least_memory = min(every, key=lambda way: way.memory)
    problem = f"nothing that {stock.runtime} loads of {stock.anatomy.name} fits {stock.words()}"
    takes, give = [], []
    if budget.memory is not None and least_memory.memory > budget.memory:
        rest = stock.memory(_store(least_memory), 0)
        takes.append(f"{in_units(least_memory.memory)} of memory ({in_units(rest)} of it beside the weights)")
        give.append(f"--memory {_at_least(least_memory.memory)}")
    if budget.size is not None and least_file.size > budget.size:
        takes.append(f"a file of {in_units(least_file.size)}")
        give.append(f"--size {_at_least(least_file.size)}")
    if not takes:  # either limit can be met, and not both with one file
        takes.append(f"{in_units(least_file.memory)} of memory with a file of {in_units(least_file.size)}")
        give.append(f"--memory {_at_least(least_file.memory)}")
    named = (least_memory if budget.memory is not None else least_file).name
    return QuantkitError(f"{problem}: the smallest, {named}, takes {' and '.join(takes)}", f"give {' '.join(give)}")


def _at_least(nbytes: int) -> str:
    """A size in the largest unit, rounded up, as options take it."""
    unit = next((name for name in ("GiB", "MiB", "KiB") if nbytes >= UNITS[name]), "B")
    return f"{math.ceil(100 * nbytes / UNITS[unit]) / 100:g}{unit}"


def _store(way: Candidate) -> str:
    return str(way.keys["format"])


def _runtimes() -> list[str]:
    return list(dict.fromkeys(name for store in MADE for name in FORMATS.get(store).runtimes))


def _barred(stock: Stock, store: str) -> bool:
    """Whether a format does not take the model, or the runtime takes it as its authors say alone."""
    kind = FORMATS.get(store)
    return stock.runtime in kind.untested or (kind.container == "gguf" and stock.anatomy.family not in model_types())


def _ways(stock: Stock, store: str) -> Iterator[Candidate]:
    """All ways of a format, the most bits first, and of equal width the most precise."""
    model = AnatomyModel(stock.anatomy)
    for name, width, keys in _named(stock, store):
        given = {"format": store, **keys}
        try:
            variant = parse_section(VariantSpec, {"name": name, **given}, "fit")
            size = model.file_bytes(variant)
        except SchemeError:
            continue  # the shapes of this model do not suit it
        if FORMATS.get(store).refusal(stock.runtime, variant.schemes()) is None:
            yield Candidate(name, given, width, size, stock.memory(store, size))


def _mixes(stock: Stock, store: str) -> Iterator[Candidate]:
    """The mix of a format to the budget, if it serves any; one that is larger is the smallest that there is."""
    room = stock.room(store)
    if room is None or not FORMATS.get(store).choices(stock.runtime):
        return
    budget, memory = stock.budget, stock.budget.memory
    by_memory = memory is not None and budget.size is None and stock.runtime != "transformers"
    limit = {"memory": memory, "context": stock.use.context} if by_memory else {"size": max(1, room)}
    keys = {"format": store, "method": "gptq", "bits": "auto", "budget": limit, "runtime": stock.runtime}
    grid = {} if FORMATS.get(store).container == "gguf" or store == "bitsandbytes" else {"group_size": _group(stock)}
    try:
        spec = parse_section(AutoSpec, {"name": MIX, **keys, **grid}, "fit")
        model = AnatomyModel(stock.anatomy)
        least = _smallest_bytes(model, spec)
    except SchemeError:
        return  # the shapes of this model suit no choice
    size = max(least, min(room, stock.float_size))
    yield Candidate(MIX, {**keys, **grid}, MIX, size, stock.memory(store, size))


def _smallest_bytes(model: AnatomyModel, spec: AutoSpec) -> int:
    """Bytes of the smallest mix."""
    units = units_of(model, spec)
    chosen = tuple(min(unit.sizes, key=unit.sizes.__getitem__) for unit in units)
    return model.file_bytes(spec.with_choice(allocated(model, spec, units, chosen)))


def _named(stock: Stock, store: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, width and keys of the ways of a format."""
    gptq: dict[str, Any] = {"method": "gptq"}
    if store == "gguf":
        whole: dict[str, Any] = {"ignore": (), "embeddings": {}}  # as llama.cpp's presets, which the others are
        yield "q8_0", "8", {**gptq, "scheme": "int", "bits": 8, "group_size": 32, "symmetric": True, **whole}
        yield from ((kind.removesuffix("_mix"), kind[1], {**gptq, "scheme": kind}) for kind in GGUF_KINDS)
        return
    if store == "bitsandbytes":
        yield "bnb-int8", "8", {**gptq, "bits": 8, "group_size": PER_CHANNEL, "activations": "dynamic"}
        yield "bnb-nf4", "4", {**gptq, "scheme": "nf4", "double_quant": False}
        yield "bnb-nf4-dq", "4", {**gptq, "scheme": "nf4", "double_quant": True}
        return
    named = FORMATS.get(store).choices(stock.runtime)
    for bits in sorted((int(name[3:]) for name in named if name.startswith("int")), reverse=True):
        for group, symmetric in _grids(stock, bits):
            shape = "channel" if group == PER_CHANNEL else f"g{group}"
            name = f"int{bits}-{shape}{'' if symmetric else '-asym'}"
            yield name, str(bits), {**gptq, "bits": bits, "group_size": group, "symmetric": symmetric}
        if bits == 8 and stock.runtime == "vllm":
            fp8 = {"scheme": "fp8", "granularity": "channel", "activations": "dynamic"}
            yield "fp8", "fp8", {**gptq, **fp8}


def _group(stock: Stock) -> int:
    """The size of groups of a mix: the largest that divides all rows in blocks, as more bits go where they count."""
    return next(iter(_grids(stock, int(NEXT_TO_NOTHING))))[0]


def _grids(stock: Stock, bits: int) -> Iterator[tuple[int, bool]]:
    """Group size and symmetry of integers, the most precise first; 8 bits lose next to nothing in any of them.

    transformers does not load asymmetric files with every compressed-tensors that there is.
    """
    inside = [shape for shape, block in stock.anatomy.linears().values() if block is not None]
    whole = [group for group in GROUPS if all(columns % group == 0 for _, columns in inside)]
    if bits >= 8:
        yield from ((group, True) for group in (*whole[-1:], PER_CHANNEL))
        return
    for group in whole or [group for group in GROUPS if any(columns % group == 0 for _, columns in inside)]:
        yield from ((group, symmetric) for symmetric in (False, True) if symmetric or stock.runtime != "transformers")
    yield PER_CHANNEL, True
