"""Ranks from a budget: the plan that loses least within so many parameters, multiply-accumulates, bytes or seconds."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from lowrank_jax.kernel import Execution
from lowrank_jax.planning import knapsack
from lowrank_jax.planning.chips import Chip
from lowrank_jax.planning.curves import Losses, curves_of_kernels
from lowrank_jax.planning.decide import problem
from lowrank_jax.planning.energy import closed, energy_of, with_bounds
from lowrank_jax.planning.execution import dense_seconds, seconds_of
from lowrank_jax.planning.plans import Choice, DenseKernel, FactoredKernel, Plan, PlannedKernel
from lowrank_jax.planning.rules import Rule, rank_at, wanted_rank
from lowrank_jax.text import did_you_mean, shown

OBJECTIVES = ("correlation", "risk", "tolerance", "uniform")

Kind = Literal["params", "macs", "bytes", "seconds"]


def allocate(
    plan: Plan,
    *,
    params: float | int | None = None,
    macs: float | int | None = None,
    bytes: float | int | None = None,
    seconds: float | None = None,
    chip: Chip | None = None,
    batch: int | None = None,
    itemsize: int = 4,
    rest: float = 0.0,
    objective: str = "correlation",
    min_scale: float = 0.0,
    multiple_of: int = 1,
    variables: Any = None,
    moments: Mapping[str, jax.Array] | None = None,
    sensitivity: Mapping[str, float] | None = None,
) -> Plan:
    """Chooses the rank of every kernel, or to leave it dense, so that the network loses least within a budget.

        plan = lr.plan(model, inputs, [lr.Rule(".*kernel", scale=1.0)])
        plan = lr.allocate(plan, macs=0.5)

    Without a budget it only finds the ranks of rules that give an energy, from `variables`.

    The rules of the plan are bounds: no rank is above that of its rule, and what they keep dense stays dense.  A kernel whose
    rule's rank would save no parameters, as with a scale of 1, may be factored or stay dense.  Uniform scales are always
    candidates.  Before training all kernels of a shape are alike: without `variables` shapes and costs alone decide.

    Args:
      plan: from `plan`.
      params, macs, bytes, seconds: one budget, or two.  A float up to 1 is a fraction of the whole dense network, what cannot
        be factored included; a whole number is an absolute count.  `bytes` are those of the parameters.  `seconds` is a
        fraction of the dense training step, by the model of `chip`.  A budget in MACs fixes the execution that it counted on,
        `factored`; one in seconds the faster one.
      chip, batch: for `seconds`: the device, and the examples per step on it.
      itemsize: bytes of a parameter; for `seconds`, of an activation.
      rest: for `seconds`: how long the dense step takes besides its kernels, in seconds, from `rest_of_step`.
      objective: what is to be least: `correlation`, minus the logarithm of the product over kernels of the squared
        correlation that their outputs keep with the dense ones; `risk`, the sum of their relative function risks;
        `tolerance`, the largest of them; or `uniform`, to compare with: nothing is weighed, and the largest scale that fits
        is that of all kernels.
      min_scale: no rank is below this fraction of full rank.
      multiple_of: ranks are multiples of this and of the rule's, where a kernel has so many.
      variables: the dense model's variables or parameters, whose kernels are decomposed; None for Gaussian kernels.
      moments: from `inputs.second_moments(..., plan.opened())`, for the layers' real inputs; needs `variables`.  A scheme whose
        moments are not there is not considered.
      sensitivity: by name, what a kernel's loss counts; 1 for those that are not there.

    Returns:
      A plan whose table also shows each kernel's relative risk, and what the next per cent of the budget would take off
      what is lost there (of the objective), in proportion where the next rank needs more.

    Raises:
      ValueError: no budget and no energy, or more than two budgets; an energy without variables; a budget is impossible (the
        smallest possible one is named), or MACs of a kernel are not known; an argument is out of range; the variables do not
        fit the plan.
    """
    request = _Request(chip, _plain(batch), _plain(itemsize), _plain(rest), objective, _plain(min_scale), _plain(multiple_of))
    budgets = {"params": params, "macs": macs, "bytes": bytes, "seconds": seconds}
    given: dict[Kind, Any] = {kind: _plain(value) for kind, value in budgets.items() if value is not None}  # type: ignore[misc]
    if not given and any(energy_of(kernel) is not None for kernel in plan.kernels if kernel.choices):
        return _closed(plan, variables, moments)
    request.check(given)
    network = _Network.of(plan, given, request)
    _check_sensitivity(sensitivity or {}, network.open)
    _check_moments(variables, moments)
    curves = curves_of_kernels(network.open, variables, moments)
    open_ = with_bounds(network.open, curves, variables is not None)
    points = dataclasses.replace(network, open=open_).points(curves)
    options = _weighted(points, open_, sensitivity or {}, objective)
    room = network.limits - network.fixed
    if objective == "uniform":
        chosen = _largest_uniform(open_, points, options, room)
    else:
        chosen = _solve(options, room, objective, _uniforms(open_, points))
    if chosen is None:
        raise ValueError(network.impossible(options))
    gains = _next_gains(options, chosen, 0.01 * network.limits)
    lines = {
        kernel.name: _line(kernel, of_kernel, option, gain)
        for kernel, of_kernel, option, gain in zip(open_, points, chosen, gains, strict=True)
    }
    return dataclasses.replace(plan, kernels=tuple(lines.get(kernel.name, kernel) for kernel in plan.kernels))


def check_budget(plan: Plan, **arguments: Any) -> None:
    """Raises ValueError for a budget that is impossible, given the arguments of `allocate`; decomposes nothing.

    Of two budgets that cannot hold together only `allocate` knows.
    """
    names = {field.name for field in dataclasses.fields(_Request)}
    request = _Request(**{name: value for name, value in arguments.items() if name in names})
    given: dict[Any, Any] = {name: value for name, value in arguments.items() if name not in names}
    request.check(given)
    network = _Network.of(plan, given, request)
    free = {kernel.name: [_no_loss(choice) for choice in kernel.choices] for kernel in network.open}
    options = _weighted(network.points(free), network.open, {}, request.objective)
    least = network.fixed + network.smallest(options)
    if (least > network.limits).any():
        raise ValueError(network.impossible(options))


def _no_loss(choice: Choice) -> Losses:
    nothing = np.zeros(choice.view.full_rank)
    return Losses(nothing, nothing, nothing)


def _closed(plan: Plan, variables: Any, moments: Mapping[str, jax.Array] | None) -> Plan:
    """The plan with the ranks that its rules' energies ask for."""
    _check_moments(variables, moments)
    mine = [kernel for kernel in plan.kernels if kernel.choices and energy_of(kernel) is not None]
    given = None if moments is None else {kernel.name: moments[kernel.name] for kernel in mine if kernel.name in moments}
    curves = curves_of_kernels(mine, variables, given)
    lines = {kernel.name: closed(kernel, curves[kernel.name]) for kernel in with_bounds(mine, curves, variables is not None)}
    return dataclasses.replace(plan, kernels=tuple(lines.get(kernel.name, kernel) for kernel in plan.kernels))


