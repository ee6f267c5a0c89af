import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxrelu
from jaxrelu._lowering import observed
from jaxrelu._programs import formulas
from jaxrelu._programs.formulas import NAMES, recognized, unit_axis
from jaxrelu._programs.interpreter import Scope

EACH = [
    *((name, getattr(jax.nn, name)) for name in formulas.NAMES if hasattr(jax.nn, name)),
    ("gelu", functools.partial(jax.nn.gelu, approximate=False)),
    ("maximum", lambda x: jnp.maximum(x, 0)),
    ("where", lambda x: jnp.where(x > 0, x, 0)),
]
FUNCTIONS = dict(reversed(EACH))
DEFAULT = [name for name, _ in EACH if name in formulas.DEFAULT]
F32 = jnp.float32


def array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


X, Z, W, V, B = array(7, 3), array(7, 5), array(3, 5), array(5, 3), array(5)


def found(f, *args, names=NAMES):
    return list(recognized(jax.make_jaxpr(f)(*args), names).values())


def names_of(f, *args, names=NAMES):
    return [activation.name for activation in found(f, *args, names=names)]


def in_a_row(x):
    """Applies every activation that is known by default."""
    for name, function in EACH:
        x = function(x) if name in formulas.DEFAULT else x
    return x


@pytest.fixture(autouse=True)
def layers_promote(strict_promotion):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
def test_each_is_known_by_its_formula(dtype):
    x = array(7, 3, dtype=dtype)
    for name, function in EACH:
        for f in (
            *(function, jax.jit(function), jax.vmap(function), jax.vmap(function, in_axes=1)),
            *(jax.jit(jax.vmap(jax.jit(function), in_axes=1)), jax.vmap(jax.vmap(function)), jax.checkpoint(function)),
        ):
            (activation,) = found(f, x)
            assert activation.name == name
    assert names_of(in_a_row, x) == names_of(in_a_row, x, names=None) == DEFAULT


@pytest.mark.usefixtures("x64")
def test_in_float64():
    assert names_of(in_a_row, array(7, dtype=jnp.float64)) == names_of(in_a_row, array(7)) == DEFAULT


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_where_vmap_transposes_the_result_of_elu():
    (elu,) = found(jax.vmap(jax.nn.elu, in_axes=1), X)
    assert elu.axes[0] == (1, 0)


def test_arguments_are_numbers_or_arrays():
    def bound(f, *args):
        (activation,) = found(f, *args)
        return activation.name, *(getattr(a, "val", a.aval.shape) for a in activation.arguments)

    assert bound(jax.nn.leaky_relu, X) == ("leaky_relu", np.float32(0.01))
    assert bound(lambda x: jax.nn.leaky_relu(x, 0.25), X) == ("leaky_relu", 0.25)
    assert bound(lambda x: jax.nn.leaky_relu(x, -0.0), X) == ("leaky_relu", 0.0)
    assert bound(jax.nn.leaky_relu, X, array(3)) == ("prelu", (3,))
    assert bound(lambda x, s: jnp.where(x >= 0, x, s.astype(x.dtype) * x), X, array(dtype=jnp.bfloat16)) == ("prelu", ())
    assert bound(jax.vmap(jax.nn.leaky_relu, in_axes=(None, 0)), X, array(2)) == ("prelu", (2,))
    assert bound(jax.nn.elu, X, array()) == ("elu", ())
    assert bound(lambda x: jax.nn.celu(x, 2.0), X) == ("celu", 2.0)
    assert bound(lambda x: x * jax.nn.sigmoid(x), X) == bound(lambda x: jax.nn.sigmoid(x) * x, X) == ("silu",)


