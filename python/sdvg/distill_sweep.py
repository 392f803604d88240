"""What Diagonal Distillation keeps of its teacher, and what each part of it is worth.

Every line makes the video of the same prompts from the same noise, target-only, one after another,
so that a slow minute of the machine meets them all; seconds are wall clock of one video alone, text
encoding included. Intervals are 95% percentile bootstraps over prompts with the same resamples for
all lines, so shares and differences are paired. Long videos are graded in parts of `PART` blocks,
each as `quality(segment=True)` has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sdvg.engine import SDVG
from sdvg.models import embedded
from sdvg.schedule import Schedule, preset, warp
from sdvg.store import fill
from sdvg.sweep import digest, prompts, resamples
from sdvg.token_sweep import (
    PICTURED,
    Found,
    Grade,
    error_bars,
    grades,
    keep_frames,
    new_figure,
    pictured,
    write_files,
)
from sdvg.types import CausalModel, Decoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

NAME = "diagonal_distill"
COLUMNS = (
    "model", "schedule", "forcing", "flow",
    "quality", "quality_low", "quality_high", "motion", "seconds", "videos",
)  # fmt: skip
LONG_COLUMNS = (*COLUMNS[:4], "blocks", *COLUMNS[4:8], "videos")
# folder of a run -> its name in the table
RUNS = {
    "student": "student",
    "no-forcing": "student",
    "no-flow": "student",
    "flat": "flat-student",
}
# of the teacher: many, evenly spaced before the flow shift; more gain nothing here
MANY = 16
# blocks of a long video, and of each graded part of it
LONG, PART = 30, 5
# share of the teacher's quality that the student is to keep, and how much a long video may lose
KEPT, DRIFT = 0.98, 0.03
# of the frames, in the picture
EVERY = 5


class Line(NamedTuple):
    """One line of the table: a model and its steps."""

    # "teacher", or a name of RUNS
    run: str
    schedule: Schedule
    # of the weights, so that videos of other ones are made anew
    weights: str
    # None for the teacher, which was trained otherwise
    forcing: bool | None = None
    flow: float | None = None
    # of a student's transformer
    folder: Path | None = None

    @property
    def model(self) -> str:
        """Its name in the table."""
        return RUNS.get(self.run, self.run)

    @property
    def steps(self) -> str:
        """How many steps block 0, 1, ... take, the last all later ones; "+clean": a pass more."""
        counts = "/".join(str(len(steps)) for steps in self.schedule.timesteps)
        return f"{counts}+clean" if self.schedule.clean_pass else counts

    @property
    def label(self) -> str:
        """Its name in plots."""
        return f"{self.run} {self.steps}"

    @property
    def key(self) -> str:
        """Its name in the file of videos."""
        return f"{self.label} {self.weights}"


class Row(NamedTuple):
    """One line of diagonal_distill.csv; `motion` is graded as `quality` is."""

    line: Line
    quality: Grade
    motion: Grade
    # mean per video
    seconds: float
    videos: int


class Part(NamedTuple):
    """One line of diagonal_distill_long.csv: a part of all long videos of a line."""

    line: Line
    # the first and the last block
    first: int
    last: int
    quality: Grade
    motion: float
    videos: int


class Shown(NamedTuple):
    """A line of the picture."""

    key: str


Models = Callable[[Line], tuple[CausalModel, Decoder]]
Judge = Callable[..., embedded.Quality]


def lines(weights: Path, students: Path) -> tuple[list[Line], list[str]]:
    """Return the table's lines and the runs that `students` lacks.

    Args:
        weights: the embedded models' folder; its target is the teacher.
        students: a folder of runs of `sdvg.train.diagonal_distill`, named as in `RUNS`.

    Raises ValueError where there is no student, or a folder that does not say how it was made.
    """
    found: list[Line] = []
    missing = [run for run in RUNS if not (students / run / "distillation.json").is_file()]
    if "student" in missing:
        raise ValueError(
            f"sweep: students must hold student/distillation.json, got {students} without; "
            "python -m sdvg.train.diagonal_distill makes it"
        )
    for run in RUNS:
        if run not in missing:
            told = embedded.distilled(students / run)
            steps = Schedule(told.timesteps, clean_pass=told.clean_pass)
            source = students / run
            found.append(Line(run, steps, digest(source), told.forcing, told.flow, source))
    whole = digest(weights, embedded.TARGETS["teacher"])
    many = Schedule((warp([1000 * (MANY - step) / MANY for step in range(MANY)]),))
    # the four that SDVG's target takes, and as few as a student's later blocks have
    few = Schedule(preset("diagonal:2").timesteps)
    steps = (many, preset("self_forcing"), few, found[0].schedule)
    return [Line("teacher", each, whole) for each in steps] + found, missing


def collect(
    models: Models,
    judge: Judge,
    folder: Path,
    lines: Sequence[Line],
    *,
    count: int,
    blocks: int,
    seed: int,
    settings: Mapping[str, object],
) -> Found:
    """Make every video that `folder/distill.jsonl` does not hold yet; return what was found.

    Args:
        models: gives a line's model and decoder, once for each line.
        judge: `quality`, or one like it.
        settings: all that decides a result beside line, prompt, blocks and seed: a folder begun
            with others is refused.

    Raises ValueError for fewer than one prompt or block, or a folder with other settings.
    """
    for name, value in (("prompts", count), ("blocks", blocks)):
        if value < 1:
            raise ValueError(f"sweep: {name} must be at least 1, got {value}")
    texts, makers = prompts(count), _Makers(models, seed)
    named = {line.key: line for line in lines}

    def make(n: int, key: str, length: int = blocks) -> dict[str, object]:
        frames, seconds = makers.video(named[key], texts[n], n, length)
        video = torch.cat(frames)
        if n < PICTURED and length == blocks:
            keep_frames(folder, n, named[key].label, video[::EVERY])
        judged = judge(video, texts[n])._asdict()
        grade = {name: round(float(value), 5) for name, value in judged.items()}
        return {"prompt": n, "method": key, "seconds": round(seconds, 5), **grade}

    def warm_up(n: int) -> None:
        for key in named:
            make(n, key, min(2, blocks))

    settings = {**settings, "blocks": blocks, "seed": seed}
    return fill(folder / "distill.jsonl", settings, list(named), count, make, warm_up)


def collect_long(
    models: Models,
    judge: Judge,
    folder: Path,
    lines: Sequence[Line],
    *,
    count: int,
    blocks: int,
    seed: int,
    settings: Mapping[str, object],
) -> Found:
    """Make the long videos that `folder/distill-long.jsonl` lacks, as `collect` does.

    A video's `value` and `motion` are lists, an entry for each part.
    """
    texts, makers = prompts(count), _Makers(models, seed)
    named = {line.key: line for line in lines}

    def make(n: int, key: str) -> dict[str, object]:
        frames, _ = makers.video(named[key], texts[n], n, blocks)
        judged = [
            judge(torch.cat(frames[first : first + PART]), texts[n], segment=True)
            for first in range(0, blocks, PART)
        ]
        return {
            "prompt": n,
            "method": key,
            "value": [round(part.value, 5) for part in judged],
            "motion": [round(part.motion, 5) for part in judged],
        }

    settings = {**settings, "blocks": blocks, "seed": seed}
    store = folder / "distill-long.jsonl"
    return fill(store, settings, list(named), count, make, lambda _: None)


class _Makers:
    """Makes videos, each line's model loaded once."""

    def __init__(self, models: Models, seed: int) -> None:
        self._load, self._seed = models, seed
        self._models: dict[str, tuple[CausalModel, Decoder]] = {}

    def video(
        self, line: Line, prompt: str, number: int, blocks: int
    ) -> tuple[list[Tensor], float]:
        """Return the frames of each block, and the seconds; noise is keyed by the number."""
        if line.key not in self._models:
            self._models[line.key] = self._load(line)
        target, decoder = self._models[line.key]
        loop = SDVG(None, target, decoder, schedule=line.schedule)
        began = time.perf_counter()
        made = loop.generate([prompt], num_blocks=blocks, seed=self._seed, sequences=[number])
        frames = [block.frames[0] for block in made]
        return frames, time.perf_counter() - began


