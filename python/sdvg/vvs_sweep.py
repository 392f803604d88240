"""Speculative decoding of the embedded token model: tokens per pass of the target, and quality.

Exact verification (EAGLE-2), relaxed (LANTERN, LANTERN++), Jacobi decoding without a drafter, and
verification skipping (VVS), against raster order. Videos, seconds and intervals are as
`sdvg.token_sweep` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sdvg.sweep import resamples
from sdvg.token_sweep import Found, Grade, error_bars, grades, new_figure, save
from sdvg.tokens import Dynamic, Exact, Relaxed, Uniform
from sdvg.tokens.embedded import JACOBI, SPECULATIVE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

COLUMNS = (
    "method", "setting", "tokens_per_pass", "target_passes", "seconds", "speedup",
    "quality", "quality_low", "quality_high", "images",
)  # fmt: skip
# tokens per pass of the target that the paper claims
CLAIMED = 2.8
WIDE = {"depth": 5, "top_k": 10, "nodes": 59}


class Line(NamedTuple):
    """One line of the table: a method, and what it is set to where it has that."""

    method: str
    delta: float | None = None
    ratio: float | None = None
    interval: int | None = None
    threshold: float | None = None
    window: int | None = None
    # EAGLE-2's tree for LlamaGen instead of this model's own
    wide: bool = False
    # the drafter's first choices are skipped to instead of a random path
    likely: bool = False

    @property
    def setting(self) -> str:
        """What the method is set to, as in `interval=2 delta=0.1`."""
        names = ("window", "interval", "threshold", "delta", "ratio")
        given = ((name, getattr(self, name)) for name in names)
        text = [f"{name}={value:g}" for name, value in given if value is not None]
        return " ".join(text + ["tree=wide"] * self.wide + ["path=likely"] * self.likely)

    @property
    def key(self) -> str:
        """The line's name in the file of videos."""
        return f"{self.method} {self.setting}".strip()

    def options(self, near: Tensor) -> dict[str, object]:
        """Return what `EmbeddedVideos` takes for it; `near` is the table of neighbours."""
        if self.method == "ar":
            return {"mode": "raster"}
        if self.method in JACOBI:
            return {"mode": self.method, "k": self.window}
        verification = Exact()
        if self.delta is not None or self.ratio is not None:
            verification = Relaxed(near, self.delta, self.ratio)
        skip = None
        if self.interval is not None:
            skip = Uniform(self.interval, likely=self.likely)
        elif self.threshold is not None:
            skip = Dynamic(self.threshold, likely=self.likely)
        how = {"mode": SPECULATIVE, "verification": verification, "skip": skip}
        return how | (WIDE if self.wide else {})


LINES = (
    Line("ar"),
    Line("eagle2"),
    Line("eagle2", wide=True),
    *(Line("lantern", delta=delta) for delta in (0.1, 0.2, 0.3)),
    *(Line("lantern++", ratio=ratio) for ratio in (1.5, 3.0)),
    Line("sjd", window=16),
    Line("scd", window=16),
    Line("vvs-uniform", interval=2, delta=0.1),
    Line("vvs-uniform", interval=2, delta=0.2),
    Line("vvs-uniform", interval=3, delta=0.1),
    *(Line("vvs-dynamic", threshold=threshold, delta=0.1) for threshold in (0.65, 0.8)),
    Line("vvs-dynamic", threshold=0.8, delta=0.1, wide=True),
    # LANTERN's fastest settings, with skipping; 0.85 and 0.9 were chosen on three of the prompts
    Line("vvs-dynamic", threshold=0.8, delta=0.3),
    *(Line("vvs-dynamic", threshold=threshold, ratio=3.0) for threshold in (0.8, 0.85, 0.9)),
    # ... to the drafter's first choices, the selector by confidence of the paper's ablation
    *(Line("vvs-uniform", interval=interval, likely=True) for interval in (2, 3)),
    Line("vvs-dynamic", threshold=0.8, likely=True),
    *(
        Line("vvs-dynamic", threshold=threshold, ratio=3.0, likely=True)
        for threshold in (0.75, 0.8)
    ),
)
METHODS = tuple(dict.fromkeys(line.method for line in LINES))


class Shares(NamedTuple):
    """Where the seconds of a line's videos go, as shares of one."""

    draft: float
    target: float
    rest: float


