"""A dense warm-up, the switch to low rank, and ranks that are decided once."""

import itertools
import json
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lr
import lowrank_jax.experiment as lx
from lowrank_jax.experiment.config import ConfigError
from lowrank_jax.experiment.config.plan import make_plan
from lowrank_jax.experiment.config.schema import OptimConfig
from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.evaluation.watch import watch
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.optim import make_optimizer
from lowrank_jax.experiment.training import ranks
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.training.phases import phases_of
from lowrank_jax.experiment.training.resume import _are_stable_ranks
from lowrank_jax.experiment.training.stable_ranks import StableRanks
from lowrank_jax.experiment.training.state import TrainState, key
from lowrank_jax.experiment.training.switch import carried
from lowrank_jax.experiment.workdir.identity import digest_of
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.kernel import LowRankKernel, is_low_rank
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import Plan
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")

WARM = {
    "lowrank__dense_warmup": "14 steps",
    "lowrank__budget": {"params": 0.4},
    "lowrank__moment_batches": 2,
    "optim__ema_decay": 0.5,
    "eval__every": "10 steps",
}

AUTO = {"lowrank__dense_warmup": "auto", "batch_size": 256, "eval__every": "1000 steps", "checkpoint__every": "4 steps"}
SETTLED = {**AUTO, "steps": 24, "optim__lr": 0.5, "checkpoint__keep": 9, "lowrank__budget__params": 0.4}
EVALUATED = {"eval__every": "5 steps", "checkpoint__every": "5 steps", "checkpoint__keep": 9}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(running.config(**WARM), str(folder))


@pytest.fixture(scope="module")
def settled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settled") / "run"
    return folder, train(running.config(**SETTLED), str(folder))


def steps_of(folder):
    return sorted(int(step.name) for step in (folder / "checkpoints").iterdir() if step.name.isdigit())


def test_a_run_is_dense_and_then_of_the_ranks_that_the_budget_affords(whole):
    folder, run = whole
    record = json.loads((folder / "ranks.json").read_text())
    assert record["step"] == 14
    ranks = {name: entry["rank"] for name, entry in record["ranks"].items() if entry}
    pairs = named_leaves(run.state.params, is_leaf=is_low_rank)
    assert ranks and ranks == {name: pair.u.shape[-1] for name, pair in pairs.items() if is_low_rank(pair)}
    result = json.loads((folder / "result.json").read_text())
    assert result["params"] <= 0.4 * result["dense_params"]
    assert result["params"] == sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    assert int(run.state.step) == 40
    losses = [line["train/loss"] for line in running.metrics(folder) if "train/loss" in line]
    assert losses[-1] < losses[0]
    overview = (folder / "overview.txt").read_text()
    assert overview.startswith("Dense warm-up\n") and "\nAfter step 14\n" in overview
    assert all(f"  {kernel['risk']:.4f}  " in overview for kernel in record["worth"].values())


def test_both_phases_are_evaluated_as_what_they_are(tmp_path):
    config = running.config(**WARM, checkpoint__keep=5)
    train(config, str(tmp_path / "run"))
    assert steps_of(tmp_path / "run") == [10, 14, 20, 30, 40]
    dense, low_rank = (lx.restore(tmp_path / "run", step=step) for step in (14, 20))
    assert not dense.plan.factored and low_rank.plan.factored
    assert dense.step == 14 and not any(map(is_low_rank, jax.tree.leaves(dense.variables["params"], is_leaf=is_low_rank)))
    for step, network in ((14, dense), (20, low_rank)):
        evaluated = lx.evaluate(tmp_path / "run", step=step)
        assert evaluated.params == network.plan.params
        line = next(line for line in running.metrics(tmp_path / "run") if line["step"] == 20 and "eval/top1" in line)
        if step == 20:
            assert evaluated.metrics["top1"] == line["eval/top1"]


@pytest.mark.parametrize("killed", [9, 14, 15, 27])
def test_a_run_that_is_killed_resumes_to_the_same_bits(whole, tmp_path, killed):
    """Before the switch, in it (its checkpoint is there, the low-rank network is not), right after, and later."""
    config = running.config(**WARM, checkpoint__every="5 steps")
    with running.dying_after(killed):
        train(config, str(tmp_path / "run"))
    running.assert_same(train(config, str(tmp_path / "run")).state, whole[1].state)
    assert json.loads((tmp_path / "run/ranks.json").read_text()) == json.loads((whole[0] / "ranks.json").read_text())


