"""Convolutional networks: two chains of the same layer, ResNet-18, MobileNetV2 and a U-Net.

Images have channels last. Each network takes so many of them that an activation of its first stage has the number of
elements that is asked for.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from jaxrelu.benchmark.layers import Layer, Shape, slope_shape
from jaxrelu.benchmark.peers import Activation

__all__ = ["conv", "conv_norm", "mobilenet", "resnet18", "unet"]

# ResNet-18, MobileNetV2 and the U-Net take photographs of 32 x 32 pixels, as in CIFAR-10; the first two have 10 classes
SIDE, COLOURS, CLASSES = 32, 3, 10
GROUPS = 32  # the number of groups in GroupNorm, as in its paper
# MobileNetV2's table: expansion, channels, repeats, stride; for 32 x 32 pixels the first two strides of the paper are 1
INVERTED = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv(elements: int, dtype: Any, layers: int) -> tuple[Shape, list[Layer]]:
    """Returns input and layers of a chain of convolutions, each with a bias and an activation.

    Args:
        elements: the number of elements of an activation.
        dtype: the dtype of input and weights.
        layers: the number of layers.
    """
    x, w = _chain(elements, dtype)
    return x, [Layer(_conv, (w, Shape(x.shape[-1:], dtype), slope_shape()))] * layers


def conv_norm(elements: int, dtype: Any, layers: int) -> tuple[Shape, list[Layer]]:
    """Returns input and layers as `conv` does, of convolutions with a BatchNorm in place of the bias."""
    x, w = _chain(elements, dtype)
    return x, [Layer(_conv_norm, (w, _scale_and_bias(x.shape[-1]), slope_shape()))] * layers


def resnet18(elements: int, dtype: Any, layers: int) -> tuple[Shape, list[Layer]]:
    """Returns input and layers of ResNet-18 in its form for CIFAR, after He et al. 2015 (arXiv:1512.03385).

    Args:
        elements: the number of elements of an activation of the first stage, which has 64 channels.
        dtype: the dtype of input and weights.
        layers: the number of basic blocks, at most 8; each stage has two.
    """
    before = 64
    network = [Layer(_conv_norm, _convolution_parameters(3, COLOURS, before, dtype))]
    for block in range(min(layers, 8)):
        channels = 64 * 2 ** (block // 2)
        stride = channels // before
        shortcut = _convolution_parameters(1, before, channels, dtype)[:2] if stride > 1 else ()
        first = _convolution_parameters(3, before, channels, dtype)
        second = _convolution_parameters(3, channels, channels, dtype)
        network.append(Layer(functools.partial(_basic_block, stride), (*first, *second, shortcut)))
        before = channels
    return _images(elements, 64, dtype), [*network, _head(before, dtype)]


def mobilenet(elements: int, dtype: Any, layers: int) -> tuple[Shape, list[Layer]]:
    """Returns input and layers of MobileNetV2's blocks, after Sandler et al. 2018 (arXiv:1801.04381).

    Args:
        elements: the number of elements of the first activation, which has 32 channels. Activations inside the blocks have
            up to 4.5 times as many.
        dtype: the dtype of input and weights.
        layers: the number of inverted residuals, at most 17.
    """
    before = 32
    network = [Layer(_conv_norm, _convolution_parameters(3, COLOURS, before, dtype))]
    blocks = [
        (expansion, channels, stride if repeat == 0 else 1)
        for expansion, channels, repeats, stride in INVERTED
        for repeat in range(repeats)
    ]
    for expansion, channels, stride in blocks[:layers]:
        wide = expansion * before
        expand = _convolution_parameters(1, before, wide, dtype) if expansion > 1 else ()
        depthwise = _convolution_parameters(3, 1, wide, dtype)
        project = _convolution_parameters(1, wide, channels, dtype)[:2]
        network.append(Layer(functools.partial(_inverted_residual, stride), (expand, depthwise, project)))
        before = channels
    return _images(elements, 32, dtype), [*network, _head(before, dtype)]


def unet(elements: int, dtype: Any, layers: int) -> tuple[Shape, list[Layer]]:
    """Returns the input of a U-Net with GroupNorm, and the U-Net as one layer (Ronneberger et al. 2015, arXiv:1505.04597).

    Args:
        elements: the number of elements of an activation of the first resolution, which has 64 channels.
        dtype: the dtype of input and weights.
        layers: every four layers halve the resolution once, at least once and at most four times, as in the paper.
    """
    depth = min(max(layers // 4, 1), 4)
    channels = [64 * 2**level for level in range(depth + 1)]

    def twice(before: int, after: int) -> list[Any]:
        return [_convolution_parameters(3, before, after, dtype), _convolution_parameters(3, after, after, dtype)]

    down = [twice(before, after) for before, after in zip([COLOURS, *channels], channels, strict=False)]
    # on the way up, each convolution reads the upsampled array together with that of its resolution from the way down
    up = [twice(below + after, after) for below, after in zip(channels[:0:-1], channels[-2::-1], strict=True)]
    head = Shape((1, 1, channels[0], COLOURS), dtype)
    return _images(elements, 64, dtype), [Layer(_unet, (down, up, head))]


def _chain(elements: int, dtype: Any) -> tuple[Shape, Shape]:
    side, channels = 16, 128
    return Shape((elements // (side * side * channels), side, side, channels), dtype), Shape(
        (3, 3, channels, channels), dtype
    )


def _images(elements: int, channels: int, dtype: Any) -> Shape:
    return Shape((max(1, elements // (SIDE * SIDE * channels)), SIDE, SIDE, COLOURS), dtype)


def _scale_and_bias(channels: int) -> tuple[Shape, Shape]:
    return Shape((channels,), jnp.float32), Shape((channels,), jnp.float32)


def _convolution_parameters(side: int, before: int, after: int, dtype: Any) -> tuple[Any, ...]:
    """Returns the shapes of a convolution's weights, its norm's scale and bias, and its activation's slope."""
    return Shape((side, side, before, after), dtype), _scale_and_bias(after), slope_shape()