def _check_moments(variables: Any, moments: Any) -> None:
    if moments is not None and variables is None:
        raise ValueError("moments need the variables too: they say what the kernels do with the inputs")


@dataclasses.dataclass(frozen=True)
class _Request:
    """The arguments of `allocate` that are not the network's."""

    chip: Chip | None = None
    batch: int | None = None
    itemsize: int = 4
    rest: float = 0.0
    objective: str = "correlation"
    min_scale: float = 0.0
    multiple_of: int = 1

    def check(self, given: Mapping[Kind, float | int]) -> None:
        if not 1 <= len(given) <= 2:
            raise ValueError("give one budget, or two: params, macs, bytes or seconds")
        for kind, value in given.items():
            _check_budget(kind, value)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.objective!r}{did_you_mean(self.objective, OBJECTIVES)}")
        if not _is_number(self.min_scale) or not 0 <= self.min_scale <= 1:
            raise ValueError(f"min_scale {shown(self.min_scale)} must be from 0 to 1")
        for name in ("multiple_of", "itemsize"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} {shown(value)} must be a whole number of at least 1")
        if "seconds" in given and (not isinstance(self.chip, Chip) or type(self.batch) is not int or self.batch < 1):
            raise ValueError("a budget of seconds needs chip, one of lowrank_jax.chips.CHIPS, and batch, the examples on it")
        if not _is_number(self.rest) or self.rest < 0:
            raise ValueError(f"rest {shown(self.rest)} must be a number of seconds")


