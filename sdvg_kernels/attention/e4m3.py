"""Attention over K and V in e4m3: what is rounded, and how; the definition for such kernels.

    q8, sq = rows of query, rounded       k8, sk, v8, sv = rows of the cache, rounded
    x[i, j] = softmax_scale * sq[i] * sk[j] * (q8[i] . k8[j]) + bias
    p8[i, j] = e4m3(256 * exp(x[i, j] - max x[i]) * sv[j] / max sv)
    out[i]  = max sv / 256 * (p8[i] v8) / sum exp(x[i] - max x[i])

A row of D values is rounded with its own factor, `amax / 448`, so its largest value is exact. e4m3
has 4 significant bits: a rounding is off by 2.65% of its value (rms, 31.5 dB), whatever the factor,
and a logit, of two roundings, by 3.7% of what its terms amount to. Over Gaussian channels that adds
up to 25.7 dB, under any rotation. Where one channel is 50 times the rest in Q alone, logits are
large, and so is their error: 15 to 28 dB. `balance` shares the channel between Q and K, so that it
is the largest value of both rows, and exact in both. A rotation (Hadamard) does the opposite, and
is worse than nothing here; rounding in two terms would take three products for one.

The emulation takes each row's final maximum, a kernel the running one: the same errors, of other
values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sdvg_kernels.attention.reference import seen_slots

# the largest finite e4m3; what a row must reach to have a factor; what weights are multiplied by
_MAX, _TINY, _WEIGHT = 448.0, 2.0**-100, 256.0


class E4m3Cache(NamedTuple):
    """K and V as float8_e4m3fn, and the float32 factors [Bc, S, Hk] that undo the rounding's scale.

    k: [Bc, S, Hk, D]. v: [Bc, Hk, D, S]: a wgmma of 8-bit operands takes both along the summed
    dimension only, which for P V is the slots; a row is written once and read hundreds of times.
    TMA asks for rows of slots that begin 16 bytes apart: pad them where S is no multiple of 16.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor

    def arguments(self) -> dict[str, torch.Tensor]:
        """Return the cache as `sdvg_kernels.block_causal_attention` takes it."""
        return {
            "k_cache": self.k,
            "v_cache": self.v.permute(0, 3, 1, 2),
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
        }


def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [..., D] as e4m3, rounded to nearest even, and their float32 factors [...].

    A factor is 1 where no value reaches 2^-100. NaN stays NaN.
    """
    rows = rows.float()
    largest = rows.abs().amax(-1)
    holds = ~(largest < _TINY)
    scale = torch.where(holds, largest * (1 / _MAX), 1.0)
    inverse = torch.where(holds, torch.full_like(largest, _MAX) / largest, 1.0)
    return (rows * inverse[..., None]).clamp(-_MAX, _MAX).to(torch.float8_e4m3fn), scale


def quantised_cache(k_cache: torch.Tensor, v_cache: torch.Tensor) -> E4m3Cache:
    """Return caches [Bc, S, Hk, D] as an `E4m3Cache`."""
    (key, k_scale), (value, v_scale) = quantised(k_cache), quantised(v_cache)
    batch, slots, heads, dim = value.shape
    # bytes: not every torch copies e4m3
    padded = value.new_zeros((batch, heads, dim, -(-slots // 16) * 16), dtype=torch.uint8)
    padded[..., :slots] = value.view(torch.uint8).permute(0, 2, 3, 1)
    return E4m3Cache(key, padded.view(value.dtype)[..., :slots], k_scale, v_scale)


def balance(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return factors [Hk, D], from samples, that make each channel as large in K as it is in Q.

    `query / factors` and `key * factors` (each key head with its queries) have the logits of query
    and key. The two channels of a RoPE pair share a factor, so it can be folded into the weights of
    the QK-norm before RoPE, once for a model: it then costs nothing.

    Args:
        query: [B, T, H, D] and key: [B, L, Hk, D], after RoPE; D even, H a multiple of Hk.

    Returns:
        [Hk, D] float32; 1 where a channel is zero in either.

    Source: SmoothQuant (arXiv 2211.10438), per RoPE pair and between two activations.
    """
    heads, dim = key.shape[2:]
    by_head = query.unflatten(2, (heads, -1)).movedim(2, 0), key.movedim(2, 0)
    largest = [x.float().abs().reshape(heads, -1, dim // 2, 2).amax((1, 3)) for x in by_head]
    factors = (largest[0] / largest[1]).sqrt()
    factors = torch.where((largest[0] > 0) & (largest[1] > 0), factors, 1.0)
    return factors.repeat_interleave(2, 1)


def block_causal_attention(
    query: torch.Tensor,
    cache: E4m3Cache,
    cache_seqlens: torch.Tensor,
    *,
    block_size: int | None = None,
    sink: int = 0,
    window: int | None = None,
    softmax_scale: float | None = None,
    bias: float | None = None,
    bias_start: int = 0,
    bias_stop: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `block_causal_attention` over an e4m3 cache: out [B, T, H, D], lse [B, H, T] float32.

    Arguments are those of the reference, query in any float type; each query row and head is
    rounded too. Rows that see nothing are 0, their lse -inf. Float32 between roundings.
    """
    rows, dim = query.shape[1], query.shape[3]
    slots, heads_cached = cache.k_scale.shape[1:]
    softmax_scale = dim**-0.5 if softmax_scale is None else softmax_scale
    block_size = max(rows, 1) if block_size is None else min(block_size, max(rows, 1))
    token, begin, sees = seen_slots(
        cache_seqlens, rows, slots, slots - sink, block_size, sink, window
    )
    # [B, Hk, 1, S]; what no row sees may be NaN
    used = sees.any(1)[:, None, None]
    k_scale, v_scale = (
        x.permute(0, 2, 1)[:, :, None].masked_fill(~used, 0) for x in (cache.k_scale, cache.v_scale)
    )
    key = cache.k.float().permute(0, 2, 3, 1).masked_fill(~used, 0)
    value = cache.v.float().transpose(2, 3).masked_fill(~used.transpose(2, 3), 0)

    rounded, q_scale = quantised(query)
    # [B, Hk, H / Hk, T, D]
    grouped = rounded.float().unflatten(2, (heads_cached, -1)).permute(0, 2, 3, 1, 4)
    q_scale = q_scale.unflatten(2, (heads_cached, -1)).permute(0, 2, 3, 1)[..., None]
    logits = grouped @ key[:, :, None] * (q_scale * softmax_scale) * k_scale[:, :, None]
    if bias is not None:
        stop = begin if bias_stop is None else bias_stop
        biased = ((token >= bias_start) & (token < stop))[:, None, None]
        logits = torch.where(biased, logits + bias, logits)
    logits = logits.masked_fill(~sees[:, None, None], -torch.inf)
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest.masked_fill(largest == -torch.inf, 0)).exp()
    total = weights.sum(-1, keepdim=True)

    reference = v_scale.amax(-1, keepdim=True).clamp(min=_TINY)
    share = (weights * (v_scale / reference)[:, :, None] * _WEIGHT).clamp(max=_MAX)
    product = share.to(torch.float8_e4m3fn).float() @ value[:, :, None]
    out = product * (reference / _WEIGHT)[:, :, None] / total.masked_fill(total == 0, 1)
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(query.dtype)
    return out, logits.logsumexp(-1).flatten(1, 2)