def test_what_is_alike_is_not_taken():
    for f in (
        *(lambda x: jnp.where(x >= 0, x, jnp.exp(x) * x), lambda x: jnp.where(x > 0.5, x, 0.1 * x)),
        *(lambda x: jnp.where(x >= 0, x, 0.1 * jnp.abs(x)), lambda x: jnp.minimum(jnp.maximum(x, 0), 5)),
        *(lambda x: x * jax.nn.sigmoid(1.702 * x), lambda x: 1.05 * jax.nn.elu(x, 1.67) + x, jnp.abs, lambda x: x),
        lambda x: jnp.logaddexp(x, 0.5),
    ):
        assert names_of(f, X, names=formulas.DEFAULT) in ([], ["elu"])
    square = array(4, 4)
    assert not found(lambda x: jnp.where(x >= 0, x.T, 0.1 * x.T), square)
    assert found(lambda x: jnp.where(x.T >= 0, x.T, 0.1 * x.T), square)[0].axes[0] in ((0, 1), (1, 0))
    assert not found(lambda x, y: jnp.where(x >= 0, y, 0.1 * y), square, square)


def test_what_gates_and_losses_use_is_taken_if_asked_for():
    for name in NAMES[len(formulas.DEFAULT) :]:
        function = FUNCTIONS[name]
        assert not found(function, X, names=None)
        assert names_of(function, X, names=(name, "relu")) == [name]
        assert not found(function, X, names=("relu",))


def test_the_largest_formula_claims_its_parts():
    for name, parts in (("mish", ("softplus", "tanh")), ("silu", ("sigmoid",)), ("gelu", ("tanh",)), ("celu", ("maximum",))):
        assert not names_of(FUNCTIONS[name], X, names=parts)
        assert names_of(lambda x, f=FUNCTIONS[name]: jnp.tanh(f(x)), X) == [name, "tanh"]
    assert not found(lambda x: -jax.nn.log_sigmoid(-x), X, names=None)  # a loss: no softplus


def with_rule(function, rule):
    f = jax.custom_jvp(function)
    f.defjvp(lambda primals, tangents: (f(*primals), rule(*primals, *tangents)))
    return f


def test_another_derivative_rule_is_another_function():
    def relu(x):
        return jnp.maximum(x, 0)

    def standard(x, t):
        return lax.select(x > 0, t, jnp.zeros_like(t))

    straight_through = with_rule(jax.nn.relu, lambda x, t: t)
    at_zero = with_rule(relu, lambda x, t: lax.select(x >= 0, t, jnp.zeros_like(t)))
    leak = with_rule(relu, lambda x, t: lax.select(x > 0, t, 0.1 * t))
    swapped = with_rule(relu, lambda x, t: lax.select(t > 0, x, jnp.zeros_like(t)))
    for transform in (lambda f: f, jax.jit, jax.vmap, functools.partial(jax.vmap, in_axes=1)):
        for other in (straight_through, at_zero, leak, swapped, with_rule(jax.nn.relu6, standard)):
            assert not found(transform(other), X)
        assert names_of(transform(with_rule(relu, standard)), X) == ["relu"]
    # JAX's softplus is such a function
    assert not found(with_rule(jax.nn.softplus, lambda x, t: t), X)


def test_under_grad_the_value_is_found_and_no_derivative():
    def values_and_gradient(x):
        return jax.vjp(in_a_row, x)[0], jax.grad(lambda x: in_a_row(x).sum())(x)

    assert names_of(values_and_gradient, X) == 2 * DEFAULT


@pytest.mark.parametrize("check", [True, False])
def test_under_shard_map(check):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check)
    other = with_rule(jax.nn.relu, lambda x, t: t)
    for transform in (lambda f: f, jax.vmap):
        seen = []

        def f(x, transform=transform, seen=seen):
            formulas._formulas.cache_clear()  # as if it was first called here
            seen += names_of(lambda x: transform(other)(transform(in_a_row)(x)), x)
            return transform(other)(transform(in_a_row)(x))

        (eqn,) = jax.make_jaxpr(shard(f))(array(8, 3)).eqns
        assert [a.name for a in recognized(eqn.params["jaxpr"]).values()] == seen == DEFAULT


