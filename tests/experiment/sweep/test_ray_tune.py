"""Sweeps on a Ray cluster: two real nodes, a killed worker, a scheduler that ends a trial, a signal."""

import importlib
import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest
from ray.cluster_utils import Cluster

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.sweep import ray_tune
from lowrank_jax.experiment.sweep.trials import Outcome, Trial
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests import running

# Starting its nodes, Ray forks this process, in which other tests may have begun to use jax; the child is replaced at once.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")  # of the workers; here jax has begun


def trial(folder, name, **changes):
    return Trial(name, {}, running.config(**changes), str(folder / name), ())


@pytest.fixture
def once_it_says():
    """Does something, in a thread, once a trial's log says something."""
    threads = []

    def start(log, text, action):
        def wait():
            end = time.monotonic() + 240  # however busy the machine is
            while not (log.exists() and text in log.read_text()) and time.monotonic() < end:
                time.sleep(0.02)
            action()

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def test_a_trial_whose_worker_is_killed_ends_where_an_undisturbed_one_does(cluster, tmp_path, once_it_says):
    long = {"steps": 1000, "checkpoint__every": "70 steps", "log__every": "100 steps", "eval__every": "250 steps"}
    broken, whole = trial(tmp_path, "broken", **long), trial(tmp_path, "whole", **long)
    diverging = trial(tmp_path, "diverging", optim__lr=1e30, optim__warmup="0 steps", model__kwargs={"widths": (8,)})
    log, said = tmp_path / "broken" / "log.txt", []
    once_it_says(
        log,
        "saved@280",  # then 210 has been written; this one may not be
        lambda: os.kill(int(log.read_text().split()[1]), signal.SIGKILL),
    )
    outcomes = ray_tune.run([broken, whole, diverging], address=cluster, say=said.append)

    assert outcomes["broken"] == outcomes["whole"] == Outcome("done")
    assert outcomes["diverging"].status == "diverged" and "optim.clip_norm" in outcomes["diverging"].reason
    (retry,) = [line for line in said if "attempt" in line]
    assert retry.startswith("broken: ") and "attempt 2 of 3 goes on from its last checkpoint" in retry
    assert [line.split()[0] for line in said if line is not retry] == ["[1/3]", "[2/3]", "[3/3]"]

    assert log.read_text().count("process ") == 2 and "resuming" in log.read_text()
    assert without_speed(broken) == without_speed(whole)  # reads as one run, no step twice
    assert final(broken) == final(whole)


def without_speed(trial):
    """The lines of metrics.jsonl, less what differs from time to time."""
    lines = running.metrics(pathlib.Path(trial.workdir))
    return [{key: value for key, value in line.items() if key != "train/images_per_second"} for line in lines]


def final(trial):
    result = trial.result()
    return result["step"], result["eval"], result["best_step"]


def test_asha_ends_a_poor_trial_for_good(cluster, tmp_path):
    good = trial(tmp_path, "good", eval__every="10 steps")  # ended in an earlier call
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "result.json").write_text("{}")
    lines = [json.dumps({"step": step, "eval/top1": 0.9}) for step in (10, 20, 30, 40)]
    (tmp_path / "good" / "metrics.jsonl").write_text("\n".join(lines))
    poor = trial(tmp_path, "poor", eval__every="10 steps", optim__lr=1e-6)
    impossible = trial(tmp_path, "impossible", mesh__data=8)
    outcomes = ray_tune.run([good, poor, impossible], address=cluster, asha=ray_tune.Asha(grace=20, reduction=2))

    assert outcomes["good"] == Outcome("done") and outcomes["poor"] == Outcome("stopped", "by asha at step 20")
    assert outcomes["impossible"].status == "failed" and "does not fit 1 devices" in outcomes["impossible"].reason
    assert Workdir(poor.workdir).read_json("stopped.json")["step"] == 20 and poor.result() is None
    assert [line["step"] for line in running.metrics(tmp_path / "poor") if "eval/top1" in line] == [10, 20]
    assert ray_tune.run([good, poor]) == {"good": outcomes["good"], "poor": outcomes["poor"]}  # without any cluster


def test_a_signal_saves_what_runs_and_the_same_call_would_go_on(cluster, tmp_path, once_it_says, unhandled_sigterm):
    endless = {"steps": 10**6, "checkpoint__every": "100000 steps", "log__every": "100 steps"}
    trials = [trial(tmp_path, name, **endless) for name in ("runs", "waits")]
    before = signal.getsignal(signal.SIGTERM)
    once_it_says(tmp_path / "runs" / "log.txt", "[    200/", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert ray_tune.run(trials, address=cluster, jobs=1) == {name: Outcome("interrupted") for name in ("runs", "waits")}
    assert "stopping: saved step" in (tmp_path / "runs" / "log.txt").read_text()
    assert list((tmp_path / "runs" / "checkpoints").glob("[0-9]*")) and not (tmp_path / "waits").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_without_ray_there_is_one_clear_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lowrank_jax.experiment.sweep.ray_tune")
    with pytest.raises(ConfigError, match=r"--engine=ray: 1 problem\n.*pip install 'lowrank_jax\[train,ray\]'"):
        importlib.import_module("lowrank_jax.experiment.sweep.ray_tune")


@pytest.mark.parametrize(
    ("resources", "names"),
    [({"cpus": 0}, "not all"), ({"gpus": 1.5}, "gpus: 1.5"), ({"tpus": 3}, "tpus: 3"), ({"cpus": -1}, "at least 0")],
)
def test_resources_that_cannot_be_had_are_refused_at_once(tmp_path, resources, names):
    with pytest.raises(ConfigError, match=names):
        ray_tune.run([trial(tmp_path, "a")], resources=ray_tune.Resources(**resources))


def test_trials_that_share_a_gpu_share_its_memory(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert ray_tune._worker_environment(ray_tune.Resources(gpus=0.25))[name] == "0.225"
    assert name not in ray_tune._worker_environment(ray_tune.Resources(gpus=1))
    monkeypatch.setenv(name, "0.1")
    assert ray_tune._worker_environment(ray_tune.Resources(gpus=0.25))[name] == "0.1"
    assert ray_tune._worker_environment(ray_tune.Resources())["JAX_PLATFORMS"] == "cpu"
