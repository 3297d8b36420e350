import json
import os

import pytest

from lowrank_jax.experiment.config.files import ConfigError, to_dict
from lowrank_jax.experiment.sweep import trials
from lowrank_jax.experiment.sweep.emit import shell
from lowrank_jax.experiment.sweep.trials import Outcome, expand, known_outcome, record
from lowrank_jax.experiment.workdir.identity import config_digest
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from tests import running, stored

CONFIG = str(running.ROOT / "configs" / "digits_resnet.py")
HELD_OUT = [("dataset.train_split", "train[:80%]"), ("dataset.valid_split", "train[80%:]")]


def names(sweep):
    return [trial.name for trial in sweep.first]


def test_a_trial_is_lowrank_train_with_the_values_of_the_sweep(tmp_path):
    sweep = expand(CONFIG, [("epochs", "2")], "lowrank.scale=0.1; seed=0:2", str(tmp_path))
    first, second = sweep.first
    assert first.name == "scale=0.1,seed=0" and second.config.seed == 1
    assert first.config.epochs == 2 and first.config.lowrank.scale == 0.1
    assert first.workdir == str(tmp_path / first.name)
    assert list(second.command) == [
        "train",
        f"--config={CONFIG}",
        "--config.epochs=2",
        "--config.lowrank.scale=0.1",
        "--config.seed=1",
        f"--workdir={tmp_path / 'scale=0.1,seed=1'}",
    ]


def test_trials_of_a_config_by_name_are_those_by_path(tmp_path, monkeypatch):
    by_path = expand(CONFIG, [], "seed=0:2", str(tmp_path)).first
    monkeypatch.chdir(tmp_path)
    by_name = expand("digits_resnet", [], "seed=0:2", str(tmp_path)).first
    assert [trial.config for trial in by_name] == [trial.config for trial in by_path]
    assert [trial.command[1] for trial in by_name] == ["--config=digits_resnet"] * 2
    assert "lowrank train --config=digits_resnet --config.seed=1 " in shell(by_name)


def test_values_are_typed_by_the_config(tmp_path):
    sweep = expand(CONFIG, [], "optim.warmup=2,1 epoch; optim.nesterov=true,false; lowrank.rank=none", str(tmp_path))
    assert {str(trial.config.optim.warmup) for trial in sweep.first} == {"2 steps", "1 epochs"}
    assert {trial.config.optim.nesterov for trial in sweep.first} == {True, False}
    assert {trial.config.lowrank.rank for trial in sweep.first} == {None}


def test_the_dense_arm_appears_once(tmp_path):
    text = "lowrank.scale=0.05,0.1; lowrank.method=none,spectral; optim.frobenius_decay=0,1e-4; seed=0:2"
    found = names(expand(CONFIG, [], text, str(tmp_path)))
    assert [name for name in found if "none" in name] == ["method=none,seed=0", "method=none,seed=1"]
    assert len(found) == 2 + 2 * 2 * 2
    dense = names(expand(CONFIG, [("lowrank.method", "none")], "lowrank.scale=0.05,0.1; seed=0:2", str(tmp_path)))
    assert dense == ["seed=0", "seed=1"]


def test_budgets_are_swept_beside_one_dense_arm_and_the_table_has_their_sizes(tmp_path):
    text = "lowrank.budget.params=0.1,0.25; lowrank.budget.objective=risk,correlation; lowrank.method=none,spectral; seed=0:2"
    sweep = expand(CONFIG, [], text, str(tmp_path))
    assert [name for name in names(sweep) if "none" in name] == ["method=none,seed=0", "method=none,seed=1"]
    assert len(sweep.first) == 2 + 2 * 2 * 2
    assert names(sweep)[2] == "budget.params=0.1,budget.objective=risk,method=spectral,seed=0"
    header, *rows = (line.split() for line in sweep.table().splitlines()[:-1])
    assert header[-3:] == ["params", "MACs", "steps"]
    sizes = {row[0]: float(row[-3].rstrip("k")) for row in rows}
    dense = sizes["method=none,seed=0"]
    for share in (0.1, 0.25):
        found = [size for name, size in sizes.items() if f"params={share}," in name]
        assert len(found) == 4 and all(0.95 * share < size / dense < 1.01 * share for size in found)


