"""Programs as data: an interpreter of what JAX traced, and the marks that tell an activation in it."""
