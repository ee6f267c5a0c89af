"""`recycle`: an Optax transformation around another one, that gives dormant units fresh weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.nn.initializers import Initializer
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from jaxrelu import _checked as checked
from jaxrelu.diagnostics import UnitStats, merge, unit_stats
from jaxrelu.recycling.edges import Edge, Layer, Parameters, check, named, replicated, sharded_as

__all__ = ["RecycleState", "fresh_batch_stats", "recycle"]

# the names of those fields in Optax's states that hold an array for each parameter, in its shape
_FIRST_MOMENTS = ("mu", "trace", "ema", "acc_grads")
_SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares")
_PARAMETERS = ("z",)  # the copy of the parameters that schedule_free keeps
# the names of a BatchNorm's running statistics in Flax, then in Haiku
_MEANS = ("mean", "~/mean_ema/average", "~/mean_ema/hidden")
_VARIANCES = ("var", "~/var_ema/average", "~/var_ema/hidden")


class RecycleState(NamedTuple):
    """The state of `recycle`.

    `recycled` holds the number of units recycled so far, one number per edge; `fresh` one boolean array per edge, True for
    the units that the last update recycled.
    """

    step: Array  # updates since the last recycling
    recyclings: Array  # recyclings so far
    recycled: Array
    fresh: tuple[Array, ...]
    stats: tuple[UnitStats, ...]  # merged since the last recycling, one entry per edge
    inner_state: Any  # the state of the wrapped transformation


def recycle(
    inner: optax.GradientTransformation,
    edges: Sequence[Edge],
    *,
    every: int = 1000,
    threshold: float = 0.0,
    key: Array,
    init: Initializer,
    moments: Literal["zero", "mean"] = "zero",
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` with a cure for dying units (Sokar et al. 2023, arXiv:2302.12902): dormant units start afresh.

    Every `every` updates, the units are recycled whose `UnitStats.dormancy`, over the statistics merged since the last
    recycling, is at most `threshold`. A recycled unit gets incoming weights from `init`, bias 0 and outgoing weights 0; in a
    BatchNorm between, its scale becomes 1 and its bias 0. The optimizer's moments of these entries are reset. A unit without
    statistics, or whose dormancy is NaN, is left alone. A weight from one recycled unit to another is drawn from `init`, so
    that a network whose layers are all dead recovers too.

    With `threshold` 0, recycling does not change what the network computes on the data that the statistics saw: the output
    of a ReLU that is dead there was 0, and afterwards no layer reads it. A higher threshold changes the output a little.

    `update(grads, state, params, *, stats=...)` takes the `UnitStats` of each edge by name, as `diagnostics.observe` returns
    them, already reduced over devices; or None after a step that was not observed. Adding its updates by
    `optax.apply_updates` sets the recycled entries, outgoing weights and biases to exactly 0, so no later transformation may
    change them. All other updates are those of `inner`. It works under `jax.jit` and `jax.lax.scan`, with parameters in any
    sharding; a step without recycling costs only the merging of statistics. The state is a `RecycleState`.

    The running statistics of a BatchNorm between are no parameters: reset those of the recycled units by
    `fresh_batch_stats(batch_stats, edges, state.fresh)` after each update. In evaluation, those of a dead unit would shift
    and scale a fresh one to nonsense.

    Args:
        inner: an optimizer that keeps its moments as sgd, adam, adagrad, rmsprop, lion and their relatives do, also chained,
            scheduled, masked, or in `inject_hyperparams`, `MultiSteps` or `schedule_free` (with its copy of the parameters).
        edges: the layers of units. A layer is the producer of at most one edge and a consumer of at most one edge.
        every: the number of updates from one recycling to the next.
        threshold: the greatest dormancy at which a unit is recycled.
        key: a key from `jax.random`, from which each edge derives a new one at each recycling.
        init: the initializer of the incoming weights, for example `jaxrelu.initializers.kaiming_normal()`.
        moments: "zero" sets the moments to 0. Adam's step count stays, so its bias correction does not make up for the small
            second moment: once the count is in the thousands, a constant gradient gives a step of up to 6.57 times the
            learning rate, 12 steps after the recycling; no gradients give more than 7.27 times (b1=0.9, b2=0.999). "mean"
            sets second moments to the mean of the array's other entries, which keeps the steps in proportion to theirs. Both
            hold for Adagrad's sum of squares, though it starts at 0.1.

    Raises:
        TypeError: an argument is of the wrong type; or, when the returned transformation's `init` is called, `inner` keeps
            a state that this function does not know how to reset, as adafactor and lbfgs do.
        ValueError: an argument is out of range, `between` names a normalisation that mixes units (LayerNorm, RMSNorm,
            GroupNorm, InstanceNorm), a path leads to no layer, shapes do not fit, or `stats` lacks an edge; or an edge is
            ambiguous: a bias that is not found beside the weights, square weights of a layout that is not known, a consumer
            that reads more than the units, or an array that stands in two places.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxrelu.diagnostics import unit_stats
        >>> from jaxrelu.initializers import kaiming_normal
        >>> from jaxrelu.recycling import Edge, recycle
        >>> params = {"hidden": {"w": jnp.ones((2, 3)), "b": jnp.array([0.0, -9.0, 0.0])}, "out": {"w": jnp.ones((3, 1))}}
        >>> edges = [Edge("hidden", producer="hidden", consumers=["out"])]
        >>> tx = recycle(optax.adam(1e-3), edges, every=1, key=jax.random.key(0), init=kaiming_normal())
        >>> stats = {"hidden": unit_stats(jnp.ones((5, 2)) @ params["hidden"]["w"] + params["hidden"]["b"])}
        >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, stats=stats)
        >>> params = optax.apply_updates(params, updates)
        >>> params["hidden"]["b"], params["out"]["w"].ravel(), state.recycled
        (Array([0., 0., 0.], dtype=float32), Array([1., 0., 1.], dtype=float32), Array([1], dtype=int32))
    """
    _check(inner, edges, every, threshold, key, init, moments)
    edges = tuple(edges)
    transformation = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        inner_state = inner.init(params)
        parameters = Parameters(params)
        list(_moments(inner_state, parameters))  # refuses an unknown state before training
        layers, count = parameters.layers(edges), jnp.zeros((), jnp.int32)
        return RecycleState(count, count, jnp.zeros(len(edges), jnp.int32), _none(layers), _empty(layers), inner_state)

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, stats: Mapping[str, UnitStats] | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("recycle: update must have params, as recycled entries are set, not stepped; got None")
        parameters = Parameters(params)
        layers = parameters.layers(edges)
        updates, inner_state = transformation.update(updates, state.inner_state, params, **extra_args)
        seen = state.stats if stats is None else tuple(map(merge, state.stats, _select(stats, edges, layers)))
        updates = jax.tree.map(_widen, updates, params)

        def recycling() -> tuple[Any, RecycleState]:
            dormant = [replicated(edge_stats.dormancy) <= threshold for edge_stats in seen]  # False at NaN
            fresh = parameters.fresh(layers, dormant, jax.random.fold_in(key, state.recyclings), init)
            flat, treedef = jax.tree.flatten(updates)
            for index, (mask, value) in fresh.items():
                flat[index] = jnp.where(mask, (value - parameters.arrays[index]).astype(flat[index].dtype), flat[index])
            recycled = state.recycled + jnp.stack([mask.sum(dtype=jnp.int32) for mask in dormant])
            reset, step = _reset(inner_state, parameters, fresh, moments), jnp.zeros_like(state.step)
            return treedef.unflatten(flat), RecycleState(
                step, state.recyclings + 1, recycled, tuple(dormant), _empty(layers), reset
            )

        def stepping() -> tuple[Any, RecycleState]:
            return updates, RecycleState(state.step + 1, state.recyclings, state.recycled, _none(layers), seen, inner_state)

        return jax.lax.cond(state.step + 1 >= every, recycling, stepping)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def fresh_batch_stats(batch_stats: Any, edges: Sequence[Edge], recycled: Sequence[Array]) -> Any:
    """Returns the running statistics of BatchNorms with those of recycled units reset: mean 0 and variance 1.

    In evaluation a BatchNorm uses them in place of the batch's. Those of a dead unit would scale a fresh one's
    pre-activations to nonsense, until enough steps have passed.

    Args:
        batch_stats: the statistics, as the collection "batch_stats" of Flax linen, `nnx.state(model, nnx.BatchStat)`, or the
            state of a Haiku network. Their paths are those of the BatchNorms in `Edge.between`.
        edges: the edges that `recycle` was given.
        recycled: the units recycled, a boolean array for each edge: `RecycleState.fresh` after an update.

    Raises:
        ValueError: `recycled` does not fit the edges, or a BatchNorm has no statistics in `batch_stats`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxrelu.recycling import Edge, fresh_batch_stats
        >>> edges = [Edge("relu", "dense", ["out"], between=["norm"])]
        >>> batch_stats = {"norm": {"mean": jnp.array([3.0, -9.0]), "var": jnp.array([2.0, 0.1])}}
        >>> fresh_batch_stats(batch_stats, edges, [jnp.array([False, True])])["norm"]["var"]
        Array([2., 1.], dtype=float32)
    """
    check("fresh_batch_stats", edges)
    if len(recycled) != len(edges):
        raise ValueError(
            f"fresh_batch_stats: recycled must have one boolean array for each of the {len(edges)} edges, got "
            f"{len(recycled)}; pass the field fresh of RecycleState"
        )
    leaves, treedef = jax.tree.flatten(batch_stats)
    names = named(batch_stats)
    for edge, mask in zip(edges, recycled, strict=True):
        for path in edge.between:
            values = {f"{path}/{name}": 0.0 for name in _MEANS} | {f"{path}/{name}": 1.0 for name in _VARIANCES}
            found = {name: value for name, value in values.items() if name in names}
            if not found:
                raise ValueError(
                    f"fresh_batch_stats: batch_stats must have mean and var of {path!r}, got "
                    f"{', '.join(names) or 'nothing'}; pass the collection of the running statistics"
                )
            for name, value in found.items():
                place, leaf = names[name]
                if name.endswith("/hidden"):  # Haiku's average is this divided by 1 - decay^count, which is a number
                    average = names[f"{name.removesuffix('hidden')}average"][1]
                    value *= jnp.sum(leaf) / jnp.where(jnp.sum(average) == 0, 1, jnp.sum(average))
                if leaf.size != mask.size:
                    raise ValueError(
                        f"fresh_batch_stats: {name!r} must be of the {mask.size} units of {edge.producer!r}, got shape "
                        f"{leaf.shape}; pass the statistics of the network that the edges belong to"
                    )
                leaves[place] = jnp.where(sharded_as(mask.reshape(leaf.shape), leaf), jnp.asarray(value, leaf.dtype), leaf)
    return treedef.unflatten(leaves)


