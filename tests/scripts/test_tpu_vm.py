"""scripts/tpu_vm.sh against a stand-in for gcloud, whose workers are folders of this machine and whose shell is a real one."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "tpu_vm.sh"
WHERE = ["--name=r50", "--zone=us-west4-a"]
RUN = [*WHERE, "--type=v5e-16"]
TRAIN = ["train", "--config=configs/digits_resnet.py", "--workdir=gs://bucket/run"]
AWKWARD = [
    "--config.model.kwargs.widths=(32, 16)",
    "--config.a='quoted \"twice\"'",
    "--config.b=$HOME `id` $(id) \\ * ; & | # ! ~ {a,b} %s \\n",
    "--config.c=two\nlines",
    "--config.d=größe,日本",
    "--config.e=",
    "",
    "it's",
    "-n",
]

# `tpu` holds the states that the TPU will be seen in, the last one for good; no such file, no TPU.
GCLOUD = """
    here, args = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
    with (here / "calls").open("a") as calls:
        calls.write(json.dumps(args) + "\\n")
    what, action = args[2], args[3]
    flags = dict(arg.split("=", 1) for arg in args if arg.startswith("--") and "=" in arg)
    tpu = here / "tpu"
    workers = [here / "worker0", here / "worker1"] if flags.get("--worker") == "all" else [here / "worker0"]
    listed = tpu if what == "tpu-vm" else here / "request"
    if action == "list" and listed.exists():
        states = listed.read_text().split()
        if flags["--format"] == "value(acceleratorType.basename())":
            print("v5litepod-16")
        else:
            print(states[0])
            listed.write_text(" ".join(states[1:] or states))
    if action == "create":
        tpu.write_text("READY" if what == "tpu-vm" else "CREATING READY")
        if what == "queued-resources":
            (here / "request").write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    if action == "delete":
        tpu.unlink()
        (here / "request").unlink(missing_ok=True)
        for pid in here.glob("worker*/lowrank_run/pid"):
            subprocess.run(["pkill", "-KILL", "-s", pid.read_text().strip()])
        for worker in here.glob("worker*"):
            shutil.rmtree(worker)
    if action == "scp":
        for worker in workers:
            worker.mkdir(exist_ok=True)
            shutil.copy(args[4], worker / args[5].partition(":")[2])
    if action == "ssh":
        if tpu.read_text().split()[0] != "READY":
            sys.exit(255)
        runs = [
            subprocess.run(["bash", "-c", flags["--command"]], env={**os.environ, "HOME": str(worker)}) for worker in workers
        ]
        sys.exit(max(run.returncode for run in runs))
"""

# On a worker: what `python3 -m uv pip install` leaves is a `lowrank` that notes its arguments and does what `todo` says.
PYTHON3 = """
    here, args = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
    if args[:4] == ["-m", "uv", "pip", "install"]:
        lowrank = pathlib.Path(os.environ["HOME"]) / "lowrank_env" / "bin" / "lowrank"
        lowrank.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(here / "bin" / "lowrank_installed", lowrank)
"""
LOWRANK = """
    here, home = pathlib.Path(os.environ["CLOUD"]), pathlib.Path(os.environ["HOME"])
    (home / "argv").write_text(json.dumps([os.getcwd(), *sys.argv[1:]]))
    print("training", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)))
    todo = (here / "todo").read_text().split()
    if todo[0] == "wait" or todo[0] == "preempt" and home.name == "worker1":
        time.sleep(60)
    if todo[0] == "preempt":
        while not (here / "worker1" / "argv").exists():
            time.sleep(0.05)
        (here / "todo").write_text("0")
        (here / "tpu").write_text("PREEMPTED")
        subprocess.run(["pkill", "-KILL", "-s", str(os.getsid(0))])
    sys.exit(int(todo[0]))
