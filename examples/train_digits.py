"""Trains a small classifier of handwritten digits with any of the five activations.

    python examples/train_digits.py --activation elu --model cnn

writes to runs/digits: metrics.csv (one row per epoch), curves.png, units.png (by layer, the share of dead units and the
firing rate) and model, an Orbax checkpoint of the parameters of the epoch with the best validation accuracy. With these
parameters the test images are classified, once.

A unit is dead if no image activates it; the firing rate is the share of images and positions that activate a unit. Both are
taken on the validation images. --recycle restarts dead units while training, by what it sees in the training batches.
"""

import argparse
import functools
import math
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

from common import digits, options, outputs, plots, training
from common.classifiers import ACTIVATIONS, MODELS
from common.digits import Digits, Part
from common.outputs import Outputs
from jaxrelu.diagnostics import UnitStats, merge, to_scalars
from jaxrelu.initializers import kaiming_normal
from jaxrelu.recycling import Edge, recycle

SCHEDULES = ("constant", "cosine", "exponential", "step")
OUTPUTS = ("metrics.csv", "curves.png", "units.png", "model")
UNITS = ("dead", "firing_rate")
# images evaluated at a time, so that a large test set fits in memory; of the bundled digits 180 validate and 360 test, so
# that one compilation serves both
CHUNK = 180


class Epoch(NamedTuple):
    """One row of metrics.csv: loss and gradient norm are means over the steps, the learning rate is that of the first step.

    Each layer adds two columns, for example "hidden1/dead" and "hidden1/firing_rate": shares over the validation images.
    """

    epoch: int
    loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    gradient_norm: float
    units: dict[str, float]


class Run(NamedTuple):
    """The epochs trained, the best of them with its parameters, the units recycled, and whether Ctrl-C ended it."""

    epochs: list[Epoch]
    best: Epoch
    parameters: dict[str, Any]
    recycled: int
    interrupted: bool


def build_parser() -> options.Parser:
    """Returns the parser of the command line."""
    parser = options.Parser("train_digits.py", "Train a small classifier of handwritten digits.")
    add = parser.add_argument
    add("--activation", choices=ACTIVATIONS, default="relu", help="activation of every hidden layer")
    add("--model", choices=MODELS, default="cnn", help="network")
    add("--epochs", type=options.positive_int, default=60, help="passes over the training images")
    add("--batch-size", type=options.positive_int, default=64, help="images per step")
    add("--learning-rate", type=options.positive_float, default=0.005, help="Adam's learning rate at the first step")
    add("--schedule", choices=SCHEDULES, default="cosine", help="how the learning rate changes over the steps")
    add("--clip-norm", type=options.nonnegative_float, default=0.0, help="largest gradient norm; 0: no limit")
    add(
        "--patience", type=options.natural, default=0, help="stop after so many epochs without a better validation; 0: never"
    )
    add("--recycle", type=options.natural, default=0, help="restart dead units every so many steps; 0: never")
    add("--seed", type=options.seed, default=0, help="seed of the weights, the batches and the shifts")
    add("--split-seed", type=options.seed, default=0, help="seed of the split into training, validation and test images")
    add("--out", type=options.path, default=Path("runs/digits"), help="directory to write")
    add(
        "--data", type=options.path, help="an .npz file with the arrays of Keras's mnist.npz, in place of the bundled digits"
    )
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


def make_optimizer(model: nnx.Module, schedule: optax.Schedule, args: argparse.Namespace) -> nnx.Optimizer:
    """Returns Adam; the options decide whether gradients are clipped and dead units recycled."""
    clip = [optax.clip_by_global_norm(args.clip_norm)] if args.clip_norm else []
    transformation = optax.chain(*clip, optax.adam(schedule))
    if args.recycle:
        edges = [Edge(producer, producer, [consumer]) for producer, consumer in model.EDGES]
        init = kaiming_normal(ACTIVATIONS[args.activation].function)
        transformation = recycle(transformation, edges, every=args.recycle, key=jax.random.key(args.seed), init=init)
    return nnx.Optimizer(model, transformation, wrt=nnx.Param)


