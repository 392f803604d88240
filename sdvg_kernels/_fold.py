"""A few rows over many keys: what the attention kernels of diagonals and of trees share.

A program owns a tile of BT rows, row r = entry r // PACK of head r % PACK of the heads that share
keys, and a run of the tiles of BS keys that some row sees. Those that every row sees whole, the
*interior*, are not masked; the others, the *edge*, come first in the numbering that splits share
out. The softmax is online and in base 2

    m' = max(m, max_s x)    l' = l 2^(m - m') + sum_s 2^(x - m')    o' = o 2^(m - m') + 2^(x - m') V

(FlashAttention-2, arXiv 2307.08691), and the parts of a split are combined as _combine.py says.

Layout: query, out [B, T, H, D]; caches [Bc, S, Hk, D]; part [NS, B, T, H, BD]; part_lse [NS, B, H,
T] in base 2.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sdvg_kernels._check import message
from sdvg_kernels._combine import combine_rows


@triton.jit
def place(R, BT: tl.constexpr, num_splits):
    """Return what a program works on: a tile of R rows, a part of the keys, and i_b Hk + i_h."""
    # row tiles that read the same keys are neighbours: they share them in L2
    n_t = tl.cdiv(R, BT)
    i_t = tl.program_id(0) % n_t
    i_n = (tl.program_id(0) // n_t) % num_splits
    i_bh = tl.program_id(0) // (n_t * num_splits)
    return i_t, i_n, i_bh


@triton.jit
def key_tiles(first, full, stop, i_n, num_splits, BS: tl.constexpr):
    """Return low, cut, high, the tiles of the edge, and the run [u_first, u_stop) of part i_n.

    Rows see slots in [first, stop), and every row all of [first, full). Tiles [low, stop / BS) are
    one that `first` cuts, if cut is 1, the interior up to `high`, and the rest of the edge.
    """
    n = tl.cdiv(tl.maximum(stop, 0), BS)
    low = tl.minimum(first // BS, n)
    cut = ((first % BS != 0) & (low < n)).to(tl.int32)
    high = tl.minimum(tl.maximum(full // BS, low + cut), n)
    n_edge = cut + n - high
    n_tile = n - low
    # shares that differ by one tile at most: no program is left with the rest
    share = n_tile // num_splits
    more = n_tile % num_splits
    u_first = i_n * share + tl.minimum(i_n, more)
    u_stop = u_first + share + (i_n < more).to(tl.int32)
    return low, cut, high, n_edge, u_first, u_stop


@triton.jit
def fold(
    b_q,
    b_m,
    b_l,
    b_o,
    p_k,
    p_v,
    stride_ks,
    stride_vs,
    s0,
    m_k,
    m_x,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Return m, l and o with the slots [s0, s0 + BS) folded in.

    If MASKED, row r sees m_x [BT, BS] of them, and those without m_k [BS] are not loaded.
    """
    # [BS]
    o_s = tl.arange(0, BS)
    o_d = tl.arange(0, BD)
    p_k += tl.cast(s0, tl.int64) * stride_ks
    p_v += tl.cast(s0, tl.int64) * stride_vs
    # [BS, BD]
    p_k = p_k + (o_s[:, None] * stride_ks + o_d[None, :])
    p_v = p_v + (o_s[:, None] * stride_vs + o_d[None, :])
    if MASKED:
        # what no row sees may be NaN, and 0 x NaN is NaN: it is not loaded
        m_d = m_k[:, None]
        if D < BD:
            m_d = m_d & (o_d < D)[None, :]
        b_k = tl.load(p_k, mask=m_d, other=0.0)
        b_v = tl.load(p_v, mask=m_d, other=0.0)
    elif D < BD:
        b_k = tl.load(p_k, mask=(o_d < D)[None, :], other=0.0)
        b_v = tl.load(p_v, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_k = tl.load(p_k)
        b_v = tl.load(p_v)

    # [BT, BS]
    if UPCAST_DOT:
        b_x = tl.dot(b_q.to(tl.float32), tl.trans(b_k.to(tl.float32)), input_precision="ieee")
    else:
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_x = b_x * scale
    if MASKED:
        b_x = tl.where(m_x, b_x, float("-inf"))

    # [BT]
    b_n = tl.maximum(b_m, tl.max(b_x, 1))
    # a row that has seen nothing yet: -inf - -inf is NaN
    b_z = tl.where(b_n == float("-inf"), 0.0, b_n) if MASKED else b_n
    b_p = tl.exp2(b_x - b_z[:, None])
    b_a = tl.exp2(b_m - b_z)
    b_l = b_l * b_a + tl.sum(b_p, 1)
    b_o = b_o * b_a[:, None]
    if UPCAST_DOT:
        b_p = b_p.to(b_v.dtype).to(tl.float32)
        b_o = tl.dot(b_p, b_v.to(tl.float32), b_o, input_precision="ieee")
    else:
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision="ieee")
    return b_n, b_l, b_o


