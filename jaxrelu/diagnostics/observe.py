"""`observe`: the statistics of every activation that a function calls.

The interpreter of `jaxrelu._programs` runs the traced function, scans too; `_Observer` says what happens at an activation.
"""

import functools
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core

from jaxrelu import _checked as checked
from jaxrelu._lowering import observed as being_observed
from jaxrelu._programs import formulas, marks
from jaxrelu._programs.calls import Function, check_state, flattened, named_as, returned
from jaxrelu._programs.formulas import Activation
from jaxrelu._programs.interpreter import Found, Scope, Step, Visitor, bind, called, interpreted, live, names_in
from jaxrelu.diagnostics.measurement import statistics
from jaxrelu.diagnostics.stats import UnitStats, all_reduce, nothing_seen

__all__ = ["Stats", "observe"]

Stats = OrderedDict[str, UnitStats]
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


_TRACES = 64  # traces kept by each function that is observed; a loop that passes a new Python number makes one a call


def observe(
    f: Callable[_Parameters, _Result], *, activations: Sequence[str] | None = None, axis: int | None = None
) -> Callable[_Parameters, tuple[_Result, Stats]]:
    """Returns `f` with the statistics of every activation called inside it, with no edit to `f`.

    It sees the functions and modules of this package; relu, relu6, leaky_relu, elu, celu, selu, gelu, silu, softplus, mish,
    squareplus, soft_sign, hard_tanh, hard_sigmoid and hard_silu of jax.nn; and PReLU of Flax and Equinox: under jit, scan,
    remat, cond, shard_map and vmap. It knows those of others by their formula, and by the derivative rule that belongs to
    it, in float16, bfloat16, float32 and float64, so that other frameworks may call them by other names. It sees these also
    in a gradient that `f` computes, but relu, relu6 and what uses them or softplus not in that of a scan before JAX 0.12.

    The units of a layer lie along one axis of the activation's input; all other axes, those that vmap maps and the devices
    of a mesh, hold examples. For a function of this package it is the last axis, as the code inside vmap sees it. For others
    it is the axis of the outputs of the convolution or product with weights before the activation, else that of a bias or
    scale on the way, so that models with channels first and models for one example under vmap are counted right. If there
    is none, it is the last axis. An activation inside scan has one entry, whose arrays have a leading axis for each scan
    around it. Output and gradient are those of `f`, bit for bit; a gradient outside jit may differ by rounding.

    `f` is traced once for arguments of the same shapes, as `jax.jit` does: an array that `f` closes over is read only then.
    A model is read at each call if it is a pytree, or if `f` is one of its methods. Arguments that are no arrays, Python
    numbers too, are static: for each new value `f` is traced again, so pass a step that counts up as an array. The last 64
    traces are kept.

    Args:
        f: any function or callable object. Arrays among its arguments are traced; numbers, strings, flags and None reach it
            as they are.
        activations: names of the activations to see, such as `("relu", "tanh")`; all of the above if None. Besides these it
            knows what gates, losses and bounds consist of too: "tanh", "sigmoid", "log_sigmoid", "maximum" for
            `maximum(x, 0)`, and "where" for `where(x > 0, x, 0)`.
        axis: the axis of the units, as the whole program sees it, with the axes that vmap maps: -3 for images with channels
            first. An activation that has no such axis is treated as if `axis` were None.

    Returns:
        A function of the arguments of `f`. It returns the output of `f` and an OrderedDict of UnitStats by name, in order of
        execution. A name has the named scopes around the activation, which in Flax linen are the path of the module, and
        then the activation: "hidden1/relu". If the same name comes again, it is numbered: "relu", "relu_1".

    Raises:
        TypeError: `f` is not callable, `activations` is no tuple of names, or `axis` is not an int.
        ValueError: `activations` has an unknown name; or `f` replaces an array in one of its arguments, as a model that
            changes its own state does.

    Warns:
        UserWarning: no activation was found; or one is called where its statistics cannot be brought out, such as a
            while_loop, or may be called where JAX has no program to look at, such as a callback; or one is under vmap, and
            nothing shows along which axis its units lie.

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
    if activations is None:
        activations = formulas.DEFAULT
    elif not (isinstance(activations, (tuple, list)) and all(isinstance(name, str) for name in activations)):
        raise TypeError(f'observe: activations must be a tuple of names, got {activations!r}; pass ("relu", "tanh"), say')
    elif unknown := [name for name in activations if name not in formulas.NAMES]:
        raise ValueError(f"observe: activations must be among {', '.join(formulas.NAMES)}, got {', '.join(unknown)}")
    if axis is not None and not checked.is_int(axis):
        raise TypeError(f"observe: axis must be an int or None, got {axis!r}; pass the axis of the units")

    # caches of this call of observe, not of the module: a jaxpr keeps the arrays alive that f closes over
    @functools.lru_cache(_TRACES)
    def trace(function: Function, shapes: tuple[Any, ...]) -> Callable[..., Any]:
        return jax.make_jaxpr(function, return_shape=True)

    @functools.lru_cache(_TRACES)
    def program(jaxpr: Any) -> tuple[Step, bool]:
        scope, visitor = Scope(jaxpr), _Observer(activations, axis)
        empty = not any(names_in(eqn, scope, visitor) for eqn, _ in live(jaxpr))
        return interpreted(scope, visitor), empty

    def observed(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> tuple[Any, Stats]:
        function, arrays = flattened(f, args, kwargs)
        with being_observed(True), jax.disable_jit(False):  # an activation is found by the name of a jitted function
            # with the shapes in the key, each trace is of one
            jaxpr, (out, left) = trace(function, tuple(map(jax.typeof, arrays)))(*arrays)
        check_state("observe", f, jaxpr, left)
        run, empty = program(jaxpr)
        if empty:
            warnings.warn(
                f"observe: no activation was found; it looks for {', '.join(activations)}, of jax.nn, Flax, Equinox and "
                "jaxrelu, and knows them by their formula",
                stacklevel=2,
            )
        results, everything = run(*arrays)
        stats: Stats = OrderedDict()
        for found in everything:
            stats[_unused(found.name, stats)] = found.value
        return returned(out, results), stats

    return named_as(observed, f)


def _unused(name: str, stats: Stats) -> str:
    numbered = (f"{name}_{i}" if i else name for i in itertools.count())
    return next(candidate for candidate in numbered if candidate not in stats)


class _Observer(Visitor):
    """What `observe` does at each activation, and at each place where the interpreter brings statistics out."""

    def __init__(self, activations: Sequence[str], axis: int | None) -> None:
        self.activations, self.axis = activations, axis
        self._known: dict[Scope, tuple[dict[core.Var, Activation], set[core.Var]]] = {}

    def _found(self, eqn: core.JaxprEqn, scope: Scope) -> list[Activation] | None:
        """Returns the activations that an equation ends; [] for a part of one, None for all other equations."""
        if scope not in self._known:
            found = formulas.recognized(scope, formulas.NAMES)
            self._known[scope] = found, set[core.Var]().union(*(activation.parts for activation in found.values()))
        found, parts = self._known[scope]
        if ended := [found[v] for v in eqn.outvars if v in found]:
            return ended
        return None if parts.isdisjoint(eqn.outvars) else []

    def names(self, eqn: core.JaxprEqn, scope: Scope) -> list[str] | None:
        if (name := marks.activation(eqn)) is not None:
            return [name] if name in self.activations else []
        if not (found := self._found(eqn, scope)):
            return found if found is None else []
        names = [activation.name for activation in found if activation.name in self.activations]
        # a call may compute others besides, of its own variables; then it is entered
        inside = [names_in(inner, body, self) for body in scope.inside(eqn) for inner in body.jaxpr.eqns]
        return names if sum(map(len, inside)) <= len(found) else None

    def visit(self, eqn: core.JaxprEqn, scope: Scope) -> Step:
        if marks.activation(eqn) and marks.is_differentiated(eqn):

            def differentiated(*args: Any) -> tuple[Sequence[Any], list[Found]]:
                remedy = "observe inside it: jax.value_and_grad(observe(loss), has_aux=True)"
                _warn_unseen(self.names(eqn, scope) or [], "a differentiated function", remedy)
                return bind(eqn, *args), []

            return differentiated
        found = self._asked(eqn, scope)
        units = [self._units(activation, eqn, scope) for activation in found]

        def activation(*args: Any) -> tuple[Sequence[Any], list[Found]]:
            inputs, rest, everything = args[: len(eqn.invars)], iter(args[len(eqn.invars) :]), list[Found]()
            for (name, _, arguments, function, layouts, _), (axes, doubt) in zip(found, units, strict=True):
                if doubt:
                    warnings.warn(f"observe: {name} {doubt}", stacklevel=2)
                z, *numbers = (lax.stop_gradient(jnp.asarray(next(rest))) for _ in (None, *arguments))
                if layouts:
                    z = _laid_out(z, layouts[0])
                    numbers = [_laid_out(x, layout).astype(z.dtype) for x, layout in zip(numbers, layouts[1:], strict=True)]
                everything.append(Found(statistics(z, *numbers, function=function, axes=axes), name))
            return bind(eqn, *inputs), everything

        return activation

    def reads(self, eqn: core.JaxprEqn, scope: Scope) -> Sequence[Any]:
        return [atom for activation in self._asked(eqn, scope) for atom in (activation.z, *activation.arguments)]

    def _asked(self, eqn: core.JaxprEqn, scope: Scope) -> list[Activation]:
        if not self.names(eqn, scope):
            return []
        return [activation for activation in self._found(eqn, scope) or () if activation.name in self.activations]

    def _units(self, activation: Activation, eqn: core.JaxprEqn, scope: Scope) -> tuple[tuple[int, int] | None, str]:
        """Returns the unit axes of an activation's input and output, None for one unit, and what is in doubt about them."""
        ndim, layouts = activation.z.aval.ndim, activation.axes
        if not ndim:
            return None, ""
        if self.axis is not None and -ndim <= self.axis < ndim:
            units = self.axis % ndim
        elif layouts is None and (marked := marks.unit_axes(eqn)):
            return marked, ""
        else:
            units = formulas.unit_axis(scope, activation.z)
        doubt = ""
        if units is None and layouts is None:
            return None, "was given scalars under vmap, so all its units count as one; apply it to vectors, or pass axis"
        if units is None:
            units = ndim - 1
            if formulas.is_mapped(scope, eqn):
                doubt = "is under vmap, where nothing shows which axis its units lie along; the last is taken, or pass axis"
        if layouts is None:
            return (units, formulas.layout(scope, eqn.outvars[0], activation.z).index(units)), doubt
        laid_out = layouts[0].index(units)
        return (laid_out, laid_out), doubt

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


def _laid_out(x: Array, axes: Sequence[int | None]) -> Array:
    """Returns x with its axes in this order, and with new ones of size 1 for None."""
    if axes == tuple(range(x.ndim)):
        return x
    kept = [axis for axis in axes if axis is not None]
    rest = [axis for axis in range(x.ndim) if axis not in kept]
    return x.transpose(*kept, *rest).reshape([1 if axis is None else x.shape[axis] for axis in axes])
