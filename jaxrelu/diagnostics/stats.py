"""What is known of each unit: counts, extremes and running means that can be merged in any order."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxrelu import _arguments as checked
from jaxrelu import functions

_Stats = TypeVar("_Stats")
_ROWS = 128  # rows summed at once: four counts of up to 255 share one uint32, and short sums stay accurate
_SAMPLES = 16  # rows whose mean is subtracted before the variance is taken


class _Count(NamedTuple):
    """An integer below 2^64 in two limbs, as JAX has no 64-bit integers by default."""

    low: Array
    high: Array

    def __add__(self, other: "_Count") -> "_Count":  # pyright: ignore[reportIncompatibleMethodOverride] - not a tuple's sum
        low = self.low + other.low
        return _Count(low, self.high + other.high + (low < self.low).astype(jnp.uint32))

    def is_zero(self) -> Array:
        return (self.low | self.high) == 0

    def floating(self, dtype: Any) -> Array:
        return self.high.astype(dtype) * 2.0**32 + self.low.astype(dtype)

    def exact(self) -> Any:
        number = (np.asarray(self.high).astype(np.int64) << 32) + np.asarray(self.low).astype(np.int64)
        return number if number.ndim else int(number)


class _Mean(NamedTuple):
    """A running mean as the unevaluated sum of two floats, so that many small steps add up."""

    high: Array
    low: Array

    def __sub__(self, other: "_Mean") -> Array:
        return (self.high - other.high) + (self.low - other.low)

    def step(self, by: Array) -> "_Mean":
        total = self.high + by
        rest = total - self.high
        low = self.low + ((self.high - (total - rest)) + (by - rest))
        high = total + low
        return _Mean(high, low - (high - total))


class _Totals(NamedTuple):
    seen: _Count
    fired: _Count
    nonfinite: _Count
    saturated: _Count
    flat: _Count


class _Means(NamedTuple):
    z: _Mean
    variance: _Mean
    output: _Mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnitStats:
    """Statistics of the units of one layer, over all examples and positions seen.

    A pytree of arrays. Arrays a unit have shape `(units,)`, with a leading axis for each scan around the layer. Before
    anything is seen, shares and means are NaN, and no unit is dead.

    Attributes:
        min, max: extremes of the pre-activation z.
        totals, means: counts and running means in the form in which they are merged, from which the rest is read.
        count: examples and positions seen, non-finite ones included; an int, or an array under scan.
        fired, nonfinite: how often z > 0, and how often z was NaN or infinite. These three are exact up to 2^63 and can be
            read outside jit only.
        dead: whether z was always finite and never above 0.
        firing_rate, sparsity: share of z > 0, and the rest.
        margin: max z, which is how far below the kink a dead unit lies.
        dormancy: E|h| of the unit over the mean of E|h| in the layer, h being the activation's output; 0 in a layer
            without output, NaN for a unit whose E|h| is not finite, which the mean leaves out.
        saturation: share of z >= 6.
        zero_gradient: share of examples at which the activation's derivative is 0; integers have none, which counts as 0.
        mean, variance: of z; the variance is the population's, NaN for a unit with non-finite z.

    References:
        Sokar et al. 2023, The dormant neuron phenomenon in deep reinforcement learning (arXiv:2302.12902).
    """

    min: Array
    max: Array
    totals: _Totals
    means: _Means

    @property
    def count(self) -> Any:
        return self.totals.seen.exact()

    @property
    def fired(self) -> np.ndarray:
        return self.totals.fired.exact()

    @property
    def nonfinite(self) -> np.ndarray:
        return self.totals.nonfinite.exact()

    @property
    def dead(self) -> Array:
        return self.totals.fired.is_zero() & self.totals.nonfinite.is_zero() & ~self.totals.seen.is_zero()[..., None]

    @property
    def firing_rate(self) -> Array:
        return self._share(self.totals.fired)

    @property
    def sparsity(self) -> Array:
        return 1 - self.firing_rate

    @property
    def margin(self) -> Array:
        return self.max

    @property
    def dormancy(self) -> Array:
        output = jnp.where(self.totals.seen.is_zero()[..., None], jnp.nan, self.means.output.high)
        finite = jnp.isfinite(output)
        number = finite.sum(-1, keepdims=True).astype(output.dtype)
        mean = jnp.where(finite, output, 0).sum(-1, keepdims=True) / number
        # no epsilon: it would make small activations look dormant
        return jnp.where(finite, jnp.where(mean > 0, output / mean, 0), jnp.nan)

    @property
    def saturation(self) -> Array:
        return self._share(self.totals.saturated)

    @property
    def zero_gradient(self) -> Array:
        return self._share(self.totals.flat)

    @property
    def mean(self) -> Array:
        # min + max is NaN or infinite as the mean is, which merging may have lost
        mean = jnp.where(self.totals.nonfinite.is_zero(), self.means.z.high, self.min + self.max)
        return jnp.where(self.totals.seen.is_zero()[..., None], jnp.nan, mean)

    @property
    def variance(self) -> Array:
        known = self.totals.nonfinite.is_zero() & ~self.totals.seen.is_zero()[..., None]
        return jnp.where(known, self.means.variance.high, jnp.nan)

    def _share(self, part: _Count) -> Array:
        dtype = self.min.dtype
        return part.floating(dtype) / self.totals.seen.floating(dtype)[..., None]


def unit_stats(z: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> UnitStats:
    """Returns the statistics of relu's pre-activations.

    Args:
        z: real numbers of any shape; a scalar is one unit.
        axis: the axis of the units; all others are examples and positions.
        where: which of them count: booleans in the shape of `z` without `axis`, or with size 1 there. What is hidden may be
            anything, NaN too.

    Returns:
        Statistics in float32, or in float64 if that is z's dtype.

    Raises:
        TypeError: `z` is not a real number or array, `axis` is no int, or `where` is not boolean.
        ValueError: `axis` or the shape of `where` does not fit.

    Examples:
        >>> import jax
        >>> from jaxrelu import diagnostics
        >>> stats = diagnostics.unit_stats(jax.numpy.array([[1.0, -2.0], [-3.0, -4.0]]))
        >>> stats.dead, stats.firing_rate, stats.margin
        (Array([False,  True], dtype=bool), Array([0.5, 0. ], dtype=float32), Array([ 1., -2.], dtype=float32))
    """
    z = jnp.asarray(checked.real("unit_stats", "z", z))
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"unit_stats: axis must be an int, got {axis!r}; pass the axis of the units")
    if not -max(z.ndim, 1) <= axis < max(z.ndim, 1):
        raise ValueError(f"unit_stats: axis {axis} is out of range for z of shape {z.shape}; pass the axis of the units")
    axis %= max(z.ndim, 1)
    if where is not None:
        where = jnp.asarray(where)
        if where.dtype != jnp.bool:
            raise TypeError(f"unit_stats: where must be boolean, got dtype {where.dtype}; compare it, as in where != 0")
        kept = z.shape[:axis] + z.shape[axis + 1 :]
        if where.shape not in (kept, z.shape[:axis] + (1,) * (z.ndim > 0) + z.shape[axis + 1 :]):
            raise ValueError(
                f"unit_stats: where must have shape {kept}, that of z {z.shape} without axis {axis}, got {where.shape}; "
                "units cannot be hidden one by one"
            )
        where = where.reshape(kept)
    return statistics(z, function=functions.relu, where=where, axes=(axis, axis) if z.ndim else None)


def merge(a: _Stats, b: _Stats) -> _Stats:
    """Returns the statistics of what `a` and `b` have seen together.

    Associative, up to rounding of means and variance; statistics that have seen nothing change nothing. The mean is Chan's,
    carried as two floats.

    Args:
        a: UnitStats, or a pytree of them as `observe` returns.
        b: the same of the same layers.

    Returns:
        The same pytree.

    Raises:
        TypeError: `a` or `b` is neither.
        ValueError: two layers differ in shape, or `a` and `b` in structure.

    References:
        Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance.
    """
    if not all(map(_is_stats, jax.tree.leaves((a, b), is_leaf=_is_stats))):
        raise TypeError(
            f"merge: a and b must be UnitStats or pytrees of them, got {type(a).__name__} and {type(b).__name__}; pass what "
            "unit_stats or observe returned"
        )
    return _merge(a, b)


@jax.jit
def _merge(a: Any, b: Any) -> Any:
    return jax.tree.map(_merged, a, b, is_leaf=_is_stats)


def _is_stats(x: object) -> bool:
    return isinstance(x, UnitStats)


def _merged(a: UnitStats, b: UnitStats) -> UnitStats:
    if a.min.shape != b.min.shape:
        raise ValueError(
            f"merge: a and b must have units of the same shape, got {a.min.shape} and {b.min.shape}; merge layer by layer"
        )
    dtype = a.min.dtype
    a_count, b_count = (x.totals.seen.floating(dtype)[..., None] for x in (a, b))
    total = jnp.maximum(a_count + b_count, 1)
    share, rest = b_count / total, a_count / total
    delta = b.means.z - a.means.z
    between = (jnp.zeros_like(delta), delta * delta * (share * rest), jnp.zeros_like(delta))

    def step(x: _Mean, y: _Mean, extra: Array) -> _Mean:
        moved = x.step((y - x) * share + extra)
        # stepping from or to nothing would cost an ulp, or make a NaN of an infinite mean
        return _Mean(
            *(jnp.where(a_count == 0, v, jnp.where(b_count == 0, u, m)) for u, v, m in zip(x, y, moved, strict=True))
        )

    return UnitStats(
        min=jnp.minimum(a.min, b.min),
        max=jnp.maximum(a.max, b.max),
        totals=_Totals(*(x + y for x, y in zip(a.totals, b.totals, strict=True))),
        means=_Means(*map(step, a.means, b.means, between)),
    )


def all_reduce(stats: Any, axis_name: Any) -> Any:
    """Returns the merged statistics of all devices along `axis_name`, the same on each; for use inside `jax.shard_map`.

    Args:
        stats: UnitStats, or a pytree of them as `observe` returns.
        axis_name: a mesh axis, or a tuple of them.

    Returns:
        The same pytree; `jax.shard_map` knows that it is replicated, so `out_specs=P()` passes its check.
    """
    size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def gather(leaf: Array) -> Array:
        # a psum, as the result of lax.all_gather does not count as replicated
        slot = (jnp.arange(size) == index).reshape(size, *(1,) * leaf.ndim)
        return lax.psum(jnp.where(slot, leaf[None], jnp.zeros_like(leaf)[None]), axis_name)

    def fold(stats: UnitStats) -> UnitStats:
        gathered, rest = jax.tree.map(gather, stats), size
        while rest > 1:
            half = rest // 2
            merged = merge(_part(gathered, slice(half)), _part(gathered, slice(half, 2 * half)))
            gathered = jax.tree.map(_append, merged, _part(gathered, slice(2 * half, rest)))
            rest -= half
        return _part(gathered, 0)

    return jax.tree.map(fold, stats, is_leaf=_is_stats)


def _part(stats: UnitStats, index: Any) -> UnitStats:
    return jax.tree.unflatten(jax.tree.structure(stats), [x[index] for x in jax.tree.leaves(stats)])


def _append(x: Array, y: Array) -> Array:
    return jnp.concatenate([x, y])


def nothing_seen(stats: UnitStats) -> UnitStats:
    """Returns the statistics that change none by merging, in the shapes and dtypes of these."""
    zeros: UnitStats = jax.tree.map(jnp.zeros_like, stats)  # inside shard_map these differ between devices as stats do
    return dataclasses.replace(zeros, min=zeros.min + jnp.inf, max=zeros.max - jnp.inf)


def _statistics(
    z: Array, *args: Array, function: Callable[..., Array], axes: tuple[int, int] | None, where: Array | None = None
) -> UnitStats:
    """Returns the statistics of an elementwise function at z.

    axes: the unit axis of z and of the function's output, or None for a single unit.
    """
    z = lax.stop_gradient(z)
    if jnp.issubdtype(z.dtype, jnp.integer):
        h, slope = function(z, *args), jnp.zeros_like(z)  # integers have no derivative
    else:

        def of_z(z: Array) -> Array:
            return function(z, *args)

        h, slope = jax.jvp(of_z, (z,), (jnp.ones_like(z),))
    reduce: Any = functools.partial(_reduced, axes=axes)
    mesh = jax.typeof(z).sharding.mesh
    if mesh.explicit_axes:
        # rows are cut into chunks, which explicit sharding allows only where each lies on one device
        reduce = jax.sharding.auto_axes(reduce, out_sharding=NamedSharding(mesh, PartitionSpec()))
    return reduce(z, h, slope, where)


# under a name by which `observe` knows that there is nothing to see inside
_statistics.__name__ = functions.TAG + "statistics"
statistics: Callable[..., UnitStats] = jax.jit(_statistics, static_argnames=("function", "axes"))


def _reduced(z: Array, h: Array, slope: Array, where: Array | None, *, axes: tuple[int, int] | None) -> UnitStats:
    dtype = jnp.float64 if z.dtype == jnp.float64 else jnp.float32
    z, h, slope = (_rows(x, axes and axes[i]) for i, x in ((0, z), (1, h), (1, slope)))
    z = jnp.tile(z, (len(h) // max(1, len(z)), 1))  # if a parameter alone was mapped
    z, h = z.astype(dtype), jnp.abs(h.astype(dtype))
    n, units = z.shape
    flags = (z > 0, z >= 6, ~jnp.isfinite(z), slope == 0)
    packed = sum((flag.astype(jnp.uint32) << 8 * i for i, flag in enumerate(flags)), jnp.zeros((), jnp.uint32))
    if where is None:
        count = _Count(jnp.uint32(n & 0xFFFFFFFF), jnp.uint32(n >> 32))
        low = high = z
        # multiples of the golden ratio, as equal steps may all fall on the same position of the examples
        rows = (np.arange(1, 1 + min(n, _SAMPLES)) * 0.6180339887 % 1 * n).astype(int)
        shift = _shift(z[rows], None)
        centred = z - shift
    else:
        shown = where.reshape(n, 1)
        count = _Count(shown.sum(dtype=jnp.uint32), jnp.uint32(0))
        low, high = jnp.where(shown, z, jnp.inf), jnp.where(shown, z, -jnp.inf)
        shift = _shift(z, shown)
        centred, h, packed = jnp.where(shown, z - shift, 0), jnp.where(shown, h, 0), jnp.where(shown, packed, 0)
    number = jnp.maximum(count.floating(dtype), 1)
    off = _fold(lax.reduce_sum, centred) / number
    variance = jnp.maximum(_fold(lax.reduce_sum, centred * centred) / number - off * off, 0)
    nothing = jnp.zeros((units,), dtype)
    chunks = _chunked(lax.reduce_sum, packed)
    counts = (lax.reduce_sum((chunks >> 8 * i) & 0xFF, (0,)) for i in range(4))
    fired, saturated, nonfinite, flat = (_Count(low, jnp.zeros_like(low)) for low in counts)
    return UnitStats(
        min=_fold(lax.reduce_min, low),
        max=_fold(lax.reduce_max, high),
        totals=_Totals(count, fired, nonfinite, saturated, flat),
        means=_Means(
            z=_Mean(shift[0], nothing).step(off),
            variance=_Mean(variance, nothing),
            output=_Mean(_fold(lax.reduce_sum, h) / number, nothing),
        ),
    )


def _rows(x: Array, axis: int | None) -> Array:
    """Returns x as a matrix with a column a unit."""
    if axis is None:
        return x.reshape(-1, 1)
    units = x.shape[axis]
    return jnp.moveaxis(x, axis, -1).reshape(math.prod(x.shape) // max(units, 1), units)


def _shift(z: Array, shown: Array | None) -> Array:
    """Returns about the mean of each column, and its very number if it is constant."""
    n = z.shape[0] if shown is None else shown.sum()
    base = jnp.max(z, 0, keepdims=True, where=shown, initial=-jnp.inf)
    base = jnp.where(jnp.isfinite(base), base, 0)
    return base + jnp.sum(z - base, 0, keepdims=True, where=shown) / jnp.maximum(n, 1).astype(z.dtype)


def _chunked(reduce: Callable[..., Array], x: Array) -> Array:
    """Returns each column reduced over every _ROWS rows."""
    n, units = x.shape
    full = n - n % _ROWS
    parts = [x[None, full:]] if full < n or n == 0 else []
    parts += [x[:full].reshape(full // _ROWS, _ROWS, units)] if full else []
    return jnp.concatenate([reduce(part, (1,)) for part in parts])


def _fold(reduce: Callable[..., Array], x: Array) -> Array:
    return reduce(_chunked(reduce, x), (0,))
