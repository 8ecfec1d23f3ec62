"""Methods: how the codes of a weight are chosen. One file each."""

from __future__ import annotations

from quantkit.methods.base import Method
from quantkit.system.registry import Registry


class MethodRegistry(Registry[Method]):
    """All methods; ``awq+gptq`` names the factors of one and the solver of another."""

    def get(self, name: str) -> type[Method]:
        """The method called ``name``.

        Raises:
            RecipeError: no such name, or two methods that do not compose; the remedy lists the names there are.
            QuantkitError: the plugin is there but cannot be imported.
        """
        parts = name.split("+")
        if len(parts) != 2:
            return super().get(name)
        from quantkit.methods.composed import composed

        scaler, solver = (super(MethodRegistry, self).get(part) for part in parts)
        return composed(name, scaler, solver)


METHODS = MethodRegistry("method", "quantkit.methods", "quantkit.methods")
