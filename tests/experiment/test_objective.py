"""Losses and metrics by name: the built-in ones against numpy, and a run with functions of its own."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment import objective
from lowrank_jax.experiment.cli.commands import main
from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.evaluation.evaluator import Evaluator
from lowrank_jax.experiment.report import stored_runs
from lowrank_jax.experiment.sweep import trials
from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.workdir.identity import config_digest
from tests import running


def brier(logits, targets):
    """The squared error of the probabilities."""
    return ((jax.nn.softmax(logits) - targets) ** 2).sum(-1)


def confidence(logits, targets):
    """The probability of the target."""
    return (jax.nn.softmax(logits) * targets).sum(-1)


def mean_of_batch(logits, targets):
    return brier(logits, targets).mean()


def misspelt(logits, targets):
    return logits.softmax()


def ends(logits, targets):
    raise SystemExit(0)


def interrupted(logits, targets):
    raise KeyboardInterrupt


def ends_training(logits, targets):
    """Checked on a batch of two, where it works."""
    return brier(logits, targets) if len(logits) == 2 else ends(logits, targets)


OWN = {"objective__loss": f"{__name__}:brier", "objective__metrics": (f"{__name__}:confidence", "top1")}


def test_the_built_in_ones_take_labels_and_distributions():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 7)).astype(np.float32)
    label = rng.integers(0, 7, 50)
    one_hot = np.eye(7, dtype=np.float32)[label]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    place = np.argmax(np.argsort(-logits, axis=-1, kind="stable") == label[:, None], axis=-1)
    expected = {"softmax_cross_entropy": -log_p[np.arange(50), label], "top1": place < 1, "top5": place < 5}
    for name, values in expected.items():
        function = {**objective.LOSSES, **objective.METRICS}[name]
        for targets in (label, one_hot):
            np.testing.assert_allclose(jax.jit(function)(logits, jnp.asarray(targets)), values, rtol=1e-5, err_msg=name)
    soft = 0.7 * one_hot + 0.3 / 7
    np.testing.assert_allclose(objective.softmax_cross_entropy(logits, soft), -(soft * log_p).sum(-1), rtol=1e-5)


def test_the_rank_of_the_label_is_that_of_a_stable_sort_and_nan_puts_it_last():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (200, 7)).astype(np.float32)  # many ties
    label = rng.integers(0, 7, 200)
    order = np.argsort(-logits, axis=-1, kind="stable")
    expected = np.argmax(order == label[:, None], axis=-1)
    rank = jax.jit(objective.rank_of_label)
    np.testing.assert_array_equal(rank(logits, label), expected)
    np.testing.assert_array_equal(rank(np.full((200, 7), np.nan, np.float32), label), 7)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run with a loss and a metric of its own: its folder and what `train` returned."""
    folder = tmp_path_factory.mktemp("own")
    settings = {"steps": 20, "eval__every": "5 steps", "checkpoint__every": "1000 steps", "optim__ema_decay": 0.5}
    return folder, train(running.config(**settings, **OWN), str(folder))


def test_a_run_minimises_its_own_loss_and_measures_its_own_metric(own):
    folder, run = own
    assert {"train/loss", "train/confidence"} <= run.train[20].keys() and "train/top1" not in run.train[20]
    dataset = running.config().description
    arrays = datasets.load(dataset, "test", None)
    subject = Evaluator(trust_code=True).open(str(folder))
    images = (np.asarray(arrays.images, np.float32) / 255 - dataset.mean) / dataset.std
    logits = np.asarray(
        subject.experiment.model.apply(_merged(run.state.variables()[""]), images.astype(np.float32), train=False)
    )
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    targets = np.eye(10)[arrays.labels]
    expected = {
        "loss": ((p - targets) ** 2).sum(-1).mean(),
        "confidence": (p * targets).sum(-1).mean(),
        "top1": (logits.argmax(-1) == arrays.labels).mean(),
        "examples": 360,
    }
    assert run.evals[20] == pytest.approx(expected, rel=1e-4)


def _merged(variables):
    from lowrank_jax import merge

    return {**variables, "params": merge(variables["params"])}


def test_its_first_metric_decides_which_checkpoint_is_best(own):
    folder, run = own
    result = json.loads((folder / "result.json").read_text())
    assert result["eval"] == run.evals[20]
    lines = [line for line in running.metrics(folder) if "eval/confidence" in line]
    assert result["best_step"] == max(lines, key=lambda line: (line["eval/confidence"], line["step"]))["step"]


def test_it_is_evaluated_and_reported(own, capsys):
    folder, run = own
    assert lowrank("evaluate", f"--workdir={folder}", "--trust-code") == 0
    header, averaged, raw = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header[:5] == ["split", "examples", "confidence", "top1", "loss"]
    assert averaged[3:6] == [f"{run.evals[20][name]:.4f}" for name in ("confidence", "top1", "loss")] and raw[:2] == [
        "test,",
        "raw",
    ]
    assert lowrank("report", str(folder), f"--out={folder / 'report'}") == 0


