"""Programs as data: an interpreter of the programs that JAX traces, and how to tell an activation in them."""