def _check_budget(kind: str, value: float | int) -> None:
    if isinstance(value, float) and 0 < value <= 1:
        return
    if kind != "seconds" and type(value) is int and value >= 1:
        return
    what = "a fraction above 0 and up to 1" + ("" if kind == "seconds" else ", such as 0.5, or a whole number")
    raise ValueError(f"{kind}={shown(value)} must be {what}")


def _check_sensitivity(values: Mapping[str, Any], kernels: Sequence[PlannedKernel]) -> None:
    names = [kernel.name for kernel in kernels]
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"sensitivity: {name!r} is no kernel that the plan's rules leave open{did_you_mean(name, names)}")
        if not _is_number(_plain(value)) or value < 0:
            raise ValueError(f"sensitivity of {name!r}: {shown(value)} must be a number of at least 0")


def _plain(value: Any) -> Any:
    """A number of Python's for one of NumPy's or jax's."""
    return value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class _Points:
    """What one kernel may become: arrays over its options.

    Attributes:
      choice: the place among the kernel's choices, -1 for dense.
      rank: the rank, 0 for dense.
      execution: by option.
      risk: relative.
      correlation: minus the logarithm of the squared correlation that is kept.
      cost: `[budgets, options]`.
    """

    choice: np.ndarray
    rank: np.ndarray
    execution: list[Execution | None]
    risk: np.ndarray
    correlation: np.ndarray
    cost: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Network:
    """What a budget is for.

    Attributes:
      open: the kernels that it decides about.
      given: the budget by kind.
      request: the other arguments.
      fixed: by kind, the cost of what the budget cannot change.
      whole: by kind, the cost of the dense network.
    """

    open: list[PlannedKernel]
    given: Mapping[Kind, float | int]
    request: _Request
    fixed: np.ndarray
    whole: np.ndarray

    @classmethod
    def of(cls, plan: Plan, given: Mapping[Kind, float | int], request: _Request) -> "_Network":
        """Raises ValueError if the budget is in MACs that are not known."""
        open_ = [kernel for kernel in plan.kernels if kernel.choices]
        unknown = [kernel.name for kernel in open_ if not kernel.macs and kernel.execution != "premerged"]
        if "macs" in given and unknown:
            raise ValueError(f"the MACs of {', '.join(unknown)} are not known, so that no budget of MACs can hold")
        fixed = np.array([_fixed(plan, open_, kind, request) for kind in given])
        whole = np.array([_whole(plan, kind, request) for kind in given])
        return cls(open_, given, request, fixed, whole)

    @property
    def limits(self) -> np.ndarray:
        return np.array([_limit(value, total) for value, total in zip(self.given.values(), self.whole, strict=True)])

    def points(self, losses: Mapping[str, Sequence[Losses | None]]) -> list["_Points"]:
        return _all_points(self.open, losses, self.request, tuple(self.given))

    def smallest(self, options: Sequence[knapsack.Options]) -> np.ndarray:
        """By kind, the least that the open kernels cost, each for itself."""
        least = np.zeros(len(self.given))
        for place in range(len(self.given) if options else 0):
            cheapest = knapsack.cheapest(options, np.eye(len(self.given))[place])
            least[place] = knapsack.total_cost(options, cheapest)[place]
        return least

    def impossible(self, options: Sequence[knapsack.Options]) -> str:
        """That the budget is, and which is not."""
        if not options:
            return "the budget is impossible: the plan's rules leave no kernel open"
        parts = []
        least, values = self.fixed + self.smallest(options), self.given.items()
        for (kind, value), smallest, whole in zip(values, least, self.whole, strict=True):
            count = "" if kind == "seconds" else f", {math.ceil(smallest):,}"
            parts.append(
                f"{kind}={value}: the smallest possible is {_rounded_up(smallest / whole)} of the dense network{count}"
            )
        both = " (each for itself), and no plan was found that holds both" if len(self.given) > 1 else ""
        return f"the budget is impossible; {'; '.join(parts)}{both}"


