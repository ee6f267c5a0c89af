"""Trains one network with each of twelve activations, three and ten layers deep, and times each of them.

    python examples/compare_activations.py

classifies handwritten digits, with five networks per activation that differ in their seeds and train side by side. On these
digits a linear model does well. On digits moved by up to a pixel it does not, so relu and identity, with which the network
is linear, are compared there too. Writes to runs/compare_activations: compare_activations.csv (one row per activation, depth
and kind of images) and compare_activations.png.

The columns are
- accuracy: the share of test images classified correctly, mean and standard deviation over the seeds;
- epochs: the epoch in which 95 % of the validation images are first classified correctly, median over the seeds;
- dead: after training, the share of units that get no gradient from any training image;
- zeros, mean: after training, the share of the hidden layers' outputs that are 0, and their mean;
- gradient: before training, the norm of the gradient in the first layer;
- forward, backward: milliseconds of the function and of its backward pass on a million numbers.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console
from rich.table import Table

import jaxrelu
from common import digits, options, outputs, plots, training
from common.digits import Digits, Part
from jaxrelu.initializers import gain

DEPTHS, WIDTH, CLASSES, SEEDS, EPOCHS, BATCH, RATE = (3, 10), 64, 10, 5, 20, 64, 0.003
ELEMENTS = 1_000_000
SLOPE = 0.25  # where prelu's slopes start
OUTPUTS = ("compare_activations.csv", "compare_activations.png")


def leaky(slope: float) -> Callable[[Array], Array]:
    """Returns leaky_relu of a fixed slope."""
    return functools.partial(jaxrelu.leaky_relu, negative_slope=slope)


ACTIVATIONS = {
    "relu": jaxrelu.relu,
    "leaky_relu 0.01": leaky(0.01),
    "leaky_relu 0.1": leaky(0.1),
    "leaky_relu 0.3": leaky(0.3),
    "prelu": functools.partial(jaxrelu.prelu, negative_slope=SLOPE),
    "elu": jaxrelu.elu,
    "relu6": jaxrelu.relu6,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jax.nn.tanh,
    "swish": jax.nn.swish,
    "gelu": jax.nn.gelu,
    "identity": lambda x: x,
}
RECTIFIERS = tuple(ACTIVATIONS)[:7]
# kind of images, depth, activations
FULL = (
    ("centred", DEPTHS[0], tuple(ACTIVATIONS)),
    ("centred", DEPTHS[1], tuple(ACTIVATIONS)),
    ("moved", DEPTHS[0], ("relu", "identity")),
)
QUICK = (("centred", DEPTHS[1], ("relu", "elu", "sigmoid")),)


class Network(NamedTuple):
    """Weights of the hidden layers, each as wide as the image has pixels, and of the output."""

    kernels: Array  # (depth, WIDTH, WIDTH)
    biases: Array  # (depth, WIDTH)
    slopes: Array  # (depth,); prelu's alone are used
    head: Array  # (WIDTH, CLASSES)


class Batches(NamedTuple):
    """The images of all steps, of shape (epochs, steps, BATCH, WIDTH), and their labels, of shape (epochs, steps, BATCH)."""

    images: Array
    labels: Array


class Trained(NamedTuple):
    """What is seen of the networks of one activation and depth; each array has one element per seed."""

    correct: Array  # (epochs, seeds, images): whether an image held out is classified correctly
    gradient: Array
    dead: Array
    zeros: Array
    mean: Array


class Row(NamedTuple):
    """One row of the file: shares and accuracies from 0 to 1, epochs inf if never reached, times in milliseconds."""

    images: str
    depth: int
    activation: str
    accuracy: float
    deviation: float
    epochs_to_95: float
    dead: float
    zeros: float
    mean: float
    gradient: float
    forward_ms: float
    backward_ms: float


def scale(name: str) -> float:
    """Returns the activation's gain; for sigmoid and tanh 1, which is Glorot's scale between layers of equal width."""
    return 1.0 if name in ("sigmoid", "tanh") else gain(ACTIVATIONS[name])


def init(key: Array, scale: Array, depth: int) -> Network:
    """Returns a network whose weights are normal, with a standard deviation of scale / sqrt(WIDTH)."""
    hidden, head = jax.random.split(key)
    kernels = scale / math.sqrt(WIDTH) * jax.random.normal(hidden, (depth, WIDTH, WIDTH))
    weights = jax.random.normal(head, (WIDTH, CLASSES)) / math.sqrt(WIDTH)
    return Network(kernels, jnp.full((depth, WIDTH), 0.01), jnp.full(depth, SLOPE), weights)


# the activation is chosen at run time, so that one compilation serves all; without the checkpoint, each would keep for its
# backward pass what the others need
@functools.partial(jax.checkpoint, static_argnums=0)
def activate(names: tuple[str, ...], index: Array, x: Array, slope: Array) -> Array:
    """Returns the activation names[index] of x; prelu takes the slope."""
    choices = [
        jaxrelu.prelu if name == "prelu" else lambda x, slope, function=ACTIVATIONS[name]: function(x) for name in names
    ]
    return jax.lax.switch(index, choices, x, slope)


def forward(names: tuple[str, ...], index: Array, network: Network, x: Array) -> tuple[Array, tuple[Array, Array]]:
    """Returns the logits, and the inputs and outputs of the activations, each of shape (depth, examples, WIDTH)."""

    def layer(x: Array, weights: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        kernel, bias, slope = weights
        z = x @ kernel + bias
        h = activate(names, index, z, slope)
        return h, (z, h)

    x, hidden = jax.lax.scan(layer, x, network[:3])
    return x @ network.head, hidden


def inspect(names: tuple[str, ...], index: Array, network: Network, x: Array) -> tuple[Array, Array, Array]:
    """Returns the share of dead units, the share of outputs that are 0, and the mean output."""
    _, (z, h) = forward(names, index, network, x)
    _, pullback = jax.vjp(lambda z: jax.vmap(functools.partial(activate, names, index))(z, network.slopes), z)
    (slope,) = pullback(jnp.ones_like(z))
    return (slope == 0).all(1).mean(), (h == 0).mean(), h.mean()


@functools.partial(jax.jit, static_argnames=("names", "depth"))
def train(
    names: tuple[str, ...], index: Array, scale: Array, keys: Array, batches: Batches, held_out: Part, *, depth: int
) -> Trained:
    """Trains one network per key, all on the same batches."""
    optimizer = optax.adam(RATE)

    def loss(network: Network, batch: Batches) -> Array:
        logits, _ = forward(names, index, network, batch.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def step(state: tuple[Network, optax.OptState], batch: Batches) -> tuple[tuple[Network, optax.OptState], Array]:
        network, moments = state
        gradients = jax.grad(loss)(network, batch)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(network, updates), moments), jnp.linalg.norm(gradients.kernels[0])

    def epoch(
        states: tuple[Network, optax.OptState], batches: Batches
    ) -> tuple[tuple[Network, optax.OptState], tuple[Array, Array]]:
        states, norms = jax.lax.scan(jax.vmap(step, (0, None)), states, batches)
        logits, _ = jax.vmap(lambda network: forward(names, index, network, held_out.images))(states[0])
        return states, (logits.argmax(-1) == held_out.labels, norms)

    networks = jax.vmap(lambda key: init(key, scale, depth))(keys)
    (networks, _), (correct, norms) = jax.lax.scan(epoch, (networks, jax.vmap(optimizer.init)(networks)), batches)
    seen = batches.images[0].reshape(-1, WIDTH)
    return Trained(correct, norms[0, 0], *jax.vmap(lambda network: inspect(names, index, network, seen))(networks))


def make_data(images: str, data: Digits, epochs: int, seed: int) -> tuple[Batches, Part]:
    """Returns the batches of all epochs, each full, and the images held out: first those to validate, then those to test."""
    train, held_out = data.train, Part(*map(np.concatenate, zip(data.validation, data.test, strict=True)))
    rng = np.random.default_rng(seed)
    order = np.stack([training.batches(rng, len(train.labels), BATCH) for _ in range(epochs)])
    parts = [Part(train.images[order.ravel()], train.labels[order]), held_out]
    if images == "moved":
        keys = jax.random.split(jax.random.key(seed))
        parts = [Part(digits.random_shift(key, part.images), part.labels) for key, part in zip(keys, parts, strict=True)]
    batches, held_out = parts
    return (
        Batches(batches.images.reshape(*order.shape, WIDTH), batches.labels),
        Part(held_out.images.reshape(-1, WIDTH), held_out.labels),
    )


def time_passes(names: Sequence[str], repeats: int, key: Array) -> dict[str, list[float]]:
    """Returns the median milliseconds of each activation and of its backward pass on ELEMENTS numbers, measured in turns."""
    x, g = jax.random.normal(key, (2, ELEMENTS))

    def backward(function: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
        return lambda x, g: jax.vjp(function, x)[1](g)[0]

    passes = {
        (name, i): jax.jit(run).lower(*arguments).compile()
        for name in names
        for i, (run, arguments) in enumerate([(ACTIVATIONS[name], (x,)), (backward(ACTIVATIONS[name]), (x, g))])
    }
    times = {key: [] for key in passes}
    for _ in range(repeats + 1):
        for (name, i), run in passes.items():
            start = time.perf_counter()
            jax.block_until_ready(run(x, g) if i else run(x))
            times[name, i].append(1000 * (time.perf_counter() - start))
    # the first round warms up
    return {name: [float(np.median(times[name, i][1:])) for i in (0, 1)] for name in names}


def make_row(setting: tuple[str, int, str], trained: Trained, validation: int, times: list[float]) -> Row:
    """Returns the means over the seeds; the first `validation` of the images held out validate, the others test."""
    reached = trained.correct[..., :validation].mean(-1) >= 0.95
    epochs = np.where(reached.any(0), 1 + reached.argmax(0), math.inf)
    accuracy = trained.correct[-1, :, validation:].mean(-1)
    means = (float(np.mean(value)) for value in (trained.dead, trained.zeros, trained.mean, trained.gradient))
    return Row(*setting, float(accuracy.mean()), float(accuracy.std(ddof=1)), float(np.median(epochs)), *means, *times)


def miss(rows: list[Row], *, quick: bool) -> str:
    """Returns a sentence about the first figure that is not as expected, or an empty string."""
    found = {(row.images, row.depth, row.activation): row for row in rows}
    shallow, deep = DEPTHS
    relu, elu, sigmoid = (found["centred", deep, name] for name in ("relu", "elu", "sigmoid"))
    if not sigmoid.gradient < 1e-3 * relu.gradient:
        return f"sigmoid's gradient must be below a thousandth of relu's, got {sigmoid.gradient:.2g} and {relu.gradient:.2g}"
    if not abs(elu.mean) < relu.mean:
        return f"elu's mean output must be nearer 0 than relu's, got {elu.mean:.3f} and {relu.mean:.3f}"
    if quick:
        return ""
    for name in RECTIFIERS:
        for depth in DEPTHS:
            if (accuracy := found["centred", depth, name].accuracy) < 0.9:
                return f"{name}, {depth} layers: accuracy must be at least 90 %, got {100 * accuracy:.1f} %"
    if not sigmoid.accuracy < 0.5:
        return f"sigmoid must stall with {deep} layers, got an accuracy of {100 * sigmoid.accuracy:.1f} %"
    relu, linear = (found["moved", shallow, name].accuracy for name in ("relu", "identity"))
    if not linear < relu - 0.1:
        return f"on moved images relu must be 10 points above identity, got {100 * relu:.1f} % and {100 * linear:.1f} %"
    return ""


def draw(path: Path, rows: list[Row]) -> None:
    """Draws error, gradient, mean output and times, with one row per activation."""
    rows = [row for row in rows if row.images == "centred"]
    names = [row.activation for row in rows if row.depth == DEPTHS[-1]]
    labels = (
        "test error (%)",
        "gradient, first layer,\nbefore training (norm)",
        "mean output",
        "time on a million\nnumbers (ms)",
    )
    figure, panels = plots.columns("one network, many activations", names, labels)
    y = np.arange(len(names))
    styles = zip(DEPTHS, (plots.BLUE, plots.ORANGE), "os", (-0.15, 0.15), strict=True)
    for depth, color, marker, shift in styles:
        if not (found := [row for row in rows if row.depth == depth]):
            continue
        style = {"color": color, "label": f"{depth} hidden layers"}
        errors, deviations = ([100 * (1 - row.accuracy) for row in found], [100 * row.deviation for row in found])
        panels[0].errorbar(errors, y + shift, xerr=deviations, fmt=marker, **style)
        panels[1].plot([row.gradient for row in found], y + shift, marker, **style)
        panels[2].plot([row.mean for row in found], y + shift, marker, **style)
    for panel in panels[:2]:
        panel.set_xscale("log")
    panels[0].set_xticks([3, 10, 30, 90], labels=["3", "10", "30", "90"])
    panels[0].set_xticks([], minor=True)
    panels[3].barh(y - 0.2, [row.forward_ms for row in found], 0.4, color=plots.GREEN, label="forward")
    panels[3].barh(y + 0.2, [row.backward_ms for row in found], 0.4, color=plots.PURPLE, label="backward")
    handles = [handle for panel in (panels[1], panels[3]) for handle in panel.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def print_tables(rows: list[Row], times: dict[str, list[float]]) -> None:
    """Prints one table for each depth and kind of images, and one of times."""
    for (images, depth), group in itertools.groupby(rows, key=lambda row: (row.images, row.depth)):
        columns = ("activation", "accuracy, %", "epochs", "dead", "zeros", "mean", "gradient")
        table = Table(*columns, title=f"{depth} hidden layers, {images} images")
        for row in group:
            scores = f"{100 * row.accuracy:.1f} ± {100 * row.deviation:.1f}"
            epochs = f"{row.epochs_to_95:g}" if math.isfinite(row.epochs_to_95) else "-"
            shares = (f"{100 * value:.1f} %" for value in (row.dead, row.zeros))
            table.add_row(row.activation, scores, epochs, *shares, f"{row.mean:.3f}", f"{row.gradient:.2g}")
        Console().print(table)
    table = Table("activation", "forward, ms", "backward, ms", title=f"{ELEMENTS:,} numbers")
    for name, passes in times.items():
        table.add_row(name, *(f"{value:.2f}" for value in passes))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and times; argv is the command line without the program's name."""
    parser = options.demonstration("compare_activations.py", "Compare activations in a classifier of digits.", OUTPUTS)
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else FULL
    epochs, seeds, repeats = (1, 2, 3) if args.quick else (EPOCHS, SEEDS, 20)
    keys, rows = jax.random.split(jax.random.key(args.seed), seeds), []
    # the names that the compiled program chooses from: the same for both kinds of images, so that they share it
    choices = settings[0][2]
    with outputs.directory(parser, args.out) as directory:
        data = digits.bundled(args.seed)
        times = time_passes(choices, repeats, keys[0])
        with options.progress(total=sum(len(names) for *_, names in settings), unit="network") as progress:
            for images, depth, names in settings:
                batches, held_out = make_data(images, data, epochs, args.seed)
                for name in names:
                    progress.set_description(f"{name}, {depth} layers")
                    trained = train(choices, choices.index(name), scale(name), keys, batches, held_out, depth=depth)
                    validation = len(data.validation.labels)
                    rows.append(make_row((images, depth, name), jax.device_get(trained), validation, times[name]))
                    progress.update()
        with directory.publishing(*OUTPUTS) as scratch:
            outputs.table(scratch / "compare_activations.csv", Row._fields, rows)
            draw(scratch / "compare_activations.png", rows)
        print_tables(rows, times)
        print(f"written to {args.out}: {', '.join(OUTPUTS)}")
        if message := miss(rows, quick=args.quick):
            parser.fail(message)


if __name__ == "__main__":
    main()
