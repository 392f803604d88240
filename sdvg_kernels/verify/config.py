"""Launch configuration of the Triton routing kernel, and what it may cost."""

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
