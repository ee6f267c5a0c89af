"""Small networks some of whose units are dead, and what the tests of recycling share."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrelu
from jaxrelu.diagnostics import unit_stats
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
    """Returns a fixed array, drawn by NumPy, as each draw of JAX's would compile."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(seed, inputs, units, dead=()):
    """Returns a dense layer whose given units never fire."""
    bias = np.array(normal(seed + 50, units)) / 10
    bias[list(dead)] = -90
    return {"kernel": normal(seed, inputs, units), "bias": jnp.asarray(bias)}


def apply(layer, x):
    return x @ layer["kernel"] + layer["bias"][None]


def mlp(params, x):
    """Returns the outputs and the statistics of the hidden units."""
    z = apply(params["layer_0"], x)
    return apply(params["layer_1"], jaxrelu.relu(z)), {"hidden": unit_stats(z)}


def chain_edges(count):
    return [Edge(f"units_{i}", f"layer_{i}", [f"layer_{i + 1}"]) for i in range(count - 1)]


DEAD = (1, 4)
SMALL = {"layer_0": dense(0, 5, 6, DEAD), "layer_1": dense(1, 6, 3)}


def small_stats():
    """Returns the statistics of the hidden units of SMALL."""
    return {"hidden": stats_of(apply(SMALL["layer_0"], normal(9, 11, 5)))}
