"""Dead-unit recycling as an Optax transformation: recycle, Edge."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.nn.initializers import Initializer
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from jaxrelu.diagnostics import UnitStats, merge, unit_stats

__all__ = ["Edge", "RecycleState", "recycle"]

# what Optax's states call an array of a parameter's shape
_FIRST_MOMENTS = ("mu", "trace", "ema", "acc_grads")
_SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares")
_PARAMETERS = ("z",)  # schedule_free's
# a parameter is called as in Flax, as in Haiku, or by its place in a pair
_WEIGHTS = ("kernel", "w", "W", "0")
_BIASES = ("bias", "b", "1")
_MIXING = ("layernorm", "rmsnorm", "groupnorm", "instancenorm")


class Edge(NamedTuple):
    """A layer of units: the key of its statistics, the layer that makes it and all layers that read it.

    A path joins by "/" the keys and attributes that lead from the parameters to a layer, without the leading "params" of
    Flax linen, as in "encoder/layer_0" or "layers/0". It ends at what holds the layer's `kernel` and `bias` (Flax), `w` and
    `b` (Haiku), or both as a pair, or at the weights themselves. Weights have axes (..., inputs, units); Equinox's, with the
    units first, are not found.

    Attributes:
        stats: key of the units' statistics in the `stats` of an update.
        producer: path of the layer whose outputs are the units. A bias is optional; a PReLU's slope stays as it is.
        consumers: paths of all layers that read the units and nothing else: no concatenation, no sum with other units. A
            dense layer may read the flattened outputs of a convolution, channels last.
        between: paths of the BatchNorms between the producer and the activation.
    """

    stats: str
    producer: str
    consumers: Sequence[str]
    between: Sequence[str] = ()


class RecycleState(NamedTuple):
    """The state of `recycle`.

    Attributes:
        step: updates since the last recycling.
        recyclings: recyclings so far.
        recycled: units recycled so far, one number per edge.
        stats: the statistics merged since the last recycling, one entry per edge.
        inner_state: the state of the wrapped transformation.
    """

    step: Array
    recyclings: Array
    recycled: Array
    stats: tuple[UnitStats, ...]
    inner_state: Any


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
    """Returns `inner` with a cure of dying units: every `every` updates, dormant units start afresh.

    A unit whose dormancy score, over the statistics merged since the last recycling, is at most `threshold` gets incoming
    weights from `init`, bias 0 and outgoing weights 0, and a BatchNorm between has its scale 1 and bias 0 there; the
    optimizer's moments of all these entries are reset. A unit with no statistics, or a NaN score, is left alone. With
    `threshold` 0 the network computes, on the data that the statistics saw, exactly what it computes without recycling, as
    the outputs of a ReLU that is dead there are 0 before and unread after. A higher threshold disturbs it a little. An entry
    that is incoming of one recycled unit and outgoing of another gets its fresh value, so that a network whose layers are
    all dead is healed too.

    `update(grads, state, params, *, stats=...)` takes a mapping with the `UnitStats` of each edge, from
    `diagnostics.observe` for one, reduced over devices, or None for a step that was not observed. It returns updates: the
    recycled entries are set by `optax.apply_updates`, outgoing weights and biases to exactly 0, and no transformation may
    follow that changes them. The rest is `inner`'s. It works under `jax.jit` and `jax.lax.scan`; the steps between cost the
    merging of statistics alone.

    Args:
        inner: a transformation that keeps its moments as sgd, adam, adagrad, rmsprop, lion and their relatives do, also
            chained, scheduled, masked, or within `inject_hyperparams`, `MultiSteps` or `schedule_free`, whose copy of the
            parameters follows.
        edges: the layers of units; a layer is the producer of one edge and a consumer of one edge at most.
        every: updates from one recycling to the next.
        threshold: the dormancy score up to which a unit is recycled.
        key: a key from `jax.random`; each edge and each recycling draws from one of its own.
        init: initializer of the incoming weights, as `jaxrelu.initializers.kaiming_normal()`.
        moments: "zero" sets the moments to 0. Adam's count stays, so no bias correction makes up for the small second
            moment: once the count is in the thousands, the step is up to 6.57 times the learning rate 12 steps after the
            recycling if the gradient is constant, and at most 7.27 times for any gradients (b1=0.9, b2=0.999). "mean" sets
            second moments to the mean of the array's other entries, which keeps the steps in proportion to theirs. Adagrad's
            sum of squares starts at 0.1, but starts afresh at 0 or the mean.

    Returns:
        An Optax transformation whose state is a `RecycleState`.

    Raises:
        TypeError: an argument is of the wrong type, or `inner` keeps a state that is not known to allow a reset, as
            adafactor and lbfgs do; raised by the transformation's `init`.
        ValueError: an argument is out of range, `between` names a normalisation that mixes units (LayerNorm, RMSNorm,
            GroupNorm, InstanceNorm), a path leads to no layer, shapes do not fit, or `stats` lacks an edge.

    References:
        Sokar et al. 2023, The dormant neuron phenomenon in deep reinforcement learning (arXiv:2302.12902).

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxrelu.diagnostics import unit_stats
        >>> from jaxrelu.initializers import kaiming_normal
        >>> from jaxrelu.recycling import Edge, recycle
        >>> params = {"hidden": {"w": jnp.ones((2, 3)), "b": jnp.array([0.0, -9.0, 0.0])}, "out": {"w": jnp.ones((3, 1))}}
        >>> edges = [Edge("hidden", producer="hidden", consumers=["out"])]
        >>> tx = recycle(optax.adam(1e-3), edges, every=1, key=jax.random.key(0), init=kaiming_normal())
        >>> stats = {"hidden": unit_stats(jnp.ones((5, 2)) @ params["hidden"]["w"] + params["hidden"]["b"])}
        >>> grads = jax.tree.map(jnp.zeros_like, params)
        >>> updates, state = tx.update(grads, tx.init(params), params, stats=stats)
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
        for _ in _moments(inner_state, parameters):
            pass  # refuses an unknown state before training
        count = jnp.zeros((), jnp.int32)
        stats = _empty([parameters.layer(edge) for edge in edges])
        return RecycleState(count, count, jnp.zeros(len(edges), jnp.int32), stats, inner_state)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        stats: Mapping[str, UnitStats] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("recycle: update must have params, as recycled entries are set, not stepped; got None")
        parameters = _Parameters(params)
        layers = [parameters.layer(edge) for edge in edges]
        updates, inner_state = transformation.update(updates, state.inner_state, params, **extra_args)
        seen = state.stats
        if stats is not None:
            seen = tuple(map(merge, seen, _select(stats, edges, layers)))
        updates = jax.tree.map(_widen, updates, params)

        def recycling() -> tuple[Any, RecycleState]:
            dormant = [edge_stats.dormancy <= threshold for edge_stats in seen]  # never at NaN
            fresh = parameters.fresh(layers, dormant, jax.random.fold_in(key, state.recyclings), init)
            flat, treedef = jax.tree.flatten(updates)
            for index, (mask, value) in fresh.items():
                flat[index] = jnp.where(mask, (value - parameters.arrays[index]).astype(flat[index].dtype), flat[index])
            recycled = state.recycled + jnp.stack([mask.sum(dtype=jnp.int32) for mask in dormant])
            reset = _reset(inner_state, parameters, fresh, moments)
            return treedef.unflatten(flat), RecycleState(
                jnp.zeros_like(state.step), state.recyclings + 1, recycled, _empty(layers), reset
            )

        def stepping() -> tuple[Any, RecycleState]:
            return updates, RecycleState(state.step + 1, state.recyclings, state.recycled, seen, inner_state)

        return jax.lax.cond(state.step + 1 >= every, recycling, stepping)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Layer(NamedTuple):
    """The number of units of an edge, and the places of its arrays among the parameters."""

    units: int
    weights: int
    zeros: list[int]  # biases
    ones: list[int]  # scales
    outgoing: list[int]


