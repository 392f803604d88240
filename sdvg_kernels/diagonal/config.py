"""Launch configurations of diagonal decoding's Triton kernels, with reasons and budgets.

No GPU was measured. Reasons cite arithmetic and what `python -m sdvg_kernels.codegen` shows.

A pass reads the visible cache once: MineWorld's largest layer holds 5552 slots x 4 heads x 64, 5.7
MB, Cosmos' 10240 x 8 x 128, 42 MB. Row tiles beyond the first read the keys again, from L2: for
head dim 64 that is little, and small tiles can be combined by the last program of each instead of
a second launch, which would cost as much as the keys; for head dim 128 it is not.
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


@dataclass(frozen=True)
class MaskLaunch:
    """A tile of BT rows and BS slots of the mask, and its warps."""

    BT: int
    BS: int
    num_warps: int
    reason: str


MASK = MaskLaunch(8, 256, 4, "a slot's pass takes two divisions, which 8 rows share; 16 bytes each")
MASK_BUDGET = Budget(registers=128)

# 8.x, and 12.x too: both have generations of 99 KB of shared memory
_AMPERE, _HOPPER, _BLACKWELL = 80, 90, 100
_FEW = "m16n8k16 needs no more than 16 rows"
_SMALL = f"{_FEW}; up to 4 tiles share keys in L2, and combine without a second launch"
_HUNDRED = "rows of 100 are read in 8 bytes: 64 rows spill; its models, LlamaGen's, have few"
_SCALAR = "exact float32 products run on FMA units; 4 warps spill"

# (architecture, head dim, is float32) -> (most rows, launch), fewest rows first; None: any
LAUNCHES: dict[tuple[int, int, bool], tuple[tuple[int | None, Launch], ...]] = {
    (_AMPERE, 128, False): (
        (16, Launch(16, 32, 4, 3, 2, f"{_FEW}; 37 KB of shared memory: two programs", 2)),
        (None, Launch(64, 32, 4, 2, 2, "64 keys would spill", 2)),
    ),
    (_AMPERE, 100, False): ((None, Launch(16, 32, 4, 3, 2, _HUNDRED, 2)),),
    (_AMPERE, 64, False): (
        (64, Launch(16, 64, 4, 3, 2, _SMALL, 2)),
        (None, Launch(64, 64, 4, 2, 2, "as for head dim 128, at the same bytes", 2)),
    ),
    (_HOPPER, 128, False): (
        (16, Launch(16, 64, 4, 3, 3, f"{_FEW}; 64 KB on their way", 2)),
        (None, Launch(64, 64, 4, 3, 3, "wgmma has 64 rows; 64 KB on their way")),
    ),
    (_HOPPER, 100, False): ((None, Launch(16, 64, 4, 3, 3, _HUNDRED, 2)),),
    (_HOPPER, 64, False): (
        (64, Launch(16, 128, 4, 3, 3, f"{_SMALL}; 64 KB on their way", 2)),
        (None, Launch(64, 128, 4, 3, 3, "wgmma has 64 rows; 64 KB on their way")),
    ),
    (_BLACKWELL, 128, False): (
        (16, Launch(16, 64, 4, 3, 3, f"{_FEW}; 64 KB on their way", 2)),
        (None, Launch(64, 64, 8, 3, 3, "tcgen05.mma has 64 rows; 4 warps spill at the edge")),
    ),
    (_BLACKWELL, 100, False): ((None, Launch(16, 64, 4, 3, 3, _HUNDRED, 2)),),
    (_BLACKWELL, 64, False): (
        (64, Launch(16, 128, 4, 3, 3, f"{_SMALL}; 64 KB on their way", 2)),
        (None, Launch(64, 128, 8, 3, 3, "as for head dim 128")),
    ),
    **{
        (arch, dim, True): ((None, Launch(16, 16, 8, 2, 1, _SCALAR, 2)),)
        for arch in (_AMPERE, _HOPPER, _BLACKWELL)
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


def splits(launch: Launch, tiles: int, key_tiles: int, processors: int) -> int:
    """Return in how many parts to split the keys, from shapes alone.

    As many as fill every multiprocessor with `launch.programs`, all resident at once; of the counts
    with the same longest share the smallest. A part has 4 key tiles or more of a cache that is
    full, so that what it writes stays small beside what it reads.
    """
    most = max(1, min(processors * launch.programs // tiles, key_tiles // 4, 64))
    return -(-key_tiles // -(-key_tiles // most))


# of the published form at head dim 100, which is for parity, under Triton 3.7.1 alone
PUBLISHED_SPILLS = 16


def budget(arch: int, launch: Launch, is_float32: bool, spill_bytes: int = 0) -> Budget:
    """Return what the attention kernel may cost: no spills; its matrix instruction."""
    if is_float32:
        return Budget()
    wide = {_HOPPER: "HGMMA", _BLACKWELL: "UTC"}.get(arch, "HMMA")
    matrix = wide if launch.BT >= 64 else "HMMA"
    return Budget(matrix=matrix, spill_bytes=spill_bytes)
