"""Launch configurations of the Triton modulation kernel, with their reasons, and its budget.

Not measured on any GPU. The reasons are arithmetic: a multiprocessor must keep some bytes in flight
to reach the memory's bandwidth (bandwidth / multiprocessors x latency: 11 KB on an A100, 8 KB on an
RTX 4090 or 5090, 25 KB on an H100 or H200, 45 KB on a B200). With the registers that codegen shows,
of 64 K that all of these have, every launch for Wan's widths keeps 60 KB or more: one table serves
them all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sdvg_kernels import _tuned
from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Launch:
    """A tile of BT tokens of one frame, their channels in parts of BC (8 a thread); its warps."""

    BT: int
    BC: int
    num_warps: int
    reason: str


_PAIR = "two tokens read the frame's modulation once: half of what x costs the caches, not all"

# (most channels, launch), narrowest first
LAUNCHES = (
    (1024, Launch(2, 256, 1, f"a row is at most 4 loads of one warp, no barrier; {_PAIR}")),
    (2048, Launch(2, 512, 2, f"1536 is 3 whole parts, 48 registers of x; {_PAIR}")),
    (5120, Launch(2, 1024, 4, f"3072 is 3 and 5120 is 5 whole parts, 80 registers; {_PAIR}")),
    (8192, Launch(1, 2048, 8, "4 parts; with 4 warps the fused op spills 8 bytes (Triton 3.7)")),
)


def choose(width: int, tokens: int, gpu: str | None = None) -> Launch:
    """Return the launch for rows of `width` channels, `tokens` of them in a frame.

    `gpu` is its name, where what was measured on it counts (_tuned.py).
    """
    most, launch = next(entry for entry in LAUNCHES if width <= entry[0])
    launch = _tuned.choose(OP, key(most), gpu, launch, functools.partial(candidates, most))
    if tokens >= launch.BT:
        return launch
    # rows past the end of a frame would only be masked
    return Launch(1, launch.BC, launch.num_warps, "a frame has fewer tokens than a tile")


OP = "modulation"


def key(most: int) -> str:
    """Return the name of a choice: rows of at most `most` channels."""
    return f"C{most}"


def candidates(most: int) -> tuple[Launch, ...]:
    """Return the launches that autotune measures for rows of `most` channels, the default first."""
    default = dict(LAUNCHES)[most]
    tried = [
        Launch(tokens, 256 * warps, warps, "measured by sdvg_kernels.autotune")
        for warps in (1, 2, 4, 8)
        for tokens in (1, 2, 4)
        # x of a thread in registers, 8 channels a part
        if tokens * -(-most // (256 * warps)) * 8 <= 96
    ]
    known = _tuned.numbers(default)
    return (default, *(launch for launch in tried if _tuned.numbers(launch) != known))


def budget(wide: int) -> Budget:
    """Return what the kernel may cost: no spills, three programs of 4 warps; all of it `wide`."""
    return Budget(registers=168, wide=wide)
