"""Timings, in which all peers of a measurement take turns, and other measurements that run something."""

import functools
import importlib
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxrelu.benchmark import children, polynomial
from jaxrelu.benchmark.networks import EXPERT, adam, adam_step, build, values
from jaxrelu.benchmark.peers import PEERS, SLOPE, Activation, identity
from jaxrelu.diagnostics import observe
from jaxrelu.memory import lean

__all__ = [
    "Timing",
    "eager",
    "elementwise",
    "exponentials",
    "import_times",
    "interleave",
    "observed_step",
    "torch_here",
    "torch_saved_bytes",
    "training_step",
]

Call = Callable[[], Any]


class Timing(NamedTuple):
    """Median and interquartile range, in seconds."""

    median: float
    spread: float


def interleave(calls: Mapping[Any, Call], seconds: float, *, fewest: int = 7, most: int = 101) -> dict[Any, Timing]:
    """Times functions in turn, so that a change in the machine's speed affects all of them alike.

    Args:
        calls: functions that return only when their result is ready.
        seconds: the time that all rounds may take together, unless that means too few or too many rounds.
        fewest: the least number of rounds.
        most: the greatest number of rounds.
    """
    repeats: dict[Any, int] = {}
    total = 0.0
    for name, call in calls.items():
        call()  # compiles
        once = min(_time(call, 1) for _ in range(3))
        repeats[name] = max(1, math.ceil(1e-3 / once))  # far above the clock's resolution
        total += once * repeats[name]
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(min(most, max(fewest, int(seconds / total)))):
        for name in order:
            samples[name].append(_time(calls[name], repeats[name]))
        order.reverse()  # so that no function always runs after the same other one
    return {name: _timing(times) for name, times in samples.items()}


