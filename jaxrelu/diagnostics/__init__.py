"""Find dying units: statistics of every activation in any JAX model, and reports on them.

`observe` takes the statistics of a model without an edit to it; `unit_stats` takes those of an array.
"""

from jaxrelu.diagnostics.measurement import unit_stats
from jaxrelu.diagnostics.observe import Stats, observe
from jaxrelu.diagnostics.reports import check_init, gradient_flow, summary, to_scalars
from jaxrelu.diagnostics.stats import UnitStats, all_reduce, merge

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
