"""The networks whose memory is measured, the activations and their peers, and the machines they are compiled for."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from jax import Array, lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jaxrelu
from jaxrelu import inplace

# of the input and a slope, which only prelu reads
Activation = Callable[[Array, Array], Array]
Shape = jax.ShapeDtypeStruct
SLOPE = 0.25


class Peers(NamedTuple):
    """An activation and what it is measured against.

    Attributes:
        ours, reference: of x and a slope.
        peer: the reference's name in the measurements.
        inplace: of x alone.
        torch: the name in `torch.nn.functional`.
        learned: whether the slope is a parameter.
    """

    ours: Activation
    reference: Activation
    peer: str
    inplace: Callable[[Array], Array]
    torch: str
    learned: bool = False


def identity(x: Array, slope: Array) -> Array:
    """Returns x: the floor, a network without activations."""
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


class Network(NamedTuple):
    """A function to compile: the gradient of a loss in the parameters, or a whole training step.

    Attributes:
        function: what is compiled.
        arguments: the shapes of its arguments.
        loss: of parameters and input, for those networks that are trained outside a framework.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    loss: Callable[..., Array] | None = None


class _Kind(NamedTuple):
    layer: Callable[[Activation, Any, Array], Array]
    parameters: Callable[[int, Any], tuple[Shape, ...]]
    wrap: Callable[[Any], Any] = lambda layer: layer


