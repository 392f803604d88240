"""`block_causal_attention` in eager PyTorch: the definition of truth, and what runs on CPUs.

    slot(t) = t                              if t < sink
            = sink + (t - sink) % (S - sink) otherwise
    p[i]    = softmax(scale * q[i] K^T + bias)   over the logical tokens that row i sees
    out[i]  = p[i] V

and its gradients, with dx for the gradient of the logits (FlashAttention-2, arXiv 2307.08691,
section 3.1.2; lse[i] adds its own to every logit by p[i]):

    dx = p (dout V^T - rowsum(dout out) + dlse)    dq = scale dx K    dk = scale dx^T q
    dv = p^T dout

Arithmetic is float32, and float64 for float64 input. On CUDA nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

# logits at a time: on a CPU what its cache holds (float32: 4 MB), else what memory does (256 MB)
_CPU_LOGITS, _MOST_LOGITS = 1 << 20, 1 << 26
# rows of blocks that are computed over the keys of all of them
_CPU_ROWS = 32


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
    """Return out [B, T, H, D] in query's dtype, and lse [B, H, T] ([0] if unasked).

    With scales [Bc, S, Hk], K and V are e4m3, and every value counts times its row's scale.
    """
    batch, rows, heads, _ = query.shape
    dtype = _wide(query)
    lse = query.new_empty((batch, heads, rows) if return_lse else (0,), dtype=dtype)
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

    if query.device.type == "cpu" and bias is None and not return_lse:
        # reading CPU memory is free: mask nothing at all
        lengths = cache_seqlens.tolist()
        one_block = block_size is None or block_size >= rows
        if one_block and len(set(lengths)) == 1 and lengths[0] >= rows:
            return _unmasked(query, k_cache, v_cache, lengths[0], sink, window, softmax_scale), lse

    problem = _Problem.of(
        query,
        k_cache,
        v_cache,
        cache_seqlens,
        block_size,
        sink,
        window,
        bias,
        bias_start,
        bias_stop,
    )
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for part, _, _, value, logits in problem.parts(softmax_scale):
        # a row that sees nothing: -inf - -inf is NaN
        top = logits.amax(-1, keepdim=True)
        top = top.masked_fill_(top == -torch.inf, 0)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        part.write(out, (weights @ value).div_(total.masked_fill(total == 0, 1)))
        if return_lse:
            part.write(lse.transpose(1, 2)[..., None], total.log_().add_(top))
    return out, lse


def block_causal_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    block_size: int | None,
    sink: int,
    window: int | None,
    softmax_scale: float,
    bias: float | None,
    bias_start: int,
    bias_stop: int | None,
    need_query: bool,
    need_cache: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, k_cache and v_cache in their dtype ([0] where not needed).

    Args:
        grad_out, grad_lse: the gradients of `out` and `lse`.
        out, lse: what the forward returned.

    Rows that see no key take and give nothing, whatever their gradients are.
    """
    dtype = _wide(query)
    grad_query = query.new_empty(query.shape if need_query else (0,))
    shape, make = (k_cache.shape, torch.zeros) if need_cache else ((0,), torch.empty)
    grad_key, grad_value = (make(shape, dtype=dtype, device=query.device) for _ in range(2))
    if query.numel() > 0:
        problem = _Problem.of(
            query,
            k_cache,
            v_cache,
            cache_seqlens,
            block_size,
            sink,
            window,
            bias,
            bias_start,
            bias_stop,
        )
        # [B, T, H, 1]
        lse = lse.transpose(1, 2)[..., None]
        blind = lse == -torch.inf
        lse = lse.masked_fill(blind, 0)
        if query.device.type != "cpu" or blind.any():
            grad_out = grad_out.masked_fill(blind, 0)
        delta = (grad_out.to(dtype) * out).sum(-1, keepdim=True)
        delta -= grad_lse.transpose(1, 2)[..., None].masked_fill(blind, 0)
        for part, query_rows, key, value, logits in problem.parts(softmax_scale):
            grad_rows = part.read(grad_out)
            weights = logits.sub_(part.read(lse)).exp_()
            if need_cache:
                part.slots(grad_value).add_(weights.mT @ grad_rows)
            grad_logits = (grad_rows @ value.mT).sub_(part.read(delta)).mul_(weights)
            if need_query:
                part.write(grad_query, (grad_logits @ key).mul_(softmax_scale))
            if need_cache:
                # the rows of the query are scaled already
                part.slots(grad_key).add_(grad_logits.mT @ query_rows)
    return grad_query, grad_key.to(query.dtype), grad_value.to(query.dtype)


