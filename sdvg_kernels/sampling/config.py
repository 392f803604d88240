"""Launch configurations of the Triton sampling kernel, and what it may cost."""

from __future__ import annotations

from dataclasses import dataclass

from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Launch:
    """A program has one row: tiles of BV tokens for thresholds, of BR for the race."""

    BV: int
    BR: int
    # the whole row is one tile: thresholds are searched in registers
    IS_WHOLE: bool
    num_warps: int
    reason: str


# not measured; 32 values a thread leave registers for the search
WHOLE = (
    Launch(1024, 512, True, 4, "8 values a thread: a small vocabulary, where launching is all"),
    Launch(4096, 1024, True, 4, "32 values a thread; four warps meet quickly"),
    Launch(8192, 2048, True, 8, "32 values a thread"),
    Launch(16384, 2048, True, 16, "32 values a thread; 32 warps would be left half the registers"),
)
TILED = Launch(8192, 2048, False, 8, "a larger row stays in L2, and is read once a step")
BUDGET = Budget(registers=128)


def launch(vocabulary: int) -> Launch:
    """Return the launch for rows of `vocabulary` tokens."""
    return next((one for one in WHOLE if vocabulary <= one.BV), TILED)
