"""Tabulates and draws the five activations and their derivatives, and checks that all their forms agree.

    python examples/activations.py

applies each activation to four numbers, a matrix, integers and five normal draws. Its forms are the function, the module of
Flax linen, the module of Flax nnx, and the donated form of jaxrelu.inplace, which writes its result into the memory of x.
They are compared with each other and with a definition in NumPy. Writes runs/activations/activations.png, the curves of the
five and of four of jax.nn.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxrelu
from common import options, outputs, plots
from jaxrelu import inplace, linen, nnx

SLOPE = 0.25  # where prelu's slope starts
OUTPUTS = ("activations.png",)


class Forms(NamedTuple):
    """An activation in every form, and its value and derivative in NumPy, in float64."""

    function: Callable[[Array], Array]
    linen: Callable[[Array], Array]
    nnx: Callable[[Array], Array]
    donated: Callable[[Array], Array]
    value: Callable[[np.ndarray], np.ndarray]
    derivative: Callable[[np.ndarray], np.ndarray]


def _linen(module: linen.ReLU | linen.PReLU) -> Callable[[Array], Array]:
    return lambda x: module.apply(module.init(jax.random.key(0), x), x)


ACTIVATIONS = {
    "relu": Forms(
        jaxrelu.relu,
        _linen(linen.ReLU()),
        nnx.ReLU(),
        inplace.relu,
        lambda x: np.maximum(x, 0),
        lambda x: np.where(x > 0, 1, 0),
    ),
    "leaky_relu": Forms(
        jaxrelu.leaky_relu,
        _linen(linen.LeakyReLU()),
        nnx.LeakyReLU(),
        inplace.leaky_relu,
        lambda x: np.maximum(x, 0.01 * x),
        lambda x: np.where(x > 0, 1, 0.01),
    ),
    "prelu": Forms(
        functools.partial(jaxrelu.prelu, negative_slope=SLOPE),
        _linen(linen.PReLU()),
        nnx.PReLU(),
        functools.partial(inplace.prelu, negative_slope=SLOPE),
        lambda x: np.maximum(x, SLOPE * x),
        lambda x: np.where(x > 0, 1, SLOPE),
    ),
    "elu": Forms(
        jaxrelu.elu,
        _linen(linen.ELU()),
        nnx.ELU(),
        inplace.elu,
        lambda x: np.where(x > 0, x, np.expm1(x)),
        lambda x: np.exp(np.minimum(x, 0)),
    ),
    "relu6": Forms(
        jaxrelu.relu6,
        _linen(linen.ReLU6()),
        nnx.ReLU6(),
        inplace.relu6,
        lambda x: np.clip(x, 0, 6),
        lambda x: np.where((x > 0) & (x < 6), 1, 0),
    ),
}
INPUTS = {
    "four numbers": np.array([-5.0, 2.5, -1.75, 1.6]),
    "a 2 x 3 matrix": np.array([[-1.0, 2.0, -3.0], [0.0, 4.0, -5.0]]),
    "integers": jnp.arange(-2, 3),
    "five normal draws": np.array([0.3367, 0.1288, 0.2345, 0.2303, -1.1229]),
}
# two units in the last place of float32
TOLERANCE = 2.0**-22


class Curve(NamedTuple):
    """A function to draw, with its kinks; each is x, and the limits of the derivative from the left and from the right."""

    function: Callable[[Array], Array]
    kinks: Sequence[tuple[float, float, float]] = ()
    span: tuple[float, float] = (-4.0, 4.0)


CURVES = {
    "relu": Curve(jaxrelu.relu, [(0, 0, 1)]),
    # at the default slope, 0.01, the line would hide the axis
    "leaky_relu, slope 0.1": Curve(functools.partial(jaxrelu.leaky_relu, negative_slope=0.1), [(0, 0.1, 1)]),
    "prelu, slope 0.25, learned": Curve(functools.partial(jaxrelu.prelu, negative_slope=SLOPE), [(0, 0.25, 1)]),
    "elu": Curve(jaxrelu.elu, [(0, 1, 1)]),
    "relu6": Curve(jaxrelu.relu6, [(0, 0, 1), (6, 1, 0)], (-2.0, 8.0)),
    "sigmoid": Curve(jax.nn.sigmoid),
    "tanh": Curve(jax.nn.tanh),
    "swish": Curve(jax.nn.swish),
    "gelu": Curve(functools.partial(jax.nn.gelu, approximate=False)),
}


def all_numbers() -> np.ndarray:
    """Returns the numbers of all INPUTS in one array, so that one call of a function serves them."""
    return np.concatenate([np.ravel(x) for x in INPUTS.values()]).astype(np.float32)


def derivative(function: Callable[[Array], Array], x: Array) -> Array:
    """Returns the derivative of an elementwise function at each element; integers are made floats first."""
    return jax.jit(jax.grad(lambda x: function(x).sum()))(x.astype(float))


class Found(NamedTuple):
    """Value and derivative of an activation at some numbers, and the names of its forms that disagree there."""

    value: np.ndarray
    derivative: np.ndarray
    differences: list[str]


def compare(name: str, x: Array) -> Found:
    """Compares the forms of an activation at x: bit for bit with the function, and with NumPy."""
    forms = ACTIVATIONS[name]
    value, slope = forms.function(x), derivative(forms.function, x)
    differences = []
    for form in ("linen", "nnx", "donated"):
        function = getattr(forms, form)
        if not _same(function(jnp.copy(x)), value) or not _same(derivative(function, x), slope):
            differences.append(f"{name}, its {form} form")
    exact = np.asarray(x, np.float64)
    for what, got, wanted in (("value", value, forms.value(exact)), ("derivative", slope, forms.derivative(exact))):
        if not np.allclose(got, wanted, rtol=TOLERANCE, atol=0):
            differences.append(f"{name}, its {what} by NumPy")
    return Found(np.asarray(value), np.asarray(slope), differences)


def compare_integers(name: str, x: Array) -> list[str]:
    """Returns the forms of an activation whose values at integers are others, or of another dtype, than the function's."""
    forms = ACTIVATIONS[name]
    value = forms.function(x)
    kept = x.dtype == value.dtype  # the donated form writes into the buffer of x, which floats do not fit
    names = ("linen", "nnx", "donated") if kept else ("linen", "nnx")
    found = [f"{name}, its {form} form" for form in names if not _same(getattr(forms, form)(jnp.copy(x)), value)]
    if not np.allclose(value, forms.value(np.asarray(x, np.float64)), rtol=TOLERANCE, atol=0):
        found.append(f"{name}, its value by NumPy")
    return found


