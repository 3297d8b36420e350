"""What every rank of a plan's kernels loses: of the kernels at hand, or of Gaussian ones."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.kernel import is_low_rank, without_box
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.arguments import array_problem, gradients_problem, moments_problem
from lowrank_jax.planning.plans import PlannedKernel
from lowrank_jax.projection import linalg
from lowrank_jax.projection.activations import ActivationLike
from lowrank_jax.projection.curves import Curves, Normalization, curves, gaussian_curves
from lowrank_jax.projection.two_sided import GradientMoments, divergences


class Losses(NamedTuple):
    """By rank, `[full_rank]`.

    Attributes:
      risk: the relative function risk, never growing.
      correlation: minus the logarithm of the squared correlation that is kept, never growing.
      energy: the share of the squared singular values, of the kernel of a repeated module that keeps least.
      divergence: what the network's loss gains of each kernel, to second order; NaN without gradients.
    """

    risk: np.ndarray
    correlation: np.ndarray
    energy: np.ndarray
    divergence: np.ndarray


def curves_of_kernels(
    kernels: Sequence[PlannedKernel],
    variables: Any = None,
    moments: Mapping[str, jax.Array] | None = None,
    gradients: Mapping[str, GradientMoments] | None = None,
) -> dict[str, list[Losses | None]]:
    """By kernel, for each of its choices, what every rank from 1 to full rank loses; None for a choice without moments.

    Args:
      kernels: of a plan; all have choices.
      variables: the dense model's variables or parameters; None for Gaussian kernels whose outputs have length one, by their
        shapes alone.
      moments: by kernel, `[*stack, n, n]`: second moments of the inputs of one of its choices.  Kernels that are premerged, or
        that only their layer knows how to use, have none.
      gradients: by kernel, the moments of its gradients, as one of its choices has it; of whatever has none, neither.

    Raises:
      ValueError: the variables, moments or gradients do not fit the kernels, or are not finite.
    """
    found: dict[str, list[Losses | None]] = {kernel.name: [None] * len(kernel.choices) for kernel in kernels}
    values = None if variables is None else _values(kernels, variables)
    if values is not None and moments is not None:
        _check_moments(kernels, moments)
    if gradients is not None:
        _check_gradients(kernels, gradients)
    for kernel in kernels:
        given, moment = None if values is None else values[kernel.name], (moments or {}).get(kernel.name)
        gradient = (gradients or {}).get(kernel.name)
        for place, choice in enumerate(kernel.choices):
            settings = _Settings.of(kernel, place)
            if given is None:
                found[kernel.name][place] = _of_gaussian(settings)
            elif _is_measured(kernel, place, moment, gradient):
                matrices = choice.view.to_matrix(given)  # type: ignore[arg-type]  # of NumPy in, of NumPy out
                found[kernel.name][place] = _of_values(settings, np.asarray(matrices), moment, gradient)
    return found


def normalization_of(kernel: PlannedKernel) -> Normalization | None:
    """What follows a kernel's layer: as its rule says, or as it was found."""
    assert kernel.rule is not None  # it has choices
    said = kernel.rule.normalized
    if said is None:
        return kernel.normalized
    return "each" if said else None


def _is_captured(kernel: PlannedKernel) -> bool:
    return kernel.execution != "premerged" and not kernel.own_run


def _is_measured(kernel: PlannedKernel, place: int, moment: jax.Array | None, gradient: GradientMoments | None) -> bool:
    """Whether what is known is that of this choice; of what nothing is known, isotropic inputs are assumed."""
    view = kernel.choices[place].view
    sizes = view.n, view.m // view.group
    return (moment is None or moment.shape[-1] == view.n) and (
        gradient is None or (gradient.rows.shape[-1], gradient.columns.shape[-1]) == sizes
    )


def _check_moments(kernels: Sequence[PlannedKernel], moments: Mapping[str, jax.Array]) -> None:
    captured = {kernel.name: kernel for kernel in kernels if _is_captured(kernel)}
    problems = [f"{name}: has moments but is not open to the budget" for name in moments if name not in captured]
    for name, kernel in captured.items():
        moment, sizes = moments.get(name), [choice.view.n for choice in kernel.choices]
        if moment is None:
            problems.append(f"{name}: has no moments; capture them for plan.opened()")
        elif problem := array_problem(moment):
            problems.append(f"{name}: {problem}")
        elif not any(tuple(moment.shape) == (*kernel.stack, n, n) for n in sizes):
            wanted = " or ".join(str([*kernel.stack, n, n]) for n in dict.fromkeys(sizes))
            problems.append(f"{name}: moments must have shape {wanted}, not {list(moment.shape)}")
        elif problem := moments_problem(moment):
            problems.append(f"{name}: {problem}")
    if problems:
        raise ValueError("the moments do not fit the plan:\n  " + "\n  ".join(problems))


