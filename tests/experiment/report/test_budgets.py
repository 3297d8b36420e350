"""Reports over runs whose ranks were chosen for a budget, written by hand."""

import io
import json

import pytest
from PIL import Image

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.report import figures, ranks
from lowrank_jax.experiment.report.arms import into_arms, paired
from lowrank_jax.experiment.report.page import Report
from lowrank_jax.experiment.report.stored_runs import find
from lowrank_jax.experiment.training import ranks as stored_by_training
from lowrank_jax.experiment.workdir.identity import digest_of
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests import running
from tests.stored import make

RANKS = {"layers_0/kernel": 3, "layers_1/kernel": None, "head/kernel": 1}


def budgets(home, name="a", values=(0.1, 0.25, 600), seeds=(0, 1), **changes):
    for value in values:
        for seed in seeds:
            make(home, f"{name}{value}{seed}", top1=0.5, lowrank__budget__params=value, seed=seed, ranks=RANKS, **changes)


def arms_of(home):
    return {(arm.label, arm.size): arm for arm in Report([str(home)]).arms}


def test_budgets_are_sizes_fractions_and_whole_numbers(tmp_path):
    budgets(tmp_path)
    make(tmp_path, "dense", top1=0.9, lowrank__method="none")
    header, *rows = Report([str(tmp_path)]).summary()
    assert header[:3] == ["budget.params", "arm", "params"]
    assert [row[:3] for row in rows] == [
        ["", "dense", "1k"],
        ["0.1", "kernel_projection", "100 (-90%)"],
        ["0.25", "kernel_projection", "250 (-75%)"],
        ["600", "kernel_projection", "600 (-40%)"],
    ]


def test_arms_of_budgets_pair_by_the_budget_as_those_of_scales_do(tmp_path):
    for value in (0.1, 0.25):
        for seed in (0, 1):
            shared = {"lowrank__budget__params": value, "seed": seed}
            make(tmp_path, f"s{value}{seed}", top1=0.5 + value, lowrank__method="spectral", **shared)
            make(tmp_path, f"p{value}{seed}", top1=0.3 + 2 * value, **shared)
    arms = into_arms(find([str(tmp_path)]), [])
    differences = paired(arms, ("lowrank.method", "spectral"), "eval/top1")
    assert [dict(d.arm.size) for d in differences] == [{"lowrank.budget.params": 0.1}, {"lowrank.budget.params": 0.25}]
    assert [d.interval.mean for d in differences] == pytest.approx([-0.1, 0.05])


def test_the_scale_that_a_budget_takes_the_place_of_counts_for_nothing(tmp_path):
    budgets(tmp_path, values=(0.1,), seeds=(0,))
    config = json.loads((tmp_path / "a0.10" / "config.json").read_text())
    config["lowrank"]["scale"] = 0.5
    make(tmp_path, "again", top1=0.5, lowrank__budget__params=0.1, seed=0)
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    (tmp_path / "again" / "result.json").unlink()
    found = find([str(tmp_path)])
    assert [(run.name, run.status) for run in found.runs] == [("a0.10", "done"), ("again", "repeated")]
    assert "lowrank.scale" not in found.varied


def test_budgets_and_scales_are_lines_of_their_own(tmp_path):
    budgets(tmp_path, values=(0.1, 0.25), seeds=(0,))
    make(tmp_path, "macs", top1=0.5, lowrank__budget__macs=0.5)
    make(tmp_path, "both", top1=0.5, lowrank__budget__macs=0.5, lowrank__budget__params=0.5)
    make(tmp_path, "scale", top1=0.5, lowrank__scale=0.1)
    found = arms_of(tmp_path)
    assert sorted(label for label, _ in found) == [
        "kernel_projection",
        "kernel_projection, budget macs",
        "kernel_projection, budget params",
        "kernel_projection, budget params",
        "kernel_projection, budget params and macs",
    ]
    assert ("kernel_projection", (("lowrank.scale", 0.1),)) in found
    # What only says how a budget is meant does not tell the run without one apart.
    assert not any("objective" in label for label, _ in found)


