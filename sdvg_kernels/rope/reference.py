"""The rope ops in eager PyTorch: the definition of truth, and the ops' CPU implementation.

    n        = x / sqrt(mean(x^2) + eps) * weight         over all heads' channels of a token
    a', b'   = a cos - b sin, a sin + b cos               of each pair of neighbouring channels
    slot(t)  = t if t < sink, else sink + (t - sink) % (S - sink)

Arithmetic is float64 and rounded once. On CUDA nothing is read back from the device.
"""

from __future__ import annotations

import torch

# the largest finite e4m3, and what no value of a row must reach for the row to count as zero
E4M3_MAX = 448.0
TINY = 2.0**-100


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return how many of a head's channel pairs turn with the frame, the row and the column."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


def rope_table(
    max_positions: int,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> torch.Tensor:
    """Return [max_positions, head_dim]: cosines, then sines, from float64 angles."""
    rates = [
        theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        for pairs in axis_pairs(head_dim)
        if pairs
    ]
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), torch.cat(rates))
    return torch.cat([angles.cos(), angles.sin()], 1).to(device, dtype)


def norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    *,
    eps: float,
    height: int,
    width: int,
    start_frame: int,
    frame_offsets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed and rotated (query, key), contiguous, in their own dtype."""
    first = _first_frame(start_frame, frame_offsets, len(query), query.device)
    cos, sin = _angles(table, first, query.shape[1], height, width)
    wide_query = _rotated(query, query_weight, eps, cos, sin)
    wide_key = _rotated(key, key_weight, eps, cos, sin)
    return wide_query.to(query.dtype), wide_key.to(key.dtype)


def norm_rope_stage_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    *,
    eps: float,
    height: int,
    width: int,
    start_frame: int | None,
    frame_offsets: torch.Tensor | None,
    sink: int,
    cache_batch_idx: torch.Tensor | None,
) -> torch.Tensor:
    """Return the rotated query; write the rotated key and the value behind `lengths`."""
    _check_values(lengths, cache_batch_idx)
    batch, rows = query.shape[:2]
    index = cache_batch_idx
    index = torch.arange(batch, device=query.device) if index is None else index.long()
    start = lengths.long()[index]
    if start_frame is None:
        first = start // (height * width)
    else:
        first = _first_frame(start_frame, frame_offsets, batch, query.device)
    cos, sin = _angles(table, first, rows, height, width)
    wide_key = _rotated(key, key_weight, eps, cos, sin)
    token = start[:, None] + torch.arange(rows, device=query.device)
    ring = sink + (token - sink) % (k_cache.shape[1] - sink)
    where = index[:, None], torch.where(token < sink, token, ring)
    for cache, scale, wide in ((k_cache, k_scale, wide_key), (v_cache, v_scale, value)):
        if scale is None:
            cache[where] = wide.to(cache.dtype)
        else:
            written, scale[where] = quantised(wide.float())
            # bytes: not every torch writes e4m3 through an index
            cache.view(torch.uint8)[where] = written.view(torch.uint8)
    return _rotated(query, query_weight, eps, cos, sin).to(query.dtype)


def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 rows [..., D] as e4m3, and the float32 factor [...] that undoes it."""
    largest = rows.abs().amax(-1)
    holds = largest >= TINY
    scale = torch.where(holds, largest * (1 / E4M3_MAX), 1.0)
    # torch divides a number by a tensor in two roundings
    inverse = torch.where(holds, torch.full_like(largest, E4M3_MAX) / largest, 1.0)
    scaled = (rows * inverse[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def _first_frame(
    start_frame: int, offsets: torch.Tensor | None, batch: int, device: torch.device
) -> torch.Tensor:
    """Return each sequence's first frame [B] int64."""
    if offsets is None:
        return torch.full((batch,), start_frame, device=device)
    return offsets.long() + start_frame


def _angles(
    table: torch.Tensor, first: torch.Tensor, rows: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [B, T, 1, D / 2] in float64; NaN where a position is not in the table."""
    places, dim = table.shape
    row = torch.arange(rows, device=table.device)
    axes = (
        first[:, None] + row // (height * width),
        (row // width % height)[None],
        (row % width)[None],
    )
    # [B, T, D / 2]
    position = torch.cat(
        [
            axis[..., None].expand(len(first), rows, pairs)
            for axis, pairs in zip(axes, axis_pairs(dim), strict=True)
        ],
        dim=-1,
    )
    known = (position >= 0) & (position < places)
    pair = torch.arange(dim // 2, device=table.device).expand_as(position)
    turns = (table[position.clamp(0, places - 1), pair + part] for part in (0, dim // 2))
    cos, sin = (turn.double().masked_fill(~known, torch.nan)[:, :, None] for turn in turns)
    return cos, sin


def _rotated(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """Return [B, T, H, D] in float64, normed if there is a weight, and rotated."""
    x = x.double()
    if weight is not None:
        x = x * (x.square().mean((2, 3), keepdim=True) + eps).rsqrt()
        x = x * weight.double().view(x.shape[2:])
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def _check_values(lengths: torch.Tensor, cache_batch_idx: torch.Tensor | None) -> None:
    """On the CPU, raise unless the call names sequences of the cache, each once, of length >= 0."""
    if not lengths.is_cpu:
        return
    held = lengths.tolist()
    named = range(len(held)) if cache_batch_idx is None else cache_batch_idx.tolist()
    op = "norm_rope_stage_"
    if len(set(named)) < len(named) or any(not 0 <= b < len(held) for b in named):
        rule = f"name distinct sequences of the cache, below Bc = {len(held)}"
        raise ValueError(f"{op}: cache_batch_idx must {rule}, got {list(named)}")
    least = min((held[b] for b in named), default=0)
    if least < 0:
        raise ValueError(f"{op}: lengths must be at least 0, got {least}")