def _check_gradients(kernels: Sequence[PlannedKernel], gradients: Mapping[str, GradientMoments]) -> None:
    problems = []
    for kernel in kernels:
        if not _is_captured(kernel):
            problems.append(f"{kernel.name}: the gradients of its layer cannot be measured; keep it dense by a rule")
        elif problem := gradients_problem(gradients.get(kernel.name), kernel.stack, [choice.view for choice in kernel.choices]):
            problems.append(f"{kernel.name}: {problem}")
    if problems:
        raise ValueError("the gradients do not fit the plan:\n  " + "\n  ".join(problems))


class _Settings(NamedTuple):
    """What the curves of a kernel depend on besides its values."""

    n: int
    m: int
    group: int
    activation: ActivationLike
    normalized: Normalization | None

    @classmethod
    def of(cls, kernel: PlannedKernel, place: int) -> "_Settings":
        view = kernel.choices[place].view
        assert kernel.rule is not None  # it has choices
        return cls(view.n, view.m, view.group, kernel.rule.activation, normalization_of(kernel))

    @property
    def others(self) -> dict[str, Any]:
        return {"activation": self.activation, "group": self.group, "normalized": self.normalized}


@functools.lru_cache(maxsize=4096)
def _of_gaussian(settings: _Settings) -> Losses:
    """Once a process: plans of one network are made again and again, as in a sweep."""
    return _mean([gaussian_curves(settings.n, settings.m, **settings.others)])


def _of_values(settings: _Settings, matrices: np.ndarray, moment: jax.Array | None, gradient: GradientMoments | None) -> Losses:
    """Of the kernels of one module, `[*stack, n, m]`, for the moments of their inputs and gradients, where these are known."""
    given = matrices.reshape(-1, settings.n, settings.m).astype(np.float64)
    fed = given if moment is None else np.asarray(_roots(moment), np.float64) @ given
    losses = _mean([curves(w, **settings.others) for w in fed])
    if gradient is None:
        return losses
    if not np.any(gradient.columns):  # nothing that this layer does is felt
        return losses._replace(divergence=np.zeros_like(losses.risk))
    sides = (np.asarray(_roots(side), np.float64) for side in gradient)
    lost = [divergences(r @ w, t) for w, r, t in zip(given, *sides, strict=True)]
    return losses._replace(divergence=np.mean(lost, axis=0))


_roots = jax.jit(linalg.square_roots)


def _mean(found: Sequence[Curves]) -> Losses:
    """A repeated module has one rank for all its kernels: what each loses on average."""

    def falling(values: list[np.ndarray]) -> np.ndarray:
        return np.minimum.accumulate(np.clip(values, 0, None).mean(axis=0))

    def logarithm(kept: np.ndarray) -> np.ndarray:
        return -np.log(np.clip(kept, 1e-12, 1))

    return Losses(
        falling([curve.risk for curve in found]),
        falling([logarithm(curve.correlation) for curve in found]),
        np.min([curve.energy for curve in found], axis=0),
        np.full(len(found[0].energy), np.nan),
    )


def _is_leaf(node: Any) -> bool:
    """Whether it is a pair, or the box of an array."""
    return is_low_rank(node) or (not isinstance(node, Mapping) and hasattr(node, "unbox"))


def _values(kernels: Sequence[PlannedKernel], variables: Any) -> dict[str, np.ndarray]:
    """The kernels, on the host."""
    params = variables["params"] if isinstance(variables, Mapping) and "params" in variables else variables
    leaves = named_leaves(jax.tree.map(without_box, params, is_leaf=_is_leaf), is_leaf=is_low_rank)
    problems = []
    for kernel in kernels:
        leaf = leaves.get(kernel.name)
        if leaf is not None and not is_low_rank(leaf) and not hasattr(leaf, "shape"):
            problems.append(f"{kernel.name}: {array_problem(leaf)}")
        elif leaf is None or is_low_rank(leaf) or tuple(leaf.shape) != kernel.shape:
            found = "is missing" if leaf is None else "is factored" if is_low_rank(leaf) else f"is {list(leaf.shape)}"
            problems.append(f"{kernel.name}: planned as {list(kernel.shape)}, {found}")
        elif isinstance(leaf, jax.ShapeDtypeStruct):
            problems.append(f"{kernel.name}: is a shape without values")
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            problems.append(f"{kernel.name}: is {leaf.dtype}, not real numbers")
        elif not linalg.known_finite(leaf):
            problems.append(f"{kernel.name}: has values that are not finite")
    if problems:
        raise ValueError("the variables do not fit the plan:\n  " + "\n  ".join(problems))
    return {kernel.name: np.asarray(leaves[kernel.name]) for kernel in kernels}
