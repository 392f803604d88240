"""The sweep: balanced prompts, intervals, resuming, the files it writes."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from sdvg import sweep as room
from sdvg.models import embedded
from sdvg.models.embedded import EmbeddedPair as Pair
from sdvg.sweep import (
    COLUMNS,
    Method,
    digest,
    gains,
    methods,
    prompts,
    read,
    summarise,
    sweep,
    write,
)
from tests.tiny import TAU, BrightnessScorer, tiny_pair

pytest.importorskip("matplotlib", reason="the plot is matplotlib's")


class Quality(NamedTuple):
    value: float
    motion: float


def judge(frames: Tensor, prompt: str) -> Quality:
    """Return a quality that depends on the pixels alone."""
    return Quality(float(frames.mean()), 0.5)


LINES = methods((TAU,), (TAU,), (0.5,))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(*tiny_pair(), BrightnessScorer())


def run(pair: Pair, folder: Path, lines: list[Method] = LINES, count: int = 2) -> list[room.Row]:
    return sweep(pair, judge, folder, lines=lines, count=count, blocks=2, settings={"a": 1})


def invented(count: int, seed: int) -> dict[tuple[int, str], dict[str, float]]:
    """Return random results for every line, with what `_video` gives."""
    drawn = np.random.default_rng(seed)
    lines = methods((-0.7, -1.0), (-0.5,), (0.5, 0.9))
    return {
        (n, line.key): {
            "value": drawn.random(),
            "seconds": 1 + drawn.random(),
            "accepted": int(drawn.integers(9)),
            "decided": 0 if line.name in ("target", "draft") else 8,
        }
        for n in range(count)
        for line in lines
    }


@pytest.mark.parametrize("count", [40, 100, 160])
def test_prompts_are_different_and_balanced(count: int) -> None:
    texts = prompts(count)
    assert len(set(texts)) == count
    for part in (lambda t: t.split()[1], lambda t: t.split(" moving ")[1].split(",")[0],
                 lambda t: t.split(", ")[1]):  # fmt: skip
        counts = Counter(map(part, texts)).values()
        assert max(counts) - min(counts) <= 1
    assert prompts(count + 7)[:count] == texts


def test_default_lines_are_the_papers_table() -> None:
    counts = Counter(line.name for line in methods())
    assert counts["target"] == counts["draft"] == 1
    assert counts["reward"] == 7
    assert counts["reward-mean"] == 3
    assert counts["random"] == counts["random-free-first"] > 1
    free = [line for line in methods() if not line.force_first]
    assert {line.name for line in free} == {"random-free-first"}


def test_sweep_writes_the_table_the_plot_and_the_columns(pair: Pair, tmp_path: Path) -> None:
    rows = run(pair, tmp_path)
    files = write(tmp_path, rows, LINES, "About this run.")
    assert sorted(path.name for path in files) == [
        "pareto.png",
        "pareto.svg",
        "sweep.csv",
        "table.md",
    ]
    assert not list(tmp_path.glob("*.partial"))
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert ",".join(COLUMNS) == (
        "method,tau,quality,quality_low,quality_high,seconds,speedup,acceptance,videos"
    )
    assert [row["method"] for row in table] == [line.name for line in LINES]
    assert float(table[0]["speedup"]) == 1
    assert {row["videos"] for row in table} == {"2"}
    assert "About this run." in (tmp_path / "table.md").read_text()


def test_quality_is_the_judges_of_the_very_video(pair: Pair, tmp_path: Path) -> None:
    from sdvg import SDVG

    rows = run(pair, tmp_path, LINES[:1], count=2)
    values = []
    for n, prompt in enumerate(prompts(2)):
        alone = SDVG(None, pair.target, pair.decoder)
        blocks = list(alone.generate([prompt], num_blocks=2, sequences=[n]))
        values.append(judge(torch.cat([block.frames[0] for block in blocks]), prompt).value)
    assert rows[0].quality == pytest.approx(np.mean(values), abs=1e-5)


def test_resumed_sweep_makes_only_what_is_missing(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(pair, tmp_path, LINES[:2], count=2)
    store = tmp_path / "videos.jsonl"
    whole = store.read_text()
    # a crash cut the last line
    store.write_text(whole[:-20])
    made = []
    real = room._video

    def count_and_make(*arguments: object) -> dict[str, object]:
        made.append(arguments[2].key)
        return real(*arguments)

    monkeypatch.setattr(room, "_video", count_and_make)
    again = run(pair, tmp_path, LINES[:2], count=2)
    # the warm-up, and the one that was cut
    assert len(made) == 2 + 1
    assert [row.quality for row in again] == [row.quality for row in first]
    assert len(store.read_text().splitlines()) == len(whole.splitlines())
    made.clear()
    run(pair, tmp_path, LINES[:2], count=2)
    assert made == []


def test_folder_of_other_settings_is_refused(pair: Pair, tmp_path: Path) -> None:
    settings = {"a": 2, "blocks": 2, "seed": 0}
    video = {"prompt": 0, "method": "target"}
    lines = [json.dumps(entry) + "\n" for entry in ({"settings": settings}, video)]
    (tmp_path / "videos.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=r"^sweep: .* was made with another a; give another --out"):
        run(pair, tmp_path)


def test_settings_of_a_run_that_failed_at_once_are_replaced(pair: Pair, tmp_path: Path) -> None:
    """A wrong option once left a folder that refused the right one."""
    (tmp_path / "videos.jsonl").write_text(json.dumps({"settings": {"a": 2}}) + "\n")
    assert len(run(pair, tmp_path, LINES[:2], count=1)) == 2


@pytest.mark.parametrize("text", ["garbage", "{}", "[1]"])
def test_a_file_that_is_no_sweep_is_named(pair: Pair, tmp_path: Path, text: str) -> None:
    (tmp_path / "videos.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"videos.jsonl must be the videos of a sweep, got b"):
        run(pair, tmp_path)


def test_no_prompt_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sweep: prompts must be at least 1, got 0"):
        run(pair, tmp_path, count=0)


def test_summary_is_means_ratios_and_intervals_over_prompts() -> None:
    lines, videos = methods((-0.7, -1.0), (-0.5,), (0.5, 0.9)), invented(50, seed=3)
    rows = summarise(videos, lines, 50)
    target = np.mean([videos[n, "target"]["seconds"] for n in range(50)])
    for row, line in zip(rows, lines, strict=True):
        mine = [videos[n, line.key] for n in range(50)]
        quality = np.array([video["value"] for video in mine])
        assert row.quality == pytest.approx(quality.mean())
        # the bootstrap's interval is near the normal one
        half = 1.96 * quality.std(ddof=1) / np.sqrt(50)
        assert row.quality_high - row.quality == pytest.approx(half, rel=0.25)
        assert row.quality - row.quality_low == pytest.approx(half, rel=0.25)
        assert row.speedup == pytest.approx(target / np.mean([v["seconds"] for v in mine]))
        assert row.speedup_low <= row.speedup <= row.speedup_high
        if line.name in ("target", "draft"):
            assert row.acceptance is None
        else:
            assert row.acceptance == pytest.approx(sum(v["accepted"] for v in mine) / (50 * 8))


def test_gain_over_random_is_taken_at_the_same_speed() -> None:
    lines = [
        Method("target", None),
        Method("reward", -1.0),
        Method("random", 0.5),
        Method("random", 0.9),
    ]
    figures = {
        "target": (0.9, 1.0),
        "reward -1": (0.8, 0.5),
        "random 0.5": (0.7, 1.0),
        "random 0.9": (0.5, 1 / 3),
    }
    videos = {
        (n, key): {"value": value, "seconds": seconds, "accepted": 0, "decided": 8}
        for n in range(4)
        for key, (value, seconds) in figures.items()
    }
    # speeds 1 and 3 for random, 2 for the reward: half-way, at quality 0.6
    ((tau, gain, low, high),) = gains(videos, lines, 4)
    assert (tau, gain, low, high) == pytest.approx((-1.0, 0.2, 0.2, 0.2))
    # with random as good, the table says so
    videos |= {
        (n, "random 0.9"): videos[n, "random 0.5"] | {"value": 0.9, "seconds": 1 / 3}
        for n in range(4)
    }
    table = room._table(summarise(videos, lines, 4), gains(videos, lines, 4), "About.")
    assert "The reward beats random routing at 0 of 1 thresholds" in table


def row(method: str, quality: float, speedup: float, tau: float | None = None) -> room.Row:
    return room.Row(method, tau, quality, quality, quality, 1.0, speedup, None, 4, speedup, speedup)


def test_a_sweep_is_read_back(pair: Pair, tmp_path: Path) -> None:
    rows = run(pair, tmp_path)
    write(tmp_path, rows, LINES, "About.")
    again = read(tmp_path / "sweep.csv")
    assert [room._cells(row) for row in again] == [room._cells(row) for row in rows]
    for text in ("", "method,tau\ntarget,\n", "\x00", "not a table"):
        (tmp_path / "other.csv").write_text(text)
        with pytest.raises(ValueError, match=r"^sweep: .*other.csv must (be|hold)"):
            read(tmp_path / "other.csv")
    with pytest.raises(ValueError, match=r"none.csv must be a sweep's sweep.csv, got FileNotFound"):
        read(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("reward", 0.96, 2.61, -1.0)], "yes, tau -1 keeps 96.0% at 2.61x"),
        ([row("reward-mean", 0.96, 2.7, 0.0)], "yes, tau 0 of the mean frame keeps 96.0% at 2.70x"),
        (
            [row("reward", 0.95, 2.61, -1.0), row("reward", 0.99, 2.59, 0.3)],
            "no, tau -1 keeps 95.0",
        ),
        ([row("random", 0.99, 2.7, 0.9)], "no threshold is that fast"),
    ],
)
def test_the_table_says_whether_a_distilled_drafter_is_fast_enough(
    rows: list[room.Row], said: str
) -> None:
    whole, words = row("target", 1.0, 1.0), "- 95.7% of target-only quality at 2.6x or more: "
    text = room._table([whole, *rows], [], "About.", [])
    assert words + said in text
    assert "(the paper's SDVG: 2.09x)" in text
    assert text.count(words) == 1
    other = room._table([whole], [], "About.", [whole, *rows])
    assert f"{words}no threshold is that fast" in other
    assert words + said in other
    assert words not in room._table([whole, *rows], [], "About.")


def test_the_plot_has_both_fronts(pair: Pair, tmp_path: Path) -> None:
    rows = run(pair, tmp_path)
    one, both = room.plot(rows).axes[0], room.plot(rows, rows).axes[0]
    assert len(both.containers) == 2 * len(one.containers)
    labels = both.get_legend_handles_labels()[1]
    assert set(labels) == {*one.get_legend_handles_labels()[1], "95.7% of target only, 2.6x"}
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("folder", "options", "models"),
    [
        ("", "", ()),
        ("diagonal-drafter", "--drafter diagonal ", ("diagonal",)),
    ],
)
def test_committed_result_is_of_the_shipped_weights(
    folder: str, options: str, models: tuple[str, ...]
) -> None:
    out = Path("benchmarks", "results", "digits", folder)
    table = (Path(__file__).parents[2] / out / "table.md").read_text()
    assert f"weights {digest(embedded.WEIGHTS, *embedded.parts(*models))}" in table, (
        f"the weights changed: run `sdvg sweep {options}--out {out}` again"
    )
