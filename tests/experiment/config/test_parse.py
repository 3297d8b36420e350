import copy
import dataclasses
import json
import os
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict, config_dict

from lowrank_jax.experiment import config as configs
from lowrank_jax.experiment.config import Config, parse
from lowrank_jax.experiment.config.files import ConfigError, default, legal_keys, override, to_dict
from lowrank_jax.experiment.config.schema import LowRankConfig
from lowrank_jax.experiment.duration import Duration
from lowrank_jax.experiment.workdir.identity import digest_of, flatten
from lowrank_jax.planning.rules import Rule
from tests import running


def changed(**overrides):
    config = default()
    config.steps = 100
    for key, value in overrides.items():
        override(config, key.replace("__", "."), value)
    return config


def problems(config, **settings):
    with pytest.raises(ConfigError) as caught:
        parse(config, **settings)
    return caught.value.problems


def test_the_default_has_every_legal_key_and_parses_to_the_dataclasses():
    config = default()
    config.epochs = 3.0
    assert parse(config) == Config(epochs=3.0)
    assert {*flatten(config.to_dict()), "model.kwargs", "dataset.kwargs"} == set(legal_keys())  # which are empty mappings


def test_a_parsed_config_survives_json():
    config = changed(lowrank__rules="({'path': 'head/kernel', 'rank': 3},)", optim__step_at="('10 steps', '2 epochs')")
    parsed = parse(config)
    assert parse(json.loads(json.dumps(to_dict(parsed)))) == parsed


def test_a_parsed_config_is_a_key_of_a_cache():
    given = changed(model__kwargs__widths="[8, 4, 4]", lowrank__rules="({'path': 'head/kernel', 'rank': 3},)")
    first, second = parse(given), parse(json.loads(json.dumps(to_dict(parse(given)))))
    assert first == second and hash(first) == hash(second) and first is not second
    assert configs.make_plan(first) is configs.make_plan(second)
    assert first.model.kwargs == {"widths": (8, 4, 4)} and repr(first.model.kwargs) == "{'widths': (8, 4, 4)}"
    with pytest.raises(TypeError, match="cannot change"):
        first.model.kwargs["widths"] = ()
    copies = (copy.deepcopy(first), pickle.loads(pickle.dumps(first)), dataclasses.replace(first, seed=0))
    assert {first: 1} == dict.fromkeys(copies, 1)
    assert hash(first) != hash(dataclasses.replace(first, seed=1))
    programmatic = dataclasses.replace(first, lowrank=LowRankConfig(rules=[{"path": "head/kernel", "rank": 3}]))
    assert hash(programmatic) == hash(first)


def test_what_config_json_cannot_hold_is_refused_when_it_is_read():
    config = changed()
    config.model.kwargs = {"widths": np.zeros(3)}
    (problem,) = problems(config)
    assert problem.startswith("model.kwargs: {'widths': array([0., 0., 0.])}; must be a mapping of plain values")


def test_overrides_are_read_by_the_keys_type():
    parsed = parse(
        changed(
            batch_size="64", optim__lr="1", optim__nesterov="false", eval__every="250", lowrank__rank="4", lowrank__scale="None"
        )
    )
    assert (parsed.batch_size, parsed.optim.lr, parsed.optim.nesterov) == (64, 1.0, False)
    assert (parsed.eval.every, parsed.lowrank.rank, parsed.lowrank.scale) == (Duration(250, "step"), 4, None)
    mlp = parse(changed(model__name="mlp", model__kwargs__widths="(8, 4)", model__kwargs__batch_norm="True"))
    assert mlp.model.kwargs == {"widths": (8, 4), "batch_norm": True}


def test_a_mapping_sets_what_is_in_it_and_leaves_the_rest_of_its_section():
    name, one = "fashion_mnist_mlp", configs.read("fashion_mnist_mlp", {"optim.lr": 0.125, "eval.best": "-loss"})
    assert configs.read(name, {"optim": {"lr": 0.125}, "eval": {"best": "-loss"}}) == one
    assert configs.read(name, [("optim", "{'lr': 0.125}"), ("eval.best", "-loss")]) == one and one.optim.clip_norm == 1.0
    with pytest.raises(configs.ConfigError, match=r"optim\.lrr: unknown key; did you mean optim\.lr\?"):
        configs.read(name, {"optim": {"lrr": 1}})


