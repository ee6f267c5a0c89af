"""Statistics by NumPy, small networks some of whose units are dead, and what the tests of recycling share."""

import contextlib

import jax
import numpy as np
import optax

import jaxrelu
from jaxrelu.diagnostics import UnitStats, unit_stats
from jaxrelu.initializers import kaiming_uniform
from jaxrelu.recycling import Edge, recycle

KEY = jax.random.key(7)
# no draw to compile, for the tests that do not look at the weights; RANDOM compiles sooner than normal weights
FILL = jax.nn.initializers.constant(0.3)
RANDOM = kaiming_uniform()
EDGES = [Edge("hidden", "layer_0", ["layer_1"])]
# eagerly each of its operations would compile
stats_of = jax.jit(unit_stats)


def cure(inner, edges, **options):
    """Returns recycle around an Optax transformation, which may promote as it likes."""
    return recycle(relaxed(inner), edges, **({"key": KEY, "init": FILL} | options))


def relaxed(inner):
    def update(*args, **kwargs):
        with standard():
            return inner.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(inner.init, update)


@contextlib.contextmanager
def standard():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(seed, *shape):
    """Returns a fixed NumPy array, as each draw of JAX's would compile, and so would each operation outside jit."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(seed, inputs, units, dead=()):
    """Returns a dense layer whose given units never fire."""
    bias = normal(seed + 50, units) / 10
    bias[list(dead)] = -90
    return {"kernel": normal(seed, inputs, units), "bias": bias}


def apply(layer, x):
    return x @ layer["kernel"] + layer["bias"][None]


def mlp(params, x):
    """Returns the outputs and the pre-activations of the hidden units."""
    z = apply(params["layer_0"], x)
    return apply(params["layer_1"], jaxrelu.relu(z)), z


def chain_edges(count):
    return [Edge(f"units_{i}", f"layer_{i}", [f"layer_{i + 1}"]) for i in range(count - 1)]


DEAD = (1, 4)
SMALL = {"layer_0": dense(0, 5, 6, DEAD), "layer_1": dense(1, 6, 3)}


def small_stats():
    """Returns the statistics of the hidden units of SMALL."""
    return {"hidden": stats_of(apply(SMALL["layer_0"], normal(9, 11, 5)))}


def stats_with(dead, units=6):
    """Returns the statistics of a layer in which the given units never fired, and the others always."""
    z = np.ones((2, units), np.float32)
    z[:, list(dead)] = -1
    return stats_of(z)


EXACT = ("dead", "margin", "min", "max")
SHARES = ("firing_rate", "sparsity", "dormancy", "saturation", "zero_gradient")


@jax.jit
def read(stats):
    """Returns what is read of the statistics of one layer, by one program where each property would compile its own."""
    return {name: getattr(stats, name) for name in (*EXACT, *SHARES, "mean", "variance")}


def reference(z):
    """Returns the statistics of a (rows, units) stream, in NumPy float64."""
    z = np.asarray(z).astype(np.float64)
    with np.errstate(invalid="ignore"):
        output = np.maximum(z, 0).mean(0)
        finite = np.isfinite(output)
        layer = output[finite].mean() if finite.any() else np.nan
        return {
            "count": len(z),
            "fired": (z > 0).sum(0),
            "nonfinite": (~np.isfinite(z)).sum(0),
            "dead": ~(z > 0).any(0) & np.isfinite(z).all(0),
            "firing_rate": (z > 0).mean(0),
            "sparsity": 1 - (z > 0).mean(0),
            "margin": z.max(0),
            "dormancy": np.where(finite, output / layer if layer else 0.0, np.nan),
            "saturation": (z >= 6).mean(0),
            "zero_gradient": (~(z > 0)).mean(0),
            "mean": z.mean(0),
            "variance": z.var(0),
            "min": z.min(0),
            "max": z.max(0),
        }


def assert_stats(stats: UnitStats, z):
    exact, got = reference(z), jax.device_get(read(jax.device_get(stats)))
    for name in ("count", "fired", "nonfinite"):
        np.testing.assert_array_equal(getattr(stats, name), exact[name], err_msg=name)
    for name in EXACT:
        np.testing.assert_array_equal(got[name], exact[name], err_msg=name)
    for name in SHARES:
        np.testing.assert_allclose(got[name], exact[name], rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(got["variance"], exact["variance"], rtol=1e-5, err_msg="variance")
    granted = 2e-6 * (np.abs(exact["mean"]) + np.sqrt(exact["variance"]))
    with np.errstate(invalid="ignore"):
        close = np.abs(np.float64(got["mean"]) - exact["mean"]) <= granted
    assert (close | ~np.isfinite(exact["mean"])).all()
    np.testing.assert_array_equal(np.isnan(got["mean"]), np.isnan(exact["mean"]))
