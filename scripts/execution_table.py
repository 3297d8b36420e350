"""Writes docs/results/execution.md: the choice between factored and merged kernels in whole networks, on TPUs.

    python -m scripts.execution_table              # an hour on two cores; continues where it was stopped
    python -m scripts.execution_table --part=0/2   # every second result; another process can compute the others

Compiles the training step of three networks for three TPU generations at several scales: dense, all kernels factored, all
merged, and as chosen by the cost model (`auto`).  The numbers are the compiler's estimates, stored in
docs/results/execution.json.  Needs libtpu (pip install 'lowrank_jax[tpu-preflight]') and no TPU.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from lowrank_jax.text import markdown_table
from scripts.compiled_steps import NETWORKS, SLICES, estimate, read
from scripts.results import RESULTS, Results

SCALES = (0.05, 0.25, 0.5)
ARMS = ("factored", "merged", "auto")
LIMIT = 1.02

HEAD = """# Factored or merged: the gain of choosing on TPUs

Estimates of the TPU's compiler for a whole training step, in milliseconds, on one of four chips; nothing was run. They are its
sum over operations (`optimal_seconds`) at the lowest effort; `python -m scripts.execution_table` writes this page. Images per
chip: 64 for ResNet-50 and ViT-B/16, 256 for EfficientNet-B0. `factored` and `merged` are the pure choices; `auto` is chosen by
`choose_execution` kernel by kernel, with the cost model of [mathematics](../mathematics.md#10-what-a-layer-costs); the last
column counts the kernels that it runs factored. In parentheses: ratio to the dense network.

"""


_results = Results("execution.json")


def key(network: str, chip: str, arm: str, scale: float) -> str:
    return f"{network}/{chip}/{arm}/{scale:g}"


def wanted() -> Iterator[str]:
    pairs = [(network, chip) for chip in ("v5e", "v6e", "v4") for network in NETWORKS]
    yield from (key(network, chip, "dense", 0.0) for network, chip in pairs)
    ends_first = sorted(SCALES, key=lambda scale: -abs(scale - 0.25))
    for scale, (network, chip), arm in itertools.product(ends_first, pairs, ARMS):
        yield key(network, chip, arm, scale)


def computed(name: str) -> dict[str, Any]:
    """The compiler's estimate of a training step."""
    network, chip, arm, scale = name.rsplit("/", 3)
    low_rank = {"lowrank.scale": scale, "lowrank.execution": arm} if arm != "dense" else {"lowrank.method": "none"}
    return estimate(name, read(network, low_rank), chip)


def dense_step(network: str, chip: str) -> float:
    """The seconds of the dense step; compiled now if that was never done."""
    name = key(network, chip, "dense", 0.0)
    if name not in _results.known():
        _results.note(name, computed(name))
    return _results.known()[name]["seconds"]


def page(results: dict[str, Any]) -> str:
    """The complete rows as tables, and whether the choice is within the limit."""
    text, worst, missing = [], {"dense": 0.0, "factored": 0.0, "merged": 0.0}, 0
    for chip in SLICES:
        rows = [["network", "scale", "dense", "factored", "merged", "auto", "kernels factored"]]
        for network, scale in itertools.product(NETWORKS, SCALES):
            names = {"dense": key(network, chip, "dense", 0.0), **{arm: key(network, chip, arm, scale) for arm in ARMS}}
            if not set(names.values()) <= results.keys():
                missing += 1
                continue
            arms = {arm: results[name] for arm, name in names.items()}
            times = {arm: found["seconds"] for arm, found in arms.items()}
            worst = {arm: max(worst[arm], times["auto"] / times[arm]) for arm in worst}
            cells = [f"{1e3 * times[arm]:.2f} ({times[arm] / times['dense']:.3f})" for arm in ARMS]
            chosen = f"{arms['auto']['factored']} of {arms['auto']['kernels']}"
            rows.append([network, f"{scale:g}", f"{1e3 * times['dense']:.2f}", *cells, chosen])
        if rows[1:]:
            text.append(f"## {chip}\n\n{markdown_table(rows)}\n")
    figures = ", ".join(f"{ratio:.3f} of {arm}" for arm, ratio in worst.items())
    verdict = "within" if max(worst.values()) <= LIMIT else "**not** within"
    text.append(f"The worst estimates of `auto` are {figures}: {verdict} the required 2 per cent.\n")
    if missing:
        text.append(f"**Not complete:** {missing} rows of {len(SLICES) * len(NETWORKS) * len(SCALES)} are not compiled yet.\n")
    return HEAD + "\n".join(text)


def main() -> None:
    _results.compute(__doc__, wanted(), computed)
    (RESULTS / "execution.md").write_text(page(_results.known()))


if __name__ == "__main__":
    main()
