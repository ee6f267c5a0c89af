"""Trains a small classifier of handwritten digits with any of the five activations.

    python examples/train_digits.py --activation elu --model cnn

writes runs/digits/metrics.csv (a row an epoch), curves.png and model, an Orbax checkpoint of the parameters of the epoch
with the best validation accuracy. The test images are looked at once, with those parameters.
"""

import argparse
import csv
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import digits
import options
import plots
from classifiers import ACTIVATIONS, MODELS
from digits import Digits, Part

SCHEDULES = ("constant", "cosine", "exponential", "step")
OUTPUTS = ("metrics.csv", "curves.png", "model")
# images scored at a time, so that a large test set fits in memory
CHUNK = 1000


class Epoch(NamedTuple):
    """A row of metrics.csv: losses and gradient norms are means, the learning rate is that of the first step."""

    epoch: int
    loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    gradient_norm: float


class Run(NamedTuple):
    """The epochs trained, the best of them with its parameters, and whether Ctrl-C ended it."""

    epochs: list[Epoch]
    best: Epoch
    parameters: dict[str, Any]
    interrupted: bool


def build_parser() -> options.Parser:
    """Returns the parser of the command line."""
    parser = options.Parser("train_digits.py", "Train a small classifier of handwritten digits.")
    add = parser.add_argument
    add("--activation", choices=ACTIVATIONS, default="relu", help="activation of every hidden layer")
    add("--model", choices=MODELS, default="cnn", help="network")
    add("--epochs", type=options.positive_int, default=60, help="passes over the training images")
    add("--batch-size", type=options.positive_int, default=64, help="images a step")
    add("--learning-rate", type=options.positive_float, default=0.005, help="Adam's learning rate at the first step")
    add("--schedule", choices=SCHEDULES, default="cosine", help="course of the learning rate")
    add("--clip-norm", type=options.nonnegative_float, default=0.0, help="largest gradient norm; 0: no limit")
    add("--patience", type=options.natural, default=0, help="epochs without a better validation before a stop; 0: no stop")
    add("--seed", type=options.seed, default=0, help="seed of the weights, the batches and the shifts")
    add("--split-seed", type=options.seed, default=0, help="seed of the split into training, validation and test images")
    add("--out", type=options.path, default=Path("runs/digits"), help="directory to write")
    add("--data", type=options.path, help="an .npz file in the layout of Keras's mnist.npz, in place of the bundled digits")
    return parser


def make_schedule(name: str, rate: float, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step."""
    if name == "cosine":
        return optax.cosine_decay_schedule(rate, steps)
    if name == "exponential":
        return optax.exponential_decay(rate, steps, decay_rate=0.01)
    if name == "step":
        return optax.piecewise_constant_schedule(rate, {steps // 2: 0.1, steps * 3 // 4: 0.1})
    return optax.constant_schedule(rate)


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, key: Array, images: Array, labels: Array) -> tuple[Array, Array]:
    """Updates the model on a batch, shifted at random; returns the loss and the norm of its gradient."""
    images = digits.random_shift(jax.random.fold_in(key, optimizer.step[...]), images)

    def loss(model: nnx.Module) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value, optax.tree.norm(gradients)


@nnx.jit
def score(model: nnx.Module, images: Array, labels: Array) -> tuple[Array, Array]:
    """Returns the sum of the losses and the number of images classified correctly."""
    logits = model(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.sum(), (logits.argmax(-1) == labels).sum()


def evaluate(model: nnx.Module, part: Part) -> tuple[float, float]:
    """Returns the mean loss and the accuracy."""
    n = len(part.labels)
    sums = [score(model, part.images[i : i + CHUNK], part.labels[i : i + CHUNK]) for i in range(0, n, CHUNK)]
    loss, correct = np.sum(jax.device_get(sums), axis=0, dtype=np.float64) / n
    return float(loss), float(correct)


def train(model: nnx.Module, data: Digits, args: argparse.Namespace) -> Run:
    """Trains the model, until the epochs are over, patience is or Ctrl-C comes.

    Raises:
        FloatingPointError: the loss is not finite.
        KeyboardInterrupt: Ctrl-C came before the end of the first epoch.
    """
    count = len(data.train.labels)
    batches = count // args.batch_size
    schedule = make_schedule(args.schedule, args.learning_rate, args.epochs * batches)
    clip = [optax.clip_by_global_norm(args.clip_norm)] if args.clip_norm else []
    optimizer = nnx.Optimizer(model, optax.chain(*clip, optax.adam(schedule)), wrt=nnx.Param)
    key, order = jax.random.key(args.seed), np.random.default_rng(args.seed)
    epochs, best, parameters, interrupted = [], None, {}, False
    try:
        with tqdm(range(1, args.epochs + 1), unit="epoch") as progress:
            for number in progress:
                # every batch is full, so that the step is compiled once; the images left over are others each time
                shuffled = order.permutation(count)[: batches * args.batch_size].reshape(batches, -1)
                steps = [train_step(model, optimizer, key, data.train.images[i], data.train.labels[i]) for i in shuffled]
                loss, norm = np.mean(jax.device_get(steps), axis=0, dtype=np.float64)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} in epoch {number}")
                rate = float(schedule((number - 1) * batches))
                epoch = Epoch(number, float(loss), *evaluate(model, data.validation), rate, float(norm))
                # the first of the epochs with the best accuracy and, among those, the lowest loss
                if best is None or _merit(epoch) > _merit(best):
                    best, parameters = epoch, nnx.to_pure_dict(nnx.state(model, nnx.Param))
                epochs.append(epoch)
                progress.set_postfix(
                    loss=f"{loss:.4f}", accuracy=f"{epoch.validation_accuracy:.2%}", rate=f"{rate:.1e}", norm=f"{norm:.2g}"
                )
                if args.patience and number - best.epoch >= args.patience:
                    break
    except KeyboardInterrupt:
        if not epochs:
            raise
        interrupted = True
    return Run(epochs, best, parameters, interrupted)


def write_metrics(path: Path, run: Run) -> None:
    """Writes a row an epoch; without times, so that equal seeds give equal files."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Epoch._fields)
        writer.writerows([e.epoch, *(f"{value:.6g}" for value in e[1:])] for e in run.epochs)


def write_curves(path: Path, run: Run, title: str) -> None:
    """Plots the losses, the validation accuracy and the gradient norm by epoch."""
    figure, (losses, accuracy, norm) = plots.panels(title, "epoch", ("loss", "validation accuracy (%)", "gradient norm"))
    column = dict(zip(Epoch._fields, np.transpose(run.epochs), strict=True))
    style = {"marker": "." if len(run.epochs) == 1 else None}
    losses.semilogy(column["epoch"], column["loss"], color=plots.BLUE, label="training", **style)
    losses.semilogy(column["epoch"], column["validation_loss"], color=plots.ORANGE, label="validation", **style)
    accuracy.plot(column["epoch"], 100 * column["validation_accuracy"], color=plots.ORANGE, **style)
    norm.semilogy(column["epoch"], column["gradient_norm"], color=plots.BLUE, **style)
    for panel in (losses, accuracy, norm):
        panel.axvline(run.best.epoch, color=plots.GREY, linestyle=":", label="best epoch")
    losses.legend()
    norm.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)


