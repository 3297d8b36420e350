"""Bad input, and the one message and status that it deserves."""

import json
import os
import resource
import time
from pathlib import Path

from scripts.hostile.harness import ROOT, TRAIN, Ended, Kind, Place, refused, tidy

KIND = Kind("messages")

CONFIG = f"--config={ROOT}/configs/digits_resnet.py"
MLP = ("--config.model.name=mlp", "--config.lowrank.rules=()", "--config.lowrank.method=none")
SYNTHETIC = ("--config.dataset.name=synthetic", "--config.dataset.crop_padding=0", "--config.lowrank.rules=()")
GIGABYTE = 2**30


def _limited() -> None:
    """Of a child: it must not take the machine's memory along."""
    resource.setrlimit(resource.RLIMIT_AS, (16 * GIGABYTE, 16 * GIGABYTE))


def _nothing_left(run: Path) -> None:
    assert not run.exists(), f"left {sorted(path.name for path in run.iterdir())} behind"


@KIND.attempts(
    {
        "a kernel of 4 TB": ((*MLP, "--config.model.kwargs.widths=(1000000,1000000)"), "parameters"),
        "a kernel beyond 64 bits": ((*MLP, "--config.model.kwargs.widths=(4611686018427387904,)"), "model"),
        "a batch of 128 GB": (("--config.batch_size=2000000000",), "batch_size"),
        "a batch of 64 bits": (("--config.batch_size=4611686018427387904",), "batch_size"),
        "an evaluation batch": (("--config.eval.batch_size=999999999999",), "eval.batch_size"),
        "a padding": (("--config.dataset.crop_padding=100000",), "crop_padding"),
        "a split of ten billion": ((*SYNTHETIC, "--config.dataset.kwargs.train_size=10000000000"), "train"),
        "images of a terapixel": ((*SYNTHETIC, "--config.dataset.kwargs.image_shape=(1000000,1000000,3)"), ""),
        "a billion classes": ((*SYNTHETIC, "--config.dataset.kwargs.num_classes=1000000000000"), ""),
    }
)
def more_than_the_memory(place: Place, flags: tuple[str, ...], word: str) -> None:
    run = place.path / "run"
    refused(place.fresh(*TRAIN, *flags, f"--workdir={run}", preexec_fn=_limited), word)
    _nothing_left(run)


@KIND.attempts(
    {
        f"{key}={value[:12]}": (key, value)
        for key in (
            "batch_size", "steps", "seed", "eval.batch_size", "checkpoint.keep", "optim.accumulate", "optim.lr_per_images",
            "dataset.crop_padding", "dataset.max_undecodable", "dataset.randaugment_layers", "lowrank.rank",
            "lowrank.multiple_of", "lowrank.moment_batches", "mesh.data", "mesh.fsdp", "profile.steps", "optim.lr",
            "dataset.mixup", "dataset.cutmix", "optim.weight_decay", "optim.eps", "optim.clip_norm", "model.kwargs.widths",
        )
        for value in (str(2**70), "9" * 5000, "-" + "9" * 400)
    }
)  # fmt: skip
def a_number_beyond_64_bits(place: Place, key: str, value: str) -> None:
    run = place.path / "run"
    refused(place.train(run, f"--config.{key}={value}"), key.split(".")[-1])
    _nothing_left(run)


@KIND.attempts(
    {
        f"{key}={value}": (key, value)
        for key, value in {
            "optim.lr": "True", "dataset.mixup": "True", "batch_size": "True", "seed": "False", "lowrank.scale": "True",
            "optim.weight_decay": "1e400", "optim.clip_norm": "nan", "dataset.crop_padding": "1000", "dataset.cutmix": "1e308",
            "optim.eps": "1e300", "lowrank.moment_batches": "99999999", "dataset.train_split": "''", "dataset.eval_split": "''",
            "model.kwargs": "{5: 3}", "model.name": "''", "mesh.rules": "({},)",
            "optim.decay_rules": "((5, 1.0),)", "eval.every": "1e400", "checkpoint.every": "-1", "optim.step_at": "('x',)",
            "dataset.data_dir": "nowhere", "dataset.kwargs": "{'x': 1}", "objective.metrics": "()",
        }.items()
    }
)  # fmt: skip
def a_senseless_value(place: Place, key: str, value: str) -> None:
    run = place.path / "run"
    refused(place.train(run, f"--config.{key}={value}"), key.split(".")[-1])
    _nothing_left(run)


