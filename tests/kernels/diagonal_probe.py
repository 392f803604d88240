"""A kernel that asks the rule of diagonal decoding where the edge begins."""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sdvg_kernels.diagonal.rule import GRID, first_undecoded


@triton.jit(do_not_specialize=("S", *GRID))
def _probe(out, S, prefix, height, width, row_stride, frame_stride, k, lead, frame_passes) -> None:
    grid = (prefix, height, width, row_stride, frame_stride, k, lead, frame_passes)
    step = tl.program_id(0)
    tl.store(out + step, first_undecoded(step, S, grid))


def first_slots(steps: int, size: int, grid: list[int], device: str) -> list[int]:
    """Return the first slot that is not decoded before each of the first `steps` passes."""
    out = torch.empty(steps, dtype=torch.int32, device=device)
    _probe[(steps,)](out=out, S=size, **dict(zip(GRID, grid, strict=True)))
    return out.tolist()
