"""`Edge`: which parameters belong to a layer of units, and where in these the units lie."""

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer
from jax.sharding import PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path

from jaxrelu import _checked as checked

__all__ = ["Edge", "Layer", "Parameters", "check", "named"]

# the names of weights and biases in Flax, then in Haiku, then in Equinox, then their places in a pair
_WEIGHTS = ("kernel", "w", "W", "weight", "0")
_BIASES = ("bias", "b", "1")
# normalisations that mix units, so that recycling one unit would change the others
_MIXING = ("layernorm", "rmsnorm", "groupnorm", "instancenorm")


class Edge(NamedTuple):
    """The units of one layer: the name of their statistics, the layer that produces them, and all layers that read them.

    A layer is named by its path: the keys and attributes that lead to it from the parameters, joined by "/", as in
    "encoder/layer_0" or "layers/0". The leading "params" of Flax linen is left out. The path ends at what holds the layer's
    weights and bias (`kernel` and `bias` in Flax, `w` and `b` in Haiku, `weight` and `bias` in Equinox, or a pair of both),
    or at the weights themselves, as "W_hidden" or "0" in a list of arrays.

    Parameters alone do not show all that matters. Leave out a layer of units that a BatchNorm, a bias or a skip connection
    follows behind the activation, that another layer reads without being named here, or whose weights are also used
    elsewhere, as tied weights are: recycling would change what the network computes. The weights of an ensemble, stacked
    along a leading axis, are recycled together: a unit must be dormant in all members.

    Attributes:
        stats: the name of the units' statistics in the `stats` of an update.
        producer: the path of the layer whose outputs are the units. A PReLU's slope is never changed.
        consumers: the paths of all layers that read the units.
        between: the paths of the BatchNorms between the producer and the activation.
        bias: the path of the producer's bias, or "" if it has none. With None it is found beside the weights, by its name.
        units_axis: the axis of the units in the producer's weights. With None it is the first where they are called
            `weight`, as in Equinox, else the last. For square weights it must be given, unless they are called `kernel`, as
            in Flax; there give it for a transposed convolution with transpose_kernel.
        inputs_axis: the axis of the inputs in the consumers' weights. With None it is the second where they are called
            `weight`, else the last but one. It must be given as units_axis must.
        inputs: what the consumers read. None: these units alone. "flattened": the positions of a convolution with channels
            last, flattened; "flattened channels first": those of one with channels first. A number: a concatenation in which
            the units begin at this place.
    """

    stats: str
    producer: str
    consumers: Sequence[str]
    between: Sequence[str] = ()
    bias: str | None = None
    units_axis: int | None = None
    inputs_axis: int | None = None
    inputs: Literal["flattened", "flattened channels first"] | int | None = None


class Layer(NamedTuple):
    """The number of units of an edge, and the places of its arrays in the list of parameters, with the axis of the units."""

    units: int
    weights: int
    axis: int
    zeros: list[int]  # the biases
    ones: list[int]  # the scales
    outgoing: list[tuple[int, int]]
    inputs: Any  # as in Edge


def named(tree: Any) -> dict[str, tuple[int, Any]]:
    """Returns the place and the value of each leaf of a pytree by the name of its path."""
    leaves, _ = tree_flatten_with_path(tree)
    names = [keystr(path, simple=True, separator="/") for path, _ in leaves]
    # Flax may keep an array in a box, which adds "value" to the path
    clean = [name.removesuffix("/value").removeprefix("params/").removeprefix("batch_stats/") for name in names]
    return {name: (place, leaf) for place, (name, (_, leaf)) in enumerate(zip(clean, leaves, strict=True))}