@KIND.attempts({"infinite": ("optim.lr", "1e400"), "huge": ("optim.lr", "1e308"), "mixed": ("dataset.mixup", "1e308")})
def a_rate_that_is_no_rate(place: Place, key: str, value: str) -> None:
    run = place.path / "run"
    ended = refused(place.train(run, f"--config.{key}={value}"), key)
    assert "inf; must be above" not in ended.err, ended
    _nothing_left(run)


@KIND.attempts(
    {
        "nested stars": "(.*)*(.*)*(.*)*x$",
        "nested pluses": "(a+)+(a+)+b",
        "twenty stars": ".*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*x",
        "alternatives": "(a|a|a|.|.)*(a|.)*(.|.)*$x",
        "a large repeat": "(((.{0,1000}){0,1000}){0,1000}){0,1000}x",
        "an atomic group": "(?>a*)kernel",
        "a backreference": r"(.)\1.*",
        "unbalanced": "((",
        "ten thousand brackets": "(" * 10000,
    }
)
def a_rule_that_never_ends(place: Place, pattern: str) -> None:
    for key, value in {
        "lowrank.rules": [{"path": pattern, "method": "none"}],
        "optim.decay_rules": [(pattern, 1.0)],
        "mesh.rules": [{"path": pattern, "spec": ()}],
    }.items():
        run = place.path / "run"
        ended = place.lowrank(*TRAIN, f"--config.{key}={value}", f"--workdir={run}", timeout=30)
        refused(ended, "rule")
        _nothing_left(run)


FILES = {
    "a whole number as a key": "c[5] = 3",
    "a whole number as a key of kwargs": "c.model.kwargs[5] = 3",
    "exits": "raise SystemExit(0)",
    "a generator's exit": "raise GeneratorExit",
    "a base exception": "raise type('Mine', (BaseException,), {})('x')",
    "a placeholder": "from ml_collections import config_dict\n    c.optim.lr = config_dict.required_placeholder(float)",
    "a boolean rate": "c.optim.lr = True",
    "a huge number": "c.seed = 10**5000",
    "a function": "c.model.kwargs.width = lambda: 0",
    "a set": "c.lowrank.rules = {1, 2}",
    "bytes": "c.model.name = b'mlp'",
    "not a number": "c.optim.lr = float('nan')",
    "it contains itself": "c.model.kwargs = {}; c.optim = c",
    "a deep value": "v = []\n    for _ in range(100000): v = [v]\n    c.model.kwargs.widths = v",
    "no text for it": "c.model.kwargs.width = type('X', (), {'__repr__': lambda self: 1 / 0})()",
    "returns nothing": "return None",
    "prints surrogates": "c.model.name = '\\udcff'",
}


@KIND.attempts(FILES)
def a_config_file_with(place: Place, line: str) -> None:
    file, run = place.path / "c.py", place.path / "run"
    file.write_text(f"from lowrank_jax.config import default\ndef get_config():\n    c = default()\n    {line}\n    return c\n")
    refused(place.lowrank("train", f"--config={file}", f"--workdir={run}", timeout=60), lines=20)
    _nothing_left(run)


@KIND.attempt
def a_config_dict_inside_of_rules(place: Place) -> None:
    rule = "c.lowrank.rules = (ConfigDict({'path': 'head/kernel', 'method': 'none'}),)"
    (place.path / "c.py").write_text(
        "from lowrank_jax.config import default\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    c = default()\n    c.steps = 3\n    {rule}\n    return c\n"
    )
    tidy(place.lowrank("overview", "--config=c.py"), 0, 2)


@KIND.attempts(
    {
        "a folder": "/tmp",
        "nothing": "",
        "the null device": "/dev/null",
        "endless zeros": "/dev/zero",
        "no such file": "nowhere.py",
        "only an argument": ":x",
        "no text": "/bin/true",
        "a null byte in disguise": "a%00",
        "a long name": "x" * 5000,
        "no UTF-8": os.fsdecode(b"\xff\xfe.py"),
    }
)
def a_config_that_is(place: Place, name: str) -> None:
    for command in ("train", "overview", "init-report"):
        more = [f"--workdir={place.path / 'run'}"] if command == "train" else []
        refused(place.lowrank(command, f"--config={name}", *more, timeout=30), "--config" if not name else "")