def test_with_explicit_sharding():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    x = jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("data")))
    for context in (jax.set_mesh(mesh), jax.enable_x64(False)):
        with context:
            formulas._formulas.cache_clear()
            assert names_of(in_a_row, x) == names_of(jax.vmap(in_a_row, in_axes=1), x) == DEFAULT
    assert names_of(in_a_row, X) == DEFAULT


def test_no_tracer_is_kept():
    @jax.jit
    @jax.grad
    def f(x):
        formulas._formulas.cache_clear()
        assert names_of(jax.vmap(in_a_row), jnp.stack([x, x])) == DEFAULT
        return x

    with jax.checking_leaks():
        f(1.0)


def test_our_own_are_known_by_their_mark():
    with observed(True):
        program = jax.make_jaxpr(lambda x, s: jaxrelu.elu(jax.nn.elu(jaxrelu.prelu(x, s))))(X, array(3))
        assert not found(jax.grad(lambda x: jaxrelu.relu(x) * jaxrelu.relu(x)), array())
    assert sorted(a.name for a in recognized(program).values()) == ["elu", "elu", "prelu"]


def axis_of(f, *args, name="relu"):
    scope = Scope(jax.make_jaxpr(f)(*args))
    (activation,) = (a for a in recognized(scope, NAMES).values() if a.name == name)
    return unit_axis(scope, activation.z)


IMAGES, KERNEL = array(6, 2, 8, 9), array(4, 2, 3, 3)


