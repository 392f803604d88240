"""The gradient of the query in Triton: backward.py says what it is.

A program owns BT query rows of one head and walks the key tiles that they see, in the forward's
order (tiles.py). Layout: query, grad_out, grad_query [B, T, H, D]; caches [B, S, Hk, D]; lse and
delta [B, H, T] float32. grad_query is contiguous.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl

from sdvg_kernels.attention.tiles import (
    LOG2E,
    SIZES,
    add_bias,
    add_product,
    block_ends,
    edge_tile,
    interior_tile,
    key_tiles,
    load_keys,
    product,
)


@triton.jit
def _add_keys(
    b_dq,
    b_q,
    b_g,
    b_lse,
    b_delta,
    p_k,
    p_v,
    stride_ks,
    stride_vs,
    t0,
    t_low,
    t_high,
    o_end,
    o_begin,
    sink,
    window,
    S,
    scale,
    bias,
    bias_start,
    bias_stop,
    BS: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_TO_BLOCK: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Return dq / softmax_scale [BT, D] with the tokens [t0, t0 + BS) added."""
    o_t, m_s, b_k, b_v = load_keys(
        p_k, p_v, stride_ks, stride_vs, t0, t_low, t_high, sink, S, BS, D, MASKED
    )
    # [BT, BS]
    b_x = product(b_q, tl.trans(b_k), UPCAST_DOT) * scale
    if HAS_BIAS:
        b_x = add_bias(
            b_x, o_t[None, :], o_begin[:, None], bias, bias_start, bias_stop, BIAS_TO_BLOCK
        )
    b_p = tl.exp2(b_x - b_lse[:, None])
    if MASKED:
        m_w = (o_t[None, :] < sink) | (o_t[None, :] >= o_end[:, None] - window)
        b_p = tl.where(m_s[None, :] & (o_t[None, :] < o_end[:, None]) & m_w, b_p, 0.0)
    b_dx = b_p * (product(b_g, tl.trans(b_v), UPCAST_DOT) - b_delta[:, None])
    return add_product(b_dx, b_k, b_dq, UPCAST_DOT)


@triton.jit(do_not_specialize=SIZES)
def attention_query_gradient_kernel(
    query,
    k_cache,
    v_cache,
    cache_seqlens,
    grad_out,
    lse,
    delta,
    grad_query,
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
    """Write grad_query [B, T, H, D]."""
    n_t = tl.cdiv(T, BT)
    # later rows see more: they begin first, so that no program is left with a long tile
    i_t = n_t - 1 - tl.program_id(0) % n_t
    i_b = tl.program_id(0) // n_t // H
    i_h = tl.program_id(0) // n_t % H
    L = tl.load(cache_seqlens + i_b)
    # [BT]
    o_i = i_t * BT + tl.arange(0, BT)
    m_i = o_i < T
    o_begin, o_end = block_ends(o_i, L, T, block_size)
    i_last = tl.minimum(i_t * BT + BT, T) - 1
    low, high, sink_high, n_sink, n_ring, first, stop, wrap, n_edge = key_tiles(
        i_t * BT, i_last, L, T, S, block_size, sink, window, BS
    )
    # rows before the sequence, and those whose block the ring has lost, see nothing
    m_seen = m_i & (L - T + o_i >= 0) & ((sink > 0) | (o_end > L - (S - sink)))

    o_i = o_i.to(tl.int64)
    o_d = tl.arange(0, D)
    i_b = i_b.to(tl.int64)
    i_g = (i_h // GROUP).to(tl.int64)
    i_h = i_h.to(tl.int64)
    p_k = k_cache + i_b * stride_kb + i_g * stride_kh
    p_v = v_cache + i_b * stride_vb + i_g * stride_vh
    # [BT, D]: rows that see nothing are 0, whatever their gradients are
    p_q = query + i_b * stride_qb + i_h * stride_qh + o_i[:, None] * stride_qt + o_d[None, :]
    p_g = grad_out + i_b * stride_gb + i_h * stride_gh + o_i[:, None] * stride_gt + o_d[None, :]
    b_q = tl.load(p_q, mask=m_seen[:, None], other=0.0)
    b_g = tl.load(p_g, mask=m_seen[:, None], other=0.0)
    o_x = (i_b * H + i_h) * T + o_i
    # 2^-inf is 0, whatever the bias: 0 times 2^bias may be NaN
    b_lse = tl.load(lse + o_x, mask=m_seen, other=float("inf")) * LOG2E
    b_delta = tl.load(delta + o_x, mask=m_seen, other=0.0)

    b_dq = tl.zeros([BT, D], tl.float32)
    for u in tl.range(0, n_edge, num_stages=EDGE_STAGES):
        t0, t_low, t_high = edge_tile(
            u, low, high, sink_high, n_sink, n_ring, first, stop, wrap, BS
        )
        b_dq = _add_keys(
            b_dq,
            b_q,
            b_g,
            b_lse,
            b_delta,
            p_k,
            p_v,
            stride_ks,
            stride_vs,
            t0,
            t_low,
            t_high,
            o_end,
            o_begin,
            sink,
            window,
            S,
            scale,
            bias,
            bias_start,
            bias_stop,
            BS,
            D,
            True,
            HAS_BIAS,
            BIAS_TO_BLOCK,
            UPCAST_DOT,
        )
    for u in range(0, n_sink + n_ring - n_edge):
        b_dq = _add_keys(
            b_dq,
            b_q,
            b_g,
            b_lse,
            b_delta,
            p_k,
            p_v,
            stride_ks,
            stride_vs,
            interior_tile(u, low, first, wrap, BS),
            0,
            0,
            o_end,
            o_begin,
            sink,
            window,
            S,
            scale,
            bias,
            bias_start,
            bias_stop,
            BS,
            D,
            False,
            HAS_BIAS,
            BIAS_TO_BLOCK,
            UPCAST_DOT,
        )
    p_dq = grad_query + ((i_b * T + o_i) * H + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_dq, (b_dq * softmax_scale).to(grad_query.dtype.element_ty), mask=m_i[:, None])
