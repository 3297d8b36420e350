"""Writes docs/results/seconds.md: what budgets of seconds promise on TPUs, against what the TPU's compiler says of them.

    python -m scripts.seconds_table              # half an hour on two cores; continues where it was stopped
    python -m scripts.seconds_table --part=0/2   # every second result; another process can compute the others

Compiles the training step of three networks for three TPU generations with the ranks that `allocate` chooses for a budget of
seconds halfway between the least that is possible and the dense step; EfficientNet-B0 also with no more parameters than at a
scale of 0.25.  The numbers are the compiler's estimates, stored in docs/results/seconds.json; those of the dense steps are
`scripts.execution_table`'s.  Needs libtpu (pip install 'lowrank_jax[tpu-preflight]') and no TPU.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.plan import make_plan, plan_by_rules
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.planning.allocate import smallest_budgets
from lowrank_jax.planning.chips import CHIPS
from lowrank_jax.planning.execution import dense_seconds, rest_of_step, seconds
from lowrank_jax.planning.plans import FactoredKernel, PlannedKernel
from lowrank_jax.text import markdown_table
from scripts.compiled_steps import CHIPS_OF_SLICE, NETWORKS, SLICES, estimate, read
from scripts.execution_table import dense_step
from scripts.results import RESULTS, Results

SECONDS, BOTH = "seconds", "seconds and parameters"
ARMS = (*((network, SECONDS) for network in NETWORKS), ("EfficientNet-B0", BOTH))
SCALE = 0.25  # whose parameters BOTH has
QUARTER, OF_STEP = 0.25, 0.01  # how far promised and compiled savings may be apart

HEAD = f"""# Budgets of seconds: promised and compiled

