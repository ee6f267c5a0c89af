"""Shows that gradients vanish in a deep sigmoid network, and do not in a ReLU network of the same size.

    python examples/gradient_flow.py

computes the derivative of a layer of two units with respect to its input, then the gradients of ten layers of weights, with
both activations. Writes to runs/gradient_flow: gradient_flow.csv (one row per layer: the root mean square of the gradient
with each activation) and gradient_flow.png.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table

import jaxrelu
from common import options, outputs, plots
from jaxrelu import diagnostics
from jaxrelu.initializers import kaiming_normal

LAYERS, WIDTH, EXAMPLES = 10, 64, 256
# each activation with its usual initializer
ACTIVATIONS = {
    "sigmoid": (jax.nn.sigmoid, jax.nn.initializers.glorot_normal()),
    "relu": (jaxrelu.relu, kaiming_normal(jaxrelu.relu)),
}
X, WEIGHTS = (0.5, -0.3), ((0.1, 0.2), (-0.1, 0.3))
EXPECTED = {"sigmoid": [0.0750, 0.0500], "relu": [0.3000, 0.2000]}
OUTPUTS = ("gradient_flow.csv", "gradient_flow.png")


def input_gradient(activation: Callable[[Array], Array]) -> list[float]:
    """Returns the derivative of sum(activation(x W)) with respect to x, to 4 places."""
    gradient = jax.grad(lambda x: activation(x @ jnp.array(WEIGHTS)).sum())(jnp.array(X))
    return [round(float(value), 4) for value in gradient]


def layer_gradients(name: str, key: Array) -> list[float]:
    """Returns the root mean square of the loss's gradient in each layer, from the input on."""
    activation, init = ACTIVATIONS[name]
    keys = jax.random.split(key, LAYERS + 1)
    params = {f"layer_{i + 1}": {"kernel": init(keys[i], (WIDTH, WIDTH))} for i in range(LAYERS)}
    x = jax.random.normal(keys[-1], (EXAMPLES, WIDTH))

    def loss(params: dict[str, dict[str, Array]], x: Array) -> Array:
        for i in range(1, LAYERS):
            x = activation(x @ params[f"layer_{i}"]["kernel"])
        return ((x @ params[f"layer_{LAYERS}"]["kernel"]) ** 2).mean()

    flow = diagnostics.gradient_flow(loss, params, x)
    return [float(flow[f"layer_{i + 1}"]) for i in range(LAYERS)]


def draw(path: Path, flows: dict[str, list[float]]) -> None:
    """Plots the gradients by layer."""
    title = f"gradients in a network of {LAYERS} layers"
    figure, (panel,) = plots.panels(title, "layer, from the input", ["gradient of the loss\n(root mean square)"], height=3.6)
    for (name, flow), color in zip(flows.items(), (plots.ORANGE, plots.BLUE), strict=True):
        panel.semilogy(np.arange(1, LAYERS + 1), flow, "o-", color=color, label=name)
    panel.set_xticks(range(1, LAYERS + 1))
    panel.legend()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Computes the gradients; argv is the command line without the program's name."""
    parser = options.demonstration("gradient_flow.py", "Compare the gradients in a sigmoid and in a ReLU network.", OUTPUTS)
    args = parser.parse_args(argv)
    with outputs.directory(parser, args.out) as directory:
        found = {name: input_gradient(activation) for name, (activation, _) in ACTIVATIONS.items()}
        flows = {name: layer_gradients(name, jax.random.key(args.seed)) for name in ACTIVATIONS}
        layers = [(i, *values) for i, values in enumerate(zip(*flows.values(), strict=True), 1)]
        with directory.publishing(*OUTPUTS) as scratch:
            outputs.table(scratch / "gradient_flow.csv", ["layer", *flows], layers)
            draw(scratch / "gradient_flow.png", flows)
        table = Table("", *flows)
        table.add_row("gradient in x, two units", *("{:.4f}, {:.4f}".format(*found[name]) for name in flows))
        for i in range(LAYERS):
            table.add_row(f"gradient in layer {i + 1}", *(f"{flow[i]:.2e}" for flow in flows.values()))
        Console().print(table)
        print(f"written to {args.out}: {', '.join(OUTPUTS)}")
        if found != EXPECTED:
            parser.fail(f"the gradients in x must be {EXPECTED}, got {found}")
        fading, lasting = (flow[0] / flow[-1] for flow in flows.values())
        if not fading < 1e-3 < 0.1 < lasting:
            parser.fail(
                f"the first layer's gradient over the last's must be below 0.001 and above 0.1, got {fading}, {lasting}"
            )


if __name__ == "__main__":
    main()
