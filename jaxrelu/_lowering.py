"""How the functions become programs: jitted cores, marks for `observe`, and the choice by platform.

What a derivative rule reads decides what the backward pass keeps. The next layer keeps an activation's output y anyway, so a
rule that reads y lets the input x be freed. XLA undoes that where it sees that y is cheap to compute from x. What keeps it
from doing so differs by platform, and stands here, once for each trick. `tests/test_memory.py` fails on the CPU without it,
`tests/test_platforms.py` on the others.
"""

import contextlib
import contextvars
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["TAG", "choose", "core", "donating", "observed", "readable", "recomputed", "separate"]

# begins the name of every jitted core
TAG = "jaxrelu."
# whether `observe` is tracing; a part of the key of JAX's caches, so that what was traced without marks is traced again
observed = jax.make_user_context(False)
# the array that a call of `jaxrelu.inplace` is to overwrite, with the function's name
_donation: contextvars.ContextVar[tuple[str, Any] | None] = contextvars.ContextVar("donation", default=None)


def core(function: Callable[..., Any], name: str, static_argnums: int | tuple[int, ...]) -> Callable[..., Array]:
    """Returns a private core as a jitted function of its value, as an eager call would else trace the core every time.

    Inside another jit it is inlined, but while `observe` traces it is a call, with a name and marks of the unit axis.
    """

    def value(x: Array, *arguments: Any) -> Array:
        out = function(jnp.asarray(x), *arguments)  # without jit, x may be a Python number
        return out[0] if isinstance(out, tuple) else out

    def named(x: Array, *arguments: Any) -> Array:
        return _mark(value(_mark(x), *arguments))

    named.__name__ = named.__qualname__ = TAG + name
    inlined = jax.jit(value, static_argnums=static_argnums, inline=True)
    marked = jax.jit(named, static_argnums=static_argnums)
    in_place = jax.jit(value, static_argnums=static_argnums, donate_argnums=0)

    def call(x: Array, *arguments: Any) -> Array:
        if observed.value:
            return marked(x, *arguments)
        donation = _donation.get()
        if donation is None:
            return inlined(x, *arguments)
        function_called, given = donation
        if x is not given:  # an array of integers, converted: it would be the copy that is overwritten
            raise _no_buffer(function_called, "a JAX array of floats", given)
        return in_place(x, *arguments)

    return call


@contextlib.contextmanager
def donating(function: str, x: Any) -> Generator[None]:
    """Lets the core that a function of `jaxrelu.inplace` calls overwrite x, once the function has checked its arguments."""
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
    """Returns x, split into one part along its last axis: of the operations that do nothing one that vmap keeps right."""
    x = jnp.asarray(x)
    return lax.split(x, x.shape[-1:], axis=x.ndim - 1)[0] if x.ndim else x


def choose(default: Any, **by_platform: Any) -> Any:
    """Returns what is given for the platform (cpu, gpu or tpu) that the program is compiled for; XLA drops the rest."""
    values = (default, *by_platform.values())
    branches: dict[str, Callable[..., Any]] = {}
    for index, platform in enumerate(by_platform, 1):
        for name in ("cuda", "rocm") if platform == "gpu" else (platform,):
            branches[name] = _item(index)
    return lax.platform_dependent(*values, **branches, default=_item(0))


def _item(index: int) -> Callable[..., Any]:
    return lambda *values: values[index]


def readable(x: Array, plain: Array, opaque: Array, on_gpu: tuple[Array, Array]) -> tuple[Array, Array]:
    """Returns a rectifier's value, and what its rule is to read: x or a number with the sign of the value.

    Args:
        x: the input.
        plain: the value in jax.nn's form.
        opaque: the same value in a form from which XLA does not go back to x.
        on_gpu: what is returned for a GPU.

    TPU: plain, and x. Its compiler recomputes by itself, and takes up to 12 % more memory if the rule reads y.

    CPU: opaque, but from 4 axes on, and in 16 bits, plain and x. Behind a convolution with a norm, x is kept anyway and y is
    kept transposed, so that reading y costs a third array.
    """
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits <= 16
    on_cpu = (plain, x) if x.ndim >= 4 or narrow else (opaque, opaque)
    return choose((plain, x), cpu=on_cpu, gpu=on_gpu)


def separate(function: Callable[..., Array], *args: Any) -> Array:
    """Returns function(*args), called as a function of its own.

    CPU, bfloat16, an mlp under vmap: so called, and with `lax.select` rather than `jnp.where` in the rule, relu and relu6 take
    the memory of jax.nn's, else 1.32 to 1.48 times it (jax 0.12; `test_memory_beside_the_reference`).
    """
    return jax.jit(function)(*args)


def recomputed(tangent: Callable[..., Array], x: Array, *arguments: Any) -> Array:
    """Returns tangent(x, *arguments), for which the backward pass keeps x and the arguments alone.

    Without `jax.checkpoint` a scan over layers keeps what the tangent computes from x: the mask, and x in float32. The
    barrier is for CPU and GPU in bfloat16, where XLA would keep the float32 number that x was rounded from. On a TPU a
    barrier would double what is kept.
    """
    return jax.checkpoint(tangent, prevent_cse=False)(choose(lax.optimization_barrier(x), tpu=x), *arguments)
