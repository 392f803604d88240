"""Launch configurations of the Triton kernels that draft trees, and what they may cost."""

from __future__ import annotations

from dataclasses import dataclass

from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Expand:
    """A program has one beam: a tile of BG groups of 8 tokens at a time."""

    BG: int
    num_warps: int
    reason: str


@dataclass(frozen=True)
class Build:
    """A program has one sequence, BM candidates."""

    BM: int
    num_warps: int
    reason: str


# not measured; finding the K best of a tile takes K maxima over all its warps: few warps meet
# quickly, and 128 threads for 128 tokens keep the compiler from loading these again and again
EXPAND = (
    Expand(128, 4, "8 values a thread: a small vocabulary, where launching is all"),
    Expand(512, 4, "32 values a thread, each with an address of its own"),
    Expand(1024, 4, "64 values a thread, 16 bytes at a time"),
    Expand(2048, 4, "128 values a thread in half as many registers, until they are used"),
)
# a beam is a program, and there are few: asked for none, ptxas spills to fit more of them beside it
EXPAND_MAXNREG = 255
# not measured; a level's scores, ranked by counting
MERGE_WARPS = 8
# not measured; five levels of ten children of ten beams are 410 candidates
BUILD = (
    Build(128, 4, "a candidate a thread"),
    Build(512, 4, "4 candidates a thread"),
    Build(1024, 8, "4 candidates a thread"),
)
BUDGET = Budget(registers=255)


def expand(vocabulary: int, element_size: int, is_aligned: bool) -> Expand:
    """Return the launch for rows of `vocabulary` tokens, in as many tiles as it takes.

    `is_aligned`: groups of tokens are read whole.
    """
    table = EXPAND[: 2 if not is_aligned else 4 if element_size == 2 else 3]
    return next((one for one in table if vocabulary <= 8 * one.BG), table[-1])


def build(count: int) -> Build:
    """Return the launch for `count` candidates."""
    return next(one for one in BUILD if count <= one.BM)
