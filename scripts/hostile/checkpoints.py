"""Work directories that are not what they seem: copied, renamed, damaged and foreign checkpoints, scores and metrics."""

import json
import os
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.hostile.harness import TRAIN, Ended, Kind, Place, refused, tidy, top1

KIND = Kind("checkpoints")


def same_end(place: Place, run: Path, *said: str) -> Ended:
    """Asserts that a run goes on to the result of one that was never disturbed, and says these words."""
    ended = tidy(place.train(run))
    expected = top1(place.package.prepared("finished"))
    assert top1(run) == expected, f"ended with {top1(run)}, not {expected}"
    assert _same_weights(run, place.package.prepared("finished")), "ended with other weights"
    missing = [word for word in said if word not in ended.out + ended.err]
    assert not missing, f"does not say {missing}: {ended.out[-300:]}"
    return ended


def _same_weights(run: Path, other: Path) -> bool:
    """By the digests in the records of the last step; one of a version without them has other names, and is not compared."""
    found = []
    for folder in (run, other):
        record = json.loads((folder / "checkpoints" / "120" / "info" / "metadata").read_text())
        found.append(record["body"]["digests"])
    return found[0] == found[1]


def put(run: Path, old: int | str, new: int | str, source: Path | None = None) -> None:
    """Copies a step to another number, in place of what is there."""
    target = run / "checkpoints" / str(new)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree((source or run) / "checkpoints" / str(old), target)


STEPS = {
    "80 as 120": (80, 120),
    "100 as 110": (100, 110),
    "80 as 100": (80, 100),
    "100 as 80": (100, 80),
    "100 as 150": (100, 150),
    "100 with 25 digits": (100, "1" * 25),
    "100 as 2**63": (100, str(2**63)),
    "100 as 1": (100, 1),
    "80 as 2**31": (80, str(2**31)),
    "100 as 0100": (100, "0100"),
    "80 as step_110": (80, "step_110"),
    "80 as a Thai digit": (80, "\u0e51\u0e52\u0e50"),
    "80 as +120": (80, "+120"),
    "80 as 1e2": (80, "1e2"),
    "80 as a temporary": (80, "120.orbax-checkpoint-tmp-7"),
}


@KIND.attempts(STEPS)
def a_step_copied_to_another_number(place: Place, old: int, new: int | str) -> None:
    run = place.copy("halted")
    put(run, old, new)
    same_end(place, run)


@KIND.attempts({"to the one before": "80", "absolute": "/", "dangling": "nowhere", "to itself": "120", "upwards": ".."})
def a_step_that_is_a_symlink(place: Place, target: str) -> None:
    run = place.copy("halted")
    where = {"/": str(run / "checkpoints" / "100")}.get(target, target)
    (run / "checkpoints" / "120").symlink_to(where)
    same_end(place, run)


@KIND.attempt
def the_newest_step_behind_a_symlink(place: Place) -> None:
    run = place.copy("halted")
    (run / "checkpoints" / "100").rename(place.path / "elsewhere")
    (run / "checkpoints" / "100").symlink_to(place.path / "elsewhere")
    same_end(place, run)
    assert (place.path / "elsewhere").is_dir(), "what the link led to is gone"


@KIND.attempts({"a file": lambda path: path.write_bytes(b"x"), "an empty file": Path.touch, "an empty folder": Path.mkdir})
def a_step_that_is(place: Place, make: Callable[[Path], object]) -> None:
    run = place.copy("halted")
    make(run / "checkpoints" / "120")
    same_end(place, run)


def seal(body: Any) -> str:
    return json.dumps({"body": body, "check": zlib.crc32(json.dumps(body, sort_keys=True).encode())})


def forged(run: Path, at: int, **changes: Any) -> None:
    """Changes the record of a step, and seals it again."""
    file = run / "checkpoints" / str(at) / "info" / "metadata"
    body = json.loads(file.read_text())["body"]
    file.write_text(seal({name: value for name, value in {**body, **changes}.items() if value is not None}))


@KIND.attempt
def a_step_copied_with_a_record_forged_to_fit(place: Place) -> None:
    run = place.copy("halted")
    put(run, 80, 120)
    forged(run, 120, step=120)
    same_end(place, run)


