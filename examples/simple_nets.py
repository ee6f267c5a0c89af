"""Builds two small networks in Flax linen and in Flax nnx, and shows that equal weights give equal outputs.

    python examples/simple_nets.py

builds 10-20-1 (ten inputs, twenty hidden units with ReLU, one output) and 10-5 (ten inputs, five outputs with ReLU). One
call gives every layer of a network He's weights and biases of 0.01. Writes runs/simple_nets/simple_nets.csv (one row per
parameter) and simple_nets.png, the distribution of the outputs for normal inputs.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen, nnx
from jax import Array
from rich.console import Console
from rich.table import Table

import jaxrelu.linen
import jaxrelu.nnx
from common import options, outputs, plots
from jaxrelu.initializers import kaiming_normal

BIAS = 0.01
OUTPUTS = ("simple_nets.csv", "simple_nets.png")


class LinenRegressor(linen.Module):
    """10-20-1: a number of either sign."""

    @linen.compact
    def __call__(self, x: Array) -> Array:
        x = jaxrelu.linen.ReLU()(linen.Dense(20, name="hidden")(x))
        return linen.Dense(1, name="output")(x)


class LinenFeatures(linen.Module):
    """10-5: five numbers of 0 or more."""

    @linen.compact
    def __call__(self, x: Array) -> Array:
        return jaxrelu.linen.ReLU()(linen.Dense(5, name="output")(x))


class NnxRegressor(nnx.Module):
    """10-20-1: a number of either sign."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(10, 20, rngs=rngs)
        self.activation = jaxrelu.nnx.ReLU()
        self.output = nnx.Linear(20, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.output(self.activation(self.hidden(x)))


class NnxFeatures(nnx.Module):
    """10-5: five numbers of 0 or more."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.output = nnx.Linear(10, 5, rngs=rngs)
        self.activation = jaxrelu.nnx.ReLU()

    def __call__(self, x: Array) -> Array:
        return self.activation(self.output(x))


NETWORKS = {"10-20-1": (LinenRegressor, NnxRegressor), "10-5": (LinenFeatures, NnxFeatures)}


class Parameter(NamedTuple):
    """One row of the table: the root mean square of the numbers drawn, and that of the distribution they come from."""

    network: str
    parameter: str
    shape: str
    count: int
    rms: float
    expected: float


def he(params: dict[str, Any], key: Array) -> dict[str, Any]:
    """Returns parameters of the shapes given: He's normal weights in every kernel, BIAS in every bias."""
    leaves, treedef = jax.tree.flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))

    def draw(name: str, key: Array, old: jax.ShapeDtypeStruct) -> Array:
        return kaiming_normal()(key, old.shape) if name == "kernel" else jax.numpy.full(old.shape, BIAS)

    return jax.tree.unflatten(treedef, [draw(path[-1].key, key, old) for (path, old), key in zip(leaves, keys, strict=True)])


def run(name: str, x: Array, seed: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Returns the parameters of a network, and its outputs at x as a linen and as an nnx module."""
    linen_class, nnx_class = NETWORKS[name]
    # under jit, as otherwise the draws of each layer would be compiled one by one
    linen_model, nnx_model = linen_class(), nnx.jit(lambda: nnx_class(nnx.Rngs(seed)))()
    shapes = jax.eval_shape(linen_model.init, jax.random.key(seed), x)["params"]
    params = jax.jit(functools.partial(he, shapes))(jax.random.key(seed))
    # nnx takes linen's dict of parameters, as the layers have the same names
    nnx.update(nnx_model, params)
    return params, np.asarray(linen_model.apply({"params": params}, x)), np.asarray(nnx_model(x))


def parameters(network: str, params: dict[str, Any]) -> list[Parameter]:
    """Returns one row per parameter."""
    rows = []
    for path, array in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # He: variance 2 / fan_in
        expected = math.sqrt(2 / array.shape[0]) if name.endswith("kernel") else BIAS
        rms = math.sqrt(np.mean(np.square(array, dtype=np.float64)))
        rows.append(Parameter(network, name, " x ".join(map(str, array.shape)), array.size, rms, expected))
    return rows


def draw(path: Path, found: dict[str, np.ndarray]) -> None:
    """Plots the distribution of the outputs."""
    labels = [f"{name}: share of\noutputs (%)" for name in found]
    figure, panels = plots.panels("outputs of two ReLU networks for normal inputs", "output", labels)
    edges = np.linspace(-5, 5, 51)
    for panel, values in zip(panels, found.values(), strict=True):
        zeros = 100 * np.mean(values == 0)
        rest = values[values != 0]
        panel.hist(rest, edges, weights=np.full(rest.size, 100 / values.size), color=plots.BLUE)
        if zeros:
            panel.bar(0, zeros, 0.1, color=plots.ORANGE, label=f"exactly 0: {zeros:.0f} %")
            panel.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Builds and compares the networks; argv is the command line without the program's name."""
    parser = options.demonstration("simple_nets.py", "Build two small networks with Flax linen and nnx.", OUTPUTS)
    args = parser.parse_args(argv)
    with outputs.directory(parser, args.out) as directory:
        x = jax.random.normal(jax.random.key(args.seed), (1000 if args.quick else 10_000, 10))
        runs = {name: run(name, x, args.seed) for name in NETWORKS}
        rows = [row for name, (params, *_) in runs.items() for row in parameters(name, params)]
        with directory.publishing(*OUTPUTS) as scratch:
            outputs.table(scratch / "simple_nets.csv", Parameter._fields, rows)
            draw(scratch / "simple_nets.png", {name: found for name, (_, found, _) in runs.items()})
        table = Table("network", "parameter", "shape", "count", "root mean square", "drawn with")
        for row in rows:
            table.add_row(*map(str, row[:4]), *(f"{value:.4f}" for value in row[4:]))
        Console().print(table)
        for name, (params, linen_out, nnx_out) in runs.items():
            count = sum(array.size for array in jax.tree.leaves(params))
            first = ", ".join(f"{value:.4f}" for value in linen_out[0])
            zeros = 100 * np.mean(linen_out == 0)
            print(f"{name}: {count} parameters; first output {first}; {zeros:.0f} % of the outputs are 0")
            if not np.array_equal(linen_out, nnx_out):
                parser.fail(f"{name}: linen and nnx must agree, got {np.abs(linen_out - nnx_out).max()} between them")
        print("linen and nnx give the same outputs bit for bit")
        print(f"written to {args.out}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()