@pytest.mark.parametrize(
    ("overrides", "text", "size"),
    [
        ([("lowrank.budget.params", "0.25")], "lowrank.scale=0.1,0.2", "scale: 0.1"),
        ([("lowrank.scale", "0.1")], "lowrank.budget.params=0.25,0.5", "scale: 0.1"),
        ([], "lowrank.scale=0.1; lowrank.budget.params=0.25,0.5", "scale: 0.1"),
        ([("lowrank.scale", "None")], "zip(lowrank.rank=2,3; lowrank.budget.params=0.25,0.5)", "rank: 2"),
    ],
)
def test_a_size_beside_a_budget_is_refused_wherever_the_two_are_given(tmp_path, overrides, text, size):
    with pytest.raises(ConfigError, match=rf"lowrank.{size}; lowrank.budget.params takes the place of"):
        expand(CONFIG, overrides, text, str(tmp_path))


def test_budgets_and_scales_may_be_compared(tmp_path):
    text = "zip(lowrank.scale=0.1,None; lowrank.budget.params=None,0.1)"
    uniform, budget = expand(CONFIG, [], text, str(tmp_path)).first
    assert uniform.config.lowrank.scale == 0.1 and not uniform.config.lowrank.budget.amounts
    assert budget.config.lowrank.budget.amounts == {"params": 0.1}