class Row(NamedTuple):
    """One line of vvs.csv; means per video."""

    line: Line
    tokens_per_pass: float
    target_passes: float
    seconds: float
    speedup: float
    grade: Grade
    images: int
    # of its steps, how many were not verified
    skipped: float
    # None for what has no stages
    shares: Shares | None
    # how many videos are raster order's, pixel for pixel
    same: int
    # of the target, video by video
    each: tuple[int, ...]


def chosen(methods: Sequence[str]) -> list[Line]:
    """Return the lines of some methods; raster order is always one."""
    return [line for line in LINES if line.method in ("ar", *methods)]


def summarise(videos: Found, lines: Sequence[Line], count: int, tokens: int) -> list[Row]:
    """Return one row for each of `lines`, the first being what the others are held to.

    Args:
        videos: as `sdvg.token_sweep.collect` gives them.
        tokens: of a video.
    """
    first = [videos[n, lines[0].key] for n in range(count)]
    rows = []
    for line, grade in zip(lines, grades(videos, lines, count), strict=True):
        mine = [videos[n, line.key] for n in range(count)]
        seconds = sum(video["seconds"] for video in mine)
        passes = sum(video["passes"] for video in mine)
        shares, skipped = None, 0.0
        if "drafts" in mine[0]:
            draft, target = (sum(video[stage] for video in mine) for stage in ("draft", "target"))
            shares = Shares(draft / seconds, target / seconds, (seconds - draft - target) / seconds)
            skipped = sum(video["skipped"] for video in mine) / sum(v["drafts"] for v in mine)
        rows.append(
            Row(
                line,
                count * tokens / passes,
                passes / count,
                seconds / count,
                sum(video["seconds"] for video in first) / seconds,
                grade,
                count,
                skipped,
                shares,
                sum(a["pixels"] == b["pixels"] for a, b in zip(first, mine, strict=True)),
                tuple(int(video["passes"]) for video in mine),
            )
        )
    return rows


def write(folder: Path, rows: Sequence[Row], about: str) -> list[Path]:
    """Write vvs.csv, vvs.md, the plot and the frames side by side; return their paths.

    Raises ImportError where matplotlib is missing, before anything is written.
    """
    figure, lines = plot(rows), [row.line for row in rows]
    cells = [COLUMNS, *map(_cells, rows)]
    return save(folder, "vvs", cells, _table(rows, about), figure, lines, 1)


def plot(rows: Sequence[Row]) -> Figure:
    """Return quality against tokens per pass with 95% intervals; ImportError sans matplotlib."""
    figure = new_figure((8, 5))
    axes = figure.add_subplot()
    colours = {
        "ar": "#1c1c1c", "eagle2": "#2e9e44", "lantern": "#2f6fb7", "lantern++": "#37a6b5",
        "sjd": "#b73f6b", "scd": "#8c3fb7", "vvs-uniform": "#d3782c", "vvs-dynamic": "#c23b22",
    }  # fmt: skip
    whole = rows[0].grade
    axes.axhspan(whole.quality_low, whole.quality_high, color="#1c1c1c", alpha=0.06, linewidth=0)
    for method in dict.fromkeys(row.line.method for row in rows):
        mine = sorted((row for row in rows if row.line.method == method), key=_speed)
        each = [row.grade for row in mine]
        axes.errorbar(
            list(map(_speed, mine)), [grade.quality for grade in each], yerr=error_bars(each),
            label=method, color=colours.get(method, "#a8a8a8"),
            marker="*" if method == "ar" else "s" if method.startswith("vvs") else "o",
            # settings of skipping are of several kinds: no curve leads through them
            linestyle="none" if method.startswith("vvs") else "-",
            markersize=11 if method == "ar" else 5, linewidth=1.2, elinewidth=0.7, capsize=2,
        )  # fmt: skip
        # the others lie too near to each other to be named
        for row in mine if method.startswith("vvs") else ():
            axes.annotate(
                row.line.setting, (row.tokens_per_pass, row.grade.quality), xytext=(4, 5),
                textcoords="offset points", fontsize=6, color=colours.get(method, "#a8a8a8"),
            )  # fmt: skip
    axes.axvline(CLAIMED, color="#808080", linestyle=":", linewidth=1)
    axes.set_xlabel("tokens per pass of the target")
    axes.set_ylabel("quality (judge, 0 to 1)")
    axes.set_title(
        f"Quality against tokens per pass, {rows[0].images} prompts, 95% confidence", fontsize=11
    )
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    return figure