class Parameters:
    """Parameters as a flat list, found by path."""

    def __init__(self, params: Any) -> None:
        leaves, _ = tree_flatten_with_path(params)
        self.arrays: list[Array] = [leaf for _, leaf in leaves]
        self.index: dict[tuple[Any, ...], int] = {path: index for index, (path, _) in enumerate(leaves)}
        self.names = {name: place for name, (place, _) in named(params).items()}

    def layers(self, edges: Sequence[Edge]) -> list[Layer]:
        """Returns where the arrays of the edges are; raises ValueError if one is missing, misshaped or shared."""
        layers = [self._layer(edge) for edge in edges]
        for one, other in itertools.combinations(range(len(edges)), 2):
            if layers[one].weights == layers[other].weights:
                raise ValueError(f"recycle: a layer must be the producer of one edge, got {edges[other].producer!r} twice")
            if shared := set(layers[one].zeros + layers[one].ones) & set(layers[other].zeros + layers[other].ones):
                raise ValueError(
                    f"recycle: a bias or scale must belong to one edge, got {self._name(shared.pop())!r} twice; leave one "
                    "edge out"
                )
            for index, _ in set(layers[one].outgoing) & set(layers[other].outgoing):
                first, second = sorted((_span(layers[i]) for i in (one, other)), key=lambda span: span.start)
                if second.start < first.stop:
                    raise ValueError(
                        f"recycle: a layer must be the consumer of one edge, got {self._name(index)!r} twice; if it reads a "
                        "concatenation, say in each edge where its units begin, by inputs"
                    )
        return layers

    def _layer(self, edge: Edge) -> Layer:
        weights, axis = self._weights(edge, edge.producer, edge.units_axis, (-1, 0), "units_axis")
        units = self.arrays[weights].shape[axis]
        zeros, ones = self._bias(edge, weights, units), list[int]()
        for path in edge.between:
            scale, bias = self._find(path, ("scale", "weight", "gamma")), self._find(path, ("bias", "offset", "beta"))
            if not scale + bias:
                raise ValueError(
                    f"recycle: between must name a BatchNorm by what holds its scale or bias, got {path!r}; leave the edge "
                    "out if that has no path"
                )
            zeros, ones = zeros + bias, ones + scale
        for index in zeros + ones:
            if not _is_vector(self.arrays[index], units):
                raise ValueError(
                    f"recycle: biases and scales of the {units} units of {edge.producer!r} must have shape ({units},), "
                    f"got {self.arrays[index].shape}; name its own bias, and BatchNorms with one number for each unit"
                )
        outgoing = [self._weights(edge, path, edge.inputs_axis, (-2, 1), "inputs_axis") for path in edge.consumers]
        layer = Layer(units, weights, axis, zeros, ones, outgoing, edge.inputs)
        for path, (index, inputs_axis) in zip(edge.consumers, outgoing, strict=True):
            read = self.arrays[index].shape[inputs_axis]
            fits = read == units
            if isinstance(edge.inputs, int):
                fits = edge.inputs + units <= read
            elif edge.inputs is not None:
                fits = read % units == 0
            if not fits:
                hint = '; if it reads them flattened, or in a concatenation, say so by inputs="flattened" or by their place'
                raise ValueError(
                    f"recycle: the consumer {path!r} must read the {units} units of {edge.producer!r}, got weights of shape "
                    f"{self.arrays[index].shape}, which read {read}{'' if edge.inputs is not None else hint}"
                )
            if (index, inputs_axis) == (weights, axis):
                raise ValueError(
                    f"recycle: the producer {edge.producer!r} and the consumer {path!r} must not be the same weights along "
                    "the same axis; leave tied weights out"
                )
        for index in (weights, *(index for index, _ in outgoing)):
            if twice := [i for i, array in enumerate(self.arrays) if i != index and array is self.arrays[index]]:
                raise ValueError(
                    f"recycle: {self._name(index)!r} and {self._name(twice[0])!r} must not be the same array; leave tied "
                    "weights out, or copy one"
                )
        return layer

    def fresh(
        self, layers: Sequence[Layer], dormant: Sequence[Array], key: Array, init: Initializer
    ) -> dict[int, tuple[Array, Array]]:
        """Returns, by the place of each array that recycling changes, a mask of the recycled entries and their values."""
        fresh: dict[int, tuple[Array, Array]] = {}
        for layer, mask in zip(layers, dormant, strict=True):
            for index, axis in layer.outgoing:
                array = self.arrays[index]
                rows = _along(_inputs(layer, mask, array.shape[axis]), axis, array)
                before, _ = fresh.get(index, (jnp.zeros_like(rows), rows))
                fresh[index] = before | rows, jnp.zeros_like(array)
            for places, fill in ((layer.zeros, jnp.zeros_like), (layer.ones, jnp.ones_like)):
                fresh |= {i: (mask.reshape(self.arrays[i].shape), fill(self.arrays[i])) for i in places}
        for layer, mask, own in zip(layers, dormant, jax.random.split(key, len(layers)), strict=True):
            array = self.arrays[layer.weights]
            columns, drawn = _along(mask, layer.axis, array), _drawn(init, own, array, layer.axis)
            before, value = fresh.get(layer.weights, (jnp.zeros_like(columns), drawn))
            # a weight that is outgoing too is drawn, not 0: a layer behind a dead one would otherwise stay dead
            fresh[layer.weights] = before | columns, jnp.where(columns, drawn, value)
        return {
            i: (sharded_as(mask, self.arrays[i]), sharded_as(value, self.arrays[i])) for i, (mask, value) in fresh.items()
        }

    def _name(self, index: int) -> str:
        return next(name for name, place in self.names.items() if place == index)

    def _find(self, path: str, names: Iterable[str]) -> list[int]:
        """Returns the place of the first array of these names that the layer has, in a list; an empty one if it has none."""
        inside = [f"{path}/{name}" if path else name for name in names]
        return [self.names[name] for name in inside if name in self.names][:1]

    def _weights(self, edge: Edge, path: str, axis: int | None, usual: tuple[int, int], field: str) -> tuple[int, int]:
        """Returns the place of a layer's weights, and an axis of them: the given one, or the usual one, or Equinox's."""
        found = [self.names[path]] if path in self.names else self._find(path, _WEIGHTS)
        if not found or self.arrays[found[0]].ndim < 2:
            raise ValueError(
                f"recycle: the edge of {edge.stats!r} must name layers with weights (..., inputs, units) called "
                f"{', '.join(_WEIGHTS[:-1])}; found none at {path!r} among {', '.join(self.names)}"
            )
        shape, name = self.arrays[found[0]].shape, self._name(found[0]).rpartition("/")[2]
        if axis is not None:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"recycle: {field} {axis} is out of range for weights of {path!r}, {shape}; give one of its axes"
                )
            return found[0], axis % len(shape)
        first = name == "weight"
        pair = shape[:2] if first else shape[-2:]
        # a kernel of Flax's Conv has inputs and units last, but one of DenseGeneral may have several axes of inputs
        ambiguous = shape[-3:-2] == shape[-2:-1] if name == "kernel" else pair[0] == pair[1]
        if ambiguous:
            raise ValueError(
                f"recycle: {field} must be given for {path!r}, as inputs and units cannot be told apart in weights of shape "
                f"{shape}; it is {usual[0]} for x @ w, and {usual[1]} for w @ x"
            )
        return found[0], usual[first] % len(shape)

    def _bias(self, edge: Edge, weights: int, units: int) -> list[int]:
        if edge.bias is not None:
            if edge.bias and edge.bias not in self.names:
                raise ValueError(f"recycle: bias must be the path of an array, got {edge.bias!r} of {', '.join(self.names)}")
            return [self.names[edge.bias]] if edge.bias else []
        folder, _, name = self._name(weights).rpartition("/")
        direct = edge.producer in self.names
        if name in _WEIGHTS and not (direct and name == "0") and (beside := self._find(folder, _BIASES)):
            return beside
        split = {name: name.rpartition("/") for name in self.names}
        vectors = [
            n
            for n, (f, _, last) in split.items()
            if f == folder
            and last != "negative_slope"
            and self.names[n] != weights
            and _is_vector(self.arrays[self.names[n]], units)
        ]
        if vectors or (direct and (name not in _WEIGHTS or name == "0")):
            found = f"which {', '.join(vectors)} may be" if vectors else "as weights alone are named"
            raise ValueError(
                f"recycle: the edge of {edge.stats!r} must say where the bias of {edge.producer!r} is, {found}; pass "
                'bias="path", or bias="" if there is none'
            )
        return []


