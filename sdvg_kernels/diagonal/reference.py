"""The ops of diagonal decoding in eager PyTorch: the definition of truth, and what runs on CPUs.

    sees[q, s] = s <= slot[q] and (s == slot[q] or s holds no token of a grid or pass(s) < step[q])

Nothing is read back from the device.
"""

from __future__ import annotations

import torch


def diagonal_mask(
    slots: torch.Tensor,
    steps: torch.Tensor,
    *,
    size: int,
    grid: list[int],
    cache_leftpad: torch.Tensor | None,
    dtype: torch.dtype,
    packed: bool,
) -> torch.Tensor:
    """Return [B, T, S]: bool; or 0 and the lowest number of `dtype`; or [B, T, S / 8] uint8."""
    sees = seen(slots, steps, size, grid, cache_leftpad)
    if packed:
        sees = torch.nn.functional.pad(sees, (0, -size % 8)).unflatten(2, (-1, 8))
        bits = torch.ones(8, dtype=torch.uint8, device=slots.device) << torch.arange(
            8, dtype=torch.uint8, device=slots.device
        )
        return (sees * bits).sum(3, dtype=torch.uint8)
    if dtype == torch.bool:
        return sees
    lowest = torch.finfo(dtype).min
    return sees.new_zeros(sees.shape, dtype=dtype).masked_fill_(~sees, lowest)


def seen(
    slots: torch.Tensor,
    steps: torch.Tensor,
    size: int,
    grid: list[int],
    cache_leftpad: torch.Tensor | None,
) -> torch.Tensor:
    """Return who sees which slot, bool [B, T, S]; padding (slot -1) sees nothing."""
    key = torch.arange(size, device=slots.device)
    query = slots[..., None]
    sees = (key < query) & (decoded_in(key, grid) < steps[..., None]) | (key == query)
    if cache_leftpad is not None:
        sees &= key >= cache_leftpad[:, None, None]
    return sees


def decoded_in(slot: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """Return the pass that gives the token of a slot; -1 for slots that hold none of a grid."""
    prefix, height, width, row_stride, frame_stride, k, lead, frame_passes = grid
    inside = slot - prefix
    frame = inside.div(frame_stride, rounding_mode="floor")
    row = (inside % frame_stride) // row_stride
    column = (inside % frame_stride) % row_stride
    step = frame * frame_passes + row * k + (row > 0) * lead + column
    return torch.where((inside >= 0) & (row < height) & (column < width), step, -1)
