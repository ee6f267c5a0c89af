"""Trains a deep network at a rate that is too high, and shows what keeps it from exploding.

    python examples/stable_training.py

relu is unbounded, so after a step that is too long the activations grow from layer to layer, and the gradient with them.
If that is prevented, long steps can still kill units: push them below 0 for every example, where they get no gradient and
stay. A network of twelve hidden layers learns the digits by gradient descent with momentum: at a suitable learning rate, at
15 times that rate, and at that high rate with each of several cures. At the end a relu is put where it does not belong, on
an output that must be negative.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console
from rich.table import Table

import jaxrelu
from common import digits, options, outputs, plots
from common.digits import Digits
from jaxrelu.diagnostics import unit_stats
from jaxrelu.initializers import kaiming_normal

WIDTH, DEPTH, BATCH = 64, 12, 64
STEPS, QUICK_STEPS = 400, 60
LOW, HIGH = 0.02, 0.3
OUTPUTS = ("steps.csv", "summary.csv", "negative_output.csv", "stable_training.png")

Parameters = list[dict[str, Array]]


class Recipe(NamedTuple):
    """How to train: the optimizer for a given number of steps, whether to use batch norm, and how to draw the run."""

    optimizer: Callable[[int], optax.GradientTransformation]
    norm: bool
    style: dict[str, Any]


class Run(NamedTuple):
    """Loss, gradient norm and share of dead units at each step, and the share of test images classified right at the end.

    The norm is that of the gradient before clipping. A hidden unit is dead if no validation image activates it; the share is
    NaN once activations are not finite.
    """

    loss: np.ndarray
    gradient_norm: np.ndarray
    dead: np.ndarray
    accuracy: float


def sgd(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Returns gradient descent with momentum."""
    return optax.sgd(rate, momentum=0.9)


def clipped(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Returns the same with clipping: a gradient whose norm is above 1 is scaled down to norm 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), sgd(rate))


