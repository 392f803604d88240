"""`block_causal_attention` in eager PyTorch: the definition of truth, and what runs on CPUs.

    slot(t) = t                              if t < sink
            = sink + (t - sink) % (S - sink) otherwise
    out[i]  = softmax(scale * q[i] K^T + bias) V   over the logical tokens that row i sees

Arithmetic is float32, and float64 for float64 input. On CUDA nothing is read back from the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# rows are chunked so that no tensor of logits has more elements than this (float32: 256 MB)
_MAX_LOGITS = 1 << 26


def block_causal_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_size: int | None,
    sink: int,
    window: int | None,
    cache_batch_idx: torch.Tensor | None,
    softmax_scale: float,
    bias: float | None,
    bias_start: int,
    bias_stop: int | None,
    return_lse: bool,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, T, H, D] in query's dtype, and lse [B, H, T] float32 ([0] if unasked).

    With scales [Bc, S, Hk], K and V are e4m3, and every value counts times its row's scale.
    """
    batch, rows, heads, _ = query.shape
    lse = query.new_empty((batch, heads, rows) if return_lse else (0,), dtype=torch.float32)
    if query.numel() == 0:
        return torch.empty_like(query, memory_format=torch.contiguous_format), lse
    if k_scale is not None and v_scale is not None:
        k_cache, v_cache = (
            _dequantised(k_cache, k_scale, query),
            _dequantised(v_cache, v_scale, query),
        )
    if cache_batch_idx is not None:
        k_cache = k_cache.index_select(0, cache_batch_idx)
        v_cache = v_cache.index_select(0, cache_batch_idx)
    block_size = rows if block_size is None else min(block_size, rows)
    ring = k_cache.shape[1] - sink

    if query.device.type == "cpu":
        # reading CPU memory is free: drop the slots that nobody has written, or mask nothing at all
        lengths = cache_seqlens.tolist()
        one_length = block_size == rows and len(set(lengths)) == 1 and lengths[0] >= rows
        if one_length and bias is None and not return_lse:
            return _unmasked(query, k_cache, v_cache, lengths[0], sink, window, softmax_scale), lse
        if max(lengths) < k_cache.shape[1]:
            used = max(max(lengths), 1)
            k_cache, v_cache = k_cache[:, :used], v_cache[:, :used]

    token, begin, sees = seen_slots(
        cache_seqlens, rows, k_cache.shape[1], ring, block_size, sink, window
    )
    dtype = _wide(query)
    # 0 x NaN is NaN: the values that no row sees are zeroed, not only their weights
    value = v_cache.to(dtype).masked_fill(~sees.any(1)[:, :, None, None], 0)
    # [B, Hk, 1, D, S], [B, Hk, 1, S, D], [B, Hk, H / Hk, T, D]
    key = k_cache.to(dtype).permute(0, 2, 3, 1)[:, :, None]
    value = value.transpose(1, 2)[:, :, None]
    grouped = query.to(dtype).unflatten(2, (k_cache.shape[2], -1)).permute(0, 2, 3, 1, 4)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)

    chunk = max(1, _MAX_LOGITS // (batch * heads * token.shape[-1]))
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        logits = (grouped[..., part, :] * softmax_scale) @ key
        if bias is not None:
            stop = begin[:, part] if bias_stop is None else bias_stop
            biased = ((token >= bias_start) & (token < stop))[:, None, None]
            logits = torch.where(biased, logits + bias, logits)
        logits = logits.masked_fill(~sees[:, None, None, part], -torch.inf)
        # the softmax of a row that sees nothing is 0 / 0
        blind = ~sees[:, None, None, part].any(-1, keepdim=True)
        weights = logits.softmax(-1).masked_fill(blind, 0)
        out[:, part] = (weights @ value).permute(0, 3, 1, 2, 4).flatten(2, 3)
        if return_lse:
            lse[..., part] = logits.logsumexp(-1).flatten(1, 2)
    return out, lse


def seen_slots(
    cache_seqlens: torch.Tensor,
    rows: int,
    slots: int,
    ring: int,
    block_size: int,
    sink: int,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each slot's token [B, 1, S], each row's block's first [B, T, 1], who sees [B, T, S].

    `ring` is how many slots the ring has; `slots`, the first ones of the cache, may be fewer.
    """
    device = cache_seqlens.device
    # a slot never written gets a token that no row sees
    slot = torch.arange(slots, device=device)
    length = cache_seqlens.long()[:, None, None]
    turns = ((length - 1 - slot).div(ring, rounding_mode="floor")).clamp(min=0)
    token = torch.where(slot < sink, slot, slot + turns * ring)
    # first token and end of each row's own block: [B, T, 1]
    row = torch.arange(rows, device=device)[:, None]
    begin = length - rows + row // block_size * block_size
    end = torch.minimum(length, begin + block_size)
    sees = (token < end) & (length - rows + row >= 0)
    if window is not None:
        sees &= (token < sink) | (token >= end - window)
    return token, begin, sees


def _wide(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _dequantised(cache: torch.Tensor, scale: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return an e4m3 cache [Bc, S, Hk, D] in the dtype of the arithmetic."""
    return cache.to(_wide(query)) * scale[..., None]


def _unmasked(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    length: int,
    sink: int,
    window: int | None,
    softmax_scale: float,
) -> torch.Tensor:
    """Return the attention of one block over at most three runs of slots, all seen by every row."""
    size = k_cache.shape[1]
    ring = size - sink
    first = max(sink, length - min(ring, ring if window is None else window))
    runs = [(0, min(sink, length))]
    if first < length:
        low, high = (sink + (token - sink) % ring for token in (first, length - 1))
        runs += [(low, high + 1)] if low <= high else [(sink, high + 1), (low, size)]
    joined: list[tuple[int, int]] = []
    for low, high in runs:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        elif low < high:
            joined.append((low, high))

    dtype = _wide(query)
    key, value = (
        (
            cache[:, slice(*joined[0])]
            if len(joined) == 1
            else torch.cat([cache[:, low:high] for low, high in joined], 1)
        )
        .to(dtype)
        .transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    out = F.scaled_dot_product_attention(
        query.to(dtype).transpose(1, 2),
        key,
        value,
        scale=softmax_scale,
        enable_gqa=query.shape[2] != k_cache.shape[2],
    )
    return out.transpose(1, 2).to(query.dtype).contiguous()
