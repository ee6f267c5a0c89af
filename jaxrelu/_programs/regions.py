"""How a program runs so that its gradient keeps little: in regions, each of which keeps what a minimum cut says.

Between two products a network has equations that are cheap to compute again: biases, norms, activations. JAX keeps an array
for most of them until the backward pass. A plan keeps the fewest bytes from which all that derivatives read can be computed
again, but never computes a product, a reduction, a collective or a random number twice:

1. Each equation gets a level: the largest number of products that stand between it and the arguments.
2. A minimum cut between what cannot be computed again and what derivatives read gives the arrays to keep. An array that is
   read at a later level is among them or not needed, so that nothing is computed again over many layers.
3. The equations of one level that are connected are a region. It ends with the products that read its results.
4. Each region runs under `jax.checkpoint`, whose policy saves what the cut keeps. XLA holds back what it computes again
   until the gradient of the region's results has come, so that this is there for one region at a time.
"""

import graphlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from jaxrelu import functions
from jaxrelu._programs.formulas import Activation, recognized
from jaxrelu._programs.interpreter import (
    Found,
    Scope,
    Step,
    Visitor,
    bind,
    bodies,
    context,
    entered,
    interpreted,
    named_scopes,
    names_in,
)
from jaxrelu._programs.primitives import (
    LAYOUT,
    LEFT_ALONE,
    PRODUCTS,
    READ_THEIR_RESULT,
    is_cheap,
    is_complex,
    is_float,
    read_by_derivative,
    size_of,
)

__all__ = ["exchanged", "planned"]


_KEPT = "jaxrelu.kept"  # the name of an array that a region keeps
_MEMBERS = ("product", "costly", "cheap")  # the kinds of equations that run in regions
_ENTERED = ("cond", "scan", "shard_map")  # what these call is planned too


class _Inliner(Visitor):
    """Makes what jit calls a part of the program that calls it."""

    def names(self, eqn: core.JaxprEqn, scope: Scope) -> list[str] | None:
        return ["jit"] if eqn.primitive.name == "jit" else []

    def visit(self, eqn: core.JaxprEqn, scope: Scope) -> Step:
        return entered(eqn, scope, self)


class _Planner(Visitor):
    """Plans the programs that an equation calls, such as the body of a scan."""

    def names(self, eqn: core.JaxprEqn, scope: Scope) -> list[str] | None:
        return ["product"] if eqn.primitive.name in PRODUCTS else None

    def program(self, scope: Scope) -> Step:
        def run(*args: Any) -> tuple[Sequence[Any], list[Found]]:
            return planned(scope, args), []

        return run


def _flat(scope: Scope, args: Sequence[Any]) -> Any:
    """Returns a program without calls by jit."""
    run = interpreted(scope, _Inliner())

    def outputs(*args: Any) -> Sequence[Any]:
        return run(*args)[0]

    return jax.make_jaxpr(outputs)(*args)


class _Exchanger(Visitor):
    """Runs relu and relu6 by the functions of this package."""

    def __init__(self) -> None:
        self._known: dict[Scope, dict[Any, tuple[Any, Callable[[Array], Array]]]] = {}

    def _found(self, scope: Scope) -> dict[Any, tuple[Any, Callable[[Array], Array]]]:
        """Returns pre-activation and function by result."""
        if scope not in self._known:
            self._known[scope] = {
                v: (activation.z, functions.relu if activation.name == "relu" else functions.relu6)
                for v, activation in _alike(scope, "relu", "relu6")
                if v.aval.dtype.itemsize >= 4  # in 16 bits those of jax.nn take no more
            }
        return self._known[scope]

    def names(self, eqn: core.JaxprEqn, scope: Scope) -> list[str] | None:
        return None if self._found(scope).keys().isdisjoint(eqn.outvars) else ["rectifier"]

    def reads(self, eqn: core.JaxprEqn, scope: Scope) -> Sequence[Any]:
        return [self._found(scope)[v][0] for v in eqn.outvars if v in self._found(scope)]

    def visit(self, eqn: core.JaxprEqn, scope: Scope) -> Step:
        function = self._found(scope)[eqn.outvars[0]][1]
        return lambda *args: ([function(args[-1])], [])


