"""Diagonal decoding of the embedded token model: passes, time and quality against raster order.

`collect`, `grades` and `save` serve any table of ways to decode it (`sdvg.vvs_sweep`).

Every line makes the video of the same prompt from the same keyed noise, a token's noise being keyed
by its place, one after another, so that a slow minute of the machine meets them all. Seconds are
wall clock of one video alone, prompt and decoding to pixels included. Intervals are 95% percentile
bootstraps over prompts, with the same resamples for all lines.
"""

from __future__ import annotations

import csv
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from sdvg.store import fill
from sdvg.sweep import Judged, prompts, resamples
from sdvg.tokens.embedded import JACOBI, Shown
from sdvg.video import pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "mode", "k", "tuned", "passes", "tokens_per_second", "seconds",
    "quality", "quality_low", "quality_high", "videos",
)  # fmt: skip
WIDTHS = (1, 2, 4, 8)
QUICK = (1, 4)
# of Jacobi decoding
WINDOWS = (16, 64, 256)
# the first prompts, whose frames are kept for the picture
PICTURED = 3


class Line(NamedTuple):
    """One line of the table; `k` is the width for raster order, the window for "scd" and "sjd"."""

    mode: str
    k: int
    tuned: bool = False

    @property
    def key(self) -> str:
        """The line's name in the file of videos."""
        return f"{self.mode} {self.k}{' tuned' if self.tuned else ''}"


class Named(Protocol):
    """A line of a table, whichever."""

    @property
    def key(self) -> str:
        """The line's name in the file of videos."""
        ...


AnyLine = TypeVar("AnyLine", bound=Named)
# (prompt's number, line's key) -> what was found of a video
Found = Mapping[tuple[int, str], Mapping[str, float]]


class Grade(NamedTuple):
    """The mean quality of a line's videos, and how much it `kept` of the first line's."""

    quality: float
    quality_low: float
    quality_high: float
    kept: float
    kept_low: float
    kept_high: float


class Row(NamedTuple):
    """One line of diagonal.csv; means per video."""

    line: Line
    passes: int
    tokens_per_second: float
    seconds: float
    grade: Grade
    videos: int


class Videos(Protocol):
    """What makes the videos of a line (`sdvg.tokens.embedded.EmbeddedVideos`)."""

    def generate(
        self, prompts: Sequence[str], *, frames: int, seed: int, sequences: Sequence[int]
    ) -> Sequence[Shown]:
        """Yield the frames of a video for each prompt."""
        ...


def lines(
    modes: Sequence[str], widths: Sequence[int], tuned: Sequence[bool], width: int
) -> list[Line]:
    """Return the table's lines: raster order of the stock model, then each mode, k and weights.

    "scd" and "sjd" have windows of their own, and lose nothing that weights could be tuned for.
    """
    made = [Line("raster", width)]
    made += [Line(mode, window) for mode in modes if mode in JACOBI for window in WINDOWS]
    orders = [mode for mode in modes if mode not in JACOBI]
    return made + [Line(mode, k, how) for how in tuned for mode in orders for k in widths]


def sweep(
    videos: Callable[[Line], Videos],
    judge: Callable[[Tensor, str], Judged],
    folder: Path,
    *,
    lines: Sequence[Line],
    count: int,
    frames: int,
    tokens: int,
    seed: int,
    settings: Mapping[str, object],
) -> list[Row]:
    """Return the table of diagonal decoding: arguments and errors as `collect` has them.

    Args:
        tokens: of a frame.
    """
    done = collect(
        videos, judge, folder / "diagonal.jsonl", lines=lines, count=count, frames=frames,
        seed=seed, settings=settings,
    )  # fmt: skip
    return summarise(done, lines, count, frames * tokens)


