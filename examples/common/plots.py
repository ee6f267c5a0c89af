"""The style of the examples' plots: Okabe and Ito's colours, which colour-blind readers can tell apart, 800 pixels wide."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#666666", "#56B4E9", "#CC79A7"


def panels(
    title: str, xlabel: str, ylabels: Sequence[str], height: float = 2.2, sharex: bool = True
) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its panels, one below the other; the height is that of a panel, in hundreds of pixels."""
    figure = Figure(figsize=(8, 0.8 + height * len(ylabels)), dpi=100, layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(len(ylabels), sharex=sharex, squeeze=False)[:, 0])
    for panel, ylabel in zip(axes, ylabels, strict=True):
        panel.set_ylabel(ylabel)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(xlabel)
    return figure, axes


def columns(title: str, names: Sequence[str], xlabels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its panels, side by side, with one row per name from the top down."""
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(names)), dpi=100, layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(1, len(xlabels), sharey=True, squeeze=False)[0])
    for panel, xlabel in zip(axes, xlabels, strict=True):
        panel.set_xlabel(xlabel)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure, axes
