"""`observe`: the statistics of every activation in a program, found by the interpreter of `jaxrelu._programs`."""

import functools
import itertools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from jaxrelu._lowering import observed as being_observed
from jaxrelu._programs import marks
from jaxrelu._programs.interpreter import Found, Step, Visitor, bind, interpreted, opened, origin
from jaxrelu.diagnostics.stats import STATISTICS, UnitStats, all_reduce, nothing_seen, statistics

__all__ = ["Stats", "observe"]

Stats = OrderedDict[str, UnitStats]


class _Static:
    """A leaf that is no array, as a part of the tree's structure. Equal if of the same type and equal."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or (self.value == other.value) is True

    def __hash__(self) -> int:
        return hash(type(self.value))  # the value may have no hash


jax.tree_util.register_pytree_node(_Static, lambda static: ((), static), lambda static, _: static)


def observe(f: Callable[..., Any]) -> Callable[..., tuple[Any, Stats]]:
    """Returns `f` with the statistics of every jaxrelu activation called inside it, with no edit to `f`.

    The activations may be called as functions or modules, under jit, scan, remat, cond, shard_map and vmap. The unit axis is
    the last axis of what the activation was given, seen from inside vmap; all other axes, mapped axes and devices hold
    examples. An activation inside scan is one entry; its arrays have a leading axis for each scan around it. The output is
    that of `f`, bit for bit; so is its gradient under jit, while outside jit it may differ by rounding.

    Where channels come first, as in `equinox.nn.Conv2d`, the last axis of positions is taken for the units. An activation
    that is mapped over scalars, as in `equinox.nn.MLP`, counts as one unit, with a warning.

    `f` is traced, once for the same shapes as by `jax.jit`: arrays that it closes over are read then. A model that is a
    pytree, or whose bound method is passed, is read at each call.

    Args:
        f: any function. Arrays among its arguments are traced; numbers, strings, flags and None reach it as they are.

    Returns:
        A function of the arguments of `f`. It returns the output of `f` and an OrderedDict, in order of execution, from a
        name to UnitStats. The name is that of the named scopes around the activation, which is the module's path in Flax
        linen, and of the activation: "hidden1/relu". Equal ones are numbered: "relu", "relu_1".

    Raises:
        TypeError: `f` is not callable.
        ValueError: `f` replaces an array in one of its arguments, as a model that changes its own state does.

    Warns:
        UserWarning: an activation's statistics cannot be brought out of where it is called, a while_loop, say; or it was
            given scalars under vmap.

    Examples:
        >>> import jax, jaxrelu
        >>> from jaxrelu import diagnostics
        >>> out, stats = diagnostics.observe(lambda x: jaxrelu.elu(jaxrelu.relu(x)))(jax.numpy.array([[1.0, -2.0]]))
        >>> [(name, s.firing_rate.tolist()) for name, s in stats.items()]
        [('relu', [1.0, 0.0]), ('elu', [1.0, 0.0])]
    """
    if not callable(f):
        raise TypeError(f"observe: f must be a function, got {f!r}; pass the model, not its output")
    traces: dict[_Static, Callable[..., Any]] = {}
    # its own, as a jaxpr holds the arrays that f closes over
    interpret = functools.lru_cache(512)(functools.partial(interpreted, visitor=_Observer()))
    loses = functools.lru_cache(512)(_loses)

    @functools.wraps(f)
    def observed(*args: Any, **kwargs: Any) -> tuple[Any, Stats]:
        function: Any = f
        if isinstance(f, types.MethodType):
            function, args = f.__func__, (f.__self__, *args)
        leaves, tree = jax.tree.flatten((function, args, kwargs))
        key = _Static((tree, [None if _is_array(x) else _Static(x) for x in leaves]))
        if key not in traces:
            traces[key] = jax.make_jaxpr(_function_of_arrays(leaves, tree), return_shape=True)
        arrays = [x for x in leaves if _is_array(x)]
        with being_observed(True):
            jaxpr, (out, left) = traces[key](*arrays)
        if loses(jaxpr, len(left)):
            raise ValueError(
                f"observe: {getattr(function, '__name__', type(function).__name__)} replaced an array in one of its "
                "arguments, which would be lost; return the new state, for nnx models by nnx.split and nnx.merge"
            )
        results, everything = interpret(jaxpr)(*arrays)
        stats: Stats = OrderedDict()
        for found in everything:
            stats[_unused(found.name, stats)] = found.value
        results = jax.tree.unflatten(jax.tree.structure(out), results[: len(results) - len(left)])
        return jax.tree.map(_bare, results, is_leaf=_is_static), stats

    return observed


def _function_of_arrays(leaves: list[Any], tree: Any) -> Callable[..., Any]:
    """Returns the function in the flattened call as one of its arrays only.

    The output holds other leaves as _Static, and comes with the arrays as the call left them.
    """
    constants = [None if _is_array(x) else x for x in leaves]
    places = [i for i, x in enumerate(leaves) if _is_array(x)]

    def call(*arrays: Array) -> Any:
        filled = list(constants)
        for i, x in zip(places, arrays, strict=True):
            filled[i] = x
        function, args, kwargs = inputs = jax.tree.unflatten(tree, filled)
        out = jax.tree.map(_boxed, function(*args, **kwargs))
        return out, [x for x in jax.tree.leaves(inputs) if _is_array(x)]

    return call


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and x.dtype.kind not in "OSUMm")


def _boxed(x: Any) -> Any:
    return x if _is_array(x) else _Static(x)


def _bare(x: Any) -> Any:
    return x.value if isinstance(x, _Static) else x


def _is_static(x: object) -> bool:
    return isinstance(x, _Static)


def _unused(name: str, names: Iterable[str]) -> str:
    taken = set(names)
    numbered = (f"{name}_{i}" if i else name for i in itertools.count())
    return next(candidate for candidate in numbered if candidate not in taken)


def _loses(jaxpr: Any, number: int) -> bool:
    """Returns whether the last outputs, the arguments as the call left them, are neither what they were nor returned."""
    jaxpr = opened(jaxpr)
    split = len(jaxpr.outvars) - number
    outputs, left = jaxpr.outvars[:split], jaxpr.outvars[split:]
    if number != len(jaxpr.invars):
        return True
    return any(v not in outputs and origin(jaxpr, v) is not x for v, x in zip(left, jaxpr.invars, strict=True))


class _Observer(Visitor):
    """Takes the statistics of every activation."""

    def name(self, eqn: core.JaxprEqn) -> str | None:
        name = marks.activation(eqn)
        return "" if name == STATISTICS else name

    def visit(self, eqn: core.JaxprEqn) -> Step:
        name = self.name(eqn) or ""

        def differentiated(*args: Any) -> tuple[Sequence[Any], list[Found]]:
            _warn_unseen(
                [name], "a differentiated function", "observe inside it: jax.value_and_grad(observe(loss), has_aux=True)"
            )
            return bind(eqn, *args), []

        if marks.is_differentiated(eqn):
            return differentiated
        function, axes = marks.core_of(eqn), marks.unit_axes(eqn)

        def activation(*args: Any) -> tuple[Sequence[Any], list[Found]]:
            if axes is None and jnp.ndim(args[0]):
                given = "was given scalars under vmap, so all its units count as one; apply it to vectors"
                warnings.warn(f"observe: {name} {given}", stacklevel=2)
            stats = statistics(*map(lax.stop_gradient, args), function=function, axes=axes)
            return bind(eqn, *args), [Found(stats, name)]

        return activation

    def branch_not_taken(self, value: UnitStats) -> UnitStats:
        return nothing_seen(value)

    def across_devices(self, value: UnitStats, axes: tuple[str, ...], check_vma: bool) -> UnitStats:
        if check_vma:  # devices that do the same work have seen nothing new
            varying = jax.typeof(value.extremes).manual_axis_type.varying
            axes = tuple(axis for axis in axes if axis in varying)
        return all_reduce(value, axes) if axes else value

    def cannot_enter(self, eqn: core.JaxprEqn, names: Sequence[str]) -> None:
        _warn_unseen(names, eqn.primitive.name, "call unit_stats on its input there and return the result")


def _warn_unseen(names: Sequence[str], place: str, remedy: str) -> None:
    warnings.warn(f"observe: {', '.join(names)} inside {place} is not seen; {remedy}", stacklevel=2)
