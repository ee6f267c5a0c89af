"""Counts ReLU networks that are dead before training: their output is constant. Most deep and narrow ones are.

    python examples/born_dead.py

draws 20,000 networks of one input for each width and depth, and counts the dead ones, with zero biases and with biases of
0.01. It compares the shares with the bounds that Lu et al. 2020 prove, and writes runs/born_dead/born_dead.csv (width, depth
in layers of weights, share of networks that are dead with zero biases) and born_dead.png.

Lu et al. 2020, Dying ReLU and Initialization (arXiv:1903.06733).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import jaxrelu
from common import options, outputs, plots
from jaxrelu.initializers import gain

WIDTHS, DEPTHS, BIAS = (2, 3, 4, 5, 10), (3, 5, 10, 20), 0.01
COLORS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PURPLE, plots.GREY)
# with zero biases the outputs at -1 and 1 decide; with small biases the kinks lie near 0, so that inputs there are needed
INPUTS = (1.0, 0.1, 0.03, 0.01, 0.003, 0.0, -0.003, -0.01, -0.03, -0.1, -1.0)
BATCH = 1000
# how many standard errors a share may differ from theory; by chance one run in 1,000 has a share that differs by more
ERRORS = 4.5
OUTPUTS = ("born_dead.csv", "born_dead.png")


class Shares(NamedTuple):
    """Shares of dead networks of one width; the first element is for 2 layers of weights, the next for 3, and so on."""

    constant: np.ndarray  # with zero biases
    zero: np.ndarray  # with zero biases: output 0 at the input 1
    biased: np.ndarray  # with biases of BIAS


def upper_bound(width: int, depth: int) -> float:
    """Returns the probability of an output of 0 at one given input; a network is dead with at most this probability."""
    return 1 - (1 - 2**-width) ** (depth - 1)


def lower_bound(width: int, depth: int) -> float:
    """Returns the published lower bound for one input and zero biases; it is exact for two hidden layers."""
    alive, both = 1 - 2**-width, 1 - 2 ** (1 - width) - (width - 1) * 4**-width
    factor = (1 - 2 ** (1 - width)) * alive / (1 + (width - 1) * 2**-width)
    return 1 - alive ** (depth - 2) - factor * (alive ** (depth - 2) - both ** (depth - 2))


@jax.jit
def count(first: Array, rest: Array) -> tuple[Array, Array]:
    """Returns, for each depth, how many networks of a batch are constant over INPUTS, and how many are 0 at the first input.

    Each count is a pair: with zero biases, and with biases of BIAS in the same networks.

    Args:
        first: weights of the first layer, of shape (batch, 1, width).
        rest: weights of the other layers, of shape (layers, batch, width, width).
    """
    biases = jnp.array([0.0, BIAS])[:, None, None, None]

    def layer(h: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
        constant, zero = (h == h[:, :, :1]).all((2, 3)), (h[:, :, 0] == 0).all(2)
        return jaxrelu.relu(h @ weights + biases), (constant.sum(1), zero.sum(1))

    return jax.lax.scan(layer, jaxrelu.relu(jnp.array(INPUTS)[:, None] @ first + biases), rest)[1]


def measure(width: int, batches: int, seed: int, progress: tqdm) -> Shares:
    """Returns the shares among batches * BATCH networks with Kaiming weights."""
    rng, scale = np.random.default_rng((seed, width)), np.float32(gain(jaxrelu.relu))
    totals = np.zeros((2, max(DEPTHS) - 1, 2))
    for _ in range(batches):
        first = scale * rng.standard_normal((BATCH, 1, width), np.float32)
        rest = scale / np.float32(math.sqrt(width)) * rng.standard_normal((max(DEPTHS) - 1, BATCH, width, width), np.float32)
        totals += jax.device_get(count(first, rest))
        progress.update(BATCH)
    constant, zero = totals / (batches * BATCH)
    return Shares(constant[:, 0], zero[:, 0], constant[:, 1])


def miss(shares: dict[int, Shares], networks: int) -> str:
    """Returns a sentence about the first share that differs from theory by more than chance explains, or an empty string."""

    def error(probability: float) -> float:
        return ERRORS * math.sqrt(probability * (1 - probability) / networks) + 1 / networks

    for width, share in shares.items():
        for depth in DEPTHS:
            low, high = lower_bound(width, depth), upper_bound(width, depth)
            dead, zero = share.constant[depth - 2], share.zero[depth - 2]
            top = low if depth == 3 else high
            if not low - error(low) <= dead <= top + error(top):
                return f"width {width}, depth {depth}: the share dead must lie in {low:.4f} to {top:.4f}, got {dead:.4f}"
            if abs(zero - high) > error(high):
                return f"width {width}, depth {depth}: the share dead at one input must be {high:.4f}, got {zero:.4f}"
    return ""


def draw(path: Path, shares: dict[int, Shares]) -> None:
    """Plots the dead share by depth for each width, with the bounds as bands."""
    labels = ("dead at birth (%),\nzero biases", f"dead at birth (%),\nbiases of {BIAS}")
    figure, panels = plots.panels("ReLU networks with a constant output before training", "layers of weights", labels)
    depths = np.arange(3, max(DEPTHS) + 1)
    for (width, share), color in zip(shares.items(), COLORS, strict=True):
        bounds = [[100 * bound(width, depth) for depth in depths] for bound in (lower_bound, upper_bound)]
        panels[0].fill_between(depths, *bounds, color=color, alpha=0.15, linewidth=0)
        for panel, dead in zip(panels, (share.constant, share.biased), strict=True):
            panel.plot(depths, np.where(dead > 0, 100 * dead, np.nan)[1:], ".-", color=color, label=f"width {width}")
    for panel in panels:
        panel.set_yscale("log")
        panel.set_ylim(0.003, 150)
    panels[1].set_xticks(depths)
    lines = [
        *panels[0].get_lines(),
        panels[0].fill_between([], [], color=plots.GREY, alpha=0.3, label="bounds of Lu et al."),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path)


def print_table(shares: dict[int, Shares], networks: int, out: Path) -> None:
    """Prints one row for each width and depth."""
    table = Table("width", "depth", "lower bound", "dead", "upper bound", f"dead, biases of {BIAS}")
    for width, share in shares.items():
        for depth in DEPTHS:
            row = lower_bound(width, depth), share.constant[depth - 2], upper_bound(width, depth), share.biased[depth - 2]
            table.add_row(str(width), str(depth), *(f"{value:.4f}" for value in row), end_section=depth == DEPTHS[-1])
    Console().print(table)
    print(f"{networks} networks for each width and depth; written to {out}: {', '.join(OUTPUTS)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Draws and counts; argv is the command line without the program's name."""
    parser = options.demonstration("born_dead.py", "Count the ReLU networks that are dead before training.", OUTPUTS)
    args = parser.parse_args(argv)
    batches = 2 if args.quick else 20
    with outputs.directory(parser, args.out) as directory:
        with options.progress(total=len(WIDTHS) * batches * BATCH, unit="network") as progress:
            shares = {width: measure(width, batches, args.seed, progress) for width in WIDTHS}
        cells = [(width, depth, share.constant[depth - 2]) for width, share in shares.items() for depth in DEPTHS]
        with directory.publishing(*OUTPUTS) as scratch:
            outputs.table(scratch / "born_dead.csv", ["width", "depth", "dead"], cells)
            draw(scratch / "born_dead.png", shares)
        print_table(shares, batches * BATCH, args.out)
        if message := miss(shares, batches * BATCH):
            parser.fail(message)


if __name__ == "__main__":
    main()
