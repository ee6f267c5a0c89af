"""What is measured, and in which order."""

import concurrent.futures
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrelu.benchmark import children, timing
from jaxrelu.benchmark.networks import EXPERT, STEPS, build
from jaxrelu.benchmark.peers import PEERS, Activation, identity
from jaxrelu.benchmark.targets import Target, compile_network, kernels
from jaxrelu.memory import lean

__all__ = ["DEFAULT_KINDS", "KINDS", "Measures", "Plan", "here", "lacks"]

Measures = dict[str, Any]
DEFAULT_KINDS = ("memory", "elementwise", "eager", "step", "saved", "resident", "observed", "import")
# the last two are meant for a GPU, but run on a CPU too
KINDS = (*DEFAULT_KINDS, "peak", "expm1")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run of the benchmark.

    Attributes:
        targets: the machines for which the networks are compiled.
        activations, dtypes, kinds: their names.
        networks: the names of the networks that are compiled for their memory.
        running: the names of the networks that are run for their time or their peak memory.
        sizes: the numbers of elements of the elementwise calls.
        batch: the batch of the networks, for memory and peak.
        step_batch: the batch of the networks in a step.
        width, layers: the width of the networks, and their number of layers.
        quick: whether fewer and shorter measurements are run.
    """

    targets: list[Target]
    activations: tuple[str, ...]
    networks: tuple[str, ...]
    running: tuple[str, ...]
    kinds: tuple[str, ...]
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    batch: int
    step_batch: int
    width: int
    layers: int
    quick: bool

    def groups(self) -> Iterator[tuple[str, Iterator[Measures]]]:
        """Yields a label and the measurements of each group: first those by the compiler, then those that run something."""
        if "memory" in self.kinds:
            for target in self.targets:
                for dtype in self.dtypes:
                    for network in self.networks:
                        yield f"{network} {dtype}", self._memory(target, network, dtype)
        for dtype in self.dtypes:
            for activation in self.activations:
                yield from self._of_activation(activation, dtype)
            if "observed" in self.kinds:
                yield f"observed {dtype}", self._observed(dtype)
            if "expm1" in self.kinds:
                for size in self.sizes:
                    yield f"expm1 {dtype} {size}", self._exponentials(dtype, size)
        if "import" in self.kinds:
            yield "import", self._import()

    def _of_activation(self, activation: str, dtype: str) -> Iterator[tuple[str, Iterator[Measures]]]:
        first = activation == self.activations[0]
        if "elementwise" in self.kinds:
            for size in self.sizes if first or not self.quick else self.sizes[-1:]:
                yield f"{activation} {dtype} {size}", self._elementwise(activation, dtype, size)
        if self.quick and not first:
            return
        if "eager" in self.kinds:
            yield f"{activation} {dtype} eager", self._eager(activation, dtype)
        if "step" in self.kinds:
            for network in (name for name in self.running if name not in STEPS):
                yield f"{activation} {dtype} {network} step", self._step(activation, network, dtype)
        if "peak" in self.kinds and not lacks("peak"):
            for network in self.running:
                yield f"{activation} {dtype} {network} peak", self._peak(activation, network, dtype)
        if "saved" in self.kinds and not lacks("saved"):
            yield f"{activation} {dtype} saved", self._saved(activation, dtype)
        if "resident" in self.kinds and not lacks("resident"):
            yield f"{activation} {dtype} resident", self._resident(activation, dtype)

    def _memory(self, target: Target, network: str, dtype: str) -> Iterator[Measures]:
        common = {"what": "memory", "network": network, "dtype": dtype, "size": self.batch * self.width}
        known: dict[tuple[Any, ...], Measures] = {}

        def measured(function: Activation, **how: Any) -> Measures:
            if (function, *how) not in known:
                built = build(network, function, self.batch, self.width, dtype, layers=self.layers, **how)
                compiled = compile_network(built, target)
                temp, text = compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()
                found = {"fusions": text.count(" fusion("), "kernels": kernels(text)}
                known[function, *how] = {"temp_bytes": temp} | found
            return common | {"device": target.name} | known[function, *how]

        yield {"peer": "identity"} | measured(identity)
        for activation in self.activations:
            row = PEERS[activation]
            yield {"activation": activation, "peer": "jaxrelu"} | measured(row.ours)
            yield {"activation": activation, "peer": row.peer} | measured(row.reference)
            if target.device.platform != "tpu":  # there lean returns the loss itself
                leaned = measured(row.reference, around=functools.partial(lean, platform=target.device.platform))
                yield {"activation": activation, "peer": "lean"} | leaned
            if network in EXPERT and not target.ahead and (not self.quick or activation == self.activations[0]):
                yield {"activation": activation, "peer": f"{row.peer}+checkpoint"} | measured(row.reference, expert=True)

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

    def _step(self, activation: str, network: str, dtype: str) -> Iterator[Measures]:
        size = self.step_batch * self.width
        common = {"activation": activation, "what": "step", "network": network, "dtype": dtype, "size": size}
        shape = (self.step_batch, self.width, self.layers)
        yield from _all_timed(common, timing.training_step(network, activation, dtype, *shape, 5 * self._seconds))

    def _peak(self, activation: str, network: str, dtype: str) -> Iterator[Measures]:
        size = self.batch * self.width
        common = {"what": "peak", "network": network, "dtype": dtype, "size": size, "device": here()}
        peers = ("jaxrelu", PEERS[activation].peer, "identity", "lean")

        def measured(peer: str) -> Measures | None:
            return children.peak_bytes(network, activation, peer, dtype, self.batch, self.width, self.layers)

        # all at the same time, because each process counts its own memory, and nothing is timed
        with concurrent.futures.ThreadPoolExecutor(len(peers)) as pool:
            for peer, found in zip(peers, pool.map(measured, peers), strict=True):
                if found is None:
                    print(f"\npeak of {network} {dtype}, {peer}: hidden by that of compiling; {_CACHE}", file=sys.stderr)
                else:
                    yield common | {"activation": None if peer == "identity" else activation, "peer": peer} | found

    def _observed(self, dtype: str) -> Iterator[Measures]:
        size = self.step_batch * self.width
        common = {"activation": "relu", "network": "mlp", "dtype": dtype, "size": size}
        for one_in in (1,) if self.quick else (1, 20):
            shape = (self.step_batch, self.width, self.layers)
            times = timing.observed_step(dtype, *shape, 5 * self._seconds, one_in)
            yield from _all_timed(common | {"what": f"observed 1/{one_in}"}, times)

    def _exponentials(self, dtype: str, size: int) -> Iterator[Measures]:
        common = {"activation": "elu", "dtype": dtype, "size": size}
        for (what, peer), time in timing.exponentials(dtype, size, self._seconds).items():
            yield common | {"what": what} | _timed(peer, time)

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
            grown = children.resident_bytes(activation, peer, dtype, batch, width, layers)
            yield common | {"peer": peer, "temp_bytes": grown, "device": here()}

    def _import(self) -> Iterator[Measures]:
        yield from _all_timed({"what": "import"}, timing.import_times(2 if self.quick else 11))


_CACHE = "set JAX_COMPILATION_CACHE_DIR, and measure the memory first"


def _timed(peer: str, time: timing.Timing) -> Measures:
    return {"peer": peer, "median_s": time.median, "spread": time.spread, "device": here()}


def _all_timed(common: Measures, times: Mapping[str, timing.Timing]) -> Iterator[Measures]:
    for peer, time in times.items():
        yield common | _timed(peer, time)


def lacks(kind: str) -> str | None:
    """Returns what is missing here for a kind of measurement."""
    on_cpu = jax.default_backend() == "cpu"
    if kind == "saved" and not (on_cpu and timing.torch_here()):
        return "PyTorch and --platform cpu"
    if kind == "resident" and not (on_cpu and children.resettable()):
        return "Linux and --platform cpu"
    return "Linux or a GPU" if kind == "peak" and on_cpu and not children.resettable() else None


def here() -> str:
    """Returns the name of the device that JAX runs on; for a CPU, also the number of cores that this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    information = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", information.read_text() if information.exists() else "", re.MULTILINE)
    return f"cpu, {cores} core{'s' if cores > 1 else ''}{f' ({model[1]})' if model else ''}"
