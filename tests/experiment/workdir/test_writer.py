"""What TensorBoard makes of the files, by its own reading of them."""

import jax
import pytest

from lowrank_jax.experiment.training.loop import train
from tests import running


def test_the_hparams_tab_shows_settings_and_final_metrics_of_every_run(tmp_path):
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    runs = {
        "a": train(running.config(steps=10, optim__lr=0.01), str(tmp_path / "a")),
        "b": train(running.config(steps=10, optim__lr=0.02, lowrank__scale=0.5), str(tmp_path / "b")),
    }
    train(running.config(steps=10, optim__lr=0.01), str(tmp_path / "a"))  # a second start changes nothing

    multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"hparams": 0})
    multiplexer.AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider, logdir=str(tmp_path)))
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

    groups = {group.hparams["optim.lr"].number_value: group for group in found.session_groups}
    assert sorted(groups) == [0.01, 0.02]
    assert groups[0.02].hparams["lowrank.scale"].number_value == 0.5
    assert groups[0.01].hparams["lowrank.method"].string_value == "kernel_projection"
    for lr, name in ((0.01, "a"), (0.02, "b")):
        metrics = {value.name.tag: value.value for value in groups[lr].metric_values}
        assert metrics["eval/top1"] == pytest.approx(runs[name].evals[10]["top1"], rel=1e-6)
        assert metrics["params"] == sum(leaf.size for leaf in jax.tree.leaves(runs[name].state.params))