def build(
    name: str, activation: Activation, batch: int, width: int, dtype: Any, *, layers: int = 8, expert: bool = False
) -> Network:
    """Returns a network of NETWORKS.

    Args:
        name: one of NETWORKS.
        activation: of x and a slope.
        batch: of the dense networks.
        width: of the dense networks; the others have as many elements in an activation.
        dtype: of parameters and activations.
        layers: how many; the transformer has a quarter.
        expert: whether each layer stands under `jax.checkpoint(dots_saveable)`, the known remedy.
    """
    if name in _STEPS:
        return _STEPS[name](activation, batch, width, dtype, layers)
    kind = _KINDS[name]
    layer = functools.partial(kind.layer, activation)
    layer = _remat(layer) if expert else kind.wrap(layer)
    x, count = Shape((batch, width), dtype), layers
    if name in ("conv", "conv_norm"):
        x = Shape((batch * width // (16 * 16 * CHANNELS), 16, 16, CHANNELS), dtype)
    elif name == "transformer":
        x, count = Shape((batch // TOKENS, TOKENS, width), dtype), max(1, layers // 4)
    each = kind.parameters(width, dtype)
    if name == "scan":
        parameters: Any = tuple(Shape((count, *p.shape), p.dtype) for p in each)
    else:
        parameters = [each] * count

    def carry(x: Array, p: Any) -> tuple[Array, None]:
        return layer(p, x), None

    def loss(parameters: Any, x: Array) -> Array:
        if name == "scan":
            x, _ = lax.scan(carry, x, parameters)
        else:
            for p in parameters:
                x = layer(p, x)
        return _mean_square(x)

    return Network(jax.grad(loss), (parameters, x), loss)


def _mean_square(y: Array) -> Array:
    return jnp.mean(jnp.square(y.astype(jnp.float32)))


def _dense(activation: Activation, parameters: Any, x: Array) -> Array:
    w, b, slope = parameters
    return activation(x @ w + b, slope)


def _residual(activation: Activation, parameters: Any, x: Array) -> Array:
    w, b, slope = parameters
    return activation(x + x @ w + b, slope)


def _dense_parameters(width: int, dtype: Any) -> tuple[Shape, ...]:
    return Shape((width, width), dtype), Shape((width,), dtype), Shape((), jnp.float32)


CHANNELS = 128


def _convolve(x: Array, w: Array) -> Array:
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _conv(activation: Activation, parameters: Any, x: Array) -> Array:
    w, b, slope = parameters
    return activation(_convolve(x, w) + b, slope)


def _conv_parameters(width: int, dtype: Any) -> tuple[Shape, ...]:
    return Shape((3, 3, CHANNELS, CHANNELS), dtype), Shape((CHANNELS,), dtype), Shape((), jnp.float32)


def _conv_norm(activation: Activation, parameters: Any, x: Array) -> Array:
    w, scale, bias, slope = parameters
    z = _convolve(x, w).astype(jnp.float32)
    mean = z.mean((0, 1, 2))
    variance = jnp.square(z).mean((0, 1, 2)) - jnp.square(mean)
    return activation(((z - mean) * lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype), slope)


def _conv_norm_parameters(width: int, dtype: Any) -> tuple[Shape, ...]:
    channels = Shape((CHANNELS,), jnp.float32)
    return Shape((3, 3, CHANNELS, CHANNELS), dtype), channels, channels, Shape((), jnp.float32)


TOKENS, HEAD = 128, 64


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


def _transformer_parameters(width: int, dtype: Any) -> tuple[Shape, ...]:
    scale = Shape((width,), jnp.float32)
    matrices = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return *(Shape(shape, dtype) for shape in matrices), scale, scale, Shape((), jnp.float32)


_remat = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
_KINDS = {
    "mlp": _Kind(_dense, _dense_parameters),
    "residual": _Kind(_residual, _dense_parameters),
    "blocks": _Kind(_dense, _dense_parameters, jax.jit),
    "checkpoint": _Kind(_dense, _dense_parameters, _remat),
    "scan": _Kind(_dense, _dense_parameters),
    "conv": _Kind(_conv, _conv_parameters),
    "conv_norm": _Kind(_conv_norm, _conv_norm_parameters),
    "transformer": _Kind(_transformer, _transformer_parameters),
}
# where the expert's way is another network: dots_saveable keeps what matrix products return
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


def _linen_step(activation: Activation, batch: int, width: int, dtype: Any, layers: int) -> Network:
    model = nn.Sequential([_LinenLayer(activation, width, dtype) for _ in range(layers)])
    x = Shape((batch, width), dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(variables: Any, x: Array) -> Array:
        y: Any = model.apply(variables, x)
        return _mean_square(y)

    return Network(adam_step(loss), (variables, jax.eval_shape(adam.init, variables), x))


class _NnxLayer(nnx.Module):
    def __init__(self, activation: Activation, width: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.dense = nnx.Linear(width, width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.negative_slope = nnx.Param(jnp.full((), SLOPE, jnp.float32))

    def __call__(self, x: Array) -> Array:
        return self.activation(self.dense(x), self.negative_slope[...])


def _nnx_step(activation: Activation, batch: int, width: int, dtype: Any, layers: int) -> Network:
    def create() -> Any:
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(*(_NnxLayer(activation, width, dtype, rngs) for _ in range(layers)))
        return model, nnx.Optimizer(model, adam, wrt=nnx.Param)

    def loss(model: Any, x: Array) -> Array:
        return _mean_square(model(x))

    graph, state = nnx.split(nnx.eval_shape(create))

    def step(state: Any, x: Array) -> Any:
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(loss)(model, x))
        return nnx.state((model, optimizer))

    return Network(step, (state, Shape((batch, width), dtype)))


_STEPS = {"linen": _linen_step, "nnx": _nnx_step}
NETWORKS = (*_KINDS, *_STEPS)


class Target(NamedTuple):
    """A machine to compile for.

    Attributes:
        device: of the machine's topology, or a real one.
        name: for the measurements.
        options: the compiler's options that differ from the default.
        ahead: whether the machine is absent.
    """

    device: Any
    name: str
    options: dict[str, Any] | None = None
    ahead: bool = False


TPUS = ("tpu-v5e", "tpu-v6e")
AHEAD = (*TPUS, "h200")


def targets_ahead(platform: str, description: Path) -> list[Target]:
    """Returns the targets of a platform that is not there.

    Args:
        platform: one of AHEAD.
        description: the GPU's target description, a text protobuf.
    """
    if platform in TPUS:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{platform.removeprefix('tpu-')}:2x2")
        return [Target(topology.devices[0], f"{platform}, compiled ahead of time", ahead=True)]
    topology = topologies.get_topology_desc(platform="cuda", target_config=description.read_text(), topology="1x1x1")
    # without a device nothing is autotuned, so that XLA's own choice of matrix products is unknown: both are reported
    modes = {"Triton": True, "cuBLAS": False}
    return [
        Target(
            topology.devices[0], f"h200 {mode}, compiled ahead of time", {"xla_gpu_enable_triton_gemm": triton}, ahead=True
        )
        for mode, triton in modes.items()
    ]


def compile_network(network: Network, target: Target) -> Any:
    """Returns the network compiled for the target."""
    sharding = SingleDeviceSharding(target.device)

    def placed(s: Shape) -> Shape:
        return Shape(s.shape, s.dtype, sharding=sharding)

    arguments = jax.tree.map(placed, network.arguments)
    return jax.jit(network.function).lower(*arguments).compile(compiler_options=target.options)