def _same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and bool((a == b).all())


def after_a_call(function: Callable[[Array], Array]) -> str:
    """Returns a sentence on the result of a call, and on what happens when its input is used afterwards."""
    x = jnp.array([-5.0, 2.5])
    y = function(x)
    try:
        return f"{y}, then x is {x}"
    except RuntimeError as error:
        return f"{y}, then x raises {type(error).__name__}: {str(error).split(' with ')[0]}"


def draw(path: Path) -> None:
    """Draws value and derivative of each function in a panel of its own."""
    figure = Figure(figsize=(8, 7.4), dpi=100, layout="constrained")
    panels = figure.subplots(3, 3)
    for panel, (name, curve) in zip(panels.flat, CURVES.items(), strict=True):
        draw_curve(panel, curve)
        panel.set_title(name, fontsize=11)
    for panel in panels[-1]:
        panel.set_xlabel("input x")
    for panel in panels[:, 0]:
        panel.set_ylabel("value, derivative")
    draw_dot(panels[0, 0], (), (), filled=True, label="derivative at the kink")
    draw_dot(panels[0, 0], (), (), filled=False, label="its limit from the other side")
    handles = [line for line in panels[0, 0].get_lines() if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)


def draw_curve(panel: Axes, curve: Curve) -> None:
    """Draws value and derivative. The derivative is interrupted at each kink, where the filled dot is its value."""
    low, high = curve.span
    panel.axhline(0, color=plots.GREY, linewidth=0.8)
    panel.axvline(0, color=plots.GREY, linewidth=0.8)
    x = np.linspace(low, high, 401, dtype=np.float32).round(3)  # holds every kink
    slope = np.array(derivative(curve.function, x))
    at = {kink: slope[x == kink].item() for kink, _, _ in curve.kinks}
    slope[np.isin(x, list(at))] = np.nan
    panel.plot(x, jax.jit(curve.function)(x), color=plots.BLUE, linewidth=2.2, label="value")
    panel.plot(x, slope, color=plots.ORANGE, linewidth=1.8, linestyle=(0, (4, 1.2)), label="derivative")
    for kink, left, right in curve.kinks:
        draw_dot(panel, kink, max(left, right, key=lambda limit: abs(limit - at[kink])), filled=False)
        draw_dot(panel, kink, at[kink], filled=True)
    panel.set_xlim(low, high)
    panel.set_ylim(-1.3, 7 if high > 6 else 3.2)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def draw_dot(panel: Axes, x: ArrayLike, y: ArrayLike, *, filled: bool, label: str | None = None) -> None:
    """Draws a filled or an open dot."""
    face = plots.ORANGE if filled else "white"
    panel.plot(x, y, "o", color=plots.ORANGE, markerfacecolor=face, markersize=6, zorder=3, label=label)


