"""How many kernels of other people's models are factored, and whether the factored models compute what they should.

    python -m scripts.third_party_models --checkouts=DIR                 # DIR/flax, DIR/big_vision, DIR/t5x, ...
    python -m scripts.third_party_models --checkouts=DIR --only='t5x|GPT'
    # what another version counts, in a folder OLD, for a column of its own:
    PYTHONPATH=OLD:. python -P -m scripts.third_party_models --checkouts=DIR --count > before.tsv
    python -m scripts.third_party_models --checkouts=DIR --before=before.tsv

A checkout is a clone of the project of that name on GitHub: google/flax, google-research/big_vision and vision_transformer,
scenic, google/init2winit, google-research/t5x.  Models of Hugging Face come from the package transformers, below version 5.
Nothing is downloaded, all weights are random, and a model whose code cannot be imported or built is named below the table.

Every model is planned with the rule ".*" at a quarter of full rank: as it is, with its own layers registered, and with
`rows="all_but_last"`.  Then, with all that can run on factors doing so and the rest factored by rows, `lr.apply` is set against
the plain model on `lr.merge` of the same factors, in values and in the gradients of all factors and other parameters.  Exits
with 1 if a difference is above the tolerance, 1e-3 of an array's largest entry: deep networks amplify roundings of float32, and
a product of three matrices has two orders; a layer that got a wrong kernel would be wrong in the first digit.
"""

import argparse
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lr
from scripts.third_party_zoo import MODELS, Example, use_checkouts

TOLERANCE = 1e-3
SCALE = 0.25
T = TypeVar("T")
EVERYTHING = lr.Rule(".*", scale=SCALE)
FLOOR = 1e-2  # of the largest gradient: below it, a gradient may be a sum that cancels


class Row(NamedTuple):
    """A line of the table: how many kernels a model has and how many are factored in each way, and the largest differences."""

    name: str
    kernels: int
    factored: int
    registered: int | None
    by_rows: int
    value: float
    gradient: float
    seconds: float

    @property
    def agree(self) -> bool:
        """Whether both differences are numbers within the tolerance."""
        return self.value <= TOLERANCE and self.gradient <= TOLERANCE


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, required=True, help="a folder with the projects' checkouts")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), help="models whose names contain this expression")
    parser.add_argument("--count", action="store_true", help="print names and counts alone; works with older versions too")
    parser.add_argument("--before", type=Path, help="what --count printed with another version, for a column of its own")
    parser.add_argument("--verbose", action="store_true", help="print plans, and tracebacks of what fails")
    args = parser.parse_args(argv)
    if not args.checkouts.is_dir():
        parser.error(f"--checkouts {args.checkouts}: no such folder")
    names = [name for name in MODELS if args.only.search(name)]
    if not names:
        parser.error(f"--only {args.only.pattern!r} matches none of: {', '.join(MODELS)}")
    use_checkouts(args.checkouts)
    jax.config.update("jax_disable_most_optimizations", True)  # compilation takes longer than anything else here
    if args.count:
        _tried(count, names, args.verbose)
        return 0
    rows = _tried(measure, names, args.verbose)
    before = dict(line.split("\t")[::2] for line in args.before.read_text().splitlines()) if args.before else {}
    print(table(rows, before))
    return int(not all(row.agree for row in rows))


def _tried(run: Callable[[str, Example, bool], T], names: Sequence[str], verbose: bool) -> list[T]:
    """What `run` makes of every model; those that fail are named with the reason."""
    rows = []
    for name in names:
        try:
            rows.append(run(name, MODELS[name](), verbose))
        except Exception as error:
            if verbose:
                traceback.print_exc()
            reason = (str(error).strip() or "no message").splitlines()[0]
            print(f"{name}: not run, {type(error).__name__}: {reason[:160]}", file=sys.stderr, flush=True)
    return rows


def count(name: str, example: Example, verbose: bool) -> None:
    """Prints a model's kernels and how many of them the rule factors."""
    params = jax.eval_shape(lambda: _init(example))["params"]
    try:
        plan = _plan(example)
        factored = str(len(plan.factored))
        if verbose:
            print(plan)
    except Exception as error:
        factored = type(error).__name__
    print(name, kernels(params), factored, sep="\t", flush=True)


def measure(name: str, example: Example, verbose: bool) -> Row:
    """A model's line."""
    start = time.perf_counter()
    plan = _plan(example)
    seconds = time.perf_counter() - start
    any_rows = lr.Rule(".*", scale=SCALE, rows="all_but_last")
    by_rows = _plan(example, any_rows)
    with _registered(example):
        known = _plan(example) if example.register else plan
        on_factors = [lr.Rule(re.escape(kernel.name), scale=SCALE) for kernel in known.factored]
        both = _plan(example, *on_factors, *[any_rows] * (len(known.factored) < len(known.kernels)))
        variables = _drawn(jax.jit(lambda: _init(example))())
        value, gradient = _differences(example, variables, both)
    if verbose:
        print(f"{name}\n{plan}\n\n{name}, what is compared\n{both}\n")
    registered = len(known.factored) if example.register else None
    counts = len(plan.factored), registered, len(by_rows.factored)
    row = Row(name, kernels(variables["params"]), *counts, value, gradient, seconds)
    print(*row, sep="\t", file=sys.stderr, flush=True)
    return row


