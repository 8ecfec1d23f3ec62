"""The residual stream of a model, followed through a run: who reads it, and who writes to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from quantkit.engine.calls import Moment, are_rows_of, parts_of, rows_of, same
from quantkit.engine.layers import is_linear
from quantkit.engine.originals import Originals
from quantkit.engine.segment import Segment
from quantkit.numerics.orthogonal import Orthogonal
from quantkit.system.host import decide, number
from quantkit.transforms.base import ResidualStream, StreamNorm
from quantkit.transforms.rotate import Rotation, turned_stream

NUMBER = re.compile(r"\.\d+(?=\.|$)")


class Hindrance(Exception):  # noqa: N818 - a reason that is told, and no error
    """Why the stream cannot be turned."""


@dataclass(slots=True)
class _Seen:
    """What one run shows: the states of the stream, outputs so far, and those that were added to it."""

    states: list[torch.Tensor]
    gave: list[Moment] = field(default_factory=list)
    given: dict[str, Moment] = field(default_factory=dict)
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    added: list[Moment] = field(default_factory=list)

    def is_state(self, rows: torch.Tensor) -> bool:
        """Whether rows are the stream, or this and a sum of outputs, which is the stream from now on."""
        if any(same(rows, state) for state in self.states):
            return True
        parts = parts_of(rows, self.states[-1], self.gave) if rows.shape == self.states[-1].shape else None
        if parts is None:
            return False
        self.states.append(rows)
        self.added += parts
        return True


@dataclass(slots=True)
class Stream:
    """What is known of the stream.

    Args:
        originals: the parameters of the model.
        now: what it holds where the run stands, float32 ``[tokens, width]``.
        matrix: by which blocks are tried.
    """

    originals: Originals
    now: torch.Tensor
    matrix: Orthogonal
    _tables: dict[str, None] = field(default_factory=dict)
    _writers: dict[str, None] = field(default_factory=dict)
    _norms: dict[str, StreamNorm] = field(default_factory=dict)
    _readers: dict[str, None] = field(default_factory=dict)
    _last: dict[str, torch.Tensor] = field(default_factory=dict)

    def found(self) -> ResidualStream:
        """All that is known by now."""
        norms = tuple(self._norms.values())
        return ResidualStream(
            self.now.shape[-1], tuple(self._tables), tuple(self._writers), norms, tuple(self._readers)
        )

    def begin(self, moments: Sequence[Moment]) -> None:
        """What comes before the first block.

        Raises:
            Hindrance: the stream does not begin with the sum of what embeddings give.
        """
        gave = [moment for moment in moments if moment.gives]
        parts = parts_of(self.now, None, gave)
        if parts is None:
            raise Hindrance("it does not begin with what embeddings give")
        for each in parts:
            self._write(each, moments, ())

    def end(self, head: Segment, given: torch.Tensor) -> None:
        """The head, and what it is given.

        Raises:
            Hindrance: it reads something else than the norm behind the last block.
        """
        width = self.now.shape[-1]
        rows = rows_of(given, width, self.now[:0])
        source = next((name for name, gave in reversed(self._last.items()) if are_rows_of(rows, gave)), None)
        if source is not None:
            self._norms[source] = replace(self._norms[source], readers=(*self._norms[source].readers, head.prefix))
        elif are_rows_of(rows, self.now):
            self._readers[head.prefix] = None
        elif len(rows):
            raise Hindrance(f"{head.prefix} reads something else than the norm behind the last block")

    def follow(self, moments: Sequence[Moment], segment: Segment | None = None) -> Rotation:
        """A run of a block, or of what comes behind the last one.

        Args:
            moments: of the run.
            segment: the block, whose own output is the last moment; None for what comes behind.

        Returns:
            What turning would do to it.

        Raises:
            Hindrance: it does not add to the stream, or by something that cannot be turned.
        """
        before = {name: dict(getattr(self, name)) for name in ("_norms", "_readers", "_writers")}
        seen, width = _Seen([self.now]), self.now.shape[-1]
        for moment in moments:
            if moment.gives:
                self._gave(moment, seen, is_end=segment is not None and moment.name == segment.prefix)
            elif _reads_columns(moment.module, width):
                self._given(moment, seen)
            elif _is_norm(moment.module) and seen.is_state(moment.rows):
                seen.given[moment.name] = moment
        self._last = seen.norms
        if segment is None:
            self._norms |= {name: self._norm(seen.given[name], rows) for name, rows in seen.norms.items()}
            return Rotation()
        linears = [name for name, module in _named(segment) if is_linear(module)]
        self._complete(linears)
        for each in seen.added:
            self._write(each, moments, linears)
        new = {name: {k: v for k, v in getattr(self, name).items() if k not in old} for name, old in before.items()}
        own = ResidualStream(width, (), tuple(new["_writers"]), tuple(new["_norms"].values()), tuple(new["_readers"]))
        return turned_stream(own, self.parameter, self.matrix)

    def parameter(self, name: str) -> torch.Tensor | None:
        """A parameter of the checkpoint; None where the model has none of this name."""
        module, _, leaf = name.rpartition(".")
        own = self.originals.skeleton.model.get_submodule(module)._parameters
        return None if own.get(leaf) is None else self.originals.parameter(name)

    # One moment after another

    def _gave(self, moment: Moment, seen: _Seen, *, is_end: bool) -> None:
        if is_end:
            if not seen.is_state(moment.rows):
                raise Hindrance(f"{moment.name} does not add to it")
            self.now = moment.rows
        elif moment.name in seen.given:
            seen.norms[moment.name] = moment.rows
        seen.gave.append(moment)

    def _given(self, moment: Moment, seen: _Seen) -> None:
        """A matrix is given rows of the stream's width: of a norm's output, of the stream, or of something else."""
        source = next((name for name, rows in reversed(seen.norms.items()) if are_rows_of(moment.rows, rows)), None)
        if source is not None:
            known = self._norms.get(source) or self._norm(seen.given[source], seen.norms[source])
            readers = dict.fromkeys([*known.readers, moment.name])
            self._norms[source] = replace(known, readers=tuple(readers))
        elif any(are_rows_of(moment.rows, state) for state in seen.states) or seen.is_state(moment.rows):
            self._readers[moment.name] = None

    def _norm(self, given: Moment, gave: torch.Tensor) -> StreamNorm:
        """What kind of norm a module is."""
        own = dict(given.module.named_parameters())
        spread = given.rows.square().mean().sqrt()
        takes_mean = same(given.again(given.rows + spread), gave, 1e-3)
        if not own:
            return StreamNorm(given.name, (), 0.0, takes_mean)
        if set(own) - {"weight", "bias"} or "weight" not in own:
            raise Hindrance(f"{given.name} is a norm of an unknown kind")
        ones, twos = self._with_weight(given, 1.0), self._with_weight(given, 2.0)
        ratio = number((ones * twos).sum() / ones.square().sum())
        offset = 0.0 if abs(ratio - 2) < 0.01 else 1.0
        factors = own["weight"].float() + offset
        bias = own["bias"].float() if "bias" in own else torch.zeros_like(factors)
        if not same(ones / (1 + offset) * factors + bias, gave, 1e-3):
            raise Hindrance(f"{given.name} is a norm of an unknown kind")
        if decide(((factors.abs() < 1e-6 * factors.abs().amax()) & (bias != 0)).any()):
            raise Hindrance(f"{given.name} has a bias beside a weight of nothing")
        return StreamNorm(given.name, (), offset, takes_mean)

    def _with_weight(self, given: Moment, value: float) -> torch.Tensor:
        own = dict(given.module.named_parameters())
        kept = {name: parameter.data for name, parameter in own.items()}
        try:
            for name, parameter in own.items():
                parameter.data = torch.full_like(parameter, value if name == "weight" else 0.0)
            return given.again(given.rows)
        finally:
            for name, parameter in own.items():
                parameter.data = kept[name]

    def _complete(self, linears: Iterable[str]) -> None:
        """What is like a layer that reads, but for a number as that of an expert, reads the same."""
        for norm in self._norms.values():
            kinds = {NUMBER.sub(".*", name) for name in norm.readers if NUMBER.search(name)}
            alike = [name for name in linears if NUMBER.sub(".*", name) in kinds]
            if set(alike) - set(norm.readers):
                readers = tuple(dict.fromkeys([*norm.readers, *alike]))
                self._norms[norm.name] = replace(norm, readers=readers)

    def _write(self, moment: Moment, moments: Sequence[Moment], linears: Iterable[str]) -> None:
        """Take in a module whose output is added to the stream."""
        name, module = moment.name, moment.module
        if isinstance(module, nn.Embedding):
            self._tables[name] = None
        elif is_linear(module):
            self._add_writer(name)
        elif _is_norm(module):
            self._write_through(moment, moments, linears)
        else:
            reading = {*self._readers, *(reader for norm in self._norms.values() for reader in norm.readers)}
            held = [each for each in linears if each.startswith(f"{name}.") and each not in reading]
            found = [each for each in held if self._out_features(each) == self.now.shape[-1]]
            if not found:
                raise Hindrance(f"{name} writes to it, and holds no linear layer that does")
            for each in found:
                self._add_writer(each)

    def _write_through(self, moment: Moment, moments: Sequence[Moment], linears: Iterable[str]) -> None:
        """A norm without weights between a writer and the stream turns with it."""
        if any(True for _ in moment.module.parameters()):
            raise Hindrance(f"{moment.name} scales what is added to it, channel by channel")
        given = next((each for each in moments if each.name == moment.name and not each.gives), None)
        parts = None if given is None else parts_of(given.rows, None, _before(moments, given))
        if parts is None:
            raise Hindrance(f"{moment.name} writes to it, and is no linear layer")
        for each in parts:
            self._write(each, moments, linears)

    def _add_writer(self, name: str) -> None:
        if self.originals.skeleton.names.is_part(f"{name}.bias"):
            raise Hindrance(f"the biases of {name} and its like lie in a tensor that is written whole")
        self._writers[name] = None

    def _out_features(self, name: str) -> int:
        return int(self.originals.skeleton.model.get_parameter(f"{name}.weight").shape[0])


def _before(moments: Sequence[Moment], moment: Moment) -> list[Moment]:
    """What was given before a moment."""
    place = next(index for index, each in enumerate(moments) if each is moment)
    return [each for each in moments[:place] if each.gives]


def _named(segment: Segment) -> list[tuple[str, nn.Module]]:
    return [(f"{segment.prefix}.{name}", module) for name, module in segment.module.named_modules() if name]


def _reads_columns(module: nn.Module, width: int) -> bool:
    """Whether a module has a matrix with so many columns, and is no table."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and weight.shape[1] == width and not isinstance(module, nn.Embedding)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module may be a norm: it has no matrix, and no parts."""
    return not any(parameter.ndim > 1 for parameter in module.parameters()) and not any(module.children())
