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
    """A tile of BY x BX outputs, from BR input rows at a time in parts of BK columns; its warps."""

    BY: int
    BX: int
    BR: int
    BK: int
    num_warps: int
    # of the loop over rows
    num_stages: int
    reason: str


# columns that a tile begins at: 16 bytes of bf16
ALIGN = 8
_ROWS = "two warps have 16 rows each, so that no pixel is converted twice"
# (largest reduction, launch, columns of the widest window)
LAUNCHES = (
    (
        4,
        Launch(
            32,
            32,
            32,
            32,
            2,
            2,
            "at 480 -> 224 the tile sees 78 of 96 rows and 85 of 96 columns that it converts; 64 "
            f"rows would waste less, but take 176 registers for 140; {_ROWS}",
        ),
        160,
    ),
    (
        10,
        Launch(32, 16, 32, 32, 2, 2, f"32 columns would see 368, and spill on sm_80; {_ROWS}"),
        224,
    ),
)
BUDGET = Budget(registers=200, matrix="HMMA")


def choose(reduction: float) -> Launch:
    """Return the launch for a side that becomes `reduction` times smaller."""
    return next(launch for most, launch, _ in LAUNCHES if reduction <= most)