@nnx.jit
def score(model: nnx.Module, images: Array, labels: Array) -> tuple[Array, Array, dict[str, UnitStats]]:
    """Returns the sum of the losses, the number of images classified correctly, and the statistics of each layer's units."""
    logits, stats = training.observed(model, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.sum(), (logits.argmax(-1) == labels).sum(), stats


def evaluate(model: nnx.Module, part: Part) -> tuple[float, float, dict[str, float]]:
    """Returns the mean loss, the accuracy, and the share of dead units and the firing rate of each layer."""
    n = len(part.labels)
    scores = [score(model, part.images[i : i + CHUNK], part.labels[i : i + CHUNK]) for i in range(0, n, CHUNK)]
    loss, correct = np.sum(jax.device_get([sums for *sums, _ in scores]), axis=0, dtype=np.float64) / n
    stats = {name: functools.reduce(merge, [found[name] for *_, found in scores]) for name, _ in model.EDGES}
    numbers = to_scalars(stats)
    return float(loss), float(correct), {f"{name}/{key}": numbers[f"{name}/{key}"] for name in stats for key in UNITS}


def train(model: nnx.Module, data: Digits, args: argparse.Namespace) -> Run:
    """Trains the model until all epochs are done, --patience stops it, or Ctrl-C is pressed.

    Raises:
        FloatingPointError: the loss is not finite.
        KeyboardInterrupt: Ctrl-C was pressed before the end of the first epoch.
    """
    count = len(data.train.labels)
    steps = count // args.batch_size
    schedule = make_schedule(args.schedule, args.learning_rate, args.epochs * steps)
    optimizer = make_optimizer(model, schedule, args)
    key, order = jax.random.key(args.seed), np.random.default_rng(args.seed)
    epochs, best, parameters, interrupted = [], None, {}, False
    try:
        with tqdm(range(1, args.epochs + 1), unit="epoch") as progress:
            for number in progress:
                seen = [
                    training.train_step(model, optimizer, key, data.train.images[i], data.train.labels[i], args.recycle > 0)
                    for i in training.batches(order, count, args.batch_size)
                ]
                loss, norm = np.mean(jax.device_get(seen), axis=0, dtype=np.float64)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} in epoch {number}")
                rate = float(schedule((number - 1) * steps))
                validation_loss, accuracy, units = evaluate(model, data.validation)
                epoch = Epoch(number, float(loss), validation_loss, accuracy, rate, float(norm), units)
                # the best accuracy wins; among equal accuracies the lowest loss, and among equal losses the first epoch
                if best is None or _merit(epoch) > _merit(best):
                    best, parameters = epoch, nnx.to_pure_dict(nnx.state(model, nnx.Param))
                epochs.append(epoch)
                progress.set_postfix(
                    loss=f"{loss:.4f}",
                    accuracy=f"{accuracy:.2%}",
                    rate=f"{rate:.1e}",
                    norm=f"{norm:.2g}",
                    dead=_by_layer(epoch, "dead"),
                    firing=_by_layer(epoch, "firing_rate"),
                )
                if args.patience and number - best.epoch >= args.patience:
                    break
    except KeyboardInterrupt:
        if not epochs:
            raise
        interrupted = True
    recycled = int(optimizer.opt_state.recycled[...].sum()) if args.recycle else 0
    return Run(epochs, best, parameters, recycled, interrupted)


def write_metrics(directory: Outputs, run: Run) -> None:
    """Writes one row per epoch; without times, so that equal seeds give equal files."""
    header = [*Epoch._fields[:-1], *run.best.units]
    directory.table("metrics.csv", header, [(*e[:-1], *e.units.values()) for e in run.epochs])


def write_curves(path: Path, run: Run, title: str) -> None:
    """Plots the losses, the validation accuracy and the gradient norm by epoch."""
    figure, (losses, accuracy, norm) = plots.panels(title, "epoch", ("loss", "validation accuracy (%)", "gradient norm"))
    column = dict(zip(Epoch._fields[:-1], np.transpose([e[:-1] for e in run.epochs]), strict=True))
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


def write_units(path: Path, run: Run, title: str) -> None:
    """Plots the share of dead units and the firing rate of each layer by epoch."""
    figure, panels = plots.panels(title, "epoch", ("dead units (%)", "firing rate (%)"))
    numbers = [e.epoch for e in run.epochs]
    colors = (plots.BLUE, plots.ORANGE, plots.GREEN)
    for panel, key in zip(panels, UNITS, strict=True):
        names = [name for name in run.best.units if name.endswith(f"/{key}")]
        for name, color in zip(names, colors, strict=False):
            shares = [100 * e.units[name] for e in run.epochs]
            marker = "." if len(numbers) == 1 else None
            panel.plot(numbers, shares, color=color, label=name.removesuffix(f"/{key}"), marker=marker)
        panel.set_ylim(bottom=0)
    panels[0].legend()
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)


def write(directory: Outputs, run: Run, title: str) -> None:
    """Writes all files; those of an earlier run are replaced."""
    write_metrics(directory, run)
    write_curves(directory.scratch / "curves.png", run, title)
    write_units(directory.scratch / "units.png", run, title)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory.scratch / "model").absolute(), run.parameters)
    directory.publish(*OUTPUTS)
    directory.kept = f"{directory.out} holds {len(run.epochs)} epochs and the model of epoch {run.best.epoch}"


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
        "dead units, by layer": _by_layer(run.best, "dead"),
        "firing rate, by layer": _by_layer(run.best, "firing_rate"),
        **({"units recycled": run.recycled} if args.recycle else {}),
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
    with outputs.directory(parser, args.out) as directory:
        size = data.train.images.shape[1:3]
        model = MODELS[args.model](size, data.classes, ACTIVATIONS[args.activation], nnx.Rngs(args.seed))
        try:
            run = train(model, data, args)
        except FloatingPointError as error:
            parser.fail(f"{error}; lower --learning-rate or set --clip-norm")
        write(directory, run, f"{args.activation} {args.model}")
        if run.interrupted:
            raise KeyboardInterrupt
        nnx.update(model, run.parameters)
        _, accuracy, _ = evaluate(model, data.test)
    print_summary(args, run, accuracy, time.perf_counter() - start)
    # the accuracy of naming the same class for every image
    floor = float(np.mean(data.test.labels == np.bincount(data.train.labels).argmax()))
    if accuracy <= floor:
        parser.fail(
            f"the test accuracy must be above {100 * floor:.2f} %, the share of one class, got {100 * accuracy:.2f} %"
        )


def _by_layer(epoch: Epoch, key: str) -> str:
    return " ".join(f"{value:.1%}" for name, value in epoch.units.items() if name.endswith(f"/{key}"))


def _merit(epoch: Epoch) -> tuple[float, float]:
    return epoch.validation_accuracy, -epoch.validation_loss


if __name__ == "__main__":
    main()
