"""Tree attention in eager PyTorch: the definition of truth, and what runs on CPUs.

    sees[t, s] = bit s - length of mask[t]     for slots behind the committed ones
                 leftpad <= s                  for those before, if mask[t] has any bit
    out[t]     = softmax(scale * q K^T) V      over the slots that t sees

Arithmetic is float32, and float64 for float64 input. On CUDA nothing is read back from the device.
"""

from __future__ import annotations

import torch

# rows are chunked so that no tensor of logits has more elements than this (float32: 256 MB)
_MAX_LOGITS = 1 << 26
_WORD = 32


def tree_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    *,
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
        # reading CPU memory is free: slots behind the tree are not even masked
        used = max(int(lengths.max()) + _WORD * mask.shape[2], 1)
        k_cache, v_cache = k_cache[:, :used], v_cache[:, :used]
    if cache_batch_idx is not None:
        k_cache = k_cache.index_select(0, cache_batch_idx)
        v_cache = v_cache.index_select(0, cache_batch_idx)
    size = k_cache.shape[1]
    sees = seen(lengths, mask, size, cache_leftpad)
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
    lengths: torch.Tensor, mask: torch.Tensor, size: int, cache_leftpad: torch.Tensor | None
) -> torch.Tensor:
    """Return who sees which slot, bool [B, T, S]; an entry without a bit sees nothing."""
    slot = torch.arange(size, device=mask.device)
    # [B, 1, S]: the bit that says whether a slot is seen
    bit = (slot - lengths[:, None])[:, None]
    word = (bit // _WORD).clamp(0, mask.shape[2] - 1).expand(-1, mask.shape[1], -1)
    told = (mask.gather(2, word) >> (bit % _WORD)) & 1 == 1
    told &= (bit >= 0) & (bit < _WORD * mask.shape[2])
    before = bit < 0
    if cache_leftpad is not None:
        before = before & (slot >= cache_leftpad[:, None])[:, None]
    return told | (before & (mask != 0).any(2, keepdim=True))
