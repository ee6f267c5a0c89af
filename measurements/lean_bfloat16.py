"""Prints how far gradients in bfloat16 are from those in float32, as they are, under lean, and otherwise.

    python measurements/lean_bfloat16.py

XLA keeps float32 numbers between operations in bfloat16 where it computes them in one kernel. What is kept for the backward
pass is rounded, under lean and under `jax.checkpoint`. A figure is the largest difference in an array of the gradient,
divided by the array's largest entry; of all arrays, the largest.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrelu.benchmark.networks import build, values
from jaxrelu.benchmark.peers import PEERS
from jaxrelu.memory import lean

COLUMNS = ("as it is", "lean", "dots_saveable", "as it is, no excess precision")


def widened(tree: Any) -> Any:
    """Returns the arrays in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def error(gradient: Any, exact: Any) -> float:
    """Returns how far a gradient is from the exact one."""
    pairs = zip(jax.tree.leaves(widened(gradient)), jax.tree.leaves(exact), strict=True)
    return max(float(jnp.abs(g - e).max() / jnp.abs(e).max()) for g, e in pairs if jnp.abs(e).max() > 0)


def main() -> None:
    """Prints a line for each network."""
    print(f"{'':12}", *COLUMNS, sep=" | ")
    for name in ("mlp", "conv_norm", "transformer"):
        network = build(name, PEERS["relu"].reference, 1024, 256, jnp.bfloat16)
        arguments, loss = values(network.arguments), network.loss
        assert loss is not None
        saveable = jax.checkpoint(loss, policy=jax.checkpoint_policies.dots_saveable)
        ways = ((loss, {}), (lean(loss), {}), (saveable, {}), (loss, {"xla_allow_excess_precision": False}))
        exact = jax.jit(jax.grad(loss))(*widened(arguments))
        compiled = [jax.jit(jax.grad(f)).lower(*arguments).compile(compiler_options=options) for f, options in ways]
        errors = [f"{error(gradient(*arguments), exact):.3f}" for gradient in compiled]
        print(f"{name:12}", *errors, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
