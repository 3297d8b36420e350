"""One option for each kernel, of the least total loss within budgets (docs/mathematics.md, section 12).

The problem is separable.  With one budget, the lower convex hulls of all kernels' (cost, loss) points, cut into segments and
taken by slope, give the optimum of every budget that a corner hits; between two corners the rest is filled by points off the
hulls.  With two budgets the hulls are those of weighted costs, and the best weights are searched;
only between the corners of the best ones is anything filled.
"""

import dataclasses
import functools
import heapq
from collections.abc import Sequence

import numpy as np

_FILLS = 16  # budgets between two corners that are filled; only these, so that more budget never loses more
_WEIGHTS = 33  # of two budgets against each other
_STRIDE = 8  # of the first of them that are tried
_FILLED = 3  # of them


@dataclasses.dataclass(frozen=True)
class Options:
    """What one kernel may become.

    Attributes:
      cost: by budget and option, `[budgets, options]`.
      loss: of every option, `[options]`; it may be infinite.
    """

    cost: np.ndarray
    loss: np.ndarray

    @functools.cached_property
    def content(self) -> tuple[bytes, bytes]:
        """Equal for kernels with equal options."""
        return self.cost.tobytes(), self.loss.tobytes()


Chosen = list[int]  # an option for each kernel


def total_loss(kernels: Sequence[Options], chosen: Chosen) -> float:
    return float(sum(kernel.loss[option] for kernel, option in zip(kernels, chosen, strict=True)))


def total_cost(kernels: Sequence[Options], chosen: Chosen) -> np.ndarray:
    """`[budgets]`."""
    budgets = len(kernels[0].cost) if kernels else 1
    return sum((kernel.cost[:, option] for kernel, option in zip(kernels, chosen, strict=True)), np.zeros(budgets))


@dataclasses.dataclass(frozen=True)
class _Flat:
    """The options of all kernels one after another.

    Attributes:
      cost, loss: `[budgets, all]` and `[all]`.
      starts: where each kernel's options start.
      owner: the kernel that an option is of.
    """

    cost: np.ndarray
    loss: np.ndarray
    starts: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(cls, kernels: Sequence[Options]) -> "_Flat":
        counts = np.array([len(kernel.loss) for kernel in kernels])
        cost, loss = np.concatenate([kernel.cost for kernel in kernels], axis=1), np.concatenate([k.loss for k in kernels])
        return cls(cost, loss, np.cumsum(counts) - counts, np.repeat(np.arange(len(kernels)), counts))

    def least(self, values: np.ndarray) -> np.ndarray:
        """By kernel the least of values of all options."""
        return np.minimum.reduceat(values, self.starts)

    def cheapest(self, weights: np.ndarray, open_: np.ndarray) -> np.ndarray | None:
        """By kernel the open option of least weighted cost, and of least loss among those; None if a kernel has none.

        Counted over all kernels.
        """
        cost = np.where(open_, weights @ self.cost, np.inf)
        least = self.least(cost)
        if np.isinf(least).any():
            return None
        loss = np.where(cost == least[self.owner], self.loss, np.inf)
        best = np.flatnonzero((cost == least[self.owner]) & (loss == self.least(loss)[self.owner]))
        return best[np.unique(self.owner[best], return_index=True)[1]]


def cheapest(kernels: Sequence[Options], weights: np.ndarray) -> Chosen:
    """The option of least weighted cost for each kernel, and of least loss among those."""
    flat = _Flat.of(kernels)
    found = flat.cheapest(weights, np.ones(len(flat.loss), bool))
    assert found is not None  # costs are finite
    return (found - flat.starts).tolist()


def least_sum(kernels: Sequence[Options], limits: np.ndarray) -> Chosen | None:
    """The options of least total loss whose costs stay within `limits`, `[budgets]`; None if there are none."""
    best = heapq.nsmallest(_FILLED, _corners(kernels, limits), key=lambda corner: total_loss(kernels, corner.chosen))
    found = [_between(kernels, corner, limits) for corner in best]
    return min(found, key=lambda chosen: total_loss(kernels, chosen), default=None)


