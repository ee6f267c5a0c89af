"""Trains a MobileNet-style network with relu6 on the digits, then rounds its activations to 8 bits and fewer.

    python examples/relu6_convnet.py

A number of 8 bits has 256 levels, which must be spread over the range of the activations. relu6 never exceeds 6, so that its
range is known before training, and two neighbouring levels lie 6/255 apart. relu has no bound: its range must be observed,
layer by layer, and the largest value seen sets the distance. The network is trained with relu6 and with relu, in float32 and
in bfloat16, and tested with every activation rounded to such levels.

With --lean the loss is trained through `jaxrelu.memory.lean`, which keeps less for the backward pass: the memory is printed.

Howard et al. 2017, MobileNets (arXiv:1704.04861).
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import jaxrelu
from common import digits, options, outputs, plots, training
from common.digits import Digits
from jaxrelu import initializers, memory

BITS = (8, 6, 5, 4, 3, 2)
# channels and stride of each depthwise separable block
BLOCKS = ((64, 1), (128, 2), (128, 1))
BATCH = 64
EPOCHS, QUICK_EPOCHS = 16, 4
Activation = Callable[[Array], Array]
Blocks = Sequence[tuple[int, int]]
OUTPUTS = ("accuracy.csv", "ranges.csv", "relu6_convnet.png")


class Depthwise(nnx.Module):
    """A 3 x 3 convolution of each channel by itself, as nine products of shifted images.

    It computes what nnx.Conv does with one group per channel. XLA's CPU backend takes five times as long for the gradient of
    that.
    """

    def __init__(self, channels: int, stride: int, init: Initializer, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 1, channels)))
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        _, height, width, _ = x.shape
        kernel, x = self.kernel[...].astype(self.dtype), jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return sum(
            kernel[i, j] * x[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(3)
            for j in range(3)
        )


class MobileNet(nnx.Module):
    """Convolutions, depthwise separable after the first, with batch norm and activation behind each; takes one channel.

    Parameters and batch norm's statistics are float32; the computation is in `dtype`.
    """

    def __init__(self, activation: Activation, blocks: Blocks, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        init = initializers.kaiming_normal(activation, in_axis=(0, 1, 2))
        conv = functools.partial(nnx.Conv, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)
        width, widths, convolutions = 32, [32], [conv(1, 32, (3, 3))]
        for channels, stride in blocks:
            convolutions += [Depthwise(width, stride, init, dtype, rngs), conv(width, channels, (1, 1))]
            widths += [width, channels]
            width = channels
        self.activation = activation
        self.convolutions = nnx.List(convolutions)
        self.norms = nnx.List(nnx.BatchNorm(n, momentum=0.9, dtype=dtype, rngs=rngs) for n in widths)
        self.output = nnx.Linear(width, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.apply(x)[0]

    def apply(self, x: Array, top: Array | None = None, levels: float = 0.0) -> tuple[Array, Array]:
        """Returns the logits, and the largest output of each activation.

        Args:
            x: images.
            top: if given, one number per activation: its outputs are rounded to levels from 0 to this number, at most.
            levels: how many steps the levels make, one less than their number.
        """
        largest = []
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = self.activation(norm(convolution(x)))
            if top is not None:
                # in float32: bfloat16 has 8 bits too, at other places
                step = top[i] / levels
                x = (step * jnp.clip(jnp.round(x.astype(jnp.float32) / step), 0, levels)).astype(x.dtype)
            largest.append(x.max().astype(jnp.float32))
        return self.output(x.mean((1, 2))).astype(jnp.float32), jnp.stack(largest)


class Row(NamedTuple):
    """One row of accuracy.csv: the share of test images classified correctly without rounding, and for each of BITS."""

    activation: str
    dtype: str
    accuracy: float
    rounded: tuple[float, ...]
    largest: np.ndarray


@nnx.jit
def predict(model: MobileNet, images: Array) -> tuple[Array, Array]:
    """Returns the classes, and the largest output of each activation."""
    logits, largest = model.apply(images)
    return logits.argmax(-1), largest


@nnx.jit
def predict_rounded(model: MobileNet, images: Array, top: Array, levels: Array) -> Array:
    """Returns the classes with every activation rounded."""
    return model.apply(images, top, levels)[0].argmax(-1)


def loss_of(model: MobileNet) -> tuple[Callable[..., tuple[Array, nnx.State]], nnx.State, nnx.State]:
    """Returns the loss as a function of parameters, other state, images and labels, and parameters and other state.

    It also returns the new statistics of BatchNorm: `lean` takes no model that changes its own state.
    """
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters: nnx.State, rest: nnx.State, images: Array, labels: Array) -> tuple[Array, nnx.State]:
        model = nnx.merge(graph, parameters, rest, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean(), nnx.state(model, nnx.BatchStat)

    return loss, parameters, rest


@nnx.jit
def lean_step(model: MobileNet, optimizer: nnx.Optimizer, key: Array, images: Array, labels: Array) -> None:
    """Updates the model on a batch as `training.train_step` does, through `lean`."""
    images = digits.random_shift(jax.random.fold_in(key, optimizer.step[...]), images)
    loss, parameters, rest = loss_of(model)
    gradients, statistics = jax.grad(memory.lean(loss), has_aux=True)(parameters, rest, images, labels)
    optimizer.update(model, gradients)
    nnx.update(model, statistics)


def compare(args: argparse.Namespace, data: Digits) -> memory.Comparison:
    """Returns how much memory the gradient for one batch takes, as it is and through `lean`."""
    model = MobileNet(jaxrelu.relu6, BLOCKS[:1] if args.quick else BLOCKS, jnp.float32, nnx.Rngs(args.seed))
    model.train()
    loss, *state = loss_of(model)
    return memory.compare(loss, *state, data.train.images[:BATCH], data.train.labels[:BATCH], has_aux=True)


def train(model: MobileNet, data: Digits, epochs: int, seed: int, lean: bool, progress: tqdm) -> None:
    """Trains the model on the training and the validation images; nothing is chosen by validation."""
    images = np.concatenate([data.train.images, data.validation.images])
    labels = np.concatenate([data.train.labels, data.validation.labels])
    schedule = optax.cosine_decay_schedule(0.01, epochs * (len(labels) // BATCH))
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    key, order = jax.random.key(seed), np.random.default_rng(seed)
    model.train()
    for _ in range(epochs):
        for batch in training.batches(order, len(labels), BATCH):
            (lean_step if lean else training.train_step)(model, optimizer, key, images[batch], labels[batch])
        progress.update()
    model.eval()


def examine(name: str, dtype: DTypeLike, data: Digits, args: argparse.Namespace, progress: tqdm) -> Row:
    """Trains with an activation in a dtype, and tests without rounding and with it."""
    blocks = BLOCKS[:1] if args.quick else BLOCKS
    # under jit, as otherwise the draws of each layer would be compiled one by one
    model = nnx.jit(lambda: MobileNet(getattr(jaxrelu, name), blocks, dtype, nnx.Rngs(args.seed)))()
    train(model, data, QUICK_EPOCHS if args.quick else EPOCHS, args.seed, args.lean, progress)
    _, largest = predict(model, data.train.images)
    # relu6's range needs no data; relu's is that seen on the training images
    top = jnp.full_like(largest, 6.0) if name == "relu6" else largest
    images, labels = data.test.images, data.test.labels
    accuracy = np.mean(predict(model, images)[0] == labels)
    rounded = [np.mean(predict_rounded(model, images, top, jnp.float32(2**bits - 1)) == labels) for bits in BITS]
    return Row(name, jnp.dtype(dtype).name, float(accuracy), tuple(map(float, rounded)), np.asarray(largest))


def write(directory: outputs.Outputs, rows: Sequence[Row]) -> None:
    """Writes the accuracies, the ranges and the picture."""
    accuracies = [(row.activation, row.dtype, row.accuracy, *row.rounded) for row in rows]
    header = ["activation", "dtype", "accuracy", *(f"accuracy_{bits}_bits" for bits in BITS)]
    ranges = [
        (row.activation, row.dtype, layer, largest, (6.0 if row.activation == "relu6" else largest) / 255)
        for row in rows
        for layer, largest in enumerate(row.largest, 1)
    ]
    with directory.publishing(*OUTPUTS) as scratch:
        outputs.table(scratch / "accuracy.csv", header, accuracies)
        outputs.table(scratch / "ranges.csv", ["activation", "dtype", "layer", "largest", "step_8_bits"], ranges)
        draw(scratch / "relu6_convnet.png", rows)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draws the accuracy over the number of bits, and the range of each layer."""
    figure, (accuracy, ranges) = plots.panels(
        "relu6's range is known before training, relu's must be observed",
        "activation, from the input on",
        ("test accuracy (%)", "largest output"),
        height=2.8,
        sharex=False,
    )
    for row in rows:
        style = {
            "color": plots.BLUE if row.activation == "relu6" else plots.ORANGE,
            "linestyle": "-" if row.dtype == "float32" else "--",
            "marker": "o" if row.activation == "relu6" else "s",
            "fillstyle": "full" if row.dtype == "float32" else "none",
            "label": f"{row.activation}, {row.dtype}",
        }
        accuracy.plot(BITS, 100 * np.array(row.rounded), **style)
        ranges.plot(np.arange(1, 1 + len(row.largest)), row.largest, **style)
    accuracy.set_xlabel("bits of an activation")
    accuracy.legend()
    figure.savefig(path)


