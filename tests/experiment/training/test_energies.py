"""Rules of a config that give an energy: open until the dense warm-up ends, and decided once."""

import json
import shutil

import numpy as np
import pytest

import lowrank_jax as lr
import lowrank_jax.experiment as lx
from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.plan import plan_by_rules
from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.evaluation.watch import watch
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training import ranks
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.training.overview import overview
from lowrank_jax.experiment.training.phases import phases_of
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import DenseKernel, OpenKernel
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")

ENERGY = 0.7
RULES = ({"path": "dense./kernel", "energy": ENERGY}, {"path": "head/kernel", "energy": 1.0})
WARM = {
    "lowrank__rules": RULES,
    "lowrank__dense_warmup": "14 steps",
    "eval__every": "10 steps",
    "checkpoint__every": "7 steps",
    "checkpoint__keep": 9,
}
OPEN = "the rank is open until the dense warm-up ends; dense here"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(running.config(**WARM), str(folder))


def asked_for(folder, step, energy=ENERGY):
    """By kernel, the smallest rank that keeps the energy of the dense network of a step."""
    params = named_leaves(lx.restore(folder, step=step, raw=True).variables["params"])
    found = {}
    for name in ("dense1/kernel", "dense2/kernel"):
        squares = np.linalg.svd(np.asarray(params[name], np.float64), compute_uv=False) ** 2
        found[name] = int(np.argmax(np.cumsum(squares) >= energy * squares.sum())) + 1
    return found


def recorded(folder):
    record = json.loads((folder / "ranks.json").read_text())
    return record["step"], {name: entry and entry["rank"] for name, entry in record["ranks"].items()}


def test_the_ranks_are_those_that_the_trained_kernels_keep_the_energy_at(whole):
    folder, run = whole
    expected = asked_for(folder, 14)
    assert recorded(folder) == (14, {**expected, "head/kernel": None})
    assert {name: named_leaves(run.state.params)[f"{name}/u"].shape[-1] for name in expected} == expected
    result = json.loads((folder / "result.json").read_text())
    assert result["params"] == sum(leaf.size for leaf in named_leaves(run.state.params).values()) < result["dense_params"]
    text = (folder / "overview.txt").read_text()
    assert "\nAfter step 14\n" in text and "open" not in text
    assert "energy 1.0: its rank would not be smaller" in text and "budget" not in text


def test_what_is_restored_and_evaluated_has_them(whole):
    folder, _ = whole
    dense, low_rank = (lx.restore(folder, step=step) for step in (14, "latest"))
    assert not dense.plan.factored
    assert {kernel.name: kernel.rank for kernel in low_rank.plan.factored} == asked_for(folder, 14)
    assert lx.evaluate(folder).params == low_rank.plan.params < lx.evaluate(folder, step=14).params


@pytest.mark.parametrize("killed", [9, 14, 27])
def test_a_run_that_is_killed_resumes_to_the_same_bits(whole, tmp_path, killed):
    with running.dying_after(killed):
        train(running.config(**WARM), str(tmp_path / "run"))
    running.assert_same(train(running.config(**WARM), str(tmp_path / "run")).state, whole[1].state)
    assert recorded(tmp_path / "run") == recorded(whole[0])


def test_they_are_never_computed_again_and_a_lost_record_is_noticed(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "40")

    def computed(*args, **kwargs):
        raise AssertionError("ranks are computed again")

    for place in ("config.plan.allocate", "training.switch.allocated"):
        monkeypatch.setattr(f"lowrank_jax.experiment.{place}", computed)
    running.assert_same(train(running.config(**WARM), str(folder)).state, whole[1].state)
    (folder / "ranks.json").unlink()
    for call in (lambda: train(running.config(**WARM), str(folder)), lambda: lx.restore(folder)):
        with pytest.raises((WorkdirError, lx.UserError), match=r"ranks\.json is missing"):
            call()


def test_a_watch_from_before_the_switch_goes_on_after_it(whole, tmp_path, monkeypatch):
    run, said = tmp_path / "run", []
    later = ("20", "21", "28", "30", "35", "40")  # names, not a pattern: the files in a checkpoint begin with any digit
    shutil.copytree(whole[0], run, ignore=shutil.ignore_patterns("ranks.json", "result.json", *later))

    def sleep(seconds, stop):
        shutil.copytree(whole[0], run, dirs_exist_ok=True)

    monkeypatch.setattr("lowrank_jax.experiment.evaluation.watch._sleep", sleep)
    outcome = watch([str(run)], Evaluator(), poll=0.1, say=said.append, complain=said.append)
    assert not outcome.failed, said
    steps = [json.loads(line)["step"] for line in (run / "watch_test.jsonl").read_text().splitlines()]
    assert steps == sorted(int(step.name) for step in (run / "checkpoints").iterdir() if step.name.isdigit())


def test_a_stop_before_the_switch_leaves_a_network_that_can_be_evaluated(tmp_path, monkeypatch):
    stop, placed = running.Stop(), []

    def count(*args):
        placed.append(1)
        stop.requested = len(placed) >= 8
        return put_batch(*args)

    monkeypatch.setattr("lowrank_jax.experiment.training.loop.put_batch", count)
    assert train(running.config(**WARM), str(tmp_path / "run"), stop=stop).interrupted
    text = (tmp_path / "run" / "overview.txt").read_text()
    assert text.count(OPEN) == 3 and "the ranks of energies are open" in text
    assert not lx.restore(tmp_path / "run").plan.factored
    evaluated = lx.evaluate(tmp_path / "run")
    assert evaluated.params == evaluated.dense_params


