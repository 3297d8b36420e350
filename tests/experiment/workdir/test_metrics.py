"""The lines of metrics.jsonl, and changes to them that nobody should miss."""

import json

import pytest

from lowrank_jax.experiment.errors import WorkdirError
from lowrank_jax.experiment.workdir.metrics import Metrics


@pytest.fixture
def metrics(tmp_path):
    """Losses and evaluations at steps 10, 20 and 30."""
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.append({"step": step, "train/loss": 1.0})
        metrics.append({"step": step, "eval/top1": 0.5, "eval/loss": None})
    return metrics


def steps(metrics):
    return [(line["step"], "eval/top1" in line) for line in metrics.read()]


def test_lines_come_back_without_one_that_a_kill_cut_short(metrics):
    whole = steps(metrics)
    with metrics.path.open("a") as file:
        file.write('{"step": 40, "tra')
    assert steps(metrics) == whole == [(step, kind) for step in (10, 20, 30) for kind in (False, True)]
    metrics.drop_cut_line()
    metrics.append({"step": 40})
    assert steps(metrics) == [*whole, (40, False)]


@pytest.mark.parametrize("change", [b"", None, b'{"step": 1}\n'])
def test_what_another_does_to_the_file_meanwhile_is_noticed(metrics, change):
    metrics.path.unlink()
    if change is not None:
        metrics.path.write_bytes(change)
    assert metrics.append({"step": 40, "train/loss": 1.0}) == ("metrics-1.jsonl" if change else "")
    assert metrics.read() == [{"step": 40}, {"step": 40, "train/loss": 1.0}]
    assert metrics.append({"step": 50}) is None


def test_no_file_has_no_lines(tmp_path):
    metrics = Metrics(tmp_path / "no" / "metrics.jsonl")
    assert metrics.read() == [] and metrics.set_aside() is None
    metrics.drop_cut_line()
    assert not metrics.path.parent.exists()


def test_a_file_is_cut_back_to_what_it_was(metrics):
    before, digest = metrics.path.read_bytes(), metrics.digest()
    metrics.append({"step": 40})
    assert metrics.cut_back(digest) is None
    assert metrics.path.read_bytes() == before
    metrics.check(digest)


def flipped(text):
    return text.replace("1.0", "2.0", 1)


CHANGES = {
    "a digit": flipped,
    "a line less": lambda text: text[text.index("\n") + 1 :],
    "a line twice": lambda text: text[: text.index("\n") + 1] + text,
    "the last line gone": lambda text: text[: text[:-1].rindex("\n") + 1],
    "foreign": lambda text: "name,value\n",
    "empty": lambda text: "",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_has_changed_is_set_aside_and_nothing_is_lost(metrics, change):
    digest, changed = metrics.digest(), change(metrics.path.read_text())
    metrics.path.write_text(changed)
    with pytest.raises(WorkdirError, match="has changed since the run ended"):
        metrics.check(digest)
    assert metrics.cut_back(digest) == ("metrics-1.jsonl" if changed else "")
    assert not changed or metrics.path.with_name("metrics-1.jsonl").read_text() == changed
    assert metrics.read() == []
    metrics.append({"step": 1})
    assert metrics.set_aside() == ("metrics-2.jsonl" if changed else "metrics-1.jsonl")


def test_without_a_digest_lines_are_dropped_by_their_steps(metrics):
    metrics.cut_after(20, evaluated=True)
    assert steps(metrics) == [(10, False), (10, True), (20, False), (20, True)]
    metrics.cut_after(20, evaluated=False)  # it will be evaluated again
    assert steps(metrics) == [(10, False), (10, True), (20, False)]


BAD = {
    "{": "line 7: ",
    "[1]": "line 7 has no step",
    '{"train/loss": 1.0}': "line 7 has no step",
    '{"step": "a"}': "line 7 has no step",
    '{"step": true}': "line 7 has no step",
    '{"step": -1}': "line 7 has no step",
    '{"step": 1e3}': "line 7 has no step",
    '{"step": 9223372036854775808}': "line 7 has no step",
    '{"step": 99999999999999999999}': "line 7: 99999999999999999999... is no number",
    '{"step": 1, "train/loss": 1' + "0" * 400 + "}": "line 7: 10000000000000000000... is no number",
    '{"step": 1, "train/loss": "1.0"}': "line 7: train/loss is not a number",
    '{"step": 1, "train/loss": NaN}': "line 7: NaN is no number that JSON can hold",
    '{"step": 1, "train/loss": 1e999}': "line 7: 1e999 is no number that JSON can hold",
    '{"step": ' + "[" * 100_000: "line 7: it is nested too deeply",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:30])
def test_a_line_that_is_not_a_step_and_its_numbers_is_refused(metrics, line):
    with metrics.path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(WorkdirError, match=f"metrics.jsonl is damaged: {BAD[line]}"):
        metrics.read()
    assert metrics.cut_after(20, evaluated=True) == "metrics-1.jsonl"


def test_what_is_not_text_is_refused(metrics):
    metrics.path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(WorkdirError, match="is damaged: "):
        metrics.read()


def test_evaluations_are_those_on_the_held_out_split_where_there_is_one(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "eval/top1": 0.5})
    metrics.append({"step": 2, "eval/top1": 0.5, "valid/top1": 0.25})
    metrics.append({"step": 3, "eval/top1": None})
    assert metrics.evaluations("top1") == [(1, 0.5), (2, 0.25)]


def test_a_process_that_is_not_the_first_writes_nothing(metrics):
    before = metrics.path.read_bytes()
    other = Metrics(metrics.path, active=False)
    other.append({"step": 40})
    other.cut_after(10, evaluated=True)
    assert other.set_aside() is None
    assert metrics.path.read_bytes() == before
    assert json.loads(before.splitlines()[0]) == {"step": 10, "train/loss": 1.0}
