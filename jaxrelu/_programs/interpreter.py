"""An interpreter of jaxprs, the programs that JAX traces, driven by a visitor.

It runs a program equation by equation, enters what an equation calls (jit, scan, remat, cond, shard_map; one `_enter_...`
function for each), and brings out what a visitor finds there. What is known of the primitives that call programs is here.
"""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import PartitionSpec, Sharding

__all__ = [
    "Found",
    "Scope",
    "Step",
    "Visitor",
    "bind",
    "bodies",
    "called",
    "context",
    "entered",
    "interpreted",
    "live",
    "named_scopes",
    "names_in",
    "opened",
    "origin",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """What a visitor found in one equation, and a name: the named scopes around it and the visitor's own, "hidden1/relu"."""

    value: Any  # a pytree of arrays; each scan around the equation adds to each array a leading axis, that of its steps
    name: str = dataclasses.field(metadata={"static": True})


# an equation as a function: it takes the equation's inputs, and returns its outputs and what was found in it
Step = Callable[..., tuple[Sequence[Any], list[Found]]]


class Scope:
    """A program with what stands around it: the equation that calls it, and the scope of that equation."""

    def __init__(self, program: Any, call: core.JaxprEqn | None = None, outside: "Scope | None" = None) -> None:
        self.program, self.jaxpr, self.call, self.outside = program, opened(program), call, outside
        self.made_by = {v: eqn for eqn in self.jaxpr.eqns for v in eqn.outvars}
        # of each input that is a variable or literal of the scope outside, that; and the inputs that a loop replaces
        self.given: dict[core.Var, tuple[Scope, Any]] = {}
        self.carried: Sequence[core.Var] = ()
        if call is not None and outside is not None and call.primitive.name in (*_ENTER, "custom_jvp_call"):
            inputs = self.jaxpr.invars
            args = call.invars[len(call.invars) - len(inputs) :]  # the first of cond is the index of a branch
            if call.primitive.name == "scan":
                carries, unscanned = _carries(call, self.jaxpr)
                self.carried = inputs[unscanned - carries : unscanned]
                inputs, args = inputs[: unscanned - carries], args[: unscanned - carries]
            self.given = {v: (outside, w) for v, w in zip(inputs, args, strict=True)}
        self._inside: dict[Any, Any] = {}

    def inside(self, eqn: core.JaxprEqn) -> "list[Scope]":
        """Returns the programs that an equation calls."""
        if eqn not in self._inside:
            self._inside[eqn] = [Scope(body, eqn, self) for body in bodies(eqn)]
        return self._inside[eqn]

    def derivative(self, eqn: Any) -> "Scope":
        """Returns the forward derivative of an equation: a program of its inputs and their tangents."""
        if ("derivative", eqn) not in self._inside:
            inputs = [v.aval for v in eqn.invars]

            def tangent(*args: Any) -> Any:
                return jax.jvp(functools.partial(bind, eqn), args[: len(inputs)], args[len(inputs) :])[1]

            def trace() -> tuple[()]:
                with eqn.ctx.manager:
                    self._inside["derivative", eqn] = Scope(jax.make_jaxpr(tangent)(*inputs, *inputs))
                return ()

            varying = set().union(*(aval.manual_axis_type.varying for aval in inputs))
            if varying <= set(jax.sharding.get_abstract_mesh().manual_axes):
                trace()
            else:  # what varies along the axes of a mesh can be traced in a shard_map only
                mesh = inputs[0].sharding.mesh
                mesh = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names)
                jax.eval_shape(jax.shard_map(trace, mesh=mesh, in_specs=(), out_specs=()))
        return self._inside["derivative", eqn]


class Visitor(Protocol):
    """Says which equations are looked for in a program, and what is done there."""

    def names(self, eqn: core.JaxprEqn, scope: Scope) -> list[str] | None:
        """Returns names of what is looked for in an equation, [] to ignore it and all that it calls, None to look inside."""

    def visit(self, eqn: core.JaxprEqn, scope: Scope) -> Step:
        """Returns how to run an equation that is looked for; the step takes its inputs, then what `reads` returns."""
        return lambda *args: (bind(eqn, *args), [])

    def reads(self, eqn: core.JaxprEqn, scope: Scope) -> Sequence[Any]:
        """Returns variables and literals of an equation's program that are to be read where it is run; [] if not visited."""
        return []

    def program(self, scope: Scope) -> Step:
        """Returns a program that an equation calls as a function that returns its outputs and what was found in it."""
        return interpreted(scope, self)

    def branch_not_taken(self, value: Any) -> Any:
        """Returns what a branch of cond has found that is not taken, given what it would find if it were taken."""

    def across_devices(self, value: Any, axes: tuple[str, ...], check_vma: bool) -> Any:
        """Returns, the same on all devices, what the devices along these mesh axes of a shard_map have found together."""

    def cannot_enter(self, eqn: core.JaxprEqn, names: Sequence[str]) -> None:
        """Is called, each time the equation runs, if it cannot be entered and has equations that are looked for inside."""