def collect(
    videos: Callable[[AnyLine], Videos],
    judge: Callable[[Tensor, str], Judged],
    store: Path,
    *,
    lines: Sequence[AnyLine],
    count: int,
    frames: int,
    seed: int,
    settings: Mapping[str, object],
) -> dict[tuple[int, str], dict[str, float]]:
    """Make every video that `store` does not hold yet, and return what was found of all.

    Args:
        videos: gives what makes a line's videos, once for each line.
        store: its folder is made where it is not there, once all else is known to be right.
        settings: all that decides a result beside the line and the prompt: a store begun with
            others is refused.

    Raises ValueError for fewer than one prompt or frame, a line twice, or a folder that cannot be
    made or has other settings.
    """
    for name, value in (("prompts", count), ("frames", frames)):
        if value < 1:
            raise ValueError(f"sweep: {name} must be at least 1, got {value}")
    named = {line.key: line for line in lines}
    if len(named) < len(lines):
        raise ValueError(f"sweep: lines must differ, got {[line.key for line in lines]}")
    folder = store.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: {folder} cannot be made: {error.strerror.lower()}") from error
    texts, makers = prompts(count), {}

    def make(n: int, key: str, length: int = frames) -> dict[str, object]:
        maker = makers[key] if key in makers else makers.setdefault(key, videos(named[key]))
        began = time.perf_counter()
        shown = list(maker.generate([texts[n]], frames=length, seed=seed, sequences=[n]))
        seconds = time.perf_counter() - began
        video = torch.cat([frame.frames for frame in shown])
        if n < PICTURED and length == frames:
            keep_frames(folder, n, key, video)
        judged = judge(video, texts[n])
        judged = judged._asdict() if hasattr(judged, "_asdict") else {"value": judged.value}
        return {
            "prompt": n,
            "method": key,
            "seconds": round(seconds, 5),
            "passes": shown[-1].passes,
            **{name: round(float(number), 5) for name, number in judged.items()},
            **_stages(shown[-1]),
            # whether two lines made the same video
            "pixels": crc32(pixels(video).tobytes()),
        }

    def warm_up(n: int) -> None:
        # every line has widths of its own, and may have weights
        for key in named:
            make(n, key, 1)

    settings = {**settings, "frames": frames, "seed": seed}
    return fill(store, settings, list(named), count, make, warm_up)


def _stages(last: Shown) -> dict[str, float]:
    """Return what a speculative video says of its stages, in seconds; nothing of others."""
    if last.counts is None:
        return {}
    return {
        "drafts": last.counts.drafts,
        "skipped": last.counts.skipped,
        **{name: round(seconds, 5) for name, seconds in (last.stages or {}).items()},
    }


def summarise(videos: Found, lines: Sequence[Line], count: int, tokens: int) -> list[Row]:
    """Return one row for each of `lines`, the first being what the others are held to."""
    rows = []
    for line, grade in zip(lines, grades(videos, lines, count), strict=True):
        mine = [videos[n, line.key] for n in range(count)]
        seconds = float(np.mean([video["seconds"] for video in mine]))
        passes = round(float(np.mean([video["passes"] for video in mine])))
        rows.append(Row(line, passes, tokens / seconds, seconds, grade, count))
    return rows


def grades(videos: Found, lines: Sequence[Named], count: int) -> list[Grade]:
    """Return the quality of each of `lines` with 95% intervals over prompts, and what it kept."""
    quality = np.array([[videos[n, line.key]["value"] for n in range(count)] for line in lines])
    drawn = resamples(count)
    whole = quality[0][drawn].mean(1)
    made = []
    for values in quality:
        means = values[drawn].mean(1)
        # the first line's own quality may be 0 in a resample of few videos
        with np.errstate(divide="ignore", invalid="ignore"):
            kept, ratios = values.mean() / quality[0].mean(), means / whole
        made.append(
            Grade(
                float(values.mean()),
                *map(float, np.percentile(means, (2.5, 97.5))),
                float(kept),
                *map(float, np.percentile(ratios, (2.5, 97.5))),
            )
        )
    return made


