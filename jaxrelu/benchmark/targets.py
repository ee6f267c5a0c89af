"""The machines that networks are compiled for, present or absent."""

import collections
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxrelu.benchmark.layers import Shape
from jaxrelu.benchmark.networks import Network

__all__ = ["AHEAD", "TPUS", "Target", "compile_network", "kernels", "targets_ahead"]


class Target(NamedTuple):
    """A machine to compile for.

    Attributes:
        device: a device of JAX, real or described by a topology.
        name: the name in the measurements.
        options: the compiler's options that differ from the default.
        ahead: whether the machine is absent.
    """

    device: Any
    name: str
    options: dict[str, Any] | None = None
    ahead: bool = False


TPUS = ("tpu-v5e", "tpu-v6e")
AHEAD = (*TPUS, "h200")


def targets_ahead(platform: str, description: Path) -> list[Target]:
    """Returns the targets for a platform whose hardware is not there.

    Args:
        platform: one of AHEAD.
        description: the GPU's target description, a text protobuf.
    """
    if platform in TPUS:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{platform.removeprefix('tpu-')}:2x2")
        return [Target(topology.devices[0], f"{platform}, compiled ahead of time", ahead=True)]
    topology = topologies.get_topology_desc(platform="cuda", target_config=description.read_text(), topology="1x1x1")
    # XLA would choose between two kinds of matrix product by timing them, which needs the device: both are compiled here
    modes = {"Triton": True, "cuBLAS": False}
    return [
        Target(
            topology.devices[0], f"h200 {mode}, compiled ahead of time", {"xla_gpu_enable_triton_gemm": triton}, ahead=True
        )
        for mode, triton in modes.items()
    ]


def compile_network(network: Network, target: Target) -> Any:
    """Returns the network compiled for the target."""
    sharding = SingleDeviceSharding(target.device)

    def placed(s: Shape) -> Shape:
        return Shape(s.shape, s.dtype, sharding=sharding)

    arguments = jax.tree.map(placed, network.arguments)
    return jax.jit(network.function).lower(*arguments).compile(compiler_options=target.options)


# a call of a library's function, or a matrix product that XLA generates itself, for example by Triton
_KERNEL = re.compile(r'custom_call_target="(?P<library>[^"]+)"|"kind":\s*"(?P<generator>__[^"]+)"')
_EPILOGUE = re.compile(r'"epilogue":\s*"(?P<name>\w+)"')


def kernels(program: str) -> dict[str, int]:
    """Counts the calls of libraries and the generated products in a compiled program, by name.

    Args:
        program: the text of the optimised program. If a product of cuBLASLt also computes what follows it (its epilogue),
            that is added to its name, as in "__cublas$lt$matmul RELU_BIAS".
    """
    found: collections.Counter[str] = collections.Counter()
    for line in program.splitlines():
        epilogue = _EPILOGUE.search(line)
        after = f" {epilogue['name']}" if epilogue and epilogue["name"] != "DEFAULT" else ""
        found.update(f"{match['library'] or match['generator']}{after}" for match in _KERNEL.finditer(line))
    return dict(sorted(found.items()))
