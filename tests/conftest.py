"""Every test runs on 8 CPU devices, with warnings as errors and with strict promotion unless a framework forbids it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # the platform is set before

jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    # the examples and the README use Optax and Flax, which promote
    if request.path.stem.startswith(("test_train", "test_gallery", "test_readme")):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def root() -> Path:
    return Path(__file__).resolve().parents[1]
