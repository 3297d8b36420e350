"""Several processes as one run: on loopback with real signals, and each part against a coordinator in this process."""

import json
import os
import pathlib
import signal
import socket
import sys
import threading

import jax
import numpy as np
import pytest

from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.hosts import processes as hosts
from lowrank_jax.experiment.hosts.processes import ClusterError, ProcessOptions, barrier, end_all, exchange, several, start
from lowrank_jax.experiment.training.loop import train
from tests import running
from tests.experiment.data.test_imagenet import seed_of_flaw
from tests.experiment.data.test_imagenet import settings as imagenet
from tests.experiment.training.test_loop import final_state, wait_for

SUPERVISE = running.ROOT / "scripts" / "supervise.sh"

# Neither two nor four processes divide 250 examples by 64.
SETTINGS = {
    "steps": 40,
    "log__every": "1 step",
    "checkpoint__every": "10 steps",
    "eval__every": "20 steps",
    "dataset__eval_split": "test[:250]",
    "lowrank__moment_batches": 1,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that several processes have to repeat, by one process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(running.config(**SETTINGS), str(folder))


def losses(lines):
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.slow
def test_four_processes_train_as_one_does(alone, tmp_path):
    _, run = alone
    command = running.command(tmp_path / "four", **SETTINGS, mesh__data=2, mesh__fsdp=2)
    processes = running.start_all(command, 4)
    first, *others = running.wait_all(processes)
    assert [process.returncode for process in processes] == [0] * 4, first
    assert others == [""] * 3  # process 0 alone speaks

    lines = running.metrics(tmp_path / "four")
    theirs = losses(lines)
    assert sorted(theirs) == list(range(1, 41))
    np.testing.assert_allclose([theirs[i] for i in range(1, 21)], [run.train[i]["train/loss"] for i in range(1, 21)], rtol=1e-4)
    evaluated = [line for line in lines if "eval/top1" in line]
    assert [(line["step"], line["eval/examples"]) for line in evaluated] == [(20, 250), (40, 250)]
    np.testing.assert_allclose(evaluated[-1]["eval/loss"], run.evals[40]["loss"], rtol=1e-3)
    parts = list((tmp_path / "four" / "checkpoints" / "40" / "state").glob("ocdbt.process_*"))
    assert len(parts) == 2  # of each half of the arrays; only larger ones would be shared by those that have the same
    step, arrays = final_state(tmp_path / "four", **SETTINGS)  # its digests included
    assert step == 40
    np.testing.assert_allclose(arrays["params/dense1/kernel/u"], run.state.params["dense1"]["kernel"].u, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_two_processes_switch_to_low_rank_as_one_does(tmp_path):
    """Process 0 decides the ranks; the dense kernels are in parts before the switch, and the factors after it."""
    settings = {**SETTINGS, "steps": 12, "lowrank__dense_warmup": "6 steps", "lowrank__budget": {"params": 0.4}}
    alone = train(running.config(**settings), str(tmp_path / "one"))
    command = running.command(tmp_path / "two", **settings, mesh__fsdp=2)
    first, _ = running.wait_all(processes := running.start_all(command, 2))
    assert [process.returncode for process in processes] == [0, 0], first
    ranks = [json.loads((tmp_path / run / "ranks.json").read_text())["ranks"] for run in ("one", "two")]
    assert ranks[0] == ranks[1] and any(ranks[0].values())
    theirs = losses(running.metrics(tmp_path / "two"))
    np.testing.assert_allclose(list(theirs.values()), [line["train/loss"] for line in alone.train.values()], rtol=1e-3)


@pytest.mark.slow
def test_two_processes_evaluate_what_one_has_trained(alone, tmp_path):
    folder, run = alone
    against = f"{folder}@20"
    flags = [f"--workdir={folder}", f"--json={tmp_path / 'out.json'}", f"--against={against}"]
    command = [*running.command(folder)[:3], "evaluate", *flags]
    processes = running.start_all(command, 2)
    first, second = running.wait_all(processes)
    assert [process.returncode for process in processes] == [0, 0], first
    assert "250" in first and second == ""
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["metrics"] == pytest.approx(run.evals[40], rel=1e-5)
    fidelity = Evaluator(against=against).evaluate(str(folder)).fidelity.record()
    assert written["fidelity"].pop("against") == str(folder) and written["fidelity"].pop("step") == 20
    layers, theirs = fidelity.pop("layers"), written["fidelity"].pop("layers")
    assert layers and theirs == pytest.approx(layers, rel=1e-4)
    assert (written["fidelity"].pop("left_out"), written["fidelity"].pop("unseen")) == ("", fidelity.pop("unseen"))
    assert written["fidelity"] == pytest.approx(fidelity, rel=1e-4)


def child(supervisor, process):
    """The process id of one of those that a supervisor has started."""
    for pid in pathlib.Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split():
        if f"--process={process}".encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"process {process} is not running")


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_relaunched_ones_go_on_exactly(alone, tmp_path):
    """Then SIGTERM to one of them saves on all, and they go on once more."""
    _, run = alone
    command = running.command(tmp_path, **SETTINGS, mesh__data=1, mesh__model=2)  # each batch is on both
    supervise = [str(SUPERVISE), "--processes=2", "--pause=0", *command]
    with running.start(supervise) as supervisor:
        wait_for(supervisor, "saved@20")  # which begins when step 10 is on disk
        os.kill(child(supervisor, 1), signal.SIGKILL)
        said = wait_for(supervisor, "restart 1 of 20")
        killed = losses(running.metrics(tmp_path))
        said = wait_for(supervisor, "resuming")
        resumed_from = int(said.split("from step ")[1].split()[0])
        wait_for(supervisor, "[25/40")
        os.kill(child(supervisor, 1), signal.SIGTERM)
        output = supervisor.stdout.read()
    assert supervisor.returncode == 0, output
    stopped = int(output.split("stopping: saved step ")[1].split()[0])
    assert 25 <= stopped < 40
    assert "exited with status 75; restart 2 of 20" in output and f"from step {stopped} " in output

    lines = running.metrics(tmp_path)
    again = losses(lines)
    assert sorted(again) == list(range(1, 41))
    repeated = [step for step in killed if step > resumed_from]
    assert repeated and {step: again[step] for step in killed} == killed  # to the bit
    np.testing.assert_allclose([again[i] for i in range(1, 21)], [run.train[i]["train/loss"] for i in range(1, 21)], rtol=1e-4)
    np.testing.assert_allclose(again[40], run.train[40]["train/loss"], rtol=1e-2)
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 40


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_with_one_message(tmp_path):
    flaw = {"optim__lr": 1e30, "optim__warmup": "0 steps", "model__kwargs": {"widths": (8,)}, "log__every": "1 step"}
    command = running.command(tmp_path, **flaw, checkpoint__every="1 step")
    done = running.run([str(SUPERVISE), "--processes=2", *command])
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("Lower optim.lr or set optim.clip_norm") == 1 and "restart" not in done.stderr
    assert json.loads((tmp_path / "failure.json").read_text())["status"] == "diverged"
    last_good = done.stderr.split("Last good checkpoint: ")[1].split(".")[0]
    assert (tmp_path / "checkpoints" / last_good).is_dir()  # it was still being written


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_saves_and_ends_all(small_imagenet, tmp_path):
    changes = {"steps": 24, "batch_size": 8, "checkpoint__every": "1000 steps", "dataset__max_undecodable": 0}
    changes["seed"] = seed_of_flaw(small_imagenet, 6)
    processes = running.start_all(running.command(tmp_path, **imagenet(small_imagenet, **changes)), 2)
    outputs = running.wait_all(processes)
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert sum(said.count("Raise the limit") for said in outputs) == 1 and "Traceback" not in "".join(outputs)
    assert f"saved step 6 to {tmp_path}; the same command continues it" in outputs[0]
    assert (tmp_path / "checkpoints" / "6").is_dir()


@pytest.mark.slow
def test_a_process_that_cannot_write_its_part_of_a_checkpoint_ends_all(tmp_path):
    command = running.command(tmp_path, mesh__data=1, mesh__fsdp=2)
    no_files = 'case $* in *--process=1*) ulimit -f 0 ;; esac; exec "$@"'
    processes = running.start_all(["bash", "-c", no_files, "bash", *command], 2)
    outputs = running.wait_all(processes)
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "process 1: " in outputs[0] and "cannot write a checkpoint" in outputs[0]
    assert not (tmp_path / "checkpoints" / "10").exists()


@pytest.mark.slow
def test_processes_of_different_settings_leave_the_work_directory_alone(tmp_path):
    seeds = 'case $* in *--process=1*) set -- "$@" --config.seed=1 ;; esac; exec "$@"'
    processes = running.start_all(["bash", "-c", seeds, "bash", *running.command(tmp_path / "run")], 2)
    first, _ = running.wait_all(processes)
    assert [process.returncode for process in processes] == [2, 2], first
    assert "process 1 was given other settings than process 0: seed is 1, not 0" in first
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--processes=08", "--restarts=x", "--pause=09", "--grace=-1"])
def test_the_supervisor_refuses_what_is_no_number(option):
    done = running.run([str(SUPERVISE), option, "true"])
    assert done.returncode == 2 and "must be a whole number" in done.stderr


def test_the_supervisor_starts_nothing_again_that_cannot_be_run():
    done = running.run([str(SUPERVISE), "--pause=0", "no-such-command"])
    assert done.returncode == 127 and "restart" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"processes": 2}, "--coordinator and --process: missing; give all three of the flags, or none"),
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            "--process: 2 must be less than --processes=2; counting starts at 0",
        ),
        ({"coordinator": "a", "processes": 2, "process": 1}, "'a' must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, problem):
    with pytest.raises(ClusterError, match=problem):
        start(ProcessOptions(**flags))


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"cannot listen on port {port}: Address already in use"):
            start(ProcessOptions(coordinator=f"127.0.0.1:{port}", processes=2, process=0))


