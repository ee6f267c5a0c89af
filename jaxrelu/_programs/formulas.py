"""How to tell an activation in a traced program: by its formula, never by its name.

The expression behind a variable is compared, operation by operation, with a fresh trace of the function, for one number in
the same dtype. What may stand between two operations, as vmap and shard_map leave it there, is looked through: calls,
transposes, broadcasts and casts. The functions of this package, while `observe` traces, are told by their marks.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core
from jax.extend.core import primitives

from jaxrelu import functions
from jaxrelu._lowering import portable
from jaxrelu._programs import marks
from jaxrelu._programs.interpreter import Scope, bodies
from jaxrelu._programs.primitives import PRODUCTS, Axes, moved

__all__ = ["DEFAULT", "NAMES", "Activation", "is_mapped", "layout", "recognized", "unit_axis"]

DEFAULT = (
    *("relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "softplus", "mish", "squareplus"),
    *("soft_sign", "hard_tanh", "hard_sigmoid", "hard_silu"),
)
NAMES = (*DEFAULT, "tanh", "sigmoid", "log_sigmoid", "maximum", "where")  # the last are in gates, losses and bounds too


def _where(x: Array) -> Array:
    return jnp.where(x > 0, x, 0)


# the second argument of these may be any number or array; prelu, of Flax and Equinox, is leaky_relu with an array
_ARGUMENTS = {"leaky_relu": 0.01, "elu": 1.0, "celu": 1.0, "squareplus": 4.0}
_FUNCTIONS: list[tuple[str, Callable[..., Any], list[float]]] = [
    *(
        (name, getattr(jax.nn, name), [_ARGUMENTS[name]] if name in _ARGUMENTS else [])
        for name in NAMES
        if hasattr(jax.nn, name)
    ),
    ("gelu", functools.partial(jax.nn.gelu, approximate=False), []),
    ("maximum", functools.partial(jnp.maximum, 0), []),
    ("where", _where, []),
    # of this package, in `portable`; relu and relu6 are there as in jax.nn
    ("leaky_relu", functions.leaky_relu_formula, [0.01]),
    ("elu_output", functools.partial(functions.elu, save="output"), []),
]
_NOT_FOR_WEIGHTS = PRODUCTS | {"logistic", "tanh"}  # nor custom_jvp functions
_COMMUTATIVE = (lax.add_p, lax.mul_p, lax.max_p, lax.min_p)


class Place(NamedTuple):
    """A variable or literal of a program, as a part of a value."""

    scope: Scope
    atom: Any
    axes: Axes  # where the part is broadcast, None or an axis of size 1

    @property
    def key(self) -> Any:
        """Places with equal keys hold the same number, or the same array along the same axes."""
        return float(self.atom.val) if isinstance(self.atom, core.Literal) else (id(self.scope), self.atom, self.axes)

    @property
    def eqn(self) -> core.JaxprEqn | None:
        """The equation that computes it; None for literals and inputs."""
        return None if isinstance(self.atom, core.Literal) else self.scope.made_by.get(self.atom)

    def operand(self, atom: Any) -> "Place":
        """Returns an input of this place's equation, if that is elementwise."""
        same = len(atom.aval.shape) == len(self.atom.aval.shape)
        return self._replace(atom=atom, axes=self.axes if same else (None,) * len(self.axes))

    def within(self) -> "Place":
        """Returns this output of a call inside what is called."""
        eqn: Any = self.eqn
        inner = self.scope.inside(eqn)[0]
        return Place(inner, inner.jaxpr.outvars[eqn.outvars.index(self.atom)], self.axes)

    def copies(self) -> "Iterator[Place]":
        """Yields this place, then those it is a copy of: across calls, and through what casts or only moves axes."""
        place = self
        while True:
            yield place
            scope, atom, axes = place
            if not isinstance(atom, core.Literal) and atom in scope.given:
                place = Place(*scope.given[atom], axes)
            elif (eqn := place.eqn) is None:
                return
            elif eqn.primitive.name in ("jit", "remat2"):
                place = place.within()
            elif (axes_moved := moved(eqn)) is not None:
                place = Place(scope, eqn.invars[0], tuple(None if axis is None else axes_moved[axis] for axis in axes))
            else:
                return

    def origin(self) -> "Place":
        """Returns the last of the copies."""
        *_, last = self.copies()
        return last

    def is_weights(self) -> bool:
        """Returns whether this is computed from arrays that the program is given, without a product or an activation."""
        places, seen = [self], set[Any]()
        while places:
            scope, atom, _ = last = places.pop().origin()
            if isinstance(atom, core.Literal) or last[:2] in seen:
                continue
            seen.add(last[:2])
            eqn = last.eqn
            if atom in scope.carried or (eqn and (eqn.primitive.name in _NOT_FOR_WEIGHTS or bodies(eqn))):
                return False
            places += [last._replace(atom=v) for v in (eqn.invars if eqn else ())]
        return jnp.issubdtype(self.atom.aval.dtype, jnp.floating)


