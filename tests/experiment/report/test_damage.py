"""One bad run does not end a report, whatever is wrong with it: it is listed with a reason, and the others are compared."""

import contextlib
import copy
import json
import os
import pathlib
import shutil
import tempfile

import pytest

from lowrank_jax.experiment.cli.commands import main
from lowrank_jax.experiment.report.page import Report
from lowrank_jax.experiment.report.stored_runs import find
from lowrank_jax.experiment.workdir.identity import config_digest
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from tests.stored import make

DEEP = 10_000
RAW = {  # JSON that `json.dumps` would not write
    "NaN": "NaN",
    "infinite": "-Infinity",
    "1e999": "1e999",
    "of 5000 digits": "9" * 5000,
    "deep": "[" * DEEP + "]" * DEEP,
    "deep objects": '{"a":' * DEEP + "1" + "}" * DEEP,
}
WRONG = [None, True, -1, 1.5, 10**400, 1e300, "x", "\0", "\ud800", [], {}, [[1]], {"a": {"b": []}}, *RAW.values()]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two runs to compare and, for every file that a report reads, one that has it."""
    home = tmp_path_factory.mktemp("good")
    for method in ("spectral", "none"):
        make(home, f"good_{method}", top1=0.5, lowrank__method=method)
    make(home, "spoiled/done", top1=0.9, raw=0.8, valid=0.7, seed=1)
    make(home, "spoiled/failed", failure="loss is nan", seed=2)
    make(home, "spoiled/stopped", seed=3)
    Workdir(home / "spoiled" / "stopped").write_json("stopped.json", {"by": "asha", "step": 20})
    Workdir(home / "spoiled").write_json(
        "sweep.json", {"commands": ["lowrank sweep"], "tuned": ["optim.lr"], "trials": {"a": {}}}
    )
    return home


@pytest.fixture
def home(good, tmp_path):
    shutil.copytree(good, tmp_path / "home")
    return tmp_path / "home"


FILES = {
    "done/config.json": "done",
    "done/result.json": "done",
    "done/metrics.jsonl": "done",
    "failed/failure.json": "failed",
    "stopped/stopped.json": "stopped",
    "sweep.json": "sweep.json",
}


def report_on(home):
    """The statuses by name, after everything but the pictures has been made, and the good runs have been compared."""
    report = Report([str(home)])
    assert all((report.console(), report.markdown(), report.csv()))
    labels = [arm.label for arm in report.arms]
    assert any(label.startswith("spectral") for label in labels) and any(label.startswith("dense") for label in labels)
    return {run.name.rpartition("/")[2]: run for run in report.found.runs}


def nowhere(file, beside):
    file.symlink_to(beside / "nowhere")


def looping(file, beside):
    file.symlink_to(file)


def endless(file, beside):
    file.symlink_to("/dev/zero")


def huge(file, beside):
    with file.open("wb") as opened:
        opened.truncate(2**40)


REPLACED = {
    "folder": lambda file, beside: file.mkdir(),
    "pipe": lambda file, beside: os.mkfifo(file),
    "link to nothing": nowhere,
    "link to itself": looping,
    "device": endless,
    "huge": huge,
    "empty": lambda file, beside: file.write_bytes(b""),
    "null": lambda file, beside: file.write_bytes(b"null\n"),
    "list": lambda file, beside: file.write_bytes(b"[1]\n"),
    "text": lambda file, beside: file.write_bytes(b'"text"\n'),
    "cut short": lambda file, beside: file.write_bytes(b'{"a": \n'),
    "zeros": lambda file, beside: file.write_bytes(b"\0" * 99 + b"\n"),
    "not UTF-8": lambda file, beside: file.write_bytes(b'{"a\xff": 2}\n'),
    "marked": lambda file, beside: file.write_bytes(b"\xef\xbb\xbf" + b'{"step": 1}\n'),
    "other object": lambda file, beside: file.write_bytes(b'{"a": "b"}\n'),
    **{name: lambda file, beside, text=text: file.write_text(f"{text}\n") for name, text in RAW.items()},
}
LEGAL = {  # no such file, an empty file of metrics, and objects whose keys are all optional
    *((file, "link to nothing") for file in FILES if file != "done/config.json"),
    ("done/metrics.jsonl", "empty"),
    ("failed/failure.json", "other object"),
    ("sweep.json", "other object"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_something_else(home, tmp_path, file):
    place, kept = home / "spoiled" / file, tmp_path / "kept"
    place.rename(kept)
    for damage, replace in REPLACED.items():
        replace(place, tmp_path)
        runs = report_on(home)
        if (file, damage) not in LEGAL:
            run = runs[FILES[file]]
            assert run.status == "damaged" and run.reason, f"{damage}: {run.status}"
        place.rmdir() if place.is_dir() else place.unlink()


def leaves(value, path=()):
    """The path of every value inside a JSON value, containers included."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from leaves(value[key], (*path, key))


