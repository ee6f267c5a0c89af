"""Every test runs on 8 CPU devices, with warnings as errors and with strict promotion unless a framework forbids it."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # the platform is set before

jax.config.update("jax_num_cpu_devices", 8)
# these use Optax and Flax, which promote: the examples, the README and the benchmark
PROMOTING = (
    "test_benchmark",
    "test_gallery_networks",
    "test_gallery_training",
    "test_gallery_units",
    "test_memory",
    "test_readme",
    "test_train_digits",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    # most of the suite's time is XLA's: what a test has compiled, a later test in the same process loads
    compiled = tempfile.TemporaryDirectory(prefix="jaxrelu-tests-")
    config.add_cleanup(compiled.cleanup)
    jax.config.update("jax_compilation_cache_dir", compiled.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.stem in PROMOTING:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def root() -> Path:
    return Path(__file__).resolve().parents[1]
