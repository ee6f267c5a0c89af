import math
import re

import jax
import jax.numpy as jnp
import numpy as np

import activations
from scripts import error_of, quick_run


def cells(lines, *start):
    """Returns the numbers in the first row of a table that starts with these cells, and in all below of the same name."""
    found = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    return [[float(cell) for cell in row[len(start) :]] for row in found if row[: len(start)] == list(start)]


def test_activations(tmp_path, capsys):
    lines = quick_run(activations, tmp_path / "new" / "folder", capsys)
    # the four numbers, the matrix, the integers and the five draws
    assert cells(lines, "relu", "value") == [
        [0, 2.5, 0, 1.6],
        [0, 2, 0, 0, 4, 0],
        [0, 0, 0, 1, 2],
        [0.3367, 0.1288, 0.2345, 0.2303, 0],
    ]
    assert cells(lines, "leaky_relu", "value")[0] == [-0.05, 2.5, -0.0175, 1.6]
    assert cells(lines, "prelu", "value")[1] == [-0.25, 2, -0.75, 0, 4, -1.25]
    assert cells(lines, "elu", "value")[3][-1] == round(math.expm1(-1.1229), 4)
    assert cells(lines, "relu6", "value")[2] == [0, 0, 0, 1, 2]
    of_the_matrix = [row for row in cells(lines, "", "derivative") if len(row) == 6]
    assert of_the_matrix[:3] == [[0, 1, 0, 0, 1, 0], [0.01, 1, 0.01, 0.01, 1, 0.01], [0.25, 1, 0.25, 0.25, 1, 0.25]]
    assert of_the_matrix[3] == [float(f"{math.exp(x):.4g}") for x in (-1, 0, -3, 0, 0, -5)]
    text = "\n".join(lines)
    assert re.search(r"jaxrelu.relu +│ \[0 0 0 1 2\] +│ int32 │ nan", text)
    assert re.search(r"max\(0, x\) +│ \[0 0 0 1 2\] +│ int64 │ 0", text)
    assert "\nrelu(x) is [0.  2.5], then x is [-5.   2.5]\n" in text
    assert "\ninplace.relu(x) is [0.  2.5], then x raises RuntimeError: Array has been deleted\n" in text
    assert lines[-1].startswith("function, linen, nnx and donated form are equal bit for bit")


def test_a_form_that_differs_is_found(tmp_path, capsys, monkeypatch):
    forms = activations.ACTIVATIONS["relu"]
    x = jnp.array([-1.0, 2.0, 3.0])
    assert activations.compare("relu", x).differences == []
    for change, message in (
        ({"nnx": lambda x: forms.function(x) * (1 + 2**-23)}, "relu, its nnx form"),
        ({"linen": lambda x: jax.lax.stop_gradient(forms.function(x))}, "relu, its linen form"),
        ({"derivative": lambda x: np.where(x > 2, 1, 0)}, "relu, its derivative by NumPy"),
    ):
        monkeypatch.setitem(activations.ACTIVATIONS, "relu", forms._replace(**change))
        assert activations.compare("relu", x).differences == [message]


def test_a_form_that_differs_at_integers_is_found(monkeypatch):
    forms, x = activations.ACTIVATIONS["relu"], jnp.arange(-2, 3)
    assert activations.compare_integers("relu", x) == []
    for change, message in (
        ({"linen": lambda x: forms.function(x).astype(float)}, "relu, its linen form"),
        ({"donated": lambda x: x}, "relu, its donated form"),
        ({"value": lambda x: x}, "relu, its value by NumPy"),
    ):
        monkeypatch.setitem(activations.ACTIVATIONS, "relu", forms._replace(**change))
        assert activations.compare_integers("relu", x) == [message]


def test_forms_that_differ_end_with_code_1(tmp_path, capsys, monkeypatch):
    zeros = np.zeros(1018)
    found = activations.Found(zeros, zeros, ["its nnx form"])
    monkeypatch.setattr(activations, "draw", lambda path: path.touch())
    monkeypatch.setattr(activations, "compare", lambda name, x: found)
    monkeypatch.setattr(activations, "compare_integers", lambda name, x: [])
    error = error_of(activations, 1, capsys, "--out", str(tmp_path))
    assert error.startswith("activations.py: all forms must agree, but these do not: its nnx form")