@pytest.mark.parametrize("mapping", [dict, ConfigDict, FrozenConfigDict])
def test_a_mapping_in_a_file_does_the_same(mapping):
    """Before, a section that a file gave as a mapping lost what the config that it begins with had set."""
    config = configs.load("fashion_mnist_mlp").unlock()
    config.optim = mapping({"lr": 0.125, "nesterov": False})
    config.model = given = mapping({"kwargs": {"widths": (8,)}})
    assert (config.optim.clip_norm, config.model.name) == (1.0, "mlp")
    one = configs.read("fashion_mnist_mlp", {"optim.lr": 0.125, "optim.nesterov": False, "model.kwargs": {"widths": (8,)}})
    assert configs.parse(config) == one and one.model.kwargs == {"widths": (8,)}  # which is no section
    if mapping is ConfigDict:  # is what was given, as anywhere in a config
        given.kwargs.widths = (4,)
        assert configs.parse(config).model.kwargs == {"widths": (4,)}
    again = configs.default()
    again.model = {"kwargs": config_dict.placeholder(dict)}
    again.lowrank = {"scael": 0.1}
    assert again.model.name == configs.default().model.name
    assert any("lowrank.scael: unknown key; did you mean lowrank.scale?" in problem for problem in problems(again))


def test_a_learning_rate_for_so_many_images_grows_with_the_batch():
    assert parse(changed(optim__lr="0.1", batch_size="1024")).peak_lr == pytest.approx(0.1)
    assert parse(changed(optim__lr="0.1", optim__lr_per_images="256", batch_size="1024")).peak_lr == pytest.approx(0.4)


def test_models_compute_in_the_configs_dtype():
    model = parse(changed(model__name="resnet20", model__dtype="bfloat16")).build_model()
    assert model.dtype == jnp.bfloat16
    assert problems(changed(model__dtype="float16")) == ["model.dtype: 'float16'; unknown; did you mean bfloat16?"]
    found = problems(changed(model__kwargs__dtype="bfloat16"))
    assert found and found[0].startswith("model.kwargs.dtype: resnet8 has no such setting")


def test_a_batch_must_be_divisible_into_its_parts():
    config = changed(batch_size="64", optim__accumulate="3")
    assert problems(config) == problems(config, devices=8) == ["optim.accumulate: 3; batch_size 64 is not a multiple of it"]
    config = changed(batch_size="64", optim__accumulate="16")
    assert problems(config, devices=8) == ["optim.accumulate: 16; 64 images on 8 devices cannot be split into 16 parts"]
    assert parse(changed(batch_size="64", optim__accumulate="8"), devices=8).optim.accumulate == 8


