"""Shows when the derivative of relu at 0 matters, and what a wrong rule there does.

    python examples/relu_prime.py

In exact arithmetic the input of a relu is almost never 0; in 16 bits it often is. The script measures two things:

1. for each precision, the share of minibatches whose gradient changes when relu's derivative at 0 goes from 0 to 1;
2. the test accuracy in bfloat16 for derivatives at 0 from 0 to 100, with two rules for the backward pass at 0. jaxrelu's
   rule multiplies the incoming gradient by the derivative. The code published with the paper replaces the incoming gradient
   by the derivative, and only with this rule does the accuracy collapse at large derivatives.

Bertoin et al. 2021, Numerical influence of ReLU'(0) on backpropagation (arXiv:2106.12915).
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table

import jaxrelu
from common import digits, options, outputs, plots, training
from common.digits import Digits, Part
from jaxrelu.initializers import kaiming_normal

DTYPES = ("bfloat16", "float16", "float32", "float64")
KINKS = (0.0, 0.5, 1.0, 10.0, 100.0)
WIDTH, DEPTH, BATCH = 256, 3, 64
STEPS, QUICK_STEPS = 300, 60
OUTPUTS = ("minibatches.csv", "accuracy.csv", "relu_prime.png")

Activation = Callable[[Array], Array]
Parameters = list[tuple[Array, Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def assigned_relu(x: Array, kink: float) -> Array:
    """Returns relu(x), with the published code's rule: at 0 the gradient is the constant, whatever the incoming gradient."""
    return jnp.maximum(x, 0)


def _assigned_relu_forward(x: Array, kink: float) -> tuple[Array, Array]:
    return jnp.maximum(x, 0), x


def _assigned_relu_backward(kink: float, x: Array, g: Array) -> tuple[Array]:
    return (jnp.where(x == 0, jnp.full_like(g, kink), jnp.where(x > 0, g, jnp.zeros_like(g))),)


assigned_relu.defvjp(_assigned_relu_forward, _assigned_relu_backward)

RULES: dict[str, Callable[..., Array]] = {"scaled": jaxrelu.relu, "assigned": assigned_relu}


class Accuracy(NamedTuple):
    """One row of accuracy.csv: the share of test images classified correctly, as mean, least and largest over the seeds."""

    rule: str
    kink: float
    mean: float
    low: float
    high: float


def init(key: Array, dtype: DTypeLike) -> Parameters:
    """Returns the weights and biases of the hidden layers and of the output."""
    sizes = [64, *[WIDTH] * DEPTH, 10]
    weights = kaiming_normal(jaxrelu.relu)
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (weights(k, (m, n), dtype), jnp.full(n, 0.01, dtype)) for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def logits(parameters: Parameters, images: Array, activation: Activation, dtype: DTypeLike) -> Array:
    """Returns the logits, computed in `dtype` throughout."""
    parameters, x = jax.tree.map(lambda p: p.astype(dtype), (parameters, images))
    for weights, bias in parameters[:-1]:
        x = activation(x @ weights + bias)
    weights, bias = parameters[-1]
    return x @ weights + bias


def loss(parameters: Parameters, images: Array, labels: Array, activation: Activation, dtype: DTypeLike) -> Array:
    """Returns the cross-entropy, computed in float32 or wider as usual in mixed precision."""
    wide = jnp.promote_types(dtype, jnp.float32)
    z = logits(parameters, images, activation, dtype).astype(wide)
    return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()


# plain gradient descent: Adam divides the gradient by its size, which would hide that it is wrong
OPTIMIZER = optax.sgd(0.1)


