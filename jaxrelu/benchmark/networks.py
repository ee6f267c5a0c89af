"""The networks whose memory is measured: the gradient of a loss, or a step of training in Flax."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from jax import Array, lax

from jaxrelu.benchmark import vision
from jaxrelu.benchmark.layers import TOKENS, Layer, Shape, autoencoder, dense, gelu, residual, transformer, vmapped
from jaxrelu.benchmark.peers import SLOPE, Activation

__all__ = ["EXPERT", "NETWORKS", "STEPS", "Network", "adam", "adam_step", "build", "values"]


class Network(NamedTuple):
    """A function to compile: the gradient of a loss in the parameters, or a whole training step.

    Attributes:
        function: the function.
        arguments: the shapes of its arguments.
        loss: a function of parameters and input; None for a training step in Flax.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    loss: Callable[..., Array] | None = None


def _as_it_is(function: Any) -> Any:
    return function


def build(
    name: str,
    activation: Activation,
    batch: int,
    width: int,
    dtype: Any,
    *,
    layers: int = 8,
    expert: bool = False,
    around: Callable[..., Any] = _as_it_is,
) -> Network:
    """Returns a network of NETWORKS.

    Args:
        name: one of NETWORKS.
        activation: a function of x and a slope.
        batch: the batch of the dense networks.
        width: the width of the dense networks. The convolutional ones take so many images that an activation of the first
            stage has batch x width elements; resnet18, mobilenet and unet take at least one image.
        dtype: the dtype of parameters and activations.
        layers: the number of layers. The transformer has a quarter as many blocks; resnet18 has as many basic blocks, at
            most 8; mobilenet has as many inverted residuals, at most 17; unet halves the resolution once for every four
            layers, at least once and at most 4 times. The autoencoder has one hidden layer, of 4 times the width.
        expert: whether each layer is under `jax.checkpoint(dots_saveable)`, as an expert would save memory.
        around: what the loss goes through before its gradient is taken, such as `jaxrelu.memory.lean`.
    """
    if name in STEPS:
        return STEPS[name](activation, batch, width, dtype, layers, around)
    if name in _CONVOLUTIONAL:
        x, network = _CONVOLUTIONAL[name](batch * width, dtype, layers)
    else:
        x, network = _DENSE[name](batch, width, dtype, layers)
    wrap = _remat if expert else _WRAPS.get(name, _as_it_is)

    # cached, so that a layer that is jitted by itself is traced only once for the whole network
    @functools.cache
    def wrapped(apply: Callable[..., Array]) -> Callable[[Any, Array], Array]:
        return wrap(functools.partial(apply, activation))

    def loss(parameters: Any, x: Array) -> Array:
        for layer, p in zip(network, parameters, strict=True):
            x = wrapped(layer.apply)(p, x)
        return _mean_square(x)

    def loss_of_scan(parameters: Any, x: Array) -> Array:
        def carry(x: Array, p: Any) -> tuple[Array, None]:
            return wrapped(network[0].apply)(p, x), None

        return _mean_square(lax.scan(carry, x, parameters)[0])

    if name == "scan":
        stacked = [Shape((layers, *p.shape), p.dtype) for p in network[0].parameters]
        return Network(jax.grad(around(loss_of_scan)), (stacked, x), around(loss_of_scan))
    return Network(jax.grad(around(loss)), ([layer.parameters for layer in network], x), around(loss))


def _mean_square(y: Array) -> Array:
    return jnp.mean(jnp.square(y.astype(jnp.float32)))


def _repeated(layer: Callable[[int, Any], Layer]) -> Callable[..., tuple[Shape, list[Layer]]]:
    """Returns a function that builds a network of the same layer many times."""

    def repeat(batch: int, width: int, dtype: Any, layers: int) -> tuple[Shape, list[Layer]]:
        return Shape((batch, width), dtype), [layer(width, dtype)] * layers

    return repeat


