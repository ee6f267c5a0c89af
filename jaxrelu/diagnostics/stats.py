"""`UnitStats`: counts, extremes and means of each unit's input z and output h, which can be merged in any order."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.experimental import multihost_utils

__all__ = ["UnitStats", "all_reduce", "by_name", "exact", "floating", "merge", "nothing_seen", "on_host", "step"]

_Stats = TypeVar("_Stats")


def on_host(arrays: Any) -> Any:
    """Returns a pytree of arrays as NumPy's, in one transfer. If one lies on several processes, all must call this."""

    def whole(x: Any) -> Any:
        if not isinstance(x, Array) or isinstance(x, Tracer) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, arrays))


def exact(limbs: Any) -> Any:
    """Returns integers as NumPy's, given their low and high 32 bits as two uint32 along the last axis but one."""
    if isinstance(limbs, Tracer):
        raise TypeError(
            "UnitStats: count, fired and nonfinite are exact integers of NumPy's, which jit cannot hold; read them outside "
            "jit, or take firing_rate"
        )
    low, high = np.moveaxis(limbs if isinstance(limbs, np.ndarray) else on_host(limbs), -2, 0).astype(np.int64)
    return (high << 32) + low


def _sum(a: Array, b: Array) -> Array:
    """Returns the sum of integers that are two uint32 each, because JAX has no 64-bit integers by default."""
    low = a[..., 0, :] + b[..., 0, :]
    high = a[..., 1, :] + b[..., 1, :] + (low < a[..., 0, :]).astype(jnp.uint32)
    return jnp.stack([low, high], -2)


def _is_zero(limbs: Array) -> Array:
    return (limbs == 0).all(-2)


def floating(limbs: Array, dtype: Any) -> Array:
    """Returns integers, given as two uint32 each, in a float dtype."""
    return limbs[..., 1, :].astype(dtype) * 2.0**32 + limbs[..., 0, :].astype(dtype)


def step(mean: Array, by: Array) -> Array:
    """Returns running means moved by a step. A mean is the sum of two floats, so that many small steps do not get lost."""
    high, low = mean[..., 0, :], mean[..., 1, :]
    total = high + by
    rest = total - high
    low += (high - (total - rest)) + (by - rest)
    high = total + low
    return jnp.stack([high, low - (high - total)], -2)


