"""Launch configurations of the Triton quantising kernel, with their reasons, and its budget.

Not measured on any GPU. The reasons are arithmetic: an H200 must keep some 25 KB of reads in flight
on each multiprocessor (bandwidth / multiprocessors x latency). With the registers that codegen
shows 14 warps or more are resident, and each reads 3 KB to 5 KB at once: 60 KB and more.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Launch:
    """One row a program, in parts of BC elements (16 a thread); its warps."""

    BC: int
    num_warps: int
    # whether the row is read twice, because registers do not hold it
    two_passes: bool
    reason: str


# (most elements, launch), narrowest first
LAUNCHES = (
    (2560, Launch(512, 1, False, "1536 is 3 whole parts, 48 values a thread; no barrier")),
    (5120, Launch(1024, 2, False, "3072 is 3 and 5120 is 5 whole parts, 80 values a thread")),
    (8192, Launch(2048, 4, False, "4 parts, 64 values a thread")),
    (16384, Launch(4096, 8, False, "8960 takes 3 parts and 13824 takes 4, 64 values a thread")),
)
WIDEST = Launch(4096, 8, True, "any width: the second read comes from L2")


def choose(width: int) -> Launch:
    """Return the launch for rows of `width` elements."""
    return next((launch for most, launch in LAUNCHES if width <= most), WIDEST)


def budget(wide: int) -> Budget:
    """Return what the kernel may cost: no spills, 14 warps a multiprocessor; `wide` accesses."""
    return Budget(registers=144, wide=wide)