def print_tables(found: dict[str, Found]) -> None:
    """Prints value and derivative of each activation for each of INPUTS, and relu beside definitions in Python and NumPy."""
    numbers, start = all_numbers(), 0
    for title, x in INPUTS.items():
        part = slice(start, start := start + x.size)
        table = Table("", "x", *(f"{number:.6g}" for number in numbers[part].tolist()), title=title)
        for name, (value, slope, _) in found.items():
            table.add_row(name, "value", *(f"{number:.4g}" for number in value[part].tolist()))
            table.add_row("", "derivative", *(f"{number:.4g}" for number in slope[part].tolist()), end_section=True)
        Console().print(table)
    table = Table("relu", "of the integers", "dtype", "of NaN")
    whole, nan = INPUTS["integers"], jnp.array(jnp.nan)
    for name, function in {
        "Python: max(0, x)": lambda x: np.array([max(0, number) for number in np.ravel(x).tolist()]),
        "NumPy: maximum(x, 0)": lambda x: np.maximum(x, 0),
        "jaxrelu.relu": jaxrelu.relu,
    }.items():
        table.add_row(name, str(function(whole)), str(function(whole).dtype), f"{function(np.asarray(nan)).item():g}")
    Console().print(table)
    for name, function in {"relu(x)": jaxrelu.relu, "inplace.relu(x)": inplace.relu}.items():
        print(f"{name} is {after_a_call(function)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Compares and draws; argv is the command line without the program's name."""
    parser = options.demonstration("activations.py", "Tabulate, compare and draw the five activations.", OUTPUTS)
    args = parser.parse_args(argv)
    with outputs.directory(parser, args.out) as directory:
        draws = 3 * jax.random.normal(jax.random.key(args.seed), (1000,))
        numbers = jnp.concatenate([all_numbers(), draws])
        found = {name: compare(name, numbers) for name in ACTIVATIONS}
        of_integers = [compare_integers(name, INPUTS["integers"]) for name in ACTIVATIONS]
        with directory.publishing(*OUTPUTS) as scratch:
            draw(scratch / "activations.png")
        print_tables(found)
        print(f"written to {args.out}: {', '.join(OUTPUTS)}")
        differences = [
            difference for one in (*(one.differences for one in found.values()), *of_integers) for difference in one
        ]
        if differences:
            parser.fail(f"all forms must agree, but these do not: {'; '.join(differences)}")
        print("function, linen, nnx and donated form are equal bit for bit, and to NumPy within 2 units in the last place")


if __name__ == "__main__":
    main()
