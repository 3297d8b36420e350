"""Code that a stored config names runs only if the user trusts it."""

import pytest

from lowrank_jax.experiment.config.trust import UntrustedCode, check_trust, own_names
from lowrank_jax.experiment.data import datasets

PAYLOAD = "payload_of_a_test:Model"


def values(model="mlp", loss="softmax_cross_entropy", metrics=("top1",), objective="softmax", data="digits", **more):
    named = {"name": objective, "loss": loss, "metrics": list(metrics)}
    return {"model": {"name": model}, "objective": named, "dataset": {"name": data}, **more}


@pytest.mark.parametrize(
    "name",
    [
        PAYLOAD,
        "setuptools:setup",
        "lowrank_jax.experiment.cli.commands:main",
        "lowrank_jax.models:build",
        "lowrank_jax.models:MODELS",
        "lowrank_jax.models.mlp:nn",
        "lowrank_jax.models.resnet:functools.partial",
        "lowrank_jax.models.mlp:MLP:x",
        "lowrank_jax..models:MLP",
        "os:system",
        ":",
        "a b:c",
        "net.py:Model",
        "/etc/net.py:Model",
    ],
)
@pytest.mark.parametrize("key", ["model", "loss", "metrics", "objective", "data"])
def test_names_that_are_not_our_own_are_refused(name, key):
    with pytest.raises(UntrustedCode) as caught:
        check_trust(values(**{key: ("top1", name) if key == "metrics" else name}), False, "runs/a/config.json")
    assert caught.value.names == (name,) and repr(name) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_names_are_refused_at_once_and_each_may_be_trusted():
    stored = values("a:Model", "b:loss", ("top1", "b:metric", "c:metric"))
    with pytest.raises(UntrustedCode) as caught:
        check_trust(stored, ["b:metric"], "config.json")
    assert caught.value.names == ("a:Model", "b:loss", "c:metric")
    assert "model.name 'a:Model', objective.loss 'b:loss', objective.metrics 'c:metric'" in str(caught.value)
    check_trust(stored, ["b:metric", *caught.value.names], "config.json")
    check_trust(stored, True, "config.json")


def test_a_place_where_code_would_be_looked_up_is_shown():
    with pytest.raises(UntrustedCode, match=r"model.name 'net:Model' \(looked up in '/somewhere' too\)"):
        check_trust(values("net:Model", code_dir="/somewhere"), False, "config.json")


@pytest.mark.parametrize("name", ["folder:photos", "tfds:mnist", "tfds:a/b", "arrays:file.npz"])
def test_data_by_the_name_of_its_place_is_no_code(name):
    check_trust(values(data=name), False, "config.json")


def test_what_is_no_code_is_what_data_sets_do_not_import(monkeypatch):
    monkeypatch.setitem(datasets._PREFIXES, "parquet", ("parquet", "a file: parquet:FILE"))
    assert not datasets.is_code("parquet:file")
    check_trust(values(data="parquet:file"), False, "config.json")


def test_our_own_models_losses_and_metrics_need_no_trust():
    check_trust(values("resnet8"), False, "config.json")
    for name in ("lowrank_jax.models:MLP", "lowrank_jax.models.resnet:ResNet"):
        check_trust(values(name), False, "config.json")
    check_trust(values(metrics=("lowrank_jax.experiment.objective:top5",)), (), "config.json")
    assert all(name.startswith("lowrank_jax.") for name in own_names())


@pytest.mark.parametrize("broken", [{}, {"model": None}, {"model": [PAYLOAD]}, {"model": {"name": 5}, "objective": "x:y"}])
def test_values_of_any_shape_are_passed_over(broken):
    check_trust(broken, False, "config.json")  # parsing refuses them


def test_a_list_where_one_name_belongs_is_looked_into():
    with pytest.raises(UntrustedCode):
        check_trust({"model": {"name": [PAYLOAD]}, "objective": {"metrics": PAYLOAD}}, False, "config.json")