def sharded_as(x: Array, array: Array) -> Array:
    """Returns x in the sharding of an array, if that is on explicit axes of a mesh; else x."""
    sharding = jax.typeof(array).sharding
    return jax.sharding.reshard(x, sharding) if sharding.mesh.explicit_axes else x


def replicated(x: Array) -> Array:
    """Returns x, whole on each device, if it is on explicit axes of a mesh; else x."""
    sharding = jax.typeof(x).sharding
    return jax.sharding.reshard(x, PartitionSpec()) if sharding.mesh.explicit_axes else x


def _is_vector(array: Array, units: int) -> bool:
    """Returns whether an array has one number for each unit; Haiku's BatchNorm has axes of size 1 besides."""
    return math.prod(array.shape) == units and units in array.shape


def _span(layer: Layer) -> range:
    """Returns which of a consumer's inputs the units are."""
    return range(layer.inputs, layer.inputs + layer.units) if isinstance(layer.inputs, int) else range(sys.maxsize)


def _inputs(layer: Layer, mask: Array, read: int) -> Array:
    """Returns which of a consumer's inputs come from the units of a mask."""
    if isinstance(layer.inputs, int):
        return jnp.pad(mask, (layer.inputs, read - layer.inputs - layer.units))
    positions = read // layer.units
    return jnp.repeat(mask, positions) if layer.inputs == "flattened channels first" else jnp.tile(mask, positions)


