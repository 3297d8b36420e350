"""The script of the theory's figures: what it computes with, and that no work is lost."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lowrank_jax.theory import draw_network
from scripts import figures


def test_the_exponent_of_a_power_law_is_found():
    exponent, fitted = figures.power_law([(x, 3 * x**-1.5) for x in (1.0, 2.0, 5.0, 9.0)])
    np.testing.assert_allclose(exponent, -1.5)
    np.testing.assert_allclose(fitted, [3 * x**-1.5 for x in (1.0, 2.0, 5.0, 9.0)])


def test_neurons_are_matched_by_weights_and_outputs():
    network = draw_network(jax.random.key(0), 6, 4, 3)
    order = np.array([2, 0, 3, 1])
    # The first two are alike in direction, and told apart by what they give.
    w, a = network.w.at[:, 1].set(2 * network.w[:, 0]), network.a.at[1].set(-network.a[0])
    network = dataclasses.replace(network, w=w, a=a)
    shuffled = dataclasses.replace(network, w=network.w[:, order], a=network.a[order])
    np.testing.assert_array_equal(figures.matched(network, shuffled), network.w)


def test_rows_survive_their_file(tmp_path):
    rows = [{"n": 3, "error": 1e-30, "converged": True, "refused": "", "excess": 0.5}]
    figures.write_csv(tmp_path / "rows.csv", rows)
    assert figures.read_csv(tmp_path / "rows.csv") == rows


def test_an_interrupted_figure_goes_on_where_it_was(tmp_path, capsys):
    ran = []

    def run(kind, size):
        if size == 3 and len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(size)
        return [{"kind": kind, "size": size}]

    job = figures.Job([("a", 1), ("a", 2), ("a", 3), ("a", 4)], run, figures.draw_gap, figures.tell_gap)
    partial = tmp_path / "some.partial"
    with pytest.raises(KeyboardInterrupt):
        figures.compute("some", job, partial)
    with partial.open("a") as file:
        file.write(json.dumps([["a", 3], []])[:-4])  # as a kill in the middle of a line leaves it
    ran.append(None)
    assert [row["size"] for row in figures.compute("some", job, partial)] == [1, 2, 3, 4]
    assert ran == [1, 2, None, 3, 4]
    assert f"2 of 4 cases are in {partial}" in capsys.readouterr().out


def test_a_small_figure_is_computed_drawn_and_drawn_again(tmp_path, capsys):
    figures.main(["sizes", "--small", f"--out={tmp_path}"])
    assert "(10, 5, 5, 2000): 2/2; " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sizes.csv", "sizes.png"]
    picture = (tmp_path / "sizes.png").read_bytes()
    (tmp_path / "sizes.png").unlink()
    figures.main(["sizes", "--small", "--redraw", f"--out={tmp_path}"])
    assert (tmp_path / "sizes.png").read_bytes() == picture


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["gpa"], None, "unknown figure 'gpa'; there are risk, gap"),
        (["gap", "--redraw", "--out={}"], None, "gap.csv: No such file or directory"),
        (["gap", "--redraw", "--out={}"], "n,m\n1,2\n", "gap.csv: not what this figure is drawn from"),
        (["gap", "--small", "--out={}/gap.csv"], "", "gap.csv: File exists"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(tmp_path, capsys, arguments, content, message):
    if content is not None:
        (tmp_path / "gap.csv").write_text(content)
    with pytest.raises(SystemExit) as end:
        figures.main([argument.format(tmp_path) for argument in arguments])
    assert end.value.code != 0
    assert message in f"{end.value.code} {capsys.readouterr().err}"