"""


class Cloud:
    """A Google Cloud of two workers."""

    def __init__(self, folder):
        self.folder = folder
        programs = {"gcloud": GCLOUD, "python3": PYTHON3, "lowrank_installed": LOWRANK}
        (folder / "bin").mkdir()
        for name, code in programs.items():
            program = folder / "bin" / name
            imports = "import json, os, pathlib, shutil, signal, subprocess, sys, time"
            program.write_text(f"#!{sys.executable}\n{imports}\n{textwrap.dedent(code)}")
            program.chmod(0o755)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "CLOUD": str(folder), "TPU_VM_POLL": "0.1", "TMPDIR": str(folder)}
        self.todo("0")

    def todo(self, text):
        (self.folder / "todo").write_text(text)

    def state(self, text):
        (self.folder / "tpu").write_text(text)

    def run(self, *arguments, program=SCRIPT):
        given = [str(program), *arguments]
        return subprocess.run(given, env=self.environment, capture_output=True, text=True, timeout=120, cwd=self.folder)

    def calls(self):
        """What gcloud was given so far, without the first two words."""
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [json.loads(line)[2:] for line in lines]

    def actions(self):
        return [call[1] for call in self.calls() if call[1] != "list"]

    def argv(self, worker):
        return json.loads((self.folder / f"worker{worker}" / "argv").read_text())

    def wait_for(self, file):
        end = time.monotonic() + 60
        while not (self.folder / file).exists():
            assert time.monotonic() < end, f"{file} never came"
            time.sleep(0.05)


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    for pid in tmp_path.glob("worker*/lowrank_run/pid"):
        subprocess.run(["pkill", "-KILL", "-s", pid.read_text().strip()], check=False)


def test_a_dry_run_prints_what_two_shells_read_back(cloud):
    """The one that it is pasted into, and the workers'."""
    printed = cloud.run(*RUN, "--setup=mount it's", "--restarts=3", "--dry-run", "--", *TRAIN, *AWKWARD)
    assert printed.returncode == 0 and not printed.stderr and not cloud.calls()
    pasted = shlex.split(printed.stdout, comments=True)
    _, launch, _ = (word.removeprefix("--command=") for word in pasted if word.startswith("--command="))
    (command,) = (word for word in shlex.split(launch) if word.startswith("command=bash"))
    supervised = ["bash", "scripts/supervise.sh", "--restarts=3", "--", "lowrank", *TRAIN, *AWKWARD]
    assert shlex.split(command.removeprefix("command=")) == supervised
    assert "mount it's" in shlex.split(launch)


@pytest.mark.slow
def test_a_dry_run_asks_nothing_and_prints_what_can_be_pasted(cloud):
    flags = ["--project=p", "--spot", "--service-account=a@p.iam", "--create-flag=--metadata=k=a b"]
    printed = cloud.run(*RUN, *flags, "--dry-run", "--", *TRAIN, *AWKWARD)
    assert printed.returncode == 0 and not printed.stderr and not cloud.calls()

    cloud.state("READY")
    (cloud.folder / "pasted.sh").write_text(printed.stdout)
    pasted = cloud.run(str(cloud.folder / "pasted.sh"), program="/bin/bash")
    assert pasted.returncode == 0, pasted.stderr
    where = ["--zone=us-west4-a", "--project=p"]
    create, scp, *ssh = cloud.calls()
    assert create == [
        "tpu-vm", "create", "r50", *where, "--accelerator-type=v5litepod-16", "--spot", "--service-account=a@p.iam",
        "--metadata=k=a b", "--version=v2-alpha-tpuv5-lite",
    ]  # fmt: skip
    assert scp == ["tpu-vm", "scp", f"{cloud.folder}/lowrank_jax.tar.gz", "r50:lowrank_jax.tar.gz", *where, "--worker=all"]
    assert [call[:-1] for call in ssh] == [["tpu-vm", "ssh", "r50", *where, f"--worker={w}"] for w in ("all", "all", "0")]
    # And what was pasted trains, on every worker, with the arguments as they were given.
    assert [cloud.argv(worker)[1:] for worker in (0, 1)] == [[*TRAIN, *AWKWARD]] * 2


def test_a_queued_resource_is_asked_for_and_deleted(cloud):
    printed = cloud.run(*RUN, "--queued", "--dry-run", "--", *TRAIN).stdout + cloud.run("delete", *WHERE, "--dry-run").stdout
    queued = [line for line in printed.splitlines() if "queued-resources" in line]
    assert queued == [
        "gcloud compute tpus queued-resources create r50 --node-id=r50 --zone=us-west4-a --accelerator-type=v5litepod-16"
        " --runtime-version=v2-alpha-tpuv5-lite",
        "gcloud compute tpus queued-resources delete r50 --zone=us-west4-a --force --quiet",
    ]


@pytest.mark.slow
def test_a_queued_resource_is_waited_for(cloud):
    run = cloud.run(*RUN, "--queued", "--", *TRAIN)
    assert run.returncode == 0, run.stderr
    assert cloud.actions() == ["create", "scp", "ssh", "ssh", "ssh"]
    assert "waiting for r50: CREATING, request WAITING_FOR_RESOURCES" in run.stderr
    assert cloud.run("delete", *WHERE).returncode == 0
    assert cloud.calls()[-1] == ["queued-resources", "delete", "r50", "--zone=us-west4-a", "--force", "--quiet"]