def spoiled(tree, path, wrong):
    """The text of a JSON value in which one place holds something else."""
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = "@" if wrong in RAW.values() else wrong
    return json.dumps(tree).replace('"@"', str(wrong))


NUMBERS, TEXTS = (-1, 1.5), ("x", "\0", "\ud800")
SETTINGS = ("x", "\0")  # a config holds no text that is not UTF-8
RELIED_ON = {  # what may stand there of the values above; any other one damages the run
    "done/config.json": {
        ("seed",): (-1,), ("model", "name"): SETTINGS, ("dataset", "name"): SETTINGS, ("dataset", "eval_split"): SETTINGS,
        ("lowrank", "method"): SETTINGS, ("lowrank", "scale"): (None, *NUMBERS), ("lowrank", "rank"): (None, -1),
        ("lowrank", "rules"): ([],), ("optim", "lr"): NUMBERS, ("optim", "ema_decay"): (None, *NUMBERS),
    },
    "done/result.json": {
        ("params",): (1.5,), ("macs",): (1.5,), ("seconds",): (1.5,), ("versions",): ({},), ("versions", "jax"): TEXTS,
        ("eval",): (), ("eval", "top1"): (), ("eval", "loss"): NUMBERS, ("eval", "top5"): (None,),
        ("valid",): (None,), ("valid", "top1"): (), ("valid", "loss"): NUMBERS, ("eval_raw",): (None, {}),
    },
    "done/metrics.jsonl": {("step",): (), ("train/loss",): (None, *NUMBERS), ("train/images_per_second",): (None, *NUMBERS)},
    "failed/failure.json": {("status",): (), ("reason",): TEXTS},
    "stopped/stopped.json": {("by",): TEXTS, ("step",): ()},
    "sweep.json": {("commands",): ([],), ("tuned",): ([],), ("trials",): ({}, {"a": {"b": []}}), ("tuned", 0): TEXTS},
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_value_that_is_something_else(home, file):
    place, name = home / "spoiled" / file, FILES[file]
    first, *rest = place.read_text().splitlines() if file.endswith(".jsonl") else [place.read_text()]
    tree, relied_on = json.loads(first), RELIED_ON[file]
    tree.pop("check", None)  # as earlier versions wrote it; with it, every other value is damage
    assert relied_on.keys() <= set(leaves(tree))
    for number, path in enumerate(leaves(tree)):
        for wrong in WRONG if path in relied_on else WRONG[number % 9 :: 9]:
            place.write_text("\n".join([spoiled(tree, path, wrong), *rest, ""]))
            found = {run.name: run for run in find([str(home / "spoiled")]).runs}
            damaged = name in found and found[name].status == "damaged"
            if path in relied_on:
                assert damaged == (wrong not in relied_on[path]), f"{path}: {ascii(wrong)[:20]}"
            if not damaged:  # then it goes all the way
                report_on(home)


def test_a_key_that_is_missing_or_another_one(home):
    for file in FILES:
        place = home / "spoiled" / file
        text = place.read_text()
        first, *rest = text.splitlines() if file.endswith(".jsonl") else [text]
        tree = json.loads(first)
        tree.pop("check", None)
        for key in tree:
            for other in ({}, {"\ud800": tree[key]}, {f"a.{key}": tree[key]}):
                changed = {**{old: tree[old] for old in tree if old != key}, **other}
                place.write_text("\n".join([json.dumps(changed), *rest, ""]))
                report_on(home)
        place.write_text(text)


@contextlib.contextmanager
def without_rights(*places):
    """As a user who may not read some files and folders."""
    modes = {place: place.stat().st_mode for place in places}
    for place in places:
        place.chmod(0)
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for place, mode in modes.items():
            place.chmod(mode)


def test_what_may_not_be_read(good):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        home = pathlib.Path(folder)
        shutil.copytree(good, home, dirs_exist_ok=True)
        home.chmod(0o755)
        make(home, "closed/run", top1=0.5, seed=8)
        make(home, "locked", top1=0.5, seed=9)
        with without_rights(home / "closed", home / "locked", home / "spoiled" / "done" / "metrics.jsonl"):
            runs = report_on(home)
        for name in ("closed", "locked", "done"):
            assert runs[name].status == "damaged" and runs[name].reason.endswith("Permission denied")
        with without_rights(home), pytest.raises(WorkdirError, match="Permission denied"):
            Report([str(home)])


def test_links_that_lead_back_are_followed_once(home):
    for name in ("a", "b", "spoiled/c"):
        (home / name).symlink_to(home)
    (home / "good_none" / "config.json").unlink()
    (home / "good_none" / "config.json").symlink_to(home / "spoiled" / "done" / "config.json")  # read, wherever it lies
    names = [run.name for run in find([str(home)]).runs]
    assert len(names) == 6


def test_a_run_that_is_deleted_while_it_is_read(home, monkeypatch):
    read = Workdir.read_json

    def deleting(self, name):
        value = read(self, name)
        if self.path.name == "done" and name == "config.json":
            shutil.rmtree(self.path)
        return value

    monkeypatch.setattr(Workdir, "read_json", deleting)
    assert report_on(home)["done"].status == "unfinished"


def test_metrics_that_have_changed_since_the_end(home):
    place = home / "spoiled" / "done"
    folder = Workdir(place)
    folder.write_json("result.json", {**(folder.read_json("result.json") or {}), "metrics": folder.metrics.digest()})
    assert report_on(home)["done"].status == "done"
    file = place / "metrics.jsonl"
    text = file.read_text()
    for changed in (text.replace("100.0", "900.0"), text + text.splitlines()[-1] + "\n", text[:-1], ""):
        file.write_text(changed)
        run = report_on(home)["done"]
        assert run.status == "damaged" and run.reason == f"{file} has changed since the run ended"


def test_a_result_of_other_settings(home):
    folder = Workdir(home / "spoiled" / "done")
    result = folder.read_json("result.json") or {}
    for config, status in ((folder.read_config(), "done"), ({**folder.read_config(), "seed": 7}, "damaged")):
        folder.write_json("result.json", {**result, "config_digest": config_digest(config)})
        run = report_on(home)["done"]
        assert run.status == status
    assert run.reason.endswith("result.json belongs to other settings than config.json")


def test_a_result_that_is_not_what_was_logged(home):
    folder = Workdir(home / "spoiled" / "done")
    result = folder.read_json("result.json") or {}
    folder.metrics.append({"step": 20, **{f"eval/{name}": value for name, value in result["eval"].items()}})
    record = {**result, "step": 20, "metrics": folder.metrics.digest()}
    for top1, status in ((result["eval"]["top1"], "done"), (0.99, "damaged")):
        folder.write_json("result.json", {**record, "eval": {**result["eval"], "top1": top1}})
        run = report_on(home)["done"]
        assert run.status == status
    assert run.reason.endswith("result.json and metrics.jsonl differ in eval/top1")


def test_the_command_says_what_cannot_be_used_and_ends_well(home, tmp_path, capsys):
    for number in range(12):
        make(home, f"bad\x1b[31m{number}", top1=0.5, seed=20 + number)
        (home / f"bad\x1b[31m{number}" / "metrics.jsonl").write_text('{"step": "\x1b]0;title\x07"}\n')
    with pytest.raises(SystemExit) as end:
        main(["report", str(home), f"--out={tmp_path / 'out'}"])
    assert not end.value.code
    said = capsys.readouterr().out
    assert "bad\\x1b[31m0/metrics.jsonl is damaged: line 1" in said and "and 2 more" in said
    assert "\x1b" not in said and "\x07" not in said
