"""Sweeps through Ray: whom ASHA ends, and, slow, two real nodes, a killed worker, a signal."""

import importlib
import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
import types

import jax
import pytest

from lowrank_jax.experiment.config.files import ConfigError, to_dict
from lowrank_jax.experiment.sweep import ray_cluster, ray_tune
from lowrank_jax.experiment.sweep.asha import Asha, StandIn, replay
from lowrank_jax.experiment.sweep.ray_cluster import Resources
from lowrank_jax.experiment.sweep.trials import Outcome, Trial
from lowrank_jax.experiment.training.log_window import Diverged
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from tests import running, stored

# Starting its nodes, Ray forks this process, in which other tests may have begun to use jax; the child is replaced at once.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


@pytest.fixture
def one_device(monkeypatch):
    """For the workers; in this process jax has its devices by then."""
    jax.devices()
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")


def trial(folder, name, **changes):
    return Trial(name, {}, running.config(log__tensorboard=False, **changes), str(folder / name), ())


@pytest.fixture
def once_it_says():
    """Does something, in a thread, once a trial's log says something."""
    threads = []

    def start(log, text, action):
        def wait():
            end = time.monotonic() + 1200  # on a busy machine workers took five minutes to begin
            while not (log.exists() and text in log.read_text()) and time.monotonic() < end:
                time.sleep(0.02)
            action()

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_trial_whose_worker_is_killed_ends_where_an_undisturbed_one_does(cluster, tmp_path, once_it_says):
    long = {"steps": 250, "checkpoint__every": "35 steps", "log__every": "50 steps", "eval__every": "125 steps"}
    broken, whole = trial(tmp_path, "broken", **long), trial(tmp_path, "whole", **long)
    log, said = tmp_path / "broken" / "log.txt", []
    once_it_says(
        log,
        "[100/250",  # then 35 has been written; 70 may not be
        lambda: os.kill(int(log.read_text().split()[1]), signal.SIGKILL),
    )
    outcomes = ray_tune.run([broken, whole], address=cluster, say=said.append)

    assert outcomes == {"broken": Outcome("done"), "whole": Outcome("done")}
    retries = [line for line in said if "attempt" in line]
    assert len(retries) == 1, said
    (retry,) = retries
    assert retry.startswith("broken: ") and "attempt 2 of 3 resumes from its last checkpoint" in retry
    assert [line.split()[0] for line in said if line is not retry] == ["[1/2]", "[2/2]"]

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


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_asha_ends_a_poor_trial_for_good(cluster, tmp_path):
    good = trial(tmp_path, "good", eval__every="10 steps")  # ended in an earlier call
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "result.json").write_text(json.dumps(stored.result()))
    lines = [json.dumps({"step": step, "eval/top1": 0.9}) for step in (10, 20, 30, 40)]
    (tmp_path / "good" / "metrics.jsonl").write_text("\n".join(lines))
    poor = trial(tmp_path, "poor", eval__every="10 steps", optim__lr=1e-6)
    outcomes = ray_tune.run([good, poor], address=cluster, asha=Asha(grace=20, reduction=2))

    assert outcomes["good"] == Outcome("done") and outcomes["poor"] == Outcome("stopped", "by asha at step 20")
    assert Workdir(poor.workdir).read_json("stopped.json")["step"] == 20 and poor.result() is None
    assert [line["step"] for line in running.metrics(tmp_path / "poor") if "eval/top1" in line] == [10, 20]
    assert ray_tune.run([good, poor]) == {"good": outcomes["good"], "poor": outcomes["poor"]}  # without any cluster


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_signal_saves_what_runs_and_the_same_call_would_go_on(cluster, tmp_path, once_it_says, unhandled_sigterm):
    endless = {"steps": 10**6, "checkpoint__every": "100000 steps", "log__every": "100 steps"}
    trials = [trial(tmp_path, name, **endless) for name in ("runs", "waits")]
    before = signal.getsignal(signal.SIGTERM)
    once_it_says(tmp_path / "runs" / "log.txt", "[    200/", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert ray_tune.run(trials, address=cluster, jobs=1) == {name: Outcome("interrupted") for name in ("runs", "waits")}
    assert "stopping: saved step" in (tmp_path / "runs" / "log.txt").read_text()
    assert list((tmp_path / "runs" / "checkpoints").glob("[0-9]*")) and not (tmp_path / "waits").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def judged(asha, trials, evaluations):
    """The trials that ASHA ends, with the step, when their evaluations come in this order."""
    scheduler, ended = asha.scheduler(trials), {}
    for trial in trials:
        scheduler.on_trial_add(None, StandIn(trial.name))
    for name, step, top1 in evaluations:
        if name not in ended:
            decision = scheduler.on_trial_result(None, StandIn(name), {"step": step, "top1": top1})
            ended |= {name: step} if decision == "STOP" and step < 40 else {}
    return ended


def test_asha_keeps_the_best_half_at_each_rung(tmp_path):
    """By hand, with rungs at 10 and 20: the first one has no rival; the others end below the median of those before them."""
    trials = [trial(tmp_path, name) for name in "abcd"]
    order = [
        ("a", 10, 0.5),  # alone
        ("b", 10, 0.4),  # below 0.5
        ("c", 10, 0.6),  # above the median of 0.4 and 0.5
        ("d", 10, 0.45),  # below the median of 0.4, 0.5 and 0.6
        ("a", 15, 0.1),  # no rung
        ("a", 20, 0.5),
        ("c", 20, 0.45),  # better at 10, worse at 20
        ("a", 40, 0.5),
    ]
    assert judged(Asha(grace=10, reduction=2), trials, order) == {"b": 10, "d": 10, "c": 20}
    assert judged(Asha(grace=30, reduction=2), trials, order) == {}  # nobody before its time


def test_asha_ends_the_highest_where_lower_is_better(tmp_path):
    better, worse = (trial(tmp_path, name, eval__best="-loss") for name in ("better", "worse"))
    (tmp_path / "better").mkdir()
    line = {"step": 20, "eval/top1": 0.1, "eval/loss": 0.5, "valid/loss": 0.6}
    (tmp_path / "better" / "metrics.jsonl").write_text(json.dumps(line))
    scheduler = Asha(grace=20, reduction=2).scheduler([better, worse])
    replay(scheduler, [better])
    for name, loss, decision in (("worse", 0.61, "STOP"), ("best", 0.4, "CONTINUE")):
        scheduler.on_trial_add(None, StandIn(name))
        assert scheduler.on_trial_result(None, StandIn(name), {"step": 20, "loss": loss}) == decision


def test_asha_judges_by_trials_of_earlier_calls_too(tmp_path):
    earlier, poor, good = (trial(tmp_path, name) for name in ("earlier", "poor", "good"))
    (tmp_path / "earlier").mkdir()
    lines = [json.dumps({"step": step, "eval/top1": 0.9}) for step in (10, 20)]
    (tmp_path / "earlier" / "metrics.jsonl").write_text("\n".join(lines))
    scheduler = Asha(grace=20, reduction=2).scheduler([earlier, poor, good])
    replay(scheduler, [earlier])
    for name, top1, decision in (("poor", 0.1, "STOP"), ("good", 0.95, "CONTINUE")):
        scheduler.on_trial_add(None, StandIn(name))
        assert scheduler.on_trial_result(None, StandIn(name), {"step": 20, "top1": top1}) == decision


@pytest.mark.parametrize(
    ("asha", "names"), [({"grace": 41}, "grace: 41; must be from 1 to 40"), ({"grace": 1, "reduction": 1}, "reduction: 1")]
)
def test_an_asha_that_cannot_work_is_refused_before_a_cluster_is_looked_for(tmp_path, asha, names):
    with pytest.raises(ConfigError, match=names):
        ray_tune.run([trial(tmp_path, "a")], asha=Asha(**asha))


@pytest.mark.parametrize(
    ("phase", "latest"),
    [
        ({"lowrank__dense_warmup": "12 steps"}, 12),
        ({"lowrank__dense_warmup": "auto"}, 20),  # half of training
        ({"lowrank__self_guided": "15 steps"}, 15),
    ],
)
def test_rungs_that_would_compare_a_first_phase_with_low_rank_networks_are_refused(tmp_path, phase, latest):
    plain, first = trial(tmp_path, "plain"), trial(tmp_path, "first", **phase)
    again = trial(tmp_path, "again", **phase, seed=1)
    with pytest.raises(
        ConfigError, match=rf"grace: 10; first \(and 1 more\) .* until step {latest}, .* more than {latest} steps"
    ):
        ray_tune.run([plain, first, again], asha=Asha(grace=10))
    with pytest.raises(
        ConfigError, match=f"first may be in .* until step {latest},"
    ):  # its evaluation is of the first phase's network
        Asha(grace=latest).scheduler([plain, first])
    assert Asha(grace=latest + 1).scheduler([plain, first])
    assert Asha(grace=10).scheduler([plain, trial(tmp_path, "dense", lowrank__method="none", **phase)])


# --- a worker, in this process, with a training that does not train ---


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Runs a trial as a worker does, with a stand-in for `train`; returns what Tune is told."""

    def work(config, train):
        told = []
        monkeypatch.setattr(ray_tune, "train", train)
        monkeypatch.setattr(ray_tune, "_listen", lambda flag, stop: None)
        monkeypatch.setattr(ray_tune.tune, "report", told.append)
        ray_tune._work(ray_tune._Job(str(tmp_path), to_dict(config)), str(tmp_path / "nowhere"), flag=None)
        return told

    return work


def test_a_worker_tells_of_every_evaluation_and_of_the_last_one_at_the_end(worker, tmp_path):
    def train(config, workdir, *, stop, on_evaluation):
        lines = [{"step": step, "eval/top1": step / 100} for step in (10, 20, 40)]
        for line in lines:
            on_evaluation(line["step"], {"eval": {"top1": line["eval/top1"]}})
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return types.SimpleNamespace(interrupted=False)

    first, second, last = worker(running.config(), train)
    assert first == {"step": 10, "training_iteration": 10, "top1": 0.1} and second["top1"] == 0.2
    assert last == {"status": "done", "reason": "", "top1": 0.4, "done": True, "step": 40, "training_iteration": 40}


def test_a_worker_tells_how_a_trial_ended_otherwise(worker, tmp_path):
    def raising(error):
        def train(config, workdir, **given):
            print("begun")
            raise error

        return train

    (told,) = worker(running.config(), raising(Diverged("loss is nan\n  try optim.clip_norm")))
    assert (told["status"], told["reason"], "step" in told) == ("diverged", "loss is nan; try optim.clip_norm", False)
    (told,) = worker(running.config(), raising(WorkdirError("belongs to another experiment")))
    assert (told["status"], told["reason"]) == ("failed", "belongs to another experiment")
    for_sixteen = running.parsed(devices=16, mesh__data=16)
    (told,) = worker(for_sixteen, raising(AssertionError("a config that does not fit is not trained")))
    assert told["status"] == "failed" and "does not fit 8 devices" in told["reason"]
    (told,) = worker(running.config(), lambda *_, **given: types.SimpleNamespace(interrupted=True))
    assert told["status"] == "interrupted"
    with pytest.raises(RuntimeError, match="a bug"):  # Tune tries it again
        worker(running.config(), raising(RuntimeError("a bug")))
    log = (tmp_path / "log.txt").read_text()
    assert log.count(f"process {os.getpid()} on ") == 5 and "loss is nan" in log and "RuntimeError: a bug" in log


def test_a_log_that_is_a_pipe_does_not_block_a_worker(worker, tmp_path):
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(OSError, match=r"log\.txt"):
        worker(running.config(), None)


def test_how_a_trial_of_tune_ended_is_noted_in_its_folder(tmp_path):
    """What Tune tells its callbacks, as far as they look at it."""
    trials = {name: trial(tmp_path, name) for name in ("done", "diverged", "poor", "lost")}
    for name in trials:
        (tmp_path / name).mkdir()
    (tmp_path / "error").write_text("Traceback\n  ...\nray.exceptions.ActorDiedError: died. Some common causes include: many\n")
    said = []
    events = ray_tune._Events(trials, said.append)

    def told(name, **last):
        run = types.SimpleNamespace(num_failures=1)
        return types.SimpleNamespace(
            config={"trial": name}, last_result=last, run_metadata=run, error_file=str(tmp_path / "error")
        )

    events.on_trial_complete(0, [], told("done", **ray_tune._report("done", step=40, measured={"top1": 0.75})))
    events.on_trial_complete(0, [], told("diverged", **ray_tune._report("diverged", "loss is nan")))
    events.on_trial_complete(0, [], told("poor", step=20, top1=0.1))
    events.on_trial_recover(0, [], told("lost"))
    events.on_trial_error(0, [], told("lost"))
    reason = "ray.exceptions.ActorDiedError: died.; 1 attempts"
    assert events.outcomes == {
        "done": Outcome("done"),
        "diverged": Outcome("diverged", "loss is nan"),
        "poor": Outcome("stopped", "by asha at step 20"),
        "lost": Outcome("failed", reason),
    }
    assert said[0].startswith("[1/4]  done") and "top1 0.7500" in said[0] and "attempt 2 of 3" in said[3]
    assert Workdir(trials["poor"].workdir).read_json("stopped.json") == {"by": "asha", "step": 20, "top1": 0.1}
    assert Workdir(trials["lost"].workdir).read_json("failure.json") == {"status": "failed", "reason": reason}


def test_without_ray_there_is_one_clear_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lowrank_jax.experiment.sweep.ray_tune")
    with pytest.raises(ConfigError, match=r"--engine=ray: 1 problem\n.*pip install 'lowrank_jax\[train,ray\]'"):
        importlib.import_module("lowrank_jax.experiment.sweep.ray_tune")


@pytest.mark.parametrize(
    ("resources", "names"),
    [
        ({"cpus": 0}, "not all 0"),
        ({"gpus": 1.5}, "gpus: 1.5; must be at most 1"),
        ({"tpus": 3}, "tpus: 3"),
        ({"cpus": -1}, "at least 0"),
    ],
)
def test_resources_that_cannot_be_had_are_refused_at_once(tmp_path, resources, names):
    with pytest.raises(ConfigError, match=names):
        ray_tune.run([trial(tmp_path, "a")], resources=Resources(**resources))


def test_trials_that_share_a_gpu_share_its_memory(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert ray_cluster.worker_environment(Resources(gpus=0.25))[name] == "0.225"
    assert name not in ray_cluster.worker_environment(Resources(gpus=1))
    monkeypatch.setenv(name, "0.1")
    assert ray_cluster.worker_environment(Resources(gpus=0.25))[name] == "0.1"
    assert ray_cluster.worker_environment(Resources())["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: "),
        ("ray://127.0.0.1:1", "no Ray cluster answers at ray://127.0.0.1:1: "),
        ("127.0.0.1:99999", "no Ray cluster answers at 127.0.0.1:99999: "),
        ("127.0.0.1", "'127.0.0.1'; must be auto or HOST:PORT"),
        ("x y:z", "'x y:z'; must be auto or HOST:PORT"),
    ],
)
def test_an_address_where_nobody_listens_is_refused(address, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)), ray_cluster.connected(address, Resources()):
        pass