def test_all_problems_come_at_once_each_with_its_key():
    config = changed(
        lowrank__scael="0.1",
        batch_size="-3",
        optim__name="sdg",
        optim__lr="fast",
        model__name="resnet9",
        dataset__name="digit",
        lowrank__method="spectrl",
        eval__every="soon",
        optim__weight_decay="nan",
        oprim__lr="1",
    )
    found = problems(config)
    for expected in (
        "lowrank.scael: unknown key; did you mean lowrank.scale?",
        "batch_size: -3; must be at least 1",
        "optim.name: 'sdg'; unknown; did you mean sgd?",
        "optim.lr: 'fast'; must be a number",
        "model.name: unknown model 'resnet9'; did you mean resnet8?",
        "dataset.name: 'digit'; unknown; did you mean digits?",
        "lowrank.method: 'spectrl'; unknown; did you mean spectral?",
        "eval.every: 'soon'; must be a duration",
        "optim.weight_decay: 'nan'; must be a number",
        "oprim: unknown key",
    ):
        assert sum(problem.startswith(expected) for problem in found) == 1, (expected, found)
    assert len(found) == 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"steps": "None"}, "steps: neither steps nor epochs"),
        ({"epochs": "3"}, "steps: both steps (100) and epochs (3) are set"),
        ({"lowrank__rank": "-1", "lowrank__scale": "None"}, "lowrank.rank: -1; must be at least 1"),
        ({"lowrank__rank": "3"}, "lowrank.rank: both rank (3) and scale (0.25) are set"),
        ({"lowrank__scale": "None"}, "lowrank.scale: neither scale nor rank"),
        ({"lowrank__scale": "1.5"}, "lowrank.scale: 1.5; must be in (0, 1]"),
        ({"lowrank__scheme": "spacial"}, "lowrank: rule '.*': unknown scheme 'spacial'; did you mean spatial?"),
        ({"lowrank__rules": "({'path': 'a', 'scael': 1},)"}, "unknown key 'scael'; did you mean scale?"),
        ({"lowrank__rules": "({'scale': 0.1},)"}, "no path"),
        ({"lowrank__rules": "({'path': '(a'},)"}, "is not a regular expression"),
        ({"optim__warmup": "20 epochs"}, "optim.warmup: 225 steps; longer than training, which has 100 steps"),
        ({"dataset__train_split": "trian"}, "dataset.train_split: digits has no split 'trian'; did you mean train?"),
        ({"dataset__kwargs__size": "3"}, "dataset.kwargs.size: digits has no settings"),
        ({"dataset__name": "synthetic", "dataset__kwargs__sise": "3"}, "dataset.kwargs.sise: unknown key"),
        ({"model__kwargs__depth": "3"}, "model.kwargs.depth: resnet8 has no such setting"),
        ({"model__kwargs__norm": "batchnorm"}, "model.kwargs.norm: 'batchnorm'; must be one of 'batch', 'none'"),
        ({"model__kwargs__widths": "64"}, "model.kwargs.widths: 64; must be a sequence"),
        ({"seed__x": "1"}, "seed: {'x': 1}; must be a whole number"),
        ({"optim": "3"}, "optim: 3; must be a section"),
        ({"checkpoint__keep": "1"}, "checkpoint.keep: 1; must be at least 2"),
        ({"optim__label_smoothing": "1"}, "optim.label_smoothing: 1.0; must be in [0, 1)"),
        ({"eval__every": "0"}, "eval.every: 0 steps; must be above 0"),
        ({"batch_size": "True"}, "batch_size: True; must be a whole number"),
        ({"lowrank__rules": "({'path': 'head/kernel', 'rank': 2.5},)"}, "rank 2.5 must be a whole number"),
        ({"lowrank__rules": "({'path': 'head/kernel', 'multiple_of': 2.5},)"}, "multiple_of 2.5 must be a whole number"),
        ({"lowrank__rules": "({'path': 'head/kernel', 'scale': 'x'},)"}, "scale 'x' must be a number"),
        ({"lowrank__rules": "({'path': 'a', 'normalised': True},)"}, "unknown key 'normalised'; did you mean normalized?"),
        ({"lowrank__rules": "({'path': 'a', 'normalized': 'each'},)"}, "normalized 'each' must be True, False or None"),
        ({"lowrank__rules": "({'path': 'a', 'normalized': 1},)"}, "normalized 1 must be True, False or None"),
        ({"lowrank__rules": "({'path': 'hed/kernel', 'rank': 2},)"}, "matches no parameter; the nearest is 'head/kernel'"),
        ({"lowrank__rank": "5000", "lowrank__scale": "None"}, "rank 5000 is above full rank"),
        ({"optim__lr": "1e400"}, "optim.lr: inf; must be finite"),
        ({"optim__lr": "1e308"}, "optim.lr: 1e+308; must be at most 1e+30"),
        ({"optim__lr": "1e-40"}, "optim.lr: 1e-40; must be at least 1e-30"),
        (
            {"optim__lr": "1e25", "optim__lr_per_images": "1", "batch_size": "1000000"},
            "optim.lr: 1e+31 for batches of 1000000 images; must be at most 1e+30",
        ),
        ({"dataset__mixup": "1e308"}, "dataset.mixup: 1e+308; must be at most 1000"),
        ({"dataset__crop_padding": "8"}, "dataset.crop_padding: 8; must be less than the side of an image"),
        ({"lowrank__moment_batches": "13"}, "lowrank.moment_batches: 13; an epoch has 12 batches"),
        ({"batch_size": "2**70"}, "batch_size: '2**70'; must be a whole number"),
        ({"batch_size": str(2**70)}, f"batch_size: {2**70}; must be a whole number of at most 64 bits"),
        ({"eval__batch_size": "999999999999"}, "eval.batch_size: 999999999999; must be at most 2147483647"),
        ({"optim__step_at": "('1e10 steps',)"}, "optim.step_at: 10000000000 steps; more than 2^31 steps"),
        (
            {"optim__step_at": "('10 steps', '10 steps')"},
            "optim.step_at: 10 steps; the same step as another one, where the rate is",
        ),
        ({"dataset__data_dir": "''"}, "dataset.data_dir: ''; must be the name of a folder"),
        ({"model__name": "mlp", "model__kwargs__widths": "(0,)"}, "setting widths: (0,); must be at least 1"),
        ({"model__kwargs__widths": "(4, 4)"}, "settings widths and blocks: (4, 4) and (1, 1, 1); must be of one length"),
        ({"optim__decay_rules": "(('(?>a).*', 1.0),)"}, "an atomic group is not supported"),
        ({"optim__decay_rules": "()"}, "optim.decay_rules: (); must not be empty"),
        ({"optim__decay_rules": "(('(', 1.0),)"}, "is not a regular expression"),
        ({"optim__decay_rules": "(('.*', -1),)"}, "the multiplier of '.*' must be at least 0"),
        ({"optim__schedule": "step"}, "optim.step_at: empty"),
        ({"optim__warmup": "1e999"}, "optim.warmup: '1e999'; must be a duration"),
        ({"seed": "4294967296"}, "seed: 4294967296; must be from 0 to 4294967295"),
        ({"steps": "None", "epochs": "1e300"}, "epochs: 1e+300; must be from"),
        ({"steps": "1000000000000"}, "steps: 1000000000000; must be from 1 to 2147483647"),
        (
            {"dataset__name": "synthetic", "dataset__kwargs__train_size": "-5"},
            "dataset.kwargs.train_size: -5; must be at least 1",
        ),
        (
            {"dataset__name": "synthetic", "dataset__kwargs__image_shape": "(8, 8)"},
            "image_shape: (8, 8); must be a sequence of 3",
        ),
        ({"model__name": "mlp", "model__kwargs__dropout": "1.5"}, "setting dropout: 1.5; must be in [0, 1)"),
        ({"model__name": "vit_s16", "model__kwargs__heads": "0"}, "setting heads: 0; must be at least 1"),
        ({"model__name": "efficientnet_b0", "model__kwargs__depth": "0"}, "setting depth: 0; must be above 0"),
        ({"model__name": ".foo:bar"}, "model.name: model '.foo:bar' cannot be imported"),
        ({"model__name": "math:floor"}, 'model.outputs_argument: "auto", but math:floor takes no num_classes, num_outputs or'),
    ],
)
def test_each_problem_has_one_clear_line(overrides, message):
    found = problems(changed(**overrides))
    assert len(found) == 1, found
    assert message in found[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mesh__data": "3"}, "a mesh of 3x1x1 does not fit 8 devices"),
        ({"mesh__fsdp": "-1"}, "mesh.fsdp: -1, but mesh.data is -1 too"),
        ({"batch_size": "12"}, "batch_size: 12; must be a multiple of the 8 devices"),
        (
            {"mesh__rules": "({'path': 'head/bias', 'spec': ('data',)},)"},
            "mesh.rules: rule 'head/bias': head/bias [10] cannot be cut into 8 parts along axis 0 by data",
        ),
    ],
)
def test_the_mesh_is_held_against_the_devices(overrides, message):
    parse(changed(**overrides))
    (problem,) = problems(changed(**overrides), devices=8)
    assert message in problem