# what runs a program that is no jaxpr
_OPAQUE = ("call_exported", "io_callback", "pure_callback", "call_hi_primitive")


def bodies(eqn: core.JaxprEqn) -> list[Any]:
    """Returns the jaxprs that an equation calls, with their constants."""
    params = [*eqn.params.values()]
    if (hidden := eqn.params.get("_prim")) is not None:  # JAX 0.12 has those of lax.custom_root, for one, in this object
        params += hidden.params.values()
    values = itertools.chain(*(value if isinstance(value, (tuple, list)) else [value] for value in params))
    return [value for value in values if isinstance(value, (core.Jaxpr, core.ClosedJaxpr))]


def called(eqn: core.JaxprEqn) -> str:
    """Returns what an equation calls, by name."""
    hidden = eqn.params.get("_prim")
    return eqn.primitive.name if hidden is None else type(hidden).__name__


def opened(jaxpr: Any) -> Any:
    """Returns a jaxpr without its constants; JAX 0.12 has one class for both kinds."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def names_in(eqn: core.JaxprEqn, scope: Scope, visitor: Visitor) -> list[str]:
    """Returns the sorted names of the equations that are looked for: this one, and in all that it calls, each once.

    Where an equation calls what is no jaxpr, as a callback does, they are "any activation".
    """
    if eqn.params.get("differentiated"):  # of a remat: a backward pass computes again what was seen before
        return []
    if (names := visitor.names(eqn, scope)) is not None:
        return sorted(set(names))
    if not (inside := scope.inside(eqn)) and eqn.primitive.name in _OPAQUE:
        return ["any activation"]
    return sorted({name for body in inside for inner in body.jaxpr.eqns for name in names_in(inner, body, visitor)})


def bind(eqn: core.JaxprEqn, *args: Any) -> Sequence[Any]:
    """Runs an equation unchanged and returns its outputs."""
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]


def _inputs(eqn: core.JaxprEqn) -> Sequence[Any]:
    return eqn.invars


def live(jaxpr: Any, reads: Callable[[core.JaxprEqn], Sequence[Any]] = _inputs) -> list[tuple[core.JaxprEqn, set[core.Var]]]:
    """Returns the equations whose results are read, or that have effects, each with the variables that none reads later.

    Some transformations of Flax leave others.

    Args:
        jaxpr: the program.
        reads: returns all that an equation reads.
    """
    jaxpr = opened(jaxpr)
    read, found = {v for v in jaxpr.outvars if isinstance(v, core.Var)}, list[tuple[core.JaxprEqn, set[core.Var]]]()
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not read.isdisjoint(eqn.outvars):
            variables = {v for v in reads(eqn) if isinstance(v, core.Var)}
            found.insert(0, (eqn, variables.union(eqn.outvars) - read))
            read |= variables
    return found


def interpreted(scope: Scope, visitor: Visitor) -> Step:
    """Returns a program as a function that returns its outputs and what was found, in order of execution.

    Call the same function again, not interpreted() again: it jits what it enters, and that is compiled once.
    """
    constants, jaxpr = getattr(scope.program, "consts", ()), scope.jaxpr

    def reads(eqn: core.JaxprEqn) -> Sequence[Any]:
        return [*eqn.invars, *visitor.reads(eqn, scope)]

    steps = [(eqn, named_scopes(eqn), _step(eqn, scope, visitor), reads(eqn), unread) for eqn, unread in live(jaxpr, reads)]

    def run(*args: Any) -> tuple[list[Any], list[Found]]:
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *args), strict=True))
        everything: list[Found] = []

        def read(v: Any) -> Any:
            return v.val if isinstance(v, core.Literal) else env[v]

        for eqn, around, step, inputs, unread in steps:
            with context(eqn, around):
                outs, found = step(*map(read, inputs))
            env.update(zip(eqn.outvars, outs, strict=True))
            for v in unread:
                del env[v]
            everything += [dataclasses.replace(f, name=f"{around}/{f.name}" if around else f.name) for f in found]
        return [read(v) for v in jaxpr.outvars], everything

    return run


@contextlib.contextmanager
def context(eqn: core.JaxprEqn, around: str) -> Generator[None]:
    """Returns a context like that in which an equation was traced, with these named scopes."""
    with jax.named_scope(around) if around else contextlib.nullcontext(), eqn.ctx.manager:
        yield


def named_scopes(eqn: core.JaxprEqn) -> str:
    """Returns the named scopes around an equation without JAX's transformations: mlp/hidden1 for "vmap(mlp)/hidden1"."""
    return re.sub(r"\w+\(|\)", "", str(eqn.source_info.name_stack)).strip("/").replace("//", "/")


