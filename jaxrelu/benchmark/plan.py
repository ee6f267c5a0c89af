"""What is measured, and in which order."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrelu.benchmark import timing
from jaxrelu.benchmark.networks import EXPERT, build
from jaxrelu.benchmark.peers import PEERS, Activation, identity
from jaxrelu.benchmark.targets import Target, compile_network

__all__ = ["Measures", "Plan", "here"]

Measures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run of the benchmark.

    Attributes:
        targets: machines for which the networks are compiled.
        activations, networks, dtypes: names.
        sizes: elements of the elementwise calls.
        batch, width, layers: of the networks whose memory is measured.
        quick: whether what runs is fewer and shorter.
    """

    targets: list[Target]
    activations: tuple[str, ...]
    networks: tuple[str, ...]
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    batch: int
    width: int
    layers: int
    quick: bool

    def compiled(self) -> Iterator[tuple[str, Iterator[Measures]]]:
        """Yields a label and the measurements of everything that the compiler tells."""
        for target in self.targets:
            for dtype in self.dtypes:
                for network in self.networks:
                    yield f"{network} {dtype}", self._memory(target, network, dtype)

    def timed(self) -> Iterator[tuple[str, Iterator[Measures]]]:
        """Yields a label and the measurements of everything that has to run."""
        on_cpu = jax.default_backend() == "cpu"
        for dtype in self.dtypes:
            for activation in self.activations:
                first = activation == self.activations[0]
                for size in self.sizes if first or not self.quick else self.sizes[-1:]:
                    yield f"{activation} {dtype} {size}", self._elementwise(activation, dtype, size)
                if self.quick and not first:
                    continue
                yield f"{activation} {dtype} eager", self._eager(activation, dtype)
                yield f"{activation} {dtype} step", self._step(activation, dtype)
                if on_cpu and timing.torch_here():
                    yield f"{activation} {dtype} saved", self._saved(activation, dtype)
                if on_cpu and Path("/proc/self/clear_refs").exists():
                    yield f"{activation} {dtype} resident", self._resident(activation, dtype)
            yield f"observed {dtype}", self._observed(dtype)
        yield "import", self._import()

    def _memory(self, target: Target, network: str, dtype: str) -> Iterator[Measures]:
        common = {"what": "memory", "network": network, "dtype": dtype, "size": self.batch * self.width}
        known: dict[tuple[Activation, bool], Measures] = {}

        def measured(function: Activation, expert: bool = False) -> Measures:
            if (function, expert) not in known:
                built = build(network, function, self.batch, self.width, dtype, layers=self.layers, expert=expert)
                compiled = compile_network(built, target)
                temp = compiled.memory_analysis().temp_size_in_bytes
                known[function, expert] = {"temp_bytes": temp, "fusions": compiled.as_text().count(" fusion(")}
            return common | {"device": target.name} | known[function, expert]

        yield {"peer": "identity"} | measured(identity)
        for activation in self.activations:
            row = PEERS[activation]
            yield {"activation": activation, "peer": "jaxrelu"} | measured(row.ours)
            yield {"activation": activation, "peer": row.peer} | measured(row.reference)
            if network in EXPERT and not target.ahead and (not self.quick or activation == self.activations[0]):
                yield {"activation": activation, "peer": f"{row.peer}+checkpoint"} | measured(row.reference, True)

    @property
    def _seconds(self) -> float:
        return 0.2 if self.quick else 2.0

    def _elementwise(self, activation: str, dtype: str, size: int) -> Iterator[Measures]:
        common = {"activation": activation, "dtype": dtype, "size": size}
        for (what, peer), time in timing.elementwise(activation, dtype, size, self._seconds).items():
            yield common | {"what": what} | _timed(peer, time)

    def _eager(self, activation: str, dtype: str) -> Iterator[Measures]:
        common = {"activation": activation, "what": "eager", "dtype": dtype, "size": 8}
        yield from _all_timed(common, timing.eager(activation, dtype, 8, self._seconds))

    def _step(self, activation: str, dtype: str) -> Iterator[Measures]:
        batch, width = (512, 256) if self.quick else (2048, 512)
        common = {"activation": activation, "what": "step", "network": "mlp", "dtype": dtype, "size": batch * width}
        yield from _all_timed(common, timing.training_step(activation, dtype, batch, width, 5 * self._seconds))

    def _observed(self, dtype: str) -> Iterator[Measures]:
        batch, width = (512, 256) if self.quick else (2048, 512)
        common = {"activation": "relu", "network": "mlp", "dtype": dtype, "size": batch * width}
        for one_in in (1,) if self.quick else (1, 20):
            times = timing.observed_step(dtype, batch, width, 5 * self._seconds, one_in)
            yield from _all_timed(common | {"what": f"observed 1/{one_in}"}, times)

    def _saved(self, activation: str, dtype: str) -> Iterator[Measures]:
        saved = timing.torch_saved_bytes(activation, dtype, self.batch, self.width, self.layers)
        common = {
            "activation": activation,
            "what": "saved",
            "network": "mlp",
            "dtype": dtype,
            "size": self.batch * self.width,
        }
        yield common | {"peer": "torch", "temp_bytes": saved, "device": here()}

    def _resident(self, activation: str, dtype: str) -> Iterator[Measures]:
        batch, width, layers = (4096, 512, 6) if self.quick else (16384, 512, 12)
        common = {"activation": activation, "what": "resident", "network": "mlp", "dtype": dtype, "size": batch * width}
        for peer in ("jaxrelu", PEERS[activation].peer, *(() if self.quick else ("identity",))):
            grown = timing.resident_bytes(activation, peer, dtype, batch, width, layers)
            yield common | {"peer": peer, "temp_bytes": grown, "device": here()}

    def _import(self) -> Iterator[Measures]:
        yield from _all_timed({"what": "import"}, timing.import_times(2 if self.quick else 11))


def _timed(peer: str, time: timing.Timing) -> Measures:
    return {"peer": peer, "median_s": time.median, "spread": time.spread, "device": here()}


def _all_timed(common: Measures, times: Mapping[str, timing.Timing]) -> Iterator[Measures]:
    for peer, time in times.items():
        yield common | _timed(peer, time)


def here() -> str:
    """Returns the name of the device that JAX runs on; of a CPU, with the cores that this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    information = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", information.read_text() if information.exists() else "", re.MULTILINE)
    return f"cpu, {cores} core{'s' if cores > 1 else ''}{f' ({model[1]})' if model else ''}"