@functools.partial(jax.jit, static_argnames=("activation", "dtype", "other"))
def train(
    parameters: Parameters,
    batches: tuple[Array, Array],
    activation: Activation,
    dtype: DTypeLike,
    other: Activation | None = None,
) -> tuple[Parameters, Array]:
    """Trains on the batches, one after the other.

    Args:
        parameters: where to start; updated in their own precision, which is at least that of the computation.
        batches: images of shape (steps, n, 64) and labels.
        activation: of every hidden layer.
        dtype: of the computation.
        other: if given, an activation whose gradients are compared with those of `activation`.

    Returns:
        The parameters and, for each step, whether the gradient with `other` differs.
    """

    def step(carry: Any, batch: tuple[Array, Array]) -> tuple[Any, Array]:
        parameters, state = carry
        gradients = jax.grad(loss)(parameters, *batch, activation, dtype)
        differs = jnp.array(False)
        if other is not None:
            others = jax.grad(loss)(parameters, *batch, other, dtype)
            pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True)
            differs = jnp.array([(a != b).any() for a, b in pairs]).any()
        updates, state = OPTIMIZER.update(gradients, state, parameters)
        return (optax.apply_updates(parameters, updates), state), differs

    (parameters, _), differs = jax.lax.scan(step, (parameters, OPTIMIZER.init(parameters)), batches)
    return parameters, differs