def _convolve(x: Array, w: Array, stride: int = 1) -> Array:
    groups = x.shape[-1] // w.shape[2]  # 1, or the number of channels for a depthwise convolution
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _standardise(x: Array, axes: tuple[int, ...]) -> Array:
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x).mean(axes, keepdims=True) - jnp.square(mean)
    return (x - mean) * lax.rsqrt(variance + 1e-5)


def _batch_norm(parameters: Any, x: Array) -> Array:
    scale, bias = parameters
    return (_standardise(x.astype(jnp.float32), (0, 1, 2)) * scale + bias).astype(x.dtype)


def _group_norm(parameters: Any, x: Array) -> Array:
    scale, bias = parameters
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], GROUPS, -1)
    return (_standardise(grouped, (1, 2, 4)).reshape(x.shape) * scale + bias).astype(x.dtype)


def _conv(activation: Activation, parameters: Any, x: Array) -> Array:
    w, b, slope = parameters
    return activation(_convolve(x, w) + b, slope)


def _conv_norm(activation: Activation, parameters: Any, x: Array, stride: int = 1) -> Array:
    w, norm, slope = parameters
    return activation(_batch_norm(norm, _convolve(x, w, stride)), slope)


def _basic_block(stride: int, activation: Activation, parameters: Any, x: Array) -> Array:
    *first, w, norm, slope, shortcut = parameters
    y = _batch_norm(norm, _convolve(_conv_norm(activation, first, x, stride), w))
    if shortcut:
        w, norm = shortcut
        x = _batch_norm(norm, _convolve(x, w, stride))
    return activation(x + y, slope)


def _inverted_residual(stride: int, activation: Activation, parameters: Any, x: Array) -> Array:
    expand, depthwise, (w, norm) = parameters
    y = _conv_norm(activation, expand, x) if expand else x
    y = _batch_norm(norm, _convolve(_conv_norm(activation, depthwise, y, stride), w))
    return x + y if x.shape == y.shape else y


def _head(channels: int, dtype: Any) -> Layer:
    return Layer(_classify, (Shape((channels, CLASSES), dtype), Shape((CLASSES,), dtype)))


def _classify(activation: Activation, parameters: Any, x: Array) -> Array:
    w, b = parameters
    return x.mean((1, 2)) @ w + b


def _unet(activation: Activation, parameters: Any, x: Array) -> Array:
    down, up, head = parameters
    kept: list[Array] = []
    for level in down:
        if kept:
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = _each(activation, level, x)
        kept.append(x)
    kept.pop()
    for level in up:
        larger = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = _each(activation, level, jnp.concatenate([kept.pop(), larger], -1))
    return _convolve(x, head)


def _each(activation: Activation, level: Any, x: Array) -> Array:
    for w, norm, slope in level:
        x = activation(_group_norm(norm, _convolve(x, w)), slope)
    return x
