"""`diagonal_mask`: what the entries of a pass of diagonal decoding see."""

from __future__ import annotations

import functools

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import require, require_dtype, require_implementation
from sdvg_kernels.diagonal import reference
from sdvg_kernels.diagonal.schedule import TokenGrid


def diagonal_mask(
    slots: torch.Tensor,
    steps: torch.Tensor,
    grid: TokenGrid,
    size: int,
    *,
    cache_leftpad: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bool,
    packed: bool = False,
    implementation: str | None = None,
) -> torch.Tensor:
    """Return which cache slots each entry of a pass sees, for models that take a mask.

    Entry `(b, t)` sees key slot `s` if `s <= slots[b, t]` and `s` is its own slot, or holds no
    token of the grid (prefix, extra tokens, ends of lines), or the token of a pass before
    `steps[b, t]`. 2 x 4 tokens, k = 2, prefix 1, pass 4 (`x` seen; `?` is not decoded yet):

        slot            0 | 1 2 3 4 | 5 6 7 8
        token           p   0 1 2 3   4 5 ? ?
        entry of slot 4 x   x x x x   . . . .     a fill: row 0 is whole
        entry of slot 6 x   x x x x   x x . .     gives the token of slot 7

    Args:
        slots: [B, T] int32, any strides: a `DiagonalSchedule`'s, of one pass or of several; -1 is
            padding and sees nothing.
        steps: [B, T] int32, any strides: its `steps`.
        grid: the layout, a `DiagonalSchedule`'s `grid`.
        size: S, slots of the cache.
        cache_leftpad: [B] int32, slots at the start of a sequence that nobody sees; None: 0.
        dtype: bool; or a floating dtype for an additive mask: 0 where seen, elsewhere its lowest
            finite number, so that a row of padding gives no NaN.
        packed: bits instead: uint8, bit `s % 8` of byte `s // 8`; `dtype` must be bool.
        implementation: "reference"; None: the same.

    Returns: [B, T, S], or [B, T, ceil(S / 8)] with `packed`, contiguous.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: Diagonal Decoding (arXiv 2503.14070), the rule of its released loop without the slots
    that are not decoded yet. Cost: the bytes of the mask, once.
    """
    op = "diagonal_mask"
    _check_entries(op, slots, steps, grid, cache_leftpad)
    require(op, size >= 1, "size", "be at least 1", size)
    known = dtype == torch.bool or dtype.is_floating_point
    require_dtype(op, known, "dtype", "be bool or floating", dtype)
    fits = not packed or dtype == torch.bool
    require(op, fits, "dtype", "be bool for a packed mask", dtype)
    device = slots.device.type
    chosen = require_implementation(op, implementation, {"reference": ""}, f"{device} tensors")
    return torch.ops.sdvg_kernels.diagonal_mask(
        slots, steps, size, _numbers(grid), cache_leftpad, dtype, packed, chosen
    )


def _check_entries(
    op: str,
    slots: torch.Tensor,
    steps: torch.Tensor,
    grid: TokenGrid,
    cache_leftpad: torch.Tensor | None,
) -> None:
    """Raise unless slots, steps and cache_leftpad are as the contracts say."""
    require(op, slots.dim() == 2, "slots", "be [B, T]", slots.shape)
    require_dtype(op, slots.dtype == torch.int32, "slots", "be int32", slots.dtype)
    require(op, steps.shape == slots.shape, "steps", "have the shape of slots", steps.shape)
    require_dtype(op, steps.dtype == torch.int32, "steps", "be int32", steps.dtype)
    require(op, steps.device == slots.device, "steps", "be on slots' device", steps.device)
    known = isinstance(grid, TokenGrid)
    require_dtype(op, known, "grid", "be a TokenGrid", type(grid).__name__)
    if cache_leftpad is not None:
        pad = cache_leftpad
        require(op, pad.shape == slots.shape[:1], "cache_leftpad", "be [B]", pad.shape)
        require_dtype(op, pad.dtype == torch.int32, "cache_leftpad", "be int32", pad.dtype)
        here = pad.device == slots.device
        require(op, here, "cache_leftpad", "be on slots' device", pad.device)


@functools.cache
def _numbers(grid: TokenGrid) -> list[int]:
    """Return the grid as the ops take it."""
    sizes = [grid.prefix, grid.height, grid.width, grid.row_stride, grid.frame_stride]
    return [*sizes, grid.k, grid.lead, grid.frame_passes]


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    return {"reference": ""}


def _run_mask(
    slots: torch.Tensor,
    steps: torch.Tensor,
    size: int,
    grid: list[int],
    cache_leftpad: torch.Tensor | None,
    dtype: torch.dtype,
    packed: bool,
    implementation: str,
) -> torch.Tensor:
    """Run the chosen implementation."""
    return reference.diagonal_mask(
        slots,
        steps,
        size=size,
        grid=grid,
        cache_leftpad=cache_leftpad,
        dtype=dtype,
        packed=packed,
    )


_ops.implement("diagonal_mask", cpu=_run_mask, cuda=_run_mask)
