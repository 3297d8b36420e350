"""Trees as one flat dict of arrays by name, as safetensors and other formats store them, and back."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from lowrank_jax.kernel import LowRankKernel, is_low_rank, without_box
from lowrank_jax.paths import leaf_name, named_leaves
from lowrank_jax.planning.plans import FactoredKernel, Plan
from lowrank_jax.planning.relabel import finder

_MOST = 10  # problems to list


def flatten(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name, in tree order; those of a factored kernel are called "path/u" and "path/v".

    What counts or lists parameters sees what is stored then: `parameter_overview.get_parameter_overview(lr.flatten(params))`.

    Args:
      tree: parameters, or any other tree; boxes such as those of `nn.with_partitioning` are taken off.

    Returns:
      `{name: array}`; `unflatten` is the way back.

    Raises:
      ValueError: two arrays have the same name.
    """
    return {name: without_box(leaf) for name, leaf in named_leaves(tree, is_leaf=_is_box).items()}


def unflatten(arrays: Any, like: Any) -> Any:
    """The tree of which these are the arrays, with its factor pairs: the inverse of `flatten`.

        safetensors.flax.save_file(lr.flatten(params), "model.safetensors")
        params = lr.unflatten(safetensors.flax.load_file("model.safetensors"), plan)

    Args:
      arrays: from `flatten`; or a tree that has dicts in the place of factor pairs, as orbax restores without a target.
      like: a plan or a tree.  It says which arrays are factor pairs, what their row axes are and how they run.  A plan is
        for parameters, variables and other trees of dicts.  With a tree of the same structure, of arrays or of shapes, lists,
        optimiser states, boxes and the pairs of a model's own low-rank layers come back as well.  Ranks may be others.

    Raises:
      ValueError: the arrays do not fit; all names that are missing or too many are told.  Or the keys of the plan's model have
        slashes, which only a tree tells from paths.
    """
    arrays = flatten(arrays)
    return _by_plan(arrays, like) if isinstance(like, Plan) else _by_tree(arrays, like)


def _by_plan(arrays: dict[str, Any], plan: Plan) -> Any:
    if plan.slashed:
        advice = "names do not tell it from a path; give a tree in the plan's place, such as jax.eval_shape of the parameters"
        raise ValueError(f"the model has the key {plan.slashed[0]!r}: {advice}")
    pairs = {name.removesuffix("/u") for name in arrays if name.endswith("/u") and name.removesuffix("u") + "v" in arrays}
    find = finder(plan)
    kernels = {name: kernel for name in pairs if (kernel := find(name))}
    problems = _without_pairs(plan, kernels) + _other_dense(plan, arrays)
    leaves: dict[str, Any] = {}
    for name, array in arrays.items():
        above, _, factor = name.rpartition("/")
        if above not in kernels or factor not in ("u", "v"):
            leaves[name] = array
        elif factor == "u":
            kernel = kernels[above]
            leaves[above] = LowRankKernel(array, arrays[f"{above}/v"], kernel.view.rows, kernel.execution or "factored")
            problems += _misfit(above, leaves[above], kernel)
    _raise(problems)
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *above, last = name.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _without_pairs(plan: Plan, kernels: Mapping[str, FactoredKernel]) -> list[str]:
    found = {kernel.name for kernel in kernels.values()}
    names = [kernel.name for kernel in plan.factored if kernel.name not in found]
    return [f"{name}: the plan factors it, and there are no {name}/u and {name}/v" for name in names]


def _other_dense(plan: Plan, arrays: Mapping[str, Any]) -> list[str]:
    """What is wrong with parameters that the plan keeps dense, where the arrays are parameters or have some."""
    names = {kernel.name + "/u" * isinstance(kernel, FactoredKernel) for kernel in plan.kernels}
    above = next((above for above in ("", "params/") if any(f"{above}{name}" in arrays for name in names)), None)
    if above is None:
        return []
    problems = []
    for kernel in plan.kernels:
        name = above + kernel.name
        if isinstance(kernel, FactoredKernel):
            continue
        if name not in arrays:
            problems.append(f"{name}: the plan keeps it dense, and there is no such array")
        elif tuple(arrays[name].shape) != kernel.shape:
            problems.append(f"{name}: has shape {list(arrays[name].shape)}, planned is {list(kernel.shape)}")
    return problems


def _misfit(name: str, pair: LowRankKernel, kernel: FactoredKernel) -> list[str]:
    """What is wrong with the factors of a parameter; what an optimiser keeps of them may have other shapes."""
    if name.removeprefix("params/") != kernel.name:
        return []
    u, v, view = tuple(pair.u.shape), tuple(pair.v.shape), kernel.view
    rows, columns = (tuple(view.shape[axis] for axis in axes) for axes in (view.rows, view.columns))
    if u[:-1] == kernel.stack + rows and v == (*kernel.stack, *u[-1:], *columns):
        return []
    planned_u, planned_v = [*kernel.stack, *rows, kernel.rank], [*kernel.stack, kernel.rank, *columns]
    return [f"{name}: has factors of shapes {list(u)} and {list(v)}, planned are {planned_u} and {planned_v}"]


def _by_tree(arrays: dict[str, Any], like: Any) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_box)
    ranks = _rank_axes(like)
    rest, problems, found = dict(arrays), [], []
    for path, leaf in leaves:
        name, boxed = leaf_name(path), _is_box(leaf)
        # Restored without a target, a box is a dict of its value.
        key = f"{name}/value" if boxed and name not in rest else name
        if key not in rest:
            problems.append(f"{name}: missing")
            continue
        array = rest.pop(key)
        problems += _other_axes(name, array, without_box(leaf), ranks.get(name))
        found.append(leaf.replace_boxed(array) if boxed else array)
    _raise([*problems, *(f"{name}: not in the tree" for name in rest)])
    return jax.tree.unflatten(structure, found)


def _is_box(node: Any) -> bool:
    return nn.meta.is_axis_metadata(node) and len(jax.tree.leaves(node)) == 1


def _rank_axes(like: Any) -> dict[str, int]:
    """By the name of a factor the axis of its rank."""
    axes = {}
    for name, pair in named_leaves(like, is_leaf=is_low_rank).items():
        if is_low_rank(pair) and hasattr(without_box(pair.u), "ndim"):
            axes |= {f"{name}/u": without_box(pair.u).ndim - 1, f"{name}/v": len(pair.stack)}
    return axes


def _other_axes(name: str, array: Any, leaf: Any, rank: int | None) -> list[str]:
    """What is wrong with the shape of an array, its rank aside."""
    shapes = [list(value.shape) for value in (array, leaf) if hasattr(value, "shape")]
    if len(shapes) < 2:
        return []
    known = [[size for axis, size in enumerate(shape) if axis != rank] for shape in shapes]
    return [] if known[0] == known[1] else [f"{name}: has shape {shapes[0]}, in the tree {shapes[1]}"]


def _raise(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
        raise ValueError("the arrays do not fit:\n  " + "\n  ".join([*problems[:_MOST], *more]))