class _Part(NamedTuple):
    """Runs of sequences, of heads of the cache, of query tokens, and of slots."""

    sequences: slice
    cached: slice
    tokens: slice
    held: slice
    # query heads that share a head of the cache; the arithmetic's dtype
    group: int
    dtype: torch.dtype

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Return the part's rows of x [B, T, H, D], [b, h, t * group, D] in the wide dtype."""
        heads = slice(self.cached.start * self.group, self.cached.stop * self.group)
        x = x[self.sequences, self.tokens, heads].unflatten(2, (-1, self.group))
        return x.permute(0, 2, 1, 3, 4).flatten(2, 3).to(self.dtype)

    def write(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Write what `read` reads."""
        heads = slice(self.cached.start * self.group, self.cached.stop * self.group)
        rows = rows.unflatten(2, (-1, self.group)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        x[self.sequences, self.tokens, heads] = rows

    def slots(self, x: torch.Tensor) -> torch.Tensor:
        """Return the part's keys of x [B, S, Hk, D], [b, h, s, D], a view."""
        return x[self.sequences, self.held, self.cached].transpose(1, 2)

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """Return the part's logits of x [B or 1, T, S], [b or 1, 1, t * group, s]."""
        x = x[self.sequences if len(x) > 1 else slice(None), self.tokens, self.held]
        return (x if self.group == 1 else x.repeat_interleave(self.group, 1))[:, None]


class _Problem(NamedTuple):
    """Query and caches, and which slots a row sees, [B, T, S], or [1, T, S] for all sequences."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    unseen: torch.Tensor
    bias: torch.Tensor | None
    block_size: int

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        cache_seqlens: torch.Tensor,
        block_size: int | None,
        sink: int,
        window: int | None,
        bias: float | None,
        bias_start: int,
        bias_stop: int | None,
    ) -> _Problem:
        """Return the problem; keys and values that no row sees are 0 in it."""
        rows, slots = query.shape[1], k_cache.shape[1]
        block_size = rows if block_size is None else min(block_size, rows)
        on_cpu = query.device.type == "cpu"
        # reading CPU memory is free: one mask where all sequences are of one length
        if on_cpu and len(set(cache_seqlens.tolist())) == 1:
            cache_seqlens = cache_seqlens[:1]
        token, begin, sees = seen_slots(
            cache_seqlens, rows, slots, slots - sink, block_size, sink, window
        )
        added = None
        if bias is not None:
            biased = (token >= bias_start) & (token < (begin if bias_stop is None else bias_stop))
            added = biased.to(_wide(query)) * bias
        # 0 x NaN is NaN: what no row sees is zeroed, not only its weights
        unused = ~sees.any(1)[:, :, None, None]
        if not on_cpu or unused.any():
            k_cache, v_cache = (cache.masked_fill(unused, 0) for cache in (k_cache, v_cache))
        return cls(query, k_cache, v_cache, ~sees, added, block_size)

    def parts(
        self, softmax_scale: float
    ) -> Iterator[tuple[_Part, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield parts: (part, scaled query [b, h, rows, D], key, value [b, h, s, D], logits).

        A row is a token's head, of those that share a head of the cache. Logits [b, h, rows, s] are
        -inf where it does not see the key.
        """
        batch, tokens, heads, _ = self.query.shape
        slots, cached = self.key.shape[1:3]
        group, dtype = heads // cached, _wide(self.query)
        on_cpu = self.query.device.type == "cpu"
        # a head of a CPU's part is read in place: no copy brings heads in front of tokens
        together = 1 if on_cpu else cached
        most = max(1, (_CPU_LOGITS if on_cpu else _MOST_LOGITS) // (together * group))
        run = max(1, min(tokens, most // slots))
        if on_cpu and self.block_size < run:
            # whole blocks, which see the same keys, but no slivers of rows
            run = min(run, self.block_size * -(-_CPU_ROWS // self.block_size))
        for t in range(0, tokens, run):
            held = self._held(slice(t, t + run))
            count = max(1, most // (run * (held.stop - held.start)))
            for b in range(0, batch, count):
                for h in range(0, cached, together):
                    few, kept = slice(b, b + count), slice(h, h + together)
                    part = _Part(few, kept, slice(t, t + run), held, group, dtype)
                    key, value = (part.slots(x).to(dtype) for x in (self.key, self.value))
                    query = part.read(self.query) * softmax_scale
                    logits = query @ key.mT
                    if self.bias is not None:
                        logits.add_(part.mask(self.bias))
                    logits.masked_fill_(part.mask(self.unseen), -torch.inf)
                    yield part, query, key, value, logits

    def _held(self, tokens: slice) -> slice:
        """Return the slots from the first that a row of `tokens` sees to the last, one at least."""
        if self.query.device.type != "cpu":
            return slice(0, self.key.shape[1])
        seen = (~self.unseen[:, tokens]).any(0).any(0).nonzero().flatten().tolist() or [0]
        return slice(seen[0], seen[-1] + 1)


def seen_slots(
    cache_seqlens: torch.Tensor,
    rows: int,
    slots: int,
    ring: int,
    block_size: int,
    sink: int,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each slot's token [B, 1, S], each row's block's first [B, T, 1], and who sees whom."""
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
