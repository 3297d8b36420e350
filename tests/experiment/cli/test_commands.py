"""The command line as a user meets it: exit statuses, messages, no tracebacks."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import jax
import matplotlib
import pytest

import lowrank_jax.experiment as lx
from lowrank_jax.experiment.cli import commands, environment
from lowrank_jax.experiment.cli.flags import split_overrides
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests import running

CONFIG = f"--config={running.ROOT / 'configs' / 'digits_resnet.py'}"
NAMES = (
    "train",
    "compress",
    "evaluate",
    "predict",
    "sweep",
    "report",
    "overview",
    "preflight",
    "configs",
    "new",
    "init-report",
)


@dataclasses.dataclass
class Ended:
    status: int
    stdout: str
    stderr: str


def lowrank(*arguments) -> Ended:
    """Runs a command in this process; an exception would be a traceback."""
    out, err, before, cached = io.StringIO(), io.StringIO(), dict(os.environ), jax.config.jax_enable_compilation_cache
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            commands.main(list(map(str, arguments)))
    finally:
        os.environ.clear()
        os.environ.update(before)
        jax.config.update("jax_enable_compilation_cache", cached)
    assert "Traceback" not in out.getvalue() + err.getvalue(), err.getvalue()
    return Ended(end.value.code, out.getvalue(), err.getvalue())


def tiny(workdir, **changes):
    """The arguments that train the tiny experiment."""
    return running.command(workdir, steps=200, eval__every="50 steps", **changes)[3:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on eight devices."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    result = lowrank(*tiny(workdir))
    assert result.status == 0, result.stderr
    return workdir


def test_evaluate_prints_a_table_and_writes_json(trained, tmp_path):
    result = lowrank("evaluate", f"--workdir={trained}", f"--json={tmp_path / 'out.json'}")
    assert result.status == 0, result.stderr
    header, row = (line.split() for line in result.stdout.splitlines())
    assert header[:6] == ["split", "examples", "top1", "top5", "loss", "step"] and row[0] == "test" and row[1] == "360"
    written = json.loads((tmp_path / "out.json").read_text())
    final = json.loads((trained / "result.json").read_text())["eval"]
    assert written["step"] == 200
    # Another batch size, so another order of additions.
    assert written["metrics"]["top1"] == final["top1"] and abs(written["metrics"]["loss"] - final["loss"]) < 1e-5


def test_evaluate_on_other_steps_and_splits(trained):
    best = lowrank("evaluate", f"--workdir={trained}", "--step=best", "--split=train[:100]")
    assert best.status == 0, best.stderr
    assert best.stdout.splitlines()[1].split()[:2] == ["train[:100]", "100"]


def test_evaluate_shows_draws_and_writes_what_each_class_is_taken_for(trained, tmp_path):
    files = {"--json": tmp_path / "out.json", "--confusion": tmp_path / "matrix.svg"}
    result = lowrank("evaluate", f"--workdir={trained}", "--classes", *(f"{flag}={path}" for flag, path in files.items()))
    assert result.status == 0, result.stderr
    found = json.loads(files["--json"].read_text())["classes"]
    rows = [line.split() for line in result.stdout.splitlines()[4:-1]]
    assert result.stdout.splitlines()[2:4] == ["", "test:"] and rows[0][:3] == ["class", "examples", "top1"]
    columns = zip(found["names"], found["counts"], found["top1"], strict=True)
    shown = [[name, str(count), f"{top1:.4f}"] for name, count, top1 in columns]
    assert [row[:3] for row in rows[1:]] == shown and sum(found["counts"]) == 360
    assert "<svg" in files["--confusion"].read_text() and result.stdout.endswith(f"{files['--confusion']}\n")


def test_evaluate_compares_with_another_run(trained, tmp_path):
    against = f"--against={trained}@180"
    result = lowrank("evaluate", f"--workdir={trained}", against, f"--json={tmp_path / 'out.json'}")
    assert result.status == 0, result.stderr
    written = json.loads((tmp_path / "out.json").read_text())["fidelity"]
    header, row, empty, title, layers, *worst = result.stdout.splitlines()
    assert header.split()[5:9] == ["agreement", "KL", "logits", "error"] and row.split()[5] == f"{written['agreement']:.4f}"
    assert not empty and title == f"against {trained}, step 180:" and layers.split() == ["layer", "of", "error"]
    assert {line.split()[0] for line in worst} == written["layers"].keys() and written["kl"] > 0
    several = lowrank("evaluate", "--workdir", trained, tmp_path / "nowhere", against)
    assert several.status == 2 and several.stdout.splitlines()[1].split()[6] == f"{written['agreement']:.4f}"
    assert "nowhere" in several.stderr
    missing = lowrank("evaluate", "--workdir", trained, tmp_path / "nowhere", f"--against={tmp_path / 'gone'}")
    assert missing.status == 2 and not missing.stdout and missing.stderr.count("gone") == 1


def test_classes_are_shown_of_one_run_and_written_of_several(trained, tmp_path):
    both = ["evaluate", "--workdir", trained, tmp_path / "nowhere"]
    for flag in ("--classes", "--confusion=matrix.png"):
        result = lowrank(*both, flag)
        assert result.status == 2 and f"{flag.split('=')[0]} shows one run" in result.stderr and not result.stdout
    lowrank(*both, f"--json={tmp_path / 'out.json'}")
    (written,) = json.loads((tmp_path / "out.json").read_text())
    assert sum(map(sum, written["classes"]["confusion"])) == 360


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(trained, tmp_path):
    result = lowrank("evaluate", f"--workdir={trained}", f"--confusion={tmp_path / 'none' / 'matrix.png'}")
    assert result.status == 2 and "No such file or directory" in result.stderr and not result.stdout
    result = lowrank("evaluate", f"--workdir={trained}", "--step=7", f"--confusion={tmp_path / 'matrix.png'}")
    assert result.status == 2 and not (tmp_path / "matrix.png").exists()


def payload(folder, monkeypatch):
    """A module that says when it is imported, on the path."""
    (folder / "payload_of_a_test.py").write_text(
        f"import pathlib\nfrom lowrank_jax.models import MLP as Model\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
        "def factory(**kwargs):\n    return Model(**kwargs)\ndef other(**kwargs):\n    return print\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "payload_of_a_test", raising=False)
    return folder / "ran"


def with_model(trained, folder, name):
    """A copy of a run whose config names another model."""
    shutil.copytree(trained, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["name"] = name
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("flags", [[], ["--watch", "--poll=0.1"], ["--trust-code=payload_of_a_test:Model"]])
def test_evaluate_imports_no_code_that_is_not_trusted(trained, tmp_path, monkeypatch, flags):
    ran = payload(tmp_path, monkeypatch)
    run = with_model(trained, tmp_path / "a run", "payload_of_a_test:factory")
    result = lowrank("evaluate", f"--workdir={run}", *flags)
    again = shlex.join(["lowrank", "evaluate", f"--workdir={run}", *flags, "--trust-code=payload_of_a_test:factory"])
    assert result.status == 2 and not ran.exists()
    assert "model.name 'payload_of_a_test:factory'" in result.stderr
    assert result.stderr.splitlines()[-1] == f"To import it: {again}"
    if not flags:
        trusted = lowrank(*shlex.split(again)[1:])
        assert ran.exists() and "it is another experiment's" in trusted.stderr  # as its records know


def test_what_a_trusted_name_makes_has_to_be_a_model(trained, tmp_path, monkeypatch):
    ran = payload(tmp_path, monkeypatch)
    run = with_model(trained, tmp_path / "run", "payload_of_a_test:other")
    result = lowrank("evaluate", f"--workdir={run}", "--trust-code")
    assert result.status == 2 and ran.exists()
    assert "payload_of_a_test:other makes builtin_function_or_method, not a Linen module" in result.stderr


def test_evaluate_goes_on_with_the_runs_that_import_nothing(trained, tmp_path, monkeypatch):
    ran = payload(tmp_path, monkeypatch)
    run = with_model(trained, tmp_path / "untrusted", "payload_of_a_test:Model")
    result = lowrank("evaluate", "--workdir", run, trained)
    assert result.status == 2 and not ran.exists()
    assert len(result.stdout.splitlines()) == 2 and "--trust-code=payload_of_a_test:Model" in result.stderr


@pytest.mark.parametrize("others", [[], ["nowhere"]])
def test_evaluate_imports_no_code_of_what_it_compares_with_either(trained, tmp_path, monkeypatch, others):
    ran = payload(tmp_path, monkeypatch)
    run = with_model(trained, tmp_path / "untrusted", "payload_of_a_test:Model")
    command = ["evaluate", "--workdir", str(trained), *others, f"--against={run}@best"]
    result = lowrank(*command)
    assert result.status == 2 and not ran.exists() and not result.stdout
    assert result.stderr.endswith(f"{shlex.join(['lowrank', *command, '--trust-code=payload_of_a_test:Model'])}\n")


def test_train_imports_nothing_that_a_stored_config_names(trained, tmp_path, monkeypatch):
    ran = payload(tmp_path, monkeypatch)
    run = with_model(trained, tmp_path / "run", "payload_of_a_test:Model")
    result = lowrank(*tiny(run))
    assert result.status == 2 and "belongs to another experiment: model.name" in result.stderr and not ran.exists()
    assert lowrank("report", run, f"--out={tmp_path / 'out'}").status == 0 and not ran.exists()


@pytest.mark.slow
def test_a_process_evaluates_on_other_devices(trained):
    """The whole command, as the shell runs it."""
    flags = [f"--workdir={trained}", "--step=best", "--split=train[:100]", f"--against={trained}@180"]
    one = running.run([sys.executable, "-m", "lowrank_jax", "evaluate", *flags], devices=1)
    assert one.returncode == 0, one.stderr
    assert one.stdout == lowrank("evaluate", *flags).stdout


def test_evaluate_takes_several_work_directories(trained, tmp_path):
    result = lowrank("evaluate", "--workdir", trained, tmp_path / "nowhere", f"--json={tmp_path / 'out.json'}")
    assert result.status == 2 and f"{tmp_path / 'nowhere'} is not a work directory" in result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [["workdir", "split"], [str(trained), "test"]]
    (written,) = json.loads((tmp_path / "out.json").read_text())
    assert (written["workdir"], written["step"]) == (str(trained), 200)


def test_files_of_ours_beside_the_runs_of_a_sweep_are_passed_over(trained, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / name)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "eval": {**config["eval"], "batch_size": 128}}))
    Workdir(tmp_path).write_json("sweep.json", {"commands": [], "tuned": [], "trials": {"a": {}, "b": {}}})
    assert lowrank("report", tmp_path).status == 0
    evaluate = ("evaluate", f"--json={tmp_path / 'all.json'}", "--workdir")
    (tmp_path / "all.json").touch()
    everything = sorted(tmp_path.iterdir())
    assert len(everything) > 8
    result = lowrank(*evaluate, *everything)
    assert (result.status, result.stderr) == (0, ""), result.stderr
    assert [pathlib.Path(one["workdir"]).name for one in json.loads((tmp_path / "all.json").read_text())] == ["a", "b"]
    assert lowrank("report", f"--out={tmp_path / 'out'}", *(path for path in everything if path.name != "all.json")).status == 0

    for strange in ("notes.md", "mine_speed.txt"):
        (tmp_path / strange).touch()
        result = lowrank(*evaluate, *everything, tmp_path / strange)
        assert result.status == 2 and len(result.stderr.splitlines()) == 1 and strange in result.stderr
    result = lowrank("evaluate", f"--workdir={tmp_path / 'sweep.json'}")
    assert result.status == 2 and "sweep.json is not a work directory" in result.stderr


def test_a_watch_stopped_by_ctrl_c_has_its_status(tmp_path, monkeypatch):
    waits = threading.Event()

    def interrupt():
        waits.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(commands, "say", lambda text: (print(text), waits.set()))
    thread = threading.Thread(target=interrupt)
    thread.start()
    result = lowrank("evaluate", f"--workdir={tmp_path / 'later'}", "--watch", "--poll=0.1")
    thread.join()
    assert (result.status, result.stdout) == (75, f"waiting for {tmp_path / 'later'}\n")


@pytest.mark.slow
def test_a_watch_stopped_by_a_signal_has_its_status(tmp_path):
    arguments = ["evaluate", f"--workdir={tmp_path / 'later'}", "--watch"]
    with running.start([sys.executable, "-m", "lowrank_jax", *arguments]) as process:
        assert process.stdout.readline().startswith("waiting for")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    assert (process.returncode, output) == (75, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=7"], "has no step 7; choose from ["),
        (["--step=lates"], "has no step lates"),
        (["--watch", "--step=best"], "remove --step and --json"),
        (["--watch", "--against=x"], "compares no networks; remove --against"),
        (["--against=@best"], "@best names no work directory: DIR@best"),
        (["--watch", "--classes"], "counts no classes; remove --classes and --confusion"),
        (["--confusion=matrix.txt"], "--confusion: matrix.txt must end in .png, .svg, .pdf"),
        (["--watch", "--processes=2", "--process=1"], "runs as a single process; remove --processes --process"),
        (["--split=tset"], "digits has no split 'tset'; did you mean test?"),
    ],
)
def test_evaluate_refuses_what_is_not_there(trained, arguments, message):
    result = lowrank("evaluate", f"--workdir={trained}", *arguments)
    assert result.status == 2
    assert message in result.stderr


def test_evaluate_says_so_when_the_newest_checkpoint_is_damaged(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    step = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    for file in step.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    result = lowrank("evaluate", f"--workdir={tmp_path / 'run'}")
    assert result.status == 0, result.stderr
    assert f"checkpoint {step.name} cannot be used" in result.stdout and step.is_dir()
    assert lowrank("evaluate", f"--workdir={tmp_path / 'run'}", f"--step={step.name}").status == 2


def test_overview_names_every_kernel_without_touching_data(tmp_path):
    result = lowrank("overview", CONFIG, "--config.lowrank.scale=0.1", f"--config.dataset.data_dir={tmp_path / 'none'}")
    assert result.status == 0, result.stderr
    assert "stage1/block1/conv1/kernel" in result.stdout and "kept dense by rule 1" in result.stdout
    assert not (tmp_path / "none").exists()


def test_overview_draws_what_is_lost_by_the_budget(tmp_path):
    network = ["--config.model.name=mlp", "--config.model.kwargs={'widths': (32,)}", "--config.lowrank.rules=()"]
    budget = ["--config.lowrank.budget.macs=0.5", "--config.lowrank.budget.objective=risk"]
    result = lowrank("overview", CONFIG, *network, *budget, f"--picture={tmp_path / 'budget.svg'}")
    assert result.status == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "budget.svg")
    assert "<svg" in (tmp_path / "budget.svg").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--picture=budget.jpg"], "'budget.jpg' must end in .png or .svg"),
        (["--picture=/proc/nowhere/a.png"], "/proc/nowhere"),
        (["--config.lowrank.method=none", "--picture=budget.png"], "a dense network has no ranks to choose"),
    ],
)
def test_a_picture_of_budgets_that_cannot_be_is_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    result = lowrank("overview", f"--config={running.ROOT / 'configs' / 'digits_resnet.py'}", *flags)
    assert result.status == 2 and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_overview_shows_a_mesh_that_is_not_there():
    axes = ("--config.mesh.fsdp=2", "--config.mesh.model=2")
    sixteen = lowrank("overview", CONFIG, *axes, "--devices=16")
    assert sixteen.status == 0, sixteen.stderr
    assert "mesh data 4 x fsdp 2 x model 2" in sixteen.stdout
    assert re.search(r"stage1/block1/conv1/kernel/u +3x3x16x4 +-, -, model\*fsdp, - +3x3x4x4 +576", sixteen.stdout)
    three = lowrank("overview", CONFIG, *axes, "--devices=3")
    assert three.status == 2 and "a mesh of -1x2x2 does not fit 3 devices" in three.stderr


def test_a_wrong_config_gets_all_its_problems_and_status_2(tmp_path):
    result = lowrank("train", CONFIG, "--config.lowrank.scael=0.1", "--config.batch_size", "-3", f"--workdir={tmp_path / 'w'}")
    assert result.status == 2
    assert result.stderr.splitlines()[0].endswith("digits_resnet.py: 2 problems")
    assert "lowrank.scael: unknown key; did you mean lowrank.scale?" in result.stderr
    assert "batch_size: -3; must be at least 1" in result.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lowrank.rules=({'path': 'stm/.*'},)", "rule 'stm/.*' matches no parameter; the nearest is 'stem/conv/kernel'"),
        ("optim.decay_rules=(('.*/kernl', 1.0), ('.*', 0.0))", "optim.decay_rules: rule '.*/kernl' matches no parameter"),
        ("mesh.data=3", "mesh.data: a mesh of 3x1x1 does not fit 8 devices"),
        ("model.kwargs.blocks=(1, 1)", "model or lowrank"),
    ],
)
def test_parts_that_do_not_fit_together_are_config_problems_too(tmp_path, override, message):
    result = lowrank("train", CONFIG, f"--config.{override}", f"--workdir={tmp_path / 'w'}")
    assert result.status == 2
    assert message in result.stderr


def test_a_work_directory_of_another_experiment_is_refused(trained):
    result = lowrank(*tiny(trained, lowrank__scale=0.5))
    assert result.status == 2
    assert "belongs to another experiment: lowrank.scale is 0.25 there, 0.5 here" in result.stderr


def test_data_that_is_not_there_is_no_traceback(tmp_path):
    config = f"--config={running.ROOT / 'configs' / 'fashion_mnist_mlp.py'}"
    result = lowrank("train", config, f"--config.dataset.data_dir={tmp_path}", f"--workdir={tmp_path / 'w'}")
    assert result.status == 2
    assert "fashion_mnist is not prepared under" in result.stderr and "scripts/prepare_fashion_mnist.sh" in result.stderr


def test_a_file_that_cannot_be_written_is_no_traceback(trained, tmp_path):
    result = lowrank("evaluate", f"--workdir={trained}", f"--json={tmp_path / 'no' / 'out.json'}")
    assert result.status == 2
    assert "out.json: No such file or directory" in result.stderr


def test_work_that_fails_leaves_the_file_for_its_result_as_it_was(trained, tmp_path):
    kept, absent = tmp_path / "kept.json", tmp_path / "absent.json"
    kept.write_text("old")
    for file in (kept, absent):
        assert lowrank("evaluate", f"--workdir={trained}", "--step=7", f"--json={file}").status == 2
    assert kept.read_text() == "old" and not absent.exists()


def test_divergence_has_a_status_of_its_own(tmp_path):
    result = lowrank(*tiny(tmp_path, optim__lr=1e30, optim__warmup="0 steps", model__kwargs={"widths": (8,)}))
    assert result.status == 4, result.stderr
    assert "There is no checkpoint yet. Lower optim.lr or set optim.clip_norm." in result.stderr


@pytest.mark.parametrize("command", [[], *([name] for name in NAMES)])
def test_help_has_examples(command):
    result = lowrank(*command, "--help")
    assert result.status == 0
    assert ("examples:" in result.stdout) == bool(command)
    assert "exit status" in result.stdout or command in (["report"], ["overview"], ["configs"], ["new"], ["init-report"])


WRONG = [
    [],
    ["tain"],
    ["train"],
    ["train", CONFIG, "--workdri=x"],
    ["train", CONFIG, "--workdir=x", "--config.seed"],
    ["train", CONFIG, "--workdir="],
    ["train", CONFIG, "--workdir=x", "--process=-1"],
    ["evaluate", "--workdir=x", "--poll=0"],
    ["sweep", CONFIG, "--workdir=x", "--sweep=seed=0:2", "--jobs=0"],
    ["sweep", CONFIG, "--workdir=x", "--sweep=seed=0:2", "--asha-grace=soon"],
]


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_command_line_has_status_2(arguments):
    result = lowrank(*arguments)
    assert result.status == 2
    assert result.stderr


def test_help_and_a_wrong_command_line_are_answered_without_jax():
    code = """
