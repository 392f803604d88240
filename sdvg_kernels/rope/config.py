"""Launch configurations of the Triton rope kernel with their reasons, and its budget.

No GPU was measured. A program is one token row. What limits the kernel, beside memory, is how many
instructions a row costs while its bytes are on their way, so a thread has 32 channels of query, key
and value: addresses, angles and the exchange of sums are then a third of what it runs. `codegen`
shows 730 to 830 instructions in bf16. At 12 heads the two warps run 1460 for the 18 KB of a row,
which take an H200 (4.2 TB/s, 132 multiprocessors at 1.8 GHz) about 1000 cycles of 4 issues each;
at 40 heads the eight warps run 6600 of 13,000. Registers leave room for 9 programs of 12 heads, or
2 of 40: 60 to 80 KB of loads in flight on a multiprocessor, where rate x latency asks for 20. H100,
A100 and RTX 4090 and 5090 have less memory rate for the same issue rate; B200 has 1.7 times the
H200's, and still an issue more than is needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sdvg_kernels import _tuned
from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Launch:
    """The warps of a program."""

    num_warps: int
    reason: str


_HALF = "16 channels a thread: 32 of head dim 64 spill on sm_80 (Triton 3.6 and 3.7)"

# head dim -> (most channels of a tile: heads, rounded up to a power of two, x head dim; launch),
# fewest channels first; not measured
LAUNCHES = {
    128: (
        (1024, Launch(1, "to 8 heads: sums go by shuffles alone, without a barrier")),
        (2048, Launch(2, "1536 channels: 32 a thread")),
        (4096, Launch(4, "3072 channels: 32 a thread")),
        (None, Launch(8, "5120 channels, 8192 with padding: 32 a thread; two programs resident")),
    ),
    64: (
        (512, Launch(1, "to 8 heads: sums go by shuffles alone, without a barrier")),
        (1024, Launch(2, _HALF)),
        (2048, Launch(4, _HALF)),
        (4096, Launch(8, _HALF)),
        (None, Launch(16, _HALF)),
    ),
}
INTERPRETED = Launch(1, "Triton's interpreter")


def choose(tile_heads: int, dim: int, gpu: str | None = None) -> Launch:
    """Return the launch for a tile of `tile_heads` heads, a power of two, of `dim` channels.

    `gpu` is its name, where what was measured on it counts (_tuned.py).
    """
    channels = tile_heads * dim
    most, launch = next(
        entry for entry in LAUNCHES[dim] if entry[0] is None or channels <= entry[0]
    )
    tried = functools.partial(candidates, dim, most)
    return _tuned.choose(OP, key(dim, most), gpu, launch, tried)


OP = "rope"


def key(dim: int, most: int | None) -> str:
    """Return the name of a choice: tiles of at most `most` channels, or of more."""
    return f"D{dim} {'wide' if most is None else f'C{most}'}"


def candidates(dim: int, most: int | None) -> tuple[Launch, ...]:
    """Return the launches that autotune measures, the default first."""
    default = dict(LAUNCHES[dim])[most]
    why = "measured by sdvg_kernels.autotune"
    tried = (Launch(warps, why) for warps in (1, 2, 4, 8, 16) if warps != default.num_warps)
    return (default, *tried)


def budget(e4m3: bool, wide: int, transposed: bool = False) -> Budget:
    """Return what the kernel may cost: no spills, all of it in `wide` 16-byte accesses or more.

    128 registers let two programs of 5120 channels be resident; e4m3, whose 16-byte accesses are 16
    channels wide, takes up to 168 (sm_100): one program of 5120 channels, six of 1536. A transposed
    value, with an address for each byte, takes up to 184: one of 5120 too.
    """
    return Budget(registers=184 if transposed else 168 if e4m3 else 128, wide=wide)
