"""`observe`: an interpreter of jaxprs that recognises the jitted cores of `jaxrelu.functions` by their tag."""

import contextlib
import dataclasses
import functools
import itertools
import re
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
from jax.extend.core import primitives
from jax.sharding import PartitionSpec, Sharding

from jaxrelu.diagnostics.stats import UnitStats, all_reduce, nothing_seen, statistics
from jaxrelu.functions import TAG

Stats = OrderedDict[str, UnitStats]
_Step = Callable[..., tuple[Sequence[Any], list["_Entry"]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Entry:
    stats: UnitStats
    name: str = dataclasses.field(metadata={"static": True})


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

    The activations may be called as functions or modules, under jit, scan, remat, cond, shard_map and vmap. The unit axis
    is the last one of what the activation was given, inside vmap; mapped axes and devices are examples. An activation
    inside scan is one entry, with a leading axis a level. The output is that of `f`, bit for bit; so is its gradient under
    jit, while outside jit it may differ by rounding.

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
    interpreted, loses = functools.lru_cache(512)(_interpreted), functools.lru_cache(512)(_loses)

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
        jaxpr, (out, left) = traces[key](*arrays)
        if loses(jaxpr, len(left)):
            raise ValueError(
                f"observe: {getattr(function, '__name__', type(function).__name__)} replaced an array in one of its "
                "arguments, which would be lost; return the new state, for nnx models by nnx.split and nnx.merge"
            )
        results, found = interpreted(jaxpr)(*arrays)
        stats: Stats = OrderedDict()
        for entry in found:
            stats[_unused(entry.name, stats)] = entry.stats
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


def _interpreted(jaxpr: Any) -> _Step:
    """Returns the jaxpr as a function to its outputs and what was found, to be kept: what a step jits is compiled once."""
    constants, jaxpr = getattr(jaxpr, "consts", ()), _open(jaxpr)
    # dead equations are left by some transformations of Flax, and would be seen as layers
    live, steps = {v for v in jaxpr.outvars if isinstance(v, core.Var)}, []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not live.isdisjoint(eqn.outvars):
            live.update(v for v in eqn.invars if isinstance(v, core.Var))
            steps.insert(0, (eqn, _scope(eqn), _step(eqn)))

    def run(*args: Any) -> tuple[list[Any], list[_Entry]]:
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *args), strict=True))
        entries: list[_Entry] = []

        def read(v: Any) -> Any:
            return v.val if isinstance(v, core.Literal) else env[v]

        for eqn, scope, step in steps:
            with jax.named_scope(scope) if scope else contextlib.nullcontext(), eqn.ctx.manager:
                outs, found = step(*map(read, eqn.invars))
            env.update(zip(eqn.outvars, outs, strict=True))
            entries += [dataclasses.replace(e, name=f"{scope}/{e.name}" if scope else e.name) for e in found]
        return [read(v) for v in jaxpr.outvars], entries

    return run


def _loses(jaxpr: Any, number: int) -> bool:
    """Returns whether the last outputs, the arguments as the call left them, are neither what they were nor returned."""
    jaxpr = _open(jaxpr)
    split = len(jaxpr.outvars) - number
    outputs, left = jaxpr.outvars[:split], jaxpr.outvars[split:]
    if number != len(jaxpr.invars):
        return True
    return any(v not in outputs and _origin(jaxpr, v) is not x for v, x in zip(left, jaxpr.invars, strict=True))


def _origin(jaxpr: core.Jaxpr, v: Any) -> Any:
    """Returns the variable of which this one is the very value, where jit and remat pass it through, as Flax nnx's do."""
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name in ("jit", "remat2") and v in eqn.outvars:
            body = _open(eqn.params["jaxpr"])
            inside = _origin(body, body.outvars[eqn.outvars.index(v)])
            if inside in body.invars:
                v = eqn.invars[body.invars.index(inside)]
    return v


