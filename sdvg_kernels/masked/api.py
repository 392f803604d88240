"""`tree_attention`: what a chain and a token tree see of a cache, in one launch."""

from __future__ import annotations

import math

import torch

from sdvg_kernels import _few_rows, _ops
from sdvg_kernels._check import (
    require,
    require_dtype,
    require_implementation,
)
from sdvg_kernels.masked import reference


def tree_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    *,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Attention of the entries of a target pass over the cache that holds their own K/V already.

    An entry sees all committed slots, `cache_leftpad[b] <= s < lengths[b]`, and of the slots behind
    them those that its mask names: slot `lengths[b] + j` if bit `j % 32` of word `j // 32` is set.
    Length 3, a root with two children, of which the first has a child (`x` seen):

        slot        0 1 2 | 3 4 5 6        word 0
        root        x x x | x . . .        0b0001
        child       x x x | x x . .        0b0011
        child       x x x | x . x .        0b0101
        grandchild  x x x | x x . x        0b1011

    Equals `F.scaled_dot_product_attention` with that mask. Slots that no entry of a sequence sees
    are not read: they may be NaN. An entry whose words are all 0 is padding: it sees nothing, of
    the committed slots neither, and gives 0. A chain before the tree has bits of its own: words in
    front of the tree's. There is no backward.

    Args:
        query: [B, T, H, D] bfloat16, float16, float32 (the reference: float64 too), after RoPE.
        k_cache, v_cache: [Bc, S, Hk, D] of query's dtype, `H % Hk == 0`, in place, any strides but
            a contiguous last dim. A slot at or beyond `S` is never read.
        lengths: [B] int32, contiguous: committed slots of each sequence.
        mask: [B, T, W] int32, any strides, W at least 1; a `TokenTree`'s `mask`, or one with words
            before it.
        cache_batch_idx: [B] int32, contiguous: the cache row of each sequence; None: row b, and
            `Bc == B`.
        cache_leftpad: [B] int32, contiguous: slots at the start of a sequence that nobody sees;
            None: 0.
        softmax_scale: factor on the logits; None: `D ** -0.5`.
        num_splits: parts of the keys, a program each; None: by the shapes.
        implementation: "triton" or "reference"; one that is asked for never falls back. None:
            Triton on CUDA for head dims 64, 100 and 128, else the reference, and a warning is
            logged.

    Returns: [B, T, H, D], contiguous.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: tree attention of SpecInfer (arXiv 2305.09781) and EAGLE-2 (arXiv 2406.16858); the
    online softmax of FlashAttention-2 (arXiv 2307.08691). Cost: the K/V of the slots that are seen,
    once from memory.
    """
    op = "tree_attention"
    _check(op, query, k_cache, v_cache, lengths, mask, cache_batch_idx, cache_leftpad)
    if softmax_scale is None:
        softmax_scale = query.shape[3] ** -0.5 if query.shape[3] else 1.0
    finite = math.isfinite(softmax_scale)
    require(op, finite, "softmax_scale", "be finite", softmax_scale)
    good = num_splits is None or num_splits >= 1
    require(op, good, "num_splits", "be at least 1 or None", num_splits)
    device, dim = query.device.type, query.shape[3]
    available = _few_rows.available(device, dim, query.dtype)
    if implementation is None and (reason := next(iter(available.values()))):
        _few_rows.warn_once(op, device, reason)
    where = f"{device} tensors of head dim {dim} and {query.dtype}"
    chosen = require_implementation(op, implementation, available, where)
    return torch.ops.sdvg_kernels.tree_attention(
        query,
        k_cache,
        v_cache,
        lengths,
        mask,
        cache_batch_idx,
        cache_leftpad,
        softmax_scale,
        num_splits,
        chosen,
    )


def _check(
    op: str,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
) -> None:
    """Raise unless the tensors are as the contract says."""
    _few_rows.require_caches(op, query, k_cache, v_cache, cache_batch_idx is not None)
    (batch, rows), device = query.shape[:2], query.device
    bits = mask.shape
    fits = len(bits) == 3 and bits[0] == batch and bits[1] == rows and bits[2] > 0
    require(op, fits, "mask", "be [B, T, W] with query's B and T and a word at least", bits)
    require_dtype(op, mask.dtype is torch.int32, "mask", "be int32", mask.dtype)
    require(op, mask.device == device, "mask", "be on query's device", mask.device)
    _check_numbers(op, "lengths", lengths, batch, device)
    if cache_leftpad is not None:
        _check_numbers(op, "cache_leftpad", cache_leftpad, batch, device)
    if cache_batch_idx is not None:
        _check_numbers(op, "cache_batch_idx", cache_batch_idx, batch, device)


def _check_numbers(
    op: str, name: str, numbers: torch.Tensor, batch: int, device: torch.device
) -> None:
    """Raise unless `numbers` holds one for each of `batch` sequences."""
    shape = numbers.shape
    require(op, len(shape) == 1 and shape[0] == batch, name, "be [B] of query", shape)
    require_dtype(op, numbers.dtype is torch.int32, name, "be int32", numbers.dtype)
    require(op, numbers.device == device, name, "be on query's device", numbers.device)
    if not numbers.is_contiguous():
        require(op, False, name, "be contiguous", numbers.stride(), "call .contiguous()")


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        return dict(_few_rows.available("cuda"))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    softmax_scale: float,
    num_splits: int | None,
    implementation: str,
) -> torch.Tensor:
    """Run the chosen implementation."""
    tensors = (query, k_cache, v_cache, lengths, mask)
    options = {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    options |= {"softmax_scale": softmax_scale}
    if implementation == "reference":
        return reference.tree_attention(*tensors, **options)
    from sdvg_kernels.masked import kernel

    return kernel.tree_attention(*tensors, **options, num_splits=num_splits)


_ops.implement("tree_attention", cpu=_run, cuda=_run)
