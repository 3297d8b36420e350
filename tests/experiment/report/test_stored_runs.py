"""What a report reads of runs with two phases, written by hand."""

import csv
import io
import math

import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.report import figures
from lowrank_jax.experiment.report.page import Report
from lowrank_jax.experiment.report.stored_runs import read
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from tests import running, stored

RATES = {10: 1.0, 20: 30.0, 30: 40.0, 40: 50.0, 50: 400.0, 60: 600.0, 70: 500.0}


def make(home, name, rates=RATES, first=None, begin=None, **changes):
    """A finished run with these images/s by log line, and what its result says about the first phase."""
    folder = Workdir(home / name)
    folder.claim(configs.to_dict(configs.read(configs.default(), running.settings(**changes))))
    if begin:
        folder.metrics.append({"step": begin})
    for step, rate in rates.items():
        folder.metrics.append({"step": step, "train/loss": 1.0, "train/images_per_second": rate})
    folder.write_json("result.json", {**stored.result(), **(first or {})})
    return read(folder.path, name)


@pytest.mark.parametrize("kind", ["dense_steps", "guided_steps"])
@pytest.mark.parametrize(
    ("switch", "before", "after"),
    [
        (40, 40.0, 550.0),  # without the windows in which a phase begins
        (45, 40.0, 550.0),  # the fifth window is of both
        (5, math.nan, 225.0),  # the first one is
        (10, 1.0, 400.0),  # where a phase has no other window, that in which it begins counts
        (60, 50.0, 500.0),
        (65, 50.0, math.nan),
    ],
)
def test_the_speed_of_each_phase_is_that_of_its_own_windows(tmp_path, kind, switch, before, after):
    run = make(tmp_path, "run", first={kind: switch})
    assert run.figure("images/s before") == pytest.approx(before, nan_ok=True)
    assert run.figure("images/s") == pytest.approx(after, nan_ok=True)


@pytest.mark.parametrize("first", [None, {"dense_steps": 0, "guided_steps": 0}])
def test_a_run_of_one_phase_has_one_speed_also_where_its_result_is_of_an_earlier_version(tmp_path, first):
    run = make(tmp_path, "run", first=first)
    assert run.figure("images/s") == 225.0 and math.isnan(run.figure("images/s before"))


def test_where_metrics_begin_late_no_window_counts_that_may_be_of_both_phases(tmp_path):
    rates = {step: rate for step, rate in RATES.items() if step > 40}
    run = make(tmp_path, "run", rates, first={"dense_steps": 30}, begin=45)
    assert run.figure("images/s") == 550.0 and math.isnan(run.figure("images/s before"))


def test_the_report_has_the_speed_before_the_switch_where_there_was_one(tmp_path):
    make(tmp_path, "plain", lowrank__scale=0.5)
    assert "images/s before" not in Report([str(tmp_path)]).summary()[0]
    assert "images/s before" not in Report([str(tmp_path)]).csv()
    make(tmp_path, "warm", first={"dense_steps": 45}, lowrank__dense_warmup="45 steps", steps=70)
    make(tmp_path, "late", first={"dense_steps": 65}, lowrank__dense_warmup="65 steps", steps=70)
    report = Report([str(tmp_path)])
    header, *rows = report.summary()
    speeds = {row[1]: row[header.index("images/s") : header.index("images/s") + 2] for row in rows}
    assert header[header.index("images/s") + 1] == "images/s before"
    assert sorted(speeds.values()) == [["", "50"], ["225", ""], ["550", "40"]]
    table = {row["run"]: row for row in csv.DictReader(io.StringIO(report.csv()))}
    assert float(table["warm"]["images/s"]) == 550 and float(table["warm"]["images/s before"]) == 40
    assert "the network that training ends with" in report.markdown()
    assert figures.draw(report.arms, report.found.best)["top1_speed.png"]


@pytest.mark.parametrize("wrong", [-1, 1.5, "x", [], True])
def test_a_switch_that_is_no_step_damages_the_run(tmp_path, wrong):
    make(tmp_path, "good")
    with pytest.raises(WorkdirError, match="dense_steps"):
        make(tmp_path, "bad", first={"dense_steps": wrong}, seed=1)