@pytest.mark.slow
def test_a_coordinator_that_nobody_is_ends_in_words(tmp_path):
    address = f"127.0.0.1:{running.free_port()}"
    flags = [f"--coordinator={address}", "--processes=2", "--process=1", "--patience=1"]
    done = running.run([*running.command(tmp_path), *flags])
    assert done.returncode == 2
    assert f"timed out after 1 s waiting for the other processes at {address}; start all 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_process_is_alone_whatever_its_environment_says(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nowhere.invalid:1")
    start(ProcessOptions(processes=1))
    barrier()
    assert not several() and exchange("me") == ["me"]


class Coordinator:
    """The client of a coordinator, in memory: a process of three whose peers are as fast as it is."""

    def __init__(self, process):
        self.values, self.process_id, self.num_processes, self.client = {}, process, 3, self

    def key_value_set(self, key, value):
        if key in self.values:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def blocking_key_value_get(self, key, timeout):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.values[key]

    def wait_at_barrier(self, key, timeout):
        for peer in {0, 1, 2} - {self.process_id}:
            self.values[f"{key}/{peer}"] = f"of {peer}"


class Exited(BaseException):
    pass


@pytest.fixture
def coordinator(monkeypatch):
    """By process: the coordinator it is connected to; where it would exit, `Exited` is raised with the status."""

    def exit_with(status):
        raise Exited(status)

    def connect(process):
        connected = Coordinator(process)
        monkeypatch.setattr(hosts, "_state", lambda: connected)
        return connected

    monkeypatch.setattr(hosts.os, "_exit", exit_with)
    monkeypatch.setattr(hosts, "_ACKNOWLEDGE_SECONDS", 0.0)
    monkeypatch.setattr(hosts, "_EXIT_SECONDS", 0.0)
    return connect


