"""The paper's Table 1 on a pair of models: quality against speed for each way to route.

Source: SDVG (arXiv 2604.17397), section 4. Every method makes the video of the same prompt from the
same noise, one after another, so that a slow minute of the machine meets them all; seconds are wall
clock of one video alone, text encoding included. Confidence intervals are 95% percentile bootstraps
over prompts, with the same resamples for all methods.
"""

from __future__ import annotations

import csv
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sdvg import store
from sdvg.engine import SDVG
from sdvg.router import Random, Reward
from sdvg.types import CausalModel, Decoder, Router, Scorer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "method", "tau", "quality", "quality_low", "quality_high",
    "seconds", "speedup", "acceptance", "videos",
)  # fmt: skip
# the paper's thresholds: worst frame, then mean frame
THRESHOLDS = (-0.7, -0.8, -0.9, -1.0, -1.5, -2.0, -2.5)
MEAN_THRESHOLDS = (-0.2, -0.5, -0.7)
PROBABILITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
QUICK = ((-0.7, -1.5, -2.5), (-0.5,), (0.7,))
RESAMPLES = 2000
# the paper's own points: share of target-only quality kept, speed-up
PAPER_POINTS = ((0.981, 1.59), (0.957, 2.09))
PAPER_DRAFT = 0.86
# what a diagonally distilled drafter is to make of the paper's second point
DISTILLED_POINT = (0.957, 2.6)

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIRECTIONS = ("left", "down right", "up", "down left", "right", "up left", "down", "up right")
_SPEEDS = ("slowly", "quickly")


class Pair(Protocol):
    """The models that a sweep drives (`sdvg.models.embedded.EmbeddedPair` is one)."""

    drafter: CausalModel
    target: CausalModel
    decoder: Decoder
    scorer: Scorer


class Judged(Protocol):
    """What the judge says of one video: `value` in [0, 1], higher is better."""

    value: float


Judge = Callable[[Tensor, str], Judged]


class Method(NamedTuple):
    """One line of the table. `tau`: the threshold; for random routing the probability to keep."""

    name: str
    tau: float | None
    router: Router | None = None
    force_first: bool = True

    @property
    def key(self) -> str:
        """The method's name in the file of videos."""
        return self.name if self.tau is None else f"{self.name} {self.tau:g}"


class Row(NamedTuple):
    """One line of sweep.csv, and the interval of the speed-up for the plot."""

    method: str
    tau: float | None
    quality: float
    quality_low: float
    quality_high: float
    # mean per video
    seconds: float
    speedup: float
    # accepted / decided by the router; None: there was nothing to decide
    acceptance: float | None
    videos: int
    speedup_low: float
    speedup_high: float


def methods(
    thresholds: Sequence[float] = THRESHOLDS,
    mean_thresholds: Sequence[float] = MEAN_THRESHOLDS,
    probabilities: Sequence[float] = PROBABILITIES,
) -> list[Method]:
    """Return the table's lines, target-only and draft-only first."""
    return [
        Method("target", None),
        Method("draft", None),
        *(Method("reward", tau, Reward(tau)) for tau in thresholds),
        *(Method("reward-mean", tau, Reward(tau, "mean")) for tau in mean_thresholds),
        *(Method("random", share, Random(share)) for share in probabilities),
        *(Method("random-free-first", share, Random(share), False) for share in probabilities),
    ]