def _open(jaxpr: Any) -> Any:
    """Returns a jaxpr without its constants; JAX 0.12 has one class for both."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _scope(eqn: core.JaxprEqn) -> str:
    """Returns the named scopes around an equation, without the transformations: "vmap(mlp)/hidden1" is mlp/hidden1."""
    return re.sub(r"\w+\(|\)", "", str(eqn.source_info.name_stack)).strip("/").replace("//", "/")


def _step(eqn: core.JaxprEqn) -> _Step:
    """Returns an equation as a function to its outputs and what was found."""

    def bind(*args: Any) -> tuple[Sequence[Any], list[_Entry]]:
        outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
        return outs if eqn.primitive.multiple_results else [outs], []

    if not _activations_in(eqn):
        return bind
    if _is_core(eqn):
        function, axes, name = _core(eqn.params["jaxpr"]), _unit_axes(eqn), eqn.params["name"].removeprefix(TAG)

        def activation(*args: Any) -> tuple[Sequence[Any], list[_Entry]]:
            if axes is None and jnp.ndim(args[0]):
                given = "was given scalars under vmap, so all its units count as one; apply it to vectors"
                warnings.warn(f"observe: {name} {given}", stacklevel=2)
            return bind(*args)[0], [_Entry(statistics(*map(lax.stop_gradient, args), function=function, axes=axes), name)]

        return activation
    differentiated = _tagged(eqn)
    if eqn.primitive.name in _ENTER and not differentiated:
        # jitted, as the primitive alone would be; literals become arrays
        entered = jax.jit(_ENTER[eqn.primitive.name](eqn))

        def enter(*args: Any) -> tuple[Sequence[Any], list[_Entry]]:
            return entered(*map(jnp.asarray, args))

        return enter

    def unseen(*args: Any) -> tuple[Sequence[Any], list[_Entry]]:
        if differentiated:
            place, remedy = "a differentiated function", "observe inside it: jax.value_and_grad(observe(loss), has_aux=True)"
        else:
            place, remedy = eqn.primitive.name, "call unit_stats on its input there and return the result"
        names = ", ".join(sorted(_activations_in(eqn)))
        warnings.warn(f"observe: {names} inside {place} is not seen; {remedy}", stacklevel=2)
        return bind(*args)

    return unseen


def _activations_in(eqn: core.JaxprEqn) -> frozenset[str]:
    """Returns the names of the activations that an equation is or calls."""
    if _tagged(eqn):
        return frozenset({eqn.params["name"].removeprefix(TAG)} - {"statistics"})
    bodies = core.jaxprs_in_params(eqn.params)
    return frozenset().union(*(_activations_in(inner) for body in bodies for inner in body.eqns))


def _tagged(eqn: core.JaxprEqn) -> bool:
    return eqn.primitive is primitives.jit_p and eqn.params["name"].startswith(TAG)


def _is_core(eqn: core.JaxprEqn) -> bool:
    """Returns whether an equation is an activation's core, neither differentiated nor a part of its derivative."""
    if not _tagged(eqn) or len(eqn.outvars) != 1:
        return False
    body = _open(eqn.params["jaxpr"])
    made_by = {v: e for e in body.eqns for v in e.outvars}
    last = made_by.get(body.outvars[0])
    while last and last.primitive in (lax.split_p, lax.transpose_p):
        last = made_by.get(last.invars[0])
    return last is not None and last.primitive is primitives.custom_jvp_call_p


def _unit_axes(eqn: core.JaxprEqn) -> tuple[int, int] | None:
    """Returns the unit axis of an activation's input and output, mapped axes counted, or None if it was given a scalar."""
    steps = eqn.params["jaxpr"].eqns
    if steps[0].primitive is not lax.split_p:
        return None
    before, after = steps[0], steps[-1] if steps[-1].primitive is lax.split_p else steps[0]
    return before.params["axis"], after.params["axis"]