def test_a_request_that_failed_is_not_made_again(cloud):
    (cloud.folder / "request").write_text("FAILED")
    run = cloud.run(*RUN, "--queued", "--recreate=3", "--", *TRAIN)
    assert run.returncode == 1 and "the request for r50 failed; gcloud compute tpus queued-resources describe r50" in run.stderr
    assert cloud.actions() == []


# By https://docs.cloud.google.com/tpu/docs/runtimes.
@pytest.mark.parametrize(
    ("given", "type_", "version"),
    [
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-256", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
        ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v3-32", "v3-32", "tpu-ubuntu2204-base"),
    ],
)
def test_every_generation_has_its_software(cloud, given, type_, version):
    printed = cloud.run(*WHERE, f"--type={given}", "--dry-run", "--", *TRAIN).stdout
    assert f"--accelerator-type={type_} --version={version}\n" in printed


def test_a_version_of_ones_own_comes_first(cloud):
    assert "--version=mine\n" in cloud.run(*RUN, "--version=mine", "--dry-run", "--", *TRAIN).stdout


@pytest.mark.slow
def test_a_run_creates_installs_starts_everywhere_and_follows(cloud):
    run = cloud.run(*RUN, '--setup=echo "$HOME" >"$HOME/set up"', "--", *TRAIN, *AWKWARD)
    assert run.returncode == 0, run.stderr
    assert cloud.actions() == ["create", "scp", "ssh", "ssh", "ssh"]
    assert run.stdout.count("training\n") == 1  # of worker 0
    for worker in (0, 1):
        home = cloud.folder / f"worker{worker}"
        assert cloud.argv(worker) == [str(home / "lowrank_jax"), *TRAIN, *AWKWARD]
        assert (home / "set up").read_text() == f"{home}\n"
        assert (home / "lowrank_jax" / "lowrank_jax" / "text.py").read_bytes() == (
            ROOT / "lowrank_jax" / "text.py"
        ).read_bytes()
    # What is there is used again, and its exit status is that of the training.
    cloud.todo("4")
    assert cloud.run(*RUN, "--recreate=3", "--", *TRAIN).returncode == 4
    assert cloud.actions()[5:] == ["scp", "ssh", "ssh", "ssh"]
    status, deadline = cloud.run("status", *WHERE), time.monotonic() + 60
    while status.stdout.count("ended with 4") < 2 and time.monotonic() < deadline:  # worker 1 may need a moment more
        time.sleep(0.5)
        status = cloud.run("status", *WHERE)
    assert status.stdout.startswith("r50: TPU READY, request")
    assert status.stdout.count("ended with 4") == 2 and "lowrank train --config=configs/digits_resnet.py" in status.stdout
    logs = cloud.run("logs", *WHERE).stdout
    assert logs.count(f"{os.uname().nodename}: training\n") == 2


@pytest.mark.slow
def test_a_run_in_progress_is_joined_kept_from_others_and_stopped(cloud):
    cloud.todo("wait")
    first = subprocess.Popen([SCRIPT, *RUN, "--", *TRAIN], env=cloud.environment, stdout=subprocess.DEVNULL)
    for worker in (0, 1):
        cloud.wait_for(f"worker{worker}/argv")
    first.send_signal(signal.SIGKILL)  # whoever follows may go
    first.wait()
    assert cloud.run("status", *WHERE).stdout.count("run in progress") == 2
    other = cloud.run(*RUN, "--recreate=1", "--", *TRAIN, "--config.seed=1")
    assert other.returncode == 2 and "another run is in progress here" in other.stderr
    with subprocess.Popen([SCRIPT, *RUN, "--", *TRAIN], env=cloud.environment, stdout=subprocess.PIPE, text=True) as joined:
        assert joined.stdout is not None
        while "training" not in joined.stdout.readline():
            pass
        assert cloud.run("stop", *WHERE).stdout == "stopped\nstopped\n"
    assert joined.returncode == 75
    assert cloud.run("stop", *WHERE).stdout.count("no run is in progress") == 2