@KIND.attempts({name: name for name in ("train", "overview", "sweep", "preflight", "init-report")})
def a_pipe_as_config_of(place: Place, command: str) -> None:
    os.mkfifo(place.path / "pipe.py")
    more = {"train": ["--workdir=run"], "sweep": ["--workdir=run", "--sweep=seed=0"], "preflight": ["--topology=v5e:1x1"]}
    refused(place.lowrank(command, "--config=pipe.py", *more.get(command, []), timeout=30), "pipe.py")


@KIND.attempts(
    {
        "an empty section": "--config..lr=5",
        "an empty key": "--config.optim.=5",
        "two dots": "--config.optim..lr=5",
        "only a dot": "--config.=5",
        "a section as a value": "--config.optim=5",
        "below a value": "--config.seed.x=5",
        "a space": "--config.optim. lr=5",
        "not UTF-8": os.fsdecode(b"--config.optim.\xff=5"),
        "a value that is not UTF-8": os.fsdecode(b"--config.model.name=\xff"),
        "empty widths": "--config.model.kwargs.widths=(0,)",
    }
)
def an_override_with(place: Place, flag: str) -> None:
    run = place.path / "run"
    flags = (*MLP, flag) if "widths" in flag else (flag,)
    refused(place.train(run, *flags, timeout=60))
    _nothing_left(run)


@KIND.attempts(
    {
        "an unknown scheme": "foo://bar",
        "a scheme and no name": "gs://",
        "a null device": "/dev/null",
        "below a file": "/etc/passwd/run",
        "a long name": "x" * 300,
        "an endless name": "/".join(["x" * 200] * 30),
    }
)
def a_work_directory_that_is(place: Place, name: str) -> None:
    refused(place.lowrank(*TRAIN, f"--workdir={name}", timeout=90))
    refused(place.lowrank("evaluate", f"--workdir={name}", timeout=90))


@KIND.attempts({flag: flag for flag in ("--split", "--dataset", "--data-dir", "--step", "--json")})
def an_empty_flag(place: Place, flag: str) -> None:
    refused(place.lowrank("evaluate", f"--workdir={place.copy('finished')}", f"{flag}="), flag, lines=12)


