"""Three small image classifiers with a choice of activation."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jax import Array

import jaxrelu
from jaxrelu import nnx as modules
from jaxrelu.initializers import kaiming_normal
from jaxrelu.recycling import Edge


class Activation(NamedTuple):
    """An activation: the function, from which the initial scale follows, and the module for a number of channels."""

    function: Callable[[Array], Array]
    module: Callable[[int], nnx.Module]


ACTIVATIONS = {
    "relu": Activation(jaxrelu.relu, lambda channels: modules.ReLU()),
    "leaky_relu": Activation(jaxrelu.leaky_relu, lambda channels: modules.LeakyReLU()),
    "prelu": Activation(functools.partial(jaxrelu.prelu, negative_slope=0.25), lambda channels: modules.PReLU(channels)),
    "elu": Activation(jaxrelu.elu, lambda channels: modules.ELU()),
    "relu6": Activation(jaxrelu.relu6, lambda channels: modules.ReLU6()),
}

# a little above 0, so that few units are inactive at the start
BIAS = nnx.initializers.constant(0.01)


class MLP(nnx.Module):
    """Two hidden layers, for images of shape (n, height, width, 1).

    Attributes:
        EDGES: the layers that are followed by an activation, in order, each with the layer that reads it, for `recycle`.
    """

    EDGES = (Edge("hidden1", "hidden1", ["hidden2"]), Edge("hidden2", "hidden2", ["output"]))

    def __init__(self, size: tuple[int, int], classes: int, activation: Activation, rngs: nnx.Rngs) -> None:
        weights = kaiming_normal(activation.function)
        self.hidden1 = nnx.Linear(size[0] * size[1], 512, kernel_init=weights, bias_init=BIAS, rngs=rngs)
        self.activation1 = activation.module(512)
        self.hidden2 = nnx.Linear(512, 256, kernel_init=weights, bias_init=BIAS, rngs=rngs)
        self.activation2 = activation.module(256)
        self.output = nnx.Linear(256, classes, kernel_init=weights, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x.reshape(len(x), -1)
        x = self.activation1(self.hidden1(x))
        x = self.activation2(self.hidden2(x))
        return self.output(x)


class CNN(nnx.Module):
    """Two convolutions, pooling between them, and a hidden layer, for images of shape (n, height, width, 1).

    Attributes:
        EDGES: the layers that are followed by an activation, in order, each with the layer that reads it, for `recycle`.
    """

    EDGES = (
        Edge("convolution1", "convolution1", ["convolution2"]),
        Edge("convolution2", "convolution2", ["hidden"], inputs="flattened"),
        Edge("hidden", "hidden", ["output"]),
    )
    norm1 = norm2 = staticmethod(jax.nn.identity)  # NormedCNN has BatchNorms here

    def __init__(
        self, size: tuple[int, int], classes: int, activation: Activation, rngs: nnx.Rngs, *, use_bias: bool = True
    ) -> None:
        weights = kaiming_normal(activation.function)
        pixels = -(-size[0] // 2) * -(-size[1] // 2)  # pooling halves the image and rounds up
        conv = functools.partial(nnx.Conv, use_bias=use_bias, kernel_init=weights, bias_init=BIAS, rngs=rngs)
        self.convolution1 = conv(1, 32, (3, 3))
        self.activation1 = activation.module(32)
        self.convolution2 = conv(32, 64, (3, 3))
        self.activation2 = activation.module(64)
        self.hidden = nnx.Linear(pixels * 64, 128, kernel_init=weights, bias_init=BIAS, rngs=rngs)
        self.activation3 = activation.module(128)
        self.output = nnx.Linear(128, classes, kernel_init=weights, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.activation1(self.norm1(self.convolution1(x)))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        x = self.activation2(self.norm2(self.convolution2(x)))
        x = self.activation3(self.hidden(x.reshape(len(x), -1)))
        return self.output(x)


class NormedCNN(CNN):
    """The CNN with a BatchNorm between each convolution, which then needs no bias, and its activation."""

    EDGES = (CNN.EDGES[0]._replace(between=["norm1"]), CNN.EDGES[1]._replace(between=["norm2"]), CNN.EDGES[2])

    def __init__(self, size: tuple[int, int], classes: int, activation: Activation, rngs: nnx.Rngs) -> None:
        super().__init__(size, classes, activation, rngs, use_bias=False)
        # the running statistics follow within an epoch of the bundled digits, which has 19 steps
        self.norm1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.norm2 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)


MODELS = {"mlp": MLP, "cnn": CNN, "cnn_norm": NormedCNN}
