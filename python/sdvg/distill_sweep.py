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
from sdvg.token_sweep import PICTURED, Found, Grade, grades, keep_frames
from sdvg.types import CausalModel, Decoder

if TYPE_CHECKING:
    from torch import Tensor

# folder of a run -> its name in the table
RUNS = {
    "student": "student",
    "no-forcing": "student",
    "no-flow": "student",
    "flat": "flat-student",
    # ... with the student's losses
    "flat-forced": "flat-student",
}
# written at the end of a run
WEIGHTS = "diffusion_pytorch_model.safetensors"
# of the teacher: many, evenly spaced before the flow shift; more gain nothing here
MANY = 16
# blocks of a long video, and of each graded part of it
LONG, PART = 30, 5
# how many blocks of the student are made side by side, beside one after the other
FLIGHTS = (2, 3)
# of the frames, in the picture
EVERY = 5


# a run has its teacher, too, in a folder inside
FILES = ("config.json", "diffusion_pytorch_model.safetensors", "distillation.json")


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
    # of the transformer; None: the shipped target
    folder: Path | None = None
    # how many of its blocks are made side by side
    in_flight: int = 1

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
        beside = f", {self.in_flight} in flight" if self.in_flight > 1 else ""
        return f"{self.run} {self.steps}{beside}"

    @property
    def key(self) -> str:
        """Its name in the file of videos."""
        return f"{self.label} {self.weights}"


class Row(NamedTuple):
    """One line of diagonal_distill.csv; `motion` is graded as `quality` is."""

    line: Line
    quality: Grade
    motion: Grade
    # until a video's first frames, and of a whole video; means
    first_seconds: float
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


Models = Callable[[Line], tuple[CausalModel, Decoder]]
Judge = Callable[..., embedded.Quality]


def lines(weights: Path, students: Path) -> tuple[list[Line], list[str]]:
    """Return the tables' lines and the runs whose weights `students` lacks.

    Args:
        weights: the embedded models' folder; its target is the teacher where the student's run
            did not keep its own.
        students: a folder of runs of `sdvg.train.diagonal_distill`, named as in `RUNS`.

    Raises ValueError where there is no student, or a folder that does not say how it was made.
    """
    found: list[Line] = []
    missing = [run for run in RUNS if not (students / run / WEIGHTS).is_file()]
    if "student" in missing:
        raise ValueError(
            f"sweep: students must hold student/{WEIGHTS}, got {students} without; "
            "python -m sdvg.train.diagonal_distill makes it"
        )
    for run in RUNS:
        if run not in missing:
            told = embedded.distilled(students / run)
            steps = Schedule(
                told.timesteps, clean_pass=told.clean_pass, clean_context=told.repair > 0
            )
            source = students / run
            found.append(Line(run, steps, digest(source, *FILES), told.forcing, told.flow, source))
    # side by side: last, as they are no models of their own
    found += [found[0]._replace(in_flight=count) for count in FLIGHTS]
    taught = students / "student" / "teacher"
    kept = taught.is_dir()
    whole = digest(taught) if kept else digest(weights, embedded.TARGETS["teacher"])
    many = Schedule((warp([1000 * (MANY - step) / MANY for step in range(MANY)]),))
    # the four that SDVG's target takes, and as few as a student's later blocks have
    few = Schedule(preset("diagonal:2").timesteps)
    steps = (many, preset("self_forcing"), few, found[0].schedule)
    teacher = Line("teacher", many, whole, folder=taught if kept else None)
    return [teacher._replace(schedule=each) for each in steps] + found, missing


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
        frames, first, seconds = makers.video(named[key], texts[n], n, length)
        video = torch.cat(frames)
        if n < PICTURED and length == blocks:
            keep_frames(folder, n, named[key].label, video[::EVERY])
        judged = judge(video, texts[n])._asdict()
        grade = {name: round(float(value), 5) for name, value in judged.items()}
        spent = {"first": round(first, 5), "seconds": round(seconds, 5)}
        return {"prompt": n, "method": key, **spent, **grade}

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
        frames, *_ = makers.video(named[key], texts[n], n, blocks)
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
    ) -> tuple[list[Tensor], float, float]:
        """Return the frames of each block, and the seconds of the first and of all.

        Noise is keyed by the number.
        """
        if line.key not in self._models:
            self._models[line.key] = self._load(line)
        target, decoder = self._models[line.key]
        loop = SDVG(None, target, decoder, schedule=line.schedule, in_flight=line.in_flight)
        began, frames, ends = time.perf_counter(), [], []
        for block in loop.generate(
            [prompt], num_blocks=blocks, seed=self._seed, sequences=[number]
        ):
            frames.append(block.frames[0])
            ends.append(time.perf_counter() - began)
        return frames, ends[0], ends[-1]


def summarise(videos: Found, lines: Sequence[Line], count: int) -> list[Row]:
    """Return one row for each of `lines`, the first being what the others are held to."""
    moved = grades(motions(videos), lines, count)
    both = zip(lines, grades(videos, lines, count), moved, strict=True)
    return [
        Row(
            line, quality, motion,
            *(
                float(np.mean([videos[n, line.key][name] for n in range(count)]))
                for name in ("first", "seconds")
            ),
            count,
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


def motions(videos: Found) -> Found:
    """Return the videos with their motion in place of their quality."""
    return {key: {"value": video["motion"]} for key, video in videos.items()}
