"""What ops that attend from a few rows to a cache ask of their arguments, and where they run."""

from __future__ import annotations

import functools
import logging

import torch

from sdvg_kernels._check import by_preference, require, require_dtype, triton_reason

HEAD_DIMS = (64, 100, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG = logging.getLogger("sdvg_kernels")


def require_caches(
    op: str, query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, indexed: bool
) -> None:
    """Raise unless query [B, T, H, D] and caches [Bc, S, Hk, D] fit; Bc is B unless `indexed`."""
    shape, cached = query.shape, k_cache.shape
    require(op, len(shape) == 4, "query", "be [B, T, H, D]", shape)
    fits = len(cached) == 4 and cached[3] == shape[3] and cached[1] > 0
    require(op, fits, "k_cache", "be [Bc, S, Hk, D] with query's D and a slot at least", cached)
    require(op, v_cache.shape == cached, "v_cache", "have the shape of k_cache", v_cache.shape)
    divides = cached[2] > 0 and shape[2] % cached[2] == 0
    require(op, divides, "k_cache", "have a number of heads that divides query's", cached)
    dtype, device = query.dtype, query.device
    known = dtype in DTYPES or dtype == torch.float64
    require_dtype(op, known, "query", "be bfloat16, float16, float32 or float64", dtype)
    require_dtype(op, k_cache.dtype is dtype, "k_cache", "have query's dtype", k_cache.dtype)
    require_dtype(op, v_cache.dtype is dtype, "v_cache", "have query's dtype", v_cache.dtype)
    require(op, k_cache.device == device, "k_cache", "be on query's device", k_cache.device)
    require(op, v_cache.device == device, "v_cache", "be on query's device", v_cache.device)
    dense = shape[3] <= 1 or query.stride()[3] == k_cache.stride()[3] == v_cache.stride()[3] == 1
    which, remedy = "query, k_cache and v_cache", "call .contiguous()"
    require(op, dense, which, "be contiguous in the last dim", "another stride", remedy)
    if not indexed:
        remedy = "or pass cache_batch_idx"
        require(op, cached[0] == shape[0], "k_cache", "have query's B", cached, remedy)


@functools.cache
def available(
    device: str, dim: int = HEAD_DIMS[0], dtype: torch.dtype = torch.bfloat16
) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on such tensors, by preference."""
    reason = triton_reason(device)
    if not reason and dim not in HEAD_DIMS:
        *dims, last = HEAD_DIMS
        reason = f"the Triton kernel has head dim {', '.join(map(str, dims))} and {last}"
    if not reason and dtype == torch.float64:
        reason = "the Triton kernel has no torch.float64"
    # the interpreter is for tests: never the default
    return by_preference(device, reason)


@functools.cache
def warn_once(op: str, device: str, reason: str) -> None:
    """Log that the reference serves such tensors, and why."""
    _LOG.warning("%s: the reference serves %s tensors here: %s", op, device, reason)
