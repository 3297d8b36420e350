"""Reports on a good run and a bad one: intruders into the page, the spreadsheet and the terminal, and messages on damage."""

import csv
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from scripts.hostile import intruders, messages
from scripts.hostile.harness import Ended, Place, tidy

SCRIPT = "<script>document.title='owned'</script>"


def runs(place: Place) -> Path:
    """A good run, and a bad one that is another experiment.

    Their results do not say of which settings they are, as those of earlier versions, so that nothing but a try damages them.
    """
    (place.path / "runs").mkdir()
    for name in ("good", "bad"):
        place.copy("finished", f"runs/{name}")
        shutil.rmtree(place.path / "runs" / name / "checkpoints")
        edit(place.path / "runs" / name / "result.json", lambda result: result.pop("config_digest", None))
    edit(place.path / "runs" / "bad" / "config.json", lambda config: config.update(seed=1))
    return place.path / "runs"


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Changes the JSON value in a file, which then has no checksum, as those of earlier versions."""
    value = json.loads(file.read_text())
    change(value)
    if isinstance(value, dict):
        value.pop("check", None)
    file.write_text(json.dumps(value))


def reported(place: Place) -> tuple[Ended, dict[str, dict[str, str]]]:
    """The command, which must end well, and the rows of its CSV by run."""
    ended = tidy(place.lowrank("report", place.path / "runs", f"--out={place.path / 'out'}"))
    with (place.path / "out" / "report.csv").open(newline="") as file:
        return ended, {row["run"]: row for row in csv.DictReader(file)}


PAYLOADS = {
    "a script": SCRIPT,
    "a script after a backtick": f"`{SCRIPT}",
    "a script after a blank line": f"a\n\n{SCRIPT}\n\nb",
    "a script after the end of the title and of code": f"</title></code></pre>{SCRIPT}",
    "a handler": '"><img src=x onerror="document.title=1">',
    "a link": "[x](javascript:document.title=1)",
    "a remote image": "![x](https://example.com/x.png)",
    "a table": "a | b |\n| --- | --- |\n| <svg onload=alert(1)> | c",
    "a terminal's title": "\x1b]0;owned\x07\x1b[31m\x9b1m",
}


def setting(*keys: str) -> Callable[[Path, str], None]:
    """Puts the payload into a setting of both runs, so that it is common to them."""

    def put(home: Path, payload: str) -> None:
        for run in ("good", "bad"):
            edit(home / run / "config.json", lambda config: _at(config, keys[:-1]).update({keys[-1]: payload}))

    return put


def _at(value: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        value = value[key]
    return value


def a_key(home: Path, payload: str) -> None:
    for run in ("good", "bad"):
        edit(home / run / "config.json", lambda config: config["model"]["kwargs"].update({payload: 1}))


def noted(**note: Any) -> Callable[[Path, str], None]:
    """Puts the payload into what is left by a run that failed or was stopped, where `...` stands."""

    def put(home: Path, payload: str) -> None:
        (home / "bad" / "result.json").unlink()
        name = "stopped.json" if "by" in note else "failure.json"
        values = {key: payload if value is ... else value for key, value in note.items()}
        (home / "bad" / name).write_text(json.dumps(values))

    return put


def a_version(home: Path, payload: str) -> None:
    for run in ("good", "bad"):
        edit(home / run / "result.json", lambda result: result.update(versions={payload: payload}))


def a_folder(home: Path, payload: str) -> None:
    (home / "bad" / "result.json").unlink()
    (home / "bad").rename(home / payload.replace("/", "_"))


def a_metric(home: Path, payload: str) -> None:
    (home / "bad" / "metrics.jsonl").write_text(json.dumps({"step": 1, payload: payload}) + "\n")


def a_sweep(home: Path, payload: str) -> None:
    (home / "sweep.json").write_text(json.dumps({"commands": [payload], "tuned": [payload], "trials": {payload: {}}}))


PLACES = {
    "the evaluation split": setting("dataset", "eval_split"),
    "the model": setting("model", "name"),
    "the data set": setting("dataset", "name"),
    "the method": setting("lowrank", "method"),
    "a common setting": setting("optim", "schedule"),
    "a key": a_key,
    "the reason of a failure": noted(status="failed", reason=...),
    "the status of a failure": noted(status=..., reason="x"),
    "who stopped it": noted(by=..., step=1),
    "the versions": a_version,
    "a folder's name": a_folder,
    "the metrics": a_metric,
    "the record of a sweep": a_sweep,
}


class Page(HTMLParser):
    """Asserts that a page has no element or attribute that runs or loads anything."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "base", "link", "form", "svg", "math", "a"), f"<{tag}>"
        for name, value in attrs:
            assert not name.startswith("on"), f"a handler {name}={value}"
            assert name not in ("src", "href") or str(value).startswith("data:image/png;base64,"), f"{name}={str(value)[:40]}"
            assert value != "refresh", "a refresh"


