"""The order of the training images, and one training step of a classifier."""

import functools

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array

from common import digits
from jaxrelu.diagnostics import UnitStats, observe
from jaxrelu.recycling import fresh_batch_stats


def batches(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Returns the indices of one epoch's batches, in random order, of shape (count // size, size).

    Every batch is full, so that the step is compiled once. The few examples left over differ from epoch to epoch.
    """
    return rng.permutation(count)[: count // size * size].reshape(-1, size)


def observed(model: nnx.Module, images: Array) -> tuple[Array, dict[str, UnitStats]]:
    """Returns the logits, and the statistics of each layer with an activation, under the layer's name.

    In training it updates the running statistics of a BatchNorm, as a call of the model does.
    """

    # observe takes no model that changes its own state, as a BatchNorm does in training; so that state is returned
    def call(graph: nnx.GraphDef, state: nnx.State, images: Array) -> tuple[Array, nnx.State]:
        model = nnx.merge(graph, state)
        return model(images), nnx.state(model, nnx.BatchStat)

    (logits, batch_stats), stats = observe(call)(*nnx.split(model), images)
    nnx.update(model, batch_stats)
    return logits, {edge.stats: found for edge, found in zip(model.EDGES, stats.values(), strict=True)}


@functools.partial(nnx.jit, static_argnames="recycling")
def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, key: Array, images: Array, labels: Array, recycling: bool = False
) -> tuple[Array, Array]:
    """Updates the model on a batch whose images are shifted at random; returns the loss and its gradient's norm."""
    images = digits.random_shift(jax.random.fold_in(key, optimizer.step[...]), images)

    def loss(model: nnx.Module) -> tuple[Array, dict[str, UnitStats]]:
        logits, stats = observed(model, images) if recycling else (model(images), {})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

    (value, stats), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradients, **({"stats": stats} if recycling else {}))
    if recycling:
        # in evaluation a recycled unit would otherwise be scaled by the statistics of the dead one
        recycled = [mask[...] for mask in optimizer.opt_state.fresh]
        nnx.update(model, fresh_batch_stats(nnx.state(model, nnx.BatchStat), model.EDGES, recycled))
    return value, optax.tree.norm(gradients)
