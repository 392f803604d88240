"""Launch configuration of the Triton frame kernel, with its reason, and what it may cost.

Not measured on any GPU. Both passes run on tensor cores, because the alternative costs more than
the memory traffic: a gather converts each pixel once for each tap that sees it (5 at 480 -> 224).
One launch serves all GPUs from sm_80 on: it needs under 18 KB of shared memory at that size, under
100 KB at the widest window, and m16n8k16 is everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Launch:
    """A tile of BY x BX output pixels, BR input rows at a time, its warps and stages."""

    BY: int
    BX: int
    BR: int
    num_warps: int
    num_stages: int
    reason: str


# columns that a tile begins at: 16 bytes of bf16
ALIGN = 8
FRAMES = Launch(
    32,
    16,
    32,
    4,
    2,
    "at 480 -> 224, 16 columns see 43 of a window of 64, and 32 would see 78 of 128; 32 rows see 78 "
    "of 96, and 64 would see 147 of 160, but make too few programs",
)
BUDGET = Budget(registers=128, matrix="HMMA")