@pytest.mark.slow
def test_a_tpu_that_was_taken_away_is_made_anew_and_the_run_goes_on(cloud):
    cloud.todo("preempt")
    run = cloud.run(*RUN, "--recreate=1", "--", *TRAIN)
    assert run.returncode == 0, run.stderr
    assert cloud.actions() == ["create", "scp", "ssh", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh", "ssh"]
    assert "r50 was preempted" in run.stderr

    cloud.todo("preempt")
    assert cloud.run(*RUN, "--", *TRAIN).returncode not in (0, 2, 4, 75)  # not asked for


def test_a_tpu_of_another_type_is_not_used(cloud):
    cloud.state("READY")
    run = cloud.run(*WHERE, "--type=v6e-8", "--", *TRAIN)
    assert run.returncode == 2 and "r50 exists and is a v5litepod-16, not a v6e-8" in run.stderr
    assert cloud.actions() == []


@pytest.mark.slow
def test_a_setup_that_fails_starts_nothing(cloud):
    run = cloud.run(*RUN, "--setup=exit 7", "--", *TRAIN)
    assert run.returncode == 2 and "the setup failed" in run.stderr
    assert not (cloud.folder / "worker0" / "argv").exists()


def test_delete_deletes_what_there_is(cloud):
    assert "r50 does not exist" in cloud.run("delete", *WHERE).stderr
    cloud.state("READY")
    assert cloud.run("delete", *WHERE).returncode == 0
    assert cloud.calls()[-1] == ["tpu-vm", "delete", "r50", "--zone=us-west4-a", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run requires --name --zone --type"),
        (["status", "--name=a"], "status requires --zone"),
        ([*WHERE, "--", *TRAIN], "run requires --type"),
        ([*RUN, "--nmae=x"], "unknown argument --nmae=x"),
        ([*RUN, "train"], "unknown argument train"),
        (RUN, "run requires the arguments of lowrank after --"),
        (["--name=R50", "--zone=us-west4-a", "--type=v4-8", "--", *TRAIN], "--name=R50: must be lower-case"),
        (["--name=r50", "--zone=us-west4", "--type=v4-8", "--", *TRAIN], "--zone=us-west4: must be a zone"),
        ([*WHERE, "--type=v7-8", "--", *TRAIN], "--type=v7-8: unknown"),
        ([*WHERE, "--type=v5e-many", "--", *TRAIN], "--type=v5litepod-many: must end in a number"),
        ([*RUN, "--restarts=-1", "--", *TRAIN], "--restarts=-1: must be a whole number"),
        ([*RUN, "--recreate=x", "--", *TRAIN], "--recreate=x: must be a whole number"),
        ([*RUN, "--worker=0", "--", *TRAIN], "--worker: only with logs"),
        (["logs", *WHERE, "--worker=all"], "--worker=all: must be a worker number"),
        (["stop", *WHERE, "--", "train"], "stop takes no arguments"),
        ([*RUN, "--", "train", TRAIN[1]], "train requires --workdir"),
        ([*RUN, "--", *TRAIN[1:], "train"], "after -- the command of lowrank"),
        ([*RUN, "--", "sweep", *TRAIN[1:]], "sweep: every worker of a v5litepod-16 would run the whole sweep"),
        ([*RUN, "--", *TRAIN[:2], "--workdir=runs/a"], "--workdir=runs/a: must be in a bucket"),
        ([*RUN, "--", *TRAIN[:2], "--workdir", "/runs"], "--workdir=/runs: must"),
        ([*RUN, "--", *TRAIN[:2], "--workdir=file:///runs"], "--workdir=file:///runs: must"),
        ([*RUN, "--", "train", "--config=configs/x.py", TRAIN[2]], "--config=configs/x.py: not a file of this checkout"),
    ],
)
def test_mistakes_are_named_before_anything_is_paid_for(cloud, arguments, message):
    run = cloud.run(*arguments)
    assert run.returncode == 2 and f"tpu_vm.sh: {message}" in run.stderr
    assert not cloud.calls()


def test_one_worker_takes_a_sweep(cloud):
    run = cloud.run(*WHERE, "--type=v6e-8", "--dry-run", "--", "sweep", *TRAIN[1:])
    assert run.returncode == 0 and "lowrank sweep --config=" in run.stdout


def test_help_shows_commands_that_are_accepted(cloud):
    shown = cloud.run("--help")
    assert shown.returncode == 0
    examples = shown.stdout.partition("examples:\n")[2].replace("\\\n", " ").splitlines()
    assert len(examples) == 3
    for example in examples:
        words = example.replace(" -- ", " --dry-run -- ") if " -- " in example else f"{example} --dry-run"
        run = subprocess.run(["bash", "-c", words], env=cloud.environment, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