def _none(layers: Sequence[Layer]) -> tuple[Array, ...]:
    return tuple(jnp.zeros(layer.units, bool) for layer in layers)


def _widen(update: Array, parameter: Array) -> Array:
    """Returns an update in a dtype that holds minus the parameter exactly, so that adding that leaves 0."""
    with jax.numpy_dtype_promotion("standard"):
        return update.astype(jnp.promote_types(update.dtype, parameter.dtype))


def _moments(state: Any, parameters: Parameters) -> Iterator[tuple[str, int] | None]:
    """Yields, for each leaf of an optimizer's state, its field's name and its parameter's place; None if it has none."""
    for path, leaf in tree_flatten_with_path(state)[0]:
        if jnp.ndim(leaf) == 0 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            yield None  # a step count, a learning rate or a random key
            continue
        # a path in the state is the path of a field, followed by the path of a parameter
        starts = [start for start in range(1, len(path)) if path[start:] in parameters.index]
        owner: Any = path[starts[0] - 1] if starts else None
        name: str = owner.name if isinstance(owner, GetAttrKey) else keystr(path)
        index = parameters.index[path[starts[0] :]] if starts else -1
        known = name in (*_FIRST_MOMENTS, *_SECOND_MOMENTS, *_PARAMETERS)
        if known and leaf.shape == parameters.arrays[index].shape:
            yield name, index
        elif name.endswith(".ns_coeffs"):  # the coefficients of muon's polynomial
            yield None
        else:
            raise TypeError(
                f"recycle: inner must keep moments of the parameters' shapes in fields called "
                f"{', '.join(_FIRST_MOMENTS + _SECOND_MOMENTS)}, or copies of them in {_PARAMETERS[0]}; got "
                f"the field {name!r} at {keystr(path)}; use adam, for one"
            )