def test_rules_are_exceptions_to_the_settings_above_them():
    entries = ({"path": "a", "method": "none"}, {"path": "b", "rank": 3}, {"path": "c", "activation": "identity"})
    config = LowRankConfig(method="spectral", rules=entries)
    common = {"method": "spectral", "activation": "relu"}
    assert config.to_rules() == (
        Rule("a"),
        Rule("b", rank=3, **common),
        Rule("c", scale=0.25, **{**common, "activation": "identity"}),
        Rule(".*", scale=0.25, **common),
    )
    assert dataclasses.replace(config, method="none").to_rules() == ()
    given = {"path": "d", "rows": [0], "execution": "premerged", "normalized": True}
    (rule, _) = LowRankConfig(rules=(given,)).to_rules()
    assert (rule.rows, rule.execution, rule.normalized) == ((0,), "premerged", True)


@pytest.mark.parametrize(
    ("text", "steps"), [("500", 500), (500, 500), ("500 steps", 500), ("2 epochs", 45), ("0.5 epoch", 11), ("1e3 examples", 16)]
)
def test_durations_become_steps(text, steps):
    assert Duration.read(text).steps(batch_size=64, epoch_size=1437) == steps


DEFAULT = "from lowrank_jax.config import default\ndef get_config():\n    c = default()\n    c.steps = 9\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(): return 3", "must return a ConfigDict, not int"),
        ("def get_config(): return 1 / 0", "it fails with ZeroDivisionError: division by zero"),
        ("def get_config(:", "it fails with SyntaxError"),
        ("x = 1", "it fails with AttributeError"),
        ("import sys; sys.exit(0)", "it fails with SystemExit"),
        ("raise GeneratorExit", "it fails with GeneratorExit"),
        ("class Mine(BaseException): pass\nraise Mine('x')", "it fails with Mine: x"),
        (f"{DEFAULT}    c[5] = 3\n", "it fails with TypeError: 5 is no key; keys are text"),
        (f"{DEFAULT}    c.model.kwargs[5] = 3\n", "it fails with TypeError: 5 is no key; keys are text"),
    ],
)
def test_a_config_file_that_fails_says_so(tmp_path, source, message):
    (tmp_path / "config.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        configs.load(str(tmp_path / "config.py"))


@pytest.mark.filterwarnings("error")
def test_a_config_that_nobody_waits_for_is_no_config(tmp_path):
    (tmp_path / "later.py").write_text("async def get_config():\n    pass\n")
    with pytest.raises(ConfigError, match="must return a ConfigDict, not coroutine"):
        configs.load(str(tmp_path / "later.py"))


def test_ctrl_c_in_a_config_file_stays_one(tmp_path):
    (tmp_path / "config.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        configs.load(str(tmp_path / "config.py"))


def test_a_config_has_to_be_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    for name, problem in (
        (str(tmp_path), "it is a folder; name a Python file"),
        (str(tmp_path / "pipe.py"), "it is no regular file"),
        ("/dev/null", "it is no regular file"),
        ("", "no file is named"),
    ):
        with pytest.raises(ConfigError, match=problem):
            configs.load(name)


def test_required_values_are_asked_for_by_name():
    config = changed()
    config.optim.lr = config_dict.required_placeholder(float)
    config.seed = config_dict.required_placeholder(int)
    with pytest.raises(ConfigError) as caught:
        configs.read(config, {"seed": 5})
    assert caught.value.problems == ["optim.lr: required, but not set; give it by --config.optim.lr=..."]
    assert configs.read(config, {"seed": 5, "optim.lr": 0.25}).optim.lr == 0.25
    assert list(configs.read(changed(), {"seed": 5}).model.kwargs) == []


def test_a_rule_may_be_a_config_dict():
    config = changed(model__name="mlp")
    config.lowrank.rules = (ConfigDict({"path": "head/kernel", "rank": 3}),)
    assert parse(config).lowrank.rules == ({"path": "head/kernel", "rank": 3},)


def test_truth_is_no_number():
    config = changed()
    config.optim.lr = 0.5
    config.optim.lr = True
    assert problems(config) == ["optim.lr: True; must be a number"]
    assert problems(changed(optim__lr="True", dataset__mixup="False")) == [
        "dataset.mixup: False; must be a number",
        "optim.lr: True; must be a number",
    ]


@pytest.mark.parametrize("key", [".lr", "optim.", "optim..lr", "", ".", "optim. lr", "a-b", "optim.\udcff"])
def test_malformed_keys_are_refused(key):
    with pytest.raises(ConfigError, match=r"no key; keys look like optim\.lr"):
        override(default(), key, "5")


@pytest.mark.parametrize("text", ["{5: 3}", "{'a.b': 1}", "{None: 1}"])
def test_mappings_with_other_keys_are_refused(text):
    with pytest.raises(ConfigError, match=r"model\.kwargs"):
        parse(changed(model__kwargs=text))


def test_what_is_no_python_file_is_refused(repository):
    with pytest.raises(ConfigError, match="it is not a Python file"):
        configs.load(str(repository / "README.md"))


def test_a_config_file_does_not_move_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moving.py").write_text(
        "import os\nfrom lowrank_jax import config\ndef get_config():\n    os.chdir('/')\n    return config.default()\n"
    )
    configs.load("moving.py")
    assert os.getcwd() == str(tmp_path)  # noqa: PTH109


def test_a_current_folder_that_is_gone_is_said_to_be(tmp_path, monkeypatch, repository):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="the current folder has been deleted; cd to another"):
        configs.load(str(running.ROOT / "configs" / "digits_resnet.py"))
    monkeypatch.undo()