_Row = tuple[int, int, Execution | None]  # the place among a kernel's choices, -1 for dense, the rank and the execution


def _all_points(
    kernels: Sequence[PlannedKernel], curves: Mapping[str, Sequence[Losses | None]], request: _Request, kinds: tuple[Kind, ...]
) -> list[_Points]:
    """Of every kernel; those that are alike but for their values have the same options and costs."""
    costs: dict[Any, tuple[list[_Row], np.ndarray]] = {}
    found = []
    for kernel in kernels:
        places = tuple(place for place, curve in enumerate(curves[kernel.name]) if curve is not None)
        key = dataclasses.replace(kernel, name=""), kernel.bounds, places
        if key not in costs:
            rows = _rows(kernel, places, request, kinds)
            costs[key] = rows, np.array([[_cost(kernel, *row, kind, request) for row in rows] for kind in kinds])
        found.append(_points(curves[kernel.name], *costs[key]))
    return found


def _rows(kernel: PlannedKernel, places: Sequence[int], request: _Request, kinds: tuple[Kind, ...]) -> list[_Row]:
    ranks = [(place, rank) for place in places for rank in _ranks(kernel, kernel.choices[place], request)]
    rows: list[_Row] = [(place, rank, way) for place, rank in ranks for way in _executions(kernel, kinds)]
    return [*rows, (-1, 0, None)] if _may_be_dense(kernel) else rows


def _points(losses: Sequence[Losses | None], rows: list[_Row], cost: np.ndarray) -> _Points:
    choice, rank = np.array([place for place, *_ in rows]), np.array([rank for _, rank, _ in rows])

    def lost(curve: str) -> np.ndarray:
        values = np.zeros(len(rows))
        for place, of_choice in enumerate(losses):
            if of_choice is not None:
                values[choice == place] = getattr(of_choice, curve)[rank[choice == place] - 1]
        return values

    return _Points(choice, rank, [execution for *_, execution in rows], lost("risk"), lost("correlation"), cost)


def _rule(kernel: PlannedKernel) -> Rule:
    assert kernel.rule is not None  # it has choices
    return kernel.rule


def _may_be_dense(kernel: PlannedKernel) -> bool:
    """Whether the rule itself would keep the kernel dense, since its rank saves nothing; a former budget does not matter."""
    choice = kernel.choices[0]
    rank = _wanted(kernel, choice)
    return rank is None or bool(problem(choice, rank))


def _wanted(kernel: PlannedKernel, choice: Choice) -> int | None:
    """The rank that a kernel's rule asks for."""
    if kernel.bounds:
        return kernel.bounds[kernel.choices.index(choice)]
    return wanted_rank(_rule(kernel), choice.view)


