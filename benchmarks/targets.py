"""What the kernels are to reach on one H200, each as a ratio of figures of one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.harness import Row

# (a row of ours, all rows of its run) -> the figure, or None where the run does not have it
Figure = Callable[[Row, Sequence[Row]], float | None]
_ATTENTION = "block_causal_attention"
_STEADY = {"B": 1, "T": 4680, "D": 128}


@dataclass(frozen=True)
class Target:
    """A bound on a figure of the rows that it is about."""

    what: str
    bound: str
    about: Callable[[Row], bool]
    figure: Figure
    least: float | None = None
    most: float | None = None

    def judge(self, row: Row, rows: Sequence[Row]) -> tuple[float, bool] | None:
        """Return (the figure, whether the bound holds); None: not about the row, or no figure."""
        if row.peer or not self.about(row) or (figure := self.figure(row, rows)) is None:
            return None
        above = self.least is None or figure >= self.least
        return figure, above and (self.most is None or figure <= self.most)


def sizes(shape: str) -> dict[str, int]:
    """Return the sizes that a row's shape names: "B=1 T=4680" -> {"B": 1, "T": 4680}."""
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", shape)}


def case(row: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the rows that were timed in turn with `row`, itself included."""
    same = (row.op, row.shape, row.dtype)
    return [other for other in rows if (other.op, other.shape, other.dtype) == same]


def _attention(dtype: str = "bfloat16", **fixed: int) -> Callable[[Row], bool]:
    """Return whether a row is attention at these sizes, in a ring that sees all it holds."""
    plain = {"sink", "window", "blocks", "L"} - set(fixed)

    def about(row: Row) -> bool:
        named = sizes(row.shape)
        fits = all(named.get(name) == value for name, value in fixed.items())
        return row.op == _ATTENTION and row.dtype == dtype and fits and not plain & set(named)

    return about


def _ops(*names: str, **fixed: int) -> Callable[[Row], bool]:
    def about(row: Row) -> bool:
        named = sizes(row.shape)
        # select_ moves the decoder's features: its shape names no layers
        free = row.op == "select_"
        return row.op in names and (free or all(named.get(n) == v for n, v in fixed.items()))

    return about


def _starts(*names: str) -> Callable[[Row], bool]:
    return lambda row: row.op.startswith(names)


def _ratio(row: Row, rows: Sequence[Row]) -> float | None:
    return row.ratio


def _of_copy(row: Row, rows: Sequence[Row]) -> float | None:
    return row.gbps and row.gbps / row.limits["GB/s"]


def _of_products(row: Row, rows: Sequence[Row]) -> float | None:
    return row.tflops and row.tflops / row.limits["TFLOP/s"]


def _microseconds(row: Row, rows: Sequence[Row]) -> float | None:
    return row.us


def _against(word: str) -> Figure:
    """Return the figure: the time of the case's fastest row whose name has `word` / the row's."""

    def figure(row: Row, rows: Sequence[Row]) -> float | None:
        times = [
            other.us for other in case(row, rows) if word in other.implementation and other != row
        ]
        return min(times) / row.us if times else None

    return figure


def _dense_rate_share(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the row's time / that of its FLOP at the rate of one block over as many keys."""
    about = _attention(**_STEADY, S=32760, H=sizes(row.shape)["H"])
    rates = [
        other.tflops
        for other in rows
        if about(other) and other.implementation == row.implementation and other.tflops
    ]
    return max(rates) / row.tflops if rates and row.tflops else None


def _in_eight_bits(row: Row) -> bool:
    at = _attention("float8_e4m3fn", **_STEADY, S=32760)
    return at(row) and "(bfloat16)" not in row.implementation


def _milliseconds(row: Row, rows: Sequence[Row]) -> float | None:
    return row.us / 1e3


def _seconds(row: Row, rows: Sequence[Row]) -> float | None:
    return row.us / 1e6


def _frames_per_second(row: Row, rows: Sequence[Row]) -> float | None:
    named = sizes(row.shape)
    return 1e6 * named["frames"] / (row.us * named["blocks"])


def _share_of_passes(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the speed-up over raster order / how many times fewer passes there are."""
    named = sizes(row.shape)
    return row.ratio and row.ratio * named["passes"] / named["raster"]


def _block(op: str, size: str, dtype: str) -> Callable[[Row], bool]:
    shape = f"Wan {size} 480x832 B=1 window=6"
    return lambda row: row.op == op and row.shape.startswith(shape) and row.dtype == dtype


def _kept(kept: int, decided: int, dtype: str = "float8_e4m3fn") -> Callable[[Row], bool]:
    """Return whether a row is the whole loop for Wan's 14B with this share of drafts kept."""

    def about(row: Row) -> bool:
        named = sizes(row.shape)
        share = (named.get("kept"), named.get("decided")) == (kept, decided)
        pair = row.op == "generate" and row.shape.startswith("Wan 1.3B for 14B 480x832")
        return pair and share and row.dtype == dtype and row.implementation == "sdvg"

    return about


def _streamed(op: str) -> Callable[[Row], bool]:
    """Return whether a row is 1.3B alone on the diagonal schedule, one block after the other."""
    shape, turn = "Wan 1.3B alone 480x832", "one in flight"
    return lambda row: row.op == op and row.shape.startswith(shape) and row.implementation == turn


def _decoded(row: Row) -> bool:
    fits = row.shape.startswith("B=1 F=12 H=480 W=832")
    return row.op == "vae_decode" and fits and row.dtype == "bfloat16"


def _verified(row: Row) -> bool:
    sized = {"B": 16, "V": 16384, "N": 59}.items() <= sizes(row.shape).items()
    return row.op.startswith("verify_") and sized


_PENDING = _attention(B=1, T=14040, D=128, window=32760, blocks=3)
_FEW = "attention bf16, T in {1, 16, 64}, S=16384"
_ROPE = _starts("norm_rope")
_MODULATION = _starts("modulated_layer_norm", "gated_residual")
_LARGE_MOVES = ("rollback_", "compact_", "select_", "stage_", "stage_ with undo")


def _few(row: Row) -> bool:
    return any(_attention(B=1, T=rows, S=16384, D=128)(row) for rows in (1, 16, 64))


TARGETS = (
    Target(
        "attention bf16, H=12, B=1, T=4680, S 4680 to 32760",
        "1.10x the best peer",
        _attention(**_STEADY, H=12),
        _ratio,
        least=1.10,
    ),
    Target(
        "the same, S=32760",
        "85% of the measured bf16 product",
        _attention(**_STEADY, H=12, S=32760),
        _of_products,
        least=0.85,
    ),
    Target(
        "attention bf16, H=40, B=1, T=4680, S 4680 to 32760",
        "1.00x the best peer",
        _attention(**_STEADY, H=40),
        _ratio,
        least=1.00,
    ),
    Target(
        "attention bf16, T=1560, H=12, S=9360",
        "1.4x the best peer",
        _attention(B=1, T=1560, D=128, H=12, S=9360),
        _ratio,
        least=1.4,
    ),
    Target(
        "three pending blocks in one pass (T=14040, window of 21 frames)",
        "1.5x FlexAttention",
        _PENDING,
        _against("flex"),
        least=1.5,
    ),
    Target(
        "the same",
        "at most 1.10x the time of its FLOP at the rate of T=4680, S=32760",
        _PENDING,
        _dense_rate_share,
        most=1.10,
    ),
    Target(
        "attention FP8, T=4680, S=32760",
        "1.5x ours in bf16",
        _in_eight_bits,
        _against("(bfloat16)"),
        least=1.5,
    ),
    Target(
        "attention backward, clips of 21 frames in blocks of 3, H=12",
        "0.9 of FlexAttention's speed",
        lambda row: row.op == f"{_ATTENTION} backward" and sizes(row.shape).get("blocks") == 7,
        _against("flex"),
        least=0.9,
    ),
    Target(_FEW, "80% of the measured copy", _few, _of_copy, least=0.80),
    Target("rope", "85% of the measured copy", _ROPE, _of_copy, least=0.85),
    Target("rope", "10x the eager chain", _ROPE, _against("eager"), least=10),
    Target("modulation", "85% of the measured copy", _MODULATION, _of_copy, least=0.85),
    Target(
        "norm and SiLU of the decoder",
        "85% of the measured copy",
        _starts("rms_norm_silu"),
        _of_copy,
        least=0.85,
    ),
    Target("frames", "85% of the measured copy", _ops("preprocess_frames"), _of_copy, least=0.85),
    Target("quantize", "85% of the measured copy", _ops("quantize_rows"), _of_copy, least=0.85),
    Target(
        "a pass of diagonal decoding, MineWorld 300M and Cosmos 4B, weights and cache read once",
        "50% of the measured copy",
        _ops("token pass"),
        _of_copy,
        least=0.5,
    ),
    Target(
        "a frame of MineWorld 300M, 10 rows of Cosmos 4B along diagonals, against our raster order",
        "0.8 of the fewer passes",
        _ops("token frame"),
        _share_of_passes,
        least=0.8,
    ),
    Target(
        "an image of LlamaGen-XL's size by EAGLE-2, 1.22 tokens a pass, against our raster order",
        "above 1.0x",
        lambda row: row.op == "token image" and row.implementation == "EAGLE-2",
        _ratio,
        least=1.0,
    ),
    Target(
        "the same by VVS, every other step skipped",
        "0.85 of the fewer passes",
        lambda row: row.op == "token image" and row.implementation == "VVS",
        _share_of_passes,
        least=0.85,
    ),
    Target(
        "drafted trees, verification and compaction of a speculative step",
        "a 20th of the step",
        _ops("speculative step"),
        _against("a step"),
        least=20.0,
    ),
    Target(
        "commit_, rollback_ without undo, 40 layers",
        "under 3 us",
        _ops("commit_", "rollback_ of nothing"),
        _microseconds,
        most=3.0,
    ),
    Target(
        "rollback_ with undo, compact_, select_, stage_, 4680 rows x 30 layers",
        "85% of the measured copy",
        _ops(*_LARGE_MOVES, layers=30, T=4680),
        _of_copy,
        least=0.85,
    ),
    Target(
        "the same",
        "20x clone-and-shift",
        _ops(*_LARGE_MOVES, layers=30, T=4680),
        _against("clone-and-roll"),
        least=20,
    ),
    Target(
        "drafted trees and chains of 59 nodes verified by each rule, B=16, V=16384",
        "under 30 us",
        _verified,
        _microseconds,
        most=30.0,
    ),
    Target(
        "a draft block: Wan 1.3B, four steps and the clean pass, window of 6 frames",
        "170 ms",
        _block("draft_block", "1.3B", "bfloat16"),
        _milliseconds,
        most=170,
    ),
    Target(
        "a target block: Wan 14B, the same, in e4m3",
        "0.80 s",
        _block("target_block", "14B", "float8_e4m3fn"),
        _seconds,
        most=0.80,
    ),
    Target(
        "a target block: Wan 14B, the same, in bf16",
        "1.25 s",
        _block("target_block", "14B", "bfloat16"),
        _seconds,
        most=1.25,
    ),
    Target("a decoded block of 12 frames, 480x832", "120 ms", _decoded, _milliseconds, most=120),
    Target(
        "a video of Wan 1.3B alone, 4, 3, then 2 steps a block, tiny decoder",
        "31 FPS",
        _streamed("diagonal video"),
        _frames_per_second,
        least=31,
    ),
    Target(
        "the same, its first 9 frames from the call on",
        "0.37 s",
        _streamed("first frames"),
        _seconds,
        most=0.37,
    ),
    Target(
        "SDVG, 1.3B for 14B, 73.1% of the drafts kept (8 of 11), scorer not counted",
        "16 FPS",
        _kept(8, 11),
        _frames_per_second,
        least=16,
    ),
    Target("the same", "1.9x our own target-only", _kept(8, 11), _ratio, least=1.9),
    Target(
        "SDVG, 1.3B for 14B, 88.9% of the drafts kept (8 of 9), scorer not counted",
        "24 FPS",
        _kept(8, 9),
        _frames_per_second,
        least=24,
    ),
    Target("the same", "2.6x our own target-only", _kept(8, 9), _ratio, least=2.6),
)
