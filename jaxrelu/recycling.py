"""A cure for dead units, as an Optax transformation: `recycle` gives them fresh weights while the network trains."""

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

__all__ = ["Edge", "RecycleState", "recycle"]

# the names of those fields in Optax's states that hold an array for each parameter, in its shape
_FIRST_MOMENTS = ("mu", "trace", "ema", "acc_grads")
_SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares")
_PARAMETERS = ("z",)  # the copy of the parameters that schedule_free keeps
# the names of weights and biases in Flax, then in Haiku, then their places in a pair
_WEIGHTS = ("kernel", "w", "W", "0")
_BIASES = ("bias", "b", "1")
# normalisations that mix units, so that recycling one unit would change the others
_MIXING = ("layernorm", "rmsnorm", "groupnorm", "instancenorm")


class Edge(NamedTuple):
    """The units of one layer: the name of their statistics, the layer that produces them, and all layers that read them.

    A layer is named by its path: the keys and attributes that lead to it from the parameters, joined by "/", as in
    "encoder/layer_0" or "layers/0". The leading "params" of Flax linen is left out. The path ends at what holds the layer's
    weights and bias (`kernel` and `bias` in Flax, `w` and `b` in Haiku, or a pair of both), or at the weights themselves.
    The axes of weights are (..., inputs, units); weights with the units first, as in Equinox, are not supported.

    Attributes:
        stats: the name of the units' statistics in the `stats` of an update.
        producer: the path of the layer whose outputs are the units. Its bias is optional. A PReLU's slope is never changed.
        consumers: the paths of all layers that read the units. They must read these units alone, not a concatenation or a
            sum with others. A dense layer may read the flattened outputs of a convolution with channels last.
        between: the paths of the BatchNorms between the producer and the activation.
    """

    stats: str
    producer: str
    consumers: Sequence[str]
    between: Sequence[str] = ()