def test_ranks_that_training_chooses_are_said_to_be_unknown(tmp_path):
    text = "lowrank.budget.params=0.25; lowrank.dense_warmup=None,1 epoch"
    table = expand(CONFIG, [], text, str(tmp_path)).table()
    expected = (
        "Params and MACs after a dense warm-up: by shapes and costs alone; ranks are chosen then, from the trained weights."
    )
    assert table.splitlines()[-1] == expected
    energies = [("lowrank.rules", "({'path': '.*', 'energy': 0.9},)"), ("lowrank.dense_warmup", "1 epoch")]
    table = expand(CONFIG, energies, "lowrank.scale=0.1,0.2", str(tmp_path)).table()
    assert table.count("are open, and their kernels count as dense; they are chosen then, from the trained weights.") == 1
    dense = expand(CONFIG, [], "lowrank.method=none", str(tmp_path)).table()
    assert table.splitlines()[1].split()[-3] == dense.splitlines()[1].split()[-3]
    with pytest.raises(
        ConfigError,
        match=r"rule '\.\*' needs trained weights to go by: .*\(in dense_warmup=None\)",
    ):
        expand(CONFIG, energies[:1], "lowrank.dense_warmup=None,1 epoch", str(tmp_path))
    known = expand(CONFIG, [], "lowrank.scale=0.1; lowrank.dense_warmup=None,1 epoch", str(tmp_path))
    assert "trained weights" not in known.table()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lowrank.scael=0.1", "lowrank.scael: unknown key; did you mean lowrank.scale?"),
        ("lowrank.budget.parms=0.1", "lowrank.budget.parms: unknown key; did you mean lowrank.budget.params?"),
        ("lowrank.budget.params=0.1,0.01", r"params=0.01: the smallest possible is 0.0\d+ .* \(in budget.params=0.01\)"),
        (  # each is possible by itself
            "lowrank.budget.seconds=0.8; lowrank.budget.chip=v5e; lowrank.budget.min_scale=0.0; lowrank.budget.macs=0.05,0.1",
            "no plan was found that holds both .*macs=0.05",
        ),
        ("tune(lowrank.budget.params=0.1,0.2)", "lowrank.budget.params: cannot be tuned"),
        ("lowrank.scale=0.1,2", r"lowrank.scale: 2.0; must be in \(0, 1\]   \(in scale=2\)"),
        ("lowrank.method=spectal", "did you mean spectral?"),
        ("seed=0,-1", "seed: -1; must be from 0"),
        ("seed=0,x", "seed: 'x'; must be a whole number"),
        ("model.kwargs.nrm=batch", "model.kwargs.nrm: resnet8 has no such setting"),
        ("epochs=2", "epochs: both swept and set by --config.epochs"),
        ("tune(optim.lr=0.1,0.2)", "needs dataset.valid_split to choose on"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        expand(CONFIG, [("epochs", "2")], text, str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


def test_folders_of_hostile_values_are_plain_and_different(tmp_path):
    text = "dataset.train_split=train[:50%],train[50%:],train[:50%]+train[60%:]"
    found = names(expand(CONFIG, [], text, str(tmp_path)))
    assert len(set(found)) == 3
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_=,+-.") for name in found)


def finish(trial, top1, loss=0.0):
    folder = Workdir(trial.workdir)
    folder.claim(to_dict(trial.config))
    folder.write_json("result.json", stored.result(0.0, {"top1": top1, "loss": loss}))


def test_the_later_stage_takes_each_arms_best_by_validation(tmp_path):
    text = "lowrank.method=none,spectral; seed=0:3; tune(optim.lr=0.1,0.2,0.3)"
    sweep = expand(CONFIG, HELD_OUT, text, str(tmp_path))
    assert {trial.config.seed for trial in sweep.first} == {0} and len(sweep.first) == 6
    scores = {("none", 0.1): 0.5, ("none", 0.2): 0.7, ("none", 0.3): 0.6, ("spectral", 0.1): 0.8, ("spectral", 0.2): 0.1}
    for trial in sweep.first:
        score = scores.get((trial.config.lowrank.method, trial.config.optim.lr))
        if score is None:
            Workdir(trial.workdir).claim(to_dict(trial.config))
            Workdir(trial.workdir).note_failure(diverged=True, reason="loss is nan")
        else:
            finish(trial, score)
    assert [(t.config.lowrank.method, t.config.optim.lr, t.config.seed) for t in sweep.chosen()] == [
        ("none", 0.2, 1),
        ("none", 0.2, 2),
        ("spectral", 0.1, 1),
        ("spectral", 0.1, 2),
    ]
    assert "and 4 more: the other seeds at the best optim.lr" in sweep.table()


def test_the_later_stage_takes_the_lowest_where_lower_is_better(tmp_path):
    sweep = expand(CONFIG, [*HELD_OUT, ("eval.best", "-loss")], "seed=0:2; tune(optim.lr=0.1,0.2)", str(tmp_path))
    for trial, (top1, loss) in zip(sweep.first, [(0.9, 0.8), (0.1, 0.3)], strict=True):
        finish(trial, top1, loss)
    assert [trial.config.optim.lr for trial in sweep.chosen()] == [0.2]


def test_what_ended_for_good_is_known(tmp_path):
    done, diverged, failed, new = expand(CONFIG, [], "seed=0:4", str(tmp_path)).first
    finish(done, 0.5)
    for trial, way in ((diverged, True), (failed, False)):
        Workdir(trial.workdir).claim(to_dict(trial.config))
        Workdir(trial.workdir).note_failure(diverged=way, reason="why")
    assert known_outcome(done).status == "done" and known_outcome(diverged).status == "diverged"
    assert known_outcome(failed) is None and known_outcome(new) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", {}),
        ("result.json", {"valid": 3}),
        ("result.json", {"valid": {"top1": "x", "loss": 1}}),
        ("result.json", stored.result()),  # without the held-out split
        ("result.json", stored.result(valid={"top1": 0.5, "loss": 1.0}) | {"config_digest": None}),
        ("result.json", []),
        ("stopped.json", {"x": 1}),
        ("failure.json", {"status": "diverged", "reason": 3}),
    ],
)
def test_what_is_no_record_of_this_trial_does_not_end_it(tmp_path, name, content):
    sweep = expand(CONFIG, HELD_OUT, "seed=0:2; tune(optim.lr=0.1)", str(tmp_path))
    (trial,) = sweep.first
    Workdir(trial.workdir).claim(to_dict(trial.config))
    Workdir(trial.workdir).write_text(name, json.dumps(content))
    assert trial.result() is None and known_outcome(trial) is None and sweep.chosen() == []


