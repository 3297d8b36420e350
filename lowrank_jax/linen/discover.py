"""A model's kernels, the layers that use them and the work that each does, found by tracing the model once."""

import dataclasses
from collections import Counter
from typing import Any

import flax.linen as nn
import jax

from lowrank_jax.kernel import MatrixView, is_low_rank
from lowrank_jax.linen import known, programs, registered
from lowrank_jax.linen.model_call import ModelCall
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.kernel_use import KernelUse

_USE = "use "


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One traced call of a layer with one of its kernels.

    Attributes:
      name: the kernel's, by the path of the module that was traced; it may be another one's that shares its program.
      use: how the layer uses it; without the work.
      below: the kernel's name below the layer.
      output_size, positions, widened, inputs: the sizes that determine the work; zeros if they do not.
    """

    name: str
    use: KernelUse
    below: str
    output_size: int = 0
    positions: int = 0
    widened: int = 0
    inputs: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done with a kernel; `known` is false where the program alone does not say how often."""

    positions: int = 0
    widened: int = 0
    inputs: int = 0
    known: bool = True

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.positions + other.positions,
            self.widened + other.widened,
            self.inputs + other.inputs,
            self.known and other.known,
        )

    def times(self, times: int | None) -> "Work":
        if times is None:
            return Work(known=False)
        return Work(times * self.positions, times * self.widened, times * self.inputs, self.known)


def trace(call: ModelCall) -> tuple[dict[str, Any], dict[str, KernelUse]]:
    """Traces a model on abstract values.

    Returns:
      The shapes of the model's variables, without boxes, and by its name the use of every kernel, in the order of use.
    """
    calls: list[LayerCall] = []

    def observe(next_fun, args, call_kwargs, context):
        layer, y = context.module, next_fun(*args, **call_kwargs)
        if context.method_name != "__call__":
            return y
        for below in known.kernels_of(layer):
            kernel = known.kernel_of(layer, below)
            if kernel is None or is_low_rank(kernel):
                continue
            marked = programs.mark(f"{_USE}{len(calls)}")
            seen = LayerCall("/".join((*layer.path, below)), _use(layer, below, args, call_kwargs), below)
            if isinstance(y, jax.Array) and known.is_measured(layer):
                x = known.first_argument(layer, args, call_kwargs)
                calls.append(dataclasses.replace(seen, **_sizes(seen.use, x, y)))
                _, y = marked(kernel, y)
            else:
                calls.append(seen)
                marked(kernel)
        return y

    variables = nn.meta.unbox(call.init())
    jaxpr = call.trace(lambda variables: variables, observe, variables).jaxpr
    leaves = named_leaves(variables, is_leaf=is_low_rank)
    # Those of a module's own low-rank layer are two variables, and are no kernels.
    labels = [name for name, leaf in leaves.items() for _ in jax.tree.leaves(leaf)]
    found = _Found(calls, Counter(programs.marks(jaxpr)))
    work, _ = found.follow(jaxpr, programs.labelled(jaxpr.invars, labels))
    prefix = "params/"
    uses = {
        name.removeprefix(prefix): dataclasses.replace(use, **_done(work.get(name)))
        for name, use in found.uses.items()
        if name.startswith(prefix) and name in leaves and not is_low_rank(leaves[name])
    }
    return variables, uses


def _use(layer: nn.Module, below: str, args: Any, kwargs: Any) -> KernelUse:
    shape = tuple(known.kernel_of(layer, below).shape)
    refusal = known.refusal(layer)
    if not refusal and not known.is_built_in(layer):
        refusal = registered.misfit(layer, below, args, kwargs)
    return KernelUse(type(layer).__name__, shape, known.rows_of(layer), refusal, known.has_own_run(layer))


def _sizes(use: KernelUse, x: jax.Array, y: jax.Array) -> dict[str, int]:
    """The sizes that determine a layer's work: none if it has no output."""
    if not y.size:
        return {}
    if use.rows is not None:
        positions, widened = y.size // MatrixView(use.shape, use.rows).m, 0
    else:
        positions = y.size // y.shape[-1]
        widened = positions // y.shape[-2] * x.shape[-2]
    return {"output_size": y.size, "positions": positions, "widened": widened, "inputs": x.size}


def _done(work: Work | None) -> dict[str, int]:
    if work is None or not work.known:
        return {}
    return {"positions": work.positions, "widened": work.widened, "inputs": work.inputs}


class _Found:
    """What the marks in a program say.

    Attributes:
      uses: by the kernel's name, in the order of use.
    """

    def __init__(self, calls: list[LayerCall], marks: Counter[str]):
        self.uses: dict[str, KernelUse] = {}
        self._calls, self._marks = calls, marks

    def follow(self, jaxpr: Any, labels: programs.Labels) -> tuple[dict[str, Work], list[str | None]]:
        """The work of every kernel in a program, and for each output which variable of the model it is, if any."""
        total: dict[str, Work] = {}
        for eqn in jaxpr.eqns:
            operands = programs.labels_of(eqn.invars, labels)
            mark = programs.mark_of(eqn)
            if mark is not None:
                _add(total, self._of_mark(mark, operands, eqn))
                outputs = operands
            elif programs.is_copy(eqn):
                outputs = operands
            else:
                work, outputs = self._inside(eqn, operands)
                _add(total, work)
            labels |= programs.labelled(eqn.outvars, outputs)
        return total, programs.labels_of(jaxpr.outvars, labels)

    def _of_mark(self, mark: str, operands: list[str | None], eqn: Any) -> dict[str, Work]:
        if not mark.startswith(_USE) or not operands:
            return {}
        call = self._calls[int(mark.removeprefix(_USE))]
        name = operands[0] or f"params/{call.name}"
        if name not in self.uses or "/" in call.below:  # of a module inside, which the outer one uses
            self.uses[name] = call.use
        if not call.output_size:
            return {}
        # Whose program is shared and whose kernel comes from elsewhere, nobody knows.
        if operands[0] is None and self._marks[mark] > 1:
            return {name: Work(known=False)}
        # Under vmap there is a mapped axis, which the module itself does not see.
        size = eqn.outvars[-1].aval.size
        return {name: Work(*(size * part // call.output_size for part in (call.positions, call.widened, call.inputs)))}

    def _inside(self, eqn: Any, operands: list[str | None]) -> tuple[dict[str, Work], list[str | None]]:
        given = programs.bodies(eqn, operands)
        followed = [self.follow(body, programs.labelled(body.invars, labels)) for body, labels in given]
        if not given:
            followed = [self.follow(body, {}) for body in programs.inner(eqn)]
        works = [work for work, _ in followed]
        kind = eqn.primitive.name
        if kind == "cond":
            names = dict.fromkeys(name for work in works for name in work)
            return {name: _most([work[name] for work in works if name in work]) for name in names}, []
        times = {"scan": eqn.params.get("length"), "while": None}.get(kind, 1)
        total: dict[str, Work] = {}
        for work in works:
            _add(total, {name: part.times(times) for name, part in work.items()})
        passes = len(given) == 1 and kind != "scan"
        return total, followed[0][1] if passes else []


def _most(works: list[Work]) -> Work:
    """Of the branches of which one runs."""
    return max(works, key=lambda work: (not work.known, work.positions))


def _add(total: dict[str, Work], more: dict[str, Work]) -> None:
    for name, work in more.items():
        total[name] = total.get(name, Work()) + work