def test_a_folder_may_have_a_colon_in_its_name(tmp_path, repository):
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "c.py").write_text(
        "from lowrank_jax import config\ndef get_config(arg='1'):\n"
        "    changed = config.default()\n    changed.seed = int(arg)\n    return changed\n"
    )
    assert configs.load(f"{folder}/c.py").seed == 1
    assert configs.load(f"{folder}/c.py:7").seed == 7


@pytest.mark.filterwarnings("error")
def test_text_that_python_would_warn_of_is_quietly_text():
    config = default()
    override(config, "seed", "1if True else 2")
    assert config.seed == "1if True else 2"
    override(config, "lowrank.rules", r"[{'path': 'a\.b'}]")
    assert config.lowrank.rules == [{"path": r"a\.b"}]


def test_config_files_take_an_argument_and_near_misses_are_proposed(tmp_path):
    (tmp_path / "config.py").write_text(
        "from lowrank_jax.config import default\n"
        "def get_config(name):\n    config = default()\n    config.model.name = name\n    return config\n"
    )
    assert configs.load(f"{tmp_path}/config.py:resnet20").model.name == "resnet20"
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean .*config.py"):
        configs.load(f"{tmp_path}/confg.py")


def test_none_is_a_word_where_a_model_may_have_it_and_nothing_elsewhere():
    config = parse(changed(model__name="resnet8", model__kwargs__norm="none", optim__clip_norm="none"))
    assert config.model.kwargs == {"norm": "none"} and config.optim.clip_norm is None