def write(folder: Path, rows: Sequence[Row], about: str) -> list[Path]:
    """Write diagonal.csv, diagonal.md, the plot and the frames side by side; return their paths.

    Raises ImportError where matplotlib is missing, before anything is written.
    """
    figure, lines = plot(rows), [row.line for row in rows]
    cells = [COLUMNS, *map(_cells, rows)]
    return save(folder, "diagonal", cells, _table(rows, about), figure, lines, PICTURED)


def save(
    folder: Path,
    name: str,
    cells: Sequence[Sequence[str]],
    table: str,
    figure: Figure,
    lines: Sequence[Named],
    count: int,
) -> list[Path]:
    """Write NAME.csv, NAME.md, the plot and a picture; return their paths.

    The picture has the frames of each line for the first `count` prompts, `PICTURED` at most.
    """
    figures = {name: figure}
    strips = pictured(folder, lines, count)
    if strips is not None:
        figures[f"{name}-frames"] = strips
    return write_files(folder, {name: cells}, {name: table}, figures)


def write_files(
    folder: Path,
    tables: Mapping[str, Sequence[Sequence[str]]],
    texts: Mapping[str, str],
    figures: Mapping[str, Figure],
) -> list[Path]:
    """Write each of `tables` as NAME.csv, of `texts` as NAME.md, of `figures` as NAME.png and .svg.

    All of them appear at once, or none does. Frames (a name that ends in `-frames`) are a .png
    alone. Returns the paths.
    """
    named = [*(f"{name}.csv" for name in tables), *(f"{name}.md" for name in texts)]
    partial = {file: folder / f"{file}.partial" for file in named}
    for name, cells in tables.items():
        with partial[f"{name}.csv"].open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(cells)
    for name, text in texts.items():
        partial[f"{name}.md"].write_text(text, encoding="utf-8")
    kinds = {"png": {"dpi": 150}, "svg": {"metadata": {"Date": None}}}
    for stem, made in figures.items():
        # frames are pixels: drawn as curves they are no sharper, and larger
        for kind in ("png",) if stem.endswith("-frames") else kinds:
            partial[f"{stem}.{kind}"] = folder / f"{stem}.{kind}.partial"
            made.savefig(partial[f"{stem}.{kind}"], format=kind, **kinds[kind])
    for file, path in partial.items():
        os.replace(path, folder / file)
    return [folder / file for file in partial]


