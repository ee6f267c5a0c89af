"""Kills 80 % of the units in three layers of a ReLU network, and compares cures: a leaky slope, ELU, and recycling.

    python examples/dying_relu.py

trains an 8-64-64-64-64-64-1 network on 2,048 points. At the start a large negative bias keeps many units from firing at any
point: they are dead. The cures are a leaky slope of 0.01 or 0.1, ELU, and jaxrelu.recycling, which restarts dead units with
fresh weights; each is tried with three seeds, as is no cure. Writes to runs/dying_relu: dying_relu.csv (one row per run: the
mean squared error as a share of the target's variance, and the share of hidden units that are dead) and dying_relu.png.
"""

import functools
import itertools
import math
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
from tqdm import tqdm

import jaxrelu
from common import options, outputs, plots
from jaxrelu.diagnostics import UnitStats, unit_stats
from jaxrelu.initializers import gain, kaiming_normal
from jaxrelu.recycling import Edge, recycle

POINTS, INPUTS, WIDTH, HIDDEN = 2048, 8, 64, 5
KILLED_LAYERS, KILLED_SHARE, KILLING_BIAS = (1, 2, 3), 0.8, -5.0
BATCH, EVERY = 128, 250
CHUNK = 40  # steps from one evaluation to the next
OUTPUTS = ("dying_relu.csv", "dying_relu.png")

Params = dict[str, dict[str, Array]]


# the activation of the hidden layers under each cure
CURES = {
    "none": jaxrelu.relu,
    "leaky 0.01": functools.partial(jaxrelu.leaky_relu, negative_slope=0.01),
    "leaky 0.1": functools.partial(jaxrelu.leaky_relu, negative_slope=0.1),
    "elu": jaxrelu.elu,
    "recycle": jaxrelu.relu,
}
ACTIVATIONS = tuple(dict.fromkeys(CURES.values()))
COLORS = (plots.GREY, plots.SKY, plots.BLUE, plots.GREEN, plots.ORANGE)


class Run(NamedTuple):
    """A run of one cure: the error and the share of dead units, before training and after every CHUNK steps."""

    cure: str
    seed: int
    mse: np.ndarray
    dead_share: np.ndarray


def draw_points(rng: np.random.Generator) -> tuple[Array, Array]:
    """Returns the inputs, uniform in [-1, 1], and a smooth target of variance 1."""
    x = rng.uniform(-1, 1, (POINTS, INPUTS)).astype(np.float32)
    a, b, c, d, e, f, g, h = x.T
    y = np.sin(np.pi * a * b) + 2 * c**2 + d * e + f + 0.5 * np.abs(g + h)
    return jnp.asarray(x), jnp.asarray((y - y.mean()) / y.std())


def draw_network(rng: np.random.Generator, activation: Callable[[Array], Array]) -> Params:
    """Returns Kaiming weights, and biases: KILLING_BIAS for the units that are killed, 0 for the others."""
    params = {}
    for i, shape in enumerate(itertools.pairwise([INPUTS, *[WIDTH] * HIDDEN, 1])):
        weights = gain(activation) / math.sqrt(shape[0]) * rng.standard_normal(shape)
        bias = np.zeros(shape[1])
        if i in KILLED_LAYERS:
            bias[rng.permutation(WIDTH)[: round(KILLED_SHARE * WIDTH)]] = KILLING_BIAS
        params[f"layer_{i}"] = {"kernel": jnp.float32(weights), "bias": jnp.float32(bias)}
    return params


def predict(activation: Array, params: Params, x: Array) -> tuple[Array, dict[str, UnitStats]]:
    """Returns the predictions and the statistics of each hidden layer.

    The activation is given as its index in ACTIVATIONS, so that all share one compilation.
    """
    stats = {}
    for i in range(HIDDEN):
        z = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        stats[f"units_{i}"] = unit_stats(z)
        x = jax.lax.switch(activation, ACTIVATIONS, z)
    out = x @ params[f"layer_{HIDDEN}"]["kernel"] + params[f"layer_{HIDDEN}"]["bias"]
    return out[:, 0], stats


def optimizer(recycling: bool, key: Array) -> optax.GradientTransformationExtraArgs:
    """Returns Adam, with recycling of dead units or without."""
    adam = optax.adam(1e-3)
    if not recycling:
        return optax.with_extra_args_support(adam)
    edges = [Edge(f"units_{i}", f"layer_{i}", [f"layer_{i + 1}"]) for i in range(HIDDEN)]
    return recycle(adam, edges, every=EVERY, key=key, init=kaiming_normal())


