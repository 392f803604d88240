"""Launch configurations of the Triton norm kernel, with their reasons, and its budget.

Not measured on any GPU. The reasons are arithmetic: the kernel only moves rows, so a multiprocessor
must keep enough bytes in flight (an H200: 25 KB, modulation/config.py). A tile is 1024 elements of
each part, 8 a thread: with Wan's three parts a program loads 6 KB of x and as much of the residual,
and the registers that codegen shows (40 to 52) let 9 programs run beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdvg_kernels._budget import Budget

# the widest part of a row, and the most parts: a row lies in registers
WIDEST, PARTS = 1024, 8
MAX_WIDTH = WIDEST * PARTS


@dataclass(frozen=True)
class Launch:
    """A tile of BT rows, their channels in parts of BC (8 a thread); its warps."""

    BT: int
    BC: int
    num_warps: int
    reason: str


_WHOLE = "the largest power of two in the width: Wan's 96, 192 and 384 are three whole parts each"
_MASKED = "the width has no large power of two: its last part is masked"


def choose(width: int) -> Launch:
    """Return the launch for rows of `width` channels."""
    whole = width & -width
    if 32 <= whole and width // whole <= PARTS:
        part, reason = min(whole, WIDEST), _WHOLE
    else:
        # a power of two at or above the width, cut into at most PARTS
        above = 1 << (width - 1).bit_length()
        part, reason = min(max(above // PARTS, 32), above, WIDEST), _MASKED
    return Launch(1024 // part, part, 4, reason)


def budget(width: int, wide: int) -> Budget:
    """Return what the kernel may cost: no spills; 7 programs of 4 warps at Wan's widths, else 3."""
    three = width <= 3 * choose(width).BC
    return Budget(registers=72 if three else 168, wide=wide)