def batches_of(part: Part, steps: int, seed: int, dtype: DTypeLike) -> tuple[Array, Array]:
    """Returns random minibatches; every epoch has an order of its own."""
    rng, count = np.random.default_rng(seed), len(part.labels)
    epochs = -(-steps // (count // BATCH))
    chosen = np.concatenate([training.batches(rng, count, BATCH) for _ in range(epochs)])[:steps]
    return jnp.asarray(part.images.reshape(-1, 64)[chosen], dtype), jnp.asarray(part.labels[chosen])


def share_of_minibatches(part: Part, dtype: str, steps: int, seed: int) -> float:
    """Returns the share of minibatches, while training in `dtype`, whose gradient depends on relu's derivative at 0."""
    with jax.enable_x64(dtype == "float64"):
        wide = jnp.promote_types(dtype, jnp.float32)
        _, differs = train(
            init(jax.random.key(seed), wide),
            batches_of(part, steps, seed, wide),
            jaxrelu.relu,
            dtype,
            other=functools.partial(jaxrelu.relu, kink=1.0),
        )
        return float(differs.mean())


def accuracies(data: Digits, rule: str, kink: float, steps: int, seeds: Sequence[int]) -> Accuracy:
    """Returns the test accuracy in bfloat16 for a rule and a derivative at 0, trained once per seed."""
    activation = functools.partial(RULES[rule], kink=kink)
    found = []
    for seed in seeds:
        start = init(jax.random.key(seed), jnp.float32)
        parameters, _ = train(start, batches_of(data.train, steps, seed, jnp.float32), activation, "bfloat16")
        z = logits(parameters, data.test.images.reshape(-1, 64), activation, "bfloat16")
        found.append(float(np.mean(z.argmax(-1) == data.test.labels)))
    return Accuracy(rule, kink, sum(found) / len(found), min(found), max(found))


def write(directory: outputs.Outputs, shares: dict[str, float], rows: Sequence[Accuracy]) -> None:
    """Writes the shares, the accuracies and the picture."""
    with directory.publishing(*OUTPUTS) as scratch:
        outputs.table(scratch / "minibatches.csv", ["dtype", "share"], shares.items())
        outputs.table(scratch / "accuracy.csv", Accuracy._fields, rows)
        draw(scratch / "relu_prime.png", shares, rows)


def draw(path: Path, shares: dict[str, float], rows: Sequence[Accuracy]) -> None:
    """Draws the share for each precision, and the accuracy over the derivative at 0."""
    figure, (bars, lines) = plots.panels(
        "relu's derivative at 0",
        "derivative at 0",
        ("minibatches whose gradient\ndepends on it (%)", "test accuracy in bfloat16 (%)"),
        height=2.8,
        sharex=False,
    )
    drawn = bars.bar(list(shares), [100 * share for share in shares.values()], color=plots.BLUE, width=0.5)
    bars.bar_label(drawn, fmt="%.1f")
    bars.set_ylim(0, 112)
    bars.set_xlabel("precision")
    labels = {"scaled": "jaxrelu: multiplies the gradient", "assigned": "published code: replaces the gradient"}
    for rule, color, marker in (("scaled", plots.BLUE, "o"), ("assigned", plots.ORANGE, "s")):
        mine = [row for row in rows if row.rule == rule]
        mean = np.array([row.mean for row in mine])
        spread = [mean - [row.low for row in mine], [row.high for row in mine] - mean]
        lines.errorbar(
            [f"{row.kink:g}" for row in mine],
            100 * mean,
            yerr=100 * np.array(spread),
            color=color,
            marker=marker,
            capsize=4,
            label=labels[rule],
        )
    lines.set_ylim(0, 104)
    lines.legend(loc="lower left")
    figure.savefig(path)


def print_summary(shares: dict[str, float], rows: Sequence[Accuracy]) -> None:
    """Prints two tables and, as the last line, the accuracies for a derivative of 10."""
    console = Console()
    table = Table("precision", "minibatches whose gradient depends on relu'(0)")
    for dtype, share in shares.items():
        table.add_row(dtype, f"{100 * share:.1f} %")
    console.print(table)
    table = Table("relu'(0)", "jaxrelu: multiplies the gradient", "published code: replaces the gradient")
    found = {(row.rule, row.kink): row for row in rows}
    for kink in dict.fromkeys(row.kink for row in rows):
        table.add_row(f"{kink:g}", *(f"{100 * found[rule, kink].mean:.1f} %" for rule in RULES))
    console.print(table)
    scaled, assigned = (100 * found[rule, 10.0].mean for rule in RULES)
    print(f"bfloat16, relu'(0) = 10: test accuracy {scaled:.1f} %, with the published code's rule {assigned:.1f} %")


def check(parser: options.Parser, args: argparse.Namespace, shares: dict[str, float], rows: Sequence[Accuracy]) -> None:
    """Exits with code 1 if a figure is not what the script is to show."""
    if shares["bfloat16"] < 0.5 or shares["float32"] > 0.05:
        parser.fail(
            "relu'(0) must matter in at least 50 % of the minibatches in bfloat16 and at most 5 % in float32, got "
            f"{100 * shares['bfloat16']:.1f} % and {100 * shares['float32']:.1f} %"
        )
    scaled = [row.mean for row in rows if row.rule == "scaled"]
    spread = 100 * (max(scaled) - min(scaled))
    if spread > (5 if args.quick else 2):
        parser.fail(f"jaxrelu's rule must give the same accuracy for every relu'(0), to 2 points, got {spread:.1f} points")
    (collapsed,) = (row.mean for row in rows if (row.rule, row.kink) == ("assigned", 10.0))
    if collapsed > 0.5:
        parser.fail(f"the constant 10 in place of the gradient must end below 50 %, got {100 * collapsed:.1f} %")


def main(argv: Sequence[str] | None = None) -> None:
    """Counts, trains and checks; argv is the command line without the program's name."""
    parser = options.demonstration("relu_prime.py", "Show when relu's derivative at 0 matters.", OUTPUTS)
    args = parser.parse_args(argv)
    dtypes, kinks, steps, seeds = DTYPES, KINKS, STEPS, 3
    if args.quick:
        dtypes, kinks, steps, seeds = ("bfloat16", "float32"), (10.0,), QUICK_STEPS, 1
    with outputs.directory(parser, args.out) as directory:
        data = digits.bundled(args.seed)
        cases = [(rule, kink) for rule in RULES for kink in kinks]
        with options.progress(total=len(dtypes) + len(cases), unit="run") as progress:

            def counted(result: Any) -> Any:
                progress.update()
                return result

            shares = {dtype: counted(share_of_minibatches(data.train, dtype, steps, args.seed)) for dtype in dtypes}
            drawn = options.seeds(args.seed, seeds)
            rows = [counted(accuracies(data, *case, steps, drawn)) for case in cases]
        write(directory, shares, rows)
        print_summary(shares, rows)
        check(parser, args, shares, rows)


if __name__ == "__main__":
    main()