@pytest.mark.parametrize(
    ("valid", "clash"), [("train[1000:]", "train_split"), ("test[:10]", "eval_split"), ("train[1400:]+test", "eval_split")]
)
def test_what_is_chosen_by_is_neither_trained_on_nor_reported(valid, clash):
    config = configs.default()
    config.steps = 1
    config.dataset.train_split, config.dataset.valid_split = "train[:1200]", "train[1200:]"
    configs.parse(config)
    config.dataset.valid_split = valid
    with pytest.raises(configs.ConfigError, match=f"shares examples with dataset.{clash}"):
        configs.parse(config)


@pytest.mark.parametrize("text", ["500", "1000000 steps", "1234567 steps", "0.5 epochs", "1e6 examples", "1e+06 steps"])
def test_a_duration_reads_back_as_it_was(text):
    duration = Duration.read(text)
    assert Duration.read(str(duration)) == duration


def test_code_beside_a_config_is_found_and_its_folder_is_no_part_of_the_experiment(tmp_path, monkeypatch):
    (tmp_path / "net_of_a_config.py").write_text("from lowrank_jax.models import MLP as Net")
    file = tmp_path / "config.py"
    file.write_text(f"{DEFAULT}    c.model.name = 'net_of_a_config.py:Net'\n    c.steps = 1\n    return c\n")
    config = configs.read(str(file))
    assert config.code_dir == str(tmp_path) and configs.make_plan(config).factored
    moved = dataclasses.replace(config, code_dir="/elsewhere")
    assert digest_of(config) == digest_of(moved)
    monkeypatch.chdir(tmp_path)
    assert configs.read(changed(model__name="net_of_a_config.py:Net")).code_dir == str(tmp_path)
    assert configs.read(changed()).code_dir is None
