"""The tables, plots and claims of Diagonal Distillation's comparison (`sdvg.distill_sweep`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sdvg.distill_sweep import PART, Line, Part, Row, difference, motions
from sdvg.token_sweep import (
    PICTURED,
    Found,
    error_bars,
    grades,
    new_figure,
    pictured,
    write_files,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "diagonal_distill"
COLUMNS = (
    "model", "schedule", "forcing", "flow",
    "quality", "quality_low", "quality_high", "motion", "seconds", "videos",
)  # fmt: skip
LONG_COLUMNS = (*COLUMNS[:4], "blocks", *COLUMNS[4:8], "videos")
FLIGHT_COLUMNS = (*COLUMNS[:2], "in_flight", *COLUMNS[4:8], "first_seconds", *COLUMNS[8:])
# share of the teacher's quality that the student is to keep, and how much a long video may lose
KEPT, DRIFT = 0.98, 0.03


class Shown(NamedTuple):
    """A line of the picture."""

    key: str


def write(
    folder: Path,
    rows: Sequence[Row],
    parts: Sequence[Part],
    videos: Found,
    missing: Sequence[str],
    about: str,
) -> list[Path]:
    """Write the tables, the plots and the frames side by side; return their paths.

    `rows` whose line has several blocks in flight go into a table of their own.

    Raises ImportError where matplotlib is missing, before anything is written.
    """
    student = next((row for row in rows if row.line.run == "student"), None)
    flights = [row for row in rows if row is student or row.line.in_flight > 1]
    rows = [row for row in rows if row.line.in_flight == 1]
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
        f"{NAME}_flight": [FLIGHT_COLUMNS, *map(_flight_cells, flights)],
    }
    text = _table(rows, parts, claims(rows, parts, videos), missing, about)
    text += "\n".join(_flights(flights, videos))
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


def _flight_cells(row: Row) -> tuple[str, ...]:
    model, steps, *_ = _told(row.line)
    *cells, seconds, videos = _cells(row)[4:]
    first = f"{row.first_seconds:.4f}"
    return model, steps, str(row.line.in_flight), *cells, first, seconds, videos


def _flights(rows: Sequence[Row], videos: Found) -> list[str]:
    """Return the table of blocks side by side, the first row being one after the other."""
    text = [
        "\n## Blocks side by side\n",
        "With two in flight a block's first step runs in the last forward of the block before, "
        "which makes the very K/V that it attends to: the same video, to rounding. With three it "
        "attends to a block that is not done. Differences are paired, with 95% intervals.\n",
        "| in flight | quality | less quality | motion | first frames | s/video | less time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lost, saved = (
            difference(videos, rows[0].line, row.line, row.videos, name)
            for name in ("value", "seconds")
        )
        lost = "{:+.4f} ({:+.4f} to {:+.4f})".format(*lost)
        saved = "{:+.1%} ({:+.1%} to {:+.1%})".format(*(part / rows[0].seconds for part in saved))
        quality, motion = row.quality.quality, row.motion.quality
        text.append(
            f"| {row.line.in_flight} | {quality:.4f} | {lost} | {motion:.4f} "
            f"| {row.first_seconds:.4f} s | {row.seconds:.4f} | {saved} |"
        )
    return [*text, ""]


def claims(rows: Sequence[Row], parts: Sequence[Part], videos: Found) -> list[str]:
    """Return a line for each target, as far as the table has what it is about."""
    count = rows[0].videos
    named = {
        row.line.run: row for row in rows if row.line.run != "teacher" and row.line.in_flight == 1
    }
    student = named["student"]
    text = []
    for teacher in (row for row in rows if row.line.schedule.clean_pass):
        if teacher.line.run == "teacher":
            _, kept = grades(videos, (teacher.line, student.line), count)
            _, moved = grades(motions(videos), (teacher.line, student.line), count)
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
    if "flat-forced" in named:
        verdict, by = worth("flat-forced")
        text.append(f"- More steps early help: {verdict}; quality {by}")
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
