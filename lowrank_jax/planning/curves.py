"""What every rank of a plan's kernels loses: of the kernels at hand, or of Gaussian ones."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.kernel import MatrixView, is_low_rank, without_box
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import PlannedKernel
from lowrank_jax.planning.rules import Rule
from lowrank_jax.projection import linalg
from lowrank_jax.projection.activations import ActivationLike
from lowrank_jax.projection.curves import Curves, Normalization, curves_of_stacks
from lowrank_jax.projection.stack import Stack

_KEY = 0  # of the Gaussian kernels: plans depend on shapes alone


class Losses(NamedTuple):
    """By rank, `[full_rank]`.

    Attributes:
      risk: the relative function risk, never growing.
      correlation: minus the logarithm of the squared correlation that is kept, never growing.
      energy: the share of the squared singular values, of the kernel of a repeated module that keeps least.
    """

    risk: np.ndarray
    correlation: np.ndarray
    energy: np.ndarray


def curves_of_kernels(
    kernels: Sequence[PlannedKernel], variables: Any = None, moments: Mapping[str, jax.Array] | None = None
) -> dict[str, list[Losses | None]]:
    """By kernel, for each of its choices, what every rank from 1 to full rank loses; None for a choice without moments.

    Args:
      kernels: of a plan; all have choices.
      variables: the dense model's variables or parameters; None for Gaussian kernels with columns of length one, one draw for
        each shape.
      moments: by kernel, `[*stack, n, n]`: second moments of the inputs of one of its choices.  Kernels that are premerged, or
        that only their layer knows how to use, have none.

    Raises:
      ValueError: the variables or moments do not fit the kernels, or are not finite.
    """
    asked = [(kernel, place) for kernel in kernels for place in range(len(kernel.choices))]
    if variables is None:
        with jax.ensure_compile_time_eval():  # shapes are known under an outer jit too
            curves: list[Losses | None] = [*_gaussian_curves([_gaussian(kernel, place) for kernel, place in asked])]
    else:
        values = _values(kernels, variables)
        if moments is not None:
            _check_moments(kernels, moments)
            asked = [(kernel, place) for kernel, place in asked if _has_moments(kernel, place, moments)]
        settings = tuple(_Settings.of(kernel, place) for kernel, place in asked)
        given = [(values[kernel.name], (moments or {}).get(kernel.name)) for kernel, _ in asked]
        curves = [*_means(_of_values(given, settings))] if asked else []
    found: dict[str, list[Losses | None]] = {kernel.name: [None] * len(kernel.choices) for kernel in kernels}
    for (kernel, place), curve in zip(asked, curves, strict=True):
        found[kernel.name][place] = curve
    return found


def normalization_of(kernel: PlannedKernel) -> Normalization | None:
    """What follows a kernel's layer: as its rule says, or as it was found."""
    said = _rule(kernel).normalized
    if said is None:
        return kernel.normalized
    return "each" if said else None


def _is_captured(kernel: PlannedKernel) -> bool:
    return kernel.execution != "premerged" and not kernel.own_run


def _has_moments(kernel: PlannedKernel, place: int, moments: Mapping[str, jax.Array]) -> bool:
    """Whether a choice's inputs are those of the moments; of what has none, isotropic inputs are assumed."""
    return not _is_captured(kernel) or moments[kernel.name].shape[-1] == kernel.choices[place].view.n


def _check_moments(kernels: Sequence[PlannedKernel], moments: Mapping[str, jax.Array]) -> None:
    captured = {kernel.name: kernel for kernel in kernels if _is_captured(kernel)}
    problems = [f"{name}: has moments but is not open to the budget" for name in moments if name not in captured]
    for name, kernel in captured.items():
        moment, sizes = moments.get(name), [choice.view.n for choice in kernel.choices]
        if moment is None:
            problems.append(f"{name}: has no moments; capture them for plan.opened()")
        elif not any(tuple(moment.shape) == (*kernel.stack, n, n) for n in sizes):
            wanted = " or ".join(str([*kernel.stack, n, n]) for n in dict.fromkeys(sizes))
            problems.append(f"{name}: moments must have shape {wanted}, not {list(moment.shape)}")
        elif not linalg.known_finite(moment):
            problems.append(f"{name}: moments are not finite")
    if problems:
        raise ValueError("the moments do not fit the plan:\n  " + "\n  ".join(problems))


