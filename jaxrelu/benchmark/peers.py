"""The activations, and the peers with which each is compared."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax import Array

import jaxrelu
from jaxrelu import inplace

__all__ = ["PEERS", "SLOPE", "Activation", "Peers", "identity"]

# a function of the input and of a slope, which only prelu uses
Activation = Callable[[Array, Array], Array]
SLOPE = 0.25


class Peers(NamedTuple):
    """An activation and what it is compared with.

    Attributes:
        ours, reference: jaxrelu's activation and that of jax.nn or Flax, as functions of x and a slope.
        peer: the name of the reference in the measurements.
        inplace: jaxrelu's activation in place, a function of x.
        torch: the name of PyTorch's activation in `torch.nn.functional`.
        learned: whether the slope is a parameter that is trained.
    """

    ours: Activation
    reference: Activation
    peer: str
    inplace: Callable[[Array], Array]
    torch: str
    learned: bool = False


def identity(x: Array, slope: Array) -> Array:
    """Returns x. With it a network has no activations; its memory is called the floor."""
    return x


def _flax_prelu(x: Array, slope: Array) -> Array:
    y: Any = nn.PReLU().apply({"params": {"negative_slope": slope}}, x)
    return y


def _unary(function: Callable[[Array], Array]) -> Activation:
    return lambda x, slope: function(x)


_jax_elu = _unary(jax.nn.elu)
PEERS = {
    "relu": Peers(_unary(jaxrelu.relu), _unary(jax.nn.relu), "jax.nn", inplace.relu, "relu"),
    "leaky_relu": Peers(_unary(jaxrelu.leaky_relu), _unary(jax.nn.leaky_relu), "jax.nn", inplace.leaky_relu, "leaky_relu"),
    "prelu": Peers(
        jaxrelu.prelu, _flax_prelu, "flax", functools.partial(inplace.prelu, negative_slope=SLOPE), "prelu", True
    ),
    "elu": Peers(_unary(jaxrelu.elu), _jax_elu, "jax.nn", inplace.elu, "elu"),
    "elu_output": Peers(
        _unary(functools.partial(jaxrelu.elu, save="output")),
        _jax_elu,
        "jax.nn",
        functools.partial(inplace.elu, save="output"),
        "elu",
    ),
    "relu6": Peers(_unary(jaxrelu.relu6), _unary(jax.nn.relu6), "jax.nn", inplace.relu6, "relu6"),
}