class RecycleState(NamedTuple):
    """The state of `recycle`; `recycled` holds the number of units recycled so far, one number per edge."""

    step: Array  # updates since the last recycling
    recyclings: Array  # recyclings so far
    recycled: Array
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
    change them. All other updates are those of `inner`. It works under `jax.jit` and `jax.lax.scan`; a step without
    recycling costs only the merging of statistics. The state is a `RecycleState`.

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
            GroupNorm, InstanceNorm), a path leads to no layer, shapes do not fit, or `stats` lacks an edge.

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
        parameters = _Parameters(params)
        list(_moments(inner_state, parameters))  # refuses an unknown state before training
        count, stats = jnp.zeros((), jnp.int32), _empty([parameters.layer(edge) for edge in edges])
        return RecycleState(count, count, jnp.zeros(len(edges), jnp.int32), stats, inner_state)

    def update_fn(
        updates: Any, state: Any, params: Any = None, *, stats: Mapping[str, UnitStats] | None = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("recycle: update must have params, as recycled entries are set, not stepped; got None")
        parameters = _Parameters(params)
        layers = [parameters.layer(edge) for edge in edges]
        updates, inner_state = transformation.update(updates, state.inner_state, params, **extra_args)
        seen = state.stats if stats is None else tuple(map(merge, state.stats, _select(stats, edges, layers)))
        updates = jax.tree.map(_widen, updates, params)

        def recycling() -> tuple[Any, RecycleState]:
            dormant = [edge_stats.dormancy <= threshold for edge_stats in seen]  # False at NaN
            fresh = parameters.fresh(layers, dormant, jax.random.fold_in(key, state.recyclings), init)
            flat, treedef = jax.tree.flatten(updates)
            for index, (mask, value) in fresh.items():
                flat[index] = jnp.where(mask, (value - parameters.arrays[index]).astype(flat[index].dtype), flat[index])
            recycled = state.recycled + jnp.stack([mask.sum(dtype=jnp.int32) for mask in dormant])
            reset, step = _reset(inner_state, parameters, fresh, moments), jnp.zeros_like(state.step)
            return treedef.unflatten(flat), RecycleState(step, state.recyclings + 1, recycled, _empty(layers), reset)

        def stepping() -> tuple[Any, RecycleState]:
            return updates, RecycleState(state.step + 1, state.recyclings, state.recycled, seen, inner_state)

        return jax.lax.cond(state.step + 1 >= every, recycling, stepping)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Layer(NamedTuple):
    """The number of units of an edge, and the places of its arrays in the list of parameters."""

    units: int
    weights: int
    zeros: list[int]  # the biases
    ones: list[int]  # the scales
    outgoing: list[int]


class _Parameters:
    """Parameters as a flat list, found by path."""

    def __init__(self, params: Any) -> None:
        leaves, _ = tree_flatten_with_path(params)
        self.arrays: list[Array] = [leaf for _, leaf in leaves]
        self.index: dict[tuple[Any, ...], int] = {path: index for index, (path, _) in enumerate(leaves)}
        # Flax may keep an array in a box, which adds "value" to the path
        names = [keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves]
        self.names = {name.removeprefix("params/"): index for index, name in enumerate(names)}

    def layer(self, edge: Edge) -> _Layer:
        """Returns where the arrays of an edge are; raises ValueError if one is missing or has another shape."""
        weights = self._weights(edge, edge.producer)
        units = self.arrays[weights].shape[-1]
        zeros, ones = self._find(edge.producer, _BIASES), list[int]()
        for path in edge.between:
            scale, bias = self._find(path, ("scale",)), self._find(path, ("bias", "offset"))
            if not scale + bias:
                raise ValueError(f"recycle: between must name a BatchNorm with a scale or a bias, got {path!r}")
            zeros, ones = zeros + bias, ones + scale
        for index in zeros + ones:
            if self.arrays[index].shape != (units,):
                raise ValueError(
                    f"recycle: biases and scales of the {units} units of {edge.producer!r} must have shape ({units},), "
                    f"got {self.arrays[index].shape}"
                )
        outgoing = [self._weights(edge, path) for path in edge.consumers]
        for path, index in zip(edge.consumers, outgoing, strict=True):
            read = self.arrays[index].shape
            if read[-2] != units and (read[-2] % units or len(read) != 2):
                raise ValueError(
                    f"recycle: the consumer {path!r} must read the {units} units of {edge.producer!r}, or a dense layer a "
                    f"multiple of them, flattened; got weights of shape {read}, which read {read[-2]}"
                )
        return _Layer(units, weights, zeros, ones, outgoing)

    def fresh(
        self, layers: Sequence[_Layer], dormant: Sequence[Array], key: Array, init: Initializer
    ) -> dict[int, tuple[Array, Array]]:
        """Returns, by the place of each array that recycling changes, a mask of the recycled entries and their values."""
        fresh: dict[int, tuple[Array, Array]] = {}
        for layer, mask in zip(layers, dormant, strict=True):
            for index in layer.outgoing:
                array = self.arrays[index]
                rows = jnp.tile(mask, array.shape[-2] // layer.units)[:, None]  # flattened with channels last
                fresh[index] = jnp.broadcast_to(rows, array.shape), jnp.zeros_like(array)
            fresh |= {index: (mask, jnp.zeros_like(self.arrays[index])) for index in layer.zeros}
            fresh |= {index: (mask, jnp.ones_like(self.arrays[index])) for index in layer.ones}
        for layer, mask, own in zip(layers, dormant, jax.random.split(key, len(layers)), strict=True):
            array = self.arrays[layer.weights]
            columns, drawn = jnp.broadcast_to(mask, array.shape), init(own, array.shape, array.dtype)
            before, value = fresh.get(layer.weights, (jnp.zeros_like(columns), drawn))
            # a weight that is outgoing too is drawn, not 0: a layer behind a dead one would otherwise stay dead
            fresh[layer.weights] = before | columns, jnp.where(columns, drawn, value)
        return fresh

    def _find(self, path: str, names: Sequence[str]) -> list[int]:
        """Returns the place of the first array of these names that the layer has, in a list; an empty one if it has none."""
        return [self.names[f"{path}/{name}"] for name in names if f"{path}/{name}" in self.names][:1]

    def _weights(self, edge: Edge, path: str) -> int:
        found = [self.names[path]] if path in self.names else self._find(path, _WEIGHTS)
        if not found or self.arrays[found[0]].ndim < 2:
            raise ValueError(
                f"recycle: the edge of {edge.stats!r} must name layers with weights (..., inputs, units) called "
                f"{', '.join(_WEIGHTS[:3])}; found none at {path!r} among {', '.join(self.names)}"
            )
        return found[0]


def _widen(update: Array, parameter: Array) -> Array:
    """Returns an update in a dtype that holds minus the parameter exactly, so that adding that leaves 0."""
    with jax.numpy_dtype_promotion("standard"):
        return update.astype(jnp.promote_types(update.dtype, parameter.dtype))


def _moments(state: Any, parameters: _Parameters) -> Iterator[tuple[str, int] | None]:
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


def _reset(state: Any, parameters: _Parameters, fresh: Mapping[int, tuple[Array, Array]], moments: str) -> Any:
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


def _empty(layers: Sequence[_Layer]) -> tuple[UnitStats, ...]:
    """Returns statistics that have seen no example; they are constants under jit."""
    with jax.ensure_compile_time_eval():
        return tuple(unit_stats(jnp.zeros((0, layer.units), jnp.float32)) for layer in layers)


def _select(stats: Mapping[str, UnitStats], edges: Sequence[Edge], layers: Sequence[_Layer]) -> list[UnitStats]:
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
    several = isinstance(edges, (list, tuple)) and not isinstance(edges, Edge)  # no generator: all() would use it up
    if not several or not edges or not all(isinstance(edge, Edge) for edge in edges):
        raise TypeError(f"recycle: edges must be a list of one recycling.Edge or more, got {edges!r}")
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
    for edge in edges:
        for name, paths in (("consumers", edge.consumers), ("between", edge.between)):
            if not isinstance(paths, (list, tuple)):
                raise TypeError(f"recycle: {name} must be a list of paths, got {paths!r}; put a single one in brackets")
        if not edge.consumers:
            raise ValueError(f"recycle: consumers must name the layers that read {edge.producer!r}, got none")
        for path in edge.between:
            if any(name in path.lower().replace("_", "") for name in _MIXING):
                raise ValueError(
                    f"recycle: between must name BatchNorms, got {path!r}: it mixes units, so that the others would change "
                    f"with a recycled one; put the normalisation before {edge.producer!r}, or leave this edge out"
                )
    producers, consumers = [edge.producer for edge in edges], [path for edge in edges for path in edge.consumers]
    for name, paths in (("producer", producers), ("consumer", consumers)):
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"recycle: a layer must be the {name} of one edge, got {twice[0]!r} twice")
