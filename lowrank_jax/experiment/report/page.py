"""A report as Markdown, HTML, CSV and pictures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from lowrank_jax.experiment.best import LOSS, Best, measured
from lowrank_jax.experiment.report import arms as grouping
from lowrank_jax.experiment.report import figures
from lowrank_jax.experiment.report.arms import Arm, Interval, short, text
from lowrank_jax.experiment.report.blocks import (
    Block,
    Code,
    Emphasis,
    Heading,
    Inline,
    Paragraph,
    Picture,
    Preformatted,
    Table,
)  # fmt: skip
from lowrank_jax.experiment.report.rendering import as_csv, as_html, as_markdown, as_text
from lowrank_jax.experiment.report.stored_runs import Found, StoredRun, find
from lowrank_jax.experiment.workdir import files
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError
from lowrank_jax.text import count, did_you_mean, one_line

_SHOWN = 10  # damaged runs on the console


class Report:
    """Work directories compared.

    Args:
      folders: local folders or URLs, each a work directory or a folder of work directories.
      rival: the arm to compare the others with: a method, or "key=value" of a setting that tells arms apart; None for
        `spectral`, or the first method if that is missing.
      tune: the keys whose best value on the held-out split each arm takes, in addition to those that sweeps tuned.

    Raises:
      WorkdirError: there is no work directory, or `rival` or `tune` names nothing known.
    """

    def __init__(self, folders: Sequence[str], *, rival: str | None = None, tune: Sequence[str] = ("optim.lr",)):
        self.found: Found = find(folders)
        legal = sorted({key for run in self.found.runs for key in run.settings})
        for key in tune:
            if legal and key not in legal:
                raise WorkdirError(f"--tune: {key}: unknown key{did_you_mean(key, legal)}")
        self.arms: list[Arm] = grouping.into_arms(self.found, list(dict.fromkeys([*tune, *self.found.tuned])))
        self.rival: tuple[str, str] = self._rival(rival)

    @property
    def metric(self) -> str:
        """What the runs are compared by, as tables call it."""
        return self.found.best.title

    @property
    def _evaluated(self) -> str:
        return f"eval/{self.found.best.metric}"

    def _subject(self) -> str:
        """The metric at the beginning of a sentence."""
        lower = ", of which lower is better," if self.found.best.lower else ""
        return f"{self.metric[:1].upper()}{self.metric[1:]}{lower}"

    def _rival(self, given: str | None) -> tuple[str, str]:
        low_rank = [arm for arm in self.arms if arm.size]
        methods = dict.fromkeys(arm.method for arm in low_rank)
        if given is None:
            return "lowrank.method", "spectral" if "spectral" in methods else next(iter(methods), "")
        key, equals, value = given.partition("=")
        if not equals:
            key, value = "lowrank.method", given
        if why := grouping.no_rival(key, low_rank, self.found):
            raise WorkdirError(f"--rival: {why}")
        known = dict.fromkeys(arm.told_apart_by.get(key) for arm in low_rank)
        if not any(grouping.same(other, value) for other in known):
            finished = ", ".join(map(text, known)) or "none"
            raise WorkdirError(f"--rival: no finished run has {key}={value}; finished: {finished}")
        return key, value

    def write(self, out: epath.PathLike) -> list[str]:
        """Writes report.md, report.html, report.csv and the pictures to a folder; returns their paths, the page first."""
        folder = Workdir(out).path
        files.make_folder(folder)
        pictures = figures.draw(self.arms, self.found.best) if self.arms else {}
        blocks = self.blocks(pictures)
        contents = {
            "report.html": as_html(self.title(), blocks).encode(),
            "report.md": as_markdown(blocks).encode(),
            "report.csv": self.csv().encode(),
            **pictures,
        }
        for name, content in contents.items():
            files.write(folder / name, content)
        return [str(folder / name) for name in contents]

    def markdown(self) -> str:
        """The whole page without its pictures."""
        return as_markdown(self.blocks({}))

    def blocks(self, pictures: Mapping[str, bytes]) -> list[Block]:
        """The whole page; `pictures` are PNG files by name."""
        return [
            Heading(self.title(), level=1),
            *([Preformatted(self.found.commands)] if self.found.commands else []),
            self.reading_aid(),
            Table(self.summary()) if self.arms else Paragraph("No run has finished."),
            *self.others(),
            *(Picture(name, content, name) for name, content in pictures.items()),
            *self.differences(),
            *self.choices(),
            *self.failures(),
            *self.common(),
        ]

    def title(self) -> str:
        kinds = {(run.settings["model.name"], run.settings["dataset.name"]) for run in self.found.runs if run.settings}
        return ", ".join(f"{model} on {dataset}" for model, dataset in sorted(kinds)) or "No run has started"

    def reading_aid(self) -> Paragraph:
        splits = sorted({run.settings["dataset.eval_split"] for run in self.found.runs if run.settings})
        own = ", each arm at its own tuning" if any(arm.tuning for arm in self.arms) else ""
        return Paragraph(
            self._subject(), " on ", *_joined(" and ", map(Code, splits)), " at the end of training", *self._averaged(),
            f". ±: half the width of the {grouping.CONFIDENCE:.0%} interval of the mean over seeds (Student's t); none for a"
            " single seed. ", Emphasis("Early loss"),
            f": mean training loss up to the first log line{self._first_window()}{own}. ", Emphasis("Images/s"),
            ": training speed, median over the log; runs at the same time share the machine.", *self._of_which_phase(),
        )  # fmt: skip

    def _of_which_phase(self) -> list[Inline]:
        if not self._switched():
            return []
        return [" It is of the network that training ends with; before: of the dense or self-guided one that it begins with."]

    def _switched(self) -> bool:
        """Whether a run began with another network than the one that it ended with."""
        return any(run.switch for run in self.found.runs)

    def _averaged(self) -> list[Inline]:
        if all(run.settings.get("optim.ema_decay") is None for run in self.found.runs):
            return []
        return [", of the averaged weights where a run keeps them (raw weights: ", Code("eval_raw"), " in the CSV)"]

    def _windows(self) -> list[int]:
        """The steps of the first log lines; losses over different windows are not compared."""
        return sorted({curve[0][0] for arm in self.arms for run in arm.runs.values() if (curve := run.curve("train/loss"))})

    def _first_window(self) -> str:
        steps = ", ".join(map(str, self._windows()))
        return f" ({steps} steps)" if steps else ""

    def summary(self) -> list[list[str]]:
        """One row per arm."""
        sizes = list(dict.fromkeys(key for arm in self.arms for key, _ in arm.size))
        tuned = list(dict.fromkeys(key for arm in self.arms for key, _ in arm.tuning))
        speeds = self._speeds()
        figures_of = ["params", "MACs", self.metric, "seeds", "early loss", *speeds]
        rows = [[*map(short, sizes), "arm", *figures_of, *map(short, tuned)]]
        for arm in self.arms:
            whole = self._dense_twin(arm)
            rows.append([
                *(text(dict(arm.size).get(key, "")) for key in sizes),
                arm.label,
                _cost(arm, whole, "params"),
                _cost(arm, whole, "macs"),
                _plus_minus(arm.interval(self._evaluated)),
                f"{len(arm.runs)}" + (f" ({arm.missing} missing)" if arm.missing else ""),
                f"{arm.interval('early loss').mean:.3f}" if len(self._windows()) == 1 else "",
                *(_rate(arm.interval(name)) for name in speeds),
                *(text(dict(arm.tuning).get(key, "")) for key in tuned),
            ])  # fmt: skip
        return rows

    def _speeds(self) -> tuple[str, ...]:
        return ("images/s", "images/s before") if self._switched() else ("images/s",)

    def others(self) -> list[Block]:
        """What else was measured at the end of training, an arm a row."""
        results = [run.result["eval"] for arm in self.arms for run in arm.runs.values()]
        names = dict.fromkeys(name for result in results for name in measured(result) if name != self.found.best.metric)
        if not names:
            return []
        rows = [["size", "arm", *(Best(name).title for name in names)]]
        for arm in self.arms:
            rows.append([_settings(arm.size), arm.label, *(_plus_minus(arm.interval(f"eval/{name}")) for name in names)])
        return [Heading("Other metrics"), Table(rows)]

    def _dense_twin(self, arm: Arm) -> Arm:
        """The dense arm with the same settings, as far as they apply to it; the arm itself if there is none."""
        twins = (other for other in self.arms if other.method == "none" and set(other.line[1:]) <= set(arm.line[1:]))
        return next(twins, arm)

    def differences(self) -> list[Block]:
        """Every arm against the rival, paired by seed."""
        tops = grouping.paired(self.arms, self.rival, self._evaluated)
        losses = grouping.paired(self.arms, self.rival, "early loss")
        if not tops:
            return []
        rows = [["size", "arm", f"{self.metric} minus rival", "interval", "seeds", "", "early loss minus rival", ""]]
        for top, loss in zip(tops, losses, strict=True):
            row = [
                _settings(top.arm.size),
                top.arm.label,
                f"{top.interval.mean:+.4f}",
                _bounds(top.interval),
                str(top.interval.n),
            ]
            rows.append([*row, _verdict(top.interval, -1 if self.found.best.lower else 1), *self._early(loss.interval)])
        rival = " ".join(self.rival) if self.rival[0] != "lowrank.method" else self.rival[1]
        by_chance = len(tops) * (1 - grouping.CONFIDENCE)
        lead = (
            f"Arm minus {rival}, paired by seed; {grouping.CONFIDENCE:.0%} intervals of the mean difference (Student's t). "
            f"An interval that contains 0 shows no difference. Of {len(tops)} comparisons, {by_chance:.1f} are expected to be "
            "significant by chance."
        )
        return [Heading(f"Paired differences from {rival}"), Paragraph(lead), Table(rows)]

    def _early(self, interval: Interval) -> list[str]:
        return [f"{interval.mean:+.3f}", _verdict(interval, -1)] if len(self._windows()) == 1 else ["", ""]

    def choices(self) -> list[Block]:
        """The candidates for every arm's tuning."""
        chosen = [arm for arm in self.arms if arm.candidates]
        if not chosen:
            tunable = [key for key in ("optim.lr",) if key in self.found.varied]
            missing = "There is no held-out split (", Code("dataset.valid_split")
            note = Paragraph(*missing, "), so nothing is chosen: every value is an arm of its own.")
            return [Heading("Tuning"), note] if tunable and self.arms else []
        rows = [["size", "arm", "chosen", f"{self.metric} on the held-out split", "seeds", ""]]
        for arm in chosen:
            tried = "; ".join(
                f"{_settings(candidate.values)}: {candidate.why if candidate.valid is None else f'{candidate.valid:.4f}'}"
                for candidate in arm.candidates
            )
            seeds = ", ".join(map(str, arm.candidates[0].seeds))
            edge = "at the edge of the values tried" if arm.at_edge else ""
            rows.append([_settings(arm.size), arm.label, _settings(arm.tuning), tried, seeds, edge])
        most = "lowest" if self.found.best.lower else "highest"
        lead = (
            f"Each arm has the tuning with the {most} {self.metric} on the held-out split, which is neither trained on nor"
            " reported."
        )
        return [Heading("Tuning"), Paragraph(lead), Table(rows)]

    def failures(self) -> list[Block]:
        """Every run without a result."""
        rows = [[Code(run.name), run.status, run.reason] for run in self._lost()]
        return [Heading("Runs without a result"), Table([["run", "", ""], *rows]) if rows else Paragraph("None.")]

    def _lost(self) -> list[StoredRun]:
        return [run for run in self.found.runs if not run.done]

    def common(self) -> list[Block]:
        """Common settings of all runs, and package versions."""
        settings = next((run.settings for run in self.found.runs if run.settings), {})
        versions = next((run.result["versions"] for run in self.found.runs if run.done), {})
        omitted = {*self.found.varied, *self._without_effect()}
        same = {key: value for key, value in settings.items() if key not in omitted and value not in (None, [], {})}
        lines = [f"{key} = {value}" for key, value in same.items() if not key.startswith(("dataset.data_dir", "mesh."))]
        made = ", ".join(f"{package} {version}" for package, version in versions.items())
        return [
            Heading("Common to all runs"),
            *([Preformatted(lines)] if lines else []),
            *([Paragraph(made)] if made else []),
        ]

    def _without_effect(self) -> list[str]:
        """The settings that no run's objective takes."""
        objectives = {run.settings["objective.name"] for run in self.found.runs if run.settings}
        takers = {"objective.loss": {"softmax"}, "objective.metrics": {"softmax", "sigmoid"}}
        return [key for key, names in takers.items() if not names & objectives]

    def csv(self) -> str:
        """One row per run, chosen or not."""
        chosen = {run.name for arm in self.arms for run in arm.runs.values()}
        best = self.found.best.metric
        evaluated = {name: None for run in self.found.runs for name in measured(run.result.get("eval") or {})}
        names = dict.fromkeys([*(name for name in (best, *evaluated) if name != LOSS), LOSS])
        figures_of = ("params", "macs", *(f"eval/{name}" for name in names), "early loss", *self._speeds(), "seconds")
        figures_of += (f"eval_raw/{best}",) if any(run.result.get("eval_raw") for run in self.found.runs) else ()
        keys = [*self.found.varied]
        rows: list[list[Any]] = [["run", "status", "reason", "chosen", *keys, f"valid/{best}", *figures_of]]
        for run in self.found.runs:
            values = [run.figure(name) for name in figures_of] if run.done else [""] * len(figures_of)
            valid = run.result["valid"][best] if run.done and run.result.get("valid") else ""
            settings = [run.settings.get(key, "") for key in keys]
            rows.append([run.name, run.status, run.reason, run.name in chosen, *settings, valid, *values])
        return as_csv(rows)

    def console(self) -> str:
        """The table for a terminal, a count of the runs without a result, and why some cannot be used."""
        lost = self._lost()
        damaged = [one_line(run.reason) for run in lost if run.status == "damaged"]
        lines = [as_text(self.summary())] if self.arms else ["no run has finished"]
        if lost:
            lines.append(f"{len(lost)} of {len(self.found.runs)} runs without a result: {_ends(lost)}")
        lines += damaged[:_SHOWN]
        if damaged[_SHOWN:]:
            lines.append(f"and {len(damaged[_SHOWN:])} more, listed in the report")
        return "\n".join(lines)


