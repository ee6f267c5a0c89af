"""One row for each activation: its exact value and derivative, its kinks, what it takes, and the accuracy it grants."""

import contextlib
import dataclasses
import fractions
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxrelu

DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)


class Exact:
    """exp and expm1 of float64 arrays, correctly rounded. Slow: up to 32 bits, NumPy's in float64 are exact enough."""

    @staticmethod
    def exp(x: np.ndarray) -> np.ndarray:
        with mpmath.workdps(40):
            return np.array([float(mpmath.exp(v)) for v in x.ravel()]).reshape(x.shape)

    @staticmethod
    def expm1(x: np.ndarray) -> np.ndarray:
        with mpmath.workdps(40):
            return np.array([float(mpmath.expm1(v)) for v in x.ravel()]).reshape(x.shape)


def zero(x: np.ndarray, _: Any = np) -> np.ndarray:
    """Returns zeros of the shape of x, as value or derivative of a flat side."""
    return np.zeros_like(x)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is known of one activation, from its definition and in float64.

    Attributes:
        name: the function's name in `jaxrelu` and `jaxrelu.inplace`.
        module: the class's name in `jaxrelu.linen` and `jaxrelu.nnx`.
        inactive, inactive_slope, curvature: value, first and second derivative for x < 0, of a float64 array of negative
            numbers and of what computes exp and expm1: NumPy or `Exact`.
        kinks: kink to the derivatives on its inactive and its active side.
        slope_at_nan: the derivative at NaN.
        gains: the forward and the backward gain, to ten decimals.
        arguments: the arguments that have no default; the other columns are for these.
        parameter: the name of the argument that may be an array, if there is one.
        basis: the value for x < 0 where the parameter is 1, of float64 arrays, if there is a parameter.
        calls: other ways to call it, (positional, keywords) after an x of shape (3, 5).
        module_options: the options of the modules for 5 channels.
        keeps_integers: whether integers stay integers.
        top: the upper bound.
        ulps, slope_ulps: error granted to value and derivative, in ulps of the exact number, in the dtypes up to 32 bits.
    """

    name: str
    module: str
    inactive: Callable[..., np.ndarray]
    inactive_slope: Callable[..., np.ndarray]
    kinks: dict[float, tuple[float, float]]
    slope_at_nan: float
    gains: tuple[float, float]
    curvature: Callable[..., np.ndarray] = zero
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    parameter: str | None = None
    basis: Callable[[np.ndarray], np.ndarray] | None = None
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = ()
    module_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    keeps_integers: bool = False
    top: float = np.inf
    ulps: float = 0.0
    slope_ulps: float = 0.0

    @property
    def public(self) -> Callable[..., jax.Array]:
        """The function as it is imported."""
        return getattr(jaxrelu, self.name)

    @functools.cached_property
    def function(self) -> Callable[..., jax.Array]:
        """The function of x and kink."""
        return functools.partial(self.public, **self.arguments) if self.arguments else self.public

    def value(self, x: np.ndarray, library: Any = np) -> np.ndarray:
        """Returns the exact value at each number."""
        y = np.minimum(x, self.top)
        y[x <= 0] = self.inactive(x[x <= 0], library)
        return y

    def slope(self, x: np.ndarray, library: Any = np) -> np.ndarray:
        """Returns the derivative at each number for kink 0."""
        slope = np.where(x < self.top, 1.0, 0.0) if np.isfinite(self.top) else np.ones_like(x)
        slope[x < 0] = self.inactive_slope(x[x < 0], library)
        for kink, (inactive, _) in self.kinks.items():
            slope[x == kink] = inactive
        slope[np.isnan(x)] = self.slope_at_nan
        return slope


# along the three rows of an x of shape (3, 5)
ROWS = np.float32([0.1, 0.2, 0.3])
CASES = (
    Case(
        name="relu",
        module="ReLU",
        inactive=zero,
        inactive_slope=zero,
        kinks={0.0: (0.0, 1.0)},
        slope_at_nan=0.0,
        gains=(1.4142135624, 1.4142135624),
        calls=(((), {}), ((), {"kink": 0.5})),
        keeps_integers=True,
    ),
    Case(
        name="leaky_relu",
        module="LeakyReLU",
        inactive=lambda x, _: 0.01 * x,
        inactive_slope=lambda x, _: np.full_like(x, 0.01),
        kinks={0.0: (0.01, 1.0)},
        slope_at_nan=0.01,
        gains=(1.4141428570, 1.4141428570),
        parameter="negative_slope",
        basis=lambda x: x,
        calls=(
            ((), {"negative_slope": 0.1}),
            ((ROWS[:, None],), {}),
            ((0.3,), {"kink": 1.0}),
            ((np.float32(0.1),), {}),
            ((fractions.Fraction(1, 3),), {}),
        ),
        ulps=1.0,
        slope_ulps=1.0,
    ),
    Case(
        name="prelu",
        module="PReLU",
        inactive=lambda x, _: 0.25 * x,
        inactive_slope=lambda x, _: np.full_like(x, 0.25),
        kinks={0.0: (0.25, 1.0)},
        slope_at_nan=0.25,
        gains=(1.3719886811, 1.3719886811),
        arguments={"negative_slope": np.array(0.25, np.float32)},
        parameter="negative_slope",
        basis=lambda x: x,
        calls=(((ROWS,), {"axis": 0}), ((0.5,), {"kink": 0.5})),
        module_options={"num_parameters": 5},
        ulps=1.0,
        slope_ulps=1.0,
    ),
    Case(
        name="elu",
        module="ELU",
        inactive=lambda x, library: library.expm1(x),
        inactive_slope=lambda x, library: library.exp(x),
        curvature=lambda x, library: library.exp(x),
        kinks={0.0: (1.0, 1.0)},
        slope_at_nan=np.nan,
        gains=(1.2451983007, 1.2234285576),
        parameter="alpha",
        basis=np.expm1,
        calls=(
            ((), {"alpha": 0.5}),
            ((np.float32(0.5),), {"save": "output"}),
            ((ROWS[:, None],), {}),
            ((2,), {"kink": 0.5}),
        ),
        ulps=1.0,
        slope_ulps=1.5,
    ),
    Case(
        name="relu6",
        module="ReLU6",
        inactive=zero,
        inactive_slope=zero,
        kinks={0.0: (0.0, 1.0), 6.0: (0.0, 1.0)},
        slope_at_nan=0.0,
        gains=(1.4142135651, 1.4142135638),
        calls=(((), {"kink": 2}),),
        keeps_integers=True,
        top=6.0,
    ),
)

WITH_PARAMETER = [case for case in CASES if case.parameter]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_parameter = pytest.mark.parametrize("case", WITH_PARAMETER, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


def value_and_derivatives(function):
    """Returns the function of x that gives value and derivative of an elementwise one, by forward and by reverse mode."""

    def all_three(x):
        ones = jnp.ones_like(x)
        value, forward = jax.jvp(function, (x,), (ones,))
        return value, forward, jax.vjp(function, x)[1](ones)[0]

    return all_three


def agreed(results):
    """Returns value and derivative as NumPy arrays, after checking that forward and reverse mode agree bitwise."""
    value, forward, reverse = map(np.asarray, results)
    assert forward.tobytes() == reverse.tobytes()
    return value, forward


def value_and_derivative(function, x):
    """Returns value and derivative of one function at each number, as NumPy arrays, computed by one program."""
    return agreed(jax.jit(value_and_derivatives(function))(x))


def assert_ulps(actual: jax.Array, exact: np.ndarray, ulps: float) -> None:
    """Asserts that actual lies within ulps of exact (units in the last place of the exact number, in actual's dtype).

    Numbers below the smallest normal may be flushed to zero, as XLA's CPU backend does.
    """
    info = jnp.finfo(actual.dtype)
    tiny, largest = float(info.tiny), float(info.max)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        got = np.asarray(actual).astype(np.float64)
        ulp = np.exp2(np.floor(np.log2(np.clip(np.abs(exact), tiny, largest))) - info.nmant)
        overflow = np.abs(exact) >= largest + ulp / 2
        exact = np.where(overflow, np.copysign(np.inf, exact), exact)
        error = np.abs(got - exact) / ulp
    granted = np.where(np.abs(exact) < tiny, tiny / ulp, ulps)
    good = (got == exact) | (np.isnan(got) & np.isnan(exact)) | (np.isfinite(exact) & (error <= granted))
    assert good.all(), (
        f"{(~good).sum()} of {good.size} are off, the first at {np.argmin(good)}: got {got[~good][:5]}, "
        f"want {exact[~good][:5]}"
    )


@contextlib.contextmanager
def count_traces():
    """Counts the functions that JAX traces or compiles."""
    events = []

    def listener(event, duration, **_):
        if event.startswith("/jax/core/compile"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