def least_worst(kernels: Sequence[Options], limits: np.ndarray) -> Chosen | None:
    """The same for the largest loss of any kernel; what is left of the budget lowers the others."""
    if not kernels:
        return []
    flat = _Flat.of(kernels)
    levels = np.unique(flat.loss[np.isfinite(flat.loss)])

    def within(level: float) -> Chosen | None:
        for weights in _weights(limits):
            found = flat.cheapest(weights, flat.loss <= level)
            if found is None:
                return None
            if (flat.cost[:, found].sum(axis=1) <= limits).all():
                return (found - flat.starts).tolist()
        return None

    if not len(levels) or (best := within(levels[-1])) is None:
        return None
    low, high = 0, len(levels) - 1  # the level at `high` is within
    while low < high:
        middle = (low + high) // 2
        if (chosen := within(levels[middle])) is None:
            low = middle + 1
        else:
            high, best = middle, chosen
    return _filled(kernels, best, limits)


def _weights(limits: np.ndarray) -> list[np.ndarray]:
    """How budgets are weighed against each other."""
    if len(limits) == 1:
        return [np.ones(1)]
    return [np.array([share, 1 - share]) / limits for share in np.linspace(0, 1, _WEIGHTS)]


@dataclasses.dataclass(frozen=True)
class _Corner:
    """The last one of the hulls that a budget affords.

    Attributes:
      chosen: the options.
      cost: what they cost, `[budgets]`.
      next: what the next corner would cost; None if there is none.
    """

    chosen: Chosen
    cost: np.ndarray
    next: np.ndarray | None