@functools.lru_cache(maxsize=512)
def _core(jaxpr: Any) -> Callable[..., Array]:
    """Returns the activation of a core's jaxpr: the same function for the same jaxpr, as its statistics are jitted."""

    def function(*args: Array) -> Array:
        return core.jaxpr_as_fun(jaxpr)(*args)[0]

    return function


# What depends on the parameters of JAX's primitives is below: each function returns an equation's own transformation of
# its interpreted body.


def _enter_jit(eqn: core.JaxprEqn) -> _Step:
    run = _interpreted(eqn.params["jaxpr"])

    def constrain(xs: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        pairs = zip(xs, shardings, strict=True)
        return [lax.with_sharding_constraint(x, s) if isinstance(s, Sharding) else x for x, s in pairs]

    def call(*args: Any) -> tuple[Sequence[Any], list[_Entry]]:
        outs, found = run(*constrain(args, eqn.params["in_shardings"]))
        return constrain(outs, eqn.params["out_shardings"]), found

    return call


def _enter_scan(eqn: core.JaxprEqn) -> _Step:
    run, body = _interpreted(eqn.params["jaxpr"]), _open(eqn.params["jaxpr"])
    # the parameters that say so differ between JAX 0.10 and 0.12, but scanned arrays have an axis that the body does not see
    carries, unscanned = _same_rank(eqn.outvars, body.outvars), _same_rank(eqn.invars, body.invars)
    loop = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}

    def call(*args: Any) -> tuple[Sequence[Any], list[_Entry]]:
        constants, carry, xs = args[: unscanned - carries], args[unscanned - carries : unscanned], args[unscanned:]

        def step(carry: Any, xs: Any) -> Any:
            outs, found = run(*constants, *carry, *xs)
            return tuple(outs[:carries]), (outs[carries:], found)

        carry, (ys, found) = lax.scan(step, carry, xs, **loop)
        return [*carry, *ys], found

    return call


def _same_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(v.aval.ndim == w.aval.ndim for v, w in zip(outside, inside, strict=True))


def _enter_remat(eqn: core.JaxprEqn) -> _Step:
    run = _interpreted(eqn.params["jaxpr"])
    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


def _enter_cond(eqn: core.JaxprEqn) -> _Step:
    branches = [_interpreted(branch) for branch in eqn.params["branches"]]

    def call(index: Any, *args: Any) -> tuple[Sequence[Any], list[_Entry]]:
        shapes = [jax.eval_shape(run, *args)[1] for run in branches]

        def empty(shape: list[_Entry]) -> list[_Entry]:
            return [dataclasses.replace(e, stats=nothing_seen(e.stats)) for e in shape]

        def branch(taken: int) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                outs, found = branches[taken](*args)
                lists = [found if i == taken else empty(shape) for i, shape in enumerate(shapes)]
                return outs, list(itertools.chain(*lists))

            return run

        return lax.switch(index, [branch(i) for i in range(len(branches))], *args)

    return call


def _enter_shard_map(eqn: core.JaxprEqn) -> _Step:
    run, params = _interpreted(eqn.params["jaxpr"]), eqn.params

    def over_devices(entry: _Entry) -> _Entry:
        axes = params["newly_manual_axes"]
        if params["check_vma"]:  # devices that do the same work have seen nothing new
            axes &= jax.typeof(entry.stats.max).manual_axis_type.varying
        return dataclasses.replace(entry, stats=all_reduce(entry.stats, tuple(sorted(axes)))) if axes else entry

    def body(*args: Any) -> tuple[Sequence[Any], list[_Entry]]:
        outs, found = run(*args)
        return outs, [over_devices(e) for e in found]

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=(list(params["out_specs"]), PartitionSpec()),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )


_ENTER: dict[str, Callable[[core.JaxprEqn], _Step]] = {
    "jit": _enter_jit,
    "scan": _enter_scan,
    "remat2": _enter_remat,
    "cond": _enter_cond,
    "shard_map": _enter_shard_map,
}