class UnitStats(NamedTuple):
    """Statistics of the units of one layer, over all examples and positions seen.

    z is a unit's pre-activation, the input of its activation; h is the activation's output. The last axis of all arrays is
    that of the units; each scan around the layer adds an axis in front. Before any example is seen, shares and means are
    NaN, and no unit is dead. It is a pytree of four arrays, and can be kept wherever arrays can, as by pickle, Orbax, or
    `flax.serialization`: a named tuple, but one that equals no other object.

    Statistics can be read whatever their sharding. Where the units of a layer lie on several processes, all processes must
    read the exact integers, `summary` or `to_scalars` at the same point.

    Attributes:
        count: the number of examples and positions seen, also those with z not finite; an int, or an array under scan.
        fired, nonfinite: how often z > 0, and how often z was NaN or infinite. Like `count`, they are exact up to 2^63;
            inside jit they raise a TypeError.
        dead: whether z was always finite and never above 0.
        firing_rate, sparsity: the share of examples with z > 0, and the share of the others.
        min, max: the least and the greatest z.
        margin: the greatest z: for a dead unit, how far below 0 it stays.
        dormancy: the mean of |h|, divided by the layer's mean of that (Sokar et al. 2023, arXiv:2302.12902). It is 0 in a
            layer whose h are all 0, and NaN for a unit whose mean is not finite; the layer's mean leaves such units out.
        saturation: the share of z >= 6.
        zero_gradient: the share of examples at which the activation's derivative is 0; for integers 1.
        mean, variance: those of z; the variance divides by the count, and is NaN for a unit with a z that is not finite.
    """

    # an integer is two uint32, its low bits and its high bits; a mean is the sum of two floats
    seen: Array  # (2, 1): the number of examples and positions
    counts: Array  # (4, 2, units): how often z > 0, z was not finite, z >= 6, and the derivative was 0
    extremes: Array  # (2, units): the least z and the least -z
    means: Array  # (3, 2, units): of z, of its squared distance from the mean, and of |h|

    def __repr__(self) -> str:
        if not all(isinstance(x, (Array, np.ndarray)) for x in self):  # JAX puts other things into a pytree too
            return f"UnitStats({', '.join(map(repr, self))})"
        if not all(isinstance(x, Tracer) or getattr(x, "is_fully_addressable", True) for x in self):
            return "UnitStats(on several processes)"  # to read them, all would have to print
        units = "x".join(map(str, self.extremes.shape[:-2] + self.extremes.shape[-1:]))
        try:
            fired, count, dead = self.fired, self.count, int(np.asarray(self.dead).sum())
        except (TypeError, ValueError, RuntimeError):  # traced, of other ranks, deleted or on other processes
            return f"UnitStats({units} units, not readable here)"
        share = f"{fired.mean() / np.mean(count):.1%}" if fired.size and np.any(count) else "nan"
        return f"UnitStats({units} units, count {np.max(count, initial=0)}, {dead} dead, firing rate {share})"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)

    @property
    def count(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride], it is not the method of a tuple
        number = exact(self.seen)[..., 0]
        return number if number.ndim else int(number)

    @property
    def fired(self) -> np.ndarray:
        return exact(self.counts)[..., 0, :]

    @property
    def nonfinite(self) -> np.ndarray:
        return exact(self.counts)[..., 1, :]

    @property
    def dead(self) -> Array:
        return _is_zero(self.counts)[..., :2, :].all(-2) & ~_is_zero(self.seen)

    @property
    def firing_rate(self) -> Array:
        return self._share(0)

    @property
    def sparsity(self) -> Array:
        return 1 - self.firing_rate

    @property
    def min(self) -> Array:
        return self.extremes[..., 0, :]

    @property
    def max(self) -> Array:
        return -self.extremes[..., 1, :]

    @property
    def margin(self) -> Array:
        return self.max

    @property
    def dormancy(self) -> Array:
        output = jnp.where(_is_zero(self.seen), jnp.nan, self.means[..., 2, 0, :])
        finite = jnp.isfinite(output)
        number = finite.sum(-1, keepdims=True).astype(output.dtype)
        mean = jnp.where(finite, output, 0).sum(-1, keepdims=True) / number
        # no epsilon is added to the mean: it would make a layer of small outputs look dormant
        return jnp.where(finite, jnp.where(mean > 0, output / mean, 0), jnp.nan)

    @property
    def saturation(self) -> Array:
        return self._share(2)

    @property
    def zero_gradient(self) -> Array:
        return self._share(3)

    @property
    def mean(self) -> Array:
        # if z was not finite, min + max is NaN or infinite just as the mean is; merging may have lost that in the means
        mean = jnp.where(self._finite(), self.means[..., 0, 0, :], self.min + self.max)
        return jnp.where(_is_zero(self.seen), jnp.nan, mean)

    @property
    def variance(self) -> Array:
        return jnp.where(self._finite() & ~_is_zero(self.seen), self.means[..., 1, 0, :], jnp.nan)

    def _finite(self) -> Array:
        return _is_zero(self.counts[..., 1, :, :])

    def _share(self, place: int) -> Array:
        dtype = self.extremes.dtype
        return floating(self.counts[..., place, :, :], dtype) / floating(self.seen, dtype)


def merge(a: _Stats, b: _Stats) -> _Stats:
    """Returns the statistics of all the examples that `a` or `b` has seen.

    The order of merging matters only for the rounding of means and variances. Statistics that have seen nothing change
    nothing. See Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance.

    Args:
        a: UnitStats, or a pytree of them as `observe` returns.
        b: statistics of the same layers, in the same structure, which the result has too.

    Raises:
        TypeError: `a` or `b` is something else.
        ValueError: two layers differ in shape, or `a` and `b` in structure.
    """
    if not all(map(_is_stats, jax.tree.leaves((a, b), is_leaf=_is_stats))):
        raise TypeError(
            f"merge: a and b must be UnitStats or pytrees of them, got {type(a).__name__} and {type(b).__name__}; pass what "
            "unit_stats or observe returned"
        )
    return _merge(a, b)