def _joined(separator: str, parts: Iterable[Inline]) -> list[Inline]:
    return [piece for part in parts for piece in (separator, part)][1:]


def _ends(runs: Iterable[StoredRun]) -> str:
    ends = [run.status for run in runs]
    return ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))


def _settings(values: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{short(key)} {text(value)}" for key, value in values)


def _plus_minus(interval: Interval) -> str:
    if math.isnan(interval.mean):  # not measured by all, or of nobody
        return ""
    return f"{interval.mean:.4f}" + ("" if math.isnan(interval.half) else f" ± {interval.half:.4f}")


def _rate(interval: Interval) -> str:
    return "" if math.isnan(interval.mean) else f"{interval.mean:,.0f}"


def _bounds(interval: Interval) -> str:
    if math.isnan(interval.half):
        return "one seed"
    return f"{interval.mean - interval.half:+.4f} to {interval.mean + interval.half:+.4f}"


def _verdict(interval: Interval, better: int) -> str:
    if math.isnan(interval.half) or not interval.half:  # one seed, or no spread
        return ""
    if not interval.excludes_zero:
        return "not significant"
    return "better" if interval.mean * better > 0 else "worse"


def _cost(arm: Arm, dense: Arm, name: str) -> str:
    own, whole = arm.interval(name).mean, dense.interval(name).mean
    return count(round(own)) + (f" ({own / whole - 1:+.0%})" if whole and own != whole else "")