@intruders.KIND.attempts({f"{payload} in {where}": (where, payload) for where, payload in itertools.product(PLACES, PAYLOADS)})
def in_a_report(place: Place, where: str, payload: str) -> None:
    PLACES[where](runs(place), PAYLOADS[payload])
    ended, _ = reported(place)
    Page().feed((place.path / "out" / "report.html").read_text())
    page = (place.path / "out" / "report.md").read_text()
    text = re.sub(r"`[^`\n]+`|^    .*$", "", page, flags=re.M)  # code is shown as it is
    assert not re.search(r"<[a-z/]|(?<!\\)\]\((?!top1_|curves)", text, re.I), "markup in the Markdown"
    assert all(line.isprintable() for line in (ended.out + ended.err + page).splitlines()), "control characters"


FORMULAS = ("=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", '=HYPERLINK("http://example.com")')


@intruders.KIND.attempts({formula.strip(): formula for formula in FORMULAS})
def a_formula_in_the_spreadsheet(place: Place, formula: str) -> None:
    noted(status="failed", reason=...)(runs(place), formula)
    _, rows = reported(place)
    for cell in rows["bad"].values():
        assert not cell.strip().startswith(("=", "+", "@")) and not re.match(r"-\D|-.*\+", cell), cell


@intruders.KIND.attempts({"report.html": "report.html", "report.csv": "report.csv", "its partial file": ".report.html.partial"})
def a_link_in_the_place_of_a_report(place: Place, name: str) -> None:
    home, outside = runs(place), place.path / "outside"
    outside.write_text("mine")
    (home / name).symlink_to(outside)
    tidy(place.lowrank("report", home))
    assert outside.read_text() == "mine", "a file outside was overwritten"


DEEP = 100_000
CONTENTS = {
    "empty": b"",
    "null": b"null\n",
    "a list": b"[1]\n",
    "a text": b'"x"\n',
    "a number": b"3\n",
    "cut short": b'{"a": \n{}\n',
    "zeros": b"\0" * 100 + b"\n",
    "not UTF-8": b'{"a\xff": 1}\n',
    "another object": b'{"a": "b"}\n',
    "deep": b"[" * DEEP + b"]" * DEEP + b"\n",
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"\n",
    "a number of 5000 digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "NaN": b'{"step": NaN}\n',
    "a marked text": b"\xef\xbb\xbf{}\n",
}
FILES = ("config.json", "result.json", "metrics.jsonl", "failure.json", "stopped.json", "sweep.json")
HARMLESS = {("metrics.jsonl", "empty"), ("sweep.json", "another object"), ("failure.json", "another object")}


def spoiled(place: Place, file: str) -> Path:
    """Where to put the damage; the run has no result where that would be read first."""
    home = runs(place)
    if file in ("failure.json", "stopped.json"):
        (home / "bad" / "result.json").unlink()
    path = home / file if file == "sweep.json" else home / "bad" / file
    path.unlink(missing_ok=True)
    return path


def check_damaged(place: Place, file: str, *, damaged: bool = True) -> None:
    ended, rows = reported(place)
    assert rows["good"]["status"] == "done", "the good run is lost"
    name = "sweep.json" if file == "sweep.json" else "bad"
    if damaged:
        assert rows.get(name, {}).get("status") == "damaged", f"{name} is not listed as damaged"
        assert file in ended.out, f"the console does not say what is damaged, {ended}"


@messages.KIND.attempts({f"{damage}, {file}": (file, damage) for file, damage in itertools.product(FILES, CONTENTS)})
def a_report_on_a_damaged_file(place: Place, file: str, damage: str) -> None:
    spoiled(place, file).write_bytes(CONTENTS[damage])
    check_damaged(place, file, damaged=(file, damage) not in HARMLESS)


OTHERS: dict[str, Callable[[Path], Any]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
}


@messages.KIND.attempts({f"{other} as {file}": (file, other) for file, other in itertools.product(FILES, OTHERS)})
def a_report_on_something_else_than_a_file(place: Place, file: str, other: str) -> None:
    OTHERS[other](spoiled(place, file))
    check_damaged(place, file)


