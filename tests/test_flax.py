import copy
import functools
import math
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxrelu
import jaxrelu.linen
import jaxrelu.nnx
from cases import Case, each_case

# of tests that ask what is done, not how it is rounded
quick = pytest.mark.usefixtures("quick_compilation")

X = np.float32(np.random.default_rng(0).normal(size=(2, 3, 4, 5)) * 4)


def linen_output(module, x=X):
    return module.apply(module.init(jax.random.key(0), x), x)


@quick
@each_case
def test_linen_is_nnx_is_the_function(case: Case):
    def outputs_and_gradients(x, kink):
        function = functools.partial(case.function, kink=kink)
        linen, modern = getattr(jaxrelu.linen, case.module)(kink=kink), getattr(jaxrelu.nnx, case.module)(kink=kink)
        variables = linen.init(jax.random.key(0), x)
        for f in (lambda x: linen.apply(variables, x), modern, function):
            y, pull = jax.vjp(f, x)
            yield y, pull(jnp.ones_like(y))[0]

    x = np.append(X, np.float32([0.0, -0.0, 6.0, np.nan]))
    xs = [x, x.astype(jnp.bfloat16)]
    run = jax.jit(lambda xs: [tuple(outputs_and_gradients(x, kink)) for x in xs for kink in (0.0, 0.5)])
    for linen, modern, function in run(xs):
        chex.assert_trees_all_equal(linen, modern, function)


@quick
@each_case
def test_modules_are_the_function_outside_jit(case: Case):
    linen, modern = getattr(jaxrelu.linen, case.module)(), getattr(jaxrelu.nnx, case.module)()
    chex.assert_trees_all_equal(linen_output(linen), modern(X), case.function(X))


@pytest.mark.parametrize("name", ["LeakyReLU", "ELU"])
def test_modules_that_differ_in_the_sign_of_a_zero_do_not_share_a_compiled_function(name):
    x, run = jnp.array([-2.0]), nnx.jit(lambda module, x: module(x))
    linen, modern = getattr(jaxrelu.linen, name), getattr(jaxrelu.nnx, name)
    compiled, by_hash = jax.jit(linen.apply, static_argnums=0), nn.jit(linen)
    for function in (lambda s: run(modern(s), x), lambda s: compiled(linen(s), {}, x), lambda s: by_hash(s).apply({}, x)):
        assert [bool(np.signbit(function(s)[0])) for s in (-0.0, 0.0, -0.0)] == [False, True, False]
    module = modern(0.0)
    run(module, x)
    setattr(module, "alpha" if name == "ELU" else "negative_slope", -0.0)
    assert not np.signbit(run(module, x)[0])
    assert linen(0.0) == linen(0) != linen(-0.0) != linen(0)
    assert linen(math.nan) == linen(math.nan)
    assert hash(linen(0.0)) == hash(linen(0)) != hash(linen(-0.0))
    assert pickle.loads(pickle.dumps(linen(-0.0))) == linen(-0.0)


@each_case
@pytest.mark.parametrize("package", [jaxrelu.linen, jaxrelu.nnx])
def test_a_bool_is_refused_before_a_module_is_compiled(package, case: Case):
    module = getattr(package, case.module)
    with pytest.raises(TypeError, match=f"{case.module}: kink must be a Python number"):
        module(kink=True)
    if case.module in ("LeakyReLU", "ELU"):
        with pytest.raises(TypeError, match=f"{case.module}: {case.parameter} must be a real number"):
            module(True)


@pytest.mark.parametrize("package", [jaxrelu.linen, jaxrelu.nnx])
def test_options_reach_the_functions(package):
    run = linen_output if package is jaxrelu.linen else lambda module: module(X)
    chex.assert_trees_all_equal(run(package.LeakyReLU(negative_slope=0.3)), jaxrelu.leaky_relu(X, 0.3))
    chex.assert_trees_all_equal(run(package.ELU(alpha=0.5)), jaxrelu.elu(X, 0.5))
    chex.assert_trees_all_equal(run(package.ELU(save="output")), jaxrelu.elu(X, save="output"))
    chex.assert_trees_all_equal(run(package.PReLU(negative_slope_init=0.1)), jaxrelu.prelu(X, jnp.float32(0.1)))


