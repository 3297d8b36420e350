"""Whole runs: to the end, stopped, killed, resumed, damaged, diverged.  Tests in this process share one trained run."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.pipeline import TrainBatches, shard_of
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.hosts.sharding import put_batch
from lowrank_jax.experiment.training.build import build
from lowrank_jax.experiment.training.evaluate import evaluate
from lowrank_jax.experiment.training.log_window import Diverged
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.training.mixing import normalizer
from lowrank_jax.experiment.workdir.checked_json import unseal
from lowrank_jax.experiment.workdir.checkpoint import Checkpoints
from lowrank_jax.experiment.workdir.digest import digests
from lowrank_jax.paths import named_leaves
from tests import running

pytestmark = pytest.mark.usefixtures("programs_are_shared")

ALL_DEVICES = 8

# Beside what the tiny experiment has, averages, erasing, parts of a batch and a held-out split.
RICH = {
    "dataset__train_split": "train[:1200]",
    "dataset__valid_split": "train[1200:]",
    "dataset__random_erasing": 0.3,
    "optim__ema_decay": 0.5,
    "optim__accumulate": 2,
    "optim__lr": 0.3,
    "eval__every": "10 steps",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end: its folder, and what `train` returned."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(running.config(**RICH), str(folder))


def copy_of(whole, tmp_path, without=()):
    """The folder of the whole run, without some of its checkpoints."""
    shutil.copytree(whole[0], tmp_path / "copy")
    for step in without:
        shutil.rmtree(tmp_path / "copy" / "checkpoints" / str(step))
    return tmp_path / "copy"


def final_state(workdir, **changes):
    """Every array of the newest checkpoint by name, read on this process's devices."""
    experiment = build(running.config(**changes))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(experiment.shapes)
    assert not restored.damaged
    return restored.step, {name: np.asarray(leaf) for name, leaf in named_leaves(restored.state).items()}