def test_with_a_budget_they_are_bounds(tmp_path):
    """Which the budget alone would go beyond: dense1 stays dense, or has a higher rank, by its forecast."""
    config = running.config(**WARM, lowrank__budget={"params": 0.9}, steps=16)
    train(config, str(tmp_path / "run"))
    step, found = recorded(tmp_path / "run")
    bounds = asked_for(tmp_path / "run", 14)
    assert step == 14 and found == {**bounds, "head/kernel": None}
    before = {kernel.name: getattr(kernel, "rank", None) for kernel in configs.make_plan(config).kernels}
    assert any(before[name] is None or before[name] > bound for name, bound in bounds.items())
    text = overview(config, 8)
    assert "by shapes and costs alone; ranks are chosen then, from the trained weights, and energies bound them" in text


def test_moments_say_which_share_is_meant(tmp_path):
    config = running.config(**WARM, lowrank__moment_batches=2, optim__lr=1e-30, steps=16)  # the rate changes nothing
    train(config, str(tmp_path / "run"))
    assert recorded(tmp_path / "run")[1]["dense1/kernel"] < asked_for(tmp_path / "run", 14)["dense1/kernel"]


def test_a_warmup_of_its_own_accord_looks_at_open_kernels(tmp_path):
    changes = {**WARM, "lowrank__dense_warmup": "auto", "batch_size": 256, "optim__lr": 0.5, "steps": 24}
    train(running.config(**changes), str(tmp_path / "run"))
    assert recorded(tmp_path / "run")[0] == 12  # half of training: they do not settle at this rate
    lines = [line for line in running.metrics(tmp_path / "run") if "stable_rank/dense1/kernel" in line]
    assert [line["step"] for line in lines] == [6, 12] and "stable_rank/head/kernel" in lines[0]


def test_before_training_what_is_open_is_named_and_counts_as_dense(tmp_path):
    config = running.config(**{**WARM, "lowrank__rules": RULES[:1]})
    plan = configs.make_plan(config)
    assert [type(kernel).__name__ for kernel in plan.kernels] == ["OpenKernel", "OpenKernel", "FactoredKernel"]
    assert [kernel.name for kernel in plan.factored] == ["head/kernel"]
    head = plan.factored[0]
    assert plan.params == plan.dense_params - head.params + head.planned_params
    text = overview(config, 8)
    assert text.count(f"energy {ENERGY}") == text.count(OPEN) == 2
    assert "After step 14, the ranks of energies are open, and their kernels count as dense; they are chosen then" in text
    phases = phases_of(config, ranks.settle(Workdir(str(tmp_path)), config))
    assert phases.decided is None and phases.last.shapes.params["dense1"]["kernel"].shape == (64, 32)
    assert ranks.settle(Workdir(str(tmp_path)), config) is None


def test_the_library_itself_goes_on_with_no_open_rank():
    config = running.config(**WARM)
    with pytest.raises(ValueError, match=r"the plan has no rank for 'dense1/kernel' and 2 more"):
        _ = plan_by_rules(config).factored
    assert all(isinstance(kernel, OpenKernel) for kernel in configs.make_plan(config).kernels)
    with pytest.raises(ValueError, match="pass variables="):
        lr.allocate(configs.make_plan(config))


def test_the_dense_arm_of_a_sweep_has_no_energies():
    config = running.config(lowrank__rules=RULES, lowrank__method="none")
    assert all(type(kernel) is DenseKernel for kernel in configs.make_plan(config).kernels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "lowrank.rules: the energy of rule 'dense./kernel' needs trained weights to go by"),
        ({"lowrank__self_guided": "5 steps"}, "needs trained weights to go by"),
        ({"lowrank__budget": {"params": 0.5}}, "needs trained weights to go by"),
        (
            {"lowrank__dense_warmup": "5 steps", "lowrank__budget": {"params": 0.5, "min_scale": 0.1}},
            "lowrank.budget.min_scale: 0.1; the rank that the energy of rule 'dense./kernel' asks for may be smaller",
        ),
        ({"lowrank__dense_warmup": "often"}, "lowrank.dense_warmup: 'often'; must be one of 'auto', or a duration"),
        ({"lowrank__rules": ({"path": "head/kernel", "energy": 0.9, "rank": 3},)}, "has both rank 3 and energy 0.9; give one"),
        ({"lowrank__rules": ({"path": "head/kernel", "energy": 1.5},)}, "energy 1.5 must be in (0, 1]"),
        ({"lowrank__rules": ({"path": "head/kernel", "enery": 0.5},)}, "unknown key 'enery'; did you mean energy?"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(changes, message):
    with pytest.raises(ConfigError) as caught:
        running.config(**{"lowrank__rules": RULES, **changes})
    (problem,) = caught.value.problems
    assert message in problem


def test_a_budget_that_energies_might_make_impossible_is_refused_at_the_start():
    """A product of factors takes longer than the dense layer, and an energy might ask for one all the same."""
    merged = {"path": ".*/kernel", "execution": "merged"}
    changes = {"lowrank__dense_warmup": "5 steps", "lowrank__budget": {"seconds": 1.0, "chip": "h100"}}
    assert not configs.make_plan(running.config(**changes, lowrank__rules=(merged,))).factored
    with pytest.raises(
        ConfigError, match=r"lowrank\.budget: the budget is impossible; seconds=1\.0: the smallest possible is 1\."
    ):
        running.config(**changes, lowrank__rules=({**merged, "energy": 0.5},))