def plot(rows: Sequence[Row]) -> Figure:
    """Return quality against passes with 95% intervals; ImportError without matplotlib."""
    figure = new_figure((8, 5))
    axes = figure.add_subplot()
    colours = {
        "raster": "#1c1c1c", "spatial": "#2e9e44", "spatiotemporal": "#2f6fb7",
        "zipar": "#d3782c", "scd": "#8c3fb7", "sjd": "#b73f6b",
    }  # fmt: skip
    for mode, tuned in dict.fromkeys((row.line.mode, row.line.tuned) for row in rows):
        mine = [row for row in rows if (row.line.mode, row.line.tuned) == (mode, tuned)]
        mine.sort(key=lambda row: row.passes)
        each = [row.grade for row in mine]
        axes.errorbar(
            [row.passes for row in mine], [grade.quality for grade in each], yerr=error_bars(each),
            label=f"{mode}{', fine-tuned' if tuned else ''}", color=colours.get(mode, "#a8a8a8"),
            marker="*" if mode == "raster" else "s" if tuned else "o",
            markersize=11 if mode == "raster" else 5, linestyle="--" if tuned else "-",
            linewidth=1.2, elinewidth=0.7, capsize=2,
        )  # fmt: skip
        for row in mine if mode != "raster" else ():
            axes.annotate(
                f"k={row.line.k}", (row.passes, row.grade.quality), xytext=(4, 5),
                textcoords="offset points", fontsize=7, color=colours.get(mode, "#a8a8a8"),
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("passes of the model per video")
    axes.set_ylabel("quality (judge, 0 to 1)")
    axes.set_title(f"Quality against passes, {rows[0].videos} prompts, 95% confidence", fontsize=11)
    axes.grid(alpha=0.25)
    # the curves leave no corner free
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    return figure


def require_plots() -> type[Figure]:
    """Return matplotlib's figure; ImportError, in one sentence, where that is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("sweep: the plot needs matplotlib: pip install 'sdvg[plots]'") from error
    return Figure


def error_bars(each: Sequence[Grade]) -> list[list[float]]:
    """Return how far the intervals reach below and above the means, as matplotlib takes it."""
    below = [grade.quality - grade.quality_low for grade in each]
    return [below, [grade.quality_high - grade.quality for grade in each]]


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of `size` inches; ImportError without matplotlib."""
    return require_plots()(figsize=size, layout="constrained")


def keep_frames(folder: Path, n: int, key: str, video: Tensor) -> None:
    """Keep a video's frames `[N, 3, H, W]` for the picture (`pictured`)."""
    (folder / "frames").mkdir(exist_ok=True)
    np.save(_kept(folder, n, key), pixels(video))


def _kept(folder: Path, n: int, key: str) -> Path:
    return folder / "frames" / f"{n}-{re.sub('[ /]', '-', key)}.npy"


def pictured(folder: Path, lines: Sequence[Named], count: int) -> Figure | None:
    """Return frames of the first prompts, a line below the other; None where none are kept."""
    texts = prompts(count)
    strips = [
        (line.key, n, np.concatenate(list(np.load(_kept(folder, n, line.key))), 1))
        for n in range(count)
        for line in lines
        if _kept(folder, n, line.key).is_file()
    ]
    if not strips:
        return None
    figure = new_figure((8, 0.55 * len(strips) + 0.5))
    grid = figure.subplots(len(strips), 1, squeeze=False)
    for axes, (key, n, strip) in zip(grid[:, 0], strips, strict=True):
        axes.imshow(strip, interpolation="nearest", aspect="equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(key, rotation=0, ha="right", va="center", fontsize=7)
        if key == lines[0].key:
            axes.set_title(texts[n], fontsize=8)
    return figure


def _cells(row: Row) -> tuple[str, ...]:
    """Return a row's text, column by column."""
    return (
        row.line.mode,
        str(row.line.k),
        str(row.line.tuned).lower(),
        str(row.passes),
        f"{row.tokens_per_second:.1f}",
        f"{row.seconds:.4f}",
        *(f"{number:.4f}" for number in row.grade[:3]),
        str(row.videos),
    )


def _table(rows: Sequence[Row], about: str) -> str:
    text = [
        "# Passes, time and quality of diagonal decoding\n",
        f"{about}\n",
        "Quality is the judge's, with a 95% interval; `kept` is the share of raster order's.\n",
        "| mode | k | tuned | passes | fewer | tokens/s | s/video | quality | 95% | kept | 95% |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mode, k, tuned, passes, speed, seconds, quality, low, high, _ = _cells(row)
        grade = row.grade
        text.append(
            f"| {mode} | {k} | {tuned} | {passes} | {rows[0].passes / row.passes:.1f}x | {speed} "
            f"| {seconds} | {quality} | {low} to {high} | {grade.kept:.1%} "
            f"| {grade.kept_low:.1%} to {grade.kept_high:.1%} |"
        )
    text.append("")
    for tuned, share in ((False, 0.95), (True, 0.98)):
        fast = [row for row in rows if row.line.tuned == tuned and rows[0].passes >= 8 * row.passes]
        best = max(fast, key=lambda row: row.grade.quality, default=None)
        if best is not None:
            text.append(
                f"- 8x fewer passes, {'fine-tuned' if tuned else 'training-free'}: "
                f"{best.line.key} keeps {best.grade.kept:.1%} of raster's quality "
                f"(target {share:.0%}: {'yes' if best.grade.kept >= share else 'no'})"
            )
    return "\n".join(text) + "\n"