def _reset(state: Any, parameters: Parameters, fresh: Mapping[int, tuple[Array, Array]], moments: str) -> Any:
    """Returns the optimizer's state with the moments of the recycled entries reset."""
    leaves, treedef = jax.tree.flatten(state)
    for place, match in enumerate(_moments(state, parameters)):
        if match is None or match[1] not in fresh:
            continue
        leaf, field, (mask, value) = leaves[place], match[0], fresh[match[1]]
        if field in _PARAMETERS:
            new = value.astype(leaf.dtype)
        elif field in _SECOND_MOMENTS and moments == "mean":
            kept = jnp.sum(leaf, where=~mask, dtype=jnp.promote_types(leaf.dtype, jnp.float32))
            new = (kept / jnp.maximum(jnp.sum(~mask), 1).astype(kept.dtype)).astype(leaf.dtype)
        else:
            new = jnp.zeros((), leaf.dtype)
        leaves[place] = jnp.where(mask, new, leaf)
    return treedef.unflatten(leaves)


def _empty(layers: Sequence[Layer]) -> tuple[UnitStats, ...]:
    """Returns statistics that have seen no example; they are constants under jit."""
    with jax.ensure_compile_time_eval():
        return tuple(unit_stats(jnp.zeros((0, layer.units), jnp.float32)) for layer in layers)