def _step(eqn: core.JaxprEqn, scope: Scope, visitor: Visitor) -> Step:
    if visitor.names(eqn, scope):
        return visitor.visit(eqn, scope)
    names = names_in(eqn, scope, visitor)
    if names and eqn.primitive.name in _ENTER:
        # jitted, so that it is compiled as one program, as the primitive alone is; a literal may be a Python number
        entered = jax.jit(_ENTER[eqn.primitive.name](eqn, scope, visitor))

        def enter(*args: Any) -> tuple[Sequence[Any], list[Found]]:
            return entered(*map(jnp.asarray, args))

        return enter

    def as_it_stands(*args: Any) -> tuple[Sequence[Any], list[Found]]:
        if names:
            visitor.cannot_enter(eqn, names)
        return bind(eqn, *args), []

    return as_it_stands


def origin(jaxpr: Any, v: Any) -> Any:
    """Returns the variable that v is a copy of if jit or remat passed it through unchanged, as in Flax nnx; else v."""
    for eqn in reversed(opened(jaxpr).eqns):
        if eqn.primitive.name in ("jit", "remat2") and v in eqn.outvars:
            body = opened(eqn.params["jaxpr"])
            inside = origin(body, body.outvars[eqn.outvars.index(v)])
            if inside in body.invars:
                v = eqn.invars[body.invars.index(inside)]
    return v


# Each function below applies the transformation that the equation stands for, such as scan, to the interpreted body.


def _enter_jit(eqn: core.JaxprEqn, scope: Scope, visitor: Visitor) -> Step:
    run = visitor.program(scope.inside(eqn)[0])

    def constrain(xs: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        pairs = zip(xs, shardings, strict=True)
        return [lax.with_sharding_constraint(x, s) if isinstance(s, Sharding) else x for x, s in pairs]

    def call(*args: Any) -> tuple[Sequence[Any], list[Found]]:
        outs, found = run(*constrain(args, eqn.params["in_shardings"]))
        return constrain(outs, eqn.params["out_shardings"]), found

    return call


def _enter_scan(eqn: core.JaxprEqn, scope: Scope, visitor: Visitor) -> Step:
    run = visitor.program(scope.inside(eqn)[0])
    carries, unscanned = _carries(eqn, scope.inside(eqn)[0].jaxpr)
    loop = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}

    def call(*args: Any) -> tuple[Sequence[Any], list[Found]]:
        constants, carry, xs = args[: unscanned - carries], args[unscanned - carries : unscanned], args[unscanned:]

        def step(carry: Any, xs: Any) -> Any:
            outs, found = run(*constants, *carry, *xs)
            return tuple(outs[:carries]), (outs[carries:], found)

        carry, (ys, found) = lax.scan(step, carry, xs, **loop)
        return [*carry, *ys], found

    return call


def _carries(eqn: Any, body: Any) -> tuple[int, int]:
    """Returns how many inputs of a scan are carried, which are its first outputs, and how many are not scanned.

    Counted by rank, as a scanned array has an axis that the body does not see; the parameters for it differ by JAX version.
    """
    pairs = (eqn.outvars, body.outvars), (eqn.invars, body.invars)
    carries, unscanned = (sum(v.aval.ndim == w.aval.ndim for v, w in zip(*pair, strict=True)) for pair in pairs)
    return carries, unscanned


def _enter_remat(eqn: core.JaxprEqn, scope: Scope, visitor: Visitor) -> Step:
    run = visitor.program(scope.inside(eqn)[0])
    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


def _enter_cond(eqn: core.JaxprEqn, scope: Scope, visitor: Visitor) -> Step:
    branches = [visitor.program(branch) for branch in scope.inside(eqn)]

    def call(index: Any, *args: Any) -> tuple[Sequence[Any], list[Found]]:
        shapes = [jax.eval_shape(run, *args)[1] for run in branches]

        def branch(taken: int) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                outs, found = branches[taken](*args)
                lists = [
                    found if i == taken else [dataclasses.replace(f, value=visitor.branch_not_taken(f.value)) for f in shape]
                    for i, shape in enumerate(shapes)
                ]
                return outs, list(itertools.chain(*lists))

            return run

        return lax.switch(index, [branch(i) for i in range(len(branches))], *args)

    return call


def _enter_shard_map(eqn: core.JaxprEqn, scope: Scope, visitor: Visitor) -> Step:
    run, params = visitor.program(scope.inside(eqn)[0]), eqn.params
    axes = tuple(sorted(params["newly_manual_axes"]))

    def body(*args: Any) -> tuple[Sequence[Any], list[Found]]:
        outs, found = run(*args)
        values = [visitor.across_devices(f.value, axes, params["check_vma"]) for f in found]
        return outs, [dataclasses.replace(f, value=value) for f, value in zip(found, values, strict=True)]

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=(list(params["out_specs"]), PartitionSpec()),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )


def entered(eqn: core.JaxprEqn, scope: Scope, visitor: Visitor) -> Step:
    """Returns an equation that calls programs, one of _ENTER, as a function that runs these as the visitor says."""
    return _ENTER[eqn.primitive.name](eqn, scope, visitor)


_ENTER: dict[str, Callable[[core.JaxprEqn, Scope, Visitor], Step]] = {
    "jit": _enter_jit,
    "scan": _enter_scan,
    "remat2": _enter_remat,
    "cond": _enter_cond,
    "shard_map": _enter_shard_map,
}