def assert_bitwise_equal(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        np.testing.assert_array_equal(a[1][name], b[1][name], err_msg=name)


def wait_for(process, text):
    """Reads output until a line holds `text`; returns what was read."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came; output was:\n{seen}")


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def evaluations(folder):
    return [line for line in running.metrics(folder) if "eval/top1" in line]


def logged_losses(folder):
    return {line["step"]: line["train/loss"] for line in running.metrics(folder) if "train/loss" in line}


def test_a_run_leaves_everything_behind_that_the_docs_promise(whole):
    folder, run = whole
    assert not run.interrupted
    assert sorted(run.train) == [10, 20, 30, 40] and sorted(run.evals) == [10, 20, 30, 40]
    assert run.train[40]["train/loss"] < run.train[10]["train/loss"]

    lines = running.metrics(folder)
    assert [line["step"] for line in lines] == [10, 10, 20, 20, 30, 30, 40, 40]
    assert {"train/loss", "train/top1", "train/grad_norm", "train/lr", "train/images_per_second"} <= lines[0].keys()
    result = result_of(folder)
    assert result["step"] == 40 and result["eval"] == run.evals[40]
    assert result["params"] == sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    assert {"params", "macs", "seconds", "versions", "config_digest"} <= result.keys()
    assert running.fields_of(folder / "checkpoints" / "40") == running.FIELDS
    assert "dense1/kernel" in (folder / "overview.txt").read_text()
    assert list(folder.glob("events.out.tfevents.*"))
    assert json.loads((folder / "config.json").read_text())["optim"]["lr"] == 0.3


def test_a_run_that_has_ended_has_nothing_left_to_do(whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    again = train(running.config(**RICH), str(folder))
    assert not again.interrupted and not again.train and not again.evals
    assert running.metrics(folder) == running.metrics(whole[0])


def test_tensorboard_reads_what_was_written(whole):
    folder, _ = whole
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tensor = events.Tensors("train/loss")[0]
    from tensorboard.util.tensor_util import make_ndarray

    np.testing.assert_allclose(make_ndarray(tensor.tensor_proto), logged_losses(folder)[10], rtol=1e-6)


def test_a_stopped_and_killed_run_resumes_to_the_same_bits(whole, tmp_path, capsys, monkeypatch):
    # Neither where it is logged nor where it is evaluated.
    config, stop, placed = running.config(**RICH, checkpoint__every="6 steps"), running.Stop(), []

    def count(*args):
        placed.append(1)
        stop.requested = len(placed) == 3
        if len(placed) == 3 + 14:
            raise MemoryError
        return put_batch(*args)

    monkeypatch.setattr("lowrank_jax.experiment.training.loop.put_batch", count)
    assert train(config, str(tmp_path), stop=stop).interrupted
    assert f"stopping: saved step 3 to {tmp_path}; the same command continues it" in capsys.readouterr().out
    with pytest.raises(MemoryError):
        train(config, str(tmp_path))
    assert f"resuming {tmp_path} from step 3 " in capsys.readouterr().out
    assert train(config, str(tmp_path)).evals.keys() == {20, 30, 40}
    assert f"resuming {tmp_path} from step 12 " in capsys.readouterr().out

    assert_bitwise_equal(*(final_state(folder, **RICH) for folder in (whole[0], tmp_path)))
    assert evaluations(tmp_path) == evaluations(whole[0])  # each once, and the same
    assert logged_losses(tmp_path) == logged_losses(whole[0])


def test_a_stop_in_an_evaluation_does_not_change_which_step_is_best(whole, tmp_path, monkeypatch):
    config = running.config(**RICH, checkpoint__every="1000 steps")
    for _ in range(2):  # in the first evaluation, and again in that of the same step
        stop = running.Stop()

        def interrupted(*args, stop=stop, **kwargs):
            stop.requested = True
            return evaluate(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("lowrank_jax.experiment.training.loop.evaluate", interrupted)
            stopped = train(config, str(tmp_path), stop=stop)
        assert stopped.interrupted and not stopped.evals
    resumed = train(config, str(tmp_path))
    assert resumed.evals == whole[1].evals
    assert result_of(tmp_path)["best_step"] == result_of(whole[0])["best_step"]
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert result_of(tmp_path)["best_step"] in checkpoints.steps()


@pytest.mark.parametrize("damage", ["flipped byte", "truncated"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(whole, tmp_path, damage, capsys):
    folder = copy_of(whole, tmp_path)
    files = [path for path in (folder / "checkpoints" / "40").rglob("d/*") if path.is_file()]
    for file in files:  # which of them the step still needs is orbax's affair
        content = bytearray(file.read_bytes())
        if damage == "truncated":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)

    again = train(running.config(**RICH), str(folder))
    output = capsys.readouterr().out
    assert f"{folder}: checkpoint 40 cannot be used (" in output and "using 30 instead" in output
    assert (folder / "damaged" / "40").is_dir()
    assert sorted(again.train) == [40] and again.train[40]["train/loss"] == whole[1].train[40]["train/loss"]
    assert digests(again.state) == digests(whole[1].state)


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(tmp_path):
    config = running.config(**{**RICH, "optim__lr": 1e30, "checkpoint__every": "1 steps"})
    with pytest.raises(
        Diverged, match=r"is (nan|inf) at step \d+ .*Last good checkpoint: \d+.*Lower optim.lr or set optim.clip_norm"
    ):
        train(config, str(tmp_path))
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())
    assert steps[-1] < 5
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(build(config).shapes)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.state.params))


def test_nothing_is_evaluated_after_a_step_that_is_not_finite(tmp_path, monkeypatch):
    """Networks may give finite outputs with weights that are not."""
    made_up = {"": {"loss": 1.0, "top1": 0.5, "examples": 360}}
    monkeypatch.setattr("lowrank_jax.experiment.training.loop.evaluate", lambda *args, **kwargs: made_up)
    config = running.config(optim__lr=1e30, eval__every="1 steps", log__every="40 steps", checkpoint__every="40 steps")
    told = []
    with pytest.raises(Diverged, match=r"at step \d+") as raised:
        train(config, str(tmp_path), on_evaluation=lambda step, evaluated: told.append(step))
    step = int(re.search(r"at step (\d+)", str(raised.value))[1])
    assert told == list(range(1, step)) and [line["step"] for line in evaluations(tmp_path)] == told
    assert [*unseal(json.loads((tmp_path / "checkpoints" / "scores.json").read_text()))] == [str(at) for at in told]
    assert all(int(path.name) < step for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())


def test_a_step_is_said_to_be_saved_once_it_is_on_disk(tmp_path, monkeypatch, capsys):
    looks = []

    def late(self):
        looks.append(self.on_disk)
        if len(looks) == 18:  # before step 18
            assert self.on_disk is None and not (tmp_path / "saved.json").exists()
            self.wait()
            assert json.loads((tmp_path / "saved.json").read_text())["step"] == 10

    monkeypatch.setattr(Checkpoints, "confirm", late)
    train(running.config(checkpoint__every="10 steps", log__every="5 steps", steps=29), str(tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    saved = [line.partition("saved@")[2] for line in lines]
    assert len(looks) == 30 and saved == ["", "", "", "10", "10", "10"]


def test_the_best_checkpoint_is_chosen_on_the_held_out_part(whole):
    folder, run = whole
    lines = evaluations(folder)
    assert [line["valid/examples"] for line in lines] == [237] * 4 and {line["eval/examples"] for line in lines} == {360}
    result = result_of(folder)
    assert result["valid"]["top1"] == lines[-1]["valid/top1"] and result["eval"] == run.evals[40]
    assert result["best_step"] == max(lines, key=lambda line: (line["valid/top1"], line["step"]))["step"]


def test_averaged_weights_are_what_is_evaluated_and_the_raw_ones_beside_them(whole):
    folder, run = whole
    result = result_of(folder)
    assert result["eval"] == run.evals[40] != result["eval_raw"]
    experiment = build(running.config(**RICH))
    arrays = datasets.load(experiment.dataset, "test", None)
    images = normalizer(experiment.dataset.mean, experiment.dataset.std)(arrays.images)
    network = jax.jit(lambda variables: lr.apply(experiment.model, variables, images, train=False))
    for name, variables in (("eval", run.state.ema), ("eval_raw", run.state.variables()["_raw"])):
        logits = np.asarray(network(variables))
        assert (logits.argmax(-1) == arrays.labels).mean() == pytest.approx(result[name]["top1"], abs=1e-6)

    evaluation = Evaluator().evaluate(str(folder))
    assert evaluation.metrics == pytest.approx(result["eval"], rel=1e-5)
    assert evaluation.raw_metrics == pytest.approx(result["eval_raw"], rel=1e-5)
    assert [line.split()[:3] for line in evaluation.table().splitlines()[1:]] == [
        ["test,", "averaged", "360"],
        ["test,", "raw", "360"],
    ]


def test_the_first_batches_are_what_kernels_are_projected_for(tmp_path, monkeypatch):
    class TakenError(Exception):
        pass

    taken = []

    def init(self, batches):
        taken.extend(batches())
        raise TakenError

    monkeypatch.setattr("lowrank_jax.experiment.training.build.Experiment.init", init)
    config = running.config(**RICH, lowrank__moment_batches=2)
    with pytest.raises(TakenError):
        train(config, str(tmp_path))
    experiment = build(config)
    images = datasets.load(experiment.dataset, "train[:1200]", None)
    batches = TrainBatches(images, 32, 40, 0, config.dataset.to_augmentation(), shard_of(experiment.mesh))
    assert len(taken) == 2
    for i, batch in enumerate(taken):
        np.testing.assert_array_equal(batch["image"], batches[i]["image"])


def test_evaluations_are_announced(whole, tmp_path, capsys):
    train(running.config(**RICH), str(copy_of(whole, tmp_path, without=(40,))))
    said = capsys.readouterr().out
    for what in ("evaluated", "evaluated the raw weights", "evaluated on the held-out split"):
        assert f"{what} at step 40: top1 0." in said


@pytest.mark.slow
def test_training_does_not_depend_on_the_devices(tmp_path):
    losses = {}
    for name, mesh in {
        "data": {},
        "all": {"mesh__data": 2, "mesh__fsdp": 2, "mesh__model": 2},
    }.items():
        run = train(running.config(steps=20, optim__accumulate=4, **mesh), str(tmp_path / name))
        losses[name] = [run.train[step]["train/loss"] for step in (10, 20)]
    one = running.run(running.command(tmp_path / "one", steps=20, optim__accumulate=4), devices=1)
    assert one.returncode == 0, one.stderr
    losses["one"] = list(logged_losses(tmp_path / "one").values())
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["one"], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_run_killed_by_the_system_resumes_to_the_same_bits(tmp_path):
    # Saved in the middle of the windows that are logged.
    steps = {"steps": 240, "checkpoint__every": "28 steps", "log__every": "40 steps", "eval__every": "80 steps"}
    steps |= {"optim__ema_decay": 0.99, "dataset__random_erasing": 0.3, "optim__accumulate": 2}
    whole, broken = running.command(tmp_path / "whole", **steps), running.command(tmp_path / "broken", **steps)
    done = running.run(whole, devices=2)
    assert done.returncode == 0, done.stderr

    with running.start(broken, devices=2) as process:
        wait_for(process, "[ 80/240")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    resumed = running.run(broken, devices=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout

    assert_bitwise_equal(*(final_state(tmp_path / name, optim__ema_decay=0.99) for name in ("whole", "broken")))
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "broken")  # each once, and the same
    assert logged_losses(tmp_path / "whole") == logged_losses(tmp_path / "broken")


@pytest.mark.slow
def test_a_state_saved_on_eight_devices_goes_on_with_one(whole, tmp_path):
    folder = copy_of(whole, tmp_path, without=(30, 40))  # back to step 20
    moved = running.run(running.command(folder, **RICH), devices=1)
    assert moved.returncode == 0, moved.stderr
    assert "from step 20" in moved.stdout and "on 1 cpu device" in moved.stdout
    np.testing.assert_allclose(logged_losses(folder)[40], whole[1].train[40]["train/loss"], rtol=1e-4)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    steps = {"steps": 600, "checkpoint__every": "100000 steps", "log__every": "50 steps"}
    with running.start(running.command(tmp_path, **steps, log__tensorboard=True)) as process:
        wait_for(process, "[100/600")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    assert process.returncode == 75, output
    assert "stopping: saved step" in output and "the same command continues it" in output
    stopped_at = int(output.split("saved step ")[1].split()[0])
    assert 100 <= stopped_at < 600
    resumed = running.run(running.command(tmp_path, **steps))
    assert resumed.returncode == 0, resumed.stderr
    assert f"from step {stopped_at} " in resumed.stdout


@pytest.mark.slow
def test_sigterm_is_heard_during_an_evaluation(tmp_path):
    long_evaluation = {
        "dataset__name": "synthetic",
        "dataset__kwargs__image_shape": (8, 8, 1),
        "dataset__kwargs__test_size": 200_000,
        "eval__batch_size": 8,
        "eval__every": "10 steps",
        "checkpoint__every": "1000 steps",
    }
    with running.start(running.command(tmp_path, **long_evaluation)) as process:
        wait_for(process, "[10/40")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    assert process.returncode == 75, output
    assert "evaluated at step" not in output
    assert "stopping: saved step 10" in output
