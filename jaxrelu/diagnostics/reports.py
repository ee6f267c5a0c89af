"""Reports on what was observed: a table, numbers for a log, warnings before training, the gradient by layer."""

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrelu.diagnostics.observe import observe
from jaxrelu.diagnostics.stats import UnitStats, by_name, exact, on_host

__all__ = ["check_init", "gradient_flow", "summary", "to_scalars"]

# what makes one number of a layer's units, by statistic
_MEANS = ("dead", "firing_rate", "sparsity", "saturation", "zero_gradient", "mean", "variance")
# infinite in a layer without units
_least, _greatest = functools.partial(jnp.min, initial=jnp.inf), functools.partial(jnp.max, initial=-jnp.inf)
_EXTREMES = {"margin": _least, "dormancy": _least, "min": _least, "max": _greatest}
_OF_UNITS: dict[str, Callable[..., Array]] = {**dict.fromkeys(_MEANS, jnp.mean), **_EXTREMES}
_SHARES = {"dead": "dead", "firing": "firing_rate", "zero grad": "zero_gradient", ">= 6": "saturation"}
_HEAD = ("layer", "units", *_SHARES, "least dormancy", "margin", "mean", "sd", "not finite", "seen")


def to_scalars(stats: Mapping[str, UnitStats]) -> dict[str, float]:
    """Returns the statistics of each layer as Python numbers for a log, with one transfer from the device.

    They are the share of dead units; the mean over the units of firing_rate, sparsity, saturation, zero_gradient, mean and
    variance; the least margin, dormancy and min; the greatest max; and, as ints, count and the sums of fired and nonfinite.

    Args:
        stats: UnitStats by name, as `observe` returns them.

    Returns:
        Finite numbers by "name/statistic", such as "hidden1/relu/dead"; for the first layer of a scan "name[0]/statistic". A
        number that would not be finite is left out, so that strict JSON takes them: a layer without units has the ints
        alone, one that has seen nothing also the share of dead units, 0.

    Raises:
        TypeError: `stats` is something else.

    Examples:
        >>> import jax
        >>> from jaxrelu import diagnostics
        >>> stats = {"relu": diagnostics.unit_stats(jax.numpy.array([[1.0, -2.0], [-3.0, -4.0]]))}
        >>> diagnostics.to_scalars(stats)["relu/dead"]
        0.5
    """
    rows = _rows(by_name("to_scalars", stats))
    numbers = {f"{name}/{key}": number for name, row in rows for key, number in row.items() if key != "units"}
    return {key: number for key, number in numbers.items() if math.isfinite(number)}


