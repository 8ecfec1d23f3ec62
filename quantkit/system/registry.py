"""A registry: names to classes, filled by one file per entry and by installed entry points.

A plugin that cannot be imported is kept with the reason, and asking for it says why; it never vanishes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from quantkit.errors import QuantkitError, RecipeError, did_you_mean
from quantkit.system.names import folded

T = TypeVar("T")


class Registry(Generic[T]):
    """All implementations of one part, found on first use.

    Args:
        kind: the word used in messages, such as "method".
        package: the package whose modules each hold one implementation.
        group: the entry-point group through which other packages add theirs.
        named_by: the attribute of an implementation that is its name.
        unknown: what is raised for a name that there is not.
        without: modules of the package that hold no implementation and are not imported.
        also: what else the field calls an implementation, each with the name here.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        group: str,
        *,
        named_by: str = "name",
        unknown: type[QuantkitError] = RecipeError,
        without: Collection[str] = ("base",),
        also: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self._named_by = named_by
        self._unknown = unknown
        self._without = without
        self._package = package
        self._group = group
        self._entries: dict[str, type[T]] = {}
        self._broken: dict[str, str] = {}
        self._also = {folded(name): meant for name, meant in (also or {}).items()}
        self._loaded = False

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator: add an implementation under its name."""
        name = str(getattr(cls, self._named_by))
        if name in self._entries and self._entries[name] is not cls:
            raise RuntimeError(f"two implementations of {self.kind} '{name}'")
        self._entries[name] = cls
        return cls

    def get(self, name: str) -> type[T]:
        """The implementation called ``name``, in whatever case and joints it is written.

        Raises:
            RecipeError: no such name, or what the registry was told to raise; the remedy lists the names there are.
            QuantkitError: the plugin is there but cannot be imported.
        """
        return self._entries[self.name_of(name)]

    def name_of(self, name: str) -> str:
        """What quantkit itself calls the implementation that is meant by ``name``.

        Raises:
            RecipeError, QuantkitError: see :meth:`get`.
        """
        self._load()
        if name in self._entries:
            return name
        if name in self._broken:
            raise QuantkitError(f"{self.kind} '{name}' cannot be used: {self._broken[name]}")
        wanted = folded(name)
        meant = {folded(each): each for each in self._entries}.get(wanted) or self._also.get(wanted)
        if meant in self._entries:
            return meant
        raise self._unknown(f"unknown {self.kind} '{name}'", did_you_mean(name, self._entries))

    def __contains__(self, name: object) -> bool:
        """Whether :meth:`get` gives an implementation for ``name``."""
        if not isinstance(name, str):
            return False
        try:
            self.get(name)
        except QuantkitError:
            return False
        return True

    def names(self) -> list[str]:
        """The usable names, sorted."""
        self._load()
        return sorted(self._entries)

    def broken(self) -> dict[str, str]:
        """Plugins that could not be imported: name to reason."""
        self._load()
        return dict(self._broken)

    def __iter__(self) -> Iterator[type[T]]:
        self._load()
        return iter([self._entries[name] for name in sorted(self._entries)])

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_") and module.name not in self._without:
                importlib.import_module(f"{self._package}.{module.name}")
        for entry in entry_points(group=self._group):
            try:
                self.register(entry.load())
            except Exception as error:  # another package's code may fail in any way, and must not take the rest down
                self._broken[entry.name] = f"{type(error).__name__}: {error}"
        self._loaded = True
