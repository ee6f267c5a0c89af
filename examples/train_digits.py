"""Trains a small classifier of handwritten digits with any of the five activations.

    python examples/train_digits.py --activation elu --model cnn

writes to runs/digits: metrics.csv (one row per epoch), curves.png, units.png (by layer, the share of dead units and the
firing rate) and model, an Orbax checkpoint of the epoch with the best validation accuracy: the parameters, and the running
statistics of batch norm. With these the test images are classified, once.

A unit is dead if no image activates it; the firing rate is the share of images and positions that activate a unit. Both are
taken on the validation images. --recycle restarts dead units while training, by what it sees in the training batches. With
--model cnn_norm, the cnn with batch norm, it resets their running statistics too.
"""

import argparse
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

from common import digits, options, outputs, runs, training
from common.classifiers import ACTIVATIONS, MODELS
from common.digits import Digits, Part
from common.runs import OUTPUTS, UNITS, Epoch, Run, by_layer
from jaxrelu.diagnostics import UnitStats, merge, to_scalars
from jaxrelu.initializers import kaiming_normal
from jaxrelu.recycling import recycle

BATCH = 64
SCHEDULES = ("constant", "cosine", "exponential", "step")
# images evaluated at a time, so that a large test set fits in memory; of the bundled digits 180 validate and 360 test, so
# that one compilation serves both
CHUNK = 180