def _along(mask: Array, axis: int, array: Array) -> Array:
    """Returns a mask along an axis of an array, in the shape of the array."""
    return jnp.broadcast_to(mask.reshape([-1 if i == axis else 1 for i in range(array.ndim)]), array.shape)


def _drawn(init: Initializer, key: Array, array: Array, axis: int) -> Array:
    """Returns fresh weights. Initializers count the inputs in an array (..., inputs, units)."""
    if axis == array.ndim - 1:
        return init(key, array.shape, array.dtype)
    moved = [i for i in range(array.ndim) if i not in (axis, axis + 1)] + [axis + 1, axis]
    drawn = init(key, tuple(array.shape[i] for i in moved), array.dtype)
    return jnp.transpose(drawn, [moved.index(i) for i in range(array.ndim)])


def check(function: str, edges: Sequence[Edge]) -> None:
    """Raises TypeError or ValueError for edges that fit no parameters; `function` is that which the user called."""
    several = isinstance(edges, (list, tuple)) and not isinstance(edges, Edge)  # no generator: all() would use it up
    if not several or not edges or not all(isinstance(edge, Edge) for edge in edges):
        raise TypeError(f"{function}: edges must be a list of one recycling.Edge or more, got {edges!r}")
    for edge in list(edges):
        for name, axis in (("units_axis", edge.units_axis), ("inputs_axis", edge.inputs_axis)):
            if axis is not None and not checked.is_int(axis):
                raise TypeError(f"{function}: {name} must be an int or None, got {axis!r}")
        for name, paths in (("consumers", edge.consumers), ("between", edge.between)):
            if not isinstance(paths, (list, tuple)):
                raise TypeError(f"{function}: {name} must be a list of paths, got {paths!r}; put a single one in brackets")
        if not edge.consumers:
            raise ValueError(f"{function}: consumers must name the layers that read {edge.producer!r}, got none")
        place = checked.is_int(edge.inputs) and edge.inputs >= 0
        if not place and edge.inputs not in (None, "flattened", "flattened channels first"):
            raise ValueError(
                f'{function}: inputs must be None, "flattened", "flattened channels first" or a place, got {edge.inputs!r}; '
                "pass the number of inputs before the units"
            )
        for path in edge.between:
            if any(name in path.lower().replace("_", "") for name in _MIXING):
                raise ValueError(
                    f"{function}: between must name BatchNorms, got {path!r}: it mixes units, so that others would change "
                    f"with a recycled one; put the normalisation before {edge.producer!r}, or leave this edge out"
                )