def _whole(scope: Scope, atom: Any) -> Place:
    return Place(scope, atom, tuple(range(len(atom.aval.shape))))


class Activation(NamedTuple):
    """An activation: its value is `function(z, *arguments)`."""

    name: str
    z: Any  # the variable of the pre-activation
    arguments: tuple[Any, ...]  # slope or alpha: literals and variables
    function: Callable[..., Array]
    # for z and each argument, which of its axes each axis of the value is; None for functions of this package
    axes: tuple[Axes, ...] | None
    parts: frozenset[core.Var]  # the results of the equations between z and the value


class _Formula(NamedTuple):
    name: str
    function: Callable[..., Array]
    root: Place
    leaves: tuple[core.Var, ...]  # x, then slope or alpha


@functools.lru_cache
def _formulas(dtype: Any) -> dict[Any, list[_Formula]]:
    """Returns the formulas in a dtype by their last operation. They are traced for numbers, so that they hold no array."""
    found: dict[Any, list[_Formula]] = {}
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16:
        for name, function, arguments in _FUNCTIONS:
            with portable():
                scope = Scope(jax.make_jaxpr(function)(jax.ShapeDtypeStruct((), dtype), *arguments))
            root: Any = _whole(scope, scope.jaxpr.outvars[0]).origin()
            found.setdefault(root.eqn.primitive, []).append(_Formula(name, function, root, tuple(scope.jaxpr.invars)))
    return found


class _Match:
    """The comparison of an expression with a formula."""

    def __init__(self, leaves: Sequence[core.Var], rules: bool = True) -> None:
        self.leaves, self.rules = leaves, rules  # the arguments of the formula; whether derivative rules are compared too
        self.bound: dict[core.Var, list[Place]] = {}  # for each argument, the copies of what it stands for
        self.passed: list[Place] = []  # all other places in the expression

    def fits(self, formula: Place, place: Place) -> bool:
        """Returns whether the expression behind a place is that behind a place of the formula."""
        wanted, copies = formula.origin(), list(place.copies())
        found = copies[-1]
        if wanted.atom in self.leaves:
            return self.bound.setdefault(wanted.atom, copies)[-1].key == found.key
        if isinstance(wanted.atom, core.Literal):  # a number is rounded to the dtype in which it is used
            number, dtype = getattr(found.atom, "val", None), formula.atom.aval.dtype
            return number is not None and bool(np.asarray(wanted.atom.val, dtype) == np.asarray(number, dtype))
        a, b = wanted.eqn, found.eqn
        if a is None or b is None or a.primitive is not b.primitive:
            return False
        self.passed += copies
        if a.primitive is primitives.custom_jvp_call_p:
            return self.fits(wanted.within(), found.within()) and (not self.rules or _same_rule(wanted, found))
        if a.params != b.params:
            return False
        operands = [wanted.operand(v) for v in a.invars]
        order = [found.operand(v) for v in b.invars]
        before = dict(self.bound), len(self.passed)
        for places in (order, order[::-1]) if a.primitive in _COMMUTATIVE else (order,):
            if len(operands) == len(places) and all(map(self.fits, operands, places)):
                return True
            self.bound = dict(before[0])
            del self.passed[before[1] :]
        return False

    def activation(self, formula: _Formula, scope: Scope, value: Any) -> Activation | None:
        """Returns the activation that was found, if its arguments are variables of a program."""
        bound = [self.bound.get(leaf, []) for leaf in formula.leaves]
        # what stands for an argument in this program itself; what calls do with it shows in the axes
        places = [next((p for p in copies if p.scope is scope), copies[-1]) for copies in bound if copies]
        z, *arguments = places
        if len(places) < len(bound) or z.scope is not scope or isinstance(z.atom, core.Literal):
            return None
        for place in arguments:
            shape = tuple(None if axis is None else place.atom.aval.shape[axis] for axis in place.axes)
            # a slope computed for each number, as in where(x >= 0, x, f(x) * x), is another activation
            computed = place.origin().eqn is not None and shape == value.aval.shape
            if computed or not (isinstance(place.atom, core.Literal) or place.scope is scope):
                return None
        atoms, axes = tuple(place.atom for place in arguments), tuple(place.axes for place in places)
        learned = formula.name == "leaky_relu" and not isinstance(atoms[0], core.Literal)
        parts = frozenset(p.atom for p in self.passed if p.scope is scope and p.atom is not value)
        return Activation("prelu" if learned else formula.name, z.atom, atoms, formula.function, axes, parts)