def _edit(run: Path, **changes: object) -> None:
    config = json.loads((run / "config.json").read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        (config[section] if name else config)[name or section] = value
    (run / "config.json").write_text(json.dumps(config))


@KIND.attempts(
    {
        "another model": {"model__name": "resnet20"},
        "another kind of model": {"model__name": "mlp"},
        "another width": {"model__kwargs": {"widths": [8, 16, 32]}},
        "another rank": {"lowrank__scale": 0.5},
        "no rank": {"lowrank__method": "none"},
        "other data": {"dataset__name": "fashion_mnist"},
        "an average": {"optim__ema_decay": 0.9},
        "a huge model": {"model__kwargs": {"widths": [1000000, 1000000, 1000000]}},
        "a huge batch": {"eval": {"every": "1 epochs", "batch_size": 999999999999}},
        "a rank beyond 64 bits": {"lowrank__rank": 2**70},
        "a text for a section": {"optim": "x"},
    }
)
def evaluate_after_config_json_names(place: Place, changes: dict[str, object]) -> None:
    run = place.copy("finished")
    _edit(run, **changes)
    refused(place.fresh("evaluate", f"--workdir={run}", preexec_fn=_limited))


@KIND.attempts(
    {
        "cut short": lambda info: info.write_bytes(info.read_bytes()[:100]),
        "empty": lambda info: info.write_text(""),
        "no text": lambda info: info.write_bytes(b"\xff\xfe\x00"),
        "another": lambda info: info.write_text("[]"),
        "gone": lambda info: info.unlink(),
        "a folder": lambda info: (info.unlink(), info.mkdir()),
        "a cut record": lambda info: [file.write_bytes(b"x") for file in info.parent.glob("*array_record*")],
    }
)
def dataset_info_is(place: Place, damage) -> None:
    data = place.path / "data"
    data.mkdir()
    tidy(place.train(place.path / "first", f"--config.dataset.data_dir={data}", "--config.steps=1", "--config.optim.warmup=0"))
    for cache in data.rglob("*.npz"):
        cache.unlink()
    damage(next(data.rglob("dataset_info.json")))
    refused(place.train(place.path / "run", f"--config.dataset.data_dir={data}"), "delete")


@KIND.attempts({"empty": "", "relative": "cache"})
def the_cache_home_is(place: Place, value: str) -> None:
    home = place.path / "home"
    home.mkdir()
    tidy(place.fresh("overview", CONFIG, env={"XDG_CACHE_HOME": value, "HOME": str(home)}))
    tidy(
        place.fresh(
            *TRAIN,
            "--config.steps=1",
            "--config.optim.warmup=0",
            "--workdir=run",
            env={"XDG_CACHE_HOME": value, "HOME": str(home)},
        )
    )
    assert sorted(path.name for path in place.path.iterdir()) == ["home", "run"], "the cache is in the current folder"


@KIND.attempts({"nobody": "127.0.0.1:1", "no number": "127.0.0.1:x", "no host": "ray://nowhere.invalid:1", "a text": "x y"})
def a_ray_cluster_where_is(place: Place, address: str) -> None:
    begin = time.monotonic()
    ended = place.fresh(
        "sweep", CONFIG, "--workdir=sweep", "--sweep=seed=0", "--engine=ray", f"--ray-address={address}", timeout=150
    )
    refused(ended, address)
    assert time.monotonic() - begin < 90, "it waited"


@KIND.attempts(
    {
        "a local folder": ("--tpu=v5e:4x4", "--image=x"),
        "no such slice": ("--tpu=v9:4x4", "--image=x"),
        "a bad name": ("--tpu=v5e:4x4", "--image=x", "--name=A_B"),
    }
)
def a_refused_jobset_with(place: Place, *flags: str) -> None:
    refused(place.lowrank("sweep", CONFIG, "--workdir=sweep", "--sweep=seed=0:2", "--emit=jobset", *flags))
    _nothing_left(place.path / "sweep")


@KIND.attempts({"ascii": {"PYTHONIOENCODING": "ascii"}, "the C locale": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}})
def output_in(place: Place, env: dict[str, str]) -> None:
    out = place.path / "ä"
    flags = ("--scales=0.1", "--methods=spectral", "--batch-size=2", f"--out={out}")
    tidy(place.fresh("init-report", CONFIG, *flags, env={**env, "PYTHONCOERCECLOCALE": "0"}), 0, 2)
    refused(place.fresh("evaluate", f"--workdir={out}/né", env={**env, "PYTHONCOERCECLOCALE": "0"}), lines=12)
    refused(place.fresh("overview", CONFIG, "--config.model.name=né", env={**env, "PYTHONCOERCECLOCALE": "0"}))


@KIND.attempt
def a_work_directory_whose_name_is_no_text(place: Place) -> None:
    name = os.fsdecode(b"run-\xff\xfe")
    tidy(place.fresh(*TRAIN, "--config.steps=2", "--config.optim.warmup=0", f"--workdir={name}"), 0, 2)
    tidy(place.fresh("evaluate", f"--workdir={name}"), 0, 2)
    tidy(place.fresh("report", name), 0, 2)


@KIND.attempts(
    {
        "seeds": ("init-report", "--seeds=99999999999999"),
        "scales": ("init-report", "--scales=nan"),
        "images": ("init-report", "--batch-size=99999999999999"),
        "devices": ("overview", "--devices=99999999999999999999"),
        "poll": ("evaluate", "--poll=1e400"),
        "superscript": ("init-report", "--seeds=²"),
        "undecodable": ("evaluate", "--max-undecodable=99999999999999999999999999"),
        "jobs": ("sweep", "--jobs=99999999999999999999999999"),
        "a long number": ("init-report", f"--seeds={'9' * 5000}"),
    }
)
def a_flag_with_senseless(place: Place, command: str, flag: str) -> None:
    first = {"evaluate": ["--workdir=nowhere"], "sweep": [CONFIG, "--workdir=sweep", "--sweep=seed=0"]}
    ended: Ended = place.lowrank(command, *first.get(command, [CONFIG]), flag, timeout=60)
    refused(ended, lines=12)
