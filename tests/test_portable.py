"""`portable`: the functions as plain formulas, for kernels and exporters that know common operations only."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu, triton
from jax.sharding import AbstractDevice, AbstractMesh

import jaxrelu
from cases import WITH_PARAMETER, Case, each_case, value_and_derivatives

X = np.float32([[-np.inf, -20.0, -1.5, -0.0, 0.0], [0.25, 3.0, 6.0, 6.5, np.inf], [np.nan, -0.3, 5.9, 1.0, -3.0]])
# jax 0.12 warns of the end of Pallas's Triton backend
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
SHAPE = jax.ShapeDtypeStruct((128, 128), jnp.float32)
GPU, TPU = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"), AbstractDevice("TPU v5 lite", 1, "tpu")
REFERENCES = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "prelu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "relu6": jax.nn.relu6,
}


def second_derivative(function):
    return lambda x: jax.jvp(lambda x: jax.vjp(function, x)[1](jnp.ones_like(x))[0], (x,), (jnp.ones_like(x),))[1]


@each_case
def test_values_and_derivatives_are_the_same(case: Case):
    def everything(xs):
        for x, kink in itertools.product(xs, (0.0, 0.5)):
            function = functools.partial(case.function, kink=kink)
            yield (*value_and_derivatives(function)(x), second_derivative(function)(x))

    xs = [X, X.astype(jnp.bfloat16)]
    usual = jax.jit(lambda xs: list(everything(xs)))(xs)
    with jaxrelu.portable():
        plain = jax.jit(lambda xs: list(everything(xs)))(xs)
    for one, other in zip(jax.tree.leaves(usual), jax.tree.leaves(plain), strict=True):
        # in float32 elu has its own polynomial on the CPU; jnp.expm1 is up to 5.7 ulp off on jax 0.10
        tolerance = {"rtol": 4e-7} if one.dtype == jnp.float32 else {"rtol": 8e-3}
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), **tolerance)


@pytest.mark.parametrize("case", WITH_PARAMETER, ids=lambda case: case.name)
def test_the_derivative_in_the_parameter_is_the_same(case: Case):
    def gradient(x):
        parameter = jnp.full(x.shape, 0.25)
        return jax.vjp(lambda p: case.public(x, p, kink=0.5), parameter)[1](jnp.ones_like(x))[0]

    with jaxrelu.portable():
        plain = jax.jit(gradient)(X)
    np.testing.assert_allclose(plain, jax.jit(gradient)(X), rtol=4e-7)


@each_case
def test_nothing_is_chosen_by_platform_and_what_was_compiled_outside_is_traced_anew(case: Case):
    function = jax.jit(jax.grad(lambda x: case.function(x).sum()))
    usual = str(jax.make_jaxpr(function)(X))
    with jaxrelu.portable():
        plain = str(jax.make_jaxpr(function)(X))
        with jax.disable_jit():
            case.function(2.0)
    assert str(jax.make_jaxpr(function)(X)) == usual != plain
    for machinery in ("platform_index", "optimization_barrier", "checkpoint"):
        assert machinery not in plain


def test_it_leaves_observe_and_inplace_as_they_are():
    from jaxrelu.diagnostics import observe

    with jaxrelu.portable():
        _, stats = observe(lambda x: jaxrelu.prelu(jaxrelu.elu(x), jnp.full(5, 0.25)))(X)
        assert list(stats) == ["elu", "prelu"]
        x = jnp.array(X)
        jaxrelu.inplace.relu(x)
        assert x.is_deleted()


def lowers(function, backend: str, what: str) -> bool:
    """Returns whether a Pallas kernel of a function's value or gradient lowers for a backend."""

    def kernel(x, p, out):
        if what == "value":
            out[...] = function(x[...], p[...])
        elif what == "gradient":
            out[...] = jax.vjp(lambda x: function(x, p[...]), x[...])[1](x[...])[0]
        else:
            out[...] = jax.vjp(lambda p: function(x[...], p), p[...])[1](x[...])[0]

    if backend == "mosaic_gpu":
        call = mosaic_gpu.kernel(kernel, out_type=SHAPE)
    else:
        params = triton.CompilerParams() if backend == "triton" else None
        call = pl.pallas_call(kernel, out_shape=SHAPE, compiler_params=params)
    platform, device = ("tpu", TPU) if backend == "tpu" else ("cuda", GPU)
    # lowers for a device that is not there
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("d",), abstract_device=device)):
        traced = jax.jit(call).trace(SHAPE, SHAPE)
        try:
            traced.lower(lowering_platforms=(platform,))
        except NotImplementedError:
            return False
    return True


@each_case
@pytest.mark.parametrize("what", ["value", "gradient"])
@pytest.mark.parametrize("backend", ["tpu", "triton", "mosaic_gpu"])
def test_kernels_lower_where_those_of_jax_nn_do(case: Case, backend, what):
    options = {} if case.parameter is None else {case.parameter: 0.25}
    possible = lowers(lambda x, _: REFERENCES[case.name](x), backend, what)
    with jaxrelu.portable():
        assert lowers(lambda x, _: case.public(x, **options), backend, what) >= possible
        if case.parameter:
            assert lowers(case.public, backend, what) >= possible
    # without portable, a TPU's kernel takes all but an array of slopes
    if backend == "tpu":
        assert lowers(lambda x, _: case.public(x, **options), backend, what) >= possible


@pytest.mark.parametrize("backend", ["tpu", "triton", "mosaic_gpu"])
def test_kernels_of_the_gradient_in_a_slope_lower(backend):
    with jaxrelu.portable():
        assert lowers(jaxrelu.prelu, backend, "parameter")
    try:
        usual = lowers(jaxrelu.prelu, backend, "parameter")
    except TypeError:  # what Mosaic GPU of jax 0.12 raises at a choice by platform
        usual = False
    assert not usual  # the check can fail


@pytest.mark.onnx
@each_case
def test_onnx(case: Case):
    import jax2onnx
    import onnxruntime as runtime

    x = X[np.isfinite(X)]
    for function in (case.function, lambda x: jax.grad(lambda x: case.function(x).sum())(x)):
        with jaxrelu.portable():
            model = jax2onnx.to_onnx(function, [x.shape], model_name=case.name)
        session = runtime.InferenceSession(model.SerializeToString())
        # the functions work after the export too
        np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x})[0], function(x), rtol=1e-6)
        with jaxrelu.portable():
            function(x)
