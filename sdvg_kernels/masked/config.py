"""Launch configurations of tree attention's Triton kernel, with reasons and budgets.

No GPU was measured. Reasons cite arithmetic and what `python -m sdvg_kernels.codegen` shows.

A target pass of speculative decoding feeds some 64 entries: a chain of 5 and a tree of 59. LlamaGen
has as many rows for each head of keys, and a tile of 64 reads the keys once; Cosmos, with 4 heads
that share keys, has 256, and each tile but the first reads the keys again, from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Launch:
    """A tile of BT rows and BS keys, its warps, and the stages of the two key loops."""

    BT: int
    BS: int
    num_warps: int
    num_stages: int
    edge_stages: int
    reason: str
    # programs on a multiprocessor that splits of the keys fill
    programs: int = 1


# 8.x, and 12.x too: both have generations of 99 KB of shared memory
_AMPERE, _HOPPER, _BLACKWELL = 80, 90, 100
_FEW = "m16n8k16 needs no more than 16 rows"
_HUNDRED = "rows of 100 are read in 8 bytes: 64 rows spill"
_SCALAR = "exact float32 products run on FMA units; 4 warps spill"

# (architecture, head dim, is float32) -> (most rows, launch), fewest rows first; None: any
LAUNCHES: dict[tuple[int, int, bool], tuple[tuple[int | None, Launch], ...]] = {
    (_AMPERE, 128, False): (
        (16, Launch(16, 32, 4, 3, 2, f"{_FEW}; 37 KB of shared memory: two programs", 2)),
        (None, Launch(64, 32, 4, 2, 2, "64 keys would spill", 2)),
    ),
    (_AMPERE, 100, False): ((None, Launch(16, 32, 4, 3, 2, _HUNDRED, 2)),),
    (_AMPERE, 64, False): (
        (16, Launch(16, 64, 4, 3, 2, _FEW, 2)),
        (None, Launch(64, 64, 4, 2, 2, "as for head dim 128, at the same bytes", 2)),
    ),
    (_HOPPER, 128, False): (
        (16, Launch(16, 64, 4, 3, 3, f"{_FEW}; 64 KB on their way", 2)),
        (64, Launch(64, 64, 4, 3, 3, "wgmma has 64 rows; 64 KB on their way")),
        (None, Launch(128, 64, 8, 3, 3, "two warpgroups share each key tile: half the L2 reads")),
    ),
    (_HOPPER, 100, False): ((None, Launch(16, 64, 8, 3, 3, f"{_HUNDRED}, and so do 4 warps", 2)),),
    (_HOPPER, 64, False): (
        (16, Launch(16, 128, 4, 3, 3, f"{_FEW}; 64 KB on their way", 2)),
        (None, Launch(64, 64, 4, 4, 2, "wgmma has 64 rows; 128 keys spill; 48 KB on their way", 2)),
    ),
    (_BLACKWELL, 128, False): (
        (16, Launch(16, 64, 4, 3, 3, f"{_FEW}; 64 KB on their way", 2)),
        (None, Launch(64, 64, 8, 3, 3, "tcgen05.mma has 64 rows; 4 warps spill at the edge")),
    ),
    (_BLACKWELL, 100, False): (
        (None, Launch(16, 64, 8, 3, 3, f"{_HUNDRED}, and so do 4 warps", 2)),
    ),
    (_BLACKWELL, 64, False): (
        (16, Launch(16, 64, 4, 4, 3, f"{_FEW}; 128 keys spill; 48 KB on their way", 2)),
        (None, Launch(64, 128, 8, 3, 3, "as for head dim 128")),
    ),
    **{
        (arch, dim, True): ((None, Launch(16, 16, 8, stages, 1, _SCALAR, 2)),)
        # Blackwell spills with two stages
        for arch, stages in ((_AMPERE, 2), (_HOPPER, 2), (_BLACKWELL, 3))
        for dim in (64, 100, 128)
    },
}

# small tiles: inputs that the interpreter can afford still cross tile borders
INTERPRETED = Launch(16, 16, 4, 1, 1, "Triton's interpreter")


def choose(capability: tuple[int, int] | None, dim: int, dtype: torch.dtype, rows: int) -> Launch:
    """Return the launch for a GPU of `capability` (None: the interpreter) and `rows` rows."""
    if capability is None:
        return INTERPRETED
    arch = {9: _HOPPER, 10: _BLACKWELL}.get(capability[0], _AMPERE)
    table = LAUNCHES[arch, dim, dtype == torch.float32]
    return next(launch for most, launch in table if most is None or rows <= most)


# what one program reads, 64 KB on their way, while a launch that depends on it begins (2 us)
_SECOND_LAUNCH_BYTES = 192 << 10


def splits(launch: Launch, tiles: int, key_tiles: int, processors: int, key_tile_bytes: int) -> int:
    """Return in how many parts to split the keys, from shapes alone.

    As many as fill every multiprocessor with `launch.programs`, all resident at once; of the counts
    with the same longest share the smallest. A part has 4 key tiles or more of a cache that is
    full, so that what it writes stays small beside what it reads; with more than 16 rows, whose
    parts take a second launch, it also reads as much as that launch costs.
    """
    least = 4
    if launch.BT > 16:
        least = max(least, -(-_SECOND_LAUNCH_BYTES // key_tile_bytes))
    most = max(1, min(processors * launch.programs // tiles, key_tiles // least, 64))
    return -(-key_tiles // -(-key_tiles // most))


def budget(arch: int, launch: Launch, is_float32: bool) -> Budget:
    """Return what the kernel may cost: no spills; its matrix instruction."""
    if is_float32:
        return Budget()
    wide = {_HOPPER: "HGMMA", _BLACKWELL: "UTC"}.get(arch, "HMMA")
    return Budget(matrix=wide if launch.BT >= 64 else "HMMA")
