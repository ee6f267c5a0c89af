"""A call of a user's function as a function of arrays alone: whatever else is among its arguments is static."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxrelu import _checked as checked
from jaxrelu._programs.interpreter import opened, origin

__all__ = ["Function", "Static", "check_state", "flattened", "named_as", "returned"]


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


class Function:
    """A call as a function of its arrays. Two are equal if all else is: they have the same program for equal types."""

    def __init__(self, leaves: Sequence[Static | None], tree: Any) -> None:
        """Takes the flattened function, arguments and keywords, with None in place of each array."""
        self._static = Static((tuple(leaves), tree))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self._static == other._static

    def __hash__(self) -> int:
        return hash(self._static)

    def __call__(self, *arrays: Array) -> tuple[Any, list[Any]]:
        """Returns the output, with a Static for all that is no array, and the arguments' arrays as the call left them."""
        leaves, tree = self._static.value
        rest = iter(arrays)
        inputs = jax.tree.unflatten(tree, [next(rest) if x is None else x.value for x in leaves])
        function, args, kwargs = inputs
        outputs, structure = jax.tree.flatten(function(*args, **kwargs))
        out = structure.unflatten([x if _is_array(x) else Static(x) for x in outputs])
        return out, [x for x in jax.tree.leaves(inputs) if _is_array(x)]


def flattened(f: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Function, list[Any]]:
    """Returns a call of f as a function of its arrays, and these, also those of a model that f is, or has as its method."""
    function, inputs = (f.__func__, (f.__self__, *args)) if isinstance(f, types.MethodType) else (f, args)
    leaves, tree = jax.tree.flatten((function, inputs, kwargs))
    return Function([None if _is_array(x) else Static(x) for x in leaves], tree), [x for x in leaves if _is_array(x)]


def check_state(caller: str, f: Callable[..., Any], jaxpr: Any, left: Sequence[Any]) -> None:
    """Raises ValueError if an array in the arguments was replaced by one that is not returned.

    Args:
        caller: the name of the function that the user called.
        f: what the user gave it.
        jaxpr: the program of a `Function`.
        left: the second output of that.
    """
    jaxpr = opened(jaxpr)
    split = len(jaxpr.outvars) - len(left)
    outputs = jaxpr.outvars[:split]
    pairs = zip(jaxpr.outvars[split:], jaxpr.invars, strict=False)
    if len(left) != len(jaxpr.invars) or any(v not in outputs and origin(jaxpr, v) is not x for v, x in pairs):
        raise ValueError(
            f"{caller}: {getattr(f, '__name__', type(f).__name__)} replaced an array in one of its arguments, which would "
            "be lost; return the new state, for nnx models by nnx.split and nnx.merge"
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


def named_as(wrapper: Any, f: Callable[..., Any]) -> Any:
    """Returns a function with the name and docstring of another; of a callable object the name may be no string."""
    names = [name for name in functools.WRAPPER_ASSIGNMENTS if isinstance(getattr(f, name, None), str)]
    return functools.update_wrapper(wrapper, f, names, updated=())


def _is_static(x: object) -> bool:
    return isinstance(x, Static)


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and x.dtype.kind not in "OSUMm")