def _ranks(kernel: PlannedKernel, choice: Choice, request: _Request) -> range:
    """The ranks that a kernel may have: those of which the rule's is the largest, and that save parameters.

    Raises:
      ValueError: the rule's rank is below `min_scale`, and the kernel cannot stay dense.
    """
    view, rule = choice.view, _rule(kernel)
    wanted = min(_wanted(kernel, choice) or view.full_rank, view.full_rank)
    bound = min(wanted, (view.n * view.m - 1) // (view.n + view.m))
    low = max(1, math.ceil(request.min_scale * view.full_rank - 1e-9))
    if wanted < low and not _may_be_dense(kernel):
        raise ValueError(f"{kernel.name}: min_scale {request.min_scale} needs a rank of {low}; its rule allows {wanted}")
    steps = (math.lcm(request.multiple_of, rule.multiple_of), rule.multiple_of, request.multiple_of, 1)
    step = next(step for step in steps if step <= max(bound, 1))  # of small kernels there may be no multiple
    return range(-(-low // step) * step, bound + 1, step)


def _execution(kernel: PlannedKernel) -> Execution | None:
    """How a kernel runs on factors, whatever a former budget chose; None if that is open."""
    execution = _rule(kernel).execution
    if kernel.execution == "premerged":
        return "premerged"
    return None if execution == "auto" else execution


def _executions(kernel: PlannedKernel, kinds: tuple[Kind, ...]) -> tuple[Execution | None, ...]:
    execution = _execution(kernel)
    if execution is not None:
        return (execution,)
    if "seconds" in kinds:
        return ("factored", "merged")
    return ("factored",) if "macs" in kinds else (None,)


def _cost(kernel: PlannedKernel, place: int, rank: int, execution: Execution | None, kind: Kind, request: _Request) -> float:
    if place < 0:
        return _dense_cost(kernel, kind, request)
    choice = kernel.choices[place]
    match kind:
        case "params" | "bytes":
            count = math.prod(kernel.stack) * choice.params(rank)
            return count * (request.itemsize if kind == "bytes" else 1)
        case "macs":
            return kernel.macs if execution in ("merged", "premerged") else choice.macs(rank)
        case _:
            assert request.chip is not None and request.batch is not None
            run: Execution = "factored" if execution == "factored" else "merged"
            return seconds_of(kernel, choice, rank, run, request.chip, request.batch, request.itemsize)


def _dense_cost(kernel: PlannedKernel, kind: Kind, request: _Request) -> float:
    match kind:
        case "params":
            return kernel.params
        case "bytes":
            return kernel.params * request.itemsize
        case "macs":
            return kernel.macs
        case _:
            assert request.chip is not None and request.batch is not None
            return dense_seconds(kernel, request.chip, request.batch, request.itemsize)


def _fixed(plan: Plan, open_: Sequence[PlannedKernel], kind: Kind, request: _Request) -> float:
    """The cost of what the budget cannot change."""
    names = {kernel.name for kernel in open_}
    closed = sum(_dense_cost(kernel, kind, request) for kernel in plan.kernels if kernel.name not in names)
    others = {"params": plan.other_params, "bytes": plan.other_params * request.itemsize, "macs": 0, "seconds": request.rest}
    return closed + others[kind]


def _whole(plan: Plan, kind: Kind, request: _Request) -> float:
    """The cost of the whole dense network."""
    return _fixed(plan, (), kind, request)


def _limit(value: float | int, whole: float) -> float:
    return value * whole * (1 + 1e-12) if isinstance(value, float) else value


def _weighted(
    points: Sequence[_Points], kernels: Sequence[PlannedKernel], sensitivity: Mapping[str, float], objective: str
) -> list[knapsack.Options]:
    found = []
    for kernel, of_kernel in zip(kernels, points, strict=True):
        loss = of_kernel.correlation if objective == "correlation" else of_kernel.risk
        copies = 1 if objective == "tolerance" else math.prod(kernel.stack)  # of a repeated module, each loses so much
        found.append(knapsack.Options(of_kernel.cost, sensitivity.get(kernel.name, 1.0) * copies * loss))
    return found


def _solve(
    options: Sequence[knapsack.Options], limits: np.ndarray, objective: str, uniforms: Sequence[list[int]]
) -> list[int] | None:
    """The best one of what the solver finds and the uniform plans that fit; None if nothing fits."""
    if (limits < 0).any() or not options:
        return None if (limits < 0).any() else []
    least: Callable[..., list[int] | None] = knapsack.least_worst if objective == "tolerance" else knapsack.least_sum
    solved = least(options, np.maximum(limits, 1e-300))
    found = [chosen for chosen in uniforms if (knapsack.total_cost(options, chosen) <= limits).all()]

    def lost(chosen: list[int]) -> float:
        losses = [of_kernel.loss[option] for of_kernel, option in zip(options, chosen, strict=True)]
        return float(max(losses, default=0) if objective == "tolerance" else sum(losses))

    return min([*([] if solved is None else [solved]), *found], key=lost, default=None)


_SCALES = [scale / 200 for scale in range(1, 201)]  # uniform plans that are candidates


def _uniforms(kernels: Sequence[PlannedKernel], points: Sequence[_Points]) -> list[list[int]]:
    """The plans of uniform scales, as `plan` makes them, within the rules' bounds; in either execution."""
    by_kernel = [_uniform(kernel, of_kernel, _SCALES) for kernel, of_kernel in zip(kernels, points, strict=True)]
    return [list(chosen) for chosen in dict.fromkeys(zip(*by_kernel, strict=True))]


def _largest_uniform(
    kernels: Sequence[PlannedKernel], points: Sequence[_Points], options: Sequence[knapsack.Options], limits: np.ndarray
) -> list[int] | None:
    """The plan of the largest scale that fits, in either execution; None if none does."""
    found: list[tuple[float, list[int]]] = []
    for last in (False, True):
        low, high, scale = 0.0, 1.0, 1.0
        for _ in range(40):  # to far less than a rank
            both = [_uniform(kernel, of_kernel, (scale,)) for kernel, of_kernel in zip(kernels, points, strict=True)]
            chosen = [ways[last] for ways in both]
            if (knapsack.total_cost(options, chosen) <= limits).all():
                low = scale
                found.append((scale, chosen))
            else:
                high = scale
            scale = (low + high) / 2
    return max(found, key=lambda pair: pair[0], default=(0.0, None))[1]


def _uniform(kernel: PlannedKernel, points: _Points, scales: Sequence[float]) -> list[int]:
    """A kernel's options at some scales, in its rule's own scheme if that is open; in the first execution, then in the last."""
    place = 0 if (points.choice == 0).any() else int(points.choice.max())
    own, dense = np.flatnonzero((points.choice == place) & (points.rank > 0)), np.flatnonzero(points.rank == 0)
    if not len(own):
        return [int(dense[0])] * (2 * len(scales))
    view = kernel.choices[place].view
    wanted = np.array([rank_at(_rule(kernel), view, float(scale)) for scale in scales])
    ranks, first, count = np.unique(points.rank[own], return_index=True, return_counts=True)
    nearest = np.maximum(np.searchsorted(ranks, wanted, side="right") - 1, 0)
    saves = wanted * (view.n + view.m) < view.n * view.m
    options = [own[first[nearest]], own[(first + count - 1)[nearest]]]  # of a rank, executions follow each other
    return [int(option) for each in options for option in (np.where(saves, each, dense[0]) if len(dense) else each)]


def _rounded_up(fraction: float) -> float:
    return math.ceil(fraction * 1e4) / 1e4


def _next_gains(options: Sequence[knapsack.Options], chosen: Sequence[int], more: np.ndarray) -> list[float | None]:
    """What the best use of so much more of the budgets, `[budgets]`, for one kernel alone would take off its loss.

    In proportion where a kernel needs more than that for its next rank.
    """
    gains: list[float | None] = []
    for kernel, option in zip(options, chosen, strict=True):
        needed = ((kernel.cost - kernel.cost[:, option : option + 1]) / more[:, None]).max(axis=0)
        gain = float(np.max((kernel.loss[option] - kernel.loss) / np.maximum(needed, 1)))
        gains.append(gain if gain > 0 else None)
    return gains


def _line(kernel: PlannedKernel, points: _Points, option: int, gain: float | None) -> PlannedKernel:
    """The kernel as it was chosen."""
    place, risk = int(points.choice[option]), float(points.risk[option])
    forced = kernel.execution if kernel.execution == "premerged" else None
    note = kernel.note
    if place < 0:
        execution = _execution(kernel)
        note = "the budget affords it" if len(points.rank) > 1 and not forced else note
        return DenseKernel(**kernel.shared, execution=execution, note=note, risk=0.0, next_gain=gain)
    return FactoredKernel(
        **kernel.shared,
        choice=kernel.choices[place],
        rank=int(points.rank[option]),
        execution=points.execution[option],
        note=note if forced else "",
        risk=risk,
        next_gain=gain,
    )