def test_a_stop_at_the_switch_resumes_to_the_same_bits(whole, tmp_path, monkeypatch):
    stop, placed = running.Stop(), []

    def count(*args):
        placed.append(1)
        stop.requested = len(placed) >= 14
        return put_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr("lowrank_jax.experiment.training.loop.put_batch", count)
        assert train(running.config(**WARM), str(tmp_path / "run"), stop=stop).interrupted
    assert steps_of(tmp_path / "run")[-1] == 14 and not (tmp_path / "run" / "ranks.json").exists()
    running.assert_same(train(running.config(**WARM), str(tmp_path / "run")).state, whole[1].state)


def test_ranks_that_were_decided_are_never_computed_again(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    shutil.rmtree(folder / "checkpoints" / "40")
    (folder / "result.json").unlink()

    def computed(*args, **kwargs):
        raise AssertionError("ranks are computed again")

    for place in ("config.plan.allocate", "training.switch.allocated", "training.ranks.make_plan"):
        monkeypatch.setattr(f"lowrank_jax.experiment.{place}", computed)
    running.assert_same(train(running.config(**WARM), str(folder)).state, whole[1].state)
    assert lx.restore(folder).plan.factored
    assert lx.evaluate(folder).params < lx.evaluate(folder).dense_params


def test_ranks_are_those_of_the_file_and_a_damaged_one_is_refused(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    text = (folder / "ranks.json").read_text()
    for damaged in (text.replace('"rank": ', '"rank": 1'), text.replace('"step": 14', '"step": 15'), "{}", text[:50]):
        (folder / "ranks.json").write_text(damaged)
        for call in (lambda: train(running.config(**WARM), str(folder)), lambda: lx.restore(folder)):
            with pytest.raises((WorkdirError, lx.UserError), match=r"ranks\.json is damaged"):
                call()
    other = train(running.config(**WARM, seed=1, steps=16), str(tmp_path / "other"))
    assert other.state.step == 16
    shutil.copy(tmp_path / "other" / "ranks.json", folder)
    with pytest.raises((WorkdirError, lx.UserError), match=r"ranks\.json is damaged: it is another experiment's"):
        lx.restore(folder)
    (folder / "ranks.json").unlink()
    with pytest.raises((WorkdirError, lx.UserError), match=r"ranks\.json is missing"):
        train(running.config(**WARM), str(folder))
    with pytest.raises((WorkdirError, lx.UserError), match=r"ranks\.json is missing"):
        lx.restore(folder)


def test_ranks_in_a_run_that_chooses_none_are_to_be_removed(tmp_path):
    """Those of another run, and such as say that they are its own."""
    plain, budget = running.config(steps=10), running.config(lowrank__budget={"params": 0.4}, steps=10)
    train(plain, str(tmp_path / "plain"))
    train(budget, str(tmp_path / "budget"))
    foreign = Workdir(tmp_path / "budget").read_json("ranks.json") or {}
    named = {"it is another experiment's": {}, "it names no experiment": {"experiment": None}}
    for reason, change in {**named, "chooses no ranks": {"experiment": digest_of(plain)}}.items():
        record = {**foreign, **change}
        Workdir(tmp_path / "plain").write_json("ranks.json", record)
        for call in (lambda: train(plain, str(tmp_path / "plain")), lambda: lx.restore(tmp_path / "plain")):
            with pytest.raises((WorkdirError, lx.UserError), match=rf"ranks\.json is damaged: .*{reason}; remove it"):
                call()
    (tmp_path / "plain" / "ranks.json").unlink()
    assert lx.restore(tmp_path / "plain").step == 10
    Workdir(tmp_path / "budget").write_json("ranks.json", {**foreign, "experiment": digest_of(plain)})
    with pytest.raises(WorkdirError, match=r"it is another experiment's; put it back as it was"):
        train(budget, str(tmp_path / "budget"))
    shutil.rmtree(tmp_path / "budget" / "checkpoints")
    with pytest.raises(WorkdirError, match=r"it is another experiment's; remove it, as no checkpoint has its ranks"):
        ranks.read(Workdir(tmp_path / "budget"), budget)


def test_the_overview_shows_what_ranks_lose_also_where_they_were_read_back(tmp_path):
    config = running.config(lowrank__budget={"params": 0.4}, steps=10)
    for _ in range(2):  # decided, then read
        train(config, str(tmp_path / "run"))
        header, *rows = (tmp_path / "run" / "overview.txt").read_text().splitlines()
        assert "risk" in header.split() and "next 1%" in header
        for line, kernel in zip(rows, lx.config.make_plan(config).kernels, strict=False):
            worth = {value for name, value in kernel.worth().items() if name in header}  # not all of it is known
            assert {kernel.name, *worth} <= {*line.split()} and len(worth) == 2 and kernel.risk is not None
    record = Workdir(tmp_path / "run").read_json("ranks.json") or {}
    del record["worth"]  # as earlier versions wrote it
    Workdir(tmp_path / "run").write_json("ranks.json", record)
    train(config, str(tmp_path / "run"))
    assert "risk" not in (tmp_path / "run" / "overview.txt").read_text()


def test_a_restart_decides_the_ranks_anew_and_keeps_the_old_ones(whole, tmp_path, capsys):
    """What the old ones are counts for nothing: of another version, or damaged."""
    plain, warm = tmp_path / "plain", tmp_path / "warm"
    config = running.config(lowrank__budget={"params": 0.4}, steps=10)
    train(config, str(plain))
    shutil.copytree(whole[0], warm)
    for folder, settings in ((plain, config), (warm, running.config(**WARM))):
        decided = json.loads((folder / "ranks.json").read_text())
        dense = {"ranks": dict.fromkeys(decided["ranks"]), "worth": {}}
        other = json.dumps({name: value for name, value in (decided | dense).items() if name != "check"})
        (folder / "ranks.json").write_text(other)
        shutil.rmtree(folder / "checkpoints")
        train(settings, str(folder), restart=True)
        assert f"{folder}: ranks are decided anew; the old ones are in ranks-1.json" in capsys.readouterr().out
        assert json.loads((folder / "ranks.json").read_text()) == decided
        assert (folder / "ranks-1.json").read_text() == other
        train(settings, str(folder), restart=True)  # it has checkpoints by now
        assert "has finished" in capsys.readouterr().out and not (folder / "ranks-2.json").exists()


def test_a_budget_without_a_warmup_is_decided_before_training(tmp_path, monkeypatch):
    config = running.config(lowrank__budget={"params": 0.4}, steps=10)
    first = train(config, str(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "ranks.json").read_text())
    assert record["step"] == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0.3 * result["dense_params"] < result["params"] <= 0.4 * result["dense_params"]
    kernels = named_leaves(first.state.params, is_leaf=is_low_rank)
    assert {name: entry["rank"] for name, entry in record["ranks"].items() if entry} == {
        name: leaf.u.shape[-1] for name, leaf in kernels.items() if is_low_rank(leaf)
    }


def test_the_rules_alone_decide_without_a_budget(tmp_path):
    config = running.config(lowrank__dense_warmup="10 steps", steps=20)
    run = train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "ranks.json").exists()
    expected = train(running.config(steps=20), str(tmp_path / "scratch"))
    shapes = [{name: leaf.shape for name, leaf in named_leaves(each.state.params).items()} for each in (run, expected)]
    assert shapes[0] == shapes[1]


def test_a_lost_record_is_noticed_where_training_itself_ended_the_warmup(tmp_path):
    config = running.config(**AUTO, steps=24, optim__lr=0.5)
    train(config, str(tmp_path / "run"))
    (tmp_path / "run" / "ranks.json").unlink()
    for call in (lambda: train(config, str(tmp_path / "run")), lambda: lx.restore(tmp_path / "run")):
        with pytest.raises((WorkdirError, lx.UserError), match=r"ranks\.json is missing, which has the ranks of checkpoint 24"):
            call()


def test_the_best_step_is_one_of_the_low_rank_network(tmp_path):
    """However much better the dense one was."""
    config = running.config(lowrank__dense_warmup="30 steps", lowrank__rank=1, lowrank__scale=None, optim__lr=0.3, **EVALUATED)
    train(config, str(tmp_path / "run"))
    top1 = {line["step"]: line["eval/top1"] for line in running.metrics(tmp_path / "run") if "eval/top1" in line}
    assert top1[30] > max(top1[35], top1[40])
    best = json.loads((tmp_path / "run" / "result.json").read_text())["best_step"]
    assert best == max((35, 40), key=lambda step: (top1[step], step))
    assert lx.restore(tmp_path / "run", step="best").plan.factored


def test_a_watch_from_before_the_switch_goes_on_after_it(whole, tmp_path, monkeypatch):
    run, said = tmp_path / "run", []
    shutil.copytree(whole[0], run, ignore=shutil.ignore_patterns("ranks.json", "result.json", "20", "30", "40"))

    def sleep(seconds, stop):
        shutil.copytree(whole[0], run, dirs_exist_ok=True)

    monkeypatch.setattr("lowrank_jax.experiment.evaluation.watch._sleep", sleep)
    outcome = watch([str(run)], Evaluator(), poll=0.1, say=said.append, complain=said.append)
    assert not outcome.failed, said
    assert [json.loads(line)["step"] for line in (run / "watch_test.jsonl").read_text().splitlines()] == steps_of(run)


def test_how_layers_run_may_change_between_two_starts(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    for execution in ("merged", "premerged", "factored"):
        config = running.config(**WARM, lowrank__execution=execution)
        phases = phases_of(config, ranks.settle(Workdir(str(folder)), config))
        assert {kernel.execution for kernel in phases.last.plan.factored} == {execution}


def test_decay_rules_may_be_for_either_phase(tmp_path):
    rules = (("head/kernel", 0.0), (".*/kernel/[uv]", 2.0), (".*kernel", 1.0), (".*", 0.0))
    run = train(running.config(**{**WARM, "steps": 16}, optim__decay_rules=rules), str(tmp_path / "run"))
    assert int(run.state.step) == 16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lowrank__dense_warmup": "40 steps"}, "lowrank.dense_warmup: 40 steps; training has 40"),
        ({"lowrank__dense_warmup": "0 steps"}, "lowrank.dense_warmup: 0 steps; must be above 0"),
        ({"lowrank__dense_warmup": "often"}, "must be one of 'auto', or a duration"),
        ({"lowrank__budget": {"params": 0.0001}}, "lowrank.budget: the budget is impossible; params=0.0001: the smallest"),
        ({"lowrank__budget": {"params": 1.5}}, "lowrank.budget.params: 1.5; must be a fraction"),
        ({"lowrank__budget": {"seconds": 0.5}}, "lowrank.budget.chip: seconds need a chip"),
        ({"lowrank__budget": {"chip": "v5e"}}, "lowrank.budget.chip: says nothing without a budget"),
        ({"lowrank__budget": {"bytes": 0.5, "seconds": 0.9, "chip": "v5e"}}, "bytes and seconds cannot be budgets at once"),
        (
            {"lowrank__dense_warmup": "9 steps", "lowrank__method": "random"},
            "it would forget what the dense network has learned",
        ),
        ({"lowrank__budget": {"params": 0.5, "macs": 0.5, "bytes": 0.5}}, "at most two kinds"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        running.config(**changes)
    assert message in str(error.value)


def _state(optimizer: optax.GradientTransformation, gradients: list[Any], params: Any, ema: bool = False) -> TrainState:
    opt_state = optimizer.init(params)
    for gradient in gradients:
        _, opt_state = optimizer.update(gradient, opt_state, params)
    average = {"params": jax.tree.map(lambda leaf: leaf + 1, params), "batch_stats": {}} if ema else {}
    return TrainState(jnp.int32(len(gradients)), params, {}, opt_state, average)


def _pair() -> tuple[Any, Any]:
    """Dense parameters, and the same with one kernel as factors of rank 3."""
    keys = jax.random.split(jax.random.key(0), 4)
    u, v = jax.random.normal(keys[0], (7, 3)), jax.random.normal(keys[1], (3, 5))
    bias, other = jax.random.normal(keys[2], (5,)), jax.random.normal(keys[3], (4, 4))
    dense = {"a": {"kernel": u @ v, "bias": bias}, "b": {"kernel": other}}
    return dense, {"a": {"kernel": LowRankKernel(u, v), "bias": bias}, "b": {"kernel": other}}


def _gradients(params: Any, count: int) -> list[Any]:
    def gradient(i: int) -> Any:
        return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(10 * i + leaf.size), leaf.shape), params)

    return [gradient(i) for i in range(count)]


def test_momentum_of_sgd_is_what_it_would_have_been_at_these_factors():
    """The gradients of U and V are G Vᵀ and UᵀG, and momentum is a sum of gradients."""
    dense, factored = _pair()
    optimizer = optax.chain(optax.trace(0.9, nesterov=True), optax.scale_by_learning_rate(lambda step: 0.1))
    gradients = _gradients(dense, 3)
    old = _state(optimizer, gradients, dense)
    new = carried(old, factored, optimizer, "sgd")
    pair = factored["a"]["kernel"]
    by_chain_rule = [
        {"a": {**g["a"], "kernel": LowRankKernel(g["a"]["kernel"] @ pair.v.T, pair.u.T @ g["a"]["kernel"])}, "b": g["b"]}
        for g in gradients
    ]
    expected = _state(optimizer, by_chain_rule, factored)
    for name, leaf in named_leaves(expected.opt_state).items():
        np.testing.assert_allclose(named_leaves(new.opt_state)[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name)  # float32
    assert int(new.step) == 3


def test_the_first_step_of_adam_after_the_switch_is_that_of_a_fresh_one():
    dense, factored = _pair()
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(optax.linear_schedule(1.0, 0.0, 10)))
    new = carried(_state(optimizer, _gradients(dense, 4), dense), factored, optimizer, "adamw")
    gradient = _gradients(factored, 1)[0]
    updates, _ = optimizer.update(gradient, new.opt_state, factored)
    # Whatever the gradient: of a fresh Adam the first step is its sign, and the rate is that of step 4.
    for leaf, slope in zip(jax.tree.leaves(updates), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(leaf, -0.6 * np.sign(slope), rtol=1e-4)


@pytest.mark.parametrize("name", ["rmsprop", "lars"])
def test_momentum_of_steps_begins_anew_for_factors_alone(name):
    dense, factored = _pair()
    make = {"rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9, initial_scale=1.0), "lars": lambda: optax.lars(0.1)}[name]
    old = _state(make(), _gradients(dense, 3), dense)
    new = named_leaves(carried(old, factored, make(), name).opt_state)
    fresh, before = named_leaves(make().init(factored)), named_leaves(old.opt_state)
    assert new.keys() == fresh.keys()
    for leaf_name, leaf in new.items():
        expected = fresh if leaf_name.endswith(("/u", "/v")) else before
        np.testing.assert_array_equal(leaf, expected[leaf_name], err_msg=leaf_name)


@pytest.mark.parametrize("decay", ["frobenius_decay", "nuclear_decay"])
def test_factors_may_have_other_multipliers_of_decay_than_their_kernels(decay):
    dense, factored = ({"a": params["a"]} for params in _pair())
    settings = OptimConfig(momentum=0.9, weight_decay=0.1, **{decay: 0.1})
    before, after = (make_optimizer(settings, optax.constant_schedule(0.1), params) for params in (dense, factored))
    new = carried(_state(before, _gradients(dense, 2), dense), factored, after, "sgd")
    assert jax.tree.structure(new.opt_state) == jax.tree.structure(after.init(factored))
    assert jax.tree.structure(new.opt_state) != jax.tree.structure(before.init(dense))
    assert float(jnp.abs(optax.tree.get(new.opt_state, "trace")["a"]["kernel"].u).min()) > 0


def test_averages_of_factors_begin_with_the_factors():
    dense, factored = _pair()
    optimizer = optax.trace(0.9)
    new = carried(_state(optimizer, [], dense, ema=True), factored, optimizer, "sgd")
    np.testing.assert_array_equal(new.ema["params"]["a"]["kernel"].u, factored["a"]["kernel"].u)
    np.testing.assert_array_equal(new.ema["params"]["a"]["bias"], dense["a"]["bias"] + 1)
    np.testing.assert_array_equal(new.ema["params"]["b"]["kernel"], dense["b"]["kernel"] + 1)


@pytest.mark.parametrize("svd", ["device", "host"])
def test_the_network_after_the_switch_is_factorize_of_the_one_before(tmp_path, svd):
    changes = {**WARM, "lowrank__moment_batches": 0, "init__svd": svd, "optim__lr": 1e-30}  # the rate changes nothing
    config = running.config(**changes, steps=15, checkpoint__keep=4)
    run = train(config, str(tmp_path / "run"))
    dense = lx.restore(tmp_path / "run", step=14, raw=True)
    plan = lx.restore(tmp_path / "run").plan
    expected = lr.factorize(dense.variables["params"], plan, key=key(config.seed, "factorize"))
    for name, leaf in named_leaves(lr.merge(expected)).items():
        np.testing.assert_allclose(named_leaves(lr.merge(run.state.params))[name], leaf, atol=2e-5, err_msg=name)


def test_a_warmup_of_its_own_accord_ends_when_stable_ranks_settle_and_resumes(tmp_path, monkeypatch):
    """Six batches are an epoch.  What it decides is what the figures in TensorBoard say."""
    config = running.config(**AUTO, steps=40, optim__lr=1e-3)
    whole = train(config, str(tmp_path / "whole"))
    step = json.loads((tmp_path / "whole" / "ranks.json").read_text())["step"]
    lines = [line for line in running.metrics(tmp_path / "whole") if any(key.startswith("stable_rank/") for key in line)]
    figures = [(line.pop("step"), {k: v for k, v in line.items() if k.startswith("stable_rank/")}) for line in lines]
    settled = [
        b for (_, before), (b, now) in itertools.pairwise(figures) if all(abs(now[name] - before[name]) <= 0.1 for name in now)
    ]
    assert figures[0][0] == 6 and step == settled[0] == figures[-1][0] and step < 20

    for killed in (step - 1, step, step + 5):
        with running.dying_after(killed):
            train(config, str(tmp_path / str(killed)))
        running.assert_same(train(config, str(tmp_path / str(killed))).state, whole.state)


def test_a_warmup_that_is_gone_through_again_logs_the_same(settled, tmp_path):
    """Its ranks are decided, and its newest checkpoints are gone: as after a kill while that of the switch was written."""
    folder = tmp_path / "run"
    shutil.copytree(settled[0], folder, ignore=shutil.ignore_patterns("12", "16", "20", "24", "result.json"))
    running.assert_same(train(running.config(**SETTLED), str(folder)).state, settled[1].state)
    seen, expected = ([line for line in running.metrics(run) if "train/loss" not in line] for run in (folder, settled[0]))
    assert seen == expected and any(key.startswith("stable_rank/") for line in seen for key in line)


def test_what_another_process_decides_before_it_frees_the_lock_counts(settled, tmp_path, monkeypatch):
    """It is read again: with the ranks of before, the other's checkpoints would be taken for damaged ones."""
    folder = tmp_path / "run"
    later = ("ranks.json", "result.json", "12", "16", "20", "24")
    shutil.copytree(settled[0], folder, ignore=shutil.ignore_patterns(*later))
    locked = Workdir.locked

    def locked_later(self, *args, **kwargs):
        shutil.copytree(settled[0], folder, dirs_exist_ok=True)
        return locked(self, *args, **kwargs)

    monkeypatch.setattr(Workdir, "locked", locked_later)
    running.assert_same(train(running.config(**SETTLED), str(folder)).state, settled[1].state)
    assert not (folder / "damaged").exists() and steps_of(folder) == steps_of(settled[0])


@pytest.mark.parametrize(
    ("warmup", "step"), [("14 steps", 0), ("14 steps", 40), ("auto", 0), ("auto", 21), ("auto", 2**62), (None, 5)]
)
def test_a_record_whose_step_the_first_phase_cannot_end_with_is_refused(tmp_path, warmup, step):
    config = running.config(lowrank__dense_warmup=warmup, lowrank__budget__params=0.4)
    folder = Workdir(tmp_path)
    ranks.write(folder, config, ranks.Decided(step, make_plan(config)))
    with pytest.raises(WorkdirError, match=rf"ranks\.json is damaged: its step is {step}, and the config's is"):
        ranks.read(folder, config)


def test_a_record_that_comes_with_its_checkpoint_while_it_is_looked_for_is_not_missing(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder, ignore=shutil.ignore_patterns("ranks.json"))
    stored = ranks.step_folders.stored

    def stored_now(directory):
        shutil.copy(whole[0] / "ranks.json", folder)
        return stored(directory)

    monkeypatch.setattr(ranks.step_folders, "stored", stored_now)
    assert ranks.read(Workdir(folder), running.config(**WARM)).step == 14


@pytest.mark.parametrize("rows", [[[1, {}], [2, {}], [6, {}]], [[99, {}]], [[6, {"a": None}]], [6], {}])
def test_stable_ranks_that_no_training_wrote_are_no_record(rows):
    assert not _are_stable_ranks(rows, 6)


def test_a_warmup_does_not_end_by_the_stable_ranks_of_other_kernels():
    looked = StableRanks(Plan((), 0), 6, 100, [(6, {"other": 1.0}), (12, {"kernel": 1.0})])
    assert not looked.settled(12)


def test_a_warmup_of_its_own_accord_takes_at_most_half_of_training(tmp_path):
    train(running.config(**AUTO, steps=24, optim__lr=0.5), str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "ranks.json").read_text())["step"] == 12


def test_stable_ranks_are_those_of_numpy():
    model = running.config().build_model()
    plan = lr.plan(model, jnp.zeros((1, 8, 8, 1)), [lr.Rule(".*kernel", scale=0.25)], train=False)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    seen = StableRanks(plan, 5, 100).look(5, params)
    for name, value in seen.items():
        singular = np.linalg.svd(np.asarray(named_leaves(params)[name], np.float64), compute_uv=False)
        np.testing.assert_allclose(value, (singular**2).sum() / singular[0] ** 2, rtol=1e-4)  # float32's eigenvalues
    assert seen.keys() == {kernel.name for kernel in plan.factored}


class Turn(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(24, name="dense")(x)), None


class Stacked(nn.Module):
    """A repeated layer with a kernel for each turn, or one for all of them, whose inputs are kept or not; and a shared one."""

    num_classes: int = 10
    kept: bool = True
    one: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(24, name="wide")(x.reshape(len(x), -1))
        axes = {} if self.one else {"params": 0}
        axes |= {"lowrank_inputs": 0} if self.kept else {}
        shared = {"variable_broadcast": "params"} if self.one else {}
        x, _ = nn.scan(Turn, variable_axes=axes, **shared, split_rngs={"params": not self.one}, length=3)(name="layers")(
            x, None
        )
        twice = nn.Dense(24, name="twice")
        return nn.Dense(self.num_classes, name="head")(twice(nn.relu(twice(x))))


STACKED = {
    "model__name": f"{__name__}:Stacked",
    "lowrank__moment_batches": 1,
    "lowrank__dense_warmup": "3 steps",
    "steps": 5,
}


@pytest.mark.parametrize("budget", [{}, {"params": 0.5}])
@pytest.mark.parametrize("one", [False, True])
def test_inputs_that_cannot_be_measured_at_the_switch_are_refused_at_the_start(one, budget):
    changes = {**STACKED, "model__kwargs": {"kept": False, "one": one}, "lowrank__budget": budget}
    with pytest.raises(ConfigError) as caught:
        running.config(**changes)
    (problem,) = caught.value.problems
    assert problem.startswith(
        "lowrank.moment_batches: cannot capture the inputs of 'layers/dense/kernel': under nn.scan and nn.vmap"
    )
    assert 'add "lowrank_inputs": 0 to variable_axes' in problem and problem.endswith("; or set it to 0")
    assert running.config(**{**changes, "lowrank__moment_batches": 0}).starts_dense
