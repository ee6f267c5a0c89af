import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases import Case, count_traces, each_case
from jaxrelu import inplace

# of tests that ask what is done, not how it is rounded
quick = pytest.mark.usefixtures("quick_compilation")

X = np.linspace(-8, 8, 1001, dtype=np.float32)


@each_case
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32], ids=["float16", "bfloat16", "float32"])
def test_output_takes_over_the_buffer(case: Case, dtype):
    function = getattr(inplace, case.name)
    x = jnp.array(X, dtype)  # a copy: asarray may share NumPy's memory, which is never given away
    expected = case.function(x)
    address = x.unsafe_buffer_pointer()
    y = function(x, **case.arguments)
    assert y.unsafe_buffer_pointer() == address
    chex.assert_trees_all_equal(y, expected)
    with pytest.raises(RuntimeError, match="deleted"):
        x + 1


@quick
@each_case
def test_a_later_use_after_an_eager_grad_raises(case: Case):
    function = getattr(inplace, case.name)
    x = jnp.asarray(X)
    expected = np.float32(case.slope(np.float64(X)))
    gradient = jax.grad(lambda x: function(x, **case.arguments).sum())(x)
    np.testing.assert_allclose(gradient, expected, rtol=2e-7)
    with pytest.raises(RuntimeError, match="deleted"):
        x + 1


@each_case
def test_inside_jit_it_is_the_plain_function(case: Case):
    x = jnp.asarray(X)
    function = jax.jit(lambda x: getattr(inplace, case.name)(x, **case.arguments))
    chex.assert_trees_all_equal(function(x), case.function(x))
    assert not x.is_deleted()


@quick
@each_case
def test_arguments_are_those_of_the_functions(case: Case):
    x = np.float32(np.random.default_rng(0).normal(size=(3, 5)))
    function = getattr(inplace, case.name)
    assert inspect.signature(function).parameters.keys() == inspect.signature(case.public).parameters.keys()
    assert case.calls
    for positional, keywords in case.calls:
        # NumPy's x shares no memory with what is given away
        expected = case.public(x, *positional, **keywords)
        chex.assert_trees_all_equal(function(jnp.array(x), *positional, **keywords), expected)


@each_case
def test_what_has_no_buffer_to_give_is_refused(case: Case):
    function = getattr(inplace, case.name)
    for bad in (X, 1.0, [1.0], None):
        with pytest.raises(TypeError, match=rf"^(inplace\.)?{case.name}: x must be a JAX array.*; use jaxrelu.{case.name}"):
            function(bad, **case.arguments)
    integers = jnp.arange(3)
    if case.keeps_integers:
        assert function(integers).tolist() == [0, 1, 2]
    else:
        with pytest.raises(TypeError, match="JAX array of floats"):
            function(integers, **case.arguments)


def test_errors_are_those_of_the_functions():
    with pytest.raises(TypeError, match="relu: x must be a real number"):
        inplace.relu(jnp.array([True]))
    with pytest.raises(TypeError, match="relu: kink must be a Python number"):
        inplace.relu(jnp.ones(3), kink=[0.0])
    with pytest.raises(ValueError, match="prelu: axis 2 is out of range"):
        inplace.prelu(jnp.ones(3), jnp.ones(3), axis=2)
    with pytest.raises(TypeError, match="prelu: axis must be an int or None"):
        inplace.prelu(jnp.ones(3), jnp.ones(3), axis=([1],))
    with pytest.raises(TypeError, match="leaky_relu: negative_slope must be a real number"):
        inplace.leaky_relu(jnp.ones(3), "a")
    with pytest.raises(ValueError, match="elu: save must be"):
        inplace.elu(jnp.ones(3), save=["output"])


def test_equal_numbers_of_another_type_are_refused():
    x = np.ones((2, 3), np.float32)
    inplace.relu(jnp.array(x), kink=1)
    with pytest.raises(TypeError, match="kink must be a Python number"):
        inplace.relu(jnp.array(x), kink=True)
    inplace.prelu(jnp.array(x), np.ones(3), axis=1)
    with pytest.raises(TypeError, match="axis must be an int"):
        inplace.prelu(jnp.array(x), np.ones(3), axis=1.0)
    inplace.leaky_relu(jnp.array(x), 1)
    with pytest.raises(TypeError, match="negative_slope must be a real number"):
        inplace.leaky_relu(jnp.array(x), True)


def test_a_new_slope_of_prelu_compiles_nothing():
    x = [jnp.array(X[:13]) for _ in range(3)]
    with count_traces() as first:
        inplace.prelu(x[0], 0.1)
    assert first
    with count_traces() as others:
        for array, slope in zip(x[1:], (0.2, 0.3), strict=True):
            inplace.prelu(array, slope)
    assert not others