def convolved(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME")


def normed(x, *axes):
    return (x - x.mean(axes, keepdims=True)) * lax.rsqrt(x.var(axes, keepdims=True) + 1e-5)


relu = jax.nn.relu
PRODUCTS = {
    "dense": (1, lambda x, w: relu(x @ w), X, W),
    "dense with a bias": (1, lambda x, w, b: relu(x @ w + b), X, W, B),
    "dense, weights first": (1, lambda w, x: relu(x @ w.T), V, X),
    "three axes": (2, lambda x, w, b: relu(x @ w + b), array(2, 7, 3), W, B),
    "masked weights": (1, lambda x, w, m, b: relu(x @ (w * m) + b), X, W, W, B),
    "normed weights": (1, lambda x, w, g: relu(x @ (g * w / jnp.sqrt((w * w).sum(0, keepdims=True)))), X, W, B),
    "scaled weights": (1, lambda x, w: relu(x @ (w * 0.5)), X, W),
    "sum of weights": (1, lambda x, w, p, q: relu(x @ (w + p @ q)), X, W, array(3, 2), array(2, 5)),
    "stacked weights": (1, lambda x, w: relu(jnp.tanh(x @ w[0]) @ w[1]), X, array(2, 3, 3)),
    "one vector of weights": (1, lambda x, p: relu(x @ p[:15].reshape(3, 5) + p[None, 15:]), X, array(20)),
    "graph": (1, lambda a, x, w: relu(a @ (x @ w)), array(7, 7), X, W),
    "graph with a bias": (1, lambda a, x, w, b: relu(a @ (x @ w) + b), array(7, 7), X, W, B),
    "vmap": (1, jax.vmap(lambda x, w, b: relu(w @ x + b), (0, None, None)), X, V, B),
    "vmap without bias": (0, jax.vmap(lambda x, w: relu(w @ x), (0, None)), X, V),
    "vmap of a row": (1, jax.vmap(lambda x, w: relu(x @ w), (0, None)), X, W),
    "vmap of scalars": (1, jax.vmap(lambda x, w, b: jax.vmap(relu)(w @ x + b), (0, None, None)), X, V, B),
    "vmap along 1": (1, jax.vmap(lambda x, w, b: relu(w @ x + b), (1, None, None)), array(3, 7), V, B),
    "one example": (0, lambda x, w, b: relu(w @ x + b), array(3), V, B),
    "second layer": (0, lambda x, w, v: relu(v @ jnp.tanh(x @ w).T), X, W, array(2, 5)),
    "ensemble": (2, jax.vmap(lambda x, w: relu(x @ w), (None, 0)), X, array(2, 3, 5)),
    "heads": (3, lambda x, w: relu(jnp.einsum("bti,ihd->bthd", x, w)), array(2, 7, 3), array(3, 4, 5)),
    "channels last": (
        3,
        lambda x, w: relu(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))),
        *(array(6, 8, 9, 2), array(3, 3, 2, 4)),
    ),
    "channels first": (1, lambda x, w: relu(convolved(x, w)), IMAGES, KERNEL),
    "channels first, vmap": (
        1,
        jax.vmap(lambda x, w, b: relu(convolved(x[None], w)[0] + b), (0, None, None)),
        IMAGES,
        KERNEL,
        array(4, 1, 1),
    ),
    "channels first, vmap along 3": (
        1,
        jax.vmap(lambda x, w: relu(convolved(x[None], w)[0]), (3, None)),
        array(2, 8, 9, 6),
        KERNEL,
    ),
    "one image": (0, lambda x, w, b: relu(convolved(x[None], w)[0] + b), array(2, 8, 9), KERNEL, array(4, 1, 1)),
    "norm and pool": (
        1,
        lambda x, w: relu(
            lax.reduce_window(normed(convolved(x, w), 0, 2, 3), -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        ),
        *(IMAGES, KERNEL),
    ),
    "residual": (1, lambda x, w: relu(x + jnp.tanh(x) @ w), X, array(3, 3)),
    "mask over positions": (2, lambda x, w, m: relu((x @ w) * m[:, None]), array(2, 7, 3), W, array(7)),
    "bias per example": (1, lambda x, w, m: relu(x @ w + m[:, None]), X, W, array(7)),
    "positions first": (1, jax.vmap(lambda x, w, m: relu(w @ x + m), (1, None, None), 1), array(3, 7), V, B),
}
OTHERS = {
    "bias alone": (1, lambda x, b: relu(jnp.tanh(x) + b), Z, B),
    "scale of a norm": (1, lambda x, s: relu(normed(x, 0, 2) * s[:, None]), array(2, 5, 7), B),
    "weights of the examples": (None, lambda x, m: relu(jnp.tanh(x) * m[:, None]), Z, array(7)),
    "norm of one example without scale": (None, lambda x: relu(normed(jnp.tanh(x), 2)), array(1, 7, 5)),
    "boolean mask": (None, lambda x, m: relu(jnp.tanh(x) * m[:, None]), array(2, 7, 5), array(7, dtype=bool)),
    "mask over examples and positions": (None, lambda x, m: relu(jnp.tanh(x) * m[..., None]), array(2, 7, 5), array(2, 7)),
    "scores": (
        None,
        lambda q, k: relu(jnp.einsum("bqd,bkd->bqk", jnp.tanh(q), jnp.tanh(k))),
        array(2, 7, 3),
        array(2, 7, 3),
    ),
    "input": (None, lambda x: relu(x), array(1, 5)),
}


def test_a_batch_of_unknown_size():
    (batch,) = export.symbolic_shape("batch")
    x = array(batch, 3)
    assert axis_of(lambda x, w, b: relu(x @ w + b), x, W, B) == 1
    for f in (in_a_row, jax.vmap(in_a_row), jax.vmap(in_a_row, in_axes=1)):
        assert names_of(f, x) == DEFAULT
    assert found(lambda x: jax.nn.leaky_relu(x, jnp.tanh(x[:1])), x)
    assert not found(lambda x: jax.nn.leaky_relu(x, jnp.tanh(x)), x, names=None)


@pytest.mark.parametrize("case", [*PRODUCTS.items(), *OTHERS.items()], ids=lambda case: case[0].replace(" ", "-"))
def test_unit_axis(case):
    axis, f, *args = case[1]
    assert axis_of(f, *args) == axis
