"""Layers for networks that repeat one layer: dense layers and the transformer's block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrelu.benchmark.peers import Activation, identity

__all__ = [
    "HEAD",
    "TOKENS",
    "Layer",
    "Shape",
    "autoencoder",
    "dense",
    "gelu",
    "residual",
    "slope_shape",
    "transformer",
    "vmapped",
]

Shape = jax.ShapeDtypeStruct
# the number of tokens in a sequence, and the width of an attention head
TOKENS, HEAD = 128, 64


class Layer(NamedTuple):
    """A layer of a network.

    Attributes:
        apply: a function of the activation, the layer's parameters and x.
        parameters: the shapes of the parameters, a pytree.
    """

    apply: Callable[[Activation, Any, Array], Array]
    parameters: Any


def slope_shape() -> Shape:
    """Returns the shape of an activation's slope."""
    return Shape((), jnp.float32)


def dense(width: int, dtype: Any) -> Layer:
    """Returns a layer of matrix product, bias and activation."""
    return Layer(_dense, _dense_parameters(width, dtype))


def residual(width: int, dtype: Any) -> Layer:
    """Returns a layer that applies the activation to the sum of x, a matrix product and a bias."""
    return Layer(_residual, _dense_parameters(width, dtype))


def vmapped(width: int, dtype: Any) -> Layer:
    """Returns `dense` written for one example and vmapped over the batch, as Equinox's users write it."""
    return Layer(_vmapped, _dense_parameters(width, dtype))


def gelu(width: int, dtype: Any) -> Layer:
    """Returns `dense` with jax.nn.gelu in place of any activation: what `lean` does for one that jaxrelu does not have."""
    return Layer(_gelu, _dense_parameters(width, dtype))


def autoencoder(width: int, dtype: Any) -> Layer:
    """Returns what an overcomplete autoencoder, of one hidden layer 4 times as wide as x, fails to reconstruct of x."""
    wide = 4 * width
    matrices = (Shape((width, wide), dtype), Shape((wide,), dtype), Shape((wide, width), dtype), Shape((width,), dtype))
    return Layer(_autoencoder, (*matrices, slope_shape()))


def transformer(width: int, dtype: Any) -> Layer:
    """Returns a transformer's block: attention and a feed-forward part, each after a LayerNorm."""
    scale = Shape((width,), jnp.float32)
    matrices = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return Layer(_transformer, (*(Shape(shape, dtype) for shape in matrices), scale, scale, slope_shape()))


def _dense(activation: Activation, parameters: Any, x: Array) -> Array:
    w, b, slope = parameters
    return activation(x @ w + b, slope)


def _gelu(activation: Activation, parameters: Any, x: Array) -> Array:
    if activation is identity:
        return _dense(activation, parameters, x)
    return _dense(lambda x, slope: jax.nn.gelu(x), parameters, x)


def _autoencoder(activation: Activation, parameters: Any, x: Array) -> Array:
    w_in, b_in, w_out, b_out, slope = parameters
    return activation(x @ w_in + b_in, slope) @ w_out + b_out - x


def _vmapped(activation: Activation, parameters: Any, x: Array) -> Array:
    def one(x: Array) -> Array:
        w, b, slope = parameters
        return activation(w @ x + b, slope)  # from the left, as equinox.nn.Linear: XLA then transposes more

    return jax.vmap(one)(x)


def _residual(activation: Activation, parameters: Any, x: Array) -> Array:
    w, b, slope = parameters
    return activation(x + x @ w + b, slope)


def _dense_parameters(width: int, dtype: Any) -> tuple[Shape, ...]:
    return Shape((width, width), dtype), Shape((width,), dtype), slope_shape()


def _layer_norm(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * lax.rsqrt(wide.var(-1, keepdims=True) + 1e-5) * scale).astype(x.dtype)


def _transformer(activation: Activation, parameters: Any, x: Array) -> Array:
    qkv, out, up, down, scale_1, scale_2, slope = parameters
    batch, tokens, width = x.shape
    q, k, v = jnp.moveaxis((_layer_norm(x, scale_1) @ qkv).reshape(batch, tokens, 3, width // HEAD, HEAD), 2, 0)
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) / HEAD**0.5).astype(x.dtype)
    x += jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ out
    return x + activation(_layer_norm(x, scale_2) @ up, slope) @ down
