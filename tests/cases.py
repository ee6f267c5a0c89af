"""One row an activation: the function, its exact value and derivative, its kinks and the accuracy it grants."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import jaxrelu

DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)


def expm1(x: np.ndarray) -> np.ndarray:
    """Returns expm1 of each number, correctly rounded to float64."""
    with mpmath.workdps(40):
        return np.array([float(mpmath.expm1(v)) for v in x.ravel()]).reshape(x.shape)


def exp(x: np.ndarray) -> np.ndarray:
    """Returns exp of each number, correctly rounded to float64."""
    with mpmath.workdps(40):
        return np.array([float(mpmath.exp(v)) for v in x.ravel()]).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is known of one activation, from its definition and in float64.

    Attributes:
        function: the function under test, of x and kink.
        module: the class's name in `jaxrelu.linen` and `jaxrelu.nnx`.
        inactive, inactive_slope: value and derivative for x < 0, of float64 arrays of negative numbers.
        kinks: kink to the derivatives on its inactive and its active side.
        slope_at_nan: the derivative at NaN.
        top: the upper bound.
        ulps, slope_ulps: error granted to value and derivative, in ulps of the exact number, in the dtypes up to 32 bits.
    """

    name: str
    function: Callable[..., jax.Array]
    module: str
    inactive: Callable[[np.ndarray], np.ndarray]
    inactive_slope: Callable[[np.ndarray], np.ndarray]
    kinks: dict[float, tuple[float, float]]
    slope_at_nan: float
    top: float = np.inf
    ulps: float = 0.0
    slope_ulps: float = 0.0

    def value(self, x: np.ndarray) -> np.ndarray:
        """Returns the exact value at each number."""
        y = np.minimum(x, self.top)
        y[x <= 0] = self.inactive(x[x <= 0])
        return y

    def slope(self, x: np.ndarray) -> np.ndarray:
        """Returns the derivative at each number for kink 0."""
        slope = np.where(x < self.top, 1.0, 0.0) if np.isfinite(self.top) else np.ones_like(x)
        slope[x < 0] = self.inactive_slope(x[x < 0])
        for kink, (inactive, _) in self.kinks.items():
            slope[x == kink] = inactive
        slope[np.isnan(x)] = self.slope_at_nan
        return slope


CASES = (
    Case(
        name="relu",
        function=jaxrelu.relu,
        module="ReLU",
        inactive=np.zeros_like,
        inactive_slope=np.zeros_like,
        kinks={0.0: (0.0, 1.0)},
        slope_at_nan=0.0,
    ),
    Case(
        name="leaky_relu",
        function=jaxrelu.leaky_relu,
        module="LeakyReLU",
        inactive=lambda x: 0.01 * x,
        inactive_slope=lambda x: np.full_like(x, 0.01),
        kinks={0.0: (0.01, 1.0)},
        slope_at_nan=0.01,
        ulps=1.0,
        slope_ulps=1.0,
    ),
    Case(
        name="prelu",
        function=functools.partial(jaxrelu.prelu, negative_slope=0.25),
        module="PReLU",
        inactive=lambda x: 0.25 * x,
        inactive_slope=lambda x: np.full_like(x, 0.25),
        kinks={0.0: (0.25, 1.0)},
        slope_at_nan=0.25,
        ulps=1.0,
        slope_ulps=1.0,
    ),
    Case(
        name="elu",
        function=jaxrelu.elu,
        module="ELU",
        inactive=expm1,
        inactive_slope=exp,
        kinks={0.0: (1.0, 1.0)},
        slope_at_nan=np.nan,
        ulps=1.0,
        slope_ulps=1.5,
    ),
    Case(
        name="relu6",
        function=jaxrelu.relu6,
        module="ReLU6",
        inactive=np.zeros_like,
        inactive_slope=np.zeros_like,
        kinks={0.0: (0.0, 1.0), 6.0: (0.0, 1.0)},
        slope_at_nan=0.0,
        top=6.0,
    ),
)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)


def derivative(function, x):
    """Returns the derivative at each number, after checking that forward and reverse mode agree bitwise."""
    ones = jnp.ones_like(x)
    _, forward = jax.jvp(function, (x,), (ones,))
    (reverse,) = jax.vjp(function, x)[1](ones)
    assert np.asarray(forward).tobytes() == np.asarray(reverse).tobytes()
    return forward


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
