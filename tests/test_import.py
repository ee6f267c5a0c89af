import subprocess
import sys

import pytest

OPTIONAL = {"flax", "optax", "matplotlib", "orbax", "rich", "tqdm", "sklearn", "torch"}


def loaded_by(statement):
    """Returns which optional packages a fresh interpreter has loaded after the statement."""
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return OPTIONAL & set(run.stdout.split())


def test_import_loads_jax_alone():
    assert loaded_by("import jaxrelu, jaxrelu.inplace, jaxrelu.initializers") == set()


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_the_check_can_fail(module):
    assert "flax" in loaded_by(f"import jaxrelu.{module}")
