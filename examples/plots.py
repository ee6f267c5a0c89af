"""The style of the examples' plots: Okabe and Ito's colours, which colour-blind readers can tell apart, 800 pixels wide."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def panels(title: str, xlabel: str, ylabels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its panels, one under the other with a common x axis."""
    figure = Figure(figsize=(8, 0.8 + 2.2 * len(ylabels)), dpi=100, layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(len(ylabels), sharex=True, squeeze=False)[:, 0])
    for panel, ylabel in zip(axes, ylabels, strict=True):
        panel.set_ylabel(ylabel)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(xlabel)
    return figure, axes