def _same_rule(a: Place, b: Place) -> bool:
    """Returns whether the derivative rules of two custom_jvp functions are the same, as far as these places need it."""
    scopes = [place.scope.derivative(place.eqn) for place in (a, b)]
    outs = [scope.jaxpr.outvars[p.eqn.outvars.index(p.atom)] for scope, p in zip(scopes, (a, b), strict=True) if p.eqn]
    leaves, inputs = (scope.jaxpr.invars for scope in scopes)
    match = _Match(leaves, rules=False)  # as a rule may call its own function
    same = match.fits(*map(_whole, scopes, outs))
    return same and all(match.bound[v][-1].atom is w for v, w in zip(leaves, inputs, strict=True) if v in match.bound)


def recognized(jaxpr: Any, names: Sequence[str] | None = None) -> dict[core.Var, Activation]:
    """Returns the activations in a program whose value and pre-activation are both variables of it, by that of the value.

    An expression that is a part of a larger one is left out: the tanh in mish is no activation.

    Args:
        jaxpr: the program, or its scope. A call in it, such as jit, may compute an activation of the program's variables, or
            part of one; what it computes of its own is found where the jaxpr that it calls is given.
        names: which of NAMES are looked for, DEFAULT if None; the functions of this package have the same names.
    """
    scope = jaxpr if isinstance(jaxpr, Scope) else Scope(jaxpr)
    found, matches = dict[core.Var, Activation](), list[tuple[core.Var, Activation, list[Place]]]()
    for eqn in scope.jaxpr.eqns:
        if (name := marks.activation(eqn)) is not None:
            if name in NAMES and not marks.is_differentiated(eqn):
                z, *arguments = eqn.invars
                function = marks.core_of(eqn.params["jaxpr"])
                found[eqn.outvars[0]] = Activation(name, z, tuple(arguments), function, None, frozenset())
            continue
        for v in eqn.outvars:
            if not hasattr(v.aval, "dtype"):
                continue
            value, *copies = _whole(scope, v).copies()
            root = copies[-1] if copies else value
            # where it is a copy of another variable of this program, that one is the activation
            if root.eqn is None or any(place.scope is scope for place in copies):
                continue
            for formula in _formulas(v.aval.dtype).get(root.eqn.primitive, ()):
                match = _Match(formula.leaves)
                if match.fits(formula.root, value) and (activation := match.activation(formula, scope, v)):
                    matches.append((v, activation, match.passed))
    taken = set[Any]()
    for v, activation, passed in sorted(matches, key=lambda match: -len(match[2])):
        if _whole(scope, v).origin()[:2] not in taken:
            found[v] = activation
            taken.update(place[:2] for place in passed)
    asked = DEFAULT if names is None else names
    ordered = (v for eqn in scope.jaxpr.eqns for v in eqn.outvars if v in found)
    return {v: found[v] for v in ordered if found[v].name in asked}


def is_mapped(scope: Scope, eqn: core.JaxprEqn | None) -> bool:
    """Returns whether vmap stands around an equation."""
    if eqn is not None and "vmap(" in str(eqn.source_info.name_stack):
        return True
    return scope.outside is not None and is_mapped(scope.outside, scope.call)


