"""Launch configurations of the Triton attention kernels with their reasons, and their budgets.

No GPU was measured. Reasons cite arithmetic and what `python -m sdvg_kernels.codegen` shows under
Triton 3.6 and 3.7: registers, spills, shared memory. Measured gains belong in benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Launch:
    """A tile of BT query rows and BS keys, its warps, and the stages of the two key loops."""

    BT: int
    BS: int
    num_warps: int
    num_stages: int
    # stages of the loop over masked tiles: few, so registers matter more than overlap
    edge_stages: int
    reason: str


# 8.x, and 12.x too: both have generations of 99 KB of shared memory
_AMPERE, _HOPPER, _BLACKWELL = 80, 90, 100
_DECODE = (
    "m16n8k16 needs no more than 16 rows; a short query waits for memory, not for the tensor core"
)
_MIDDLE = "one warp per 16 rows; two programs on a multiprocessor hide each other's softmax"
_SCALAR = "exact float32 products run on FMA units: the largest tile without spills"

# (architecture, head dim, is float32) -> (most rows, launch), fewest rows first; None: any
LAUNCHES: dict[tuple[int, int, bool], tuple[tuple[int | None, Launch], ...]] = {
    (_AMPERE, 128, False): (
        (16, Launch(16, 64, 4, 2, 2, _DECODE)),
        (64, Launch(64, 32, 4, 2, 2, f"{_MIDDLE}; 64 keys come within 2 registers of a spill")),
        (None, Launch(128, 64, 8, 2, 2, "64 KB of shared memory; 128 keys would take 96 KB of 99")),
    ),
    (_AMPERE, 64, False): (
        (16, Launch(16, 64, 4, 2, 2, _DECODE)),
        (64, Launch(64, 64, 4, 2, 2, _MIDDLE)),
        (None, Launch(128, 64, 8, 2, 2, "under 192 registers and 32 KB of shared memory")),
    ),
    (_AMPERE, 128, True): ((None, Launch(32, 16, 4, 2, 2, f"{_SCALAR}, at 128 registers")),),
    (_AMPERE, 64, True): ((None, Launch(32, 32, 4, 2, 2, _SCALAR)),),
    (_HOPPER, 128, False): (
        (16, Launch(16, 64, 4, 3, 3, _DECODE)),
        (64, Launch(64, 64, 4, 2, 2, f"wgmma has 64 rows; {_MIDDLE}")),
        (
            None,
            Launch(
                128,
                128,
                8,
                2,
                1,
                "64 keys make wgmma read as many bytes as shared memory delivers, 128 do not; "
                "254 registers: a pipelined edge loop would spill",
            ),
        ),
    ),
    (_HOPPER, 64, False): (
        (16, Launch(16, 64, 4, 3, 3, _DECODE)),
        (64, Launch(64, 64, 4, 3, 3, f"wgmma has 64 rows; {_MIDDLE}")),
        (None, Launch(128, 128, 8, 2, 1, "as for head dim 128")),
    ),
    (_BLACKWELL, 128, False): (
        (16, Launch(16, 64, 4, 3, 3, _DECODE)),
        (64, Launch(64, 64, 4, 2, 2, f"tcgen05.mma has 64 rows; {_MIDDLE}")),
        (None, Launch(128, 128, 8, 2, 1, "tcgen05.mma has 128 rows; 160 KB of shared memory")),
    ),
    (_BLACKWELL, 64, False): (
        (16, Launch(16, 64, 4, 3, 3, _DECODE)),
        (64, Launch(64, 64, 4, 3, 3, f"tcgen05.mma has 64 rows; {_MIDDLE}")),
        (None, Launch(128, 128, 8, 2, 1, "tcgen05.mma has 128 rows")),
    ),
    **{
        (arch, 128, True): ((None, Launch(16, 16, 4, 2, 2, f"{_SCALAR}: 32 rows spill")),)
        for arch in (_HOPPER, _BLACKWELL)
    },
    **{
        (arch, 64, True): ((None, Launch(32, 32, 4, 2, 2, _SCALAR)),)
        for arch in (_HOPPER, _BLACKWELL)
    },
}

# a bias per row and key costs registers that a tile of 128 x 128 does not have
BIASED = Launch(
    128, 64, 8, 2, 2, "128 keys and a key bias spill (Triton 3.6); 64 take 230 registers"
)

# small tiles: inputs that the interpreter can afford still cross tile borders
INTERPRETED = Launch(16, 16, 4, 1, 1, "Triton's interpreter")

COMBINE = Launch(16, 1, 4, 1, 1, "a warp reads 4 rows of a partial; one pass over all splits")


def choose(
    capability: tuple[int, int] | None, dim: int, dtype: torch.dtype, rows: int, biased: bool
) -> Launch:
    """Return the launch for a GPU of `capability` (None: the interpreter) and a query of `rows`."""
    if capability is None:
        return INTERPRETED
    arch = {9: _HOPPER, 10: _BLACKWELL}.get(capability[0], _AMPERE)
    table = LAUNCHES[arch, dim, dtype == torch.float32]
    launch = next(launch for most, launch in table if most is None or rows <= most)
    return BIASED if biased and launch.BT == launch.BS == 128 else launch


def splits(launch: Launch, tiles: int, key_tiles: int, processors: int) -> int:
    """Return in how many parts to split the keys, from shapes alone.

    Splitting pays where the query tiles leave multiprocessors idle; a part has at least 4 key
    tiles, so that reading its partial result back stays small beside reading its keys.
    """
    if tiles * 5 >= processors * 4:
        return 1
    # 16 query rows leave room for two programs on a multiprocessor
    programs = processors * (2 if launch.BT == 16 else 1)
    return max(1, min(programs // tiles, key_tiles // 4, 64))


def budget(arch: int, launch: Launch, dtype: torch.dtype) -> Budget:
    """Return what the attention kernel may cost: no spills; its matrix instruction."""
    if dtype == torch.float32:
        return Budget()
    wide = {_HOPPER: "HGMMA", _BLACKWELL: "UTC"}.get(arch, "HMMA")
    return Budget(matrix=wide if launch.BT >= 64 else "HMMA")


COMBINE_BUDGET = Budget(registers=128)