def _time(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _timing(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, high - low)


def _blocking(function: Callable[..., Any], *arguments: Any) -> Call:
    def call() -> Any:
        return jax.block_until_ready(function(*arguments))

    return call


def elementwise(activation: str, dtype: str, size: int, seconds: float) -> dict[tuple[str, str], Timing]:
    """Times forward, gradient and in place of one activation and its peers, by (what, peer).

    The gradient is that in x, and in the slope if it is learned, for a given gradient of the output. The peer copy is
    NumPy's on the CPU, and the device's elsewhere.
    """
    row = PEERS[activation]
    x = jax.random.normal(jax.random.key(0), (size,), dtype)
    g = jax.random.normal(jax.random.key(1), (size,), dtype)
    slope = jnp.full((), SLOPE, jnp.float32)
    calls: dict[tuple[str, str], Call] = {}
    for peer, function in (("jaxrelu", row.ours), (row.peer, row.reference)):
        calls["forward", peer] = _blocking(jax.jit(function), x, slope)
        calls["gradient", peer] = _blocking(jax.jit(functools.partial(_gradient, function, row.learned)), x, slope, g)
    calls["inplace", "jaxrelu"] = _donating(row.inplace, x)
    on_cpu = jax.default_backend() == "cpu"
    calls["forward", "copy"] = functools.partial(np.copy, np.asarray(x)) if on_cpu else _blocking(jax.jit(jnp.copy), x)
    calls |= {(what, "torch"): call for what, call in _torch_calls(row.torch, x, g).items()}
    return interleave(calls, seconds)


def exponentials(dtype: str, size: int, seconds: float) -> dict[tuple[str, str], Timing]:
    """Times elu and its derivative by jaxrelu's polynomial and by jnp's functions, by (what, peer)."""
    x = jax.random.normal(jax.random.key(0), (size,), dtype)
    g = jax.random.normal(jax.random.key(1), (size,), dtype)
    calls: dict[tuple[str, str], Call] = {}
    for peer, (value, gradient) in polynomial.FORMS.items():
        calls["expm1", peer] = _blocking(jax.jit(value), x)
        calls["exp", peer] = _blocking(jax.jit(gradient), x, g)
    return interleave(calls, seconds)


def _gradient(function: Callable[..., Array], learned: bool, x: Array, slope: Array, g: Array) -> Any:
    _, pull = jax.vjp(function, x, slope)
    gradients = pull(g)
    return gradients if learned else gradients[0]


def _donating(function: Callable[[Array], Array], x: Array) -> Call:
    held = [x.copy()]

    def call() -> None:
        held[0] = jax.block_until_ready(function(held[0]))

    return call


def torch_here() -> bool:
    """Returns whether PyTorch is installed and sees the device that JAX runs on."""
    if importlib.util.find_spec("torch") is None:
        return False
    return jax.default_backend() == "cpu" or (jax.default_backend() == "gpu" and _torch().cuda.is_available())


def _torch() -> Any:
    """Returns PyTorch. It is no dependency: imported in this way, the type checker does not need it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # its idle threads would else keep the cores busy
    return importlib.import_module("torch")


def _same(tensor: Any) -> Any:
    return tensor


def _torch_calls(name: str, x: Array, g: Array) -> dict[str, Call]:
    if not torch_here():
        return {}
    torch = _torch()
    gpu = jax.default_backend() == "gpu"
    dtype: Any = getattr(torch, str(x.dtype))
    primal, gradient = (torch.tensor(np.asarray(a, np.float32), device="cuda" if gpu else "cpu").to(dtype) for a in (x, g))
    slope = torch.full((1,), SLOPE, dtype=dtype, device=primal.device, requires_grad=True)
    tracked = primal.clone().requires_grad_()
    function: Any = getattr(torch.nn.functional, name)
    weights = (slope,) if name == "prelu" else ()

    def finish(result: Any) -> Any:
        if gpu:
            torch.cuda.synchronize()
        return result

    def forward() -> Any:
        with torch.no_grad():
            return finish(function(primal, *weights))

    def backward() -> Any:
        return finish(torch.autograd.grad(function(tracked, *weights), (tracked, *weights), gradient))

    return {"forward": forward, "gradient": backward}


def torch_saved_bytes(activation: str | None, dtype: str, batch: int, width: int, layers: int = 8) -> int:
    """Returns the bytes that PyTorch saves for the backward pass of the mlp: each storage once, without the parameters."""
    torch = _torch()
    number: Any = getattr(torch, dtype)
    parameters: list[Any] = []
    saved: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(batch, width).to(number)
    with torch.autograd.graph.saved_tensors_hooks(keep, _same):
        for _ in range(layers):
            w = torch.randn(width, width).mul(width**-0.5).to(number).requires_grad_()
            b, slope = torch.zeros(width, dtype=number, requires_grad=True), torch.full((1,), SLOPE, dtype=number)
            parameters += [w, b, slope.requires_grad_()]
            x = x @ w + b
            if activation is not None:
                function: Any = getattr(torch.nn.functional, PEERS[activation].torch)
                x = function(x, slope) if activation == "prelu" else function(x)
        loss = x.float().square().mean()
    for parameter in parameters:
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    del loss
    return sum(saved.values())


def eager(activation: str, dtype: str, size: int, seconds: float) -> dict[str, Timing]:
    """Times a call outside jit, by peer."""
    row = PEERS[activation]
    x, slope = jnp.linspace(-1.0, 1.0, size, dtype=dtype), jnp.full((), SLOPE, jnp.float32)
    return interleave(
        {"jaxrelu": _blocking(row.ours, x, slope), row.peer: _blocking(row.reference, x, slope)}, seconds, most=301
    )


def training_step(
    name: str, activation: str, dtype: str, batch: int, width: int, layers: int, seconds: float
) -> dict[str, Timing]:
    """Times an Adam step of a network that has a loss, by peer."""
    row = PEERS[activation]
    peers: dict[str, tuple[Activation, dict[str, Any]]] = {
        "jaxrelu": (row.ours, {}),
        row.peer: (row.reference, {}),
        "lean": (row.reference, {"around": lean}),
        "identity": (identity, {}),
    }
    if name in EXPERT:
        peers[f"{row.peer}+checkpoint"] = (row.reference, {"expert": True})
    calls: dict[str, Call] = {}
    for peer, (function, how) in peers.items():
        network = build(name, function, batch, width, dtype, layers=layers, **how)
        assert network.loss is not None
        parameters, x = values(network.arguments)
        calls[peer] = _repeating(adam_step(network.loss), parameters, x)
    return interleave(calls, seconds)


def _repeating(step: Callable[..., Any], parameters: Any, x: Array) -> Call:
    """Returns a call that does the next training step; it donates its state to the step, as a training loop does."""
    held = [parameters, adam.init(parameters)]
    jitted = jax.jit(step, donate_argnums=(0, 1))

    def call() -> None:
        held[:] = jax.block_until_ready(jitted(*held, x))[:2]

    return call


def observed_step(dtype: str, batch: int, width: int, layers: int, seconds: float, one_in: int) -> dict[str, Timing]:
    """Times Adam steps of an mlp with relu, one_in of them: with the last one observed, and with none observed."""
    network = build("mlp", PEERS["relu"].ours, batch, width, dtype, layers=layers)
    loss = network.loss
    assert loss is not None
    parameters, x = values(network.arguments)

    def observed(parameters: Any, state: Any, x: Array) -> Any:
        gradients, stats = jax.grad(observe(loss), has_aux=True)(parameters, x)
        updates, state = adam.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, stats

    plain = _repeating(adam_step(loss), parameters, x)
    # with arrays of its own, as the calls of the other donate theirs
    watched = _repeating(observed, *values(network.arguments))

    def mixed() -> None:
        for _ in range(one_in - 1):
            plain()
        watched()

    def unobserved() -> None:
        for _ in range(one_in):
            plain()

    return interleave({"jaxrelu": mixed, "step": unobserved}, seconds)


def import_times(rounds: int) -> dict[str, Timing]:
    """Times `import jaxrelu` and `import jax`, each in a fresh process; their files have been read before by this one."""
    samples: dict[str, list[float]] = {"jaxrelu": [], "jax": []}
    for _ in range(rounds):
        for module, times in samples.items():
            code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
            times.append(float(children.run(code)))
    return {module: _timing(times) for module, times in samples.items()}