def exchanged(scope: Scope, args: Sequence[Any]) -> Sequence[Any]:
    """Runs a program with relu and relu6 of this package, which take less memory by themselves than those of jax.nn."""
    return interpreted(scope, _Exchanger())(*args)[0]


def planned(scope: Scope, args: Sequence[Any]) -> Sequence[Any]:
    """Runs a program so that its gradient keeps little."""
    flat = _flat(scope, args)
    loop = scope.call is not None and scope.call.primitive.name == "scan"
    carried = {w for v, w in zip(scope.jaxpr.invars, flat.jaxpr.invars, strict=True) if v in scope.carried}
    return _Plan(Scope(flat), loop, carried).run((*flat.consts, *args))


def _keep(x: Array) -> Array:
    """Returns x, as an array that its region keeps.

    XLA computes a cheap array again in each kernel that reads it, even if it is in memory: in a residual mlp of 8 layers in
    float32 on the CPU all products were kept for that: 120 MiB without the barrier, 72 with it (jax 0.12; test_memory.py).
    """
    return _barrier(checkpoint_name(x, _KEPT))


@jax.custom_jvp  # JAX's own rule has a barrier for the gradient too
def _barrier(x: Array) -> Array:
    return lax.optimization_barrier(x)


@_barrier.defjvp
def _barrier_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _barrier(*primals), tangents[0]


def _alike(scope: Scope, *names: str) -> Iterator[tuple[Any, Activation]]:
    """Yields the activations whose results have the layout of their pre-activations, and are in their dtype throughout."""
    results: Any = recognized(scope, names)
    for v, activation in results.items():
        axes = tuple(range(v.aval.ndim))
        dtypes = {w.aval.dtype for w in (v, activation.z, *activation.parts) if is_float(w)}
        if len(dtypes) == 1 and (activation.axes or [axes])[0] == axes:
            yield v, activation


def _rectifiers(scope: Scope) -> dict[core.Var, tuple[Activation, Callable[[Array], Array]]]:
    """Returns by their results the activations whose derivative is a function of the result, and how to run them."""
    found = dict[core.Var, tuple[Activation, Callable[[Array], Array]]]()
    for v, activation in _alike(scope, "relu", "relu6", "leaky_relu", "elu_output"):
        numbers = [float(a.val) for a in activation.arguments if isinstance(a, core.Literal)]
        # result and pre-activation have the same sign, but for a small result of leaky_relu that 16 bits round to 0
        exact = activation.name != "leaky_relu" or v.aval.dtype.itemsize >= 4
        if exact and len(numbers) == len(activation.arguments) and all(number > 0 for number in numbers):
            found[v] = activation, _from_result(activation.function, numbers, activation.name == "elu_output")
    return found