def _select(stats: Mapping[str, UnitStats], edges: Sequence[Edge], layers: Sequence[Layer]) -> list[UnitStats]:
    for edge, layer in zip(edges, layers, strict=True):
        if edge.stats not in stats:
            raise ValueError(f"recycle: stats must have the key {edge.stats!r} of an edge; got {', '.join(stats)}")
        if (shape := stats[edge.stats].dormancy.shape) != (layer.units,):
            raise ValueError(
                f"recycle: stats[{edge.stats!r}] must be of the {layer.units} units of {edge.producer!r}; got shape {shape}"
            )

    def narrow(leaf: Array) -> Array:  # the state is in float32, also that of a float64 layer
        return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return [jax.tree.map(narrow, stats[edge.stats]) for edge in edges]


def _check(inner: Any, edges: Sequence[Edge], every: int, threshold: float, key: Array, init: Any, moments: str) -> None:
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"recycle: inner must be an Optax transformation, as optax.adam(1e-3), got {inner!r}")
    check("recycle", edges)
    if not checked.is_int(every):
        raise TypeError(f"recycle: every must be an int, got {every!r}")
    if every < 1:
        raise ValueError(f"recycle: every must be at least 1, got {every}")
    if not checked.is_int(threshold) and not isinstance(threshold, float):
        raise TypeError(f"recycle: threshold must be a Python number, got {threshold!r}")
    if not 0 <= threshold < math.inf:
        raise ValueError(f"recycle: threshold must be finite and at least 0, got {threshold}")
    typed = isinstance(key, Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)  # else a vector of uint32
    if not isinstance(key, Array) or not (key.ndim == 0 if typed else key.ndim == 1 and key.dtype == jnp.uint32):
        raise TypeError(f"recycle: key must be a key from jax.random, got {key!r}; pass jax.random.key(0)")
    if not callable(init):
        raise TypeError(f"recycle: init must be an initializer, as jaxrelu.initializers.kaiming_normal(), got {init!r}")
    if moments not in ("zero", "mean"):
        raise ValueError(f'recycle: moments must be "zero" or "mean", got {moments!r}')