class _Settings(NamedTuple):
    """How a kernel is a matrix, and what follows it."""

    view: MatrixView
    activation: ActivationLike
    normalized: Normalization | None

    @classmethod
    def of(cls, kernel: PlannedKernel, place: int) -> "_Settings":
        return cls(kernel.choices[place].view, _rule(kernel).activation, normalization_of(kernel))

    def stack(self, w: jax.Array) -> Stack:
        """Of matrices `[k, n, m]`."""
        return Stack(None, w, 1, self.activation, self.view.group)


_known: dict[_Settings, Losses] = {}  # of Gaussian kernels that are matrices already


def _gaussian(kernel: PlannedKernel, place: int) -> _Settings:
    settings = _Settings.of(kernel, place)
    view = settings.view
    return settings._replace(view=MatrixView((view.n, view.m), (0,), view.group))


def _drawn(settings: _Settings) -> jax.Array:
    """A Gaussian kernel whose outputs have length one."""
    view = settings.view
    return jax.random.normal(jax.random.key(_KEY), view.shape) / np.sqrt(view.n * view.group)


def _rule(kernel: PlannedKernel) -> Rule:
    assert kernel.rule is not None  # it has choices
    return kernel.rule


def _gaussian_curves(asked: Sequence[_Settings]) -> list[Losses]:
    """Each shape is decomposed once a process: plans of one network are made again and again, as in a sweep."""
    new = tuple(one for one in dict.fromkeys(asked) if one not in _known)
    if new:
        _known.update(zip(new, _means(_of_values([(_drawn(one), None) for one in new], new)), strict=True))
    return [_known[one] for one in asked]


@functools.partial(jax.jit, static_argnames="settings")
def _of_values(given: Sequence[tuple[jax.Array, jax.Array | None]], settings: tuple[_Settings, ...]) -> list[Curves]:
    """Of kernels and the second moments of their inputs, where these are known; one program for all of them."""
    stacks = [one.stack(_matrices(one.view, kernel, moment)) for one, (kernel, moment) in zip(settings, given, strict=True)]
    return curves_of_stacks(stacks, [one.normalized for one in settings])


def _matrices(view: MatrixView, kernel: jax.Array, moment: jax.Array | None) -> jax.Array:
    """`[*stack, *kernel]` as `[k, n, m]`, as isotropic inputs would see them."""
    w = view.to_matrix(kernel).reshape(-1, view.n, view.m)
    w = w.astype(linalg.wide(w.dtype))
    if moment is None:
        return w
    roots = jax.lax.map(linalg.square_root, moment.reshape(-1, view.n, view.n).astype(w.dtype))
    return jnp.matmul(roots, w, precision="highest")


def _means(curves: Sequence[Curves]) -> list[Losses]:
    """A repeated module has one rank for all its kernels: what each loses on average."""

    def falling(values: np.ndarray) -> np.ndarray:
        return np.minimum.accumulate(np.clip(values, 0, None).mean(axis=0))

    def logarithm(kept: jax.Array) -> np.ndarray:
        return -np.log(np.clip(np.asarray(kept, np.float64), 1e-12, 1))

    return [
        Losses(
            falling(np.asarray(curve.risk, np.float64)),
            falling(logarithm(curve.correlation)),
            np.asarray(curve.energy, np.float64).min(axis=0),
        )
        for curve in curves
    ]


def _is_leaf(node: Any) -> bool:
    """Whether it is a pair, or the box of an array."""
    return is_low_rank(node) or (not isinstance(node, Mapping) and hasattr(node, "unbox"))


def _values(kernels: Sequence[PlannedKernel], variables: Any) -> dict[str, jax.Array]:
    params = variables["params"] if isinstance(variables, Mapping) and "params" in variables else variables
    leaves = named_leaves(jax.tree.map(without_box, params, is_leaf=_is_leaf), is_leaf=is_low_rank)
    problems = []
    for kernel in kernels:
        leaf = leaves.get(kernel.name)
        if leaf is None or is_low_rank(leaf) or tuple(leaf.shape) != kernel.shape:
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
    return {kernel.name: leaves[kernel.name] for kernel in kernels}