@triton.jit
def store_rows(
    b_m,
    b_l,
    b_o,
    m_seen,
    out,
    part,
    part_lse,
    tickets,
    stride_ob,
    stride_ot,
    stride_oh,
    B,
    T,
    H,
    num_splits,
    i_bh,
    i_t,
    i_n,
    PACK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Write row tile i_t of out, 0 where not m_seen [BT]; if IS_SPLIT, part i_n of it.

    The parts are combined here by the last program of the tile if BN > 0.
    """
    i_b = i_bh // (H // PACK)
    i_h = i_bh % (H // PACK)
    R = T * PACK
    o_r = i_t * BT + tl.arange(0, BT)
    m_i = o_r < R
    o_i = o_r // PACK
    o_h = i_h * PACK + o_r % PACK
    o_d = tl.arange(0, BD)
    b_l = tl.where(m_seen, b_l, 1.0)
    b_o = tl.where(m_seen[:, None], b_o / b_l[:, None], 0.0)
    if IS_SPLIT:
        i_nb = tl.cast(i_n, tl.int64) * B + i_b
        p_p = part + ((i_nb * T + o_i) * H + o_h)[:, None] * BD + o_d[None, :]
        tl.store(p_p, b_o, mask=m_i[:, None])
        b_x = tl.where(m_seen, b_m + tl.log2(b_l), float("-inf"))
        tl.store(part_lse + (i_nb * H + o_h) * T + o_i, b_x, mask=m_i)
    else:
        p_o = out + tl.cast(i_b, tl.int64) * stride_ob + o_h.to(tl.int64)[:, None] * stride_oh
        p_o += o_i.to(tl.int64)[:, None] * stride_ot + o_d[None, :]
        m_o = m_i[:, None]
        if D < BD:
            m_o = m_o & (o_d < D)[None, :]
        tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_o)
    if BN > 0:
        # all threads' stores come before the ticket, and the ticket before the last one's loads
        tl.debug_barrier()
        p_ticket = tickets + i_bh * tl.cdiv(R, BT) + i_t
        ticket = tl.atomic_add(p_ticket, 1, sem="acq_rel")
        if ticket == num_splits - 1:
            # for the next launch, or the next replay
            tl.store(p_ticket, 0)
            # _combine.choose and MOST_TILES keep the parts within 32-bit offsets
            for i_r in range(i_t * BT, tl.minimum(i_t * BT + BT, R), BR):
                o_p = i_r + tl.arange(0, BR)
                combine_rows(
                    part,
                    part_lse,
                    out,
                    out,
                    stride_ob,
                    stride_ot,
                    stride_oh,
                    B,
                    T,
                    H,
                    num_splits,
                    i_b,
                    o_p // PACK,
                    i_h * PACK + o_p % PACK,
                    o_p < R,
                    BD,
                    D,
                    BN,
                    False,
                )


def require_strides(
    op: str, query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tile: int
) -> None:
    """Raise NotImplementedError where tiles of `tile` slots cannot be addressed."""
    # offsets within a tile are 32 bits wide
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        stride = cache.stride(1)
        if stride * tile >= 2**31:
            rule = f"have a slot stride below {2**31 // tile} for Triton"
            raise NotImplementedError(message(op, name, rule, stride))
    # rows of 100 are read in 8 bytes, which the kernels are told
    dim = query.shape[3]
    for name, tensor in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache)):
        if dim % 16 and any(stride % 4 for stride in tensor.stride()[:3]):
            rule = f"have strides that are multiples of 4 for Triton at head dim {dim}"
            got, remedy = tensor.stride(), "call .contiguous()"
            raise NotImplementedError(message(op, name, rule, got, remedy))