def train(name: str, seed: int, steps: int, progress: tqdm) -> Run:
    """Trains one network with a cure; the start is equally bad for all cures."""
    activation, recycling = jnp.int32(ACTIVATIONS.index(CURES[name])), name == "recycle"
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    points, params = draw_points(rng), draw_network(rng, CURES[name])
    state = optimizer(recycling, key).init(params)
    figures = [evaluate(activation, params, *points)]
    for _ in range(steps // CHUNK):
        params, state = advance(
            recycling, activation, params, state, key, rng.integers(POINTS, size=(CHUNK, BATCH)), *points
        )
        figures.append(jax.block_until_ready(evaluate(activation, params, *points)))
        progress.update(CHUNK)
    mse, dead_share = np.transpose(jax.device_get(figures))
    return Run(name, seed, mse, dead_share)


@jax.jit
def evaluate(activation: Array, params: Params, x: Array, y: Array) -> tuple[Array, Array]:
    """Returns the mean squared error and the share of dead units over all points."""
    out, stats = predict(activation, params, x)
    return ((out - y) ** 2).mean(), jnp.stack([layer.dead for layer in stats.values()]).mean()


@functools.partial(jax.jit, static_argnames="recycling")
def advance(
    recycling: bool, activation: Array, params: Params, state: optax.OptState, key: Array, batches: Array, x: Array, y: Array
) -> tuple[Params, optax.OptState]:
    """Returns the network and the optimizer's state after one step per row of batches, which holds indices of points."""
    transformation = optimizer(recycling, key)

    def step(carry: tuple[Params, optax.OptState], chosen: Array) -> tuple[tuple[Params, optax.OptState], None]:
        params, state = carry

        def loss(params: Params) -> tuple[Array, dict[str, UnitStats]]:
            out, stats = predict(activation, params, x[chosen])
            return ((out - y[chosen]) ** 2).mean(), stats

        gradients, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = transformation.update(gradients, state, params, stats=stats)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), batches)[0]


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Plots the error and the share of dead units by step: the median of the seeds, and their range."""
    labels = ("mean squared error\n(share of the variance)", "dead hidden units (%)")
    figure, panels = plots.panels("80 % of the units of three layers killed at the start", "step", labels)
    for name, color in zip(CURES, COLORS, strict=True):
        mine = [run for run in runs if run.cure == name]
        for panel, courses in zip(panels, ([r.mse for r in mine], [100 * r.dead_share for r in mine]), strict=True):
            steps = CHUNK * np.arange(len(courses[0]))
            panel.plot(steps, np.median(courses, 0), color=color, label=name)
            panel.fill_between(steps, np.min(courses, 0), np.max(courses, 0), color=color, alpha=0.15, linewidth=0)
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CURES), frameon=False)
    figure.savefig(path)


def print_table(runs: Sequence[Run], out: Path) -> None:
    """Prints one row per cure, with the range over the seeds."""
    table = Table("cure", "mean squared error", "dead hidden units", title="at the end, range over the seeds")
    for name in CURES:
        errors = [run.mse[-1] for run in runs if run.cure == name]
        dead = [100 * run.dead_share[-1] for run in runs if run.cure == name]
        table.add_row(name, f"{min(errors):.4f} to {max(errors):.4f}", f"{min(dead):.1f} to {max(dead):.1f} %")
    Console().print(table)
    print(f"written to {out}: {', '.join(OUTPUTS)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every cure on every seed; argv is the command line without the program's name."""
    parser = options.demonstration("dying_relu.py", "Compare cures of a network with many dead units.", OUTPUTS)
    args = parser.parse_args(argv)
    seeds, steps = (1, 600) if args.quick else (3, 2200)
    with outputs.directory(parser, args.out) as directory:
        with options.progress(total=len(CURES) * seeds * steps, unit="step") as progress:
            runs = [train(name, seed, steps, progress) for name in CURES for seed in options.seeds(args.seed, seeds)]
        ends = [(run.cure, run.seed, run.mse[-1], run.dead_share[-1]) for run in runs]
        with directory.publishing(*OUTPUTS) as scratch:
            outputs.table(scratch / "dying_relu.csv", ["cure", "seed", "mse", "dead_share"], ends)
            draw(scratch / "dying_relu.png", runs)
        print_table(runs, args.out)
        for untreated, cured in zip(runs[:seeds], runs[-seeds:], strict=True):
            if not (cured.mse[-1] <= untreated.mse[-1] / 2 and cured.dead_share[-1] <= 0.05):
                parser.fail(
                    "recycling must halve the error of no cure and leave at most 5 % dead; for seed "
                    f"{cured.seed} it left an error of {cured.mse[-1]:.4f} against {untreated.mse[-1]:.4f}, and "
                    f"{100 * cured.dead_share[-1]:.1f} % dead"
                )


if __name__ == "__main__":
    main()
