"""A call of a user's function as a function of arrays alone: whatever else is among its arguments is static."""

import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxrelu import _checked as checked
from jaxrelu._programs.interpreter import opened, origin

__all__ = ["Call", "Static", "returned"]


class Static:
    """A value that is no array, as a part of a pytree's structure. Two are equal if value and type are."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = checked.Number(value) if type(value) is float else value  # 0.0 is not -0.0, and NaN is NaN

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static) or type(self.value) is not type(other.value):
            return False
        return self._key is other._key or (self._key == other._key) is True

    def __hash__(self) -> int:
        try:
            return hash(self._key)
        except TypeError:
            return hash(type(self.value))


jax.tree_util.register_pytree_node(Static, lambda static: ((), static), lambda static, _: static)


class Call:
    """A call of a function, also of a model or of a method, which may hold arrays.

    Attributes:
        arrays: the arrays among the function and its arguments.
        static: all else. Calls with equal `static` and arrays of the same types have the same program.
    """

    def __init__(self, f: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        function, inputs = (f.__func__, (f.__self__, *args)) if isinstance(f, types.MethodType) else (f, args)
        leaves, tree = jax.tree.flatten((function, inputs, kwargs))
        self.arrays = [x for x in leaves if _is_array(x)]
        self._name = getattr(function, "__name__", type(function).__name__)
        self.static = Static((tuple(None if _is_array(x) else Static(x) for x in leaves), tree))

    def __call__(self, *arrays: Array) -> tuple[Any, list[Any]]:
        """Calls the function with these arrays in place of its own.

        Returns the output, with a Static for all that is no array, and the arguments' arrays as the call left them.
        """
        leaves, tree = self.static.value
        rest = iter(arrays)
        inputs = jax.tree.unflatten(tree, [next(rest) if x is None else x.value for x in leaves])
        function, args, kwargs = inputs
        outputs, structure = jax.tree.flatten(function(*args, **kwargs))
        out = structure.unflatten([x if _is_array(x) else Static(x) for x in outputs])
        return out, [x for x in jax.tree.leaves(inputs) if _is_array(x)]

    def check_state(self, caller: str, jaxpr: Any, left: Sequence[Any]) -> None:
        """Raises ValueError if an array in the arguments was replaced by one that is not returned.

        Args:
            caller: the name of the function that the user called.
            jaxpr: the program of this call.
            left: the second output of this call.
        """
        jaxpr = opened(jaxpr)
        split = len(jaxpr.outvars) - len(left)
        outputs = jaxpr.outvars[:split]
        pairs = zip(jaxpr.outvars[split:], jaxpr.invars, strict=False)
        kept = len(left) == len(jaxpr.invars) and all(v in outputs or origin(jaxpr, v) is x for v, x in pairs)
        if not kept:
            raise ValueError(
                f"{caller}: {self._name} replaced an array in one of its arguments, which would be lost; return the new "
                "state, for nnx models by nnx.split and nnx.merge"
            )


def returned(out: Any, results: Sequence[Any]) -> Any:
    """Returns what a call returns, given its first output, or the shapes of that, and the arrays that it returned.

    Args:
        out: the first output of the call, with anything in place of its arrays.
        results: these arrays, and after them others that do not matter.
    """
    leaves, structure = jax.tree.flatten(out, is_leaf=_is_static)
    rest = iter(results)
    return structure.unflatten([x.value if isinstance(x, Static) else next(rest) for x in leaves])


def _is_static(x: object) -> bool:
    return isinstance(x, Static)


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and x.dtype.kind not in "OSUMm")
