"""`block_causal_attention`: attention of the newest tokens over a ring KV cache with a sink and a window."""

from __future__ import annotations

import functools
import logging
import math
from typing import NamedTuple

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import require, require_dtype, require_implementation, triton_reason
from sdvg_kernels.attention import reference

_OP = "block_causal_attention"
_LOG = logging.getLogger("sdvg_kernels")
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class KeyBias(NamedTuple):
    """A natural-log bias on the logits of the logical tokens in [start, stop).

    `stop=None` is the start of the row's own block: Krea's `KeyBias(log(0.3), frame, None)` weighs every key after
    the first frame and before the current block by 0.3.
    """

    bias: float
    start: int = 0
    stop: int | None = None


def block_causal_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_size: int | None = None,
    sink: int = 0,
    window: int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    key_bias: KeyBias | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest `T` tokens of each sequence over its ring KV cache.

    Equals `F.scaled_dot_product_attention` over the logical tokens with this mask. Blocks of 2, `sink=1`,
    `window=4`, a query of two blocks (`T=4`) at `cache_seqlens=8`, `x` seen:

        logical token   0 1 2 3 4 5 6 7
        row 0 (token 4) x . x x x x . .     its block ends at 6 and sees [6 - 4, 6) and the sink
        row 1 (token 5) x . x x x x . .
        row 2 (token 6) x . . . x x x x     its block ends at 8
        row 3 (token 7) x . . . x x x x

    Logical token `t` lives in slot `t` if `t < sink`, else `sink + (t - sink) % (S - sink)`; the ring holds the
    sink and the newest `S - sink` tokens, and a token that it no longer holds is not seen. With `L` the length,
    row `i` is token `L - T + i` of block `i // block_size`, which ends at `min(L, L - T + (i // block_size + 1) *
    block_size)`: the last block may be partial. Rows before the sequence (`L < T`) and rows that see no key give 0
    and `lse = -inf`. Keys and values that no row sees are not read: they may be NaN. No backward.

    Args:
        query: [B, T, H, D] bfloat16, float16 or float32 (float64 too in the reference), last dim contiguous.
        k_cache, v_cache: [Bc, S, Hk, D] of query's dtype, `H % Hk == 0`, last dim contiguous, any other strides
            (a layer of a [layers, Bc, S, Hk, D] cache). Keys are stored after RoPE.
        cache_seqlens: [B] int32, tokens, on query's device: the logical length *including* the query.
        block_size: tokens of a block, counted from the first query row; None: the query is one block.
        sink: first tokens that are never evicted, `0 <= sink < S`.
        window: tokens that a block sees, itself included, beside the sink; None: all that the ring holds.
        cache_batch_idx: [B] int32, which cache row serves each sequence; None: row b, and `Bc == B`.
        softmax_scale: factor on the logits; None: `D ** -0.5`.
        key_bias: a log-bias on a range of keys.
        num_splits: parts that the keys are split into, each by its own program; None: by the shapes.
        out: [B, T, H, D] of query's dtype, written in place.
        return_lse: also return the log-sum-exp of the logits.
        implementation: "triton" or "reference"; None: Triton on CUDA for head dim 64 and 128, else the reference.
            One that is asked for never falls back. The reference ignores `num_splits`.

    Returns:
        out [B, T, H, D], contiguous; with `return_lse`, (out, lse): lse [B, H, T] float32, natural log.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (an implementation that cannot run here).

    Mutates: `out`. Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: SDVG's target and drafter (Self-Forcing, arXiv 2506.08009, `causal_model.py`), FlashAttention-2's online
    softmax (arXiv 2307.08691).
    Cost: 4 H D FLOP for each (row, seen key); each K and V tile that a query tile sees is read once per query tile.
    """
    require(query.dim() == 4, _OP, "query", "be [B, T, H, D]", query.shape)
    batch, rows, heads, dim = query.shape
    require(
        k_cache.dim() == 4 and k_cache.shape[3] == dim,
        _OP,
        "k_cache",
        "be [Bc, S, Hk, D] with query's D",
        k_cache.shape,
    )
    rows_cached, size, heads_cached, _ = k_cache.shape
    require(
        v_cache.shape == k_cache.shape, _OP, "v_cache", "have the shape of k_cache", v_cache.shape
    )
    require(size > 0, _OP, "k_cache", "have at least one slot", k_cache.shape)
    require(
        heads_cached > 0 and heads % heads_cached == 0,
        _OP,
        "k_cache",
        "have a number of heads that divides query's",
        k_cache.shape,
    )
    require(
        cache_seqlens.dim() == 1 and cache_seqlens.shape[0] == batch,
        _OP,
        "cache_seqlens",
        "be [B]",
        cache_seqlens.shape,
    )
    dtype = query.dtype
    require_dtype(
        dtype in DTYPES or dtype == torch.float64,
        _OP,
        "query",
        "be bfloat16, float16, float32 or float64",
        dtype,
    )
    require_dtype(
        k_cache.dtype == dtype and v_cache.dtype == dtype,
        _OP,
        "k_cache and v_cache",
        "have query's dtype",
        (k_cache.dtype, v_cache.dtype),
    )
    require_dtype(
        cache_seqlens.dtype == torch.int32,
        _OP,
        "cache_seqlens",
        "be int32",
        cache_seqlens.dtype,
    )
    device = query.device
    require(
        k_cache.device == device and v_cache.device == device and cache_seqlens.device == device,
        _OP,
        "k_cache, v_cache and cache_seqlens",
        "be on query's device",
        (k_cache.device, v_cache.device, cache_seqlens.device),
    )
    require(
        dim == 0
        or dim == 1
        or (query.stride(3) == 1 and k_cache.stride(3) == 1 and v_cache.stride(3) == 1),
        _OP,
        "query, k_cache and v_cache",
        "be contiguous in the last dim",
        "another stride",
        "call .contiguous()",
    )
    require(0 <= sink < size, _OP, "sink", "be at least 0 and less than the slots S", sink)
    require(window is None or window >= 1, _OP, "window", "be at least 1 or None", window)
    require(
        block_size is None or block_size >= 1,
        _OP,
        "block_size",
        "be at least 1 or None",
        block_size,
    )
    require(
        num_splits is None or num_splits >= 1,
        _OP,
        "num_splits",
        "be at least 1 or None",
        num_splits,
    )
    if cache_batch_idx is None:
        require(
            rows_cached == batch,
            _OP,
            "k_cache",
            "have query's batch",
            k_cache.shape,
            "or pass cache_batch_idx",
        )
    else:
        require(
            cache_batch_idx.shape == cache_seqlens.shape and cache_batch_idx.device == device,
            _OP,
            "cache_batch_idx",
            "be [B] on query's device",
            cache_batch_idx.shape,
        )
        require_dtype(
            cache_batch_idx.dtype == torch.int32,
            _OP,
            "cache_batch_idx",
            "be int32",
            cache_batch_idx.dtype,
        )
    bias, bias_start, bias_stop = key_bias if key_bias is not None else (None, 0, None)
    require(bias is None or math.isfinite(bias), _OP, "key_bias.bias", "be finite", bias)
    if softmax_scale is None:
        softmax_scale = dim**-0.5 if dim else 1.0
    require(math.isfinite(softmax_scale), _OP, "softmax_scale", "be finite", softmax_scale)
    if out is not None:
        require(
            out.shape == query.shape and out.device == device,
            _OP,
            "out",
            "have query's shape and device",
            out.shape,
        )
        require_dtype(out.dtype == dtype, _OP, "out", "have query's dtype", out.dtype)
        require(
            dim <= 1 or out.stride(3) == 1,
            _OP,
            "out",
            "be contiguous in the last dim",
            out.stride(),
        )

    chosen = require_implementation(
        _OP,
        implementation,
        _available(device.type, dim, dtype),
        f"on {device.type} tensors of head dim {dim} and {dtype}",
    )
    arguments = (
        query,
        k_cache,
        v_cache,
        cache_seqlens,
        cache_batch_idx,
        block_size,
        sink,
        window,
        softmax_scale,
        bias,
        bias_start,
        bias_stop,
        num_splits,
        return_lse,
        chosen,
    )
    if out is None:
        out, lse = torch.ops.sdvg_kernels.block_causal_attention(*arguments)
    else:
        lse = torch.ops.sdvg_kernels.block_causal_attention_out(*arguments, out=out)
    return (out, lse) if return_lse else out


@functools.cache
def _available(device: str, dim: int, dtype: torch.dtype) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run, in order of preference, for such tensors."""
    reason = triton_reason(device)
    if not reason and dim not in HEAD_DIMS:
        reason = f"the Triton kernel has head dim {' and '.join(map(str, HEAD_DIMS))}"
    if not reason and dtype not in DTYPES:
        reason = f"the Triton kernel has no {dtype}"
    if device == "cpu":
        # the interpreter is for tests: never the default
        return {"reference": "", "triton": reason}
    if reason:
        _LOG.warning("%s: the reference serves %s tensors here: %s", _OP, device, reason)
    return {"triton": reason, "reference": ""}


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available, in order of preference on this machine."""
    if torch.cuda.is_available():
        return dict(_available("cuda", HEAD_DIMS[0], torch.bfloat16))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_batch_idx: torch.Tensor | None,
    block_size: int | None,
    sink: int,
    window: int | None,
    softmax_scale: float,
    bias: float | None,
    bias_start: int,
    bias_stop: int | None,
    num_splits: int | None,
    return_lse: bool,
    implementation: str,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the chosen implementation; `out` is written in place where it is given."""
    options = {
        "block_size": block_size,
        "sink": sink,
        "window": window,
        "cache_batch_idx": cache_batch_idx,
        "softmax_scale": softmax_scale,
        "bias": bias,
        "bias_start": bias_start,
        "bias_stop": bias_stop,
        "return_lse": return_lse,
    }
    if implementation == "reference":
        result, lse = reference.block_causal_attention(
            query, k_cache, v_cache, cache_seqlens, **options
        )
        return (result if out is None else out.copy_(result)), lse
    from sdvg_kernels.attention import kernel

    return kernel.block_causal_attention(
        query, k_cache, v_cache, cache_seqlens, **options, num_splits=num_splits, out=out
    )


def _run_out(*arguments: object, out: torch.Tensor) -> torch.Tensor:
    return _run(*arguments, out=out)[1]


_ops.implement("block_causal_attention", cpu=_run, cuda=_run)
_ops.implement("block_causal_attention_out", cpu=_run_out, cuda=_run_out)
