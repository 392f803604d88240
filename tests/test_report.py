"""The report shows what the result files hold, judges it by the targets, and invents nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_attention, bench_attention_backward, bench_cache, report
from benchmarks.harness import RESULTS, Row
from benchmarks.machine import ROOT
from benchmarks.targets import TARGETS

STEADY = "B=1 T=4680 H=12 D=128 S=32760"
PENDING = "B=1 T=14040 H=12 D=128 S=42120 window=32760 blocks=3"


def row(op: str, shape: str, implementation: str, us: float, **fields: object) -> Row:
    """Return a made-up row: of no GPU that exists, and only ever written to a test's folder."""
    made: dict[str, object] = {
        "dtype": "bfloat16",
        "peer": False,
        "tflops": None,
        "gbps": None,
        "limit_share": None,
        "best_peer": None,
        "ratio": None,
        "limits": {"GB/s": 1000.0, "TFLOP/s": 100.0, "us for a launch": 1.0},
        "verified": True,
        "gpu": "Imaginary H200",
        "commit": "0123456789ab",
        "versions": {"torch": "2.0"},
    }
    return Row(op=op, shape=shape, implementation=implementation, us=us, **{**made, **fields})


ROWS = [
    row("block_causal_attention", STEADY, "hopper", 100.0, tflops=90.0, gbps=9.0, ratio=1.2,
        limit_share=0.9, best_peer="sdpa-cudnn"),
    row("block_causal_attention", STEADY, "triton", 150.0, tflops=60.0, gbps=6.0, ratio=0.8,
        limit_share=0.6, best_peer="sdpa-cudnn"),
    row("block_causal_attention", STEADY, "sdpa-cudnn", 120.0, tflops=75.0, gbps=7.5, peer=True),
    row("block_causal_attention", PENDING, "hopper", 360.0, tflops=75.0, gbps=7.0, ratio=1.5),
    row("block_causal_attention", PENDING, "flex", 720.0, tflops=37.5, gbps=3.5, peer=True),
    row("stage_", "1.3B layers=30 B=1 T=4680 S=9 H=12 D=128", "cuda", 10.0, gbps=900.0, ratio=2.0),
    row("stage_", "1.3B layers=30 B=1 T=4680 S=9 H=12 D=128", "clone-and-roll", 150.0, gbps=60.0,
        peer=True),
    row("commit_", "B=64", "cuda", 2.5),
]  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Return a folder with made-up results and a page with markers, as `make report` leaves it."""
    folder = tmp_path / "results" / "imaginary-h200"
    folder.mkdir(parents=True)
    (folder / "bench_all.json").write_text(json.dumps([entry._asdict() for entry in ROWS]))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    arguments = ["--results", str(tmp_path / "results"), "--readme", str(readme)]
    assert report.main(arguments) == 0
    return tmp_path


def line(page: str, start: str, word: str = "") -> str:
    """Return the one line that begins with `start` and has `word`."""
    (found,) = (text for text in page.splitlines() if text.startswith(start) and word in text)
    return found


def test_only_what_is_between_the_markers_is_replaced(written: Path) -> None:
    text = (written / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text


def test_targets_are_judged_by_our_best_row_of_each_shape(written: Path) -> None:
    text = (written / "README.md").read_text()
    assert line(text, "| attention bf16, H=12").endswith("| 1.20x | yes |")
    assert line(text, "| the same, S=32760").endswith("| 90% | yes |")
    assert line(text, "| three pending blocks").endswith("| 2.00x | yes |")
    # 90 TFLOP/s over 75
    assert line(text, "| the same |", "rate of T=4680").endswith("| 1.20x | 0 of 1 shapes |")
    assert line(text, "| rollback_ with undo").endswith("| 90% | yes |")
    assert line(text, "| the same |", "clone-and-shift").endswith("| 15.00x | 0 of 1 shapes |")
    assert line(text, "| commit_").endswith("| 2.50 us | yes |")
    assert line(text, "| attention FP8").endswith("| not measured | not measured |")


def test_losing_rows_are_shown(written: Path) -> None:
    text = (written / "README.md").read_text()
    start = f"| {STEADY} | bfloat16 | triton | 150 | 60 TFLOP/s | 60% | sdpa-cudnn | 0.80 |"
    assert "1.10x the best peer: not met (0.80x)" in line(text, start)


def test_every_figure_of_ours_is_on_the_page_and_peers_have_no_line(written: Path) -> None:
    text = (written / "README.md").read_text()
    table = [text for text in text.splitlines() if text.count("|") == 10]
    # three tables with two lines of heading each
    assert len(table) == sum(not entry.peer for entry in ROWS) + 2 * 3


def test_the_plots_follow_from_the_rows_alone(written: Path) -> None:
    folder = written / "results" / "imaginary-h200"
    before = (folder / "roofline.svg").read_bytes()
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")
    report.plot(ROWS, folder)
    assert (folder / "roofline.svg").read_bytes() == before


@pytest.mark.parametrize("fields", [{"gpu": "cpu"}, {"verified": False}])
def test_what_is_no_verified_row_of_a_gpu_is_refused(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    (tmp_path / "gpu").mkdir()
    entry = ROWS[0]._replace(**fields)._asdict()
    (tmp_path / "gpu" / "bench_x.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="must hold verified rows of a GPU"):
        report.read(tmp_path)


def test_a_page_without_markers_is_left_alone() -> None:
    with pytest.raises(ValueError, match="must have one"):
        report.replaced(f"{report.END} {report.BEGIN}", "text")


def test_without_results_every_target_is_not_measured(tmp_path: Path) -> None:
    text = report.page(report.read(tmp_path), tmp_path)
    assert text.count("| not measured | not measured |") == len(TARGETS)
    assert "No GPU has been measured yet" in text


def test_every_target_of_attention_and_cache_is_about_a_shape_that_is_measured() -> None:
    eight_bits = {"dtype": "float8_e4m3fn"}
    planned = [
        row("block_causal_attention", str(shape), "hopper", 1.0, **fields)
        for shape in bench_attention.shapes(cpu=False, quick=False)
        for fields in ({}, eight_bits)
    ]
    planned += [
        row("block_causal_attention backward", str(shape), "triton", 1.0)
        for shape in bench_attention_backward.shapes(cpu=False, quick=False)
    ]
    size = str(bench_cache.Size("1.3B", 30, 12))
    planned += [row(op, size, "cuda", 1.0) for op in ("rollback_", "compact_", "stage_")]
    planned += [row(op, "B=64", "cuda", 1.0) for op in ("commit_", "select_")]
    counts = {target.what: sum(map(target.about, planned)) for target in TARGETS}
    elsewhere = {"rope", "modulation", "frames", "quantize"}
    others = ("a ", "an ", "drafted trees", "SDVG", "norm and SiLU")
    elsewhere |= {what for what in counts if what.startswith(others)}
    # a line "the same" is about what the line above it is about
    assert {what: count for what, count in counts.items() if what[:8] != "the same"} == {
        "attention bf16, H=12, B=1, T=4680, S 4680 to 32760": 4,
        "attention bf16, H=40, B=1, T=4680, S 4680 to 32760": 4,
        "attention bf16, T=1560, H=12, S=9360": 1,
        "three pending blocks in one pass (T=14040, window of 21 frames)": 2,
        "attention FP8, T=4680, S=32760": 2,
        "attention backward, clips of 21 frames in blocks of 3, H=12": 2,
        "attention bf16, T in {1, 16, 64}, S=16384": 6,
        "commit_, rollback_ without undo, 40 layers": 1,
        "rollback_ with undo, compact_, select_, stage_, 4680 rows x 30 layers": 4,
        **dict.fromkeys(elsewhere, 0),
    }


def test_targets_of_the_loop_read_its_own_rows() -> None:
    pair = "Wan 1.3B for 14B 480x832 B=1"
    block = "480x832 B=1 window=6 steps=4 and a clean pass"
    eight_bits = {"dtype": "float8_e4m3fn"}
    rows = [
        row("draft_block", f"Wan 1.3B {block}", "graphs", 160e3),
        row("target_block", f"Wan 14B {block}", "graphs", 0.9e6, **eight_bits),
        row("vae_decode", "B=1 F=12 H=480 W=832 C=96", "fused", 130e3),
    ]
    for kept, decided, us in ((8, 11, 0.5e6), (8, 9, 0.4e6)):
        frames, blocks = 12 * decided + 9, decided + 1
        shape = f"{pair} kept={kept} decided={decided} frames={frames} accelerated, graphs"
        fields = eight_bits | {"ratio": 2.0}
        rows.append(row("generate", f"{shape} blocks={blocks}", "sdvg", us, **fields))
        rows.append(row("generate", f"{shape} blocks={blocks}", "draft-only", us, **fields))
    alone = "Wan 1.3B alone 480x832 B=1 window=12 sink=3, tiny decoder"
    for op, us, counts in (
        ("diagonal video", 0.35e6, "frames=81 blocks=7"),
        ("first frames", 0.4e6, "frames=9 blocks=1"),
    ):
        rows.append(row(op, f"{alone} {counts} graphs", "one in flight", us))
        rows.append(row(op, f"{alone} {counts} graphs", "two in flight", us / 2))
    judged = [
        (target.bound, round(found[0], 2), found[1])
        for target in TARGETS
        for entry in rows
        if (found := target.judge(entry, rows))
    ]
    assert judged == [
        ("170 ms", 160.0, True),
        ("0.80 s", 0.9, False),
        ("120 ms", 130.0, False),
        ("31 FPS", 33.06, True),
        ("0.37 s", 0.4, False),
        ("16 FPS", 23.5, True),
        ("1.9x our own target-only", 2.0, True),
        ("24 FPS", 29.25, True),
        ("2.6x our own target-only", 2.0, False),
    ]


def test_the_target_of_token_frames_reads_how_many_fewer_passes_there_are() -> None:
    small, part = "MineWorld 300M 14x24", "Cosmos 4B (10 of 40 rows) 10x64"
    rows = [
        row("token frame", f"{small} spatial k=1 passes=37 raster=336", "spatial", 1.0, ratio=8.4),
        row("token frame", f"{part} spatial k=1 passes=73 raster=640", "spatial", 1.0, ratio=6.4),
        # drafts are no fewer passes that a schedule promises
        row("token frame, lossless", f"{small} scd window=16 passes=99 raster=336 tokens/pass=3.4",
            "scd", 1.0, ratio=2.0),
    ]  # fmt: skip
    judged = [
        (target.bound, round(found[0], 3), found[1])
        for target in TARGETS
        for entry in rows
        if (found := target.judge(entry, rows))
    ]
    assert judged == [
        ("0.8 of the fewer passes", 0.925, True),
        ("0.8 of the fewer passes", 0.73, False),
    ]


def test_targets_of_speculation_read_its_rows() -> None:
    image = "LlamaGen-XL 32x32"
    step = "LlamaGen-XL nodes=59 levels=5 beams=10 B=1"
    rows = [
        row("token image", f"{image} EAGLE-2 passes=840 raster=1024", "EAGLE-2", 1.0, ratio=1.1),
        row("token image", f"{image} LANTERN passes=560 raster=1024", "LANTERN", 1.0, ratio=1.5),
        row("token image", f"{image} VVS passes=512 raster=1024", "VVS", 1.0, ratio=1.6),
        row("speculative step", step, "trees, verification, compaction", 30.0),
        row("speculative step", step, "a step", 660.0, peer=True),
    ]
    judged = [
        (target.bound, round(found[0], 3), found[1])
        for target in TARGETS
        for entry in rows
        if (found := target.judge(entry, rows))
    ]
    assert judged == [
        ("above 1.0x", 1.1, True),
        ("0.85 of the fewer passes", 0.8, False),
        ("a 20th of the step", 22.0, True),
    ]


def test_the_page_is_what_the_committed_results_give() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    fresh = report.replaced(text, report.page(report.read(RESULTS), ROOT / "benchmarks"))
    assert fresh == text, "make report"