def summarise(videos: Found, lines: Sequence[Line], count: int) -> list[Row]:
    """Return one row for each of `lines`, the first being what the others are held to."""
    motions = grades(_motions(videos), lines, count)
    both = zip(lines, grades(videos, lines, count), motions, strict=True)
    return [
        Row(
            line, quality, motion,
            float(np.mean([videos[n, line.key]["seconds"] for n in range(count)])), count,
        )
        for line, quality, motion in both
    ]  # fmt: skip


def summarise_long(videos: Found, lines: Sequence[Line], count: int) -> list[Part]:
    """Return one row for each part of the videos of `lines`; `kept` is of the first part's."""
    drawn, rows = resamples(count), []
    for line in lines:
        # [prompts, parts]
        value, motion = (
            np.array([videos[n, line.key][name] for n in range(count)])
            for name in ("value", "motion")
        )
        means = value[drawn].mean(1)
        for part in range(value.shape[1]):
            with np.errstate(divide="ignore", invalid="ignore"):
                kept = value[:, part].mean() / value[:, 0].mean()
                ratios = means[:, part] / means[:, 0]
            grade = Grade(
                float(value[:, part].mean()),
                *map(float, np.percentile(means[:, part], (2.5, 97.5))),
                float(kept),
                *map(float, np.percentile(ratios, (2.5, 97.5))),
            )
            first = part * PART
            rows.append(
                Part(line, first, first + PART - 1, grade, float(motion[:, part].mean()), count)
            )
    return rows