def _from_result(function: Callable[..., Array], numbers: Sequence[float], is_elu: bool) -> Callable[[Array], Array]:
    """Returns an activation whose result is kept, and is all that its derivative reads."""

    def value(z: Array) -> Array:
        return function(z, *numbers)

    rectifier = jax.custom_jvp(value)

    @rectifier.defjvp
    def rule(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        y, (g,) = _keep(rectifier(*primals)), tangents
        if is_elu:  # of this package, with save="output" and alpha 1
            return y, jnp.where(y > 0, jnp.ones_like(y), y + 1) * g
        # relu, relu6 and leaky_relu have the same derivative at y as at z
        return y, jax.jvp(value, (y,), (g,))[1]

    return rectifier


class _Plan:
    """How a program without calls by jit runs: its equations in groups, and which variables are kept.

    An equation is of one of these kinds. Each region may compute what is "early" anew: it is computed from arguments, and
    has no gradient or changes the layout only. "once" is what would be early if it were cheap, such as random bits.
    "product", "costly" and "cheap" run in regions; the results of the first two are not computed again. What is "alone" runs
    outside regions as it stands.
    """

    def __init__(self, scope: Scope, loop: bool, carried: set[core.Var]) -> None:
        """Plans a program; if it is the body of a loop, carried are the inputs that the loop replaces."""
        self._scope, self._loop, self._carried = scope, loop, carried
        self._eqns = scope.jaxpr.eqns
        self._inputs = [[v for v in eqn.invars if isinstance(v, core.Var)] for eqn in self._eqns]
        self._maker = {v: i for i, eqn in enumerate(self._eqns) for v in eqn.outvars}
        self._outputs = {v for v in scope.jaxpr.outvars if isinstance(v, core.Var)}
        self._rectifiers = _rectifiers(scope)
        self._active = {v for v in (*scope.jaxpr.constvars, *scope.jaxpr.invars) if is_float(v)}  # has a derivative
        self._kinds, self._at = list[str](), list[int]()  # kind and level of each equation
        self._level = dict[core.Var, int]()  # of variables that are neither arguments nor early
        self._classify()
        self._needed = self._read_by_derivatives()
        self._kept = self._cut()
        # what is computed again, and the rectifiers whose result is kept, need a region
        self._reasons = {v for v, _ in self._needed} - self._kept | self._kept & self._rectifiers.keys()

    def _classify(self) -> None:
        uses = Counter(v for inputs in (*self._inputs, self._outputs) for v in inputs)
        for eqn, inputs in zip(self._eqns, self._inputs, strict=True):
            name, cheap = eqn.primitive.name, is_cheap(eqn)
            if name != "stop_gradient" and not self._active.isdisjoint(inputs):
                self._active.update(filter(is_float, eqn.outvars))
            level = max((self._level[v] for v in inputs if v in self._level), default=-1)
            source = self._maker.get(inputs[0]) if inputs else None
            if level < 0 and not eqn.effects and (self._active.isdisjoint(eqn.outvars) or name in LAYOUT):
                self._kinds.append("early" if cheap else "once")
                self._at.append(-1)
                continue
            if source is not None and self._kinds[source] == "product" and uses[inputs[0]] == 1 and _completes(eqn):
                kind, level = "product", self._at[source]
            elif name in PRODUCTS and not is_complex(eqn.outvars[0]):
                kind, level = "product", max(level, 0)
            else:
                left = eqn.effects or bodies(eqn) or name in LEFT_ALONE or any(map(is_complex, (*inputs, *eqn.outvars)))
                costly = "alone" if left else "costly"
                kind, level = "cheap" if cheap else costly, max(level, 0)
            self._kinds.append(kind)
            self._at.append(level)
            self._level.update(dict.fromkeys(eqn.outvars, level + (kind in ("product", "alone"))))

    def _read_by_derivatives(self) -> set[tuple[core.Var, int]]:
        """Returns the variables that derivatives read, and at which level."""
        parts = {v for activation, _ in self._rectifiers.values() for v in activation.parts}
        needed = set[tuple[core.Var, int]]()
        for eqn, at in zip(self._eqns, self._at, strict=True):
            if not self._active.isdisjoint(eqn.outvars) and not parts.issuperset(eqn.outvars):
                needed.update((v, at) for v in self._reads(eqn))
        return needed

    def _reads(self, eqn: core.JaxprEqn) -> Sequence[core.Var]:
        if eqn.outvars[0] not in self._rectifiers:
            return read_by_derivative(eqn, self._active)
        # in a loop JAX keeps a mask, of one byte a number, of one whose result is not kept anyway
        return [] if self._loop else eqn.outvars[:1]

    def _cut(self) -> set[core.Var]:
        """Returns the fewest bytes of variables from which the others that derivatives read can be computed."""
        variables = [*self._carried, *self._maker]
        places = {v: 3 * i for i, v in enumerate(variables)}
        sizes = np.array([size_of(v) for v in variables], float)
        costs = np.maximum(1, sizes / max(1.0, sizes.sum() / 2**28)).astype(int)  # SciPy takes 32 bits
        source, sink, edges = 3 * len(variables), 3 * len(variables) + 1, list[tuple[int, int, int]]()

        def read(v: core.Var, at: int) -> int:
            # at a later level a variable is there only if it is kept, at its own also if it is computed again
            return places[v] + (2 if self._again(v) and self._level.get(v, at) < at else 1)

        # three nodes for each variable; of the edges only those can be cut that stand for keeping it
        for v, cost in zip(variables, costs.tolist(), strict=True):
            edges += [(places[v], places[v] + 1, cost), (source, places[v] + 2, cost)]
            if self._again(v):
                number = self._maker[v]
                edges += [(read(w, self._at[number]), places[v], 2**30) for w in set(self._inputs[number]) if w in places]
            else:
                edges.append((source, places[v], 2**30))
        edges += [(read(v, at), sink, 2**30) for v, at in self._needed if v in places]
        reach = _reaches_sink(edges, source, sink)
        return {v for v, i in places.items() if (reach[i + 1] and not reach[i]) or reach[i + 2]}

    def _again(self, v: core.Var) -> bool:
        """Returns whether a variable may be computed again."""
        return v in self._maker and self._kinds[self._maker[v]] in ("cheap", "early")

    def _groups(self) -> list[list[int]]:
        """Returns the equations in groups, in an order in which they can run."""
        edges, first = list[tuple[int, int]](), dict[core.Var, int]()
        for i, (kind, at) in enumerate(zip(self._kinds, self._at, strict=True)):
            for v in self._inputs[i] if kind in _MEMBERS else ():
                maker = self._maker.get(v, i)
                if self._kinds[maker] in _MEMBERS and self._at[maker] == at:
                    edges.append((maker, i))
                elif self._level.get(v) == at:
                    edges.append((first.setdefault(v, i), i))
        group = _connected(edges, len(self._eqns))
        order = graphlib.TopologicalSorter[int]()
        last = set[int]()
        for i, inputs in enumerate(self._inputs):
            makers = {group[self._maker[v]] for v in inputs if v in self._maker}
            if self._eqns[i].effects:  # these stay in order
                makers |= last
                last = {group[i]}
            order.add(group[i], *(makers - {group[i]}))
        members: dict[int, list[int]] = {}
        for i, name in enumerate(group):
            members.setdefault(name, []).append(i)
        return [members[name] for name in order.static_order()]

    def run(self, args: Sequence[Any]) -> list[Any]:
        """Runs the program on its constants and arguments."""
        jaxpr, groups = self._scope.jaxpr, self._groups()
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))
        inside = {v: number for number, group in enumerate(groups) for i in group for v in self._eqns[i].outvars}
        read_elsewhere = set(self._outputs)
        for number, group in enumerate(groups):
            read_elsewhere |= {v for i in group for v in self._inputs[i] if inside.get(v) != number}
        for group in groups:
            if self._is_region(group):
                self._run_region(group, env, read_elsewhere)
            else:
                self._run_equations(group, env, region=False)
        return [v.val if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars]

    def _is_region(self, group: Sequence[int]) -> bool:
        """Returns whether a group ends with a product, computes something again or keeps the result of a rectifier."""
        made = {v for i in group if self._kinds[i] in _MEMBERS for v in self._eqns[i].outvars}
        return any(self._kinds[i] == "product" for i in group) or not made.isdisjoint(self._reasons)

    def _run_region(self, group: Sequence[int], env: dict[Any, Any], read_elsewhere: set[core.Var]) -> None:
        equations, more = set(group), list(group)
        while more:  # what is computed from arguments is computed again in each region, unless it is kept
            makers = {self._maker[v] for v in self._inputs[more.pop()] if v in self._maker and v not in self._kept}
            new = {i for i in makers - equations if self._kinds[i] == "early"}
            equations |= new
            more += new
        made = {v for i in equations for v in self._eqns[i].outvars}
        inputs = list(dict.fromkeys(v for i in sorted(equations) for v in self._inputs[i] if v not in made))
        outputs = [v for i in group for v in self._eqns[i].outvars if v in read_elsewhere]
        saved = {self._eqns[i].primitive.name for i in group if self._kinds[i] in ("costly", "product")}
        saved |= READ_THEIR_RESULT & {self._eqns[self._maker[v]].primitive.name for v in made & self._kept}

        def region(*args: Any) -> list[Any]:
            inner = dict(zip(inputs, args, strict=True))
            self._run_equations(sorted(equations), inner, region=True)
            return [inner[v] for v in outputs]

        def policy(primitive: Any, *_: Any, **params: Any) -> bool:
            return primitive.name in saved or (primitive.name == "name" and params["name"] == _KEPT)

        results = jax.checkpoint(region, policy=policy)(*(env[v] for v in inputs))
        env.update(zip(outputs, results, strict=True))

    def _run_equations(self, equations: Sequence[int], env: dict[Any, Any], *, region: bool) -> None:
        for i in equations:
            eqn = self._eqns[i]
            args = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
            kept = self._kept.intersection(eqn.outvars) if region and self._kinds[i] == "cheap" else set[core.Var]()
            with context(eqn, named_scopes(eqn)):
                if rectifiers := kept & self._rectifiers.keys():
                    v = rectifiers.pop()
                    activation, run = self._rectifiers[v]
                    env[v] = run(env[activation.z])
                    continue
                if eqn.primitive.name in _ENTERED and names_in(eqn, self._scope, _Planner()):
                    outs, _ = entered(eqn, self._scope, _Planner())(*args)
                else:
                    outs = bind(eqn, *args)
                    if kept and eqn.primitive.name not in READ_THEIR_RESULT:
                        outs = [_keep(out) if v in kept else out for v, out in zip(eqn.outvars, outs, strict=True)]
            env.update(zip(eqn.outvars, outs, strict=True))


