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

from jaxrelu.diagnostics.observing import observe as observe
from jaxrelu.diagnostics.reports import check_init as check_init
from jaxrelu.diagnostics.reports import gradient_flow as gradient_flow
from jaxrelu.diagnostics.reports import summary as summary
from jaxrelu.diagnostics.reports import to_scalars as to_scalars
from jaxrelu.diagnostics.stats import UnitStats as UnitStats
from jaxrelu.diagnostics.stats import all_reduce as all_reduce
from jaxrelu.diagnostics.stats import merge as merge
from jaxrelu.diagnostics.stats import unit_stats as unit_stats