def _transformer(batch: int, width: int, dtype: Any, layers: int) -> tuple[Shape, list[Layer]]:
    return Shape((batch // TOKENS, TOKENS, width), dtype), [transformer(width, dtype)] * max(1, layers // 4)


def _autoencoder(batch: int, width: int, dtype: Any, layers: int) -> tuple[Shape, list[Layer]]:
    return Shape((batch, width), dtype), [autoencoder(width, dtype)]


_remat = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
_mlp = _repeated(dense)
_DENSE = {
    "mlp": _mlp,
    "residual": _repeated(residual),
    "blocks": _mlp,
    "checkpoint": _mlp,
    "scan": _mlp,
    "vmapped": _repeated(vmapped),
    "transformer": _transformer,
    "gelu": _repeated(gelu),
    "autoencoder": _autoencoder,
}
_CONVOLUTIONAL = {
    "conv": vision.conv,
    "conv_norm": vision.conv_norm,
    "resnet18": vision.resnet18,
    "mobilenet": vision.mobilenet,
    "unet": vision.unet,
}
_WRAPS = {"blocks": jax.jit, "checkpoint": _remat}
# the networks that are also built with `expert`: dots_saveable keeps the results of matrix products, which they consist of
EXPERT = ("mlp", "residual", "transformer")
adam = optax.adam(1e-3)


def adam_step(loss: Callable[..., Array]) -> Callable[..., Any]:
    """Returns a function of parameters, Adam's state and the input: one step of training."""

    def step(parameters: Any, state: Any, x: Array) -> Any:
        updates, state = adam.update(jax.grad(loss)(parameters, x), state, parameters)
        return optax.apply_updates(parameters, updates), state

    return step


class _LinenLayer(nn.Module):
    activation: Activation
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope = self.param("negative_slope", nn.initializers.constant(SLOPE), (), jnp.float32)
        return self.activation(nn.Dense(self.width, dtype=self.dtype, param_dtype=self.dtype)(x), slope)


def _linen_step(activation: Activation, batch: int, width: int, dtype: Any, layers: int, around: Any) -> Network:
    model = nn.Sequential([_LinenLayer(activation, width, dtype) for _ in range(layers)])
    x = Shape((batch, width), dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(variables: Any, x: Array) -> Array:
        y: Any = model.apply(variables, x)
        return _mean_square(y)

    return Network(adam_step(around(loss)), (variables, jax.eval_shape(adam.init, variables), x))


class _NnxLayer(nnx.Module):
    def __init__(self, activation: Activation, width: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.dense = nnx.Linear(width, width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.negative_slope = nnx.Param(jnp.full((), SLOPE, jnp.float32))

    def __call__(self, x: Array) -> Array:
        return self.activation(self.dense(x), self.negative_slope[...])


def _nnx_step(activation: Activation, batch: int, width: int, dtype: Any, layers: int, around: Any) -> Network:
    def create() -> Any:
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(*(_NnxLayer(activation, width, dtype, rngs) for _ in range(layers)))
        return model, nnx.Optimizer(model, adam, wrt=nnx.Param)

    def loss(model: Any, x: Array) -> Array:
        return _mean_square(model(x))

    graph, state = nnx.split(nnx.eval_shape(create))

    def step(state: Any, x: Array) -> Any:
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(around(loss))(model, x))
        return nnx.state((model, optimizer))

    return Network(step, (state, Shape((batch, width), dtype)))


STEPS: dict[str, Callable[..., Network]] = {"linen": _linen_step, "nnx": _nnx_step}
NETWORKS = (*_DENSE, *_CONVOLUTIONAL, *STEPS)


def values(shapes: Any) -> Any:
    """Returns random arrays of these shapes, scaled so that a matrix product or convolution keeps the size of its input."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [
        jax.random.normal(key, s.shape, s.dtype)
        * s.dtype.type(math.prod(s.shape[:-1] or s.shape) ** -0.5 if s.shape else SLOPE)
        for key, s in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, values)
