"""Measurements that each need a fresh process, because the peak memory of a process never falls."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrelu.benchmark.layers import Shape
from jaxrelu.benchmark.networks import build, values
from jaxrelu.benchmark.peers import PEERS, Activation, identity
from jaxrelu.benchmark.targets import Target, compile_network
from jaxrelu.memory import lean

__all__ = ["grow", "peak", "peak_bytes", "resettable", "resident_bytes", "run"]

_CLEAR = Path("/proc/self/clear_refs")


def run(code: str, **environment: str) -> str:
    """Runs Python code in a fresh process and returns what it prints.

    Args:
        code: the program.
        **environment: variables to set in it, besides those of this process.

    Raises:
        RuntimeError: the process failed. The message has the last line of its errors, or the exit code.
    """
    child = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if child.returncode:
        # none if it was killed, for example for its memory
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise RuntimeError(f"a child process failed: {last}")
    return child.stdout


def resettable() -> bool:
    """Returns whether a process can reset its peak resident set on this machine, as on Linux."""
    return _CLEAR.exists()


def resident_bytes(activation: str, peer: str, dtype: str, batch: int, width: int, layers: int) -> int:
    """Returns by how much one training step of the mlp raises the peak resident set on the CPU (Linux)."""
    arguments = (activation, peer, dtype, batch, width, layers)
    return int(run(f"from jaxrelu.benchmark import children; print(children.grow(*{arguments!r}))", JAX_PLATFORMS="cpu"))


def grow(activation: str, peer: str, dtype: str, batch: int, width: int, layers: int) -> int:
    """Runs a training step and returns by how many bytes the peak resident set of this process grew."""
    network = build("mlp", _function(activation, peer), batch, width, dtype, layers=layers)
    parameters, x = values(network.arguments)

    def descend(parameters: Any, x: Array) -> Any:
        def move(p: Array, g: Array) -> Array:
            return p - (0.01 * g).astype(p.dtype)

        return jax.tree.map(move, parameters, network.function(parameters, x))

    compiled = jax.jit(descend, donate_argnums=0).lower(parameters, x).compile()
    jax.block_until_ready((parameters, x))
    _forget_peak()
    before = _memory("VmRSS")
    jax.block_until_ready(compiled(parameters, x))
    return _memory("VmHWM") - before


def peak_bytes(
    network: str, activation: str, peer: str, dtype: str, batch: int, width: int, layers: int
) -> dict[str, int] | None:
    """Runs `peak` in a process of its own and returns its result.

    On a GPU the network must already be in JAX's persistent compilation cache: compiling takes memory to try out kernels,
    which would count too and hide the memory of the network.
    """
    arguments = (network, activation, peer, dtype, batch, width, layers)
    code = f"import json; from jaxrelu.benchmark import children; print(json.dumps(children.peak(*{arguments!r})))"
    platform = jax.default_backend()
    # without preallocation each process takes only what it needs, so that several fit on one GPU
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | ({"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {})
    return json.loads(run(code, **environment))


def peak(network: str, activation: str, peer: str, dtype: str, batch: int, width: int, layers: int) -> dict[str, int] | None:
    """Runs a network once and returns the device's peak memory; on the CPU, the peak resident set (Linux).

    Returns:
        `peak_bytes` is the peak. `temp_bytes` is the peak minus the results, and minus all that was there before the run,
        such as the arguments. None if the peak was reached before the run.
    """
    device = jax.devices()[0]
    how: dict[str, Any] = {"around": lean} if peer == "lean" else {}
    built = build(network, _function(activation, peer), batch, width, dtype, layers=layers, **how)
    compiled = compile_network(built, Target(device, ""))

    def zeros(shape: Shape) -> Array:
        return jnp.zeros(shape.shape, shape.dtype)

    # zeros, because the values do not matter and generating random numbers takes memory, which has a peak too
    arguments = jax.block_until_ready(jax.tree.map(zeros, built.arguments))
    on_cpu = device.platform == "cpu"
    if on_cpu:
        _forget_peak()
        used, top = _memory("VmRSS"), 0
    else:
        used, top = _device_memory(device, "bytes_in_use"), _device_memory(device, "peak_bytes_in_use")
    results = jax.block_until_ready(compiled(*arguments))
    reached = _memory("VmHWM") if on_cpu else _device_memory(device, "peak_bytes_in_use")
    if reached == top:
        return None
    return {"temp_bytes": reached - used - sum(leaf.nbytes for leaf in jax.tree.leaves(results)), "peak_bytes": reached}


def _function(activation: str, peer: str) -> Activation:
    row = PEERS[activation]
    return identity if peer == "identity" else row.ours if peer == "jaxrelu" else row.reference


def _forget_peak() -> None:
    """Sets the peak resident set of this process to its current size, to forget the peak during compilation."""
    _CLEAR.write_text("5")


def _memory(field: str) -> int:
    """Returns a size of this process that Linux reports in KiB; getrusage would count the parent's peak too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def _device_memory(device: Any, field: str) -> int:
    return int(device.memory_stats()[field])