@KIND.attempt
def a_step_beyond_the_end_with_a_record_forged_to_fit(place: Place) -> None:
    run = place.copy("halted")
    put(run, 100, 150)
    forged(run, 150, step=150)
    same_end(place, run)


RECORDS = {
    "no data": {"data": {}},
    "data of another type": {"data": 7},
    "negative seconds": {"seconds": -1e9},
    "seconds of another type": {"seconds": "x"},
    "window of another type": {"window": 3},
    "window of numbers": {"window": [1, 2]},
    "evaluated of another type": {"evaluated": 5},
    "no digests": {"digests": {}},
    "digests of another type": {"digests": [1]},
    "metrics of another type": {"metrics": "x"},
    "metrics of text": {"metrics": {"bytes": "a", "crc32": 1}},
    "score of another type": {"score": "best"},
    "experiment of another type": {"experiment": 12},
    "step of another type": {"step": "100"},
    "data far away": {"data": {"next_index": 10**18}},
    "data at the start": {"data": {"next_index": 0}},
}


@KIND.attempts({name: (changes,) for name, changes in RECORDS.items()})
def a_forged_record(place: Place, changes: dict[str, Any]) -> None:
    run = place.copy("halted")
    forged(run, 100, **changes)
    same_end(place, run)


@KIND.attempts(
    {"a list": "[]", "null": "null", "text": '"x"', "a sealed list": seal([1]), "a sealed number": seal(1), "deep": "[" * 10**5}
)
def a_record_that_is(place: Place, text: str) -> None:
    run = place.copy("halted")
    (run / "checkpoints" / "100" / "info" / "metadata").write_text(text)
    same_end(place, run)


SCORES = {
    "forged best": seal({"60": 0.99, "100": 0.1, "120": 0.5}),
    "text": seal({"60": "best"}),
    "null": seal({"60": None}),
    "a list": seal([1]),
    "infinite": json.dumps({"body": {"60": 1e999}, "check": 0}),
    "huge": seal({"60": 10**400}),
    "names": seal({"sixty": 0.5}),
    "negative": seal({"-1": 0.5}),
    "truth values": seal({"60": True}),
    "nested": seal({"60": {"60": 1}}),
    "deep": "[" * 10**5,
    "empty": "",
    "of far steps": seal({str(10**30): 2.0}),
    "not text": "\udcff",
}


@KIND.attempts(SCORES)
def scores_that_are(place: Place, text: str) -> None:
    run = place.copy("halted")
    (run / "checkpoints" / "scores.json").write_text(text, errors="surrogateescape")
    same_end(place, run)
    best = json.loads((run / "result.json").read_text())["best_step"]
    assert best == 120, f"the best step is {best}"


def command(**changes: str) -> list[str]:
    return [*TRAIN, *(f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items())]


@KIND.attempts(
    {
        "the seed": {"seed": "1"},
        "the rate": {"optim__lr": "0.05"},
        "the rank": {"lowrank__scale": "0.1"},
        "the end": {"steps": "200"},
    }
)
def other_settings_where_config_json_is_gone(place: Place, changes: dict[str, str]) -> None:
    run = place.copy("halted")
    (run / "config.json").unlink()
    before = contents(run / "checkpoints")
    refused(place.lowrank(*command(**changes), f"--workdir={run}"), "experiment")
    assert contents(run / "checkpoints") == before, "checkpoints have changed"
    same_end(place, run)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@KIND.attempt
def the_same_settings_where_config_json_is_gone(place: Place) -> None:
    run = place.copy("halted")
    (run / "config.json").unlink()
    same_end(place, run)


@KIND.attempts({"in place of the last": 100, "after the last": 120, "in place of the first": 80})
def a_step_of_another_seed(place: Place, number: int) -> None:
    run, other = place.copy("halted"), place.path / "other"
    tidy(place.lowrank(*command(seed="1"), f"--workdir={other}"))
    put(run, 120, number, other)
    forged(run, number, step=number)
    same_end(place, run)


@KIND.attempts({"whole": "*", "steps": "[0-9]*"})
def checkpoints_that_are_gone(place: Place, what: str) -> None:
    run = place.copy("halted")
    metrics = (run / "metrics.jsonl").read_bytes()
    for folder in [run / "checkpoints"] if what == "*" else list((run / "checkpoints").glob(what)):
        shutil.rmtree(folder)
    refused(place.train(run), "checkpoints", "--restart")
    assert (run / "metrics.jsonl").read_bytes() == metrics, "the metrics have changed"
    tidy(place.train(run, "--restart"))
    assert any(path.read_bytes() == metrics for path in run.glob("metrics*.jsonl")), "the old metrics are lost"
    assert top1(run) == top1(place.package.prepared("finished"))