def print_summary(rows: Sequence[Row]) -> None:
    """Prints a table and, as the last line, the accuracies with relu6."""
    table = Table("test accuracy (%)", *(f"{row.activation} {row.dtype}" for row in rows))
    for i, name in enumerate(["as it is", *(f"{bits} bits" for bits in BITS)]):
        table.add_row(name, *(f"{100 * (row.accuracy, *row.rounded)[i]:.1f}" for row in rows))
    tops = [np.array([6.0]) if row.activation == "relu6" else row.largest for row in rows]
    table.add_row("least end of a range", *(f"{top.min():.1f}" for top in tops))
    table.add_row("largest end of a range", *(f"{top.max():.1f}" for top in tops))
    table.add_row("largest step at 8 bits", *(f"{top.max() / 255:.4f}" for top in tops))
    Console().print(table)
    row = rows[0]
    print(f"relu6: test accuracy {100 * row.accuracy:.2f} %, with 8-bit activations {100 * row.rounded[0]:.2f} %")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, rounds, and checks the accuracies; argv is the command line without the program's name."""
    parser = options.demonstration(
        "relu6_convnet.py", "Train a MobileNet-style network with relu6; round it to 8 bits.", OUTPUTS
    )
    parser.add_argument("--lean", action="store_true", help="train through jaxrelu.memory.lean, and print the memory")
    args = parser.parse_args(argv)
    with outputs.directory(parser, args.out) as directory:
        data = digits.bundled(args.seed)
        cases = [(name, dtype) for dtype in (jnp.float32, jnp.bfloat16) for name in ("relu6", "relu")]
        cases = cases[: 1 if args.quick else None]
        with options.progress(total=len(cases) * (QUICK_EPOCHS if args.quick else EPOCHS), unit="epoch") as progress:
            rows = [examine(*case, data, args, progress) for case in cases]
        write(directory, rows)
        if args.lean:
            compared = compare(args, data)
            print(f"the gradient for a batch of {BATCH} images, relu6 in float32:\n{compared}")
            plain, leaner = (row.temp_bytes or 0 for row in compared[:2])
            # on a TPU, and on the CPU before JAX 0.11.1, lean plans nothing for this network
            plans = jax.default_backend() != "tpu" and jax.__version_info__ >= (0, 11, 1)
            if plans and not args.quick and leaner > 0.6 * plain:
                parser.fail(f"lean must take at most 0.6 of the memory, got {leaner / plain:.2f}")
        print_summary(rows)
        wanted, granted = (60, 3) if args.quick else (97, 1)
        for row in rows:
            accuracy, lost = 100 * row.accuracy, 100 * (row.accuracy - row.rounded[0])
            if accuracy < wanted or lost > granted:
                parser.fail(
                    f"{row.activation} in {row.dtype} must reach {wanted} % and lose at most {granted} points at 8 bits, "
                    f"got {accuracy:.2f} % and {lost:.2f} points"
                )


if __name__ == "__main__":
    main()