def test_other_objectives_and_warm_ups_are_arms_of_their_own(tmp_path):
    budgets(tmp_path, values=(0.1,), seeds=(0,))
    budgets(tmp_path, "b", values=(0.1,), seeds=(0,), lowrank__budget__objective="risk")
    budgets(tmp_path, "c", values=(0.1,), seeds=(0,), lowrank__dense_warmup="5 steps")
    assert {label for label, _ in arms_of(tmp_path)} == {
        "kernel_projection, budget.objective tolerance",
        "kernel_projection, budget.objective risk",
        "kernel_projection, budget.objective tolerance, dense_warmup 5 steps",
    }
    differences = paired(Report([str(tmp_path)]).arms, ("lowrank.budget.objective", "tolerance"), "eval/top1")
    assert [d.arm.label for d in differences] == ["kernel_projection, budget.objective risk"]


def test_the_ranks_of_a_budget_are_drawn(tmp_path):
    budgets(tmp_path, values=(0.1, 0.25))
    make(tmp_path, "scale", top1=0.5, lowrank__scale=0.1)
    report = Report([str(tmp_path)])
    pictures = figures.draw(report.arms, report.found.best)
    with Image.open(io.BytesIO(pictures["ranks.png"])) as picture:
        assert picture.size[0] > 500
    report.write(tmp_path / "out")
    assert "![ranks.png](ranks.png)" in (tmp_path / "out" / "report.md").read_text()


def test_without_a_budget_nothing_is_drawn_and_the_record_is_not_read(tmp_path):
    make(tmp_path, "scale", top1=0.5, lowrank__scale=0.1)
    (tmp_path / "scale" / "ranks.json").write_text("damaged")
    report = Report([str(tmp_path)])
    assert "ranks.png" not in figures.draw(report.arms, report.found.best)
    assert report.found.runs[0].done


@pytest.mark.parametrize("text", ["damaged", "[]", "{}", '{"ranks": {"a": {"rank": 0}}}', '{"ranks": {"a": 3}}'])
def test_a_damaged_record_of_ranks_is_listed_where_it_is_needed(tmp_path, text):
    budgets(tmp_path, values=(0.1,))
    (tmp_path / "a0.10" / "ranks.json").write_text(text)
    report = Report([str(tmp_path)])
    assert [(run.name, run.status) for run in report.found.runs] == [("a0.10", "damaged"), ("a0.11", "done")]
    assert "ranks.json is damaged" in report.console() and len(report.arms[0].runs) == 1


def test_ranks_of_another_run_are_not_reported(tmp_path):
    """Those of the run that a longer one extends are its own."""
    longer = {"steps": 60, "extensions": (("20 steps", "restart"), ("40 steps", "restart"))}
    for name, changes in {"own": {}, "strange": {"seed": 1}, "longer": longer}.items():
        make(tmp_path, name, top1=0.5, lowrank__budget__params=0.1, ranks=RANKS, **changes)
    for name, owner in {"own": {}, "strange": {"seed": 0}, "longer": {"steps": 20}}.items():
        changes = {"lowrank__budget__params": 0.1, **owner}
        digest = digest_of(running.config(**changes))
        folder = Workdir(tmp_path / name)
        folder.write_json("ranks.json", {**(folder.read_json("ranks.json") or {}), "experiment": digest})
    assert {run.name: run.status for run in Report([str(tmp_path)]).found.runs} == {
        "own": "done", "strange": "damaged", "longer": "done",
    }  # fmt: skip


def test_a_run_that_has_stored_no_ranks_is_compared_all_the_same(tmp_path):
    make(tmp_path, "a", top1=0.5, lowrank__budget__params=0.1)
    report = Report([str(tmp_path)])
    assert report.found.runs[0].done and "ranks.png" not in figures.draw(report.arms, report.found.best)


def test_what_training_stores_is_what_the_report_reads(tmp_path):
    config = running.config(lowrank__budget__params=0.5)
    plan = configs.make_plan(config)
    folder = Workdir(tmp_path / "run")
    folder.claim(configs.to_dict(config))
    stored_by_training.write(folder, config, stored_by_training.Decided(0, plan))
    found = ranks.read(folder, folder.read_config())
    assert found == {kernel.name: getattr(kernel, "rank", None) for kernel in plan.kernels if kernel.choices}
    assert any(found.values())


def test_arms_of_the_same_ranks_share_a_line(tmp_path):
    budgets(tmp_path, "p", values=(0.1,))
    budgets(tmp_path, "s", values=(0.1,), lowrank__method="spectral")
    assert figures._of_alike(Report([str(tmp_path)]).arms) == "budget.params 0.1, kernel_projection and 1 more"