@KIND.attempt
def checkpoints_of_a_finished_run_that_are_gone(place: Place) -> None:
    run = place.copy("finished")
    shutil.rmtree(run / "checkpoints")
    refused(place.train(run), "checkpoints", "--restart")


@KIND.attempt
def a_kill_before_anything_was_saved(place: Place) -> None:
    run = place.copy("halted")
    for name in ("checkpoints", "saved.json"):
        subprocess.run(["rm", "-rf", run / name], check=True)
    same_end(place, run)


PATHS = {
    "[1]": "run[1]",
    "[!x]": "[!x]",
    "a backslash": "a\\b",
    "**": "a**b",
    "a parent with [1]": "p[1]/run",
    "spaces": " a b ",
    "[": "a[",
    "a star": "a*",
    "a question": "a?",
    "braces": "{a,b}",
    "a newline": "a\nb",
    "quotes": "'a\"b",
    "%20": "%20",
    "a tilde": "~",
    "a dollar": "$HOME",
    "umlauts": "\u00e9\u4e2d",
    "a dash": "-x",
    "a dot": ".hidden",
    "not UTF-8": "a\udcff",
}


@KIND.attempts(PATHS)
def a_work_directory_called(place: Place, name: str) -> None:
    ended = place.lowrank(
        *TRAIN[:2],
        "--config.epochs=None",
        "--config.steps=2",
        "--config.optim.warmup=0steps",
        f"--workdir={place.path}/{name}",
        timeout=120,
    )
    if ended.status == 2:
        refused(ended, "name")
        assert not (place.path / name).exists(), "a folder was left"
        return
    tidy(ended)
    again = tidy(place.lowrank("evaluate", f"--workdir={place.path}/{name}"))
    assert "top1" in again.out


METRICS: dict[str, Callable[[str], str]] = {
    "a flipped digit": lambda text: text.replace("0.", "7.", 1),
    "cut in the middle": lambda text: text[: len(text) // 2],
    "foreign": lambda text: "a,b,c\n1,2,3\n",
    "a line twice": lambda text: text.split("\n")[0] + "\n" + text,
    "without a step": lambda text: '{"train/loss": 1.0}\n' + text,
    "a step of text": lambda text: '{"step": "a"}\n' + text,
    "empty": lambda text: "",
    "a list": lambda text: "[1]\n" + text,
    "deep": lambda text: "[" * 10**5 + "\n" + text,
    "NaN": lambda text: '{"step": 1, "train/loss": NaN}\n' + text,
    "not text": lambda text: "\udcff\n" + text,
    "other line ends": lambda text: text.replace("\n", "\r\n"),
    "reordered": lambda text: "\n".join(sorted(text.splitlines())[::-1]) + "\n",
}


@KIND.attempts(METRICS)
def metrics_that_are(place: Place, change: Callable[[str], str]) -> None:
    run = place.copy("halted")
    changed = change((run / "metrics.jsonl").read_text()).encode(errors="surrogateescape")
    (run / "metrics.jsonl").write_bytes(changed)
    same_end(place, run, "metrics.jsonl is not as it was")
    kept = [path.read_bytes() for path in run.glob("metrics-*.jsonl")]
    assert not changed or changed in kept, "what was there is lost"


@KIND.attempt
def metrics_that_are_there_twice(place: Place) -> None:
    run = place.copy("halted")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() * 2)
    same_end(place, run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), f"lines of steps {steps}"


@KIND.attempts({"a folder": os.mkdir, "a pipe": os.mkfifo, "a symlink": lambda path: path.symlink_to("/etc/hostname")})
def metrics_in_whose_place_is(place: Place, make: Callable[[Path], None]) -> None:
    run = place.copy("halted")
    (run / "metrics.jsonl").unlink()
    make(run / "metrics.jsonl")
    ended = place.train(run)
    tidy(ended, 0, 2)


@KIND.attempt
def metrics_that_are_gone(place: Place) -> None:
    run = place.copy("halted")
    (run / "metrics.jsonl").unlink()
    same_end(place, run)