def summary(stats: Mapping[str, UnitStats]) -> str:
    """Returns a table with one row per layer, as text, with one transfer from the device.

    It takes what `to_scalars` takes and shows the same numbers. Shares are shares of the examples, averaged over the units.
    The least dormancy is 0 if a unit is dead; the margin says how far below 0 the deepest unit stays. A layer that has
    seen nothing, or has no units, has dashes.

    Raises:
        TypeError: `stats` is something else.
    """
    lines: list[tuple[str, ...]] = [_HEAD]
    for name, row in _rows(by_name("summary", stats)):
        shares = [f"{row[key]:.1%}" for key in _SHARES.values()]
        numbers = [f"{x:.3g}" for x in (row["dormancy"], row["margin"], row["mean"], row["variance"] ** 0.5)]
        cells = [*shares, *numbers] if row["units"] and row["count"] else ["-"] * len(shares + numbers)
        lines.append((name, str(row["units"]), *cells, str(row["nonfinite"]), str(row["count"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join([line[0].ljust(widths[0]), *padded[1:]]) for line, padded in zip(lines, cells, strict=True))


def check_init(f: Callable[..., Any], *args: Any) -> list[str]:
    """Warns of units that are dead at birth (Lu et al. 2020, arXiv:1903.06733) and of parameters without a gradient.

    A parameter is without a gradient if that of the outputs, each times a random number, is 0 everywhere in it. The numbers
    are random because a plain sum has no gradient where the outputs are centred, or are shares that sum to 1.

    Args:
        f: a function whose first argument is the parameters; of an nnx model, `lambda model, x: model(x)`, then the model.
        *args: the parameters, and a batch large enough to tell a dead unit from one that rarely fires.

    Returns:
        The texts of the warnings, an empty list if there was nothing to warn of: for each layer with dead units, their
        number; and the paths of the parameters without a gradient.

    Raises:
        TypeError: `f` is not callable.

    Warns:
        UserWarning: each text that is returned, and what `observe` warns of.
    """
    _check_callable("check_init", "f", f)
    report: list[str] = []
    for name, row in _rows(observe(f)(*args)[1]):
        if row["dead"] > 0:
            number = round(row["dead"] * row["units"])
            report.append(
                f"check_init: {name}: {number} of {row['units']} units are dead at birth on {row['count']} examples; use "
                "kaiming_normal weights, a small positive bias or leaky_relu"
            )

    def weighted(*inputs: Any) -> Array:
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(f(*inputs)) if isinstance(x, (jax.Array, np.ndarray))]
        floats = [x.astype(jnp.float32) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        keys = jax.random.split(jax.random.key(0), max(1, len(floats)))
        products = [(jax.random.normal(k, x.shape) * x).sum() for k, x in zip(keys, floats, strict=False)]
        return sum(products, jnp.float32(0))

    silent = [path or "the first argument" for path, gradient in _gradients(weighted, *args) if not gradient.any()]
    if silent:
        report.append(f"check_init: no gradient reaches {', '.join(silent)}; all units behind may be dead")
    for text in report:
        warnings.warn(text, stacklevel=2)
    return report


def _check_callable(function: str, argument: str, f: Any) -> None:
    if not callable(f):
        raise TypeError(f"{function}: {argument} must be a function, got {f!r}; pass the function, not its output")


def gradient_flow(loss: Callable[..., Array], params: Any, *args: Any) -> dict[str, float]:
    """Returns the root mean square of the gradient in each layer, which may vanish or explode (Glorot and Bengio 2010).

    Args:
        loss: a function that returns a scalar and whose first argument is the parameters.
        params: the parameters, a pytree.
        *args: the other arguments of `loss`.

    Raises:
        TypeError: `loss` is not callable, or does not return a scalar.

    Returns:
        Python floats by the path of a layer, with layer_2 before layer_10. The path is the keys that lead to the layer's
        arrays, joined by "/", without the leading "params" of Flax linen; an array outside all layers has a path of its own.

    Examples:
        >>> from jaxrelu import diagnostics
        >>> diagnostics.gradient_flow(lambda p, x: p["a"]["w"] * x, {"a": {"w": 2.0}}, 3.0)
        {'a': 3.0}
    """
    _check_callable("gradient_flow", "loss", loss)
    layers: dict[str, list[np.ndarray]] = {}
    for path, gradient in _gradients(loss, params, *args):
        path = path.removeprefix("params/")
        layers.setdefault(path.rpartition("/")[0] or path, []).append(gradient.ravel())
    # in NumPy's float64, because the square of a vanishing gradient is 0 in float32
    rms = {path: float(np.sqrt(np.mean(np.concatenate(parts) ** 2))) for path, parts in layers.items()}
    order = sorted(rms, key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path)])
    return {path: rms[path] for path in order}


def _gradients(function: Callable[..., Array], params: Any, *args: Any) -> list[tuple[str, np.ndarray]]:
    """Returns the path and the float64 gradient of each parameter of a float dtype."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    floats = {i: x for i, (_, x) in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)}

    def of_floats(floats: dict[int, Any]) -> Array:
        return function(jax.tree.unflatten(tree, [floats.get(i, x) for i, (_, x) in enumerate(leaves)]), *args)

    gradients = jax.device_get(jax.grad(of_floats)(floats))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    # Flax may keep an array in a box, which adds "value" to the path
    return [(names[i].removesuffix("/value"), np.asarray(g, np.float64)) for i, g in gradients.items()]


def _rows(stats: Mapping[str, UnitStats]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the Python numbers of each layer; a scan gives several layers."""
    numbers, counts = on_host(_reduced(list(stats.values())))
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
