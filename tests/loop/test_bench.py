"""`sdvg bench loop`: every variant gives the same video, and a wrong one gets no figure."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the models are diffusers' classes")

from sdvg import bench
from sdvg.bench import Parts, Pattern, Row
from sdvg.cli import main
from sdvg.types import Draft


@pytest.fixture
def parts() -> Parts:
    return bench.random_wan("tiny", "tiny", height=32, width=32, dtype=torch.float32)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.25, 2), (0.731, 6), (0.889, 7), (1.0, 8)])
def test_the_pattern_keeps_its_share_evenly(share: float, kept: int) -> None:
    verdicts = [bool(Pattern(share)(Draft(block, 0, (0,), None))) for block in range(1, 9)]
    assert sum(verdicts) == kept
    assert Pattern(share)(Draft(3, 0, (0, 1), None)).shape == (2,)


def test_all_variants_are_measured_against_their_own_target(parts: Parts) -> None:
    rows = list(bench.measure(parts, acceptances=(0.0, 1.0), blocks=4))
    assert [row.variant for row in rows[::3]] == ["eager", "original", "fused", "graphs", "fp8"]
    assert [row.acceptance for row in rows[:3]] == [None, 0.0, 1.0]
    for row in rows:
        assert row.difference < (0.2 if row.variant == "fp8" else 1e-4)
        assert row.fps > 0
        assert (row.speedup == 1) == (row.acceptance is None)
    # all drafts kept: the target makes the forced first block alone
    assert rows[2].target_ms < rows[1].target_ms


def test_a_diagonal_schedule_with_two_in_flight_is_measured_in_every_variant(parts: Parts) -> None:
    """Also by the original's shifted cache, in passes of two blocks at two timesteps."""
    rows = list(
        bench.measure(
            parts, variants=("eager", "original", "fused", "graphs"), acceptances=(1.0,), blocks=7,
            schedule="diagonal", in_flight=2,
        )
    )  # fmt: skip
    assert len(rows) == 8
    assert all(row.difference < 1e-4 for row in rows)
    # first frames come before the video does
    assert all(0 < row.first_ms < 1e3 * (12 * 7 - 3) / row.fps for row in rows)


def test_the_original_follows_where_the_loop_leaves_blocks_out(parts: Parts) -> None:
    """Kept blocks beyond the target's reach are never written: its shifted cache overran."""
    rows = list(bench.measure(parts, variants=("eager", "original"), acceptances=(0.8,), blocks=9))
    assert all(row.difference < 1e-4 for row in rows)


def test_a_variant_that_gives_another_video_gets_no_figure(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x

    monkeypatch.setattr(bench, "_turned", broken)
    with pytest.raises(RuntimeError, match=r"original is .* off the eager latents"):
        list(bench.measure(parts, variants=("original", "eager"), acceptances=(), blocks=3))


def test_a_variant_that_gives_other_frames_gets_no_figure(parts: Parts) -> None:
    decode = parts.decoder.decode

    def brighter(latents: Tensor, state: object) -> tuple[Tensor, object]:
        frames, after = decode(latents, state)
        return frames + 0.1, after

    rows = bench.measure(parts, variants=("eager", "original"), acceptances=(), blocks=2)
    assert next(rows).variant == "eager"
    parts.decoder.decode = brighter
    with pytest.raises(RuntimeError, match=r"0\.1 off the last frames"):
        next(rows)


def test_the_command_prints_a_table_and_writes_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "loop.csv"
    command = ["bench", "loop", "--models", "tiny", "--blocks", "2", "--variants", "eager"]
    assert main([*command, "--acceptance", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split()[:3] == ["variant", "acceptance", "fps"]
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["acceptance"] for row in rows] == ["target-only", "1"]
    # no figure of memory where there is no GPU
    assert [row["memory_gib"] for row in rows] == ["-", "-"]


def test_the_command_takes_a_schedule_a_sink_and_blocks_in_flight(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def measured(parts: Parts, **settings: object) -> Iterator[Row]:
        asked.update(settings, sink=parts.drafter.sink_frames, window=parts.target.window_frames)
        return measure(parts, **settings)

    measure = bench.measure
    monkeypatch.setattr(bench, "measure", measured)
    command = ["bench", "--models", "tiny", "--blocks", "3", "--variants", "eager", "fused"]
    command += ["--acceptance", "1", "--schedule", "diagonal", "--sink", "3", "--window", "12"]
    assert main([*command, "--in-flight", "2"]) == 0
    assert (asked["schedule"], asked["in_flight"]) == ("diagonal", 2)
    assert (asked["sink"], asked["window"]) == (3, 12)
    assert "first_ms" in capsys.readouterr().out


def test_a_tiny_decoder_of_random_weights_decodes() -> None:
    decoder = bench.random_tiny_decoder((8, 6, 4, 4), dtype=torch.float32)
    frames, state = decoder.decode(torch.randn(1, 3, 16, 4, 4), decoder.start(1))
    assert frames.shape == (1, 9, 3, 32, 32)
    more, _ = decoder.decode(torch.randn(1, 3, 16, 4, 4), state)
    assert more.shape == (1, 12, 3, 32, 32)
    assert 0 < frames.std() < 1


def test_ctrl_c_keeps_the_rows_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = bench.measure

    def interrupted(*parts: object, **settings: object) -> Iterator[Row]:
        yield next(measure(*parts, **settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", interrupted)
    out = tmp_path / "loop.csv"
    command = ["bench", "loop", "--models", "tiny", "--blocks", "2", "--variants", "eager"]
    assert main([*command, "--out", str(out)]) == 130
    assert "interrupted; 1 rows were measured and are kept" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ["--device", "cpu"],
            "bench: Wan's sizes need a GPU, got cpu; --models tiny runs anywhere",
        ),
        (["--models", "tiny", "--acceptance", "2"], "acceptance must lie in [0, 1], got [2.0]"),
        (["--models", "tiny", "--out", "/no/such/folder/rows.csv"], "rows.csv cannot be written"),
        (
            ["--models", "tiny", "--device", "gpu"],
            "a GPU of this machine such as cuda:1, got 'gpu'",
        ),
        (
            ["--models", "tiny", "--device", "cuda:99"],
            "of this machine such as cuda:1, got 'cuda:99'",
        ),
        (["--models", "tiny", "--blocks", "1"], "blocks must be at least 2, for the target makes"),
        (["--models", "tiny", "--height", "33"], "height must be a multiple of 16, got 33"),
        (["--models", "tiny", "--target", "14B"], "both models must be tiny or none, got tiny and"),
        (["--models", "tiny", "--variants", "slow"], "variants must be among original, eager"),
        (["--models", "tiny", "--sink", "3"], "original has no sink, got one; leave the variant"),
        (["--models", "tiny", "--schedule", "fast"], "preset must be one of self_forcing, krea"),
        (
            ["--models", "tiny", "--variants", "eager", "--in-flight", "0"],
            "in_flight must be at least 1, got 0",
        ),
    ],
)
def test_errors_are_one_sentence(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "loop", *options]) == 2
    assert text in capsys.readouterr().err
