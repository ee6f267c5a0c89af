"""A training run: its epochs, and the files that it leaves."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from common import outputs, plots
from common.classifiers import ACTIVATIONS
from common.outputs import Outputs

OUTPUTS = ("metrics.csv", "curves.png", "units.png", "model")
UNITS = ("dead", "firing_rate")
# the share of a layer's units from which on being dead is worth a word
MANY = 0.1


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
    """The epochs trained, the best of them and the model's state in it, the units recycled, and the signal that ended it."""

    epochs: list[Epoch]
    best: Epoch
    state: dict[str, Any]  # parameters and running statistics
    recycled: int
    interrupt: KeyboardInterrupt | None  # None if no signal came


def by_layer(epoch: Epoch, key: str) -> str:
    """Returns the shares of the layers, from the input on."""
    return " ".join(f"{value:.1%}" for name, value in epoch.units.items() if name.endswith(f"/{key}"))


def on_dead_units(epoch: Epoch, activation: str, *, recycling: bool) -> str:
    """Returns what the largest share of dead units in a layer means, and what to try; empty if it is small."""
    share, layer = max((share, name.removesuffix("/dead")) for name, share in epoch.units.items() if name.endswith("/dead"))
    if share < MANY:
        return ""
    seen = f"No validation image activates {share:.1%} of the units of {layer}."
    if jax.grad(ACTIVATIONS[activation].function)(-1.0) != 0:
        return f"{seen} With {activation} they still get a gradient, through the slope below 0, and go on learning."
    if share == 1:
        return f"{seen} So the network cannot tell images apart. Lower --learning-rate or set --clip-norm."
    recycle = "a smaller --recycle" if recycling else "--recycle 100"
    return (
        f"{seen} This is no harm in itself: the other units do the work. But those that no training image activates either "
        f"get no gradient and learn no more. To keep more of them alive, try {recycle} or --activation elu."
    )


def write_metrics(path: Path, run: Run) -> None:
    """Writes one row per epoch; without times, so that equal seeds give equal files."""
    header = [*Epoch._fields[:-1], *run.best.units]
    outputs.table(path, header, [(*e[:-1], *e.units.values()) for e in run.epochs])


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


def write_model(path: Path, run: Run) -> None:
    """Saves the model's state in the best epoch with Orbax."""
    # Orbax writes from many threads, and on a full disk each prints a traceback. So the room is tried first, with random
    # bytes, which no file system compresses; 256 KiB are more than the small files around the arrays take
    room = path.with_name("room")
    room.write_bytes(os.urandom(sum(array.nbytes for array in jax.tree.leaves(run.state)) + 2**18))
    room.unlink()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), run.state)


def write(directory: Outputs, run: Run, title: str) -> None:
    """Writes all files; those of an earlier run are replaced."""
    epochs = "1 epoch" if len(run.epochs) == 1 else f"{len(run.epochs)} epochs"
    with directory.publishing(*OUTPUTS, holding=f"{epochs} and the model of epoch {run.best.epoch}") as scratch:
        write_metrics(scratch / "metrics.csv", run)
        write_curves(scratch / "curves.png", run, title)
        write_units(scratch / "units.png", run, title)
        write_model(scratch / "model", run)
