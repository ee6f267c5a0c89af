"""How the functions become programs: jitted cores, marks for `observe`, and the choice by platform.

A core is the private function that computes the value of an activation. What its derivative rule reads, the backward pass
keeps in memory. The next layer keeps an activation's output y anyway, so a rule that reads y lets the input x be freed. But
where XLA sees that y is cheap to compute from x, it keeps x and computes y again. What stops it differs by platform, and is
explained here or where `functions.py` does it; test_memory.py (CPU), test_lowering.py and test_platforms.py test it.
"""

import contextlib
import contextvars
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["TAG", "choose", "core", "donating", "observed", "outputs", "portable", "readable", "recomputed", "separate"]

TAG = "jaxrelu."  # the name of every core that `observe` sees begins with this
# whether `observe` is tracing; as it is a part of the key of JAX's caches, what was traced without marks is traced again
observed = jax.make_user_context(False)
_portable = jax.make_user_context(False)  # whether functions are traced as plain formulas
# during a call of `jaxrelu.inplace`: the function's name, and the array whose memory the result takes over
_donation: contextvars.ContextVar[tuple[str, Any]] = contextvars.ContextVar("donation", default=("", None))


def portable() -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the functions are traced as plain formulas: for Pallas kernels, and for exporters to ONNX.

    Values and derivatives are the same, but the program has no choice by platform, no barrier, and no call that JAX compiles
    by itself and remembers; these are there for memory and speed. What `jax.jit` compiled outside is traced anew.
    Activations under `observe`, and those in place, stay as they are.

    Examples:
        >>> import jax, jaxrelu
        >>> with jaxrelu.portable():
        ...     print(jax.make_jaxpr(jaxrelu.relu6)(jax.numpy.ones(3, jax.numpy.bfloat16)).eqns[-1].primitive)
        custom_jvp_call
    """
    return _portable(True)


def core(
    function: Callable[..., Any],
    name: str,
    static: tuple[int, ...],
    inline: bool = True,
    formula: Callable[..., Array] | None = None,
) -> Callable[..., Array]:
    """Returns a core as a jitted function that gives the value alone.

    It is jitted because a call outside jit would otherwise trace the core every time. Inside another jit it is inlined if
    `inline`, but while `observe` traces, it stays a call in the program: its name tells which activation it is, and a mark
    on its input and output tells the unit axis, along which the units of the layer lie.

    Args:
        function: the core; its first output is the value.
        name: the name of the public function.
        static: the places of the arguments that are not arrays.
        inline: whether it is inlined.
        formula: for `portable`, the value as an expression whose derivative by JAX is right, where the core's own rule is
            more than a kernel takes: a TPU's takes no rule with symbolic zeros.
    """

    def value(x: Array, *arguments: Any) -> Array:
        out = function(jnp.asarray(x), *arguments)  # with jit disabled, x may be a Python number
        return out[0] if isinstance(out, tuple) else out

    def named(x: Array, *arguments: Any) -> Array:
        return _mark(value(_mark(x), *arguments))

    named.__name__ = named.__qualname__ = TAG + name
    plain = jax.jit(value, static_argnums=static, inline=inline)
    marked = jax.jit(named, static_argnums=static)
    in_place = jax.jit(value, static_argnums=static, donate_argnums=0)

    def call(x: Array, *arguments: Any) -> Array:
        called, given = _donation.get()
        donates = called == name  # else a check of an argument calls this function
        if donates and x is not given:  # integers were converted to floats: only the copy would be overwritten
            raise _no_buffer(name, "a JAX array of floats", given)
        if _portable.value and not (donates or observed.value):
            return formula(jnp.asarray(x), *arguments) if formula else value(x, *arguments)
        return (marked if observed.value else in_place if donates else plain)(x, *arguments)

    return call


@contextlib.contextmanager
def donating(function: str, x: Any) -> Generator[None]:
    """In this context a core, once its arguments are checked, donates x: its output takes over x's memory, x is deleted."""
    if not isinstance(x, Array):
        raise _no_buffer(function, "a JAX array", x)
    token = _donation.set((function, x))
    try:
        yield
    finally:
        _donation.reset(token)


