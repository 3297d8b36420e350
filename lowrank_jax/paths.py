"""Names of leaves in a parameter tree, and ordered rules over them.

A leaf's name is its path joined by slashes: "stage1/block1/conv1/kernel".  A rule is a regular expression that must match the
whole name (see `patterns`); the first matching rule wins.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lowrank_jax.patterns import compile_pattern
from lowrank_jax.text import nearest

CATCH_ALL = ".*"


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf, from its key path in `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by name, in tree order.

    Raises:
      ValueError: two have the same name.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        name = leaf_name(path)
        if name in named:
            raise ValueError(f"two arrays are called {name!r}: a key of the tree has a slash in it")
        named[name] = leaf
    return named


def keys_with_slashes(tree: Any) -> tuple[str, ...]:
    """The keys of a tree that have a slash in them, such as those of `nn.WeightNorm`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    keys = dict.fromkeys(jax.tree_util.keystr((key,), simple=True) for path, _ in leaves for key in path)
    return tuple(key for key in keys if "/" in key)


def map_named(fn: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Maps `fn(name, leaf)` over a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(leaf_name(path), leaf), tree, is_leaf=is_leaf)


def first_match(patterns: Sequence[str], names: Sequence[str], *, suggest: Sequence[str] = ()) -> dict[str, int | None]:
    """The index of the first pattern that fully matches each name; None if none does.

    Args:
      patterns: regular expressions, in order.
      names: the names to match.
      suggest: names to suggest for a pattern that matches nothing; by default all names.

    Raises:
      ValueError: a pattern is not a regular expression, or is never the first to match, so that its settings would silently be
        ignored.  Only the catch-all ".*" may match nothing.
    """
    compiled = [compile_pattern(pattern) for pattern in patterns]
    matches = {name: next((i for i, p in enumerate(compiled) if p(name)), None) for name in names}
    used = set(matches.values())
    dead = [i for i, pattern in enumerate(patterns) if i not in used and pattern != CATCH_ALL]
    if dead:
        raise ValueError("\n".join(_dead_rule(patterns[i], compiled[i], names, suggest) for i in dead))
    return matches


def _dead_rule(text: str, matches: Callable[[str], bool], names: Sequence[str], suggest: Sequence[str]) -> str:
    if any(map(matches, names)):
        return f"rule {text!r} never applies: earlier rules match everything it matches; move it before them"
    return f"rule {text!r} matches no parameter; the nearest is {nearest(text, suggest or names)!r}"