def kernels(params: Any) -> int:
    """How many parameters have two axes or more, those of biases and norms aside."""
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(params))
    return sum(leaf.ndim >= 2 and getattr(path[-1], "key", "") not in ("bias", "scale") for path, leaf in leaves)


def _plan(example: Example, *rules: lr.Rule) -> lr.Plan:
    return lr.plan(example.model, example.inputs, rules or [EVERYTHING], **example.kwargs)


def _init(example: Example) -> Any:
    rngs = {name: jax.random.key(seed) for seed, name in enumerate(("params", "dropout", "lstm"))}
    return example.model.init(rngs, *example.inputs, **example.kwargs)


def _drawn(variables: Any) -> Any:
    """With noise on every parameter: one that starts at zero, as a last kernel may, would hide what happens before it."""
    leaves, tree = jax.tree.flatten(variables["params"])
    rng = np.random.default_rng(0)
    noisy = [leaf + 0.05 * rng.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return {**variables, "params": jax.tree.unflatten(tree, noisy)}


@contextmanager
def _registered(example: Example):
    """Registers the model's own layers, and forgets them afterwards."""
    from lowrank_jax.linen import known  # which older versions, for --count, do not have

    before = dict(known._KNOWN)
    if example.register is not None:
        example.register(lr.register_layer)
    try:
        yield
    finally:
        known._KNOWN.clear()
        known._KNOWN.update(before)


def _differences(example: Example, variables: Any, plan: lr.Plan) -> tuple[float, float]:
    """The largest relative difference of values, and of gradients, between the factors and their products."""
    params = lr.factorize(variables["params"], plan, key=jax.random.key(1))

    def on_factors(params: Any) -> Any:
        return lr.apply(example.model, {**variables, "params": params}, *example.inputs, **_call(example))

    def on_products(params: Any) -> Any:
        return example.model.apply({**variables, "params": lr.merge(params)}, *example.inputs, **_call(example))

    (ours, our_slopes), (theirs, their_slopes) = (_run(outputs, params) for outputs in (on_factors, on_products))
    return _difference(ours, theirs, 0.0), _difference(our_slopes, their_slopes, FLOOR)


def _call(example: Example) -> dict[str, Any]:
    return {**example.kwargs, "rngs": {"dropout": jax.random.key(1), "lstm": jax.random.key(2)}}


def _run(outputs: Callable[[Any], Any], params: Any) -> tuple[Any, Any]:
    """The floating outputs, and the gradient of a random linear function of them."""

    def loss(params: Any) -> tuple[jax.Array, list[jax.Array]]:
        values = [leaf for leaf in jax.tree.leaves(outputs(params)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        weights = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(values)]
        finite = [jnp.where(jnp.abs(leaf) < 1e6, leaf, 0) for leaf in values]  # attention's -inf and its like
        terms = [jnp.sum(a * b) / a.size**0.5 for a, b in zip(weights, finite, strict=True)]
        return jnp.stack(terms).sum(), finite

    grads, values = jax.jit(jax.grad(loss, has_aux=True))(params)
    return values, grads


def _difference(ours: Any, theirs: Any, floor: float) -> float:
    """The largest difference of an array's entries, relative to its largest entry or to a part of the largest of all."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    size = max(float(jnp.max(jnp.abs(b))) for _, b in pairs)
    return float(np.max([jnp.max(jnp.abs(a - b)) / max(float(jnp.max(jnp.abs(b))), floor * size, 1e-30) for a, b in pairs]))


def table(rows: Sequence[Row], before: dict[str, str]) -> str:
    """The rows in Markdown."""
    header = ["model", "kernels", "before", "factored", "registered", 'rows="all_but_last"', "values", "gradients", "plan, s"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(_cells(row, before) for row in rows)]
    keep = [index for index, title in enumerate(header) if title != "before" or before]
    return "\n".join(f"| {' | '.join(line[index] for index in keep)} |" for line in lines)


def _cells(row: Row, before: dict[str, str]) -> list[str]:
    registered = "" if row.registered is None else str(row.registered)
    counts = [str(row.kernels), before.get(row.name, ""), str(row.factored), registered, str(row.by_rows)]
    return [row.name, *counts, f"{row.value:.0e}", f"{row.gradient:.0e}", f"{row.seconds:.1f}"]


if __name__ == "__main__":
    sys.exit(main())