def prompts(count: int) -> list[str]:
    """Return `count` prompts, balanced over digit, direction and speed; all different up to 160.

    A longer list begins with the shorter ones.
    """
    texts = []
    for n in range(count):
        digit, speed = _DIGITS[n % 10], _SPEEDS[(n // 10 + n // 80) % 2]
        # steps of 10 and of 8 meet every 40th prompt: the shift brings the other pairs
        direction = _DIRECTIONS[(n + n % 80 // 40) % 8]
        texts.append(f"a {digit} moving {direction}, {speed}")
    return texts


def sweep(
    pair: Pair,
    judge: Judge,
    folder: Path,
    *,
    lines: Sequence[Method],
    count: int = 100,
    blocks: int = 9,
    seed: int = 0,
    settings: Mapping[str, object],
    **options: object,
) -> list[Row]:
    """Make every video that `folder/videos.jsonl` does not hold yet, and return the table.

    `settings` is all that decides a result beside the method and the prompt: a folder begun
    with other settings is refused. `options` go to `SDVG` (schedule, commit, drafter_cache).

    Raises ValueError for fewer than one prompt, or a folder with other settings.
    """
    if count < 1:
        raise ValueError(f"sweep: prompts must be at least 1, got {count}")
    texts = prompts(count)
    named = {line.key: line for line in lines}

    def make(n: int, key: str, length: int = blocks) -> dict[str, object]:
        return _video(pair, judge, named[key], texts[n], n, length, seed, options)

    def warm_up(n: int) -> None:
        for key in list(named)[:3]:
            make(n, key, min(2, blocks))

    settings = dict(settings) | {"blocks": blocks, "seed": seed}
    done = store.fill(folder / "videos.jsonl", settings, list(named), count, make, warm_up)
    return summarise(done, lines, count)


def summarise(
    videos: Mapping[tuple[int, str], Mapping[str, float]], lines: Sequence[Method], count: int
) -> list[Row]:
    """Return one row for each of `lines` from the videos of prompts 0 to `count` - 1."""
    quality, seconds = _matrices(videos, lines, count)
    drawn = resamples(count)
    target = next(i for i, line in enumerate(lines) if line.name == "target")
    rows = []
    for i, line in enumerate(lines):
        mine = [videos[n, line.key] for n in range(count)]
        decided = sum(video["decided"] for video in mine)
        low, high = np.percentile(quality[i][drawn].mean(1), (2.5, 97.5))
        ratios = seconds[target][drawn].mean(1) / seconds[i][drawn].mean(1)
        rows.append(
            Row(
                line.name,
                line.tau,
                quality[i].mean(),
                low,
                high,
                seconds[i].mean(),
                seconds[target].mean() / seconds[i].mean(),
                sum(video["accepted"] for video in mine) / decided if decided else None,
                count,
                *np.percentile(ratios, (2.5, 97.5)),
            )
        )
    return rows


def gains(
    videos: Mapping[tuple[int, str], Mapping[str, float]], lines: Sequence[Method], count: int
) -> list[tuple[float, float, float, float]]:
    """Return (tau, gain, low, high) for each `reward` line, against random routing as fast.

    The gain is in quality; random routing has its first block forced and is interpolated linearly
    between its lines (outside them: the nearest).
    """
    quality, seconds = _matrices(videos, lines, count)
    drawn = resamples(count)
    speed = 1 / seconds.mean(1)
    chance = [i for i, line in enumerate(lines) if line.name == "random"]
    chance.sort(key=lambda i: speed[i])
    found = []
    for i, line in enumerate(lines):
        if line.name != "reward" or not chance:
            continue
        # weights of the two random lines on either side: the same combination in every resample
        unit = np.eye(len(chance))
        weights = [np.interp(speed[i], speed[chance], row) for row in unit]
        difference = quality[i] - np.tensordot(weights, quality[chance], 1)
        low, high = np.percentile(difference[drawn].mean(1), (2.5, 97.5))
        found.append((line.tau, difference.mean(), low, high))
    return found


def write(
    folder: Path,
    rows: Sequence[Row],
    lines: Sequence[Method],
    about: str,
    older: Sequence[Row] | None = None,
) -> list[Path]:
    """Write sweep.csv, table.md, pareto.png and pareto.svg into `folder`; return their paths.

    `older` is given for a diagonally distilled drafter: the rows of another drafter's sweep (or
    none), which go into the plot too, and the table says whether `DISTILLED_POINT` was reached.

    Raises ImportError where matplotlib is missing, before anything is written.
    """
    figure = plot(rows, older or ())
    videos = store.read(folder / "videos.jsonl")[1]
    partial = {name: folder / f"{name}.partial" for name in ("sweep.csv", "table.md", "pareto.png")}
    partial["pareto.svg"] = folder / "pareto.svg.partial"
    with partial["sweep.csv"].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_cells(row) for row in rows)
    table = _table(rows, gains(videos, lines, rows[0].videos), about, older)
    partial["table.md"].write_text(table, encoding="utf-8")
    figure.savefig(partial["pareto.png"], format="png", dpi=150)
    figure.savefig(partial["pareto.svg"], format="svg", metadata={"Date": None})
    for name, path in partial.items():
        os.replace(path, folder / name)
    return [folder / name for name in partial]


def read(path: Path) -> list[Row]:
    """Return the rows of a sweep.csv, their speed-ups without intervals, which it does not hold.

    Raises ValueError for a file that is none, in one sentence.
    """
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                given = [row[name] for name in COLUMNS]
                tau, accepted = (float(given[i]) if given[i] else None for i in (1, 7))
                quality, speedup = map(float, given[2:5]), float(given[6])
                seconds, videos = float(given[5]), int(given[8])
                speedups = (speedup, accepted, videos, speedup, speedup)
                rows.append(Row(given[0], tau, *quality, seconds, *speedups))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"sweep: {path} must be a sweep's sweep.csv, got {type(error).__name__}: {error}"
        ) from error
    if not any(row.method == "target" for row in rows):
        raise ValueError(f"sweep: {path} must hold a row of the target alone, got {len(rows)} rows")
    return rows


def plot(rows: Sequence[Row], older: Sequence[Row] = ()) -> Figure:
    """Return quality against speed-up with 95% intervals, `older` rows pale beside them.

    Raises ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("sweep: the plot needs matplotlib: pip install 'sdvg[plots]'") from error
    styles = {
        "target": ("target only", "#1c1c1c", "*"),
        "draft": ("draft only", "#8c6d1f", "*"),
        "reward": ("reward, worst frame", "#2e9e44", "o"),
        "reward-mean": ("reward, mean frame", "#2f6fb7", "s"),
        "random": ("random, first block forced", "#d3782c", "^"),
        "random-free-first": ("random, first block free", "#a8a8a8", "v"),
    }
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, (label, colour, marker) in styles.items():
        for front, pale in ((older, True), (rows, False)):
            mine = sorted((row for row in front if row.method == name), key=lambda row: row.speedup)
            if not mine:
                continue
            axes.errorbar(
                [row.speedup for row in mine], [row.quality for row in mine],
                xerr=[[row.speedup - row.speedup_low for row in mine],
                      [row.speedup_high - row.speedup for row in mine]],
                yerr=[[row.quality - row.quality_low for row in mine],
                      [row.quality_high - row.quality for row in mine]],
                label=None if pale else label, color=colour, marker=marker,
                markersize=11 if marker == "*" else 5, linewidth=1.2, elinewidth=0.7, capsize=2,
                alpha=0.4 if pale else 1, linestyle=":" if pale else "-",
                markerfacecolor="none" if pale else colour,
            )  # fmt: skip
            for row in mine if name == "reward" else ():
                axes.annotate(
                    f"{row.tau:g}", (row.speedup, row.quality), xytext=(4, 5),
                    textcoords="offset points", fontsize=7, color=colour,
                    alpha=0.4 if pale else 1,
                )  # fmt: skip
    axes.set_xlabel("speed-up over target only")
    axes.set_ylabel("quality (judge, 0 to 1)")
    axes.set_title(f"Quality against speed, {rows[0].videos} prompts, 95% confidence", fontsize=11)
    axes.grid(alpha=0.25)
    if not older:
        axes.legend(fontsize=8, frameon=False, loc="lower left")
        return figure
    share, speedup = DISTILLED_POINT
    whole = next(row.quality for row in rows if row.method == "target")
    axes.plot(
        speedup, share * whole, "x", color="#c23b22", markersize=9,
        label=f"{share:.1%} of target only, {speedup}x",
    )  # fmt: skip
    figure.legend(
        title="pale and dotted: the other drafter", title_fontsize=8, fontsize=8, frameon=False,
        loc="outside lower center", ncols=4,
    )  # fmt: skip
    return figure


def digest(folder: Path, *parts: str) -> str:
    """Return 12 hex digits that name the models in `folder`: weights, configs and tokenizer.

    `parts` are the folders and files inside that count; none: all.
    """
    whole = hashlib.sha256()
    files = {folder / part for part in parts if (folder / part).is_file()}
    for part in [folder / part for part in parts] or [folder]:
        files.update(*(part.rglob(f"*.{kind}") for kind in ("safetensors", "json")))
    for file in sorted(files):
        whole.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return whole.hexdigest()[:12]


def _video(
    pair: Pair,
    judge: Judge,
    line: Method,
    prompt: str,
    number: int,
    blocks: int,
    seed: int,
    options: Mapping[str, object],
) -> dict[str, object]:
    """Make one video and judge it; the noise is keyed by the prompt's number."""
    drafter = None if line.name == "target" else pair.drafter
    target = None if line.name == "draft" else pair.target
    loop = SDVG(
        drafter, target, pair.decoder, pair.scorer, line.router,
        force_first=line.force_first, **options,
    )  # fmt: skip
    began = time.perf_counter()
    made = list(loop.generate([prompt], num_blocks=blocks, seed=seed, sequences=[number]))
    seconds = time.perf_counter() - began
    routed = [block.verdicts[0].accepted for block in made if block.verdicts[0].reason == "router"]
    verdict = judge(torch.cat([block.frames[0] for block in made]), prompt)
    judged = verdict._asdict() if hasattr(verdict, "_asdict") else {"value": verdict.value}
    return {
        "prompt": number,
        "method": line.key,
        "seconds": round(seconds, 5),
        "accepted": sum(routed),
        "decided": len(routed),
        **{name: round(float(number), 5) for name, number in judged.items()},
    }


def _matrices(
    videos: Mapping[tuple[int, str], Mapping[str, float]], lines: Sequence[Method], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return quality and seconds, `[lines, prompts]`."""
    each = [[videos[n, line.key] for n in range(count)] for line in lines]
    quality = np.array([[video["value"] for video in mine] for mine in each])
    return quality, np.array([[video["seconds"] for video in mine] for mine in each])


def resamples(count: int) -> np.ndarray:
    """Return prompt numbers `[RESAMPLES, count]` drawn with replacement, always the same."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def _cells(row: Row) -> tuple[str, ...]:
    """Return a row's text, column by column; empty where there is no value."""
    return (
        row.method,
        "" if row.tau is None else f"{row.tau:g}",
        f"{row.quality:.4f}",
        f"{row.quality_low:.4f}",
        f"{row.quality_high:.4f}",
        f"{row.seconds:.4f}",
        f"{row.speedup:.3f}",
        "" if row.acceptance is None else f"{row.acceptance:.4f}",
        str(row.videos),
    )


def _point(rows: Sequence[Row], point: tuple[float, float], ways: Sequence[str]) -> str:
    """Return whether (share of quality, speed-up) was reached by one of the methods `ways`."""
    whole = next(row.quality for row in rows if row.method == "target")
    share, speedup = point
    fast = [row for row in rows if row.method in ways and row.speedup >= speedup]
    best = max(fast, key=lambda row: row.quality, default=None)
    words = f"- {share:.1%} of target-only quality at {speedup}x or more: "
    if best is None:
        return f"{words}no threshold is that fast"
    reached = best.quality / whole
    frame = " of the mean frame" if best.method == "reward-mean" else ""
    return (
        f"{words}{'yes' if reached >= share else 'no'}, tau {best.tau:g}{frame} keeps "
        f"{reached:.1%} at {best.speedup:.2f}x"
    )


def _table(
    rows: Sequence[Row],
    gained: Sequence[tuple[float, float, float, float]],
    about: str,
    older: Sequence[Row] | None = None,
) -> str:
    whole = next(row.quality for row in rows if row.method == "target")
    text = [
        "# Quality and speed of every way to route\n",
        f"{about}\n",
        "`tau` is the threshold; for random routing it is the probability to keep a draft.",
        "Acceptance leaves a forced first block out. Quality is the judge's, with a 95% interval;",
        "`kept` is the share of target-only quality.\n",
        "| method | tau | quality | 95% | kept | s/video | speed-up | 95% | acceptance |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name, tau, quality, low, high, seconds, speedup, _, _ = _cells(row)
        kept = "-" if row.acceptance is None else f"{row.acceptance:.1%}"
        text.append(
            f"| {name} | {tau or '-'} | {quality} | {low} to {high} | {row.quality / whole:.1%} "
            f"| {seconds} | {speedup} | {row.speedup_low:.3f} to {row.speedup_high:.3f} | {kept} |"
        )
    text.append("\nAgainst the paper's own points (its Table 1):\n")
    drafts = next((row for row in rows if row.method == "draft"), None)
    if drafts is not None:
        share = drafts.quality / whole
        text.append(
            f"- draft-only keeps {share:.1%} of target-only quality (at most {PAPER_DRAFT:.0%}: "
            f"{'yes' if share <= PAPER_DRAFT else 'no'})"
        )
    text += [_point(rows, point, ("reward",)) for point in PAPER_POINTS]
    if older is not None:
        ways = ("reward", "reward-mean")
        text += [
            "\nAgainst what a diagonally distilled drafter is to reach (the paper's SDVG: "
            f"{PAPER_POINTS[1][1]}x):\n",
            _point(rows, DISTILLED_POINT, ways),
        ]
        if older:
            text.append(f"{_point(older, DISTILLED_POINT, ways)} (the other drafter, `--against`)")
    if gained:
        text.append(
            "\nReward routing less random routing with a forced first block, in quality at the "
            "same speed (between the random rows, linearly):\n"
        )
        text += [
            f"- tau {tau:g}: {gain:+.4f} ({low:+.4f} to {high:+.4f})"
            for tau, gain, low, high in gained
        ]
        better = sum(low > 0 for _, _, low, _ in gained)
        worse = sum(high < 0 for _, _, _, high in gained)
        text.append(
            f"\nThe reward beats random routing at {better} of {len(gained)} thresholds and loses "
            f"at {worse}; elsewhere the interval holds zero."
        )
    return "\n".join(text) + "\n"