def difference(
    videos: Found, line: Line, other: Line, count: int, name: str = "value"
) -> tuple[float, float, float]:
    """Return how much better `line` is than `other` on the same prompts: mean, low, high."""
    mine, its = (
        np.array([videos[n, each.key][name] for n in range(count)]) for each in (line, other)
    )
    low, high = np.percentile((mine - its)[resamples(count)].mean(1), (2.5, 97.5))
    return float((mine - its).mean()), float(low), float(high)


def write(
    folder: Path,
    rows: Sequence[Row],
    parts: Sequence[Part],
    videos: Found,
    missing: Sequence[str],
    about: str,
) -> list[Path]:
    """Write the tables, the plots and the frames side by side; return their paths.

    Raises ImportError where matplotlib is missing, before anything is written.
    """
    figures = {NAME: plot(rows), f"{NAME}_long": plot_long(parts)}
    shown = [
        Shown(row.line.label)
        for row in rows
        if row is rows[0] or row.line.run in ("student", "flat")
    ]
    strips = pictured(folder, shown, PICTURED)
    if strips is not None:
        figures[f"{NAME}-frames"] = strips
    tables = {
        NAME: [COLUMNS, *map(_cells, rows)],
        f"{NAME}_long": [LONG_COLUMNS, *map(_long_cells, parts)],
    }
    text = _table(rows, parts, _claims(rows, parts, videos), missing, about)
    return write_files(folder, tables, {NAME: text}, figures)