def write(out: Path, scratch: Path, run: Run, title: str) -> None:
    """Writes the outputs to scratch, then moves them all to out, in place of a former run's."""
    write_metrics(scratch / "metrics.csv", run)
    write_curves(scratch / "curves.png", run, title)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((scratch / "model").absolute(), run.parameters)
    for name in OUTPUTS:
        if (out / name).exists():  # a directory with files cannot be replaced, only moved away
            (out / name).rename(scratch / f"former {name}")
        (scratch / name).rename(out / name)


def print_summary(args: argparse.Namespace, run: Run, accuracy: float, seconds: float) -> None:
    """Prints a table, and the test accuracy as the last line."""
    table = Table("training run", "")
    for name, value in {
        "activation": args.activation,
        "model": args.model,
        "parameters": f"{sum(p.size for p in jax.tree.leaves(run.parameters)):,}",
        "epochs run": len(run.epochs),
        "best epoch": run.best.epoch,
        "validation accuracy": f"{100 * run.best.validation_accuracy:.2f} %",
        "test accuracy": f"{100 * accuracy:.2f} %",
        "seconds": f"{seconds:.1f}",
        "written to": f"{args.out}: {', '.join(OUTPUTS)}",
    }.items():
        table.add_row(name, str(value))
    Console().print(table)
    print(f"test accuracy {100 * accuracy:.2f} %")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains and tests a classifier; argv is the command line without the program's name."""
    start = time.perf_counter()
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        data = digits.from_file(args.data, args.split_seed) if args.data else digits.bundled(args.split_seed)
    except ValueError as error:
        parser.error(f"argument --data: {error}")
    if args.batch_size > len(data.train.labels):
        parser.error(
            f"argument --batch-size: must be at most {len(data.train.labels)}, all training images, got {args.batch_size}"
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=args.out)
    except OSError as error:
        parser.error(f"argument --out: must be a directory to write to, got {str(args.out)!r}: {error.strerror}")
    kept = f"nothing was written to {args.out}"
    with scratch:
        try:
            size = data.train.images.shape[1:3]
            model = MODELS[args.model](size, data.classes, ACTIVATIONS[args.activation], nnx.Rngs(args.seed))
            run = train(model, data, args)
            write(args.out, Path(scratch.name), run, f"{args.activation} {args.model}")
            kept = f"{args.out} holds {len(run.epochs)} epochs and the model of epoch {run.best.epoch}"
            if run.interrupted:
                raise KeyboardInterrupt
            nnx.update(model, run.parameters)
            _, accuracy = evaluate(model, data.test)
        except FloatingPointError as error:
            parser.error(f"{error}; lower --learning-rate or set --clip-norm")
        except KeyboardInterrupt:
            print(f"interrupted: {kept}", file=sys.stderr)
            sys.exit(130)
    print_summary(args, run, accuracy, time.perf_counter() - start)


def _merit(epoch: Epoch) -> tuple[float, float]:
    return epoch.validation_accuracy, -epoch.validation_loss


if __name__ == "__main__":
    main()