def both_prelus(x, **options):
    """Returns (outputs, the slope's array, the gradient of the summed output in it) of linen's and nnx's PReLU."""
    linen, modern = jaxrelu.linen.PReLU(**options), jaxrelu.nnx.PReLU(**options)
    variables = jax.jit(linen.init)(jax.random.key(0), x)
    graph, state = nnx.split(modern)

    @jax.jit
    def run(variables, state, x):
        def of_linen(variables):
            y = linen.apply(variables, x)
            return y.astype(jnp.float32).sum(), y

        def of_nnx(state):
            y = nnx.merge(graph, state)(x)
            return y.astype(jnp.float32).sum(), y

        return jax.grad(of_linen, has_aux=True)(variables), jax.grad(of_nnx, has_aux=True)(state)

    (gradient, y), (modern_gradient, modern_y) = run(variables, state, x)
    yield y, variables["params"]["negative_slope"], gradient["params"]["negative_slope"]
    yield modern_y, modern.negative_slope[...], modern_gradient["negative_slope"][...]


def test_nnx_grad_of_prelu():
    gradient = nnx.grad(lambda m: m(X).sum())(jaxrelu.nnx.PReLU())
    np.testing.assert_allclose(gradient.negative_slope[...], np.minimum(X, 0).sum(), rtol=1e-5)


@quick
@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2])
def test_prelu_per_channel_on_any_axis(axis):
    channels = X.shape[axis]
    others = tuple(i for i in range(4) if i != axis % 4)
    for y, slope, gradient in both_prelus(X, num_parameters=channels, axis=axis):
        assert slope.tolist() == [0.25] * channels
        np.testing.assert_array_equal(y, np.where(X > 0, X, np.float32(0.25) * X))
        np.testing.assert_allclose(gradient, np.minimum(X, 0).sum(others), rtol=1e-5)


def test_prelu_defaults_to_one_scalar_of_a_quarter():
    for y, slope, gradient in both_prelus(X):
        assert (slope.shape, slope.dtype, float(slope)) == ((), jnp.float32, 0.25)
        np.testing.assert_allclose(y, np.where(X > 0, X, 0.25 * X))
        np.testing.assert_allclose(gradient, np.minimum(X, 0).sum(), rtol=1e-5)
    for y, _, _ in both_prelus(np.float32(-2)):
        assert y == -0.5


