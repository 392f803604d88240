"""The gradients of K and V in Triton: backward.py says what they are.

A program owns BS slots of one head of the cache, and walks the rows that see one of them, of all
heads that share it. What a slot holds follows from the length, and so do the rows that see it: a
block that ends at `e` sees the sink's tokens below `e` and the ring's in [e - window, e), and ends
rise with rows, so that they are one run of rows for each key. Row tiles are numbered as key tiles
are: first the edges, where a row misses a key; then the interior, where nothing is masked. Each
slot is written once, and those that nobody sees, which are not read, get 0.

Layout: query, grad_out [B, T, H, D]; caches and their gradients [B, S, Hk, D]; lse and delta
[B, H, T] float32. Gradients are contiguous.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from sdvg_kernels.attention.tiles import (
    LOG2E,
    SIZES,
    add_product,
    product,
)


@triton.jit
def _less(o_r, o_stop):
    """Return o_r[None, :] < o_stop[:, None]."""
    # bits 1 and 2 of a column of products are the thread's: what is left are constants of the code
    return (o_r & -7)[None, :] < o_stop[:, None] - (o_r & 6)[None, :]


@triton.jit
def _add_rows(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_g,
    p_lse,
    p_delta,
    stride_qt,
    stride_gt,
    i0,
    i_low,
    i_high,
    o_low,
    o_high,
    o_bias,
    scale,
    bias,
    BT: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Return dk / softmax_scale and dv [BS, D] with the rows [i0, i0 + BT) added.

    If MASKED, only those in [i_low, i_high), and to each key those in its [o_low, o_high).
    """
    # [BT]
    o_r = tl.arange(0, BT)
    o_i = i0 + o_r
    o_d = tl.arange(0, D)
    # offsets within the tile do not change from tile to tile
    p_q += i0.to(tl.int64) * stride_qt
    p_g += i0.to(tl.int64) * stride_gt
    p_q = p_q + (o_r[:, None] * stride_qt + o_d[None, :])
    p_g = p_g + (o_r[:, None] * stride_gt + o_d[None, :])
    if MASKED:
        # rows that see nothing are not read: their gradients may be anything
        m_i = (o_i >= i_low) & (o_i < i_high)
        b_q = tl.load(p_q, mask=m_i[:, None], other=0.0)
        b_g = tl.load(p_g, mask=m_i[:, None], other=0.0)
        b_lse = tl.load(p_lse + o_i, mask=m_i, other=0.0) * LOG2E
        b_delta = tl.load(p_delta + o_i, mask=m_i, other=0.0)
    else:
        b_q = tl.load(p_q)
        b_g = tl.load(p_g)
        b_lse = tl.load(p_lse + o_i) * LOG2E
        b_delta = tl.load(p_delta + o_i)

    # [BS, BT]
    b_x = product(b_k, tl.trans(b_q), UPCAST_DOT) * scale
    if HAS_BIAS:
        b_x += tl.where(_less(o_r, o_bias - i0), 0.0, bias)
    b_p = tl.exp2(b_x - b_lse[None, :])
    if MASKED:
        m_x = _less(o_r, o_high - i0) & (_less(o_r, o_low - i0) == 0)
        b_p = tl.where(m_x, b_p, 0.0)
    b_dv = add_product(b_p, b_g, b_dv, UPCAST_DOT)
    b_dx = b_p * (product(b_v, tl.trans(b_g), UPCAST_DOT) - b_delta[None, :])
    b_dk = add_product(b_dx, b_q, b_dk, UPCAST_DOT)
    return b_dk, b_dv


@triton.jit
def _rows_until(o_e, L, T, block_size):
    """Return the number of first rows whose blocks end at `o_e` at most."""
    whole = tl.maximum(o_e - (L - T), 0) // block_size * block_size
    return tl.where(o_e >= L, T, tl.minimum(whole, T))


@triton.jit
def _head_and_tile(u, n, i_g, GROUP: tl.constexpr):
    """Return the head of iteration u of n for each head of the cache's head i_g, and its tile."""
    if GROUP == 1:
        i_h = i_g
        i_t = u
    else:
        i_h = i_g * GROUP + u // n
        i_t = u % n
    return i_h, i_t


