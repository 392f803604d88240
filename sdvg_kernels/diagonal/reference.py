"""The ops of diagonal decoding in eager PyTorch: the definition of truth, and what runs on CPUs.

    sees[q, s] = s <= slot[q] and (s == slot[q] or s holds no token of a grid or pass(s) < step[q])
    out[q]     = softmax(scale * q K^T) V   over the slots that q sees

Arithmetic is float32, and float64 for float64 input. On CUDA nothing is read back from the device.
"""

from __future__ import annotations

import torch

# rows are chunked so that no tensor of logits has more elements than this (float32: 256 MB)
_MAX_LOGITS = 1 << 26


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


def diagonal_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    steps: torch.Tensor,
    *,
    grid: list[int],
    published: bool,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    softmax_scale: float,
) -> torch.Tensor:
    """Return out [B, T, H, D] in query's dtype."""
    batch, rows, heads, _ = query.shape
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    if query.numel() == 0:
        return out
    if query.device.type == "cpu":
        # reading CPU memory is free: slots behind the last entry are not even masked
        used = max(int(slots.max()) + 1, 1)
        k_cache, v_cache = k_cache[:, :used], v_cache[:, :used]
    if cache_batch_idx is not None:
        k_cache = k_cache.index_select(0, cache_batch_idx)
        v_cache = v_cache.index_select(0, cache_batch_idx)
    size = k_cache.shape[1]
    sees = seen(slots, steps, size, grid, cache_leftpad, published=published)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    # 0 x NaN is NaN: the values that no row sees are zeroed, not only their weights
    value = v_cache.to(dtype).masked_fill(~sees.any(1)[:, :, None, None], 0)
    # [B, Hk, 1, D, S], [B, Hk, 1, S, D], [B, Hk, H / Hk, T, D]
    key = k_cache.to(dtype).permute(0, 2, 3, 1)[:, :, None]
    value = value.transpose(1, 2)[:, :, None]
    grouped = query.to(dtype).unflatten(2, (k_cache.shape[2], -1)).permute(0, 2, 3, 1, 4)
    chunk = max(1, _MAX_LOGITS // (batch * heads * size))
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        sees_part = sees[:, None, None, part]
        logits = (grouped[..., part, :] * softmax_scale) @ key
        weights = logits.masked_fill(~sees_part, -torch.inf).softmax(-1)
        # the softmax of a row that sees nothing is 0 / 0
        weights = weights.masked_fill(~sees_part.any(-1, keepdim=True), 0)
        out[:, part] = (weights @ value).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out


def seen(
    slots: torch.Tensor,
    steps: torch.Tensor,
    size: int,
    grid: list[int],
    cache_leftpad: torch.Tensor | None,
    *,
    published: bool = False,
) -> torch.Tensor:
    """Return who sees which slot, bool [B, T, S]; padding (slot -1) sees nothing.

    `published`: decoded or not, as the released loop has it.
    """
    key = torch.arange(size, device=slots.device)
    query = slots[..., None]
    sees = key <= query
    if not published:
        sees &= (decoded_in(key, grid) < steps[..., None]) | (key == query)
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
