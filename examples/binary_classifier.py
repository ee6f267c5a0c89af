"""Trains a classifier with a ReLU layer, sigmoid outputs and binary cross-entropy: on random labels, and on real ones.

    python examples/binary_classifier.py

first trains a 64-128-2 network (64 inputs, 128 hidden units, two outputs) on 32 random inputs with random labels. The loss
starts near ln 2, that of tossing a coin. As the labels do not depend on the inputs, the network can only learn the 32 by
heart: on fresh draws the loss rises. Then a 30-128-2 network learns scikit-learn's 569 breast-cancer cases, whose labels do
depend on the inputs, and is tested on held-out cases, for three splits of the cases. Writes to runs/binary_classifier:
binary_classifier.csv (one row per epoch) and binary_classifier.png.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import jaxrelu.nnx
from common import options, outputs, plots, training
from jaxrelu.initializers import kaiming_normal

EPOCHS, SPLITS = 10, 3
RANDOM, REAL = "random labels", "breast cancer"
WANTED, QUICK_WANTED = 0.95, 0.9
OUTPUTS = ("binary_classifier.csv", "binary_classifier.png")
# one object for all networks, so that networks of equal sizes share a compilation
ADAM = optax.adam(0.01)


class Cases(NamedTuple):
    """Inputs of shape (n, features), float32, and labels of shape (n, 2), 0 or 1, float32."""

    inputs: np.ndarray
    labels: np.ndarray


class Classifier(nnx.Module):
    """A hidden ReLU layer of 128 units and two outputs; returns logits, which sigmoid turns into probabilities."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(features, 128, kernel_init=kaiming_normal(), rngs=rngs)
        self.activation = jaxrelu.nnx.ReLU()
        self.output = nnx.Linear(128, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.output(self.activation(self.hidden(x)))


def loss(model: Classifier, inputs: Array, labels: Array) -> Array:
    """Returns the binary cross-entropy of the sigmoid outputs, in nats.

    It is computed from logits: in float32 sigmoid(17) is 1, and 1 - 1 has no logarithm.
    """
    return optax.sigmoid_binary_cross_entropy(model(inputs), labels).mean()


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, inputs: Array, labels: Array) -> Array:
    """Updates the model on a batch; returns the loss before the update."""
    value, gradients = nnx.value_and_grad(loss)(model, inputs, labels)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def score(model: Classifier, inputs: Array, labels: Array) -> tuple[Array, Array]:
    """Returns the loss, and the share of outputs on the right side of a probability of one half."""
    return loss(model, inputs, labels), ((model(inputs) > 0) == (labels > 0)).mean()


class Epoch(NamedTuple):
    """One row of the file; the loss on the training cases is the mean over the epoch's steps."""

    data: str
    split: int
    epoch: int
    loss: float
    held_out_loss: float
    held_out_accuracy: float