import contextlib, io, json, sys
from lowrank_jax.experiment.cli.commands import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
    assert code == (0 if arguments[-1:] == ["--help"] else 2), arguments
    assert not {"jax", "flax", "absl", "numpy", "ml_collections"} & sys.modules.keys(), arguments
"""
    asked = [["--help"], *([name, "--help"] for name in NAMES), *WRONG]
    ended = subprocess.run([sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_both_ways_to_start_the_command():
    for command in ([sys.executable, "-m", "lowrank_jax"], [f"{sys.prefix}/bin/lowrank"]):
        help, wrong = running.run([*command, "--help"]), running.run([*command, "tain"])
        assert (help.returncode, wrong.returncode) == (0, 2)
        assert "exit status" in help.stdout and "invalid choice: 'tain'" in wrong.stderr


def test_overrides_are_taken_out_of_the_command_line():
    given = ["train", "--config.a.b=c=d", "--config=file", "--config.e", "-1", "--config.f=", "--workdir=x"]
    assert split_overrides(given) == ([("a.b", "c=d"), ("e", "-1"), ("f", "")], ["train", "--config=file", "--workdir=x"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus=1"], "--gpus: only with --engine=ray"),
        (["--engine=ray", "--spot"], "--spot: only with --emit=jobset"),
        (["--emit=jobset"], "--tpu: required with --emit=jobset"),
        (["--emit=sh", "--jobs=2"], "--jobs: not with --emit"),
        (["--engine=ray", "--asha-reduction=2"], "--asha-reduction: only with --asha-grace"),
    ],
)
def test_flags_of_a_sweep_that_do_not_go_together_are_refused(tmp_path, flags, message):
    result = lowrank("sweep", CONFIG, f"--workdir={tmp_path / 'w'}", "--sweep=seed=0:2", *flags)
    assert result.status == 2 and message in result.stderr
    assert not (tmp_path / "w").exists()


def test_a_refused_jobset_leaves_no_folder(tmp_path):
    flags = ["--emit=jobset", "--tpu=v5e:4x4", "--image=x"]
    result = lowrank("sweep", CONFIG, f"--workdir={tmp_path / 'w'}", "--sweep=seed=0:2", *flags)
    assert result.status == 2 and "--emit=jobset" in result.stderr and not (tmp_path / "w").exists()


@pytest.mark.parametrize("flag", ["--split", "--dataset", "--data-dir", "--step", "--json"])
def test_empty_flags_are_refused(trained, flag):
    result = lowrank("evaluate", f"--workdir={trained}", f"{flag}=")
    assert result.status == 2 and f"argument {flag}: must not be empty" in result.stderr


TEXTS = {
    "sweep": ["sweep", "ray-address", "tpu", "image", "name", "namespace", "queue", "service-account", "workdir", "config"],
    "report": ["out", "rival"],
    "preflight": ["topology", "sweep", "json", "config"],
    "init-report": ["images", "out", "config"],
    "train": ["coordinator", "workdir", "config"],
}


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command, flags in TEXTS.items() for flag in flags])
def test_no_flag_that_takes_a_text_takes_none(command, flag):
    result = lowrank(command, f"--{flag}=")
    assert result.status == 2 and f"argument --{flag}: must not be empty" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bogus", "cuda"])
def test_a_platform_that_is_not_here_is_one_line(name, tmp_path):
    command = [sys.executable, "-m", "lowrank_jax", "train", CONFIG, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": name}, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("lowrank: jax has no device to compute on: ") and name in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "JAX_NUM_CPU_DEVICES"])
def test_a_setting_that_jax_does_not_understand_is_one_line(name):
    command = [sys.executable, "-m", "lowrank_jax", "overview", CONFIG]
    done = subprocess.run(command, env={**os.environ, name: "bogus"}, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("lowrank: jax cannot start: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_disable_jit", True),
        ("jax_transfer_guard", "disallow"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_numpy_rank_promotion", "raise"),
    ],
)
def test_a_mode_of_jax_in_which_training_cannot_run_is_named(name, value):
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        result = lowrank("overview", CONFIG)
        with pytest.raises(UserError, match=f"{name} is {value} in this environment"):
            lx.load_config("digits_resnet")
    finally:
        jax.config.update(name, before)
    assert result.status == 2 and result.stderr.startswith(f"lowrank: {name} is {value} in this environment; ")
    assert name.upper() in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_status_is_right_where_nobody_can_be_told(tmp_path):
    command = [sys.executable, "-m", "lowrank_jax", "overview", CONFIG, "--config.optim.lr"]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        assert subprocess.run(command, stderr=full, cwd=tmp_path).returncode == 2


def test_a_step_that_no_number_can_be_is_refused(trained):
    for step in ("9" * 5000, "٣", "-120", "1_0"):
        result = lowrank("evaluate", f"--workdir={trained}", f"--step={step}")
        assert result.status == 2 and len(result.stderr.splitlines()) <= 2, result.stderr


def test_a_user_without_a_home_gets_one_for_what_can_be_made_again(monkeypatch, capsys, tmp_path):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(environment.pathlib.Path, "home", unknown)
    monkeypatch.setattr(environment.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    environment.prepare()
    assert os.environ["HOME"] == str(tmp_path)
    assert capsys.readouterr().err == f"lowrank: this user has no home folder; using {tmp_path} (set HOME)\n"


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_a_cache_that_cannot_be_written_is_one_line(variable, monkeypatch, capsys):
    folder = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, "/dev/null/cache")
    if variable.startswith("JAX"):
        jax.config.update("jax_compilation_cache_dir", "/dev/null/cache")  # as jax reads it when it is imported
    try:
        environment.prepare()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
    told = capsys.readouterr().err
    assert told.startswith("lowrank: /dev/null/cache") and "cannot be written" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("foo://bar", "foo://bar: Unsupported filesystem: 'foo'"),
        ("s3://nope/x", "s3://nope"),
        ("gs://", "gs:// does not name a folder"),
        ("/dev/null/run", "/dev/null/run"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_work_directory_that_cannot_be_is_refused(name, problem):
    for arguments in (tiny(name), ["evaluate", f"--workdir={name}"]):
        result = lowrank(*arguments)
        assert result.status == 2 and (problem in result.stderr or "has no config.json" in result.stderr), result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_names_that_are_no_text_are_refused(tmp_path):
    result = lowrank("evaluate", f"--workdir={tmp_path}/\udcff")
    assert result.status == 2 and "is not UTF-8; rename it" in result.stderr


def test_results_are_not_written_to_a_pipe(trained, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = lowrank("evaluate", f"--workdir={trained}", f"--json={tmp_path / 'pipe'}")
    assert result.status == 2 and f"{tmp_path / 'pipe'}: a pipe" in result.stderr


def test_what_a_terminal_cannot_show_is_replaced(trained, tmp_path):
    name = tmp_path / "é\udcff"
    done = subprocess.run(
        [sys.executable, "-c", f"from lowrank_jax.experiment.cli.output import *; print_anything(); print({str(name)!r})"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == f"{tmp_path}/\\xe9\\udcff", done.stderr


@pytest.mark.parametrize("given", ["", "cache", "./cache"])
def test_a_cache_home_that_is_no_absolute_path_means_the_default(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # jax's own is left alone
    environment.prepare()
    assert environment.cache_home() == tmp_path / ".cache" / "lowrank_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    environment.prepare()
    assert str(environment.cache_home()) == "/elsewhere/lowrank_jax"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"batch_size": 2**31 - 1}, "a batch of 2,147,483,647 images (batch_size): 146GB"),
        ({"eval__batch_size": 2**31 - 1}, "a batch of 2,147,483,647 images (eval.batch_size): 146GB"),
        ({"model__kwargs": {"widths": (10**6, 10**6)}}, "the parameters and the optimiser's state (model.kwargs): "),
    ],
)
def test_what_cannot_fit_into_memory_is_said_before_it_is_tried(tmp_path, change, part, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 2**17 if name == "SC_PAGE_SIZE" else 2**19)  # 64 GB
    if "batch" in part:
        monkeypatch.setattr(jax, "device_count", lambda: 1)
    result = lowrank(*tiny(tmp_path / "run", **{"optim__warmup": "0 steps", "mesh__data": -1, **change}))
    assert result.status == 2 and f"out of memory: {part}" in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_memory_that_runs_out_on_the_way_is_one_line(monkeypatch, tmp_path):
    from lowrank_jax.experiment.training import loop

    for error in (MemoryError("Unable to allocate 2 TiB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")):
        monkeypatch.setattr(loop, "phases_of", raises(error))
        result = lowrank(*tiny(tmp_path))
        assert result.status == 1 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(f"lowrank: out of memory: {error}; lower batch_size")


def test_errors_of_our_own_are_not_hidden(monkeypatch, tmp_path):
    from lowrank_jax.experiment.training import loop

    for error in (ZeroDivisionError("ours"), jax.errors.JaxRuntimeError("INTERNAL: ours")):
        monkeypatch.setattr(loop, "phases_of", raises(error))
        with pytest.raises(type(error), match="ours"):
            commands.main(tiny(tmp_path))


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_report_prints_the_table_and_where_the_page_is(trained, tmp_path):
    result = lowrank("report", trained, f"--out={tmp_path / 'out'}")
    assert result.status == 0, result.stderr
    header, row, *_ = (line.split() for line in result.stdout.splitlines())
    assert header[:5] == ["scale", "arm", "params", "MACs", "top-1"] and row[1] == "kernel_projection"
    assert str(tmp_path / "out" / "report.html") in result.stdout.splitlines()
    missing = lowrank("report", tmp_path / "nowhere")
    assert missing.status == 2 and "nowhere is not a folder" in missing.stderr


def test_pictures_are_drawn_without_the_latex_of_a_matplotlibrc(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setenv("PATH", "")
    result = lowrank("report", trained, f"--out={tmp_path / 'out'}")
    assert result.status == 0, result.stderr
    assert matplotlib.rcParams["text.usetex"]


def test_init_report_prints_a_table_and_writes_its_files(tmp_path):
    changes = ["--config.model.name=mlp", "--config.model.kwargs={'widths': (32,)}", "--config.lowrank.rules=()"]
    out = tmp_path / "report"
    flags = ["--scales=0.1", "--methods=spectral,kernel_projection", "--batch-size=4", f"--out={out}"]
    result = lowrank("init-report", CONFIG, *changes, *flags)
    assert result.status == 0, result.stderr
    written = [f"{out}.{suffix}" for suffix in ("md", "json", "budgets.png", "png")]
    assert "mean relative risk" in result.stdout and result.stdout.splitlines()[-4:] == written
    assert "--methods=spectral,kernel_projection" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scales=a"], "'a' is not a list of numbers such as 0.05,0.1"),
        (["--seeds=0"], "'0' must be a whole number of at least 1"),
        (["--methods=sectral"], "unknown 'sectral'; did you mean spectral?"),
        (["--out=/proc/nowhere/report", "--scales=0.1", "--methods=spectral"], "/proc/nowhere"),
    ],
)
def test_init_report_refuses_what_it_cannot_do(flags, message):
    result = lowrank("init-report", CONFIG, *flags)
    assert result.status == 2
    assert message in result.stderr


@pytest.mark.slow
def test_an_interrupted_init_report_leaves_no_files(tmp_path):
    flags = ["--scales=0.1", "--methods=spectral", f"--out={tmp_path / 'report'}"]
    with running.start([sys.executable, "-m", "lowrank_jax", "init-report", CONFIG, *flags]) as process:
        while not (tmp_path / "report.png").exists():
            assert process.poll() is None, process.stdout.read()
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
    assert process.returncode == 130 and output.endswith("lowrank: interrupted\n") and "Traceback" not in output
    assert not list(tmp_path.iterdir())


def test_a_run_stopped_by_sigterm_is_saved_and_has_its_status(tmp_path, monkeypatch, unhandled_sigterm):
    from lowrank_jax.experiment.training import loop

    placed, put = [], loop.put_batch

    def interrupted(*args):
        placed.append(1)
        if len(placed) == 3:
            signal.raise_signal(signal.SIGTERM)
        return put(*args)

    monkeypatch.setattr(loop, "put_batch", interrupted)
    result = lowrank(*tiny(tmp_path))
    assert result.status == 75, result.stderr
    assert f"stopping: saved step 3 to {tmp_path}" in result.stdout
