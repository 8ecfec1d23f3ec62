"""The field's own quantizers as plugins, each in an environment of its own."""

from __future__ import annotations

import re

from quantkit.system.registry import Registry

from .base import Library

__all__ = ["LIBRARIES", "Library"]

DECLARED = ("name", "summary", "distribution", "requirements", "offers")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Libraries(Registry[Library]):
    """All libraries; what a plugin declares is checked when it is registered."""

    def register(self, cls: type[Library]) -> type[Library]:
        """Class decorator: add a library.

        Raises:
            TypeError: it is no class of a library, or lacks something that it must declare.
            ValueError: its name could not be that of a file.
        """
        if not isinstance(cls, type) or not issubclass(cls, Library):
            raise TypeError(f"{cls!r} is no class derived from quantkit.libraries.base.Library")
        missing = [name for name in DECLARED if not hasattr(cls, name)]
        if missing:
            raise TypeError(f"{cls.__name__} does not declare {', '.join(missing)}")
        if not NAME.fullmatch(cls.name):
            raise ValueError(f"'{cls.name}' is no name for a library: use letters, digits, '.', '_' and '-'")
        if not cls.offers:
            raise TypeError(f"{cls.__name__} offers no method")
        return super().register(cls)


LIBRARIES = Libraries("library", "quantkit.libraries", "quantkit.quantizers")