LEAVES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a seed that is a text": ("config.json", lambda config: config.update(seed="x")),
    "a seed that is a list": ("config.json", lambda config: config.update(seed=[1])),
    "a seed of 400 digits": ("config.json", lambda config: config.update(seed=10**400)),
    "a section that is a number": ("config.json", lambda config: config.update(optim=3)),
    "a method that is a list": ("config.json", lambda config: config["lowrank"].update(method=[])),
    "a scale that is a text": ("config.json", lambda config: config["lowrank"].update(scale="x")),
    "a split that is null": ("config.json", lambda config: config["dataset"].update(eval_split=None)),
    "a rate that is a mapping": ("config.json", lambda config: config["optim"].update(lr={"a": 1})),
    "top1 that is a text": ("result.json", lambda result: result["eval"].update(top1="x")),
    "top1 that is true": ("result.json", lambda result: result["eval"].update(top1=True)),
    "top1 of 97": ("result.json", lambda result: result["eval"].update(top1=97)),
    "top1 below 0": ("result.json", lambda result: result["eval"].update(top1=-1)),
    "top5 that is a list": ("result.json", lambda result: result["eval"].update(top5=[])),
    "a loss of 1e300": ("result.json", lambda result: result["eval"].update(loss=1e300)),
    "valid that is a number": ("result.json", lambda result: result.update(valid=3)),
    "valid without top1": ("result.json", lambda result: result.update(valid={"loss": 1})),
    "eval_raw that is a text": ("result.json", lambda result: result.update(eval_raw="x")),
    "versions that are a list": ("result.json", lambda result: result.update(versions=[1])),
    "a version that is a mapping": ("result.json", lambda result: result.update(versions={"jax": {}})),
    "params below 0": ("result.json", lambda result: result.update(params=-5)),
    "params of 400 digits": ("result.json", lambda result: result.update(params=10**400)),
    "seconds that are null": ("result.json", lambda result: result.update(seconds=None)),
}


@messages.KIND.attempts(LEAVES)
def a_report_on_a_wrong_value(place: Place, file: str, change: Callable[[Any], Any]) -> None:
    edit(runs(place) / "bad" / file, change)
    check_damaged(place, file)


LINES = {
    "without a step": '{"train/loss": 1}',
    "with a step that is a text": '{"step": "a"}',
    "with a step below 0": '{"step": -1}',
    "with half a step": '{"step": 1.5}',
    "with a loss that is a text": '{"step": 1, "train/loss": "x"}',
    "with a loss of 1e300": '{"step": 1, "train/loss": 1e300}',
    "with an infinite loss": '{"step": 1, "train/loss": 1e999}',
    "with a rate that is a list": '{"step": 1, "train/images_per_second": []}',
    "with top1 of 97": '{"step": 1, "eval/top1": 97}',
}


@messages.KIND.attempts(LINES)
def a_report_on_a_line_of_metrics(place: Place, line: str) -> None:
    path = runs(place) / "bad" / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    check_damaged(place, "metrics.jsonl")


CHANGES: dict[str, Callable[[str], str]] = {
    "a digit": lambda text: re.sub(r'("train/loss": \d\.)(\d)', lambda m: m[1] + str((int(m[2]) + 1) % 10), text, count=1),
    "a line twice": lambda text: text + text.splitlines()[-1] + "\n",
    "a line less": lambda text: "\n".join(text.splitlines()[:-1]) + "\n",
    "nothing left": lambda text: "",
}


@messages.KIND.attempts(CHANGES)
def a_report_on_metrics_that_changed_after_the_end(place: Place, change: Callable[[str], str]) -> None:
    path = runs(place) / "bad" / "metrics.jsonl"
    path.write_text(change(path.read_text()))
    check_damaged(place, "metrics.jsonl")


@messages.KIND.attempts({"folder": "closed", "run": "bad", "file": "bad/metrics.jsonl"})
def a_report_without_permission_to_read_a(place: Place, name: str) -> None:
    home = runs(place)
    (home / "closed" / "inside").mkdir(parents=True)
    (place.path / "out").mkdir()
    place.package.scratch.chmod(0o755)
    for path in (place.path, *place.path.rglob("*")):
        path.chmod(0o777)
    (home / name).chmod(0)
    user = ("setpriv", "--reuid=65534", "--clear-groups") if os.geteuid() == 0 else ()
    own = {"HOME": str(place.path), "XDG_CACHE_HOME": str(place.path), "MPLCONFIGDIR": None}
    ended = tidy(place.fresh("report", home, f"--out={place.path / 'out'}", prefix=user, env=own))
    assert "Permission denied" in ended.out and name in ended.out, f"it does not say so, {ended}"
    assert (place.path / "out" / "report.html").exists()


@messages.KIND.attempt
def a_report_on_links_in_a_circle(place: Place) -> None:
    home = runs(place)
    for name in ("a", "b", "c"):
        (home / name).symlink_to(home)
    _, rows = reported(place)
    assert len(rows) == 2, f"{len(rows)} runs of 2"