def _behind(place: Place) -> Iterator[list[Place]]:
    """Yields all from which a place is computed along the same axes, the nearest first, each with what it is a copy of."""
    places, seen = deque([place]), set[Any]()
    while places:
        copies = list(places.popleft().copies())
        last = copies[-1]
        if isinstance(last.atom, core.Literal) or last[:2] in seen:
            continue
        seen.add(last[:2])
        yield copies
        eqn, ndim = last.eqn, len(last.atom.aval.shape)
        if eqn is None or eqn.primitive.name in PRODUCTS:
            continue
        if eqn.primitive is primitives.custom_jvp_call_p or eqn.primitive is primitives.cond_p:
            places.append(last.within())
        elif not bodies(eqn):
            places += [last._replace(atom=v) for v in eqn.invars if ndim and len(getattr(v.aval, "shape", ())) == ndim]


def layout(scope: Scope, value: Any, z: Any) -> Axes:
    """Returns which axis of z each axis of a value is that is computed from z by an elementwise function."""
    found = (p.axes for copies in _behind(_whole(scope, value)) for p in copies if p.scope is scope and p.atom is z)
    return next(found, _whole(scope, z).axes)


def unit_axis(scope: Scope, z: Any) -> int | None:
    """Returns the axis along which a layer's units lie in a pre-activation; None if its program does not show it.

    It is that of the outputs of the nearest convolution, or product with weights, found by going back through what keeps
    the axes. Where it does not show which of two arrays are the weights, that of a bias or scale on the way decides.
    """
    guess, bias = list[int](), list[int]()
    for steps, copies in enumerate(_behind(_whole(scope, z))):
        place = copies[-1]
        if place.eqn is None:
            bias += _units_of_bias(place) if steps else []  # z itself is none
        elif place.eqn.primitive.name in PRODUCTS:
            axes, certain = _outputs_of_product(place)
            units = [i for i, axis in enumerate(place.axes) if axis in axes][-1:]
            if units and certain:
                return units[0]
            guess += units
    return next(iter((*bias, *guess)), None)


def _units_of_bias(place: Place) -> list[int]:
    """Returns the axis along which an input has one number for each unit, if it is a bias or a scale, in a list."""
    shape = place.atom.aval.shape
    long = [i for i, axis in enumerate(place.axes) if axis is not None and shape[axis] != 1]
    # along the first of several axes, it would have one number for each example
    fits = len(long) == sum(n != 1 for n in shape) == 1 and (long != [0] or len(place.axes) == 1)
    return long if fits and place.is_weights() else []


def _outputs_of_product(place: Place) -> tuple[list[int], bool]:
    """Returns the axes of a product that its weights give it, and whether it is certain which those are."""
    eqn: Any = place.eqn
    if eqn.primitive is lax.conv_general_dilated_p:
        return [eqn.params["dimension_numbers"].out_spec[1]], True
    contracted, batch = eqn.params["dimension_numbers"]
    ranks = [len(v.aval.shape) for v in eqn.invars]
    free = [n - len(contracted[0]) - len(batch[0]) for n in ranks]
    operands = [_whole(place.scope, v) for v in eqn.invars]
    left, right = (operand.is_weights() for operand in operands)
    mapped = is_mapped(place.scope, eqn)
    # if both may be: x @ w; but under vmap, which makes two matrices of w @ x, what is constant, or a product over last axes
    constant = [p.atom in p.scope.jaxpr.constvars for p in (operand.origin() for operand in operands)]
    last = all(axes[-1:] == (n - 1,) for axes, n in zip(contracted, ranks, strict=True))
    first = left and (not right or (mapped and (constant[0] if constant[0] != constant[1] else last)))
    if first and not right:  # adjacency @ (x @ w), and x @ (w + p @ q): the units are those of the product inside
        behind = (copies[-1] for copies in _behind(operands[1]))
        inner = next((p for p in behind if p.eqn is not None and p.eqn.primitive.name in PRODUCTS), None)
        units = _outputs_of_product(inner)[0] if inner else []
        rest = [axis for axis in range(ranks[1]) if axis not in (*contracted[1], *batch[1])]
        if inner and (axes := [i for i, axis in enumerate(rest) if inner.axes[axis] in units]):
            return [len(batch[0]) + free[0] + i for i in axes], False
    start, size = (len(batch[0]), free[0]) if first else (len(batch[0]) + free[0], free[1])
    certain = left != right or (not mapped and free[0] > free[1] == 1)
    return list(range(start, start + size)) if left or right else [], certain