def _no_buffer(function: str, wanted: str, x: Any) -> TypeError:
    got = f"{x.dtype} array" if isinstance(x, Array) else type(x).__name__
    return TypeError(
        f"inplace.{function}: x must be {wanted}, as the output takes over its buffer, got {got}; use jaxrelu.{function}"
    )


def _mark(x: Array) -> Array:
    """Returns x, marked with its last axis as the unit axis: `lax.split` into one part, which changes nothing.

    It names an axis, and where vmap adds an axis to x, it corrects the number of the named one.
    """
    x = jnp.asarray(x)
    return lax.split(x, x.shape[-1:], axis=x.ndim - 1)[0] if x.ndim else x


def choose(default: Any, **by_platform: Any) -> Any:
    """Returns the value for the platform (cpu, gpu or tpu) that the program is compiled for; XLA drops the others."""
    if _portable.value:
        return default
    values = (default, *by_platform.values())
    branches: dict[str, Callable[..., Any]] = {}
    for index, platform in enumerate(by_platform, 1):
        for name in ("cuda", "rocm") if platform == "gpu" else (platform,):
            branches[name] = _item(index)
    return lax.platform_dependent(*values, **branches, default=_item(0))


def _item(index: int) -> Callable[..., Any]:
    return lambda *values: values[index]


def readable(x: Array, plain: Array, opaque: Array, on_gpu: tuple[Array, Array]) -> tuple[Array, Array]:
    """Returns a rectifier's value, and the array that its derivative rule is to read: x, or one with the sign of the value.

    TPU: plain, and x. Its compiler recomputes by itself, and takes up to 12 % more memory if the rule reads y.
    CPU: opaque for both: an mlp of 4 layers takes 5 MiB, with plain 8 (jax 0.10.2; `test_memory_of_a_gradient`). But for an
    x of 4 or more axes, or of 16 bits, plain, and x: behind a convolution with a norm XLA keeps x anyway and keeps y
    transposed, so that reading y costs a third array: resnet18 1.21 of jax.nn (`test_memory_beside_the_reference`). That
    also befalls an x of 3 axes where a 1-D convolution has a norm: 1.21 (jax 0.12).

    Args:
        x: the input.
        plain: the value by the expression that jax.nn uses.
        opaque: the same value by an expression that XLA does not compute again from x.
        on_gpu: what to return for a GPU.
    """
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits <= 16
    on_cpu = (plain, x) if x.ndim >= 4 or narrow else (opaque, opaque)
    return choose((plain, x), cpu=on_cpu, gpu=on_gpu)


def outputs(core: Callable[..., tuple[Array, Array]], x: Array, *static: float) -> tuple[Array, Array]:
    """Returns a core's value, and what its rule reads: in `portable` x itself, so that a derivative needs no value."""
    y, read = core(x, *static)
    return y, x if _portable.value else read


def separate(function: Callable[..., Array], *args: Any) -> Array:
    """Returns function(*args), as a call of its own in the traced program.

    CPU, bfloat16, an mlp under vmap: with this call, the core inlined and `lax.select` in place of `jnp.where` in the rule,
    relu and relu6 take jax.nn's memory; without, 1.32 to 1.48 times it (jax 0.12; `test_memory_beside_the_reference`).
    """
    return function(*args) if _portable.value else jax.jit(function)(*args)


def recomputed(tangent: Callable[..., Array], x: Array, *arguments: Any) -> Array:
    """Returns tangent(x, *arguments); the backward pass keeps only x and the arguments, and computes the rest again.

    Without `jax.checkpoint`, a scan over layers keeps what the tangent computes from x: the mask, and x in float32. On the
    CPU prelu in a scan over 4 layers of 1024 x 256 numbers in float32 takes 13.3 MiB without and 12.3 with it (jax 0.10.2).

    The barrier stops XLA for CPU and GPU from keeping the float32 numbers of which a bfloat16 x is the rounding. Without it,
    prelu in an mlp on the CPU takes 1.22 times the memory of Flax's, with it 1.00 (jax 0.10.2;
    `test_memory_beside_the_reference`). On a TPU it would double what is kept (`test_prelu_has_a_barrier_but_on_a_tpu`).
    """
    return jax.checkpoint(tangent, prevent_cse=False)(choose(lax.optimization_barrier(x), tpu=x), *arguments)
