"""Memory beside the reference, from the benchmark's records ({key: {peer: record}}) or compiled here."""

import functools

from jaxrelu.benchmark.networks import build
from jaxrelu.benchmark.peers import PEERS
from jaxrelu.benchmark.targets import compile_network
from jaxrelu.memory import lean


def ratios(rows, field="temp_bytes", peer="jaxrelu"):
    """Returns the peer's figure to that of jax.nn, or for prelu of Flax, of each row."""
    return {
        key: peers[peer][field] / (peers.get("jax.nn") or peers["flax"])[field]
        for key, peers in rows.items()
        if peer in peers
    }


def of_the_smaller(rows):
    """Returns the memory under lean to the smaller one of jaxrelu's and the reference's, of each row."""
    ours, leaned = ratios(rows), ratios(rows, peer="lean")
    return {key: leaned[key] / min(1, ours[key]) for key in leaned}


def above(limit, found):
    return {key: round(ratio, 3) for key, ratio in found.items() if ratio > limit}


def lean_ratio(target, network, dtype, layers=8, batch=1024, width=256):
    """Returns the memory of a network with jax.nn's relu under lean to that without, compiled for a target."""
    leaned, plain = (
        compile_network(
            build(network, PEERS["relu"].reference, batch, width, dtype, layers=layers, **how), target
        ).memory_analysis()
        for how in ({"around": functools.partial(lean, platform=target.device.platform)}, {})
    )
    return leaned.temp_size_in_bytes / plain.temp_size_in_bytes