@triton.jit(do_not_specialize=SIZES)
def attention_key_gradient_kernel(
    query,
    k_cache,
    v_cache,
    cache_seqlens,
    grad_out,
    lse,
    delta,
    grad_key,
    grad_value,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_gb,
    stride_gt,
    stride_gh,
    T,
    S,
    H,
    block_size,
    sink,
    window,
    scale,
    softmax_scale,
    bias,
    bias_start,
    bias_stop,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_TO_BLOCK: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Write grad_key and grad_value [B, S, Hk, D]."""
    # slot tiles of one head are neighbours: they share its rows in L2. Early slots, which more rows
    # see, begin first
    n_s = tl.cdiv(S, BS)
    i_s = tl.program_id(0) % n_s
    i_b = tl.program_id(0) // n_s // (H // GROUP)
    i_g = tl.program_id(0) // n_s % (H // GROUP)
    L = tl.load(cache_seqlens + i_b)

    # [BS]: the newest token of each slot, and the rows [o_low, o_high) that see it
    o_s = i_s * BS + tl.arange(0, BS)
    ring = S - sink
    o_t = tl.where(o_s < sink, o_s, o_s + tl.maximum(L - 1 - o_s, 0) // ring * ring)
    o_low = tl.maximum(_rows_until(o_t, L, T, block_size), T - L)
    o_low = tl.where(o_s < S, o_low, T)
    o_high = tl.where(o_t < sink, T, _rows_until(o_t + window, L, T, block_size))
    m_s = o_low < o_high
    # those that see some of these keys, [i_low, i_high), and all of them, [f_low, f_high)
    i_low = tl.min(tl.where(m_s, o_low, T), 0)
    i_high = tl.max(tl.where(m_s, o_high, 0), 0)
    f_low = tl.max(o_low, 0)
    f_high = tl.min(tl.where(m_s, o_high, 0), 0)
    # from which row on the bias is on the key
    o_bias = o_t
    if HAS_BIAS:
        if BIAS_TO_BLOCK:
            o_bias = tl.where(o_t < L - T, 0, ((o_t - (L - T)) // block_size + 1) * block_size)
        else:
            o_bias = tl.where(o_t < bias_stop, 0, T)
        o_bias = tl.where(o_t >= bias_start, o_bias, T)
    # row tiles from i_low on; [first, stop) are the interior
    n_t = tl.cdiv(tl.maximum(i_high - i_low, 0), BT)
    first = tl.minimum(tl.cdiv(tl.maximum(f_low - i_low, 0), BT), n_t)
    stop = tl.maximum(tl.maximum(f_high - i_low, 0) // BT, first)
    n_edge = first + n_t - stop
    n_full = stop - first

    i_b = i_b.to(tl.int64)
    i_g = i_g.to(tl.int64)
    i_0 = (i_s * BS).to(tl.int64)
    o_d = tl.arange(0, D)
    # [BS, D]; offsets within the tile are 32 bits wide: addresses would take registers for long
    o_r = tl.arange(0, BS)[:, None]
    p_k = k_cache + i_b * stride_kb + i_g * stride_kh + i_0 * stride_ks
    p_v = v_cache + i_b * stride_vb + i_g * stride_vh + i_0 * stride_vs
    b_k = tl.load(p_k + (o_r * stride_ks + o_d[None, :]), mask=m_s[:, None], other=0.0)
    b_v = tl.load(p_v + (o_r * stride_vs + o_d[None, :]), mask=m_s[:, None], other=0.0)
    b_dk = tl.zeros([BS, D], tl.float32)
    b_dv = tl.zeros([BS, D], tl.float32)
    p_q = query + i_b * stride_qb
    p_g = grad_out + i_b * stride_gb
    for u in tl.range(0, GROUP * n_edge, num_stages=EDGE_STAGES):
        i_h, i_t = _head_and_tile(u, n_edge, i_g, GROUP)
        i_t = tl.where(i_t < first, i_t, i_t - first + stop)
        b_dk, b_dv = _add_rows(
            b_dk,
            b_dv,
            b_k,
            b_v,
            p_q + i_h * stride_qh,
            p_g + i_h * stride_gh,
            lse + (i_b * H + i_h) * T,
            delta + (i_b * H + i_h) * T,
            stride_qt,
            stride_gt,
            i_low + i_t * BT,
            i_low,
            i_high,
            o_low,
            o_high,
            o_bias,
            scale,
            bias,
            BT,
            D,
            True,
            HAS_BIAS,
            UPCAST_DOT,
        )
    for u in range(0, GROUP * n_full):
        i_h, i_t = _head_and_tile(u, n_full, i_g, GROUP)
        b_dk, b_dv = _add_rows(
            b_dk,
            b_dv,
            b_k,
            b_v,
            p_q + i_h * stride_qh,
            p_g + i_h * stride_gh,
            lse + (i_b * H + i_h) * T,
            delta + (i_b * H + i_h) * T,
            stride_qt,
            stride_gt,
            i_low + (first + i_t) * BT,
            0,
            0,
            o_low,
            o_high,
            o_bias,
            scale,
            bias,
            BT,
            D,
            False,
            HAS_BIAS,
            UPCAST_DOT,
        )
    # a slot that no row sees has added 0 times 0
    o_g = ((i_b * S + i_0) * (H // GROUP) + i_g) * D
    o_r = o_r * (H // GROUP * D) + o_d[None, :]
    m_s = (i_s * BS + tl.arange(0, BS) < S)[:, None]
    b_dk = (b_dk * softmax_scale).to(grad_key.dtype.element_ty)
    tl.store(grad_key + o_g + o_r, b_dk, mask=m_s)
    tl.store(grad_value + o_g + o_r, b_dv.to(grad_value.dtype.element_ty), mask=m_s)