def build_parser() -> options.Parser:
    """Returns the parser of the command line."""
    parser = options.Parser(
        "train_digits.py", "Train a small classifier of handwritten digits.", OUTPUTS, "--model mlp --activation elu"
    )
    add = parser.option
    add("--activation", "activation of every hidden layer", choices=ACTIVATIONS, default="relu")
    add("--model", "network; cnn_norm is the cnn with batch norm behind each convolution", choices=MODELS, default="cnn")
    add("--epochs", "passes over the training images", type=options.positive_int, default=60)
    parser.add_argument(
        "--batch-size",
        type=options.positive_int,
        help=f"images per step (default: {BATCH}, or all training images if they are fewer)",
    )
    add("--learning-rate", "Adam's learning rate at the first step", type=options.positive_float, default=0.005)
    add("--schedule", "how the learning rate changes over the steps", choices=SCHEDULES, default="cosine")
    add("--clip-norm", "largest gradient norm; 0: no limit", type=options.nonnegative_float, default=0.0)
    add("--patience", "stop after so many epochs without a better one; 0: never", type=options.natural, default=0)
    add("--recycle", "restart dead units every so many steps; 0: never", type=options.natural, default=0)
    add("--seed", "seed of the weights, the batches and the shifts", type=options.seed, default=0)
    add("--split-seed", "seed of the split into training, validation and test images", type=options.seed, default=0)
    add("--out", "directory to write", type=options.path, default=Path("runs/digits"))
    parser.add_argument(
        "--data",
        type=options.path,
        help="an .npz file with the arrays of Keras's mnist.npz (default: scikit-learn's 1,797 digits)",
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
        init = kaiming_normal(ACTIVATIONS[args.activation].function)
        transformation = recycle(transformation, model.EDGES, every=args.recycle, key=jax.random.key(args.seed), init=init)
    return nnx.Optimizer(model, transformation, wrt=nnx.Param)


@nnx.jit
def score(model: nnx.Module, images: Array, labels: Array) -> tuple[Array, Array, dict[str, UnitStats]]:
    """Returns the sum of the losses, the number of images classified correctly, and the statistics of each layer's units."""
    logits, stats = training.observed(model, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.sum(), (logits.argmax(-1) == labels).sum(), stats


def evaluate(model: nnx.Module, part: Part) -> tuple[float, float, dict[str, float]]:
    """Returns the mean loss, the accuracy, and the share of dead units and the firing rate of each layer."""
    model.eval()  # batch norm takes the running statistics
    n = len(part.labels)
    scores = [score(model, part.images[i : i + CHUNK], part.labels[i : i + CHUNK]) for i in range(0, n, CHUNK)]
    loss, correct = np.sum(jax.device_get([sums for *sums, _ in scores]), axis=0, dtype=np.float64) / n
    stats = {e.stats: functools.reduce(merge, [found[e.stats] for *_, found in scores]) for e in model.EDGES}
    numbers = to_scalars(stats)
    return float(loss), float(correct), {f"{name}/{key}": numbers[f"{name}/{key}"] for name in stats for key in UNITS}


def train(model: nnx.Module, data: Digits, args: argparse.Namespace) -> Run:
    """Trains the model until all epochs are done, --patience stops it, or a signal comes.

    Raises:
        FloatingPointError: a loss is not finite.
        KeyboardInterrupt: a signal came before the end of the first epoch.
    """
    count = len(data.train.labels)
    steps = count // args.batch_size
    schedule = make_schedule(args.schedule, args.learning_rate, args.epochs * steps)
    optimizer = make_optimizer(model, schedule, args)
    key, order = jax.random.key(args.seed), np.random.default_rng(args.seed)
    run = None
    try:
        with options.progress(range(1, args.epochs + 1), unit="epoch") as progress:
            for number in progress:
                model.train()
                seen = [
                    training.train_step(model, optimizer, key, data.train.images[i], data.train.labels[i], args.recycle > 0)
                    for i in training.batches(order, count, args.batch_size)
                ]
                loss, norm = np.mean(jax.device_get(seen), axis=0, dtype=np.float64)
                rate = float(schedule((number - 1) * steps))
                validation_loss, accuracy, units = evaluate(model, data.validation)
                # the last step of an epoch shows in the validation alone
                for name, value in {"loss": loss, "validation loss": validation_loss}.items():
                    if not math.isfinite(value):
                        raise FloatingPointError(f"the {name} is {value} in epoch {number}")
                epoch = Epoch(number, float(loss), validation_loss, accuracy, rate, float(norm), units)
                # the best accuracy wins; among equal accuracies the lowest loss, and among equal losses the first epoch
                if run is None or _merit(epoch) > _merit(run.best):
                    best, state = epoch, nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
                recycled = int(optimizer.opt_state.recycled[...].sum()) if args.recycle else 0
                # in one assignment, so that a signal leaves an epoch whole
                run = Run([*(run.epochs if run else []), epoch], best, state, recycled, None)
                # in 80 columns no more has room; the other figures are in metrics.csv
                progress.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.1%}")
                if args.patience and number - best.epoch >= args.patience:
                    break
    except KeyboardInterrupt as interrupt:
        if run is None:
            raise
        return run._replace(interrupt=interrupt)
    return run


def print_summary(args: argparse.Namespace, model: nnx.Module, run: Run, accuracy: float, seconds: float) -> None:
    """Prints a table, and the test accuracy as the last line."""
    table = Table("training run", "")
    for name, value in {
        "activation": args.activation,
        "model": args.model,
        "parameters": f"{sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))):,}",
        "epochs run": len(run.epochs),
        "best epoch": run.best.epoch,
        "validation accuracy": f"{100 * run.best.validation_accuracy:.2f} %",
        "dead units, by layer": by_layer(run.best, "dead"),
        "firing rate, by layer": by_layer(run.best, "firing_rate"),
        **({"units recycled": run.recycled} if args.recycle else {}),
        "test accuracy": f"{100 * accuracy:.2f} %",
        "seconds": f"{seconds:.1f}",
        "written to": f"{args.out}: {', '.join(OUTPUTS)}",
    }.items():
        table.add_row(name, str(value))
    Console().print(table)
    if remark := runs.on_dead_units(run.best, args.activation, recycling=args.recycle > 0):
        Console().print(remark, highlight=False)
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
    count = len(data.train.labels)
    if args.batch_size is None:
        args.batch_size = min(BATCH, count)
    if args.batch_size > count:
        parser.error(f"argument --batch-size: must be at most {count}, all training images, got {args.batch_size}")
    with outputs.directory(parser, args.out) as directory:
        size = data.train.images.shape[1:3]
        model = MODELS[args.model](size, data.classes, ACTIVATIONS[args.activation], nnx.Rngs(args.seed))
        try:
            run = train(model, data, args)
        except FloatingPointError as error:
            parser.fail(f"{error}; lower --learning-rate or {'--clip-norm' if args.clip_norm else 'set --clip-norm'}")
        runs.write(directory, run, f"{args.activation} {args.model}")
        if run.interrupt:
            raise run.interrupt
        nnx.update(model, run.state)
        _, accuracy, _ = evaluate(model, data.test)
        print_summary(args, model, run, accuracy, time.perf_counter() - start)
        # the accuracy of naming the same class for every image
        floor = float(np.mean(data.test.labels == np.bincount(data.train.labels).argmax()))
        if accuracy <= floor:
            parser.fail(
                f"the test accuracy must be above {100 * floor:.2f} %, the share of one class, got {100 * accuracy:.2f} %"
            )


def _merit(epoch: Epoch) -> tuple[float, float]:
    return epoch.validation_accuracy, -epoch.validation_loss


if __name__ == "__main__":
    main()