def test_what_a_result_lacks_it_cannot_be_compared_by(own, tmp_path):
    shutil.copytree(own[0], tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    del result["eval"]["confidence"], result["metrics"], result["check"]
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    [run] = stored_runs.find([str(tmp_path)]).runs
    assert "its result has no confidence, by which its checkpoints were chosen" in run.reason


def test_the_trials_of_a_sweep_are_compared_by_one_metric(tmp_path, repository):
    source, text = str(repository / "configs" / "digits_resnet.py"), "eval.best=top5,-loss"
    with pytest.raises(configs.ConfigError, match=r"eval\.best: a sweep compares its trials by one metric, .*top5 .*-loss"):
        trials.expand(source, [], text, str(tmp_path / "sweep"))
    losses = r"-loss of softmax_cross_entropy \(in .*\); -loss of mse \(in"
    with pytest.raises(configs.ConfigError, match=losses):
        trials.expand(source, [("eval.best", "-loss")], "tune(objective.name=softmax,mse)", str(tmp_path / "sweep"))
    [trial] = trials.expand(source, [("eval.best", "-loss")], "seed=0", str(tmp_path / "sweep")).first
    assert (trial.config.best.metric, trial.config.best.lower) == ("loss", True)


def lowrank(*arguments):
    """The exit status of a command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_defaults_leave_the_name_of_an_experiment_as_it_was():
    written = configs.to_dict(running.config())
    older = {key: value for key, value in written.items() if key != "objective"}
    assert config_digest(older) == config_digest(written)
    assert configs.parse(older) == running.config()
    assert config_digest(configs.to_dict(running.config(**OWN))) != config_digest(written)


@pytest.mark.parametrize(
    ("loss", "metrics", "message"),
    [
        ("softmax_crossentropy", ("top1",), r"objective\.loss: unknown loss .*did you mean softmax_cross_entropy\?"),
        ("softmax_cross_entropy", ("top1", "top_5"), r"objective\.metrics: unknown metric 'top_5'; did you mean top5\?"),
        ("no.such:function", ("top1",), r"objective\.loss: loss 'no\.such:function' cannot be imported: No module named 'no'"),
        (f"{__name__}:OWN", ("top1",), r"objective\.loss: .* is not a function"),
        ("softmax_cross_entropy", (), r"objective\.metrics: empty"),
        ("softmax_cross_entropy", ("top1", "top1"), r"objective\.metrics: 'top1' is given 2 times"),
        ("softmax_cross_entropy", ("top1", "somewhere:loss"), r"objective\.metrics: 'loss'; the name is taken"),
        (f"{__name__}:mean_of_batch", ("top1",), r"returns \(\) for a batch of 2; it must return one value per example, \[2\]"),
        (f"{__name__}:ends", ("top1",), r"fails on logits \[2, 10\] and targets \[2, 10\]: 0"),
        (f"{__name__}:misspelt", ("top1",), r"fails on logits \[2, 10\] and targets \[2, 10\]: .*softmax"),
    ],
)
def test_mistakes_are_named(loss, metrics, message):
    with pytest.raises(configs.ConfigError, match=message):
        running.config(objective__loss=loss, objective__metrics=metrics)


def test_ctrl_c_in_a_function_stays_one():
    with pytest.raises(KeyboardInterrupt):
        running.config(objective__loss=f"{__name__}:interrupted")


def test_a_function_that_ends_python_in_training_is_no_success(tmp_path, capsys):
    arguments = running.command(tmp_path, objective__loss=f"{__name__}:ends_training")[3:]
    assert lowrank(*arguments) == 2
    assert "lowrank: the config, or code that it names, ended Python: SystemExit(0)" in capsys.readouterr().err.splitlines()


def test_mistakes_are_reported_with_all_others():
    with pytest.raises(configs.ConfigError, match="2 problems") as caught:
        running.config(objective__loss="mse", model__name="mlq")
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["objective.loss", "model.name"]


def test_whole_numbers_and_halves_are_summed_as_float32():
    def measure(outputs, batch, train):
        large = jnp.full(4, 2**31 - 1, jnp.int32)
        return outputs.sum(-1).astype(jnp.bfloat16), {"large": large, "ratio": (large, large > 0)}

    loss, metrics = objective.Objective(measure)(jnp.ones((4, 3)), {"label": jnp.zeros(4, jnp.int32)}, train=False)
    assert {values.dtype for values in jax.tree.leaves((loss, metrics))} == {jnp.dtype("float32")}
    assert float(metrics["large"].sum()) == pytest.approx(4 * (2**31 - 1))
