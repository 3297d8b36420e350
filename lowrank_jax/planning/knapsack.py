"""One option for each kernel, of the least total loss within budgets (docs/mathematics.md, section 12).

The problem is separable.  With one budget, the lower convex hulls of all kernels' (cost, loss) points, cut into segments and
taken by slope, give the optimum of every budget that a corner hits; between two corners the rest is filled by points off the
hulls.  With two budgets the hulls are those of weighted costs, and the best weights are searched.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

_FILLS = 16  # budgets between two corners that are filled; only these, so that more budget never loses more
_WEIGHTS = 33  # of two budgets against each other


@dataclasses.dataclass(frozen=True)
class Options:
    """What one kernel may become.

    Attributes:
      cost: by budget and option, `[budgets, options]`.
      loss: of every option, `[options]`; it may be infinite.
    """

    cost: np.ndarray
    loss: np.ndarray


Chosen = list[int]  # an option for each kernel


def total_loss(kernels: Sequence[Options], chosen: Chosen) -> float:
    return float(sum(kernel.loss[option] for kernel, option in zip(kernels, chosen, strict=True)))


def total_cost(kernels: Sequence[Options], chosen: Chosen) -> np.ndarray:
    """`[budgets]`."""
    budgets = len(kernels[0].cost) if kernels else 1
    return sum((kernel.cost[:, option] for kernel, option in zip(kernels, chosen, strict=True)), np.zeros(budgets))


def cheapest(kernels: Sequence[Options], weights: np.ndarray) -> Chosen:
    """The option of least weighted cost for each kernel, and of least loss among those."""
    return [int(np.lexsort((kernel.loss, weights @ kernel.cost))[0]) for kernel in kernels]


def least_sum(kernels: Sequence[Options], limits: np.ndarray) -> Chosen | None:
    """The options of least total loss whose costs stay within `limits`, `[budgets]`; None if there are none."""
    found = [_by_weights(kernels, limits, weights) for weights in _weights(limits)]
    possible = [chosen for chosen in found if chosen is not None]
    return min(possible, key=lambda chosen: total_loss(kernels, chosen), default=None)


def least_worst(kernels: Sequence[Options], limits: np.ndarray) -> Chosen | None:
    """The same for the largest loss of any kernel; what is left of the budget lowers the others."""
    levels = np.unique(np.concatenate([kernel.loss for kernel in kernels])) if kernels else np.zeros(1)

    def within(level: float) -> Chosen | None:
        bounded = [Options(kernel.cost, np.where(kernel.loss <= level, kernel.loss, np.inf)) for kernel in kernels]
        if any(np.isinf(kernel.loss).all() for kernel in bounded):
            return None
        for weights in _weights(limits):
            chosen = _cheapest_finite(bounded, weights)
            if (total_cost(kernels, chosen) <= limits).all():
                return chosen
        return None

    if (best := within(levels[-1])) is None:
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


def _cheapest_finite(kernels: Sequence[Options], weights: np.ndarray) -> Chosen:
    """`cheapest` among the options of finite loss."""
    found = []
    for kernel in kernels:
        open_ = np.flatnonzero(np.isfinite(kernel.loss))
        found.append(int(open_[np.lexsort((kernel.loss[open_], weights @ kernel.cost[:, open_]))[0]]))
    return found


def _by_weights(kernels: Sequence[Options], limits: np.ndarray, weights: np.ndarray) -> Chosen | None:
    chosen = cheapest(kernels, weights)
    cost = total_cost(kernels, chosen)
    if (cost > limits).any():
        return None
    missing = None
    for _, kernel, option in segments(kernels, weights):
        after = cost + kernels[kernel].cost[:, option] - kernels[kernel].cost[:, chosen[kernel]]
        if (after > limits).any():
            missing = after
            break
        chosen[kernel], cost = option, after
    if missing is None:
        return chosen
    steps = [cost + (missing - cost) * step / _FILLS for step in range(_FILLS)]
    fills = [_filled(kernels, chosen, step) for step in steps if (step <= limits).all()]
    # Of a single move, too, more budget never loses more.
    fills.append(_filled(kernels, chosen, limits, moves=1) if len(limits) == 1 else _filled(kernels, chosen, limits))
    return min(fills, key=lambda filled: total_loss(kernels, filled))


def segments(kernels: Sequence[Options], weights: np.ndarray) -> list[tuple[float, int, int]]:
    """The hulls' segments by slope, steepest first: the slope, the kernel, and the option at the segment's end."""
    found = []
    for number, kernel in enumerate(kernels):
        cost = weights @ kernel.cost
        corners = hull(cost, kernel.loss)
        for one, other in itertools.pairwise(corners):
            slope = (kernel.loss[other] - kernel.loss[one]) / (cost[other] - cost[one])
            found.append((float(slope), number, int(other)))
    return sorted(found)  # within a kernel slopes grow, so that its segments keep their order


def hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """The options on the lower convex hull, by growing cost and falling loss; the first is the cheapest."""
    corners: list[int] = []
    for option in np.lexsort((loss, cost)):
        if not np.isfinite(loss[option]) and corners:
            continue
        if corners and loss[option] >= loss[corners[-1]]:
            continue
        while len(corners) > 1 and not _turns(cost, loss, corners[-2], corners[-1], option):
            corners.pop()
        corners.append(int(option))
    return corners


def _turns(cost: np.ndarray, loss: np.ndarray, one: int, two: int, three: int) -> bool:
    """Whether the slope grows at the second of three options."""
    first = (loss[two] - loss[one]) / (cost[two] - cost[one])
    return first < (loss[three] - loss[two]) / (cost[three] - cost[two])


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

    heap = [(best(number)[0], number) for number in range(len(kernels))]
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
