"""`sdvg tokens`: what it writes, how it goes on, and its sentences."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the tokenizer is a diffusers class")
pytest.importorskip("transformers", reason="the model is a transformers class")
pytest.importorskip("matplotlib", reason="the plot is matplotlib's")
pytest.importorskip("av", reason="the videos are PyAV's")

from sdvg import token_sweep as room
from sdvg import vvs_sweep
from sdvg.cli import main
from sdvg.models.embedded import tokens as embedded
from sdvg.sweep import digest
from sdvg.token_cli import ORDERS
from sdvg.token_sweep import COLUMNS, Line, lines, summarise, sweep, write
from sdvg.tokens import Exact, Sampling
from sdvg.tokens.embedded import SPECULATIVE, TREE, EmbeddedVideos, Shown
from sdvg.tokens.speculative import Counts


def test_generate_writes_a_video_its_frames_and_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import av

    out = tmp_path / "seven.mp4"
    arguments = ["tokens", "generate", "a seven moving left", "--k", "1", "--frames", "2"]
    arguments += ["--mode", "spatiotemporal", "--action", "1=up,quickly", "--out", str(out)]
    assert main(arguments) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".mp4", ".png"]
    with av.open(str(out)) as video:
        assert len(list(video.decode(video=0))) == 2
    report = json.loads(out.with_suffix(".json").read_text())
    # (2 * 16 - 1) k + 16
    assert report["summary"]["passes"] == 47
    assert report["arguments"]["action"] == ["1=up,quickly"]
    assert "2 frames in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--k", "0"], "diagonal_schedule: k must be in [1, width 16], got 0"),
        (
            ["--mode", "rows"],
            "tokens: mode must be one of raster, spatial, spatiotemporal, zipar, scd, sjd, specul",
        ),
        (
            ["--mode", "speculative"],
            "mode: must be left to `sdvg tokens speculate`, got speculative",
        ),
        (
            ["--mode", "raster", "--k", "5"],
            "diagonal: k must be the width 16 in raster order, got 5",
        ),
        (["--mode", "scd", "--context", "300"], "context: must be left out for scd, got 300"),
        (["--mode", "sjd", "--keep", "3"], "keep: must be left out for sjd, got 3"),
        (
            ["--mode", "scd", "--row-start", "newest"],
            "row_start: must be left out for scd, got newest",
        ),
        (["--mode", "scd", "--k", "1"], "jacobi: window must be at least 2, got 1"),
        (["--keep", "3"], "keep: must come with context, got 3; nothing slides without"),
        (["--action", "9=up,quickly"], "action: must be FRAME=DIRECTION,SPEED with a frame from 1"),
        (
            ["--action", "1=up,quickly", "--frames", "1"],
            "action: must be left out where no second frame is, got '1=up,quickly'",
        ),
        (
            ["--action", "1=up,quickly", "--action", "1=down,slowly"],
            "action: must be one for each frame, got another: '1=down,slowly'",
        ),
        (["--frames", "0"], "tokens: frames must be at least 1, got 0"),
        (["--action", "1=sideways"], "action: must be FRAME=DIRECTION,SPEED with a frame from 1"),
        (["--context", "100"], "diagonal: context must hold at least 280 slots, the prompt and on"),
        (["--temperature", "-1"], "sampling: temperature must be finite and at least 0, got -1"),
        (["--guidance", "nan"], "sampling: guidance must be finite, got nan"),
        (["--top-p", "2"], "sampling: top_p must lie in (0, 1], got 2"),
        (["--top-k", "0"], "sampling: top_k must be at least 1, got 0"),
    ],
)
def test_bad_options_are_one_sentence(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "a.mp4")]
    assert main(["tokens", "generate", "a seven", *out, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"sdvg: {text}")
    assert not list(tmp_path.iterdir())


def test_generate_decodes_by_jacobi_iterations(tmp_path: Path) -> None:
    out = tmp_path / "seven.mp4"
    arguments = ["tokens", "generate", "a seven moving left", "--mode", "sjd", "--frames", "1"]
    arguments += ["--temperature", "3", "--guidance", "1", "--k", "32", "--out", str(out)]
    assert main(arguments) == 0
    # of 256 tokens
    assert json.loads(out.with_suffix(".json").read_text())["summary"]["passes"] < 128


def test_speculate_writes_a_video_and_says_where_the_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seven.mp4"
    arguments = ["tokens", "speculate", "a seven moving left", "--frames", "1", "--out", str(out)]
    arguments += ["--guidance", "1", "--verification", "lantern++", "--skip", "uniform"]
    assert main([*arguments, "--interval", "3", "--likely", "--depth", "4", "--nodes", "12"]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".mp4", ".png"]
    summary = json.loads(out.with_suffix(".json").read_text())["summary"]
    # but for those before features are there
    assert 0 <= summary["drafts"] // 3 - summary["skipped"] < 3
    assert summary["passes"] == summary["drafts"] - summary["skipped"]
    assert summary["tokens_per_pass"] == 256 / summary["passes"] > 2
    spent = summary["draft_seconds"] + summary["target_seconds"]
    assert 0 < spent < summary["loop_seconds"] < summary["seconds"]
    said = capsys.readouterr().out
    assert "1 frames in" in said
    assert f"{summary['drafts']} drafts, {summary['skipped']} steps of a video not ver" in said


def test_exact_verification_gives_the_frames_of_raster_order() -> None:
    models = embedded.load()
    how = {"sampling": Sampling(0.9)}
    raster, exact = (
        list(EmbeddedVideos(models, **how, **way).generate(["a six"], frames=1, seed=3))
        for way in ({"mode": "raster"}, {"mode": SPECULATIVE, "verification": Exact()})
    )
    assert torch.equal(raster[0].frames, exact[0].frames)
    assert raster[0].counts is None
    assert exact[0].counts.tokens == raster[0].passes == 256
    assert exact[0].passes < 128


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "speculative", "k": 2}, "tokens: k must be left out for speculative, got 2"),
        ({"mode": "raster", "drafter": True}, "tokens: drafter must be left out for raster"),
    ],
)
def test_what_belongs_to_another_mode_is_refused(options: dict[str, object], text: str) -> None:
    if "drafter" in options:
        options = options | {"drafter": embedded.load_drafter()}
    with pytest.raises(ValueError, match=text):
        EmbeddedVideos(embedded.load(), **options)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--skip", "uniform", "--interval", "1"], "skipping: interval must be at least 2, got 1;"),
        (
            ["--interval", "3"],
            "interval: must be left out for skip none, got 3; it is uniform's",
        ),
        (
            ["--skip", "dynamic", "--interval", "2"],
            "interval: must be left out for skip dynamic, got 2; it is uniform's",
        ),
        (
            ["--skip", "dynamic", "--threshold", "1.5"],
            "skipping: threshold must lie in [-1, 1], got 1.5",
        ),
        (
            ["--delta", "0.1"],
            "delta: must be left out for verification exact, got 0.1; it is lantern's",
        ),
        (
            ["--verification", "lantern", "--ratio", "2"],
            "ratio: must be left out for verification lantern, got 2.0; it is lantern++'s",
        ),
        (["--verification", "lantern", "--delta", "-1"], "verify_relaxed: delta must"),
        (["--verification", "lantern++", "--ratio", "0.5"], "verify_relaxed: ratio must"),
        (["--verification", "typical", "--epsilon", "nan"], "verify_typical: epsilon must"),
        (["--likely"], "likely: must be left out for skip none; nothing is skipped"),
        (["--depth", "0"], "speculative: depth must lie in [1, 32], got 0"),
        (["--children", "17"], "speculative: top_k must lie in [1, 16], got 17"),
        (["--nodes", "1"], "speculative: nodes must lie in [2, 128], got 1"),
        (["--frames", "0"], "tokens: frames must be at least 1, got 0"),
        (["--top-k", "0"], "sampling: top_k must be at least 1, got 0"),
    ],
)
def test_bad_speculation_is_one_sentence(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "a.mp4")]
    assert main(["tokens", "speculate", "a seven", *out, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"sdvg: {text}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_refused(
    prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokens", "generate", prompt, "--out", str(tmp_path / "a.mp4")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"sdvg: tokens: a prompt must not be empty, got {prompt!r}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--k", "1", "17"],
            "diagonal_schedule: k must be in [1, width 16], got 17; k = width is raster decoding",
        ),
        (
            ["--k", "1", "1"],
            "sweep: lines must differ, got ['raster 16', 'spatial 1', 'spatial 1']",
        ),
        (["--prompts", "0"], "sweep: prompts must be at least 1, got 0"),
        (["--frames", "0"], "sweep: frames must be at least 1, got 0"),
        (["--top-p", "nan"], "sampling: top_p must lie in (0, 1], got nan"),
        (["--modes", "scd", "--k", "4"], "k: must be left out for scd, got [4]"),
        (
            ["--modes", "sjd", "--row-start", "above"],
            "row_start: must be left out for sjd, got above",
        ),
        (["--threads", "0"], "threads: must be at least 1, got 0"),
        (["--methods", "scd"], "methods: must be left out for the table diagonal, got ['scd']"),
        (
            ["--table", "vvs"],
            "modes: must be left out for the table vvs, got ['spatial']",
        ),
    ],
)
def test_a_sweep_refuses_before_it_makes_anything(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad k was refused once the folder was there."""
    out = tmp_path / "new"
    given = ["--modes", "spatial", "--tuned", "no", "--out", str(out), *arguments]
    assert main(["tokens", "sweep", *given]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"sdvg: {text}"
    assert not out.exists()


def test_a_sweep_says_where_no_folder_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["--modes", "scd", "--tuned", "no", "--out", str(tmp_path / "file" / "new")]
    assert main(["tokens", "sweep", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sdvg: output: ")
    assert error.endswith("cannot be made: not a directory")


def test_a_table_has_uncoupled_drafts_only_where_they_are_asked_for() -> None:
    assert {line.mode for line in lines(ORDERS, (1,), (False,), 16)} == {
        "raster", "spatial", "spatiotemporal", "zipar", "scd",
    }  # fmt: skip
    assert [line.key for line in lines(("sjd", "zipar"), (1,), (True,), 16)] == [
        "raster 16", "sjd 16", "sjd 64", "sjd 256", "zipar 1 tuned",
    ]  # fmt: skip


def test_ctrl_c_keeps_the_finished_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import av

    from sdvg.tokens.embedded import EmbeddedVideos

    def shown(self: EmbeddedVideos, prompts: list[str], **_: object) -> Iterator[Shown]:
        yield Shown(0, torch.zeros(len(prompts), 3, 32, 32), 31, 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(EmbeddedVideos, "generate", shown)
    out = tmp_path / "a.mp4"
    assert main(["tokens", "generate", "a six", "a two", "--out", str(out)]) == 130
    assert "interrupted; 1 of 8 frames were finished and are kept" in capsys.readouterr().err
    for name in ("a-1", "a-2"):
        with av.open(str(tmp_path / f"{name}.mp4")) as video:
            assert len(list(video.decode(video=0))) == 1
        assert json.loads((tmp_path / f"{name}.json").read_text())["interrupted"] is True


class Quality(NamedTuple):
    value: float


class Fake:
    """Frames whose brightness says which line, which prompt and which frame they are."""

    made: ClassVar[list[tuple[str, int, int]]] = []

    def __init__(self, line: Line) -> None:
        self.line = line

    def generate(
        self, prompts: list[str], *, frames: int, seed: int, sequences: list[int]
    ) -> list[Shown]:
        Fake.made.append((self.line.key, sequences[0], frames))
        level = (self.line.k + sequences[0]) / 32
        passes = 10 * self.line.k
        return [Shown(i, torch.full((1, 3, 8, 8), level), passes, 0.1) for i in range(frames)]


def judge(frames: Tensor, prompt: str) -> Quality:
    return Quality(float(frames.mean()))


LINES = lines(("spatial", "zipar"), (1, 2), (False, True), 16)


def run(folder: Path, count: int = 2, **changed: object) -> list[room.Row]:
    options = {"frames": 3, "tokens": 4, "seed": 0, "settings": {"a": 1}, **changed}
    return sweep(Fake, judge, folder, lines=LINES, count=count, **options)


def test_sweep_writes_the_table_the_plot_and_the_frames(tmp_path: Path) -> None:
    rows = run(tmp_path)
    files = write(tmp_path, rows, "About this run.")
    assert sorted(path.name for path in files) == [
        "diagonal-frames.png", "diagonal.csv", "diagonal.md", "diagonal.png", "diagonal.svg",
    ]  # fmt: skip
    with (tmp_path / "diagonal.csv").open() as file:
        table = list(csv.DictReader(file))
    assert (
        ",".join(table[0])
        == ",".join(COLUMNS)
        == ("mode,k,tuned,passes,tokens_per_second,seconds,quality,quality_low,quality_high,videos")
    )
    assert [(row["mode"], row["k"], row["tuned"]) for row in table[:4]] == [
        ("raster", "16", "false"), ("spatial", "1", "false"), ("spatial", "2", "false"),
        ("zipar", "1", "false"),
    ]  # fmt: skip
    assert len(table) == 9
    assert [row["passes"] for row in table[:2]] == ["160", "10"]
    # the mean over prompts 0 and 1
    assert float(table[1]["quality"]) == pytest.approx(1.5 / 32, abs=1e-4)
    assert "About this run." in (tmp_path / "diagonal.md").read_text()


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = run(tmp_path)
    store = tmp_path / "diagonal.jsonl"
    # a crash cut the last line
    store.write_text(store.read_text()[:-5])
    Fake.made.clear()
    again = run(tmp_path)
    # after the warm-up of one frame each
    assert len([made for made in Fake.made if made[2] == 3]) == 1
    assert [row.grade for row in again] == [row.grade for row in first]
    with pytest.raises(ValueError, match="was made with another frames"):
        run(tmp_path, frames=2)


def test_rates_and_shares_are_against_raster() -> None:
    table = [Line("raster", 16), Line("spatial", 1)]
    videos = {
        (n, line.key): {"value": value, "seconds": seconds, "passes": passes}
        for line, value, seconds, passes in ((table[0], 0.8, 4.0, 512), (table[1], 0.6, 0.5, 62))
        for n in range(3)
    }
    raster, spatial = summarise(videos, table, 3, 1000)
    assert raster.tokens_per_second == 250
    assert spatial.tokens_per_second == 2000
    assert (raster.grade.kept, spatial.grade.kept) == (1, pytest.approx(0.75))
    assert spatial.grade.kept_low == spatial.grade.kept_high == pytest.approx(0.75)


class Branches(Fake):
    """What a line of the other table makes: VVS takes fewer passes, and draws a digit less well."""

    def generate(
        self, prompts: list[str], *, frames: int, seed: int, sequences: list[int]
    ) -> list[Shown]:
        line = self.line
        speed = {"ar": 1, "eagle2": 2, "lantern": 3, "vvs-uniform": 4, "vvs-dynamic": 6}
        fast = speed[line.method]
        # the fastest is not as good
        level = 0.8 - 0.01 * sequences[0] - (0.5 if fast == 6 else 0)
        counts = None if fast == 1 else Counts(24 // fast, 12, 6 if fast > 3 else 0, 24)
        stages = {"draft": 0.0, "target": 0.0}
        picture = torch.full((1, 3, 8, 8), level)
        return [Shown(i, picture, 24 // fast, 0.1, counts, stages) for i in range(frames)]


def test_the_table_of_speculation_says_what_its_targets_say(tmp_path: Path) -> None:
    methods = ("eagle2", "lantern", "vvs-uniform", "vvs-dynamic")
    table = vvs_sweep.chosen(methods)
    assert [line.key for line in table[:4]] == [
        "ar", "eagle2", "eagle2 tree=wide", "lantern delta=0.1",
    ]  # fmt: skip
    done = room.collect(
        Branches, judge, tmp_path / "vvs.jsonl", lines=table, count=2, frames=3, seed=0, settings={}
    )
    rows = vvs_sweep.summarise(done, table, 2, 24)
    files = vvs_sweep.write(tmp_path, rows, "About this run.")
    assert sorted(path.name for path in files) == [
        "vvs-frames.png", "vvs.csv", "vvs.md", "vvs.png", "vvs.svg",
    ]  # fmt: skip
    with (tmp_path / "vvs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert ",".join(lines[0]) == (
        "method,setting,tokens_per_pass,target_passes,seconds,speedup,quality,quality_low,"
        "quality_high,images"
    )
    assert [line["tokens_per_pass"] for line in lines[1:4]] == ["2.000", "2.000", "3.000"]
    settings = {line["setting"] for line in lines}
    assert {"threshold=0.8 delta=0.1 tree=wide", "threshold=0.8 ratio=3 path=likely"} <= settings
    assert rows[1].same == rows[0].images == 2
    assert (rows[1].skipped, rows[-1].skipped, rows[0].shares) == (0, 0.5, None)
    text = (tmp_path / "vvs.md").read_text()
    # the fastest line does not count: it is worse than raster order
    assert "vvs-uniform interval=2 delta=0.1 makes 4.00: yes" in text
    assert "lantern delta=0.1 makes 3.00: yes, 133.3% (95%: 133.3% to 133.3%) of its" in text
    assert "2 of 2 videos are ar's" in text


def test_a_sweep_of_speculation_runs_every_line_with_one_drafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdvg.tokens import SpeculativeDecoder

    seen: dict[int, EmbeddedVideos] = {}

    def shown(self: EmbeddedVideos, prompts: list[str], *, frames: int, **_: object) -> list[Shown]:
        seen[id(self)] = self
        counts = stages = None
        if isinstance(self.decoder, SpeculativeDecoder):
            counts, stages = Counts(4, 4, 0, 16), {"draft": 0.1, "target": 0.1}
        return [Shown(i, torch.zeros(1, 3, 32, 32), 4, 0.5, counts, stages) for i in range(frames)]

    monkeypatch.setattr(EmbeddedVideos, "generate", shown)
    methods = ("eagle2", "scd", "vvs-uniform")
    arguments = ["tokens", "sweep", "--table", "vvs", "--quick", "--out", str(tmp_path)]
    assert main([*arguments, "--methods", *methods]) == 0
    with (tmp_path / "vvs.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["method"], row["setting"]) for row in table] == [
        (line.method, line.setting) for line in vvs_sweep.chosen(methods)
    ]
    assert {row["images"] for row in table} == {"2"}
    assert len(seen) == len(table)
    decoders = [videos.decoder for videos in seen.values()]
    trees = [decoder for decoder in decoders if isinstance(decoder, SpeculativeDecoder)]
    assert len({id(decoder.drafter) for decoder in trees}) == 1
    assert {(decoder.depth, decoder.top_k, decoder.nodes) for decoder in trees} == {
        tuple(TREE.values()), tuple(vvs_sweep.WIDE.values()),
    }  # fmt: skip
    weights = digest(embedded.FOLDER, "vq", "model", "drafter")
    assert f"weights {weights}" in (tmp_path / "vvs.md").read_text()


def test_the_committed_table_is_of_the_shipped_weights_and_says_what_the_readme_says() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "digits"
    weights = digest(embedded.FOLDER, "vq", "model", "diagonal")
    assert f"weights {weights}" in (folder / "diagonal.md").read_text(), (
        "the weights changed: run `sdvg tokens sweep --prompts 20` again"
    )
    with (folder / "diagonal.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert {row["mode"] for row in table} == {"raster", "spatial", "spatiotemporal", "zipar", "scd"}
    raster, *others = table
    assert (raster["mode"], raster["passes"]) == ("raster", "2048")
    # an eighth of the passes, fine-tuned: 98% of the quality
    assert any(
        row["tuned"] == "true"
        and int(row["passes"]) * 8 <= 2048
        and float(row["quality"]) >= 0.98 * float(raster["quality"])
        for row in others
    )
    # passes are those of the closed forms
    for row in others:
        k, mode = int(row["k"]), row["mode"]
        closed = {
            "spatial": 8 * (15 * k + 16),
            "spatiotemporal": (8 * 16 - 1) * k + 16,
            "zipar": 8 * (2 * 16 + 14 * k),
        }
        assert mode == "scd" or int(row["passes"]) == closed[mode], row


def test_the_committed_table_of_speculation_is_of_the_shipped_weights() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "digits"
    weights = digest(embedded.FOLDER, "vq", "model", "drafter")
    assert f"weights {weights}" in (folder / "vvs.md").read_text(), (
        "the weights changed: run `sdvg tokens sweep --table vvs` again"
    )
    with (folder / "vvs.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == vvs_sweep.COLUMNS
    assert [(row["method"], row["setting"]) for row in table] == [
        (line.method, line.setting) for line in vvs_sweep.LINES
    ]
    assert {row["method"] for row in table} == {
        "ar", "eagle2", "lantern", "lantern++", "sjd", "scd", "vvs-uniform", "vvs-dynamic",
    }  # fmt: skip
    raster, *others = table
    assert raster["tokens_per_pass"] == "1.000"
    good = [row for row in others if float(row["quality"]) >= float(raster["quality_low"])]
    speed = {
        name: max(float(row["tokens_per_pass"]) for row in good if row["method"].startswith(name))
        for name in ("vvs", "lantern")
    }
    # the targets: as good as raster order, and faster than LANTERN as good
    assert speed["vvs"] >= 2.8
    assert speed["vvs"] > speed["lantern"]
