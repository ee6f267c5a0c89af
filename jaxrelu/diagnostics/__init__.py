"""Find dying units: statistics of every activation in any JAX model, and reports on them.

`observe` needs no edit to the model; `unit_stats` takes pre-activations that are at hand.

Examples:
    >>> import jax, jaxrelu
    >>> from jaxrelu import diagnostics
    >>> layer = lambda x: jaxrelu.relu(x - jax.numpy.array([0.0, 9.0]))
    >>> out, stats = diagnostics.observe(layer)(jax.numpy.array([[1.0, 2.0], [-1.0, 3.0], [4.0, 5.0]]))
    >>> stats["relu"].dead, stats["relu"].fired, stats["relu"].count
    (Array([False,  True], dtype=bool), array([2, 0]), 3)
"""

from jaxrelu.diagnostics.observe import Stats, observe
from jaxrelu.diagnostics.reports import check_init, gradient_flow, summary, to_scalars
from jaxrelu.diagnostics.stats import UnitStats, all_reduce, merge, unit_stats

__all__ = [
    "Stats",
    "UnitStats",
    "all_reduce",
    "check_init",
    "gradient_flow",
    "merge",
    "observe",
    "summary",
    "to_scalars",
    "unit_stats",
]
