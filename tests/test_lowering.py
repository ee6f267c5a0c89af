"""What each platform is given: its program is compiled on the CPU, where no GPU or TPU is at hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxrelu
from cases import each_case
from jaxrelu._lowering import observed

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)


def compiled_as_on(platform, function, *args):
    """Returns a function compiled on the CPU from the program that a platform is given."""
    elsewhere = [export.DisabledSafetyCheck.platform()]
    exported = export.export(jax.jit(function), platforms=[platform], disabled_checks=elsewhere)(*args)
    return jax.jit(exported.call).lower(*args).compile()


def gradient_of_mlp(activation):
    def loss(weights, x):
        for w in weights:
            x = activation(x @ w)
        return jnp.mean(x * x)

    return jax.grad(loss)


def temp_bytes(platform, activation):
    shapes = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 4, jax.ShapeDtypeStruct((1024, 64), jnp.float32)
    return compiled_as_on(platform, gradient_of_mlp(activation), *shapes).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "relu6"])
def test_the_gradient_reads_the_output_but_on_a_tpu(name):
    ours, reference = getattr(jaxrelu, name), getattr(jax.nn, name)
    floor, most = temp_bytes("cpu", lambda x: x), temp_bytes("cpu", reference)
    assert floor < 0.7 * most
    assert temp_bytes("cpu", ours) <= 1.05 * floor
    assert temp_bytes("tpu", ours) == most
    # XLA takes relu on a GPU for jax.nn's on the CPU, but not on a GPU; see the test below
    assert name == "relu" or temp_bytes("cuda", ours) <= 1.05 * floor


@pytest.mark.parametrize("platform", PLATFORMS)
def test_relu_on_a_gpu_is_maximum_and_its_rule_reads_the_sign(platform):
    gradient = compiled_as_on(platform, jax.grad(lambda x: jnp.sum(x * jaxrelu.relu(x))), X).as_text()
    assert (" sign(" in gradient) == (platform in ("cuda", "rocm"))
    value = compiled_as_on(platform, jaxrelu.relu, X).as_text()
    assert (" maximum(" in value and " select(" not in value) == (platform != "cpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_elu_has_its_own_polynomial_on_the_cpu_alone(platform):
    x = jnp.linspace(-9.0, 3.0, 1001, dtype=jnp.float32)
    theirs = jax.jit(lambda x: jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0))))(x)
    ours = compiled_as_on(platform, jaxrelu.elu, x)(x)
    assert np.array_equal(ours, theirs) == (platform != "cpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_prelu_has_a_barrier_but_on_a_tpu(platform):
    def gradient(x):
        return jax.vjp(jaxrelu.prelu, x, jnp.float32(0.25))[1](x)

    exported = export.export(jax.jit(gradient), platforms=[platform])(X)
    assert ("optimization_barrier" in exported.mlir_module()) == (platform != "tpu")


@each_case
def test_a_program_that_nobody_observes_has_no_marks(case):
    def gradient(x):
        return jax.vjp(case.function, x)[1](x)

    for function in (case.function, gradient):
        assert "slice" not in jax.jit(function).lower(X).as_text()
    with observed(True):  # the check can fail
        assert "slice" in jax.jit(case.function).lower(X).as_text()


def test_relu_has_one_choice_by_platform():
    for function in (jaxrelu.relu, jax.grad(lambda x: jaxrelu.relu(x).sum())):
        assert str(jax.make_jaxpr(function)(X)).count("platform_index") == 1