@KIND.attempt
def a_finished_run_again(place: Place) -> None:
    run = place.copy("finished")
    ended = tidy(place.train(run))
    assert "resuming" not in ended.out and "finished" in ended.out, ended.out


@KIND.attempts({"two steps more": (("60", "80"),), "one": (("20",),)})
def steps_that_a_kill_left(place: Place, left: tuple[str, ...]) -> None:
    run = place.copy("finished")
    extra = place.path / "extra"
    process = place.start(*TRAIN, f"--workdir={extra}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:  # keeps every step as it appears
        for folder in (extra / "checkpoints").glob("[0-9]*"):
            if folder.name in left and not (place.path / folder.name).exists() and folder.name.isdigit():
                subprocess.run(["cp", "-r", folder, place.path / folder.name], check=False, stderr=subprocess.DEVNULL)
        time.sleep(0.005)
    for name in left:
        if (place.path / name).exists():
            shutil.copytree(place.path / name, run / "checkpoints" / name)
    tidy(place.train(run))
    steps = sorted(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))
    assert steps == [100, 120], f"steps {steps} are left"


@KIND.attempt
def a_step_that_this_user_may_not_read(place: Place) -> None:
    run = place.copy("halted")
    files = [path for path in (run / "checkpoints" / "100").rglob("*") if path.is_file()]
    max(files, key=lambda path: path.stat().st_size).chmod(0)
    # As root without the right to pass over permissions.
    mortal = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    refused(place.fresh(*TRAIN, f"--workdir={run}", prefix=mortal), "permission")
    assert (run / "checkpoints" / "100").is_dir(), "the step was moved"


LINKS = {
    ".lock": True,
    ".config.json.partial": True,
    "config.json": False,
    "overview.txt": False,
    "result.json": False,
    ".result.json.partial": True,
    "metrics.jsonl": False,
    ".metrics.jsonl.partial": True,
    "saved.json": False,
    "failure.json": False,
    "checkpoints/scores.json": False,
    "checkpoints/.scores.json.partial": True,
}


@KIND.attempts({name: name for name in LINKS})
def a_symlink_to_a_file_outside(place: Place, name: str) -> None:
    run, outside = place.copy("halted"), place.path / "outside"
    content = (run / name).read_text() if (run / name).exists() else "precious"
    (run / name).unlink(missing_ok=True)
    outside.write_text(content)
    (run / name).symlink_to(outside)
    tidy(place.train(run), 0, 2)
    assert outside.read_text() == content, "the file outside has changed"


@KIND.attempts({name: name for name in ("checkpoints", "damaged", "plugins")})
def a_symlink_to_a_folder_outside(place: Place, name: str) -> None:
    run, outside = place.copy("halted"), place.path / "outside"
    if (run / name).exists():
        (run / name).rename(outside)
    else:
        outside.mkdir()
    before = contents(outside)
    (run / name).symlink_to(outside)
    tidy(place.train(run), 0, 2)
    assert contents(outside) == before, "the folder outside has changed"


@KIND.attempts(
    {"config.json": "config.json", "metrics.jsonl": "metrics.jsonl", ".lock": ".lock", "scores.json": "checkpoints/scores.json"}
)
def a_pipe_in_place_of(place: Place, name: str) -> None:
    run = place.copy("halted")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    tidy(place.train(run, timeout=90), 0, 2)


@KIND.attempts({str(number): number for number in range(4)})
def a_watch_beside_training(place: Place, number: int) -> None:
    run = place.path / "run"
    training = place.start(
        *TRAIN, "--config.checkpoint.every=2steps", f"--workdir={run}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ended = place.lowrank("evaluate", f"--workdir={run}", "--watch", "--poll=0.05", timeout=200)
    assert training.wait() == 0
    tidy(ended)
    assert not ended.err.strip(), ended


@KIND.attempts({f"{delay:.2f} s after step {step}": (step, delay) for step in (20, 60, 100, 120) for delay in (0.0, 0.05, 0.3)})
def a_kill(place: Place, step: int, delay: float) -> None:
    run = place.path / "run"
    training = place.start(*TRAIN, f"--workdir={run}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while training.poll() is None and not (run / "checkpoints" / str(step)).exists():
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    same_end(place, run)
    steps = sorted(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))
    assert steps == [100, 120], f"steps {steps} are left"
