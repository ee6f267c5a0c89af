"""`lean`: a function whose gradient keeps one array for each product; `compare`: what that gains."""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
from jax.extend import core

from jaxrelu._lowering import portable
from jaxrelu._programs.calls import check_state, flattened, named_as, returned
from jaxrelu._programs.interpreter import Scope, bodies, opened
from jaxrelu._programs.regions import exchanged, planned

__all__ = ["Comparison", "Row", "compare", "lean"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")


def lean(f: Callable[_P, _R], *, platform: str | None = None) -> Callable[_P, _R]:
    """Returns f, whose gradient keeps one array for each matrix product or convolution, with no edit to f.

    Values and derivatives are those of f. Between two products JAX keeps most arrays for the backward pass; here the fewest
    bytes are kept from which those that derivatives read can be computed again: after a convolution and a norm its output,
    so that norm and activation are computed again; after a dense layer the output of relu. Products, reductions,
    collectives and random numbers are never computed again. Use it around the loss, inside `jax.jit`: outside, each call is
    traced and planned anew, and `f` too must be one that `jax.jit` takes.

    In float32 a gradient under jit is the same bit for bit, or differs by rounding. In bfloat16 and float16 it differs by
    more: without `lean` XLA keeps numbers between two operations in float32, and what is kept here is rounded.

    It goes into scan, cond and shard_map, and through jit. What it does not know is left as it is: loops by while, functions
    with a rule of their own by `jax.custom_vjp`, kernels, parts under `jax.checkpoint`. On the CPU before JAX 0.11.1 the
    compiler undoes recomputation: there only jax.nn's relu and relu6 are replaced by this package's. On a
    TPU, whose compiler recomputes by itself, f is returned as it is, and so it is on platforms that are not listed here.

    Args:
        f: a function of arrays, numbers, models and whatever else; what is no array is static, as under `observe`.
        platform: what the gradient is compiled for, "cpu", "gpu", "cuda", "rocm" or "tpu"; None for the platform that JAX
            runs on by default.

    Raises:
        TypeError: `f` is not callable.
        ValueError: `platform` is unknown; or `f` replaces an array in one of its arguments, as a model that changes its own
            state does.

    Warns:
        UserWarning: `f` returns a gradient: lean belongs inside, as in `jax.grad(lean(loss))`.

    Examples:
        >>> import jax, jaxrelu.memory
        >>> loss = lambda w, x: jax.nn.relu(jax.nn.relu(x @ w) @ w).sum()
        >>> w, x = jax.numpy.eye(2), jax.numpy.array([[1.0, -2.0]])
        >>> jax.jit(jax.grad(jaxrelu.memory.lean(loss)))(w, x)
        Array([[ 2.,  0.],
               [-2.,  0.]], dtype=float32)
    """
    if not callable(f):
        raise TypeError(f"lean: f must be a function, got {f!r}; pass the loss, not its value")
    if platform not in (None, *_PLATFORMS):
        raise ValueError(f"lean: platform must be None or one of {', '.join(_PLATFORMS)}, got {platform!r}")

    def leaned(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        target = platform or jax.default_backend()
        if target not in _PLATFORMS or target == "tpu":
            return f(*args, **kwargs)
        # before JAX 0.11.1, XLA for the CPU removes the barriers of jax.checkpoint; this ends with support of JAX 0.11.0
        plans = target != "cpu" or jax.__version_info__ >= (0, 11, 1)
        function, arrays = flattened(f, args, kwargs)
        # as plain formulas, the functions of this package are recognized too
        with portable() if plans else contextlib.nullcontext():
            program, (out, left) = jax.make_jaxpr(function, return_shape=True)(*arrays)
            check_state("lean", f, program, left)
            scope = Scope(program)
            if not _returns_a_gradient(scope, scope.jaxpr.outvars[: len(scope.jaxpr.outvars) - len(left)]):
                return returned(out, (planned if plans else exchanged)(scope, arrays))
        warnings.warn("lean: f returns a gradient, which is not made leaner; use jax.grad(lean(loss))", stacklevel=2)
        return f(*args, **kwargs)

    return named_as(leaned, f)


def _returns_a_gradient(scope: Scope, outputs: Sequence[Any]) -> bool:
    """Returns whether arrays among these outputs of a program were computed from the results of a backward pass."""
    eqns = scope.jaxpr.eqns
    if len(eqns) == 1 and eqns[0].primitive.name == "jit":
        inner = scope.inside(eqns[0])[0]
        pairs = zip(eqns[0].outvars, inner.jaxpr.outvars, strict=True)
        return _returns_a_gradient(inner, [w for v, w in pairs if v in outputs])
    behind = set[Any]()
    for eqn in eqns:
        if _goes_backward(eqn) or not behind.isdisjoint(v for v in eqn.invars if isinstance(v, core.Var)):
            behind.update(eqn.outvars)
    return any(v in behind and getattr(v.aval, "ndim", 0) for v in outputs if not isinstance(v, core.Literal))


def _goes_backward(eqn: core.JaxprEqn) -> bool:
    inside = (inner for body in bodies(eqn) for inner in opened(body).eqns)
    return "transpose(" in str(eqn.source_info.name_stack) or any(map(_goes_backward, inside))


class Row(NamedTuple):
    """One way to compute a gradient, and what the compiler says of it.

    Attributes:
        name: the way.
        temp_bytes: the memory it takes besides arguments and results, in bytes.
        flops: the number of floating-point operations. Both are None where the compiler does not tell.
    """

    name: str
    temp_bytes: int | None
    flops: float | None


class Comparison(tuple[Row, ...]):
    """The rows that `compare` returns; printed, they are a table with a sentence of advice."""

    __slots__ = ()

    @property
    def advice(self) -> str:
        """What takes least memory, in one sentence."""
        plain, leaner = self[:2]
        known = [row for row in self if row.temp_bytes is not None]
        if plain not in known:
            return "The compiler does not tell how much memory a gradient takes."
        least = min(known, key=lambda row: row.temp_bytes or 0)
        if leaner in known and _ratio(leaner.temp_bytes, least.temp_bytes or 1) <= 1.02:
            least = leaner
        memory, flops = _ratio(least.temp_bytes, plain.temp_bytes), _ratio(least.flops, plain.flops)
        if memory > 0.98:
            return "Leave f as it is: none of these ways takes less memory."
        way = "jax.grad(lean(f))" if least is leaner else f"jax.grad of f under {least.name}"
        return f"{way} takes {memory:.2f} of the memory, with {flops:.2f} of the operations."

    def __repr__(self) -> str:
        """Returns the table."""
        lines = [f"{'':34}{'temp memory':>15}{'ratio':>8}{'operations':>15}{'ratio':>8}"]
        for name, temp_bytes, flops in self:
            memory = "-" if temp_bytes is None else f"{temp_bytes / 2**20:,.1f} MiB"
            operations = "-" if flops is None else f"{flops:.3e}"
            ratios = _ratio(temp_bytes, self[0].temp_bytes), _ratio(flops, self[0].flops)
            lines.append(f"{name:34}{memory:>15}{ratios[0]:8.2f}{operations:>15}{ratios[1]:8.2f}")
        return "\n".join([*lines, self.advice])


def _ratio(number: float | None, by: float | None) -> float:
    return math.nan if number is None or not by else number / by


def compare(f: Callable[..., Any], *args: Any, argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Comparison:
    """Compiles the gradient of f in four ways, and returns memory and operations of each, before anything is run.

    The ways are f as it is; `lean(f)`; and `jax.checkpoint` of f, with the policy `dots_saveable`, which keeps the results
    of all matrix products, and with none, which keeps the arguments of f alone.

    Args:
        f: a loss, as `jax.grad` takes it.
        *args: its arguments, or `jax.ShapeDtypeStruct` in place of arrays: only shapes and dtypes matter.
        argnums: the arguments in which f is differentiated.
        has_aux: whether f returns a pair, of which the first is the loss.

    Raises:
        TypeError: `f` is not callable, or does not return a float number.

    Examples:
        >>> import jax, jaxrelu.memory
        >>> loss = lambda w, x: jax.nn.gelu(jax.nn.gelu(x @ w) @ w).sum()
        >>> shapes = jax.ShapeDtypeStruct((64, 64), "float32"), jax.ShapeDtypeStruct((256, 64), "float32")
        >>> rows = jaxrelu.memory.compare(loss, *shapes)
        >>> [row.name for row in rows]
        ['f as it is', 'lean', 'jax.checkpoint, dots_saveable', 'jax.checkpoint']
    """
    if not callable(f):
        raise TypeError(f"compare: f must be a function, got {f!r}; pass the loss, not its value")
    out = jax.eval_shape(f, *args)
    loss = out[0] if has_aux else out
    if getattr(loss, "shape", None) != () or not jax.numpy.issubdtype(loss.dtype, jax.numpy.floating):
        raise TypeError(f"compare: f must return a float number, got {loss}; take the mean, or pass has_aux=True for a pair")
    ways = {
        "f as it is": f,
        "lean": lean(f),
        "jax.checkpoint, dots_saveable": jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
        "jax.checkpoint": jax.checkpoint(f),
    }
    rows = list[Row]()
    for name, way in ways.items():
        compiled = jax.jit(jax.grad(way, argnums, has_aux=has_aux)).lower(*args).compile()
        flops = (compiled.cost_analysis() or {}).get("flops")
        rows.append(Row(name, getattr(compiled.memory_analysis(), "temp_size_in_bytes", None), flops))
    return Comparison(rows)
