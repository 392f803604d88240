"""Launch configurations of the Triton kernels of this room, and what they may cost."""

from __future__ import annotations

from dataclasses import dataclass

from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Launch:
    """A tile of BB sequences and BF frames, and its warps."""

    BB: int
    BF: int
    num_warps: int
    reason: str


# a block has 9 to 12 frames and a batch a few sequences: the launch is all that it costs
ROUTE = Launch(8, 16, 1, "one warp reads a batch of 8 in one step")
BUDGET = Budget(registers=96)


@dataclass(frozen=True)
class RowLaunch:
    """A program has one row of logits: tiles of BV tokens for thresholds, of BR for the race."""

    BV: int
    BR: int
    # the whole row is one tile: thresholds are searched in registers
    IS_WHOLE: bool
    num_warps: int
    reason: str


# not measured; the sizes of `sample_tokens`, and for the same reasons
WHOLE = (
    RowLaunch(1024, 512, True, 4, "8 values a thread: a small vocabulary, where launching is all"),
    RowLaunch(4096, 1024, True, 4, "32 values a thread; four warps meet quickly"),
    RowLaunch(8192, 2048, True, 8, "32 values a thread"),
    RowLaunch(16384, 2048, True, 16, "32 values a thread; a race of 4 needs no more registers"),
)
TILED = RowLaunch(4096, 1024, False, 4, "a larger row stays in L2, and is read once a step")
# not measured; neighbours that are looked up at once, of up to 1000 that lie scattered: most sums
# reach their bound within the first few hundred
NEIGHBOURS = 512


@dataclass(frozen=True)
class SumLaunch:
    """A program sums a row of probabilities in tiles of BV tokens."""

    BV: int
    num_warps: int
    reason: str


SUMS = SumLaunch(2048, 4, "not measured; 16 values a thread, a drafter's rows are few")
# siblings that a row's children are compared with at once: a tile of 64 x 8 is small beside a row
SIBLINGS = 8
ROW_BUDGET = Budget(registers=168)
# one program a sequence: there is room for as many registers as ptxas likes
WALK_BUDGET = Budget(registers=232)


def row_launch(vocabulary: int) -> RowLaunch:
    """Return the launch for rows of `vocabulary` tokens."""
    return next((one for one in WHOLE if vocabulary <= one.BV), TILED)
