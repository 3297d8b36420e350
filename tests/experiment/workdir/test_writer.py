"""What TensorBoard makes of the files, by its own reading of them."""

import json
import subprocess
import sys

import jax
import pytest

from lowrank_jax.experiment.training.loop import train
from lowrank_jax.experiment.workdir.workdir import Workdir
from lowrank_jax.experiment.workdir.writer import Writer
from tests import running


def hparams(folder):
    """What the HParams tab shows of every run in the folder: pairs of settings and final metrics by name."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"hparams": 0})
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider, logdir=str(folder)))
    request_context = RequestContext()
    experiment = context.experiment_from_metadata(
        request_context, "", True, context.hparams_metadata(request_context, "", None), None
    )
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING],
    )
    for info in experiment.metric_infos:
        request.col_params.add(metric=info.name)
    found = list_session_groups.Handler(request_context, context, "", request).run()
    return [(group.hparams, {value.name.tag: value.value for value in group.metric_values}) for group in found.session_groups]


def test_settings_and_numbers_reach_every_reader(tmp_path):
    folder = Workdir(tmp_path / "run")
    folder.path.mkdir()
    for _ in range(2):  # a second start changes nothing
        with Writer(folder) as writer:
            writer.show_settings({"optim.lr": 0.01, "lowrank.method": "spectral", "mesh.rules": (), "seed": None})
    with Writer(folder) as writer:
        writer.write(1, {"eval/top1": 0.25, "eval/loss": float("nan")})
        writer.flush()
        writer.write(2, {"eval/top1": 0.5})
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "eval/top1": 0.25, "eval/loss": None},
        {"step": 2, "eval/top1": 0.5},
    ]
    ((settings, metrics),) = hparams(tmp_path)
    assert settings["optim.lr"].number_value == 0.01
    assert settings["lowrank.method"].string_value == "spectral" and settings["mesh.rules"].string_value == "()"
    assert "seed" not in settings
    assert metrics["eval/top1"] == 0.5


def test_without_a_board_there_are_the_metrics_alone_and_no_tensorflow(tmp_path):
    code = """if True:
    import pathlib, sys
    from lowrank_jax.experiment.workdir.workdir import Workdir
    from lowrank_jax.experiment.workdir.writer import Writer
    with Writer(Workdir(sys.argv[1]), board=False) as writer:
        writer.show_settings({"optim.lr": 0.01})
        writer.write(1, {"eval/top1": 0.25})
        writer.flush()
    assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_the_hparams_tab_shows_settings_and_final_metrics_of_every_run(tmp_path):
    runs = {
        "a": train(running.config(steps=10, optim__lr=0.01), str(tmp_path / "a")),
        "b": train(running.config(steps=10, optim__lr=0.02, lowrank__scale=0.5), str(tmp_path / "b")),
    }
    train(running.config(steps=10, optim__lr=0.01), str(tmp_path / "a"))  # a second start changes nothing

    groups = {settings["optim.lr"].number_value: (settings, metrics) for settings, metrics in hparams(tmp_path)}
    assert sorted(groups) == [0.01, 0.02]
    assert groups[0.02][0]["lowrank.scale"].number_value == 0.5
    assert groups[0.01][0]["lowrank.method"].string_value == "kernel_projection"
    for lr, name in ((0.01, "a"), (0.02, "b")):
        _, metrics = groups[lr]
        assert metrics["eval/top1"] == pytest.approx(runs[name].evals[10]["top1"], rel=1e-6)
        assert metrics["params"] == sum(leaf.size for leaf in jax.tree.leaves(runs[name].state.params))


def test_what_is_said_commands_no_terminal(tmp_path, capsys):
    with Writer(Workdir(tmp_path)) as writer:
        writer.say("two\nlines of \x1b]0;owned\x07")
    assert capsys.readouterr().out == "two\nlines of \\x1b]0;owned\\x07\n"


def test_a_board_that_cannot_be_written_is_an_error_with_its_name_unless_there_is_another(tmp_path):
    folder = Workdir(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "part").touch()  # in the place of a folder
    with pytest.raises(OSError, match="TensorBoard's file cannot be written") as caught, Writer(folder, "part"):
        pass
    assert caught.value.filename == str(folder.path / "part")
    with pytest.raises(ValueError, match="first"), Writer(folder, "part"):
        raise ValueError("first")