def _completes(eqn: core.JaxprEqn) -> bool:
    """Returns whether an equation is a part of the product before it: the gradient comes in this layout or dtype."""
    narrows = eqn.primitive.name == "convert_element_type" and size_of(eqn.outvars[0]) < size_of(eqn.invars[0])
    return narrows or eqn.primitive.name == "transpose"


def _connected(edges: Sequence[tuple[int, int]], number: int) -> list[int]:
    """Returns for each of this number of nodes the name of the component that it is in."""
    from scipy.sparse import coo_array, csgraph

    ends = np.array(edges, int).reshape(-1, 2).T
    return csgraph.connected_components(coo_array((np.ones(len(edges)), ends), (number, number)), directed=False)[1].tolist()


def _reaches_sink(edges: Sequence[tuple[int, int, int]], source: int, sink: int) -> np.ndarray:
    """Returns for each node whether there is a way to the sink that a maximum flow from the source leaves open.

    The edges from a node where it is not to one where it is are the minimum cut that is nearest to the sink.
    """
    from scipy.sparse import coo_array, csgraph

    # each once, as SciPy adds up what stands twice
    start, end, capacity = np.array(sorted(set(edges)), np.int32).reshape(-1, 3).T
    graph = coo_array((capacity, (start, end)), (sink + 1, sink + 1)).tocsr()
    left = (graph - csgraph.maximum_flow(graph, source, sink).flow).tocoo()
    open_ways = left.data > 0
    back = coo_array((np.ones(open_ways.sum()), (left.col[open_ways], left.row[open_ways])), graph.shape)
    reach = np.zeros(sink + 1, bool)
    reach[csgraph.breadth_first_order(back.tocsr(), sink, return_predecessors=False)] = True
    return reach