def _corners(kernels: Sequence[Options], limits: np.ndarray) -> list[_Corner]:
    """Those of some weights, ever closer to the best ones; of all if nothing else fits the limits."""
    weights, found = _weights(limits), dict[int, _Corner | None]()

    def lost(place: int) -> float:
        if place not in found:
            found[place] = _corner(kernels, limits, weights[place])
        corner = found[place]
        return np.inf if corner is None else total_loss(kernels, corner.chosen)

    best = min(range(0, len(weights), _STRIDE), key=lost)
    step = _STRIDE
    while (step := step // 2) and np.isfinite(lost(best)):
        best = min((place for place in (best, best - step, best + step) if 0 <= place < len(weights)), key=lost)
    if np.isinf(lost(best)):
        min(range(len(weights)), key=lost)
    return [corner for corner in found.values() if corner is not None]


def _corner(kernels: Sequence[Options], limits: np.ndarray, weights: np.ndarray) -> _Corner | None:
    chosen = cheapest(kernels, weights)
    begin = total_cost(kernels, chosen)
    if (begin > limits).any():
        return None
    found = _Segments.of(kernels, weights)
    costs = np.cumsum(np.concatenate([begin[:, None], found.cost], axis=1), axis=1)
    beyond = np.flatnonzero((costs > limits[:, None]).any(axis=0))
    taken = int(beyond[0]) - 1 if len(beyond) else len(found.slope)
    chosen = np.array(chosen)
    chosen[found.kernel[:taken]] = found.option[:taken]  # the last one of a kernel stays
    return _Corner(chosen.tolist(), costs[:, taken], costs[:, taken + 1] if len(beyond) else None)


def _between(kernels: Sequence[Options], corner: _Corner, limits: np.ndarray) -> Chosen:
    """The corner with what is left filled, on the way to the next one."""
    if corner.next is None:
        return corner.chosen
    steps = [corner.cost + (corner.next - corner.cost) * step / _FILLS for step in range(_FILLS)]
    fills = [_filled(kernels, corner.chosen, step) for step in steps if (step <= limits).all()]
    # Of a single move, too, more budget never loses more.
    fills.append(_filled(kernels, corner.chosen, limits, moves=1 if len(limits) == 1 else None))
    return min(fills, key=lambda filled: total_loss(kernels, filled))


@dataclasses.dataclass(frozen=True)
class _Segments:
    """The hulls' segments by slope, steepest first.

    Attributes:
      slope, kernel, option: of each, and the option at its end.
      cost: what it costs, `[budgets, segments]`.
    """

    slope: np.ndarray
    kernel: np.ndarray
    option: np.ndarray
    cost: np.ndarray

    @classmethod
    def of(cls, kernels: Sequence[Options], weights: np.ndarray) -> "_Segments":
        known: dict[tuple[bytes, bytes], tuple[np.ndarray, ...]] = {}  # many kernels of a network are alike
        for kernel in kernels:
            if kernel.content not in known:
                cost = weights @ kernel.cost
                corners = np.array(hull(cost, kernel.loss))
                slope = np.diff(kernel.loss[corners]) / np.diff(cost[corners])
                known[kernel.content] = slope, corners[1:], np.diff(kernel.cost[:, corners], axis=1)
        slopes, options, costs = zip(*(known[kernel.content] for kernel in kernels), strict=True)
        number = np.repeat(np.arange(len(kernels)), [len(slope) for slope in slopes])
        slope = np.concatenate(slopes)
        order = np.lexsort((number, slope))  # within a kernel slopes grow, so that its segments keep their order
        return cls(slope[order], number[order], np.concatenate(options)[order], np.concatenate(costs, axis=1)[:, order])


def hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """The options on the lower convex hull, by growing cost and falling loss; the first is the cheapest."""
    order = np.lexsort((loss, cost))
    below = np.minimum.accumulate(np.append(np.inf, loss[order][:-1]))
    falling = order[np.isfinite(loss[order]) & (loss[order] < below)]
    if not np.isfinite(loss[order[0]]):  # the cheapest one, all the same
        falling = np.append(order[0], falling)
    corners: list[tuple[int, float, float]] = []
    for three in zip(falling.tolist(), cost[falling].tolist(), loss[falling].tolist(), strict=True):
        while len(corners) > 1 and not _turns(corners[-2], corners[-1], three):
            corners.pop()
        corners.append(three)
    return [option for option, *_ in corners]


_Point = tuple[int, float, float]  # an option, its cost and loss


def _turns(one: _Point, two: _Point, three: _Point) -> bool:
    """Whether the slope grows at the second of three options."""
    return (two[2] - one[2]) / (two[1] - one[1]) < (three[2] - two[2]) / (three[1] - two[1])


def _filled(kernels: Sequence[Options], chosen: Chosen, limits: np.ndarray, moves: int | None = None) -> Chosen:
    """Takes the largest drop in loss that still fits, again and again, or so many times."""
    chosen = list(chosen)
    left = limits - total_cost(kernels, chosen)

    def best(number: int) -> tuple[float, int]:
        """The largest drop of a kernel, negative, and its option."""
        kernel, now = kernels[number], chosen[number]
        fits = ((kernel.cost - kernel.cost[:, now : now + 1]) <= left[:, None]).all(axis=0)
        losses = np.where(fits, kernel.loss, np.inf)
        option = int(np.argmin(losses))
        return (float(losses[option] - kernel.loss[now]), option) if losses[option] < kernel.loss[now] else (0.0, now)

    heap = _drops(kernels, chosen, left)
    heapq.heapify(heap)
    taken = 0
    while heap:
        drop, number = heapq.heappop(heap)
        now, option = best(number)  # what is left has shrunk since, and so have drops
        if now == 0:
            continue
        if now > drop:
            heapq.heappush(heap, (now, number))
            continue
        left = left - (kernels[number].cost[:, option] - kernels[number].cost[:, chosen[number]])
        chosen[number] = option
        heapq.heappush(heap, (best(number)[0], number))
        taken += 1
        if taken == moves:
            break
    return chosen


def _drops(kernels: Sequence[Options], chosen: Chosen, left: np.ndarray) -> list[tuple[float, int]]:
    """The largest drop of every kernel that has one within what is left of the budgets, and the kernel."""
    flat = _Flat.of(kernels)
    at = flat.starts + np.array(chosen)
    fits = (flat.cost - flat.cost[:, at][:, flat.owner] <= left[:, None]).all(axis=0)
    drops = flat.least(np.where(fits, flat.loss, np.inf)) - flat.loss[at]
    return [(float(drops[number]), int(number)) for number in np.flatnonzero(drops < 0)]
