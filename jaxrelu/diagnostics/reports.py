"""Reports on what was observed: a table, numbers for a log, warnings before training, the gradient by layer."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrelu.diagnostics.observe import observe
from jaxrelu.diagnostics.stats import UnitStats, exact

__all__ = ["check_init", "gradient_flow", "summary", "to_scalars"]

# how a layer's units become one number
_MEANS = ("dead", "firing_rate", "sparsity", "saturation", "zero_gradient", "mean", "variance")
_EXTREMES = {"margin": jnp.min, "dormancy": jnp.min, "min": jnp.min, "max": jnp.max}
_OF_UNITS: dict[str, Callable[..., Array]] = {**dict.fromkeys(_MEANS, jnp.mean), **_EXTREMES}
_SHARES = {"dead": "dead", "firing": "firing_rate", "zero grad": "zero_gradient", ">= 6": "saturation"}
_HEAD = ("layer", "units", *_SHARES, "least dormancy", "margin", "mean", "sd", "not finite", "seen")


def to_scalars(stats: Mapping[str, UnitStats]) -> dict[str, float]:
    """Returns the statistics of each layer as Python numbers for a log, with one transfer from the device.

    The share of dead units; the mean over units of firing_rate, sparsity, saturation, zero_gradient, mean and variance; the
    least margin, dormancy and min, the greatest max; count, and the sums of fired and nonfinite, as ints.

    Args:
        stats: UnitStats by name, as `observe` returns them.

    Returns:
        Numbers by "name/statistic", e.g. "hidden1/relu/dead"; "name[0]/statistic" for the first layer of a scan.

    Examples:
        >>> import jax
        >>> from jaxrelu import diagnostics
        >>> stats = {"relu": diagnostics.unit_stats(jax.numpy.array([[1.0, -2.0], [-3.0, -4.0]]))}
        >>> diagnostics.to_scalars(stats)["relu/dead"]
        0.5
    """
    return {f"{name}/{key}": number for name, row in _rows(stats) for key, number in row.items() if key != "units"}


def summary(stats: Mapping[str, UnitStats]) -> str:
    """Returns a table of the layers in order, with one transfer from the device.

    Shares are those of examples, averaged over the units. The least dormancy of a unit tells dormant units from dead ones,
    the margin how far below the kink the deepest unit stays.

    Args:
        stats: UnitStats by name, as `observe` returns them.

    Returns:
        Lines of text.
    """
    lines: list[tuple[str, ...]] = [_HEAD]
    for name, row in _rows(stats):
        shares = (f"{row[key]:.1%}" for key in _SHARES.values())
        numbers = (f"{x:.3g}" for x in (row["dormancy"], row["margin"], row["mean"], row["variance"] ** 0.5))
        lines.append((name, str(row["units"]), *shares, *numbers, str(row["nonfinite"]), str(row["count"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join([line[0].ljust(widths[0]), *padded[1:]]) for line, padded in zip(lines, cells, strict=True))


def check_init(f: Callable[..., Any], *args: Any) -> None:
    """Warns of units that are dead at birth and of parameters without a gradient, before any training.

    Args:
        f: a model: a function of its parameters first. An nnx model holds its own: `check_init(lambda model, x: model(x),
            model, batch)`.
        *args: the parameters, and a batch large enough to tell a dead unit from a rare one.

    Warns:
        UserWarning: for each layer with dead units their number, and the paths of the parameters for which the gradient of
            the summed outputs is all zero.

    References:
        Lu et al. 2020, Dying ReLU and initialization (arXiv:1903.06733).
    """
    for name, row in _rows(observe(f)(*args)[1]):
        if row["dead"]:
            number = round(row["dead"] * row["units"])
            warnings.warn(
                f"check_init: {name}: {number} of {row['units']} units are dead at birth on {row['count']} examples; use "
                "kaiming_normal weights, a small positive bias or leaky_relu",
                stacklevel=2,
            )

    def total(*inputs: Any) -> Array:
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(f(*inputs)) if isinstance(x, (jax.Array, np.ndarray))]
        return sum((x.astype(jnp.float32).sum() for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)), jnp.float32(0))

    silent = [path or "the first argument" for path, gradient in _gradients(total, *args) if not gradient.any()]
    if silent:
        warnings.warn(f"check_init: no gradient reaches {', '.join(silent)}; all units behind may be dead", stacklevel=2)


def gradient_flow(loss: Callable[..., Array], params: Any, *args: Any) -> dict[str, float]:
    """Returns the root mean square of the loss's gradient in each layer: where it vanishes or explodes.

    Args:
        loss: a scalar function of the parameters first.
        params: the parameters, a pytree.
        *args: what else `loss` takes.

    Returns:
        Python floats by layer path, in natural order: layer_2 before layer_10. The path joins by "/" the keys that lead to
        what holds the arrays, without Flax linen's leading "params", or to an array that nothing holds.

    References:
        Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.

    Examples:
        >>> from jaxrelu import diagnostics
        >>> diagnostics.gradient_flow(lambda p, x: p["a"]["w"] * x, {"a": {"w": 2.0}}, 3.0)
        {'a': 3.0}
    """
    layers: dict[str, list[np.ndarray]] = {}
    for path, gradient in _gradients(loss, params, *args):
        path = path.removeprefix("params/")
        layers.setdefault(path.rpartition("/")[0] or path, []).append(gradient.ravel())
    # in float64 on the host, as the square of a vanishing gradient is no float32
    rms = {path: float(np.sqrt(np.mean(np.concatenate(parts) ** 2))) for path, parts in layers.items()}
    return {
        path: rms[path] for path in sorted(rms, key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", p)])
    }


def _gradients(function: Callable[..., Array], params: Any, *args: Any) -> list[tuple[str, np.ndarray]]:
    """Returns the path and the float64 gradient of each parameter of a float dtype."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    floats = {i: x for i, (_, x) in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)}

    def of_floats(floats: dict[int, Any]) -> Array:
        return function(jax.tree.unflatten(tree, [floats.get(i, x) for i, (_, x) in enumerate(leaves)]), *args)

    gradients = jax.device_get(jax.grad(of_floats)(floats))
    return [(_path(leaves[i][0]), np.asarray(g, np.float64)) for i, g in gradients.items()]


def _path(path: Any) -> str:
    joined = jax.tree_util.keystr(path, simple=True, separator="/")
    return joined.removesuffix("/value")  # inside Flax's variables


def _rows(stats: Mapping[str, UnitStats]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a name and Python numbers for each layer; the layers of a scan one by one."""
    numbers, counts = jax.device_get(_reduced(list(stats.values())))
    for name, number, (seen, counted) in zip(stats, numbers, counts, strict=True):
        count, fired, nonfinite = exact(seen)[..., 0], *np.moveaxis(exact(counted)[..., :2, :], -2, 0)
        for index in np.ndindex(count.shape):
            row = {key: float(value[index]) for key, value in number.items()}
            row |= {"count": int(count[index]), "fired": int(fired[index].sum()), "nonfinite": int(nonfinite[index].sum())}
            yield name + "".join(f"[{i}]" for i in index), row | {"units": fired[index].size}


@jax.jit
def _reduced(stats: list[UnitStats]) -> Any:
    numbers = [{key: reduce(getattr(s, key), axis=-1) for key, reduce in _OF_UNITS.items()} for s in stats]
    return numbers, [(s.seen, s.counts) for s in stats]
