import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxrelu
import relu6_convnet
from scripts import quick_run, rows


@pytest.mark.slow
def test_relu6_convnet(tmp_path, capsys):
    lines = quick_run(relu6_convnet, tmp_path, capsys, "--lean")
    assert any(line.startswith("lean ") for line in lines)
    (row,) = rows(tmp_path / "accuracy.csv")
    assert (row["activation"], row["dtype"]) == ("relu6", "float32")
    assert lines[-1] == (
        f"relu6: test accuracy {100 * float(row['accuracy']):.2f} %, "
        f"with 8-bit activations {100 * float(row['accuracy_8_bits']):.2f} %"
    )
    assert float(row["accuracy_2_bits"]) < float(row["accuracy"])  # the rounding does something
    assert all(0 < float(layer["largest"]) <= 6 for layer in rows(tmp_path / "ranges.csv"))
    assert {layer["step_8_bits"] for layer in rows(tmp_path / "ranges.csv")} == {"0.0235294"}  # 6/255


def test_depthwise_is_a_convolution_with_one_group_per_channel():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 9, 5), np.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 1, 5), np.float32))
    models = [relu6_convnet.Depthwise(5, stride, lambda key, shape: kernel, jnp.float32, nnx.Rngs(0)) for stride in (1, 2)]

    def ours(x):
        return [model(x) for model in models]

    def peer(x):
        layout = ("NHWC", "HWIO", "NHWC")
        return [
            jax.lax.conv_general_dilated(x, kernel, (s, s), [(1, 1)] * 2, dimension_numbers=layout, feature_group_count=5)
            for s in (1, 2)
        ]

    for y, wanted in zip(jax.jit(ours)(x), jax.jit(peer)(x), strict=True):
        assert y.shape == wanted.shape
        assert jnp.abs(y - wanted).max() < 1e-5 < jnp.abs(y).max()


def test_the_whole_network_has_an_activation_behind_each_convolution():
    model = nnx.eval_shape(lambda: relu6_convnet.MobileNet(jaxrelu.relu6, relu6_convnet.BLOCKS, jnp.bfloat16, nnx.Rngs(0)))
    logits, largest = nnx.eval_shape(lambda model, x: model.apply(x), model, jnp.zeros((3, 8, 8, 1)))
    assert (logits.shape, logits.dtype) == ((3, 10), jnp.float32)
    assert largest.shape == (1 + 2 * len(relu6_convnet.BLOCKS),)
