"""`diagonal_mask`, `diagonal_attention`: what the entries of a pass of diagonal decoding see."""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch

from sdvg_kernels import _few_rows, _ops
from sdvg_kernels._check import (
    require,
    require_dtype,
    require_implementation,
)
from sdvg_kernels.diagonal import reference
from sdvg_kernels.diagonal.schedule import TokenGrid


def diagonal_mask(
    slots: torch.Tensor,
    steps: torch.Tensor,
    grid: TokenGrid,
    size: int,
    *,
    cache_leftpad: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bool,
    packed: bool = False,
    implementation: str | None = None,
) -> torch.Tensor:
    """Return which cache slots each entry of a pass sees, for models that take a mask.

    Entry `(b, t)` sees key slot `s` if `s <= slots[b, t]` and `s` is its own slot, or holds no
    token of the grid (prefix, extra tokens, ends of lines), or the token of a pass before
    `steps[b, t]`. 2 x 4 tokens, k = 2, prefix 1, pass 4 (`x` seen; `?` is not decoded yet):

        slot            0 | 1 2 3 4 | 5 6 7 8
        token           p   0 1 2 3   4 5 ? ?
        entry of slot 4 x   x x x x   . . . .     a fill: row 0 is whole
        entry of slot 6 x   x x x x   x x . .     gives the token of slot 7

    Args:
        slots: [B, T] int32, any strides: a `DiagonalSchedule`'s, of one pass or of several; -1 is
            padding and sees nothing.
        steps: [B, T] int32, any strides: its `steps`.
        grid: the layout, a `DiagonalSchedule`'s `grid`.
        size: S, slots of the cache.
        cache_leftpad: [B] int32, slots at the start of a sequence that nobody sees; None: 0.
        dtype: bool; or bfloat16, float16, float32 (the reference: float64 too) for an additive
            mask: 0 where seen, elsewhere the lowest finite number, so that padding gives no NaN.
        packed: bits instead: uint8, bit `s % 8` of byte `s // 8`; `dtype` must be bool.
        implementation: "triton" or "reference"; None: Triton on CUDA, else the reference.

    Returns: [B, T, S], or [B, T, ceil(S / 8)] with `packed`, contiguous.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: Diagonal Decoding (arXiv 2503.14070), the rule of its released loop without the slots
    that are not decoded yet. Cost: the bytes of the mask, once.
    """
    op = "diagonal_mask"
    _check_entries(op, slots, steps, grid, cache_leftpad)
    require(op, size >= 1, "size", "be at least 1", size)
    known = dtype in (torch.bool, *_few_rows.DTYPES, torch.float64)
    require_dtype(op, known, "dtype", "be bool, bfloat16, float16, float32 or float64", dtype)
    fits = not packed or dtype == torch.bool
    require(op, fits, "dtype", "be bool for a packed mask", dtype)
    device = slots.device.type
    available = _few_rows.available(device, dtype=dtype)
    chosen = require_implementation(op, implementation, available, f"{device} tensors")
    return torch.ops.sdvg_kernels.diagonal_mask(
        slots, steps, size, _numbers(grid), cache_leftpad, dtype, packed, chosen
    )


