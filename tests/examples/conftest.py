"""The scripts of examples/, run short. Flax and Optax promote dtypes, so strict promotion does not hold in this folder."""

import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# a copy of tests/ tries an installed jaxrelu; the scripts are not part of it
if not (Path(__file__).resolve().parents[2] / "examples").is_dir():
    collect_ignore_glob = ["*.py"]


@pytest.fixture(autouse=True)
def strict_promotion() -> None:
    """Replaces the fixture of the same name in tests/conftest.py."""


@pytest.fixture(autouse=True, scope="session")
def signals_are_not_ignored() -> Iterator[None]:
    """Undoes what nohup and a shell's & do, which a test's own processes would inherit."""
    signals = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    old = {number: signal.signal(number, handler) for number, handler in signals.items()}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def compiled_without_optimization() -> Iterator[None]:
    """Compiles in two thirds of the time; the runs are short, so that they hardly lose by it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    # or other tests of this process would run what was compiled here
    jax.clear_caches()
