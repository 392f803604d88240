"""The gradients of `block_causal_attention` in Triton: three portable kernels, no atomics.

    p = 2^(x - lse)    dx = p (dout V^T - delta)    delta = rowsum(dout out) - dlse
    dq = scale dx K    dk = scale dx^T q            dv = p^T dout

with the logits x in base 2, as the forward has them (FlashAttention-2, arXiv 2307.08691, section
3.1.2). `attention_delta_kernel` writes delta, query_gradient.py has the kernel of dq, and
key_gradient.py that of dk and dv: each computes p and dx anew, 7 products for 5, so that every
gradient is summed in one program, in one order.

Layout: query, out and their gradients [B, T, H, D]; caches and theirs [B, S, Hk, D]; lse, its
gradient and delta [B, H, T] float32. What is returned is contiguous.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels._budget import Budget, Compilation
from sdvg_kernels._check import message
from sdvg_kernels._device import capability, on
from sdvg_kernels.attention import config
from sdvg_kernels.attention.key_gradient import attention_key_gradient_kernel
from sdvg_kernels.attention.query_gradient import attention_query_gradient_kernel
from sdvg_kernels.attention.tiles import LOG2E, NO_WINDOW, SIZES, UPCAST


@triton.jit(do_not_specialize=("T", "H"))
def attention_delta_kernel(
    grad_out,
    grad_lse,
    out,
    delta,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_lb,
    stride_lh,
    stride_lt,
    T,
    H,
    D: tl.constexpr,
    BT: tl.constexpr,
):
    """Write delta [B, H, T] of BT rows: rowsum(dout out) - dlse."""
    n_t = tl.cdiv(T, BT)
    i_bh = tl.program_id(0) // n_t
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    # [BT]
    o_i = tl.program_id(0) % n_t * BT + tl.arange(0, BT)
    m_i = o_i < T
    o_i = o_i.to(tl.int64)
    o_d = tl.arange(0, D)
    # [BT, D]
    p_g = grad_out + i_b * stride_gb + i_h * stride_gh + o_i[:, None] * stride_gt + o_d[None, :]
    p_o = out + ((i_b * T + o_i) * H + i_h)[:, None] * D + o_d[None, :]
    b_g = tl.load(p_g, mask=m_i[:, None], other=0.0).to(tl.float32)
    b_o = tl.load(p_o, mask=m_i[:, None], other=0.0).to(tl.float32)
    b_l = tl.load(grad_lse + i_b * stride_lb + i_h * stride_lh + o_i * stride_lt, mask=m_i)
    tl.store(delta + (i_b * H + i_h) * T + o_i, tl.sum(b_g * b_o, 1) - b_l, mask=m_i)


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
    """Return the gradients of query, k_cache and v_cache in their dtype ([0] where not needed)."""
    batch, rows, heads, dim = query.shape
    size, cached = k_cache.shape[1:3]
    grad_query = query.new_empty(query.shape if need_query else (0,))
    grad_key, grad_value = (
        query.new_empty(k_cache.shape if need_cache else (0,)) for _ in range(2)
    )
    if out.numel() == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_()
    if grad_out.stride(3) != 1:
        # what a sum or a mean gives: one value for all
        grad_out = grad_out.contiguous()
    # a compiler may have kept them in another layout than the op gave them
    out, lse = out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    for_query, for_keys = config.choose_backward(capability(query.device), dim, query.dtype)
    # offsets within a tile are 32 bits wide
    tile = max(for_query.BS, for_keys.BS, for_keys.BT)
    tensors = {"query": query, "k_cache": k_cache, "v_cache": v_cache, "its gradient": grad_out}
    for name, tensor in tensors.items():
        if (stride := tensor.stride(1)) * tile >= 2**31:
            rule = f"have a stride of tokens below {2**31 // tile} for Triton"
            raise NotImplementedError(message("block_causal_attention", name, rule, stride))
    arguments = {
        "query": query,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cache_seqlens": cache_seqlens,
        "grad_out": grad_out,
        "lse": lse,
        "delta": delta,
        "stride_qb": query.stride(0),
        "stride_qt": query.stride(1),
        "stride_qh": query.stride(2),
        "stride_kb": k_cache.stride(0),
        "stride_ks": k_cache.stride(1),
        "stride_kh": k_cache.stride(2),
        "stride_vb": v_cache.stride(0),
        "stride_vs": v_cache.stride(1),
        "stride_vh": v_cache.stride(2),
        "stride_gb": grad_out.stride(0),
        "stride_gt": grad_out.stride(1),
        "stride_gh": grad_out.stride(2),
        "T": rows,
        "S": size,
        "H": heads,
        "block_size": rows if block_size is None else min(block_size, rows),
        "sink": sink,
        "window": NO_WINDOW if window is None else min(window, NO_WINDOW),
        "scale": softmax_scale * LOG2E.value,
        "softmax_scale": softmax_scale,
        "bias": (bias or 0.0) * LOG2E.value,
        "bias_start": bias_start,
        "bias_stop": bias_stop or 0,
        "GROUP": heads // cached,
        "D": dim,
        "HAS_BIAS": bias is not None,
        "BIAS_TO_BLOCK": bias_stop is None,
        "UPCAST_DOT": UPCAST and query.dtype == torch.bfloat16,
    }
    with on(query.device):
        attention_delta_kernel[(batch * heads * triton.cdiv(rows, config.DELTA.BT),)](
            grad_out=grad_out,
            grad_lse=grad_lse,
            out=out,
            delta=delta,
            stride_gb=grad_out.stride(0),
            stride_gt=grad_out.stride(1),
            stride_gh=grad_out.stride(2),
            stride_lb=grad_lse.stride(0),
            stride_lh=grad_lse.stride(1),
            stride_lt=grad_lse.stride(2),
            T=rows,
            H=heads,
            D=dim,
            BT=config.DELTA.BT,
            num_warps=config.DELTA.num_warps,
        )
        if need_cache:
            attention_key_gradient_kernel[(batch * cached * triton.cdiv(size, for_keys.BS),)](
                **arguments,
                grad_key=grad_key,
                grad_value=grad_value,
                BT=for_keys.BT,
                BS=for_keys.BS,
                EDGE_STAGES=for_keys.edge_stages,
                num_warps=for_keys.num_warps,
                num_stages=for_keys.num_stages,
            )
        if need_query:
            attention_query_gradient_kernel[(batch * heads * triton.cdiv(rows, for_query.BT),)](
                **arguments,
                grad_query=grad_query,
                BT=for_query.BT,
                BS=for_query.BS,
                EDGE_STAGES=for_query.edge_stages,
                num_warps=for_query.num_warps,
                num_stages=for_query.num_stages,
            )
    return grad_query, grad_key, grad_value


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield every shipped configuration for `arch`: plain, and grouped heads with a bias."""
    stride = ("stride_qb", "stride_qt", "stride_qh", "stride_kb", "stride_ks", "stride_kh")
    stride += ("stride_vb", "stride_vs", "stride_vh", "stride_gb", "stride_gt", "stride_gh")
    inputs = ("query", "k_cache", "v_cache", "grad_out")
    for (table_arch, dim, is_float32), (for_query, for_keys) in config.BACKWARD.items():
        if table_arch != arch:
            continue
        dtype = torch.float32 if is_float32 else torch.bfloat16
        name = "fp32" if is_float32 else "bf16"
        yield _delta_compilation(arch, dim, name)
        types = dict.fromkeys((*stride, *SIZES), "i32")
        types |= dict.fromkeys(("scale", "softmax_scale", "bias"), "fp32")
        types |= dict.fromkeys(inputs, f"*{name}") | {"cache_seqlens": "*i32"}
        types |= dict.fromkeys(("lse", "delta"), "*fp32")
        kernels = (
            (attention_query_gradient_kernel, ("grad_query",), for_query, for_query.BT),
            (attention_key_gradient_kernel, ("grad_key", "grad_value"), for_keys, for_keys.BS),
        )
        for (kernel, written, launch, product), full in itertools.product(kernels, (False, True)):
            yield Compilation(
                kernel=kernel,
                arch=arch,
                config=f"D{dim} {name} BT{launch.BT} BS{launch.BS}"
                + (" bias grouped" if full else ""),
                signature=types | dict.fromkeys(written, f"*{name}"),
                constants={
                    "GROUP": 4 if full else 1,
                    "D": dim,
                    "BT": launch.BT,
                    "BS": launch.BS,
                    "EDGE_STAGES": launch.edge_stages,
                    "HAS_BIAS": full,
                    "BIAS_TO_BLOCK": full,
                    "UPCAST_DOT": False,
                },
                divisible=(*inputs, *written, "cache_seqlens", "lse", "delta", *stride),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                budget=config.budget(arch, product, dtype),
            )


def _delta_compilation(arch: int, dim: int, name: str) -> Compilation:
    tensors = ("grad_out", "grad_lse", "out", "delta")
    stride = ("stride_gb", "stride_gt", "stride_gh", "stride_lb", "stride_lh")
    types = dict.fromkeys(("grad_out", "out"), f"*{name}")
    return Compilation(
        kernel=attention_delta_kernel,
        arch=arch,
        config=f"D{dim} {name} BT{config.DELTA.BT}",
        signature=types
        | dict.fromkeys(("grad_lse", "delta"), "*fp32")
        | dict.fromkeys((*stride, "stride_lt", "T", "H"), "i32"),
        constants={"D": dim, "BT": config.DELTA.BT},
        divisible=(*tensors, *stride),
        num_warps=config.DELTA.num_warps,
        num_stages=1,
        budget=Budget(wide=1),
    )
