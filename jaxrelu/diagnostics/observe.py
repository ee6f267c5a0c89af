"""`observe`: the statistics of every activation that a function calls.

The interpreter of `jaxrelu._programs` runs the traced function, scans too; `_Observer` says what happens at an activation.
"""

import functools
import itertools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from jaxrelu import _checked as checked
from jaxrelu._lowering import observed as being_observed
from jaxrelu._programs import marks
from jaxrelu._programs.interpreter import Found, Step, Visitor, bind, called, interpreted, live, names_in, opened, origin
from jaxrelu.diagnostics.measurement import STATISTICS, statistics
from jaxrelu.diagnostics.stats import UnitStats, all_reduce, nothing_seen

__all__ = ["Stats", "observe"]

Stats = OrderedDict[str, UnitStats]
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


_TRACES = 64  # traces kept by each function that is observed; a loop that passes a new Python number makes one a call


class _Static:
    """A value that is no array, as a part of a pytree's structure. Two are equal if value and type are."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = checked.Number(value) if type(value) is float else value  # 0.0 is not -0.0, and NaN is NaN

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Static) or type(self.value) is not type(other.value):
            return False
        return self._key is other._key or (self._key == other._key) is True

    def __hash__(self) -> int:
        try:
            return hash(self._key)
        except TypeError:
            return hash(type(self.value))


jax.tree_util.register_pytree_node(_Static, lambda static: ((), static), lambda static, _: static)


def observe(f: Callable[_Parameters, _Result]) -> Callable[_Parameters, tuple[_Result, Stats]]:
    """Returns `f` with the statistics of every jaxrelu activation called inside it, with no edit to `f`.

    The activations may be called as functions or modules, and under jit, scan, remat, cond, shard_map and vmap. The units of
    an activation lie along the last axis of its input, as the code inside vmap sees it. All other axes, those that vmap maps
    and the devices of a mesh hold examples. An activation inside scan has one entry, whose arrays have a leading axis for
    each scan around it. Output and gradient are those of `f`, bit for bit; a gradient outside jit may differ by rounding.

    Where channels come first, as in `equinox.nn.Conv2d`, the last axis of positions is wrongly taken for the units. An
    activation that vmap calls with scalars, as in `equinox.nn.MLP`, counts as one unit, with a warning.

    `f` is traced once for arguments of the same shapes, as `jax.jit` does: an array that `f` closes over is read only then.
    A model is read at each call if it is a pytree, or if `f` is one of its methods. Arguments that are no arrays, Python
    numbers too, are static: for each new value `f` is traced again, so pass a step that counts up as an array. The last 64
    traces are kept.

    Args:
        f: any function or callable object. Arrays among its arguments are traced; numbers, strings, flags and None reach it
            as they are.

    Returns:
        A function of the arguments of `f`. It returns the output of `f` and an OrderedDict of UnitStats by name, in order of
        execution. A name has the named scopes around the activation, which in Flax linen are the path of the module, and
        then the activation: "hidden1/relu". If the same name comes again, it is numbered: "relu", "relu_1".

    Raises:
        TypeError: `f` is not callable.
        ValueError: `f` replaces an array in one of its arguments, as a model that changes its own state does.

    Warns:
        UserWarning: no activation was found; or one is called where its statistics cannot be brought out, such as a
            while_loop, or may be called where JAX has no program to look at, such as a callback; or one was given scalars
            under vmap.

    Examples:
        >>> import jax, jaxrelu
        >>> from jaxrelu import diagnostics
        >>> model = lambda x: jaxrelu.elu(jaxrelu.relu(x - jax.numpy.array([0.0, 9.0])))
        >>> out, stats = diagnostics.observe(model)(jax.numpy.array([[1.0, 2.0], [-1.0, 3.0], [4.0, 5.0]]))
        >>> list(stats), stats["relu"].dead, stats["relu"].fired, stats["relu"].count
        (['relu', 'elu'], Array([False,  True], dtype=bool), array([2, 0]), 3)
    """
    if not callable(f):
        raise TypeError(f"observe: f must be a function, got {f!r}; pass the model, not its output")
    visitor = _Observer()

    # caches of this call of observe, not of the module: a jaxpr keeps the arrays alive that f closes over
    @functools.lru_cache(_TRACES)
    def trace(call: _Static, shapes: tuple[Any, ...]) -> Callable[..., Any]:
        return jax.make_jaxpr(_function_of_arrays(*call.value), return_shape=True)

    @functools.lru_cache(_TRACES)
    def program(jaxpr: Any, left: int) -> tuple[Step, bool, bool]:
        empty = not any(names_in(eqn, visitor) for eqn, _ in live(jaxpr))
        return interpreted(jaxpr, visitor), _loses(jaxpr, left), empty

    def observed(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> tuple[Any, Stats]:
        function, inputs = (f.__func__, (f.__self__, *args)) if isinstance(f, types.MethodType) else (f, args)
        leaves, tree = jax.tree.flatten((function, inputs, kwargs))
        constants = tuple(None if _is_array(x) else _Static(x) for x in leaves)
        arrays = [x for x in leaves if _is_array(x)]
        with being_observed(True), jax.disable_jit(False):  # an activation is found by the name of a jitted function
            # with the shapes in the key, each trace is of one
            jaxpr, (out, left) = trace(_Static((constants, tree)), tuple(map(jax.typeof, arrays)))(*arrays)
        run, loses, empty = program(jaxpr, len(left))
        if loses:
            raise ValueError(
                f"observe: {getattr(function, '__name__', type(function).__name__)} replaced an array in one of its "
                "arguments, which would be lost; return the new state, for nnx models by nnx.split and nnx.merge"
            )
        if empty:
            warnings.warn(
                "observe: no activation was found; it looks for jaxrelu's relu, leaky_relu, prelu, elu and relu6, and their "
                "Flax modules, not for those of jax.nn",
                stacklevel=2,
            )
        results, everything = run(*arrays)
        stats: Stats = OrderedDict()
        for found in everything:
            stats[_unused(found.name, stats)] = found.value
        results = jax.tree.unflatten(jax.tree.structure(out), results[: len(results) - len(left)])
        outputs, structure = jax.tree.flatten(results, is_leaf=_is_static)
        return structure.unflatten([x.value if isinstance(x, _Static) else x for x in outputs]), stats

    # of a callable object, as equinox.filter_jit returns, the name may be no string
    names = [name for name in functools.WRAPPER_ASSIGNMENTS if isinstance(getattr(f, name, None), str)]
    return functools.update_wrapper(observed, f, names, updated=())


def _function_of_arrays(constants: Sequence[_Static | None], tree: Any) -> Callable[..., Any]:
    """Returns a flattened call as a function of its arrays; among the constants None stands for each of them.

    It returns the output, with a _Static for all that is no array, and the arguments' arrays as the call left them.
    """

    def call(*arrays: Array) -> Any:
        rest = iter(arrays)
        leaves = [next(rest) if x is None else x.value for x in constants]
        function, args, kwargs = inputs = jax.tree.unflatten(tree, leaves)
        outputs, structure = jax.tree.flatten(function(*args, **kwargs))
        out = structure.unflatten([x if _is_array(x) else _Static(x) for x in outputs])
        return out, [x for x in jax.tree.leaves(inputs) if _is_array(x)]

    return call


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and x.dtype.kind not in "OSUMm")


def _is_static(x: object) -> bool:
    return isinstance(x, _Static)


def _unused(name: str, stats: Stats) -> str:
    numbered = (f"{name}_{i}" if i else name for i in itertools.count())
    return next(candidate for candidate in numbered if candidate not in stats)


def _loses(jaxpr: Any, number: int) -> bool:
    """Returns whether an array in the arguments was replaced by one that is not returned."""
    jaxpr = opened(jaxpr)
    # the last outputs of the program, this number of them, are the arrays in the arguments as the call left them
    split = len(jaxpr.outvars) - number
    outputs, left = jaxpr.outvars[:split], jaxpr.outvars[split:]
    if number != len(jaxpr.invars):
        return True
    return any(v not in outputs and origin(jaxpr, v) is not x for v, x in zip(left, jaxpr.invars, strict=True))


class _Observer(Visitor):
    """What `observe` does at each activation, and at each place where the interpreter brings statistics out."""

    def name(self, eqn: core.JaxprEqn) -> str | None:
        name = marks.activation(eqn)
        return "" if name == STATISTICS else name

    def visit(self, eqn: core.JaxprEqn) -> Step:
        name = self.name(eqn) or ""

        def differentiated(*args: Any) -> tuple[Sequence[Any], list[Found]]:
            remedy = "observe inside it: jax.value_and_grad(observe(loss), has_aux=True)"
            _warn_unseen([name], "a differentiated function", remedy)
            return bind(eqn, *args), []

        if marks.is_differentiated(eqn):
            return differentiated
        function, axes = marks.core_of(eqn.params["jaxpr"]), marks.unit_axes(eqn)

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
        if check_vma:  # JAX then knows along which axes values vary; along all others the devices saw the same examples
            varying = jax.typeof(value.extremes).manual_axis_type.varying
            axes = tuple(axis for axis in axes if axis in varying)
        return all_reduce(value, axes) if axes else value

    def cannot_enter(self, eqn: core.JaxprEqn, names: Sequence[str]) -> None:
        _warn_unseen(names, called(eqn), "call unit_stats on its input there and return the result")


def _warn_unseen(names: Sequence[str], place: str, remedy: str) -> None:
    warnings.warn(f"observe: {', '.join(names)} inside {place} is not seen; {remedy}", stacklevel=2)