def test_a_result_of_another_seed_does_not_end_a_trial(tmp_path):
    own, other = expand(CONFIG, [], "seed=0:2", str(tmp_path)).first
    for trial, done in ((own, True), (other, False)):
        digest = config_digest(to_dict(trial.config))
        Workdir(own.workdir).claim(to_dict(own.config))
        Workdir(own.workdir).write_json("result.json", stored.result() | {"config_digest": digest})
        assert (known_outcome(own) == Outcome("done")) is done


def test_a_folder_of_another_experiment_stops_the_sweep(tmp_path):
    finish(expand(CONFIG, [], "seed=0:2", str(tmp_path)).first[1], 0.5)
    other = expand(CONFIG, [("optim.lr", "0.7")], "seed=0:2", str(tmp_path))
    with pytest.raises(WorkdirError, match=r"seed=1 belongs to another experiment: optim.lr is 0.1 there, 0.7 here"):
        trials.check_workdirs(other.first)


def test_a_log_that_is_a_pipe_stops_the_sweep_before_it_could_block(tmp_path):
    sweep = expand(CONFIG, [], "seed=0:2", str(tmp_path))
    Workdir(sweep.first[1].workdir).claim(to_dict(sweep.first[1].config))
    os.mkfifo(tmp_path / "seed=1" / "log.txt")
    with pytest.raises(WorkdirError, match=r"seed=1/log.txt is not a plain file"):
        trials.check_workdirs(sweep.first)


def test_a_trial_that_is_a_link_stops_the_sweep_before_it_could_write_elsewhere(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "seed=1").symlink_to(tmp_path / "outside")
    sweep = expand(CONFIG, [], "seed=0:2", str(tmp_path / "sweep"))
    with pytest.raises(WorkdirError, match=r"seed=1 is a link, and nothing is written through links"):
        trials.check_workdirs(sweep.first)


def test_a_second_sweep_of_a_folder_is_recorded_beside_the_first(tmp_path):
    for text in ("seed=0:2", "seed=1:3"):
        sweep = expand(CONFIG, [], text, str(tmp_path))
        record(tmp_path, sweep, sweep.first, f"lowrank sweep {text}")
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert list(stored["trials"]) == ["seed=0", "seed=1", "seed=2"]
    assert stored["commands"] == ["lowrank sweep seed=0:2", "lowrank sweep seed=1:3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr=0.1,1e-1", "lr=0.1 and lr=1e-1 are the same experiment"),
        ("model.kwargs={}; model.kwargs.norm=none", "model.kwargs: conflicts with model.kwargs.norm"),
        ("tune(seed=0,1)", "seed: cannot be tuned"),
        ("tune(lowrank.method=none,spectral)", "lowrank.method: cannot be tuned"),
        ("zip(seed=0,1; lowrank.scale=0.1,0.2); tune(optim.lr=0.1,0.2)", "the seed must be a term of its own"),
        ("seed=0:99999999999", "99999999999 values; must be at most 2000"),
        ("seed=0:1000; optim.lr=1,2,3", "3000 trials; must be at most 2000"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        expand(CONFIG, HELD_OUT, text, str(tmp_path))


def test_quotes_protect_and_come_off(tmp_path):
    (trial,) = expand(CONFIG, [], "optim.name='sgd'", str(tmp_path)).first
    assert trial.config.optim.name == "sgd"
