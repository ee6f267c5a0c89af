"""A cure for dead units, as an Optax transformation: `recycle` gives them fresh weights while the network trains."""

from jaxrelu.recycling.edges import Edge
from jaxrelu.recycling.recycle import RecycleState, fresh_batch_stats, recycle

__all__ = ["Edge", "RecycleState", "fresh_batch_stats", "recycle"]