def plot(rows: Sequence[Row]) -> Figure:
    """Return quality and motion of each line with 95% intervals; ImportError sans matplotlib."""
    figure = new_figure((8, 0.55 * len(rows) + 1.4))
    axes = figure.add_subplot()
    heights = np.arange(len(rows))[::-1]
    for name, colour, marker, shift in (
        ("quality", "#2e9e44", "o", 0.12), ("motion", "#2f6fb7", "s", -0.12),
    ):  # fmt: skip
        each = [getattr(row, name) for row in rows]
        axes.errorbar(
            [grade.quality for grade in each], heights + shift, xerr=error_bars(each),
            label=name, color=colour, marker=marker, linestyle="none", markersize=5,
            elinewidth=0.9, capsize=2,
        )  # fmt: skip
    whole = rows[0].quality.quality
    axes.axvline(whole, color="#1c1c1c", linewidth=0.8, alpha=0.5)
    axes.axvline(
        KEPT * whole, color="#1c1c1c", linewidth=0.8, linestyle=":",
        label=f"{KEPT:.0%} of the teacher's quality",
    )  # fmt: skip
    axes.set_yticks(heights, [row.line.label for row in rows], fontsize=8)
    axes.set_xlabel("judge, 0 to 1")
    axes.set_title(f"Steps a block, {rows[0].videos} prompts, 95% confidence", fontsize=11)
    axes.grid(alpha=0.25, axis="x")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def plot_long(parts: Sequence[Part]) -> Figure:
    """Return quality along long videos with 95% intervals; ImportError without matplotlib."""
    figure = new_figure((8, 4.5))
    axes = figure.add_subplot()
    colours = {"teacher": "#1c1c1c", "student": "#2e9e44", "no-forcing": "#c23b22"}
    for line in dict.fromkeys(part.line for part in parts):
        mine = [part for part in parts if part.line == line]
        each = [part.quality for part in mine]
        axes.errorbar(
            [f"{part.first + 1} to {part.last + 1}" for part in mine],
            [grade.quality for grade in each], yerr=error_bars(each), label=line.label,
            color=colours.get(line.run, "#a8a8a8"), marker="o", markersize=4, linewidth=1.2,
            elinewidth=0.7, capsize=2,
        )  # fmt: skip
    axes.set_xlabel("blocks")
    axes.set_ylabel("quality (judge, 0 to 1)")
    axes.set_title(f"Along a long video, {parts[0].videos} prompts, 95% confidence", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _motions(videos: Found) -> Found:
    """Return the videos with their motion in place of their quality."""
    return {key: {"value": video["motion"]} for key, video in videos.items()}


def _told(line: Line) -> tuple[str, str, str, str]:
    """Return the first four columns; empty where the teacher has nothing to say."""
    forcing = "" if line.forcing is None else str(line.forcing).lower()
    return line.model, line.steps, forcing, "" if line.flow is None else f"{line.flow:g}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        *_told(row.line),
        *(f"{number:.4f}" for number in row.quality[:3]),
        f"{row.motion.quality:.4f}",
        f"{row.seconds:.4f}",
        str(row.videos),
    )


def _long_cells(part: Part) -> tuple[str, ...]:
    return (
        *_told(part.line),
        f"{part.first}-{part.last}",
        *(f"{number:.4f}" for number in part.quality[:3]),
        f"{part.motion:.4f}",
        str(part.videos),
    )