def train(name: str, split: int, cases: Cases, held_out: Cases, batch: int, seed: int) -> list[Epoch]:
    """Trains a classifier; prints the losses of each epoch, and returns the epochs."""
    model = Classifier(cases.inputs.shape[1], nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    order, epochs = np.random.default_rng(seed), []
    for number in range(1, EPOCHS + 1):
        chosen = training.batches(order, len(cases.inputs), batch)
        losses = [train_step(model, optimizer, cases.inputs[i], cases.labels[i]) for i in chosen]
        scores = score(model, *held_out)
        epochs.append(Epoch(name, split, number, float(np.mean(jax.device_get(losses))), *map(float, scores)))
        print(
            f"{name}, split {split}, epoch {number:2}: loss {epochs[-1].loss:.4f}, held-out {epochs[-1].held_out_loss:.4f}"
        )
    return epochs


def random_cases(n: int, rng: np.random.Generator) -> Cases:
    """Returns uniform inputs, each with two labels that are drawn by tossing a coin, whatever the input."""
    return Cases(rng.random((n, 64), np.float32), rng.integers(0, 2, (n, 2)).astype(np.float32))


def breast_cancer(split_seed: int) -> tuple[Cases, Cases]:
    """Returns 455 cases to train and 114 held out, with equal shares of the classes, standardised by those to train."""
    inputs, labels = load_breast_cancer(return_X_y=True)
    inputs, held_inputs, labels, held_labels = train_test_split(
        inputs, labels, test_size=0.2, stratify=labels, random_state=split_seed
    )
    mean, deviation = inputs.mean(0), inputs.std(0)

    def cases(inputs: np.ndarray, labels: np.ndarray) -> Cases:
        return Cases(((inputs - mean) / deviation).astype(np.float32), np.eye(2, dtype=np.float32)[labels])

    return cases(inputs, labels), cases(held_inputs, held_labels)


def draw(path: Path, epochs: list[Epoch]) -> None:
    """Plots the losses by epoch, for random labels and for real ones."""
    ylabels = [f"{name}:\nloss (nats)" for name in (RANDOM, REAL)]
    figure, panels = plots.panels("binary cross-entropy: learning by heart, and learning", "epoch", ylabels, height=2.4)
    for panel, name in zip(panels, (RANDOM, REAL), strict=True):
        draw_losses(panel, [epoch for epoch in epochs if epoch.data == name])
        panel.set_ylim(bottom=0)
    panels[0].legend()
    panels[1].set_xticks(range(1, EPOCHS + 1))
    figure.savefig(path)


def draw_losses(panel: Axes, epochs: list[Epoch]) -> None:
    """Plots the losses of every split."""
    for split in sorted({epoch.split for epoch in epochs}):
        rows = [epoch for epoch in epochs if epoch.split == split]
        label = ("training", "held out") if split == 0 else (None, None)
        panel.plot([row.epoch for row in rows], [row.loss for row in rows], "o-", color=plots.BLUE, label=label[0])
        panel.plot(
            [row.epoch for row in rows], [row.held_out_loss for row in rows], "s--", color=plots.ORANGE, label=label[1]
        )
    panel.axhline(math.log(2), color=plots.GREY, linestyle=":", label="ln 2, a coin")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the classifiers; argv is the command line without the program's name."""
    parser = options.demonstration(
        "binary_classifier.py", "Train a binary classifier on random labels and on real ones.", OUTPUTS
    )
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    with outputs.directory(parser, args.out) as directory:
        epochs = train(RANDOM, 0, random_cases(32, rng), random_cases(1000, rng), 32, args.seed)
        for split, seed in enumerate(options.seeds(args.seed, 1 if args.quick else SPLITS)):
            epochs += train(REAL, split, *breast_cancer(seed), 32, seed)
        with directory.publishing(*OUTPUTS) as scratch:
            outputs.table(scratch / "binary_classifier.csv", Epoch._fields, epochs)
            draw(scratch / "binary_classifier.png", epochs)
        table = Table("data", "split", "first loss", "last loss", "held out", "accuracy")
        for first, last in zip(epochs[::EPOCHS], epochs[EPOCHS - 1 :: EPOCHS], strict=True):
            losses = first.loss, last.loss, last.held_out_loss
            accuracy = f"{100 * last.held_out_accuracy:.1f} %"
            table.add_row(last.data, str(last.split), *(f"{value:.4f}" for value in losses), accuracy)
        Console().print(table)
        accuracy = np.mean([epoch.held_out_accuracy for epoch in epochs[2 * EPOCHS - 1 :: EPOCHS]])
        print(f"written to {args.out}: {', '.join(OUTPUTS)}")
        print(f"held-out accuracy {100 * accuracy:.1f} %")
        wanted = QUICK_WANTED if args.quick else WANTED
        if accuracy < wanted:
            parser.fail(f"the held-out accuracy must be at least {100 * wanted:.0f} %, got {100 * accuracy:.1f} %")
        first, memorised = epochs[0], epochs[EPOCHS - 1]
        if not abs(first.loss - math.log(2)) <= 0.15:
            parser.fail(f"with random labels the loss must start near ln 2, {math.log(2):.4f}, got {first.loss:.4f}")
        if not memorised.loss < math.log(2) < memorised.held_out_loss:
            parser.fail(
                f"random labels must be learnt by heart only, got losses {memorised.loss:.4f}, {memorised.held_out_loss:.4f}"
            )


if __name__ == "__main__":
    main()
