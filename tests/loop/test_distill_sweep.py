"""The table of Diagonal Distillation: its lines, paired intervals, what it claims, resuming."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from sdvg import distill_sweep as room
from sdvg.cli import main
from sdvg.distill_report import claims, write
from sdvg.distill_sweep import (
    Line,
    collect,
    collect_long,
    difference,
    lines,
    summarise,
    summarise_long,
)
from sdvg.models import embedded
from sdvg.models.embedded import EmbeddedPair, Quality
from sdvg.schedule import Schedule, preset
from sdvg.sweep import digest
from sdvg.types import CausalModel, Decoder
from tests.tiny import BrightnessScorer, TinyPair, tiny_pair

pytest.importorskip("matplotlib", reason="the plots are matplotlib's")

COLUMNS = "model,schedule,forcing,flow,quality,quality_low,quality_high,motion,seconds,videos"
DIAGONAL = preset("diagonal")
TEACHER = Line("teacher", Schedule(((1000.0, 500.0, 250.0),)), "t")
STUDENTS = {
    "student": Line("student", DIAGONAL, "s", True, 1.0),
    "no-forcing": Line("no-forcing", DIAGONAL, "f", False, 1.0),
    "no-flow": Line("no-flow", DIAGONAL, "m", True, 0.0),
    "flat": Line("flat", preset("diagonal:2"), "2", False, 0.0),
    "flat-forced": Line("flat-forced", preset("diagonal:2"), "3", True, 1.0),
}


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    return tiny_pair()


def judge(frames: Tensor, prompt: str, *, segment: bool = False) -> Quality:
    """Return marks that depend on the pixels alone, and on how many frames are shown."""
    return Quality(float(frames.mean()), len(frames) / 100, 0.5 if segment else 0.25)


def trained(folder: Path, runs: Sequence[str]) -> Path:
    """Return `folder` with runs that say how they were made, and have nothing as weights."""
    for run in runs:
        (folder / run).mkdir(parents=True)
        line = STUDENTS[run]
        told = {"timesteps": line.schedule.timesteps, "clean_pass": False,
                "forcing": line.forcing, "flow": line.flow}  # fmt: skip
        (folder / run / "distillation.json").write_text(json.dumps(told))
        (folder / run / room.WEIGHTS).touch()
    return folder


def made(pair: TinyPair, folder: Path, chosen: Sequence[Line], count: int = 2) -> room.Found:
    def models(line: Line) -> tuple[CausalModel, Decoder]:
        return pair.drafter if line.run == "teacher" else pair.target, pair.decoder

    return collect(models, judge, folder, chosen, count=count, blocks=2, seed=0, settings={"a": 1})


def invented(
    means: dict[str, float], count: int = 60, spread: float = 0.02
) -> tuple[list[Line], room.Found]:
    """Return lines and videos with marks about `means`, which are paired but for `spread`."""
    chosen = [TEACHER, *(line for run, line in STUDENTS.items() if run in means)]
    drawn = np.random.default_rng(5)
    common = 0.1 * drawn.standard_normal(count)
    videos = {
        (n, line.key): {
            "value": means[line.run] + common[n] + spread * drawn.standard_normal(),
            "motion": means[line.run],
            "first": 0.1,
            "seconds": 1.0,
        }
        for n in range(count)
        for line in chosen
    }
    return chosen, videos


def parts_of(ends: dict[str, tuple[float, float]], count: int = 40) -> list[room.Part]:
    """Return the parts of long videos whose first and last part have these means."""
    drawn = np.random.default_rng(6)
    chosen = [TEACHER if run == "teacher" else STUDENTS[run] for run in ends]
    videos = {
        (n, line.key): {
            "value": [mean + 0.01 * drawn.standard_normal() for mean in ends[line.run]],
            "motion": list(ends[line.run]),
        }
        for n in range(count)
        for line in chosen
    }
    return summarise_long(videos, chosen, count)


def claimed(means: dict[str, float], ends: dict[str, tuple[float, float]]) -> str:
    chosen, videos = invented(means)
    return "\n".join(claims(summarise(videos, chosen, 60), parts_of(ends), videos))


def test_lines_are_the_teacher_and_what_was_trained(tmp_path: Path) -> None:
    found, missing = lines(embedded.WEIGHTS, trained(tmp_path, list(STUDENTS)))
    told = [(line.model, line.steps, line.forcing, line.flow) for line in found]
    assert told == [
        ("teacher", "16+clean", None, None),
        ("teacher", "4+clean", None, None),
        ("teacher", "2+clean", None, None),
        ("teacher", "4/3/2", None, None),
        ("student", "4/3/2", True, 1.0),
        ("student", "4/3/2", False, 1.0),
        ("student", "4/3/2", True, 0.0),
        ("flat-student", "2", False, 0.0),
        ("flat-student", "2", True, 1.0),
        ("student", "4/3/2", True, 1.0),
        ("student", "4/3/2", True, 1.0),
    ]
    assert [line.in_flight for line in found] == [1] * 9 + [2, 3]
    assert not missing
    assert len({line.key for line in found}) == len(found)
    few = trained(tmp_path / "few", ["student", "flat", "no-flow"])
    # a run that has begun
    (few / "no-flow" / room.WEIGHTS).unlink()
    found, missing = lines(embedded.WEIGHTS, few)
    assert missing == ["no-forcing", "no-flow", "flat-forced"]
    assert [line.run for line in found[4:]] == ["student", "flat", "student", "student"]
    with pytest.raises(ValueError, match=r"students must hold student/diffusion_.*, got .*none"):
        lines(embedded.WEIGHTS, tmp_path / "none")


def test_other_weights_are_other_videos(tmp_path: Path) -> None:
    students = trained(tmp_path, ["student"])
    keys = []
    for weights in (b"a", b"b"):
        (students / "student" / "diffusion_pytorch_model.safetensors").write_bytes(weights)
        keys.append(lines(embedded.WEIGHTS, students)[0][4].key)
    assert keys[0] != keys[1]
    assert keys[0].split()[:2] == keys[1].split()[:2]


def test_tables_plots_and_frames_are_written_and_resumed(pair: TinyPair, tmp_path: Path) -> None:
    beside = [STUDENTS["student"]._replace(in_flight=count) for count in (2, 3)]
    chosen = [TEACHER, *STUDENTS.values(), *beside]
    videos = made(pair, tmp_path, chosen)
    store = (tmp_path / "distill.jsonl").read_text()
    assert len(store.splitlines()) == 1 + 2 * len(chosen)
    assert made(pair, tmp_path, chosen).keys() == videos.keys()
    assert (tmp_path / "distill.jsonl").read_text() == store
    rows, along = summarise(videos, chosen, 2), parts_of({"student": (0.9, 0.9)})
    files = write(tmp_path, rows, along, videos, ["nothing"], "About this run.")
    assert [path.name for path in files] == [
        "diagonal_distill.csv",
        "diagonal_distill_long.csv",
        "diagonal_distill_flight.csv",
        "diagonal_distill.md",
        *(f"diagonal_distill{name}.{kind}" for name in ("", "_long") for kind in ("png", "svg")),
        "diagonal_distill-frames.png",
    ]
    assert not list(tmp_path.glob("*.partial"))
    with files[0].open() as file:
        table = list(csv.reader(file))
    assert ",".join(table[0]) == COLUMNS
    assert [row[:4] for row in table[1:]] == [
        ["teacher", "3+clean", "", ""],
        ["student", "4/3/2", "true", "1"],
        ["student", "4/3/2", "false", "1"],
        ["student", "4/3/2", "true", "0"],
        ["flat-student", "2", "false", "0"],
        ["flat-student", "2", "true", "1"],
    ]
    assert {row[-1] for row in table[1:]} == {"2"}
    # of whole videos: not the mark of a part
    assert {row[7] for row in table[1:]} == {"0.2500"}
    with files[2].open() as file:
        flights = list(csv.DictReader(file))
    assert [row["in_flight"] for row in flights] == ["1", "2", "3"]
    # two side by side is the same video
    assert flights[0]["quality"] == flights[1]["quality"]
    assert all(0 < float(row["first_seconds"]) <= float(row["seconds"]) for row in flights)
    text = files[3].read_text()
    assert "| 2 | " in text.split("## Blocks side by side")[1]
    assert "About this run." in text
    assert "not trained: nothing." in text
    with pytest.raises(ValueError, match="was made with another a"):
        collect(lambda line: pair[1:], judge, tmp_path, chosen, count=1, blocks=2, seed=0,
                settings={"a": 2})  # fmt: skip


def test_a_video_is_the_targets_alone_in_the_lines_steps(pair: TinyPair, tmp_path: Path) -> None:
    from sdvg import SDVG
    from sdvg.sweep import prompts

    videos = made(pair, tmp_path, [TEACHER, STUDENTS["student"]])
    loop = SDVG(None, pair.target, pair.decoder, schedule="diagonal")
    blocks = loop.generate(prompts(2)[1:], num_blocks=2, seed=0, sequences=[1])
    frames = [block.frames[0] for block in blocks]
    mean = sum(float(part.sum()) for part in frames) / sum(part.numel() for part in frames)
    assert videos[1, STUDENTS["student"].key]["value"] == pytest.approx(mean, abs=1e-5)


def test_long_videos_are_graded_part_by_part(pair: TinyPair, tmp_path: Path) -> None:
    shown: list[tuple[int, bool]] = []

    def watch(frames: Tensor, prompt: str, *, segment: bool = False) -> Quality:
        shown.append((len(frames), segment))
        return Quality(1.0 / len(shown), 1.0, 0.5)

    line = STUDENTS["student"]
    found = collect_long(lambda _: pair[1:], watch, tmp_path, [line], count=1, blocks=10, seed=0,
                         settings={})  # fmt: skip
    assert shown == [(9 + 4 * 12, True), (5 * 12, True)]
    first, last = summarise_long(found, [line], 1)
    assert (first.first, first.last, last.first, last.last) == (0, 4, 5, 9)
    assert (first.quality.kept, last.quality.kept) == (1.0, 0.5)


def test_intervals_are_paired() -> None:
    chosen, videos = invented({"teacher": 0.9, "student": 0.9}, spread=0.0)
    rows = summarise(videos, chosen, 60)
    # the prompts differ much, the lines not at all
    assert rows[1].quality.quality_high - rows[1].quality.quality_low > 0.03
    assert rows[1].quality.kept_low == pytest.approx(1)
    assert rows[1].quality.kept_high == pytest.approx(1)
    assert difference(videos, *chosen, 60) == pytest.approx((0, 0, 0))


BASE = {
    "teacher": 0.9, "student": 0.89, "no-forcing": 0.8, "no-flow": 0.85, "flat": 0.5,
    "flat-forced": 0.86,
}  # fmt: skip
STEADY = {"student": (0.9, 0.89), "no-forcing": (0.9, 0.6)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {},
            r"- 98% of the quality of the teacher at 3\+clean steps, with 4/3/2: yes, .* 9\d\.\d%",
        ),
        ({"student": 0.86}, r"with 4/3/2: no, the student keeps 9[45]\.\d% \(.* 95\.6% of its mo"),
        ({}, r"without these losses, is visibly below: yes; the student is better by \+0\.3"),
        ({"flat": 0.95}, r"is visibly below: no, it is better; the student is better by -0\.0"),
        ({}, r"Diagonal forcing helps: yes; quality \+0\.0[89]\d\d \(\+0.*motion \+0\.0900"),
        ({"no-forcing": 0.97}, r"Diagonal forcing helps: no, it does harm; quality -0\.0"),
        ({"no-flow": 0.891}, r"The flow term helps: not shown; quality [+-]0\.00"),
        ({}, r"More steps early help: yes; quality \+0\.03"),
        ({}, r"The parts rank as in the paper, where each helps: yes"),
        ({"no-flow": 0.891}, r"where each helps: no, or not shown"),
    ],
)
def test_claims_follow_the_videos(change: dict[str, float], said: str) -> None:
    assert re.search(said, claimed(BASE | change, STEADY))


def test_drift_is_judged_for_each_line() -> None:
    text = claimed(BASE, STEADY)
    assert re.search(r"last 5 of 10 blocks within 3% of the first 5, student 4/3/2: yes, 9", text)
    assert re.search(r"within 3% of the first 5, no-forcing 4/3/2: no, 66\.\d% \(66", text)


def test_what_was_not_trained_claims_nothing() -> None:
    text = claimed({"teacher": 0.9, "student": 0.9}, {"student": (0.9, 0.9)})
    assert "helps" not in text
    assert "visibly" not in text
    assert "98%" in text


def test_committed_table_is_of_the_shipped_student() -> None:
    table = Path(__file__).parents[2] / "benchmarks/results/digits/diagonal_distill.md"
    student = embedded.WEIGHTS / "diagonal" / "student"
    assert f"student 4/3/2 {digest(student)}" in table.read_text(), (
        "the weights changed: run `sdvg sweep --table distill --students runs/distill --out "
        "benchmarks/results/digits` again"
    )


def test_the_command_makes_the_table(
    pair: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(room, "LONG", 10)
    monkeypatch.setattr(embedded, "quality", judge)
    loaded: list[object] = []

    def load(_: object, *, target: object, **__: object) -> EmbeddedPair:
        loaded.append(target)
        return EmbeddedPair(*pair, BrightnessScorer())

    monkeypatch.setattr(embedded, "load", load)
    students = trained(tmp_path / "runs", ["student", "flat"])
    command = ["sweep", "--table", "distill", "--students", str(students), "--quick",
               "--prompts", "1", "--blocks", "2", "--out", str(tmp_path / "d")]  # fmt: skip
    assert main(command) == 0
    assert {str(target) for target in loaded} == {
        "teacher", str(students / "student"), str(students / "flat")
    }  # fmt: skip
    text = (tmp_path / "d" / "diagonal_distill.md").read_text()
    assert "not trained: no-forcing, no-flow, flat-forced." in text
    assert "Made by `sdvg sweep --table distill`" in text
    stores = [(tmp_path / "d" / f"distill{name}.jsonl").read_text() for name in ("", "-long")]
    assert main(command) == 0
    assert stores == [
        (tmp_path / "d" / f"distill{name}.jsonl").read_text() for name in ("", "-long")
    ]
    capsys.readouterr()
    for options, said in (
        (["--thresholds", "0.3"], "sdvg: thresholds: must be left out for the table distill, got"),
        (["--drafter", "diagonal"], "sdvg: drafter: must be left out for the table distill, got"),
        (["--students", str(tmp_path)], "sdvg: sweep: students must hold student/diffusion_pytorc"),
        (["--prompts", "0"], "sdvg: sweep: prompts must be at least 1, got 0"),
        (["--blocks", "3"], "was made with another blocks; give another --out"),
    ):
        assert main([*command, *options]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert main(["sweep", "--students", "x", "--out", str(tmp_path / "e")]) == 2
    assert "students: must come with --table distill, got x" in capsys.readouterr().err
