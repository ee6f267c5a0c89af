"""The backward pass keeps what the design says on the CPU: the compiler's own figures, at a size that compiles soon."""

import json

import jax
import pytest

from jaxrelu.benchmark import cli

LEAN = ("relu", "leaky_relu", "elu_output", "relu6")
SIZE = ["--layers=4", "--batch=1024", "--width=256"]


@pytest.fixture(autouse=True)
def promotion():
    """Promotes as Optax and Flax want it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_memory_of_a_gradient(tmp_path):
    path = tmp_path / "lines.jsonl"
    networks = "mlp,residual,blocks,scan"
    assert cli.main(["--platform=cpu", "--compile-only", f"--networks={networks}", *SIZE, f"--json={path}"]) == 0
    found = {}
    for r in map(json.loads, path.read_text().splitlines()):
        found.setdefault((r["network"], r["activation"]), {})[r["peer"]] = r["temp_bytes"]
    rows = {key: peers for key, peers in found.items() if "jaxrelu" in peers}
    assert len(rows) == 4 * 6
    reference = {key: peers.get("jax.nn") or peers["flax"] for key, peers in rows.items()}
    assert {key: peers for key, peers in rows.items() if peers["jaxrelu"] > 1.02 * reference[key]} == {}
    near_floor = [key for key in rows if key[0] in ("mlp", "residual", "blocks") and key[1] in LEAN]
    assert len(near_floor) == 3 * 4
    for network, activation in near_floor:
        assert rows[network, activation]["jaxrelu"] <= 1.15 * found[network, None]["identity"]
        # the reference is far from the floor: the figure can fail
        assert network == "residual" or reference[network, activation] > 1.3 * found[network, None]["identity"]