class _Parameters:
    """Parameters as a flat list, found by path."""

    def __init__(self, params: Any) -> None:
        leaves, _ = tree_flatten_with_path(params)
        self.arrays: list[Array] = [leaf for _, leaf in leaves]
        self.index: dict[tuple[Any, ...], int] = {path: index for index, (path, _) in enumerate(leaves)}
        # a leaf of Flax may be a box around the array, which adds "value" to its path
        names = [keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves]
        self.names = {name.removeprefix("params/"): index for index, name in enumerate(names)}

    def layer(self, edge: Edge) -> _Layer:
        """Returns where the arrays of an edge are; raises ValueError if one is missing or has another shape."""
        weights = self._weights(edge, edge.producer)
        shape = self.arrays[weights].shape
        units = shape[-1]
        bias = self._find(edge.producer, _BIASES)
        zeros = [] if bias is None else [bias]
        ones: list[int] = []
        for path in edge.between:
            scale, bias = self._find(path, ("scale",)), self._find(path, ("bias", "offset"))
            if scale is None and bias is None:
                raise ValueError(f"recycle: between must name a BatchNorm with a scale or a bias, got {path!r}")
            ones += [] if scale is None else [scale]
            zeros += [] if bias is None else [bias]
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
        """Returns, for each array that recycling touches, the mask of its recycled entries and their values."""
        fresh: dict[int, tuple[Array, Array]] = {}
        for layer, mask in zip(layers, dormant, strict=True):
            for index in layer.outgoing:
                array = self.arrays[index]
                rows = jnp.tile(mask, array.shape[-2] // layer.units)[:, None]  # channels last: positions are outermost
                fresh[index] = jnp.broadcast_to(rows, array.shape), jnp.zeros_like(array)
            fresh |= {index: (mask, jnp.zeros_like(self.arrays[index])) for index in layer.zeros}
            fresh |= {index: (mask, jnp.ones_like(self.arrays[index])) for index in layer.ones}
        for layer, mask, own in zip(layers, dormant, jax.random.split(key, len(layers)), strict=True):
            array = self.arrays[layer.weights]
            columns, drawn = jnp.broadcast_to(mask, array.shape), init(own, array.shape, array.dtype)
            before, value = fresh.get(layer.weights, (jnp.zeros_like(columns), drawn))
            # an entry that is outgoing too gets the fresh weight, or a layer behind a dead one would not revive
            fresh[layer.weights] = before | columns, jnp.where(columns, drawn, value)
        return fresh

    def _find(self, path: str, names: Sequence[str]) -> int | None:
        return next((self.names[f"{path}/{name}"] for name in names if f"{path}/{name}" in self.names), None)

    def _weights(self, edge: Edge, path: str) -> int:
        index = self.names.get(path, self._find(path, _WEIGHTS))
        if index is None or self.arrays[index].ndim < 2:
            raise ValueError(
                f"recycle: the edge of {edge.stats!r} must name layers with weights (..., inputs, units) called "
                f"{', '.join(_WEIGHTS[:3])}; found none at {path!r} among {', '.join(self.names)}"
            )
        return index


def _widen(update: Array, parameter: Array) -> Array:
    """Returns an update that holds minus the parameter exactly, so that adding it leaves 0."""
    with jax.numpy_dtype_promotion("standard"):
        return update.astype(jnp.promote_types(update.dtype, parameter.dtype))


def _moments(state: Any, parameters: _Parameters) -> Iterator[tuple[str, int] | None]:
    """Yields, for each leaf, the field that it is in and the place of its parameter; None for what belongs to no entry.

    Raises TypeError for a field that is not known to allow a reset.
    """
    for path, leaf in tree_flatten_with_path(state)[0]:
        if jnp.ndim(leaf) == 0 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            yield None  # a count, a learning rate, a key
            continue
        # the path in the state is that of a field, then that of the parameter
        starts = [start for start in range(1, len(path)) if path[start:] in parameters.index]
        owner: Any = path[starts[0] - 1] if starts else None
        name: str = owner.name if isinstance(owner, GetAttrKey) else keystr(path)
        index = parameters.index[path[starts[0] :]] if starts else -1
        known = name in (*_FIRST_MOMENTS, *_SECOND_MOMENTS, *_PARAMETERS)
        if known and leaf.shape == parameters.arrays[index].shape:
            yield name, index
        elif name.endswith(".ns_coeffs"):  # the polynomial of muon
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
        field, (mask, value) = match[0], fresh[match[1]]
        leaf = leaves[place]
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
    """Returns statistics that have seen nothing, as constants."""
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
    return [jax.tree.map(_narrow, stats[edge.stats]) for edge in edges]


def _narrow(leaf: Array) -> Array:
    """Returns a part of statistics in the dtype of the state: those of a float64 layer are kept in float32."""
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _check(
    inner: Any, edges: Sequence[Edge], every: int, threshold: float, key: Array, init: Initializer, moments: str
) -> None:
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"recycle: inner must be an Optax transformation, as optax.adam(1e-3), got {inner!r}")
    several = isinstance(edges, (list, tuple)) and not isinstance(edges, Edge)  # all() would exhaust a generator
    if not several or not edges or not all(isinstance(edge, Edge) for edge in edges):
        raise TypeError(f"recycle: edges must be a list of one recycling.Edge or more, got {edges!r}")
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"recycle: every must be an int, got {every!r}")
    if every < 1:
        raise ValueError(f"recycle: every must be at least 1, got {every}")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"recycle: threshold must be a Python number, got {threshold!r}")
    if not 0 <= threshold < math.inf:
        raise ValueError(f"recycle: threshold must be finite and at least 0, got {threshold}")
    if not _is_key(key):
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
    for name, paths in (
        ("producer", [edge.producer for edge in edges]),
        ("consumer", [path for edge in edges for path in edge.consumers]),
    ):
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"recycle: a layer must be the {name} of one edge, got {twice[0]!r} twice")


def _is_key(x: object) -> bool:
    if not isinstance(x, Array):
        return False
    return x.ndim == 0 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.ndim == 1 and x.dtype == jnp.uint32