def test_texts_are_exchanged_in_the_order_of_processes(coordinator):
    coordinator(1)
    barrier()
    assert several() and exchange("mine") == ["of 0", "mine", "of 2"]
    assert exchange("another") == ["of 0", "another", "of 2"]


def test_a_failure_ends_this_process_and_is_left_for_the_others(coordinator, capsys):
    store = coordinator(0)
    with pytest.raises(Exited, match="4"):
        end_all(4, "the loss is nan")
    failure = json.loads(store.values["lowrank/failure"])
    assert failure == {"status": 4, "process": 0, "message": "the loss is nan"}
    store.process_id = 1
    with pytest.raises(Exited, match="2"):
        end_all(2, "an echo of it")
    assert json.loads(store.values["lowrank/failure"]) == failure  # the first report counts


@pytest.mark.parametrize(("process", "said"), [(0, "process 2: no space\n"), (1, "")])
def test_a_process_that_hears_of_a_failure_ends_with_its_status_and_process_0_says_why(coordinator, capsys, process, said):
    store = coordinator(process)
    store.values["lowrank/failure"] = json.dumps({"status": 2, "process": 2, "message": "no space"})
    with pytest.raises(Exited, match="2"):
        hosts._watch(threading.Event())
    assert capsys.readouterr().err == said
    assert ("lowrank/failure/read/1" in store.values) == (process == 1)


def test_processes_that_do_not_come_in_time_are_told_of(coordinator, capsys, monkeypatch):
    statuses = []
    monkeypatch.setattr(hosts.os, "_exit", statuses.append)
    for options in (ProcessOptions(patience=0), ProcessOptions("a:1", 4, 2, patience=0)):
        with hosts._deadline(options):
            for thread in threading.enumerate():
                if thread is not threading.main_thread() and thread.name.endswith("(wait)"):
                    thread.join()
    assert statuses == [2, 2]
    assert capsys.readouterr().err == (
        "timed out after 0 s waiting for the other processes; start them all, or pass --processes=1\n"
        "timed out after 0 s waiting for the other processes at a:1; start all 4, each with the address of process 0 as"
        " --coordinator\n"
    )


@pytest.mark.slow
def test_a_process_ends_with_its_status_though_nobody_listens():
    code = "import os; from lowrank_jax.experiment.hosts.processes import _exit\n"
    code += "r, w = os.pipe(); os.close(r); os.dup2(w, 2); _exit(4, 'why')"
    assert running.run([sys.executable, "-c", code]).returncode == 4