@quick
def test_prelu_dtypes():
    for y, slope, gradient in both_prelus(X, param_dtype=jnp.bfloat16):
        assert (y.dtype, slope.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    for y, slope, gradient in both_prelus(X, dtype=jnp.bfloat16):
        assert (y.dtype, slope.dtype, gradient.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    for y, _, _ in both_prelus(jnp.asarray(X, jnp.bfloat16)):
        assert y.dtype == jnp.bfloat16


@quick
def test_prelu_initializers():
    uniform = jax.nn.initializers.uniform(0.5)
    linen = jaxrelu.linen.PReLU(5, negative_slope_init=uniform).init(jax.random.key(0), X)["params"]["negative_slope"]
    modern = jaxrelu.nnx.PReLU(5, negative_slope_init=uniform, rngs=nnx.Rngs(0)).negative_slope[...]
    for slope in (linen, modern):
        assert slope.shape == (5,)
        assert 0 < float(slope.min()) < float(slope.max()) < 0.5
    constant = jaxrelu.nnx.PReLU(5, negative_slope_init=jax.nn.initializers.constant(0.1))  # no key is needed
    chex.assert_trees_all_equal(constant.negative_slope[...], jnp.full((5,), 0.1))
    with pytest.raises(TypeError, match="PReLU: rngs must be given for a random negative_slope_init"):
        jaxrelu.nnx.PReLU(5, negative_slope_init=uniform)


def test_partitioning_metadata():
    init = nn.with_partitioning(jax.nn.initializers.constant(0.1), ("model",))
    variables = jaxrelu.linen.PReLU(5, negative_slope_init=init).init(jax.random.key(0), X)
    assert nn.get_partition_spec(variables)["params"]["negative_slope"] == jax.sharding.PartitionSpec("model")
    chex.assert_trees_all_equal(
        jaxrelu.linen.PReLU(5, negative_slope_init=init).apply(variables, X), jaxrelu.prelu(X, jnp.full((5,), 0.1))
    )
    mesh = jax.make_mesh((5,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        modern = jaxrelu.nnx.PReLU(5, negative_slope_metadata={"out_sharding": ("model",)})
    assert modern.negative_slope.get_metadata()["out_sharding"] == ("model",)
    spec = nnx.get_partition_spec(nnx.state(modern))
    assert jax.tree.leaves(spec, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec)) == [
        jax.sharding.PartitionSpec("model")
    ]


@pytest.mark.parametrize("package", [jaxrelu.linen, jaxrelu.nnx])
def test_prelu_refuses(package):
    for bad in (0.3, 0, -1, True, "3", None):
        with pytest.raises(TypeError, match=r"PReLU: num_parameters must be a positive int, got .* negative_slope_init"):
            package.PReLU(bad)
    run = linen_output if package is jaxrelu.linen else lambda module: module(X)
    for options in ({"num_parameters": 3}, {"num_parameters": 5, "axis": 1}, {"num_parameters": 5, "axis": 4}):
        with pytest.raises(
            ValueError, match=r"PReLU: num_parameters=. must be the size of the input's axis .*\(2, 3, 4, 5\)"
        ):
            run(package.PReLU(**options))
    for options, message in (
        ({"negative_slope_init": None}, "negative_slope_init must be a real number"),
        ({"param_dtype": "foo"}, "param_dtype must be a float dtype, got 'foo'"),
        ({"param_dtype": jnp.int32}, "param_dtype must be a float dtype"),
        ({"dtype": jnp.int32}, "dtype must be a float dtype"),
    ):
        with pytest.raises(TypeError, match=f"PReLU: {message}"):
            run(package.PReLU(**options))
    with pytest.raises(TypeError, match="prelu: axis must be an int or None"):
        run(package.PReLU(5, axis=1.5))
    module = package.PReLU(dtype=jnp.float32)
    call = (
        functools.partial(module.apply, {"params": {"negative_slope": jnp.float32(0.25)}})
        if package is jaxrelu.linen
        else module
    )
    for bad in (np.array([True]), 1j * X, [1.0]):
        with pytest.raises(TypeError, match="PReLU: x must be a real number or an array"):
            call(bad)


@each_case
def test_modules_pickle_and_compare(case: Case):
    linen = getattr(jaxrelu.linen, case.module)()
    assert pickle.loads(pickle.dumps(linen)) == linen == copy.deepcopy(linen)
    assert hash(linen) == hash(getattr(jaxrelu.linen, case.module)())
    modern = getattr(jaxrelu.nnx, case.module)()
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(modern))(X), copy.deepcopy(modern)(X), modern(X))


@quick
@each_case
def test_equal_nnx_models_share_one_trace(case: Case):
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    def model(seed):
        activation = getattr(jaxrelu.nnx, case.module)(**case.module_options)
        return nnx.Sequential(nnx.Linear(5, 5, rngs=nnx.Rngs(seed)), activation)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Flax adds a bias
        for seed in range(3):
            run(model(seed), X)
    assert len(traces) == 1


def test_parameter_is_called_negative_slope_as_in_flax():
    ours, theirs = jaxrelu.linen.PReLU(), nn.PReLU()
    variables = theirs.init(jax.random.key(0), X)
    chex.assert_trees_all_equal_structs(ours.init(jax.random.key(0), X), variables)
    chex.assert_trees_all_equal(ours.apply(variables, X), theirs.apply(variables, X))
    modern, theirs = jaxrelu.nnx.PReLU(), nnx.PReLU()
    nnx.update(modern, nnx.state(theirs))
    chex.assert_trees_all_equal(modern(X), theirs(X))