def diagonal_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    steps: torch.Tensor,
    grid: TokenGrid,
    *,
    mode: Literal["exact", "published"] = "exact",
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Attention of the entries of a pass over the cache that holds their own K/V already.

    Equals `F.scaled_dot_product_attention` with the mask that `diagonal_mask` returns, without the
    mask: the rule is computed in the kernel, and slots that no entry sees are not read. They may be
    NaN where the entries of a sequence are all of one pass, as a schedule's are. Padding (slot -1)
    gives 0. There is no backward.

    Args:
        query: [B, T, H, D] bfloat16, float16, float32 (the reference: float64 too), after RoPE.
        k_cache, v_cache: [Bc, S, Hk, D] of query's dtype, `H % Hk == 0`, in place, any strides but
            a contiguous last dim. A slot at or beyond `S` is never read.
        slots, steps: [B, T] int32, any strides, as for `diagonal_mask`; sequences may be at
            different passes.
        grid: the layout, a `DiagonalSchedule`'s `grid`.
        mode: "exact"; or "published", the released loops' raster-causal mask: an entry sees every
            slot up to its own, those that are not decoded yet too, with whatever K/V they hold
            (zeros in a fresh cache, an older video's in another).
        cache_batch_idx: [B] int32, the cache row of each sequence; None: row b, and `Bc == B`.
        cache_leftpad: [B] int32, slots at the start of a sequence that nobody sees; None: 0.
        softmax_scale: factor on the logits; None: `D ** -0.5`.
        num_splits: parts of the keys, a program each; None: by the shapes.
        implementation: "triton" or "reference"; one that is asked for never falls back. None:
            Triton on CUDA for head dims 64, 100 and 128, else the reference, and a warning is
            logged.

    Returns: [B, T, H, D], contiguous.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: Diagonal Decoding (arXiv 2503.14070); the online softmax of FlashAttention-2 (arXiv
    2307.08691). Cost: the K/V of the slots that are seen, once from memory.
    """
    op = "diagonal_attention"
    _check_entries(op, slots, steps, grid, cache_leftpad)
    _check_caches(op, query, k_cache, v_cache, slots, cache_batch_idx)
    if softmax_scale is None:
        softmax_scale = query.shape[3] ** -0.5 if query.shape[3] else 1.0
    modes = ("exact", "published")
    require(op, mode in modes, "mode", "be 'exact' or 'published'", repr(mode))
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
    return torch.ops.sdvg_kernels.diagonal_attention(
        query,
        k_cache,
        v_cache,
        slots,
        steps,
        _numbers(grid),
        mode == "published",
        cache_batch_idx,
        cache_leftpad,
        softmax_scale,
        num_splits,
        chosen,
    )


def _check_caches(
    op: str,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    cache_batch_idx: torch.Tensor | None,
) -> None:
    """Raise unless query and caches are as the contract says."""
    _few_rows.require_caches(op, query, k_cache, v_cache, cache_batch_idx is not None)
    shape, device = query.shape, query.device
    require(op, slots.shape == shape[:2], "slots", "be [B, T] of query", slots.shape)
    require(op, slots.device == device, "slots", "be on query's device", slots.device)
    if cache_batch_idx is not None:
        index = cache_batch_idx
        require(op, index.shape == shape[:1], "cache_batch_idx", "be [B]", index.shape)
        require_dtype(op, index.dtype == torch.int32, "cache_batch_idx", "be int32", index.dtype)
        here = index.device == device
        require(op, here, "cache_batch_idx", "be on query's device", index.device)


def _check_entries(
    op: str,
    slots: torch.Tensor,
    steps: torch.Tensor,
    grid: TokenGrid,
    cache_leftpad: torch.Tensor | None,
) -> None:
    """Raise unless slots, steps and cache_leftpad are as the contracts say."""
    require(op, slots.dim() == 2, "slots", "be [B, T]", slots.shape)
    require_dtype(op, slots.dtype == torch.int32, "slots", "be int32", slots.dtype)
    require(op, steps.shape == slots.shape, "steps", "have the shape of slots", steps.shape)
    require_dtype(op, steps.dtype == torch.int32, "steps", "be int32", steps.dtype)
    require(op, steps.device == slots.device, "steps", "be on slots' device", steps.device)
    known = isinstance(grid, TokenGrid)
    require_dtype(op, known, "grid", "be a TokenGrid", type(grid).__name__)
    if cache_leftpad is not None:
        pad = cache_leftpad
        require(op, pad.shape == slots.shape[:1], "cache_leftpad", "be [B]", pad.shape)
        require_dtype(op, pad.dtype == torch.int32, "cache_leftpad", "be int32", pad.dtype)
        here = pad.device == slots.device
        require(op, here, "cache_leftpad", "be on slots' device", pad.device)


@functools.cache
def _numbers(grid: TokenGrid) -> list[int]:
    """Return the grid as the ops take it."""
    sizes = [grid.prefix, grid.height, grid.width, grid.row_stride, grid.frame_stride]
    return [*sizes, grid.k, grid.lead, grid.frame_passes]


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        return dict(_few_rows.available("cuda"))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run_mask(
    slots: torch.Tensor,
    steps: torch.Tensor,
    size: int,
    grid: list[int],
    cache_leftpad: torch.Tensor | None,
    dtype: torch.dtype,
    packed: bool,
    implementation: str,
) -> torch.Tensor:
    """Run the chosen implementation."""
    options = {"size": size, "grid": grid, "cache_leftpad": cache_leftpad}
    options |= {"dtype": dtype, "packed": packed}
    if implementation == "reference":
        return reference.diagonal_mask(slots, steps, **options)
    from sdvg_kernels.diagonal import mask

    return mask.diagonal_mask(slots, steps, **options)


def _run_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    steps: torch.Tensor,
    grid: list[int],
    published: bool,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    softmax_scale: float,
    num_splits: int | None,
    implementation: str,
) -> torch.Tensor:
    """Run the chosen implementation."""
    tensors = (query, k_cache, v_cache, slots, steps)
    options = {"grid": grid, "published": published, "cache_batch_idx": cache_batch_idx}
    options |= {"cache_leftpad": cache_leftpad, "softmax_scale": softmax_scale}
    if implementation == "reference":
        return reference.diagonal_attention(*tensors, **options)
    from sdvg_kernels.diagonal import kernel

    return kernel.diagonal_attention(*tensors, **options, num_splits=num_splits)


_ops.implement("diagonal_mask", cpu=_run_mask, cuda=_run_mask)
_ops.implement("diagonal_attention", cpu=_run_attention, cuda=_run_attention)