def _is_stats(x: object) -> bool:
    return isinstance(x, UnitStats)


def by_name(function: str, stats: Any) -> Mapping[str, UnitStats]:
    """Returns stats if they are UnitStats by name; `function` is that which the user called."""
    if isinstance(stats, Mapping) and all(map(_is_stats, stats.values())):
        return stats
    raise TypeError(
        f"{function}: stats must be UnitStats by name, as observe returns them, got {type(stats).__name__}; pass a single "
        'one as {"name": stats}'
    )


def _merged(a: UnitStats, b: UnitStats) -> UnitStats:
    if a.extremes.shape != b.extremes.shape:
        raise ValueError(
            f"merge: a and b must have units of the same shape, got {a.min.shape} and {b.min.shape}; merge layer by layer"
        )
    dtype = a.extremes.dtype
    a_count, b_count = (floating(x.seen, dtype)[..., None, :] for x in (a, b))
    total = jnp.maximum(a_count + b_count, 1)
    share, rest = b_count / total, a_count / total
    delta = (b.means[..., 0, :] - a.means[..., 0, :]) + (b.means[..., 1, :] - a.means[..., 1, :])
    # the variance of z, in row 1, grows by the squared distance between the two means of z, in row 0
    is_variance = np.array([[False], [True], [False]])
    between = jnp.where(is_variance, delta[..., :1, :] ** 2 * (share * rest), 0)
    moved = step(a.means, delta * share + between)
    a_empty, b_empty = a_count[..., None, :] == 0, b_count[..., None, :] == 0
    return UnitStats(
        seen=_sum(a.seen, b.seen),
        counts=_sum(a.counts, b.counts),
        extremes=jnp.minimum(a.extremes, b.extremes),
        # merging with nothing must not change the last bit, nor make NaN of an infinite mean
        means=jnp.where(a_empty, b.means, jnp.where(b_empty, a.means, moved)),
    )


@jax.jit
def _merge(a: Any, b: Any) -> Any:
    return jax.tree.map(_merged, a, b, is_leaf=_is_stats)


def all_reduce(stats: Any, axis_name: Any) -> Any:
    """Returns the merged statistics of all devices along `axis_name`, inside `jax.shard_map`.

    They are the same on each device; `jax.shard_map` knows that, and accepts `out_specs=P()`.

    Args:
        stats: UnitStats, or a pytree of them as `observe` returns.
        axis_name: the name of a mesh axis, or a tuple of names.

    Raises:
        TypeError: `stats` is something else.
        NameError: it is called where no such axis is.
    """
    if not all(map(_is_stats, jax.tree.leaves(stats, is_leaf=_is_stats))):
        raise TypeError(
            f"all_reduce: stats must be UnitStats or a pytree of them, got {type(stats).__name__}; pass what unit_stats or "
            "observe returned"
        )
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def gather(leaf: Array) -> Array:
        # a gather by psum: shard_map does not know that the result of lax.all_gather is the same on all devices
        slot = (jnp.arange(size) == index).reshape(size, *(1,) * leaf.ndim)
        return lax.psum(jnp.where(slot, leaf[None], jnp.zeros_like(leaf)[None]), axis_name)

    def fold(stats: UnitStats) -> UnitStats:
        def add(total: UnitStats, one: UnitStats) -> tuple[UnitStats, None]:
            return _merged(total, one), None

        leaves, tree = jax.tree.flatten(jax.tree.map(gather, stats))
        first, rest = tree.unflatten([x[0] for x in leaves]), tree.unflatten([x[1:] for x in leaves])
        return lax.scan(add, first, rest)[0]

    return jax.tree.map(fold, stats, is_leaf=_is_stats)


def nothing_seen(stats: UnitStats) -> UnitStats:
    """Returns statistics that have seen nothing, in the shapes and dtypes of these."""
    zeros: UnitStats = jax.tree.map(jnp.zeros_like, stats)  # for shard_map they vary over the same mesh axes as stats
    return zeros._replace(extremes=zeros.extremes + jnp.inf)