def _speed(row: Row) -> float:
    return row.tokens_per_pass


def _cells(row: Row) -> tuple[str, ...]:
    """Return a row's text, column by column."""
    return (
        row.line.method,
        row.line.setting,
        f"{row.tokens_per_pass:.3f}",
        f"{row.target_passes:.1f}",
        f"{row.seconds:.4f}",
        f"{row.speedup:.3f}",
        *(f"{number:.4f}" for number in row.grade[:3]),
        str(row.images),
    )


def _table(rows: Sequence[Row], about: str) -> str:
    text = [
        "# Tokens per pass, time and quality of speculative decoding\n",
        f"{about}\n",
        "Quality is the judge's, with a 95% interval; `kept` is the share of raster order's (ar). "
        "Shares are of a video's seconds: drafting with its trees; the target with verification "
        "and compaction; the rest, which is the prompt and decoding to pixels. `same`: how many "
        "videos are ar's, pixel for pixel. `tree=wide` is EAGLE-2's for LlamaGen, not the one "
        f"above: {WIDE}; `path=likely` skips by the drafter's first choices.\n",
        "| method | setting | tokens/pass | passes | s/video | speed-up | draft | target | rest "
        "| skipped | quality | 95% | kept | 95% | same |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        method, setting, speed, passes, seconds, gain, quality, low, high, count = _cells(row)
        shares, grade = row.shares, row.grade
        parts = ["", "", "", ""]
        if shares is not None:
            parts = [f"{share:.0%}" for share in (*shares, row.skipped)]
        text.append(
            f"| {method} | {setting} | {speed} | {passes} | {seconds} | {gain}x "
            f"| {' | '.join(parts)} | {quality} | {low} to {high} | {grade.kept:.1%} "
            f"| {grade.kept_low:.1%} to {grade.kept_high:.1%} | {row.same} of {count} |"
        )
    return "\n".join([*text, "", *_targets(rows)]) + "\n"


def _targets(rows: Sequence[Row]) -> list[str]:
    """Return a line for each target, as far as the table has what it is about."""
    low = rows[0].grade.quality_low
    # as good as raster order: not below its interval
    good = [row for row in rows if row.grade.quality >= low]
    skipping, relaxed = (
        max((row for row in good if row.line.method.startswith(name)), key=_speed, default=None)
        for name in ("vvs", "lantern")
    )
    named = {row.line.method for row in rows}
    text = []
    if named & {"vvs-uniform", "vvs-dynamic"}:
        said = f"none reaches its interval, which begins at {low:.4f}: no"
        if skipping is not None:
            reached = "yes" if skipping.tokens_per_pass >= CLAIMED else "no"
            said = f"{skipping.line.key} makes {skipping.tokens_per_pass:.2f}: {reached}"
        text.append(
            f"- VVS, {CLAIMED} tokens per pass at a quality not below ar's interval: {said}"
        )
        if named & {"lantern", "lantern++"}:
            said = "no VVS to compare"
            if skipping is not None:
                said = "no LANTERN as good: yes"
                if relaxed is not None:
                    above = "yes" if skipping.tokens_per_pass > relaxed.tokens_per_pass else "no"
                    said = (
                        f"{relaxed.line.key} makes {relaxed.tokens_per_pass:.2f}: {above}, "
                        f"{_faster(skipping, relaxed)} of its"
                    )
            text.append(
                f"- VVS above LANTERN, the fastest of each not below ar's interval: {said}; the "
                "thresholds 0.85 and 0.9 were chosen on three of these prompts"
            )
    for row in rows:
        if row.line.method == "eagle2":
            text.append(
                f"- {row.line.key} is exact and coupled to ar's noise: {row.same} of {row.images} "
                "videos are ar's"
            )
    return text


def _faster(row: Row, other: Row) -> str:
    """Return the ratio of two lines' tokens per pass, with its 95% interval over prompts."""
    drawn = resamples(row.images)
    mine, its = (np.array(line.each)[drawn].sum(1) for line in (row, other))
    low, high = np.percentile(its / mine, (2.5, 97.5))
    return f"{sum(other.each) / sum(row.each):.1%} (95%: {low:.1%} to {high:.1%})"
