"""Reports over work directories written by hand, so that every number in them is known."""

import base64
import csv
import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.best import Best
from lowrank_jax.experiment.report import figures
from lowrank_jax.experiment.report.arms import Interval, into_arms, paired
from lowrank_jax.experiment.report.figures import draw
from lowrank_jax.experiment.report.page import Report
from lowrank_jax.experiment.report.stored_runs import find
from lowrank_jax.experiment.sweep.trials import expand
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from tests import running
from tests.stored import make

NOISE = [0.003, -0.002, 0.001, 0.0, -0.004]


def comparison(home):
    for seed, noise in enumerate(NOISE):
        make(home, f"dense{seed}", top1=0.95 + noise, seed=seed, lowrank__method="none", lowrank__scale=0.3)
        for scale in (0.1, 0.25):
            shared = {"seed": seed, "lowrank__scale": scale}
            make(home, f"spectral{scale}{seed}", top1=0.7 + scale + noise, loss=2.0, lowrank__method="spectral", **shared)
            gain = 0.01 + noise**2 if scale == 0.1 else noise * (-1) ** seed
            make(home, f"projection{scale}{seed}", top1=0.7 + scale + noise + gain, loss=1.0 + noise, **shared)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Runs for tests that only read them."""
    home = tmp_path_factory.mktemp("shared")
    comparison(home)
    return home


@pytest.fixture
def runs(shared, tmp_path):
    """The same runs, to write to."""
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_intervals_are_those_of_scipy_and_hold_the_mean_as_often_as_they_say():
    values = np.random.default_rng(0).normal(3, 2, (4000, 5))
    inside = 0
    for row in values:
        interval = Interval.of(row)
        inside += abs(interval.mean - 3) <= interval.half
    low, high = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    first = Interval.of(values[0])
    np.testing.assert_allclose([first.mean - first.half, first.mean + first.half], [low, high])
    assert abs(inside / len(values) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / len(values))  # four standard errors
    assert np.isnan(Interval.of([1.0]).half)


def test_where_weights_are_averaged_the_report_says_so_and_has_the_raw_ones_beside_them(tmp_path):
    make(tmp_path, "plain", top1=0.5, seed=1)
    report = Report([str(tmp_path)])
    assert "averaged" not in report.markdown() and "eval_raw" not in report.csv()
    make(tmp_path, "averaged", top1=0.9, raw=0.7, optim__ema_decay=0.99)
    report = Report([str(tmp_path)])
    assert "of the averaged weights where a run keeps them" in report.markdown()
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(report.csv()))}
    assert (rows["averaged"]["eval/top1"], rows["averaged"]["eval_raw/top1"]) == ("0.9", "0.7")
    assert rows["plain"]["eval_raw/top1"] == "nan"


def test_differences_are_paired_by_seed(shared):
    arms = into_arms(find([str(shared)]), ["optim.lr"])
    differences = {dict(d.arm.size)["lowrank.scale"]: d for d in paired(arms, ("lowrank.method", "spectral"), "eval/top1")}
    assert set(differences) == {0.1, 0.25}
    gains = [0.01 + noise**2 for noise in NOISE]
    reference = stats.ttest_rel([0.8 + n + g for n, g in zip(NOISE, gains, strict=True)], [0.8 + n for n in NOISE])
    interval = differences[0.1].interval
    np.testing.assert_allclose(
        [interval.mean - interval.half, interval.mean + interval.half], reference.confidence_interval(0.95), rtol=1e-6
    )
    assert interval.excludes_zero and not differences[0.25].interval.excludes_zero
    # Unpaired, the seeds' own spread would drown it less than here.
    assert interval.half < Interval.of(NOISE).half / 10


def test_the_table_has_an_arm_a_row_and_the_dense_one_once(shared):
    header, *rows = Report([str(shared)]).summary()
    assert header[:5] == ["scale", "arm", "params", "MACs", "top-1"]
    assert [(row[0], row[1]) for row in rows] == [
        ("", "dense"),
        ("0.1", "kernel_projection"),
        ("0.1", "spectral"),
        ("0.25", "kernel_projection"),
        ("0.25", "spectral"),
    ]
    spectral = rows[2]
    half = stats.t.ppf(0.975, 4) * np.std(NOISE, ddof=1) / np.sqrt(5)
    assert spectral[4] == f"{0.8 + np.mean(NOISE):.4f} ± {half:.4f}"
    assert (
        spectral[2].startswith("100 (-90%)") and spectral[5] == "5" and spectral[7] == "100"
    )  # the first window is not counted


def test_the_learning_rate_is_chosen_on_the_held_out_split_and_reported_on_test(tmp_path):
    held_out = {"dataset__train_split": "train[:90%]", "dataset__valid_split": "train[90%:]"}
    for lr, valid, top1 in ((0.1, 0.7, 0.9), (0.2, 0.8, 0.5), (0.3, 0.6, 0.99)):  # test would choose another one
        make(tmp_path, f"a{lr}", valid=valid, top1=top1, optim__lr=lr, **held_out)
    make(tmp_path, "a0.4", failure="loss is nan", optim__lr=0.4, **held_out)
    for seed in (1, 2):
        make(tmp_path, f"b{seed}", valid=0.1, top1=0.52, optim__lr=0.2, seed=seed, **held_out)
    make(tmp_path, "b3", failure="loss is nan", optim__lr=0.2, seed=3, **held_out)

    report = Report([str(tmp_path)])
    (arm,) = report.arms
    assert dict(arm.tuning) == {"optim.lr": 0.2} and set(arm.runs) == {0, 1, 2} and arm.missing == 1
    assert not arm.at_edge  # 0.3 and 0.4 lie beyond
    text = report.markdown()
    assert "lr 0.1: 0.7000; lr 0.2: 0.8000; lr 0.3: 0.6000; lr 0.4: diverged" in text
    assert f"{(0.5 + 2 * 0.52) / 3:.4f}" in text and "3 (1 missing)" in text
    assert text.count("loss is nan") == 2


def test_runs_are_compared_by_the_metric_that_judged_them(tmp_path):
    held_out = {"dataset__train_split": "train[:90%]", "dataset__valid_split": "train[90%:]", "eval__best": "-loss"}
    for lr, valid, loss in ((0.1, 0.9, 0.7), (0.2, 0.8, 0.4), (0.3, 0.99, 0.5)):  # top1 and test would choose another one
        make(tmp_path, f"a{lr}", valid=valid, top1=valid, optim__lr=lr, **held_out)
        folder = Workdir(tmp_path / f"a{lr}")
        result = folder.read_json("result.json") or {}
        parts = {"valid": {"top1": valid, "loss": loss}, "eval": {"top1": valid, "loss": 1 - lr}}
        folder.write_json("result.json", {**result, **parts})
    make(tmp_path, "other", top1=0.99, seed=7)
    report = Report([str(tmp_path)])
    (arm,) = report.arms
    assert dict(arm.tuning) == {"optim.lr": 0.2} and arm.interval("eval/loss").mean == 0.8
    text = report.markdown()
    assert "Loss, of which lower is better, on `test`" in text and "lr 0.1: 0.7000; lr 0.2: 0.4000; lr 0.3: 0.5000" in text
    assert "the tuning with the lowest loss on the held-out split" in text and "| loss | seeds |" in text
    assert "it was judged by top1, others by -loss of softmax_cross_entropy: report them apart" in text
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(report.csv()))}
    assert (rows["a0.2"]["valid/loss"], rows["a0.2"]["eval/loss"], rows["a0.2"]["eval/top1"]) == ("0.4", "0.8", "0.8")
    assert rows["other"]["status"] == "apart"
    assert {"loss_params.png", "curves.png"} <= {path.rpartition("/")[2] for path in report.write(tmp_path / "report")}


def test_lower_is_better_where_a_metric_says_so(tmp_path):
    for method, losses in (("spectral", (0.5, 0.52, 0.49)), ("kernel_projection", (0.3, 0.31, 0.33))):
        for seed, loss in enumerate(losses):
            make(tmp_path, f"{method}{seed}", top1=0.5, seed=seed, lowrank__method=method, eval__best="-loss")
            folder = Workdir(tmp_path / f"{method}{seed}")
            result = folder.read_json("result.json") or {}
            folder.write_json("result.json", {**result, "eval": {"top1": 0.5, "loss": loss}})
    text = Report([str(tmp_path)]).markdown()
    assert re.search(r"kernel_projection \| -0\.1\d+ \|.*\| better \|", text)


def test_the_losses_of_different_objectives_are_not_compared(tmp_path):
    for seed in (0, 1):
        make(tmp_path, f"softmax{seed}", top1=0.5, seed=seed, eval__best="-loss")
    make(tmp_path, "mse", top1=0.5, objective__name="mse", dataset__mixup=0.0)
    make(tmp_path, "unfinished", objective__name="mse", dataset__mixup=0.0, seed=1)
    report = Report([str(tmp_path)])
    assert [(run.name, run.status) for run in report.found.runs if not run.done] == [
        ("mse", "apart"),
        ("unfinished", "unfinished"),
    ]
    assert "it was judged by -loss of mse, others by -loss of softmax_cross_entropy: report them apart" in report.markdown()


def test_settings_of_the_same_name_are_told_apart(tmp_path):
    for name, every in (("mlp", "1 epoch"), ("resnet8", "2 epoch")):
        kwargs = {"model__kwargs": {}, "eval__every": every, "lowrank__rules": ()}
        make(tmp_path, name, top1=0.5, model__name=name, **kwargs)
    labels = [arm.label for arm in Report([str(tmp_path)]).arms]
    assert labels == [
        "kernel_projection, eval.every 1 epochs, model mlp",
        "kernel_projection, eval.every 2 epochs, model resnet8",
    ]


def test_the_other_metrics_are_on_the_page(tmp_path):
    for seed, method in ((0, "spectral"), (1, "spectral"), (0, "none")):
        make(tmp_path, f"{method}{seed}", top1=0.5, seed=seed, lowrank__method=method)
        folder = Workdir(tmp_path / f"{method}{seed}")
        own = {"f1": 0.25, "nobody": None} if method == "none" else {}
        result = folder.read_json("result.json") or {}
        folder.write_json("result.json", {**result, "eval": {"top1": 0.5, "top5": 0.8, **own, "loss": 0.5 + seed}})
    page = Report([str(tmp_path)]).markdown()
    assert "## Other metrics" in page and "top-5 | f1 | nobody | loss |" in page
    assert re.search(r"dense \| 0\.8000 \| 0\.2500 \|  \| 0\.5000 \|", page)
    assert re.search(r"spectral \| 0\.8000 ± 0\.0000 \|  \|  \| 1\.0000 ± ", page)


def test_what_the_objective_does_not_take_is_no_common_setting(tmp_path):
    make(tmp_path / "a", "mse", objective__name="mse", dataset__mixup=0.0)
    make(tmp_path / "b", "softmax")
    pages = [Report([str(tmp_path / each)]).markdown() for each in "ab"]
    assert [("objective.loss" in page, "objective.metrics" in page) for page in pages] == [(False, False), (True, True)]


def test_at_the_edge_of_what_was_tried_it_says_so(tmp_path):
    held_out = {"dataset__train_split": "train[:90%]", "dataset__valid_split": "train[90%:]"}
    for lr, valid in ((0.1, 0.7), (0.2, 0.8)):
        make(tmp_path, f"{lr}", valid=valid, top1=0.5, optim__lr=lr, **held_out)
    assert "at the edge of the values tried" in Report([str(tmp_path)]).markdown()


def test_without_a_held_out_split_nothing_is_chosen(tmp_path):
    for lr in (0.1, 0.2):
        make(tmp_path, f"{lr}", top1=lr, optim__lr=lr)
    report = Report([str(tmp_path)])
    assert [arm.label for arm in report.arms] == ["kernel_projection, lr 0.1", "kernel_projection, lr 0.2"]
    assert "nothing is chosen" in report.markdown()


def test_what_has_no_result_is_listed_with_the_reason(runs):
    make(runs, "diverged", failure="loss is nan at step 412", seed=7)
    make(runs, "half", seed=8)
    make(runs, "poor", seed=9)
    Workdir(runs / "poor").write_json("stopped.json", {"by": "asha", "step": 20})
    Workdir(runs).write_json("sweep.json", {"commands": ["lowrank sweep x"], "tuned": [], "trials": {"half": {}, "never": {}}})
    report = Report([str(runs)])
    text = report.markdown()
    for line in (
        "| `diverged` | diverged | loss is nan at step 412 |",
        "| `half` | unfinished | at step 20 |",
        "| `poor` | stopped | by asha at step 20 |",
        "| `never` | not started |  |",
    ):
        assert line in text
    assert "    lowrank sweep x" in text
    rows = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(rows) == 29 and {row["run"]: row["status"] for row in rows}["never"] == "not started"
    assert "4 of 29 runs without a result" in report.console()


def test_the_page_needs_no_other_file_and_the_markdown_only_its_own(shared, tmp_path):
    out = tmp_path / "out"
    paths = Report([str(shared)]).write(out)
    assert {path.rpartition("/")[2] for path in paths} == {path.name for path in out.iterdir()}
    html = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 4
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert html.count("<table>") == 3 and "<h1>mlp on digits</h1>" in html
    for name in re.findall(r"!\[.*?\]\((.*?)\)", (out / "report.md").read_text()):
        assert (out / name).exists()


def test_a_single_run_several_folders_and_the_report_of_a_report(runs, tmp_path):
    single = Report([str(runs / "dense0")])
    assert single.summary()[1][:2] == ["dense", "1k"]
    single.write(tmp_path / "single")
    both = Report([str(runs / "dense0"), str(runs / "spectral0.10")])
    assert [run.name for run in both.found.runs] == ["dense0", "spectral0.10"]
    before = Report([str(runs)]).markdown()
    shutil.copytree(tmp_path / "single", runs, dirs_exist_ok=True)  # beside the runs, where it must not disturb the next one
    assert Report([str(runs)]).markdown() == before


def test_runs_are_read_and_reports_written_where_fsspec_reaches(shared):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(shared), "/bucket/sweep", recursive=True)
    assert Report(["memory://bucket/sweep"]).markdown() == Report([str(shared)]).markdown()
    Report(["memory://bucket/sweep/dense0"]).write("memory://bucket/out")
    assert memory.cat("/bucket/out/report.html").startswith(b"<!doctype html>")


def test_other_settings_make_other_lines_and_their_own_comparisons(tmp_path):
    for seed in (0, 1):
        for decay in (0.0, 0.001):
            for method, top1 in (("spectral", 0.5), ("random", 0.4 + decay)):
                settings = {"lowrank__method": method, "optim__frobenius_decay": decay, "optim__weight_decay": 0.0}
                make(tmp_path, f"{method}{decay}{seed}", top1=top1, seed=seed, **settings)
        make(tmp_path, f"dense{seed}", top1=0.9, seed=seed, lowrank__method="none", optim__weight_decay=0.0)
    arms = Report([str(tmp_path)]).arms
    assert [arm.label for arm in arms] == [
        "dense",
        "random, frobenius_decay 0",
        "spectral, frobenius_decay 0",
        "random, frobenius_decay 0.001",
        "spectral, frobenius_decay 0.001",
    ]
    by_decay = {d.arm.label: d.interval.mean for d in paired(arms, ("optim.frobenius_decay", "0"), "eval/top1")}
    assert by_decay == pytest.approx({"random, frobenius_decay 0.001": 0.001, "spectral, frobenius_decay 0.001": 0.0})
    differences = {d.arm.label: d.interval.mean for d in paired(arms, ("lowrank.method", "spectral"), "eval/top1")}
    assert differences == pytest.approx({"random, frobenius_decay 0": -0.1, "random, frobenius_decay 0.001": -0.099})


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kwargs", [[{}, {"norm": "none"}], [{"norm": True}, {"norm": 1}]], ids=["missing", "alike"])
def test_a_setting_that_only_one_run_has_makes_two_arms(tmp_path, kwargs, seed):
    for number, more in enumerate(kwargs):
        make(tmp_path, f"run{number}", top1=0.5 + number / 10, seed=seed * number)
        config = Workdir(tmp_path / f"run{number}").read_config()
        config["model"]["kwargs"].update(more)
        Workdir(tmp_path / f"run{number}").write_json("config.json", config)
    arms = Report([str(tmp_path)]).arms
    names = [run.name for arm in arms for run in arm.runs.values()]
    assert sorted(names) == ["run0", "run1"]
    if {} in kwargs or not seed:
        assert len(arms) == 2


@pytest.mark.parametrize("damage", ["config.json", "result.json"])
def test_a_damaged_run_is_listed_beside_the_others(runs, damage):
    (runs / "dense0" / damage).write_text('{"a": ')
    report = Report([str(runs)])
    assert [(run.name, run.status) for run in report.found.runs if not run.done] == [("dense0", "damaged")]
    assert f"{damage} is damaged" in report.markdown() and len(report.arms[0].runs) == 4


def test_a_damaged_record_of_a_sweep_is_listed_beside_the_runs(runs):
    (runs / "sweep.json").write_text('{"a": ')
    report = Report([str(runs)])
    assert [(run.name, run.status) for run in report.found.runs if not run.done] == [("sweep.json", "damaged")]
    assert "sweep.json is damaged" in report.console() and len(report.arms) == 5


def test_a_size_is_a_rival_too(shared, tmp_path):
    report = Report([str(shared)], rival="lowrank.scale=0.1")
    text = report.markdown()
    assert "Paired differences from lowrank.scale 0.1" in text and "Of 2 comparisons" in text
    for difference in paired(report.arms, report.rival, "eval/top1"):
        assert (difference.arm.size, difference.rival.size) == ((("lowrank.scale", 0.25),), (("lowrank.scale", 0.1),))
        assert difference.arm.method == difference.rival.method
    for rank, norm in itertools.product((2, 4), (None, 0.5)):
        make(tmp_path, f"{rank}{norm}", top1=0.5, seed=0, lowrank__scale=None, lowrank__rank=rank, optim__clip_norm=norm)
    for rival in ("lowrank.rank=2", "optim.clip_norm=None", "optim.clip_norm=5e-1"):
        report = Report([str(tmp_path)], rival=rival)
        assert len(paired(report.arms, report.rival, "eval/top1")) == 2
    with pytest.raises(WorkdirError, match=r"no finished run has lowrank.rank=3; finished: 2, 4$"):
        Report([str(tmp_path)], rival="lowrank.rank=3")


@pytest.mark.parametrize(
    ("rival", "message"),
    [
        ("seed=0", "seed: runs that differ in their seed are one arm"),
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr"),
        ("optim.frobenius_decay=0", r"optim.frobenius_decay: it is \S+ in all runs, so none of them is a rival by it"),
        ("model.name=mlp", r"model.name: it is \S+ in all runs"),
    ],
)
def test_what_is_no_rival_is_named(shared, rival, message):
    with pytest.raises(WorkdirError, match=f"^--rival: {message}"):
        Report([str(shared)], rival=rival)


def test_a_tuned_setting_is_no_rival(tmp_path):
    for lr in (0.1, 0.2):
        make(tmp_path, f"{lr}", top1=0.5, seed=0, optim__lr=lr, valid=lr)
    with pytest.raises(WorkdirError, match=r"--rival: optim\.lr: every arm has the value of it that is best on the held-out"):
        Report([str(tmp_path)], rival="optim.lr=0.1")


def test_bands_of_the_pictures_say_what_they_are(shared, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("lowrank_jax.experiment.report.figures._png", lambda figure: drawn.append(figure) or b"")
    draw(Report([str(shared)]).arms, Best())
    titles = [figure.legends[0].get_title().get_text().replace("\n", " ") for figure in drawn]
    assert titles == [
        *["mean over seeds, and its 95% interval (Student's t)"] * 3,
        "mean over seeds; bands from the lowest to the highest",
    ]
    make(tmp_path, "one", top1=0.5, seed=0)
    draw(Report([str(tmp_path)]).arms, Best())
    assert [figure.legends[0].get_title().get_text() for figure in drawn[4:]] == [""] * 4


def test_a_line_that_is_being_written_is_left_out(runs):
    with (runs / "dense0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "train/lo')
    assert json.dumps(find([str(runs)]).runs[0].metrics[-1])


def test_no_runs_and_no_such_method_are_errors(shared, tmp_path):
    with pytest.raises(WorkdirError, match="is not a folder"):
        Report([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkdirError, match="no work directory found"):
        Report([str(tmp_path / "empty")])
    with pytest.raises(WorkdirError, match=r"no finished run has .*=random; finished: kernel_projection, spectral"):
        Report([str(shared)], rival="random")
    with pytest.raises(WorkdirError, match=r"--tune: optim\.lrr: unknown key; did you mean optim\.lr"):
        Report([str(shared)], tune=["optim.lrr"])


def test_before_anything_has_finished_there_is_a_report_too(runs, tmp_path):
    for file in runs.glob("*/result.json"):
        file.unlink()
    paths = Report([str(runs)]).write(tmp_path / "out")
    assert "No run has finished." in (tmp_path / "out" / "report.md").read_text()
    assert len(paths) == 3
    shutil.rmtree(tmp_path / "out")


def test_of_equals_the_sweep_and_the_report_choose_the_same(tmp_path):
    file = str(running.ROOT / "configs" / "digits_resnet.py")
    held_out = [("dataset.train_split", "train[:90%]"), ("dataset.valid_split", "train[90%:]")]
    sweep = expand(file, held_out, "seed=0:2; tune(optim.lr=0.1,0.2,0.3)", str(tmp_path))
    for trial, (top1, loss) in zip(sweep.first, [(0.5, 0.1), (0.7, 0.8), (0.7, 0.9)], strict=True):
        folder = Workdir(trial.workdir)
        folder.claim(configs.to_dict(trial.config))
        folder.metrics.append({"step": 1, "train/loss": 1.0, "train/images_per_second": 1.0})
        result = {"params": 1, "macs": 1, "seconds": 1, "versions": {}, "eval": {"top1": 0.5, "top5": 1, "loss": 1}}
        folder.write_json("result.json", {**result, "valid": {"top1": top1, "loss": loss}})
    (arm,) = Report([str(tmp_path)]).arms
    (second,) = sweep.chosen()
    assert dict(arm.tuning)["optim.lr"] == second.config.optim.lr == 0.2


def test_a_crash_at_one_learning_rate_does_not_hide_what_has_finished(tmp_path):
    held_out = {"dataset__train_split": "train[:90%]", "dataset__valid_split": "train[90%:]"}
    for lr, valid in ((0.1, 0.7), (0.2, 0.8)):
        make(tmp_path, f"a{lr}", valid=valid, top1=valid, optim__lr=lr, **held_out)
    make(tmp_path, "begun", optim__lr=0.3, **held_out)
    make(tmp_path, "crashed", optim__lr=0.4, **held_out)
    Workdir(tmp_path / "crashed").note_failure(diverged=False, reason="killed by SIGKILL")
    report = Report([str(tmp_path)])
    (arm,) = report.arms
    assert dict(arm.tuning) == {"optim.lr": 0.2}
    assert "lr 0.3: unfinished; lr 0.4: failed" in report.markdown()


def test_an_experiment_that_was_run_twice_counts_once(tmp_path):
    make(tmp_path, "b", top1=0.9)
    make(tmp_path, "c", top1=0.1)
    make(tmp_path, "a")  # and once not to its end
    report = Report([str(tmp_path)])
    (arm,) = report.arms
    assert [run.name for run in arm.runs.values()] == ["b"]
    assert report.markdown().count("the same experiment as b") == 2


def test_a_folder_given_twice_is_read_once_and_equal_names_are_told_apart(shared, tmp_path):
    assert len(Report([str(shared), str(shared / "dense0")]).found.runs) == 25
    for parent in ("x", "y"):
        make(tmp_path / parent, "s/a", top1=0.5, seed=ord(parent))
    names = {run.name for run in Report([str(tmp_path / "x" / "s"), str(tmp_path / "y" / "s")]).found.runs}
    assert names == {f"{tmp_path}/{parent}/s/a" for parent in ("x", "y")}


def test_nothing_in_the_runs_becomes_a_part_of_the_page(runs, tmp_path):
    make(runs, "hostile`<b>", failure="<img src=x onerror=1> | a\nb $x", seed=98)
    make(runs, "dollar", top1=0.5, seed=99, lowrank__rules="({'path': '.*/kernel$', 'method': 'spectral', 'scale': 0.5},)")
    Report([str(runs)]).write(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<img src=x" not in page and "<b>" not in page
    assert "<td><code>hostile`&lt;b&gt;</code></td>\n<td>diverged</td>\n<td>&lt;img src=x onerror=1&gt; | a b $x</td>" in page


FOREIGN = {  # a run, its file, what is in that, and what then becomes of the run
    "dense0": ("result.json", "{}", "damaged"),
    "dense1": (
        "result.json",
        '{"params": NaN, "macs": 1, "seconds": 1, "versions": {}, "eval": {"top1": 1, "loss": 1}}',
        "damaged",
    ),
    "dense2": ("config.json", "{}", "damaged"),
    "dense3": ("metrics.jsonl", "3\n[]\n\udcff", "damaged"),
    "dense4": ("metrics.jsonl", None, "done"),
}


def test_foreign_files_are_no_traceback(runs, tmp_path):
    for run, (name, content, _) in FOREIGN.items():
        if content is None:
            (runs / run / name).unlink()
        else:
            (runs / run / name).write_text(content, errors="surrogateescape")
    report = Report([str(runs)])
    report.write(tmp_path / "out")
    assert {run.name: run.status for run in report.found.runs if run.name in FOREIGN} == {
        run: status for run, (*_, status) in FOREIGN.items()
    }


def test_what_is_no_place_to_read_from_says_so():
    with pytest.raises(WorkdirError, match="foo://x"):
        Report(["foo://x"])


def test_a_tuned_value_may_be_none(tmp_path):
    held_out = {"dataset__train_split": "train[:90%]", "dataset__valid_split": "train[90%:]"}
    for clip, valid in (("none", 0.7), (1.0, 0.8), (2.0, 0.6)):
        make(tmp_path, f"{clip}", valid=valid, top1=valid, optim__clip_norm=clip, **held_out)
    report = Report([str(tmp_path)], tune=["optim.clip_norm"])
    (arm,) = report.arms
    assert dict(arm.tuning) == {"optim.clip_norm": 1.0} and len(arm.candidates) == 3
    assert "clip_norm 1: 0.8000" in report.markdown()


def test_labels_of_sizes_have_room():
    assert figures._apart([9930, 11600, 23500, 77800]) == [11600, 23500, 77800]  # 9930 and 11600 are 7 % of the axis apart
    assert figures._apart([5, 50]) == [5, 50] and figures._apart([5]) == [5]