def _table(
    rows: Sequence[Row],
    parts: Sequence[Part],
    claims: Sequence[str],
    missing: Sequence[str],
    about: str,
) -> str:
    text = [
        "# Diagonal Distillation: what is kept of the teacher, and by which part\n",
        f"{about}\n",
        "`schedule` has the denoising steps of block 0, 1, ..., the last for every later block; "
        "`+clean` is the pass at timestep 0 after each, without which the next block attends to "
        "the K/V of the last noisy step. `forcing`: trained on such K/V of its own blocks; "
        "`flow`: weight of flow distribution matching. Quality is the judge's, legibility * (1 + "
        "motion) / 2; `motion` is how near the digit stays to the path that was asked for. `kept` "
        "is the share of the first line's, on the same prompts. Intervals are 95%.\n",
        "| model | schedule | forcing | flow | quality | 95% | kept | 95% | motion | kept | 95% "
        "| s/video |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        told = " | ".join(cell or "-" for cell in _told(row.line))
        each = (
            f"{grade.quality:.4f}{between} | {grade.kept:.1%} "
            f"| {grade.kept_low:.1%} to {grade.kept_high:.1%}"
            for grade, between in (
                (
                    row.quality,
                    f" | {row.quality.quality_low:.4f} to {row.quality.quality_high:.4f}",
                ),
                (row.motion, ""),
            )
        )
        text.append(f"| {told} | {' | '.join(each)} | {row.seconds:.4f} |")
    if missing:
        text.append(f"\nNot in the table, as they were not trained: {', '.join(missing)}.")
    text += ["", *claims]
    text += [
        f"\n## Along videos of {parts[-1].last + 1} blocks\n",
        f"Each part of {PART} blocks is graded from its own first frame on, where walls may have "
        f"turned the digit. `kept` is the share of the first part's; {parts[0].videos} prompts.\n",
        "| model | schedule | forcing | flow | blocks | quality | 95% | kept | 95% | motion |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part in parts:
        told = " | ".join(cell or "-" for cell in _told(part.line))
        grade = part.quality
        text.append(
            f"| {told} | {part.first + 1} to {part.last + 1} | {grade.quality:.4f} "
            f"| {grade.quality_low:.4f} to {grade.quality_high:.4f} | {grade.kept:.1%} "
            f"| {grade.kept_low:.1%} to {grade.kept_high:.1%} | {part.motion:.4f} |"
        )
    return "\n".join(text) + "\n"


def _claims(rows: Sequence[Row], parts: Sequence[Part], videos: Found) -> list[str]:
    """Return a line for each target, as far as the table has what it is about."""
    count = rows[0].videos
    named = {row.line.run: row for row in rows if row.line.run != "teacher"}
    student = named["student"]
    text = []
    for teacher in (row for row in rows if row.line.schedule.clean_pass):
        if teacher.line.run == "teacher":
            _, kept = grades(videos, (teacher.line, student.line), count)
            _, moved = grades(_motions(videos), (teacher.line, student.line), count)
            text.append(
                f"- {KEPT:.0%} of the quality of the teacher at {teacher.line.steps} steps, with "
                f"{student.line.steps}: {'yes' if kept.kept >= KEPT else 'no'}, the student keeps "
                f"{kept.kept:.1%} ({kept.kept_low:.1%} to {kept.kept_high:.1%}), and "
                f"{moved.kept:.1%} of its motion ({moved.kept_low:.1%} to {moved.kept_high:.1%})"
            )

    def worth(run: str, name: str = "value") -> tuple[str, str]:
        gain, low, high = difference(videos, student.line, named[run].line, count, name)
        verdict = "yes" if low > 0 else "no, it does harm" if high < 0 else "not shown"
        return verdict, f"{gain:+.4f} ({low:+.4f} to {high:+.4f})"

    if "flat" in named:
        verdict, by = worth("flat")
        verdict = "no, it is better" if verdict.startswith("no,") else verdict
        text.append(
            f"- The flat student ({named['flat'].line.steps} steps), trained without these losses, "
            f"is visibly below: {verdict}; the student is better by {by}"
        )
    verdicts = []
    for run, part in (("no-forcing", "Diagonal forcing"), ("no-flow", "The flow term")):
        if run in named:
            verdict, by = worth(run)
            verdicts.append(verdict)
            motion = worth(run, "motion")[1]
            text.append(f"- {part} helps: {verdict}; quality {by}, motion {motion}")
    if len(verdicts) == 2:
        said = "yes" if set(verdicts) == {"yes"} else "no, or not shown by these videos"
        text.append(f"- The parts rank as in the paper, where each helps: {said}")
    for line in dict.fromkeys(part.line for part in parts):
        last = [part for part in parts if part.line == line][-1]
        grade, ends = last.quality, f"The last {PART} of {last.last + 1} blocks"
        within = "yes" if grade.kept >= 1 - DRIFT else "no"
        text.append(
            f"- {ends} within {DRIFT:.0%} of the first {PART}, {line.label}: {within}, "
            f"{grade.kept:.1%} ({grade.kept_low:.1%} to {grade.kept_high:.1%})"
        )
    return text
