"""`block_causal_attention`: the newest tokens attend to a ring cache with a sink and a window.

`dense_attention` is the same where every row sees every key.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from typing import NamedTuple

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import (
    message,
    require,
    require_dtype,
    require_implementation,
    triton_reason,
)
from sdvg_kernels.attention import gradient, reference

HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn
_OP = "block_causal_attention"
# before the name of an implementation, or before none: chosen when the op runs
_LATER = "?"
_LOG = logging.getLogger("sdvg_kernels")
_value = functools.partial(require, _OP)
_type = functools.partial(require_dtype, _OP)


class KeyBias(NamedTuple):
    """A natural-log bias on the logits of the logical tokens in [start, stop).

    `stop=None` is the start of the row's own block: Krea's `KeyBias(log(0.3), frame)` weighs every
    key after the first frame and before the current block by 0.3.
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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest `T` tokens of each sequence over its ring KV cache.

    Equals `F.scaled_dot_product_attention` over the logical tokens with this mask. Blocks of 2,
    `sink=1`, `window=4`, a query of two blocks (`T=4`) at `cache_seqlens=8`, `x` seen:

        logical token   0 1 2 3 4 5 6 7
        row 0 (token 4) x . x x x x . .     its block ends at 6: it sees [6 - 4, 6) and the sink
        row 1 (token 5) x . x x x x . .
        row 2 (token 6) x . . . x x x x     its block ends at 8
        row 3 (token 7) x . . . x x x x

    Token `t` lives in slot `t` if `t < sink`, else `sink + (t - sink) % (S - sink)`; the ring holds
    the sink and the newest `S - sink` tokens, and one that it no longer holds is not seen. With `L`
    the length, row `i` is token `L - T + i`; its block ends at `min(L, L - T + (i // block_size +
    1) * block_size)`, so the last block may be partial. Rows before the sequence (`L < T`) and rows
    that see no key give 0 and `lse = -inf`. Keys and values that no row sees may be NaN. `T` may be
    more than `S` where `L >= T`: the ring then holds less than the query's own tokens.

    Where gradients are recorded, `out` and `lse` are differentiable in query, k_cache and v_cache,
    once: slots that no row sees get 0, and rows that see no key give 0. Saved are the inputs, `out`
    and `lse`. Whatever runs forward, the gradients come from the Triton kernels, or from the
    reference where it runs forward. `cache_batch_idx` costs a copy of the caches; `out` and e4m3
    caches are refused.

    Args:
        query: [B, T, H, D] bfloat16, float16, float32 (the reference: float64 too).
        k_cache, v_cache: [Bc, S, Hk, D] of query's dtype, `H % Hk == 0`; a layer of a
            [layers, Bc, S, Hk, D] cache. Keys are stored after RoPE. The last dim of all three is
            contiguous, the others may have any strides. Or both float8_e4m3fn, of any strides for
            the reference; "hopper_fp8" takes V transposed, `v.permute(0, 3, 1, 2)` of a v
            [Bc, Hk, D, S] (`v_cache.stride(1) == 1`), with its rows of slots 16 bytes apart:
            8-bit products take both operands along the summed dimension.
        cache_seqlens: [B] int32, tokens, on query's device: the length *including* the query.
        block_size: tokens of a block, counted from the first row; None: the query is one block.
        sink: first tokens that are never evicted, `0 <= sink < S`.
        window: tokens that a block sees beside the sink, itself included; None: all that is held.
            With block_size at least `min(block_size, T)`: a block sees itself.
        cache_batch_idx: [B] int32, the cache row of each sequence; None: row b, and `Bc == B`.
        softmax_scale: factor on the logits; None: `D ** -0.5`.
        key_bias: a log-bias on a range of keys.
        num_splits: parts of the keys, a program each; None: by the shapes. For Triton only: the
            Hopper kernel balances its programs itself.
        k_scale, v_scale: [Bc, S, Hk] float32, contiguous; with e4m3 caches, and only with them: a
            row of K or V is the stored one times its scale (`norm_rope_stage_` writes both).
        out: [B, T, H, D] of query's dtype, written in place; contiguous in the last dim.
        return_lse: also return the log-sum-exp of the logits.
        implementation: "triton", "hopper", "hopper_fp8" or "reference"; one that is asked for never
            falls back. None: Triton on CUDA for head dim 64 and 128, else the reference, and a
            warning is logged. "hopper" is for sm_90, bfloat16 and float16, strides of 16 bytes; an
            `out` that is not so aligned costs a copy. "hopper_fp8" is the same for e4m3 caches: it
            rounds Q and the softmax's weights to e4m3 too, which leaves about 25 dB, and must be
            asked for (`attention.e4m3` says what is rounded, and `balance` what large channels
            need). The reference rounds neither.

    Returns:
        out [B, T, H, D], contiguous; with `return_lse`, also lse [B, H, T] float32, natural log
        (float64 where query is).

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Mutates: `out`. Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: Self-Forcing's cache (arXiv 2506.08009), FlashAttention-2's softmax (arXiv 2307.08691).
    Cost: 4 H D FLOP per row and seen key; a query tile reads the K and V tiles that it sees once.
        The backward: 10 H D FLOP at least, and 14 H D in Triton, which computes logits twice.
    """
    if softmax_scale is None:
        softmax_scale = query.shape[-1] ** -0.5 if query.shape[-1:] > (0,) else 1.0
    known = key_bias is None or isinstance(key_bias, KeyBias)
    _type(known, "key_bias", "be a KeyBias or None", type(key_bias).__name__)
    bias, bias_start, bias_stop = (None, 0, None) if key_bias is None else key_bias
    _check_tensors(query, k_cache, v_cache, cache_seqlens, cache_batch_idx, out)
    _check_scales(k_cache, k_scale, v_scale)
    _value(0 <= sink < k_cache.shape[1], "sink", "be in [0, S), S the slots", sink)
    _value(window is None or window >= 1, "window", "be at least 1 or None", window)
    _value(block_size is None or block_size >= 1, "block_size", "be at least 1 or None", block_size)
    if window is not None and block_size is not None:
        own = min(block_size, query.shape[1])
        _value(window >= own, "window", f"cover a block of {own} tokens", window)
    _value(num_splits is None or num_splits >= 1, "num_splits", "be at least 1 or None", num_splits)
    _value(bias is None or math.isfinite(bias), "key_bias.bias", "be finite", bias)
    _value(math.isfinite(softmax_scale), "softmax_scale", "be finite", softmax_scale)
    recorded = torch.is_grad_enabled() and (
        query.requires_grad or k_cache.requires_grad or v_cache.requires_grad
    )
    if recorded:
        _check_differentiable(k_cache, out)
    # kernels read them side by side; a column or an expanded length is not
    cache_seqlens = cache_seqlens.contiguous()
    if cache_batch_idx is not None:
        cache_batch_idx = cache_batch_idx.contiguous()
    if torch.compiler.is_compiling():
        # what a GPU can run is not to be traced: the op chooses when it runs
        chosen = _LATER + (implementation or "")
    else:
        chosen = _choose(implementation, query, k_cache, v_cache, num_splits)
    options = (
        block_size,
        sink,
        window,
        softmax_scale,
        bias,
        bias_start,
        bias_stop,
        num_splits,
    )
    if recorded:
        if cache_batch_idx is not None:
            # autograd adds up what sequences with the same row give it, in a fixed order
            order = cache_batch_idx.long()
            k_cache, v_cache = k_cache[order], v_cache[order]
        out, lse = torch.ops.sdvg_kernels.block_causal_attention_forward(
            query, k_cache, v_cache, cache_seqlens, *options, chosen
        )
        return (out, lse) if return_lse else out
    tensors = (query, k_cache, v_cache, cache_seqlens, cache_batch_idx)
    arguments = (*tensors, *options, return_lse, chosen, k_scale, v_scale)
    if out is None:
        out, lse = torch.ops.sdvg_kernels.block_causal_attention(*arguments)
    else:
        lse = torch.ops.sdvg_kernels.block_causal_attention_out(*arguments, out=out)
    return (out, lse) if return_lse else out


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every row of `query` over all of `key`: cross-attention, or one whole clip.

    Equals `F.scaled_dot_product_attention` without a mask, of tensors `[B, T, H, D]`, with
    `enable_gqa`. It is `block_causal_attention` over a ring that is full to the last slot: one of
    a sequence of `S`, `2 S`, ... tokens, so many that the query's are among them.

    Args:
        query: [B, T, H, D], any T; dtypes and strides as for `block_causal_attention`.
        key, value: [B, S, Hk, D] of query's dtype, `H % Hk == 0`, `S >= 1`.
        softmax_scale, out, return_lse, implementation: as for `block_causal_attention`.

    Returns:
        out [B, T, H, D], contiguous; with `return_lse`, also lse [B, H, T] float32, natural log.

    Raises:
        As `block_causal_attention`, where `key` and `value` are the caches.

    Mutates: `out`. Deterministic; no host synchronisation; safe in a CUDA graph. Differentiable.
    Cost: 4 B T S H D FLOP.
    """
    _value(query.dim() == 4, "query", "be [B, T, H, D]", query.shape)
    _value(key.dim() == 4, "k_cache", "be [Bc, S, Hk, D] with query's D", key.shape)
    slots = max(key.shape[1], 1)
    # whole rounds: the first slot is the first token that is seen, and no tile wraps
    tokens = slots * max(1, -(-query.shape[1] // slots))
    lengths = torch.full((query.shape[0],), tokens, dtype=torch.int32, device=query.device)
    return block_causal_attention(
        query,
        key,
        value,
        lengths,
        softmax_scale=softmax_scale,
        out=out,
        return_lse=return_lse,
        implementation=implementation,
    )


def _choose(
    implementation: str | None,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_splits: int | None,
) -> str:
    """Return which implementation runs; raise where the one asked for cannot."""
    device, dim = query.device.type, query.shape[3]
    e4m3 = k_cache.dtype is E4M3
    available = _available(device, dim, query.dtype, e4m3)
    if e4m3 and device != "cpu":
        # it rounds more than the reference does: nobody gets it, or what is far slower, unasked
        rule = "be 'hopper_fp8' or 'reference' for e4m3 caches on a GPU"
        _value(implementation is not None, "implementation", rule, None)
    elif implementation is None and (reason := next(iter(available.values()))):
        _warn_once(device, reason)
    where = f"{device} tensors of head dim {dim} and {query.dtype}"
    where += " with e4m3 caches" if e4m3 else ""
    chosen = require_implementation(_OP, implementation, available, where)
    if chosen in ("hopper", "hopper_fp8"):
        _check_hopper(chosen, query, k_cache, v_cache, num_splits)
    return chosen


def _check_tensors(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_batch_idx: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    """Raise unless shapes, dtypes, devices and strides are as the contract says."""
    _value(query.dim() == 4, "query", "be [B, T, H, D]", query.shape)
    shape, cached = query.shape, k_cache.shape
    batch, _, heads, dim = shape
    fits = len(cached) == 4 and cached[3] == dim
    _value(fits, "k_cache", "be [Bc, S, Hk, D] with query's D", cached)
    _value(v_cache.shape == cached, "v_cache", "have the shape of k_cache", v_cache.shape)
    _value(cached[1] > 0, "k_cache", "have at least one slot", cached)
    divides = cached[2] > 0 and heads % cached[2] == 0
    _value(divides, "k_cache", "have a number of heads that divides query's", cached)
    _value(cache_seqlens.shape == shape[:1], "cache_seqlens", "be [B]", cache_seqlens.shape)

    dtype = query.dtype
    known = dtype in DTYPES or dtype == torch.float64
    _type(known, "query", "be bfloat16, float16, float32 or float64", dtype)
    e4m3 = k_cache.dtype is E4M3
    known = e4m3 or k_cache.dtype is dtype
    _type(known, "k_cache", "have query's dtype or be float8_e4m3fn", k_cache.dtype)
    rule = "be float8_e4m3fn, as k_cache is" if e4m3 else "have query's dtype"
    _type(v_cache.dtype is k_cache.dtype, "v_cache", rule, v_cache.dtype)
    lengths_dtype = cache_seqlens.dtype
    _type(lengths_dtype == torch.int32, "cache_seqlens", "be int32", lengths_dtype)

    device = query.device
    _value(k_cache.device == device, "k_cache", "be on query's device", k_cache.device)
    _value(v_cache.device == device, "v_cache", "be on query's device", v_cache.device)
    lengths_device = cache_seqlens.device
    _value(lengths_device == device, "cache_seqlens", "be on query's device", lengths_device)
    if cache_batch_idx is None:
        _value(cached[0] == batch, "k_cache", "have query's B", cached, "or pass cache_batch_idx")
    else:
        index = cache_batch_idx
        _value(index.shape == shape[:1], "cache_batch_idx", "be [B]", index.shape)
        _type(index.dtype == torch.int32, "cache_batch_idx", "be int32", index.dtype)
        _value(index.device == device, "cache_batch_idx", "be on query's device", index.device)
    strides = "another stride"
    remedy = "call .contiguous()"
    if e4m3:
        which, dense = "query", dim <= 1 or query.stride(3) == 1
    else:
        which = "query, k_cache and v_cache"
        dense = dim <= 1 or query.stride(3) == k_cache.stride(3) == v_cache.stride(3) == 1
    _value(dense, which, "be contiguous in the last dim", strides, remedy)
    if out is not None:
        _value(out.shape == shape, "out", "have query's shape", out.shape)
        _type(out.dtype == dtype, "out", "have query's dtype", out.dtype)
        _value(out.device == device, "out", "be on query's device", out.device)
        dense = dim <= 1 or out.stride(3) == 1
        _value(dense, "out", "be contiguous in the last dim", strides)


def _check_scales(
    k_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> None:
    """Raise unless both scales are there with e4m3 caches, and neither without."""
    e4m3 = k_cache.dtype is E4M3
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) is not e4m3:
            rule = "be given with float8_e4m3fn caches and only with them"
            _value(False, name, rule, f"{'none' if e4m3 else 'one'} for {k_cache.dtype}")
        if scale is None:
            continue
        fits = scale.shape == k_cache.shape[:3] and scale.is_contiguous()
        _value(fits, name, "be [Bc, S, Hk] of k_cache, contiguous", scale.shape)
        _type(scale.dtype is torch.float32, name, "be float32", scale.dtype)
        _value(scale.device == k_cache.device, name, "be on query's device", scale.device)


def _check_differentiable(k_cache: torch.Tensor, out: torch.Tensor | None) -> None:
    """Raise where gradients are asked for that there are none of."""
    where, remedy = "where gradients are recorded", "call it under torch.no_grad()"
    _value(out is None, "out", f"be None {where}", "a tensor", remedy)
    e4m3 = k_cache.dtype is E4M3
    _type(not e4m3, "k_cache", f"have query's dtype {where}", k_cache.dtype, remedy)


def _check_hopper(
    name: str,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_splits: int | None,
) -> None:
    """Raise unless the Hopper kernel `name` can take what is otherwise good."""
    from sdvg_kernels.attention import descriptor

    _value(
        num_splits is None, "num_splits", f"be None for {name}, which splits as needed", num_splits
    )
    if name == "hopper_fp8":
        dense = k_cache.stride(3) == 1
        _value(dense, "k_cache", "be contiguous in the last dim", "another stride")
        turned = v_cache.stride(1) == 1 or v_cache.shape[1] == 1
        rule = "be v.permute(0, 3, 1, 2) of a v [Bc, Hk, D, S], so that slots are contiguous,"
        _value(turned, "v_cache", f"{rule} for hopper_fp8", f"strides {v_cache.stride()}")
        # as the kernel reads it
        v_cache = v_cache.permute(0, 2, 3, 1)
    if reason := descriptor.missing(query, k_cache, v_cache):
        rule = "run on tensors that TMA can copy"
        raise NotImplementedError(message(_OP, "implementation", rule, repr(name), reason))


@functools.cache
def _available(device: str, dim: int, dtype: torch.dtype, e4m3: bool = False) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on such tensors, by preference."""
    reason = triton_reason(device)
    if not reason and dim not in HEAD_DIMS:
        reason = f"the Triton kernel has head dim {' and '.join(map(str, HEAD_DIMS))}"
    if not reason and dtype not in DTYPES:
        reason = f"the Triton kernel has no {dtype}"
    hopper = fp8 = reason or _hopper_reason(device, dtype)
    if e4m3:
        reason = reason or "the Triton kernel has no e4m3 caches: use the reference"
        hopper = hopper or "it takes caches of query's dtype: ask for 'hopper_fp8'"
    else:
        fp8 = fp8 or "it takes e4m3 caches with k_scale and v_scale"
    served = {"triton": reason, "hopper": hopper, "hopper_fp8": fp8}
    # the interpreter is for tests: never the default
    # Triton before Hopper until the Hopper kernel has passed its tests on a GPU
    return {"reference": "", **served} if device == "cpu" else {**served, "reference": ""}


def _hopper_reason(device: str, dtype: torch.dtype) -> str:
    """Return "" or why the Hopper kernel cannot run where Triton can."""
    if device != "cuda" or not torch.cuda.is_available():
        return "it needs a Hopper GPU (sm_90)"
    if (capability := torch.cuda.get_device_capability())[0] != 9:
        return f"it needs sm_90, this GPU is sm_{capability[0]}{capability[1]}"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this Triton has no Gluon"
    return "" if dtype in (torch.bfloat16, torch.float16) else f"the Hopper kernel has no {dtype}"


@functools.cache
def _warn_once(device: str, reason: str) -> None:
    _LOG.warning("%s: the reference serves %s tensors here: %s", _OP, device, reason)


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        wide, e4m3 = (_available("cuda", HEAD_DIMS[0], torch.bfloat16, e) for e in (False, True))
        return wide | {"hopper_fp8": e4m3["hopper_fp8"]}
    missing = "no CUDA device is available"
    return dict.fromkeys(("triton", "hopper", "hopper_fp8"), missing) | {"reference": ""}


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the chosen implementation; `out` is written in place where it is given."""
    if implementation.startswith(_LATER):
        asked = implementation.removeprefix(_LATER) or None
        implementation = _choose(asked, query, k_cache, v_cache, num_splits)
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
            query, k_cache, v_cache, cache_seqlens, **options, k_scale=k_scale, v_scale=v_scale
        )
        return (result if out is None else out.copy_(result)), lse
    if implementation == "hopper":
        from sdvg_kernels.attention import hopper

        return hopper.block_causal_attention(
            query, k_cache, v_cache, cache_seqlens, **options, out=out
        )
    if implementation == "hopper_fp8" and k_scale is not None and v_scale is not None:
        from sdvg_kernels.attention import hopper_fp8
        from sdvg_kernels.attention.e4m3 import E4m3Cache

        cache = E4m3Cache(k_cache, v_cache.permute(0, 2, 3, 1), k_scale, v_scale)
        return hopper_fp8.block_causal_attention(query, cache, cache_seqlens, **options, out=out)
    from sdvg_kernels.attention import kernel

    return kernel.block_causal_attention(
        query, k_cache, v_cache, cache_seqlens, **options, num_splits=num_splits, out=out
    )


def _run_out(*arguments: object, out: torch.Tensor) -> torch.Tensor:
    return _run(*arguments, out=out)[1]


def _run_forward(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the chosen implementation where gradients are recorded."""
    *options, implementation = options
    return _run(query, k_cache, v_cache, cache_seqlens, None, *options, True, implementation)


def _run_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *options: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backward that belongs to the chosen implementation."""
    *options, implementation = options
    if implementation.startswith(_LATER):
        asked = implementation.removeprefix(_LATER) or None
        implementation = _choose(asked, query, k_cache, v_cache, None)
    return gradient.run(implementation, grad_out, grad_lse, query, k_cache, v_cache, *options)


_ops.implement("block_causal_attention_forward", cpu=_run_forward, cuda=_run_forward)
_ops.implement("block_causal_attention_backward", cpu=_run_backward, cuda=_run_backward)
_ops.implement("block_causal_attention", cpu=_run, cuda=_run)
_ops.implement("block_causal_attention_out", cpu=_run_out, cuda=_run_out)
