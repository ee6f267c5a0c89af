"""`unit_stats`: the statistics of a layer's units, computed from its pre-activations in one pass."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxrelu import _checked as checked
from jaxrelu import _lowering, functions
from jaxrelu.diagnostics.stats import UnitStats, floating, step

__all__ = ["STATISTICS", "statistics", "unit_stats"]

_ROWS = 128  # rows summed at once: up to 255, as four counts share one uint32, and few, as short sums are accurate
_SAMPLES = 16  # rows of which the mean is subtracted from all before the variance is computed
STATISTICS = "statistics"  # the name of a call by which `observe` knows that an activation inside is not the model's


def unit_stats(z: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> UnitStats:
    """Returns the statistics of a relu layer's units from their pre-activations, in float32, or float64 if `z` is that.

    Args:
        z: the pre-activations, real numbers of any shape; a scalar is one unit.
        axis: the axis of the units; all other axes are examples and positions.
        where: True for the examples and positions that count, in the shape of `z` without `axis`, or with size 1 there. The
            others may hold anything, NaN too.

    Raises:
        TypeError: `z` is not a real number or array, `axis` is not an int, or `where` is not boolean.
        ValueError: `axis` or the shape of `where` does not fit.

    Examples:
        >>> import jax
        >>> from jaxrelu import diagnostics
        >>> stats = diagnostics.unit_stats(jax.numpy.array([[1.0, -2.0], [-3.0, -4.0]]))
        >>> stats.dead, stats.firing_rate, stats.margin
        (Array([False,  True], dtype=bool), Array([0.5, 0. ], dtype=float32), Array([ 1., -2.], dtype=float32))
    """
    z = jnp.asarray(checked.real("unit_stats", "z", z))
    if not checked.is_int(axis):
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


def _statistics(
    z: Array, *args: Array, function: Callable[..., Array], axes: tuple[int, int] | None, where: Array | None = None
) -> UnitStats:
    """Returns the statistics of an elementwise function at z; axes are the unit axes of z and h, or None for one unit."""
    z = lax.stop_gradient(z)
    if jnp.issubdtype(z.dtype, jnp.integer):
        h, slope = function(z, *args), jnp.zeros_like(z)  # integers have no derivative, which counts as 0
    else:

        def of_z(z: Array) -> Array:
            return function(z, *args)

        h, slope = jax.jvp(of_z, (z,), (jnp.ones_like(z),))
    reduce: Any = functools.partial(_reduced, axes=axes)
    mesh = jax.typeof(z).sharding.mesh
    if mesh.explicit_axes:
        # with explicit sharding, rows could be cut into chunks only if each chunk lay on one device
        reduce = jax.sharding.auto_axes(reduce, out_sharding=NamedSharding(mesh, PartitionSpec()))
    return reduce(z, h, slope, where)


_statistics.__name__ = _lowering.TAG + STATISTICS
statistics: Callable[..., UnitStats] = jax.jit(_statistics, static_argnames=("function", "axes"))


def _reduced(z: Array, h: Array, slope: Array, where: Array | None, *, axes: tuple[int, int] | None) -> UnitStats:
    dtype = jnp.float64 if z.dtype == jnp.float64 else jnp.float32
    z, h, slope = (_rows(x, axes and axes[i]) for i, x in ((0, z), (1, h), (1, slope)))
    if z.shape != h.shape:  # vmap mapped a slope or alpha, but not z
        z = jnp.tile(z, (h.shape[0] // max(1, z.shape[0]), 1))
    z, h = z.astype(dtype), jnp.abs(h.astype(dtype))
    n = z.shape[0]
    flags = (z > 0, ~jnp.isfinite(z), z >= 6, slope == 0)
    # the four flags of an example in the four bytes of one number, so that one sum counts them all
    packed = sum((flag.astype(jnp.uint32) << 8 * i for i, flag in enumerate(flags)), jnp.zeros((), jnp.uint32))
    if where is None:
        low = high = z
        if isinstance(n, int):
            count, high_count = jnp.uint32(n & 0xFFFFFFFF), jnp.uint32(n >> 32)
            # a sample of rows at multiples of the golden ratio: at equal steps, all might be the same position of an example
            rows = (np.arange(1, 1 + min(n, _SAMPLES)) * 0.6180339887 % 1 * n).astype(int)
            shift = _shift(z[rows], None)
        else:  # jax.export does not know the size of the batch
            count, high_count, shift = jnp.asarray(n).astype(jnp.uint32), jnp.uint32(0), _shift(z, None)
        centred = z - shift
    else:
        shown = where.reshape(n, 1)
        count, high_count = shown.sum(dtype=jnp.uint32), jnp.uint32(0)
        low, high = jnp.where(shown, z, jnp.inf), jnp.where(shown, z, -jnp.inf)
        shift = _shift(z, shown)
        centred, h, packed = jnp.where(shown, z - shift, 0), jnp.where(shown, h, 0), jnp.where(shown, packed, 0)
    seen = jnp.stack([count, high_count])[:, None]
    number = jnp.maximum(floating(seen, dtype), 1)
    off = _fold(lax.reduce_sum, centred) / number
    variance = jnp.maximum(_fold(lax.reduce_sum, centred * centred) / number - off * off, 0)
    chunks = _chunked(lax.reduce_sum, packed)
    counts = jnp.stack([lax.reduce_sum((chunks >> 8 * i) & 0xFF, (0,)) for i in range(4)])
    start = jnp.stack([shift[0], variance, _fold(lax.reduce_sum, h) / number])
    steps = jnp.stack([off, jnp.zeros_like(off), jnp.zeros_like(off)])
    return UnitStats(
        seen=seen,
        counts=jnp.stack([counts, jnp.zeros_like(counts)], 1),
        extremes=jnp.stack([_fold(lax.reduce_min, low), -_fold(lax.reduce_max, high)]),
        means=step(jnp.stack([start, jnp.zeros_like(start)], 1), steps),
    )


def _rows(x: Array, axis: int | None) -> Array:
    """Returns x as a matrix, one column per unit."""
    if axis is None:
        return x.reshape(-1, 1)
    return jnp.moveaxis(x, axis, -1).reshape(math.prod(x.shape[:axis] + x.shape[axis + 1 :]), x.shape[axis])


def _shift(z: Array, shown: Array | None) -> Array:
    """Returns roughly the mean of each column; exactly its value if the column is constant, so that its variance is 0."""
    n = z.shape[0] if shown is None else shown.sum()
    base = jnp.max(z, 0, keepdims=True, where=shown, initial=-jnp.inf)
    base = jnp.where(jnp.isfinite(base), base, 0)
    return base + jnp.sum(z - base, 0, keepdims=True, where=shown) / jnp.maximum(n, 1).astype(z.dtype)


def _chunked(reduce: Callable[..., Array], x: Array) -> Array:
    """Returns each column reduced within chunks of _ROWS rows; what is left over makes the first chunk."""
    n, units = x.shape
    if not isinstance(n, int):  # unknown to jax.export: each row is a chunk
        return x
    full = n - n % _ROWS
    parts = [x[None, full:]] if full < n or n == 0 else []
    parts += [x[:full].reshape(full // _ROWS, _ROWS, units)] if full else []
    return jnp.concatenate([reduce(part, (1,)) for part in parts])


def _fold(reduce: Callable[..., Array], x: Array) -> Array:
    return reduce(_chunked(reduce, x), (0,))
