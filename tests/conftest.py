"""Every test runs on 8 CPU devices, with warnings as errors and with strict promotion unless a framework forbids it."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # the platform is set before

jax.config.update("jax_num_cpu_devices", 8)
# these use Optax and Flax, which promote: the README and the benchmark
PROMOTING = (
    "test_benchmark",
    "test_memory",
    "test_readme",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    # JAX does not lock the cache: what the other worker is still writing, or a killed run left half written, is compiled
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")
    # most of the suite's time is XLA's: what was compiled once is loaded by the other worker and by the next run
    jax.config.update("jax_compilation_cache_dir", compilation_cache(config))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compilation_cache(config: pytest.Config) -> str:
    """Returns a folder in pytest's own cache, one for each version of JAX, or a temporary one if pytest keeps no cache."""
    if hasattr(config, "cache"):
        return str(config.cache.mkdir(f"jax-{jax.__version__}"))
    folder = tempfile.TemporaryDirectory(prefix="jaxrelu-tests-")
    config.add_cleanup(folder.cleanup)
    return folder.name


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go() -> Iterator[None]:
    """Frees what JAX holds of a module's programs, a gigabyte by the end of the suite."""
    yield
    jax.clear_caches()


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """Lets XLA optimise little, for tests of what is done rather than of how it is rounded."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