What `lowrank.budget.seconds` promises for a training step, by the cost model of
[mathematics](../mathematics.md#10-what-a-layer-costs) and one compilation of the dense step, against the TPU's compiler's
estimate of the step that came of it: its sum over operations (`optimal_seconds`) at the lowest effort. Nothing ran. One of four
chips; images per chip: 64 for ResNet-50 and ViT-B/16, 256 for EfficientNet-B0. `python -m scripts.seconds_table` writes it.

The budget is halfway between the least that is possible, by the model and at ranks of at least 0.05 of full rank and 2, and the
dense step. Times are fractions of the dense step; `apart` is compiled less promised saving. The two should be within a quarter
of each other, or {OF_STEP} of the step.

Where the least is 1.000 there is nothing to save: the kernels are so narrow, or the chip is so fast, that it is the activations
which take the time, and the plan is the dense network. So no plan with the parameters of a scale of 0.25 makes EfficientNet-B0
faster.

Below that, with `min_scale=0` and the objective `correlation`, whole stages got rank 1, and the compiler saves up to twice what
is promised: of ResNet-50 0.869 was promised and 0.731 compiled on v5e, 0.887 and 0.723 on v6e, 0.870 and 0.768 on v4; of
ViT-B/16 0.867 and 0.822 on v5e, 0.922 and 0.753 on v6e; of EfficientNet-B0 0.913 and 0.840 on v5e, 0.919 and 0.828 on v6e, with
the parameters of a scale of 0.25 besides 0.914 and 0.839, 0.920 and 0.827. At 0.05 of full rank, but any rank, one layer of
EfficientNet-B0, the first expansion, had rank 1: 0.957 was promised and 0.885 compiled on v4, 0.951 and 0.909 on v5e, 0.954 and
0.903 on v6e. Layers of rank 1 are elementwise and fused with what is around them, of which the model knows a part; and nothing
would be left of such networks.

"""

_results = Results("seconds.json")


def key(network: str, chip: str, arm: str) -> str:
    return f"{network}/{chip}/{arm}"


def wanted() -> Iterator[str]:
    yield from (key(network, chip, arm) for network, arm in ARMS for chip in ("v5e", "v6e", "v4"))


def computed(name: str) -> dict[str, Any]:
    """The compiler's estimate of a training step, and what was promised."""
    network, chip, arm = name.rsplit("/", 2)
    promise, config = budgeted(network, chip, arm)
    if config is None:
        return promise
    if not make_plan(config).factored:  # the dense step itself
        return promise | {"seconds": dense_step(network, chip), "factored": 0, "kernels": 0, "params": 1.0}
    return promise | estimate(name, config, chip)


def budgeted(network: str, chip: str, arm: str) -> tuple[dict[str, float], Config | None]:
    """What a budget halfway between the least that is possible and the dense step promises, and the config with it.

    No config if no plan has so few parameters and takes no longer than the dense step.
    """
    config = read(network, {"lowrank.scale": SCALE})
    plan, batch, itemsize = plan_by_rules(config), config.batch_size // CHIPS_OF_SLICE, jnp.dtype(config.model.dtype).itemsize
    model = {"chip": CHIPS[chip], "batch": batch, "itemsize": itemsize}
    rest = rest_of_step(plan, dense_step(network, chip), **model)
    open_ = plan_by_rules(read(network, {"lowrank.scale": None, "lowrank.budget.params": 0.5}))
    least = smallest_budgets(open_, seconds=1.0, rest=rest, **model)["seconds"]
    budget = {"seconds": round((1 + least) / 2, 4), "chip": chip, "batch": batch, "rest": rest}
    if arm == BOTH:
        budget["params"] = round(plan.params / plan.dense_params, 4)
    try:
        config = read(network, {"lowrank.scale": None, **{f"lowrank.budget.{key}": value for key, value in budget.items()}})
        make_plan(config)
    except ConfigError as error:
        if "no plan was found that holds both" not in str(error):
            raise
        return {"least": least, "budget": budget["seconds"], "params": budget["params"]}, None
    kernels = sum(_seconds(kernel, **model) for kernel in make_plan(config).kernels)
    promised = (kernels + rest) / dense_step(network, chip)
    return {"least": least, "budget": budget["seconds"], "promised": promised}, config


def _seconds(kernel: PlannedKernel, **model: Any) -> float:
    if isinstance(kernel, FactoredKernel):
        assert kernel.execution is not None
        return seconds(kernel, kernel.execution, **model)
    return dense_seconds(kernel, **model)


def page(results: dict[str, Any]) -> str:
    """What is known as tables, and whether every promise is kept."""
    text, kept, missing = [], True, 0
    for chip in SLICES:
        rows = [
            [
                "network",
                "budget of",
                "parameters",
                "kernels factored",
                "least",
                "budget",
                "promised",
                "compiled",
                "apart",
                "kept",
            ]
        ]
        for network, arm in ARMS:
            found = results.get(key(network, chip, arm))
            if not found:
                missing += 1
                continue
            if "seconds" not in found:
                times = [f"{found[name]:.3f}" for name in ("least", "budget")]
                rows.append([network, arm, f"{found['params']:.3f}", "-", *times, "impossible", "-", "-", "-"])
                continue
            compiled = found["seconds"] / dense_step(network, chip)
            close = is_kept(1 - found["promised"], 1 - compiled)
            kept = kept and close
            kernels = f"{found['factored']} of {found['kernels']}"
            times = [*(f"{found[name]:.3f}" for name in ("least", "budget", "promised")), f"{compiled:.3f}"]
            apart = f"{found['promised'] - compiled:+.3f}"
            rows.append([network, arm, f"{found['params']:.3f}", kernels, *times, apart, "yes" if close else "**no**"])
        if rows[1:]:
            text.append(f"## {chip}\n\n{markdown_table(rows)}\n")
    text.append("All are kept.\n" if kept else "**Not all are kept.**\n")
    if missing:
        text.append(f"**Not complete:** {missing} rows of {len(SLICES) * len(ARMS)} are not compiled yet.\n")
    return HEAD + "\n".join(text)


def is_kept(promised: float, compiled: float) -> bool:
    """Whether two savings, as fractions of the dense step, are close."""
    return abs(compiled - promised) <= max(QUARTER * max(promised, compiled), OF_STEP)


def main() -> None:
    _results.compute(__doc__, wanted(), computed)
    (RESULTS / "seconds.md").write_text(page(_results.known()))


if __name__ == "__main__":
    main()
