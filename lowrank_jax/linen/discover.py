"""A model's kernels, the layers that use them and the work that each does, found by tracing the model once."""

import dataclasses
import functools
from collections import Counter
from typing import Any

import flax.linen as nn
import jax

from lowrank_jax.kernel import MatrixView, is_low_rank
from lowrank_jax.linen import known, normalized, programs, registered
from lowrank_jax.linen.model_call import ModelCall
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.kernel_use import KernelUse

_KERNEL, _OUTPUT = "kernel ", "output "


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One traced call of a layer with one of its kernels.

    Attributes:
      name: the kernel's, by the path of the module that was traced; it may be another one's that shares its program.
      use: how the layer uses it; without the work.
      below: the kernel's name below the layer.
      output_size, positions, widened, inputs: the sizes that determine the work; zeros if they do not.
      features: the sizes of the output's last axes, those of its features.
    """

    name: str
    use: KernelUse
    below: str
    output_size: int = 0
    positions: int = 0
    widened: int = 0
    inputs: int = 0
    features: tuple[int, ...] = ()


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


def trace(call: ModelCall, variables: Any) -> dict[str, KernelUse]:
    """Traces a call of a model on abstract values.

    Args:
      call: the model and its arguments.
      variables: the shapes of its variables, without boxes.

    Returns:
      By its name the use of every kernel, in the order of use.
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
            programs.mark(kernel, f"{_KERNEL}{len(calls)}")
            seen = LayerCall("/".join((*layer.path, below)), _use(layer, below, args, call_kwargs), below)
            if isinstance(y, jax.Array) and known.is_measured(layer):
                x = known.first_argument(layer, args, call_kwargs)
                y = programs.mark(y, f"{_OUTPUT}{len(calls)}")
                seen = dataclasses.replace(seen, **_sizes(seen.use, x, y))
            calls.append(seen)
        return y

    jaxpr = call.trace(lambda variables: variables, observe, variables).jaxpr
    leaves = named_leaves(variables, is_leaf=is_low_rank)
    # Those of a module's own low-rank layer are two variables, and are no kernels.
    labels = [name for name, leaf in leaves.items() for _ in jax.tree.leaves(leaf)]
    found = _Found(calls, Counter(programs.marks(jaxpr)))
    work, _ = found.follow(jaxpr, programs.labelled(jaxpr.invars, labels))
    normal = normalized.find(jaxpr, labels, _read_by(calls))
    prefix = "params/"
    return {
        name.removeprefix(prefix): dataclasses.replace(use, **_done(work.get(name)), normalized=normal.get(name))
        for name, use in found.uses.items()
        if name.startswith(prefix) and name in leaves and not is_low_rank(leaves[name])
    }


def _read_by(calls: list[LayerCall]) -> normalized.Marks:
    """How what follows the layers reads their marks."""
    layers = [normalized.Layer(f"params/{call.name}", call.features, call.output_size) for call in calls]
    return normalized.Marks(functools.partial(_number, _KERNEL), functools.partial(_number, _OUTPUT), layers)


def _number(prefix: str, mark: str) -> int | None:
    return int(mark.removeprefix(prefix)) if mark.startswith(prefix) else None


def _use(layer: nn.Module, below: str, args: Any, kwargs: Any) -> KernelUse:
    shape = tuple(known.kernel_of(layer, below).shape)
    refusal = known.refusal(layer)
    if not refusal and not known.is_built_in(layer):
        refusal = registered.misfit(layer, below, args, kwargs)
    return KernelUse(type(layer).__name__, shape, known.rows_of(layer), refusal, known.has_own_run(layer))


def _sizes(use: KernelUse, x: jax.Array, y: jax.Array) -> dict[str, Any]:
    """The sizes that determine a layer's work, and those of its features: none if it has no output."""
    if not y.size:
        return {}
    columns = 1 if use.rows is None else len(use.shape) - len(use.rows)
    if use.rows is not None:
        positions, widened = y.size // MatrixView(use.shape, use.rows).m, 0
    else:
        positions = y.size // y.shape[-1]
        widened = positions // y.shape[-2] * x.shape[-2]
    return {
        "output_size": y.size,
        "positions": positions,
        "widened": widened,
        "inputs": x.size,
        "features": y.shape[y.ndim - columns :],
    }


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
        self._kernels: dict[int, str | None] = {}  # of the call that was followed last, by the mark's number

    def follow(self, jaxpr: Any, labels: programs.Labels) -> tuple[dict[str, Work], list[str | None]]:
        """The work of every kernel in a program, and for each output which variable of the model it is, if any."""
        total: dict[str, Work] = {}
        for eqn in jaxpr.eqns:
            operands = programs.labels_of(eqn.invars, labels)
            mark = programs.mark_of(eqn) or ""
            if mark.startswith(_KERNEL):
                self._see(int(mark.removeprefix(_KERNEL)), operands[0])
            if mark.startswith(_OUTPUT):
                _add(total, self._work(int(mark.removeprefix(_OUTPUT)), eqn.outvars[0].aval.size))
            if mark or programs.is_copy(eqn):
                outputs = operands
            else:
                work, outputs = self._inside(eqn, operands)
                _add(total, work)
            labels |= programs.labelled(eqn.outvars, outputs)
        return total, programs.labels_of(jaxpr.outvars, labels)

    def _see(self, number: int, label: str | None) -> None:
        """Notes which kernel a call uses: by its path where something else made it of a variable."""
        call = self._calls[number]
        alone = self._marks[f"{_KERNEL}{number}"] == 1
        name = label or f"params/{call.name}"
        before = self.uses.get(name)
        if before is None or "/" in call.below:  # of a module inside, which the outer one uses
            self.uses[name] = call.use
        elif not before.refusal:
            self.uses[name] = dataclasses.replace(before, refusal=call.use.refusal)
        # Of a program that several modules share, a kernel without a label is nobody's.
        self._kernels[number] = name if label or alone else None

    def _work(self, number: int, size: int) -> dict[str, Work]:
        call, name = self._calls[number], self._kernels.get(number)
        if name is None:
            return {f"params/{call.name}": Work(known=False)}
        if not call.output_size:
            return {}
        # Under vmap there is a mapped axis, which the module itself does not see.
        positions, widened, inputs = (size * part // call.output_size for part in (call.positions, call.widened, call.inputs))
        return {name: Work(positions, widened, inputs)}

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