def cosine(steps: int) -> optax.Schedule:
    """Returns a rate that rises from 0 over the first tenth of the steps, then falls to 0 along a cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, HIGH, steps // 10, steps)


def stairs(steps: int) -> optax.Schedule:
    """Returns a rate that is divided by 10 at a quarter of the steps, and again at three quarters."""
    return optax.piecewise_constant_schedule(HIGH, {steps // 4: 0.1, steps * 3 // 4: 0.1})


def exponential(steps: int) -> optax.Schedule:
    """Returns a rate that falls by the same factor each step, at the end to a hundredth of the first."""
    return optax.exponential_decay(HIGH, steps, decay_rate=0.01)


def _style(color: str, linestyle: str = "-") -> dict[str, Any]:
    return {"color": color, "linestyle": linestyle}


RECIPES = {
    f"rate {LOW}": Recipe(lambda steps: sgd(LOW), False, _style(plots.GREY, ":")),
    f"rate {HIGH}": Recipe(lambda steps: sgd(HIGH), False, _style("black")),
    "clipping": Recipe(lambda steps: clipped(HIGH), False, _style(plots.SKY)),
    "clipping, warm-up cosine": Recipe(lambda steps: clipped(cosine(steps)), False, _style(plots.BLUE)),
    "clipping, step": Recipe(lambda steps: clipped(stairs(steps)), False, _style(plots.GREEN, "--")),
    "clipping, exponential": Recipe(lambda steps: clipped(exponential(steps)), False, _style(plots.PURPLE, "-.")),
    "batch norm": Recipe(lambda steps: sgd(HIGH), True, _style(plots.ORANGE)),
}
SUITS, EXPLODES, CLIPS, *CURES = RECIPES
QUICK = (EXPLODES, CURES[0])


def init(key: Array, sizes: Sequence[int]) -> Parameters:
    """Returns weights, biases, and scales, which batch norm alone uses."""
    weights = kaiming_normal(jaxrelu.relu)
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"weights": weights(k, (m, n)), "bias": jnp.full(n, 0.01), "scale": jnp.ones(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def forward(parameters: Parameters, x: Array, norm: bool = False) -> tuple[Array, Array]:
    """Returns the output, and the pre-activations of all hidden units, of shape (n, units)."""
    seen = []
    for layer in parameters[:-1]:
        z = x @ layer["weights"]
        if norm:  # with the mean and variance of this batch
            z = layer["scale"] * jax.nn.standardize(z, axis=0, epsilon=1e-5)
        z = z + layer["bias"]
        seen.append(z)
        x = jaxrelu.relu(z)
    return x @ parameters[-1]["weights"] + parameters[-1]["bias"], jnp.concatenate(seen, axis=1)


def train(recipe: Recipe, data: Digits, steps: int, seed: int) -> Run:
    """Trains by a recipe on random minibatches."""
    train_images, held_images, test_images = (jnp.asarray(part.images.reshape(-1, 64)) for part in data[:3])
    labels = jnp.asarray(data.train.labels)
    optimizer = recipe.optimizer(steps)

    def loss(parameters: Parameters, chosen: Array) -> Array:
        logits, _ = forward(parameters, train_images[chosen], recipe.norm)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

    def step(carry: Any, chosen: Array) -> tuple[Any, tuple[Array, Array, Array]]:
        parameters, state = carry
        value, gradients = jax.value_and_grad(loss)(parameters, chosen)
        stats = unit_stats(forward(parameters, held_images, recipe.norm)[1])
        dead = jnp.where(jnp.isfinite(stats.max).all(), stats.dead.mean(), jnp.nan)
        updates, state = optimizer.update(gradients, state, parameters)
        return (optax.apply_updates(parameters, updates), state), (value, optax.tree.norm(gradients), dead)

    @jax.jit
    def run(parameters: Parameters, batches: Array) -> tuple[Any, Array]:
        (parameters, _), seen = jax.lax.scan(step, (parameters, optimizer.init(parameters)), batches)
        return seen, forward(parameters, test_images, recipe.norm)[0]

    batches = np.random.default_rng(seed).integers(len(labels), size=(steps, BATCH))
    seen, logits = run(init(jax.random.key(seed), [64, *[WIDTH] * DEPTH, data.classes]), batches)
    # logits that are not finite count as wrong
    right = (logits.argmax(-1) == data.test.labels) & jnp.isfinite(logits).all(-1)
    return Run(*jax.device_get(seen), accuracy=float(right.mean()))


# the last function of a network whose output must be negative, to be compared
ENDS: dict[str, tuple[Callable[[Array], Array], dict[str, Any]]] = {
    "relu": (jaxrelu.relu, _style(plots.ORANGE)),
    "nothing": (lambda z: z, _style(plots.BLUE)),
    "minus softplus": (lambda z: -jax.nn.softplus(z), _style(plots.GREEN, "--")),
}
QUICK_ENDS = tuple(ENDS)[:2]


@functools.partial(jax.jit, static_argnums=(0, 1))
def fit_negative(end: Callable[[Array], Array], steps: int, key: Array) -> tuple[Array, Array]:
    """Fits y = -1 - x^2 on [-1, 1] by a network with `end` as its last function; returns losses and gradient norms."""
    x = jnp.linspace(-1.0, 1.0, 65)[:, None]
    optimizer = optax.adam(0.01)

    def loss(parameters: Parameters) -> Array:
        return jnp.mean((end(forward(parameters, x)[0]) + 1 + x**2) ** 2)

    def step(carry: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
        parameters, state = carry
        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(parameters, updates), state), (value, optax.tree.norm(gradients))

    parameters = init(key, [1, 32, 1])
    return jax.lax.scan(step, (parameters, optimizer.init(parameters)), length=steps)[1]


def write(directory: outputs.Outputs, runs: dict[str, Run], fits: dict[str, np.ndarray]) -> None:
    """Writes every step, the final figures of each run, and the picture."""
    columns = ("loss", "gradient_norm", "dead_share")
    steps = [
        (name, i, *map(float, seen)) for name, run in runs.items() for i, seen in enumerate(zip(*run[:3], strict=True), 1)
    ]
    ends = [(name, *figures(run)) for name, run in runs.items()]
    fitted = [(name, i, *map(float, seen)) for name, fit in fits.items() for i, seen in enumerate(fit.T, 1)]
    summary = ("training", "loss", "largest_gradient_norm", "dead_share", "test_accuracy")
    with directory.publishing(*OUTPUTS) as scratch:
        outputs.table(scratch / "steps.csv", ("training", "step", *columns), steps)
        outputs.table(scratch / "summary.csv", summary, ends)
        outputs.table(scratch / "negative_output.csv", ("last_function", "step", *columns[:2]), fitted)
        draw(scratch / "stable_training.png", runs, fits)


def figures(run: Run) -> tuple[float, float, float, float]:
    """Returns the mean loss of the last 20 steps, the largest gradient norm, the last dead share and the accuracy."""
    norms = run.gradient_norm[np.isfinite(run.gradient_norm)]
    return float(run.loss[-20:].mean()), float(norms.max()), float(run.dead[-1]), run.accuracy


def draw(path: Path, runs: dict[str, Run], fits: dict[str, np.ndarray]) -> None:
    """Draws loss, gradient norm and share of dead units by step, and the losses of the network with a negative output."""
    labels = (
        "training loss",
        "gradient norm,\nlargest of 10 steps",
        "dead units (%)",
        "loss of an output\nthat must be negative",
    )
    title = f"Twelve hidden layers of relu at learning rate {HIGH}, and the cures"
    figure, (losses, norms, dead, negative) = plots.panels(title, "step", labels, height=2.3, sharex=False)
    for name, run in runs.items():
        # single steps are noisy: of ten the mean is drawn, of gradient norms the largest; a cross marks the last finite
        panel_values = ((losses, run.loss, np.mean), (norms, run.gradient_norm, np.max), (dead, 100 * run.dead, np.mean))
        for panel, values, of_ten in panel_values:
            tens = {end: values[end - 10 : end] for end in range(10, 1 + len(values), 10)}
            points = [(end, of_ten(ten[np.isfinite(ten)])) for end, ten in tens.items() if np.isfinite(ten).any()]
            panel.plot(*zip(*points, strict=True), label=name, **RECIPES[name].style)
            if not np.isfinite(values).all():
                panel.plot(*points[-1], "x", color="black", markersize=9, markeredgewidth=2)
    losses.set_yscale("log")
    losses.set_ylim(0.003, 1e4)
    losses.axhline(math.log(10), color=plots.GREY, linewidth=0.8)
    losses.annotate("chance", (1, math.log(10)), (-2, 3), ("axes fraction", "data"), "offset points", ha="right")
    norms.set_yscale("log")
    dead.set_ylim(-2, 102)
    for panel in (losses, norms, dead):
        panel.set_xlabel("step")
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    for name, (loss, _) in fits.items():
        negative.semilogy(np.arange(1, 1 + len(loss)), loss, label=name, **ENDS[name][1])
    negative.legend(title="last function")
    figure.savefig(path)


def print_summary(runs: dict[str, Run], fits: dict[str, np.ndarray]) -> None:
    """Prints two tables and, as the last line, the accuracies without and with a cure."""
    console = Console()
    table = Table("training", "last loss", "largest gradient", "dead", "test accuracy")
    for name, run in runs.items():
        loss, norm, dead, accuracy = figures(run)
        last, share = (f"{loss:.3f}", f"{100 * dead:.0f} %") if math.isfinite(loss) else ("NaN", "NaN")
        table.add_row(name, last, f"{norm:.3g}", share, f"{100 * accuracy:.1f} %")
    console.print(table)
    table = Table("last function, for a negative output", "last loss", "last gradient norm")
    for name, (loss, norm) in fits.items():
        table.add_row(name, f"{loss[-1]:.2g}", f"{norm[-1]:.2g}")
    console.print(table)
    exploded, cured = runs[EXPLODES], runs[CURES[0]]
    print(f"rate {HIGH}: test accuracy {100 * exploded.accuracy:.1f} %, with {CURES[0]} {100 * cured.accuracy:.1f} %")


def check(parser: options.Parser, quick: bool, runs: dict[str, Run], fits: dict[str, np.ndarray]) -> None:
    """Exits with code 1 if a figure is not what the script is to show."""
    if math.isfinite(runs[EXPLODES].loss[-1]):
        parser.fail(f"the loss at rate {HIGH} must end in NaN, got {runs[EXPLODES].loss[-1]}")
    for name in CURES[:1] if quick else CURES:
        wanted = 20 if quick else 80
        if not runs[name].accuracy >= wanted / 100:
            parser.fail(f"{name} must reach {wanted} %, got {100 * runs[name].accuracy:.1f} %")
    if not quick:
        clips, suits = runs[CLIPS].dead[-1], runs[SUITS].dead[-1]
        if not (clips >= 0.2 and clips >= 2 * suits):
            parser.fail(
                f"clipping alone must leave 20 % of the units dead and twice as many as rate {LOW}, got "
                f"{100 * clips:.0f} % and {100 * suits:.0f} %"
            )
    (stuck, gradient), fitted = fits["relu"][:, -1], fits["nothing"][0, -1]
    # with `not`, as a comparison with NaN is false
    if not (gradient == 0 and stuck >= 1 and fitted <= (0.5 if quick else 0.01)):
        parser.fail(
            "with a relu on a negative output the network must learn nothing, without it reach a loss near 0, got losses "
            f"{stuck:.2g} and {fitted:.2g}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains by each recipe and checks; argv is the command line without the program's name."""
    parser = options.demonstration(
        "stable_training.py", "Keep a deep network from exploding at a high learning rate.", OUTPUTS
    )
    args = parser.parse_args(argv)
    steps, names, ends = (QUICK_STEPS, QUICK, QUICK_ENDS) if args.quick else (STEPS, tuple(RECIPES), tuple(ENDS))
    with outputs.directory(parser, args.out) as directory:
        data = digits.bundled(args.seed)
        with options.progress(names, unit="run") as progress:
            runs = {name: train(RECIPES[name], data, steps, args.seed) for name in progress}
        key = jax.random.key(args.seed)
        fits = {name: np.array(fit_negative(ENDS[name][0], STEPS, key)) for name in ends}
        write(directory, runs, fits)
        print_summary(runs, fits)
        check(parser, args.quick, runs, fits)


if __name__ == "__main__":
    main()
