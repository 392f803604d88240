"""The key tiles that a tile of query rows sees: what the forward and the backward in Triton share.

Tiles are logical: those of the sink, and those from the first token that some row sees to the last.
They are renumbered: first the *edges*, where some row misses some key or the ring wraps: slot and
mask are found per key; then the *interior*, where slots are contiguous and nothing is masked.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# bf16 dots are wrong in Triton's interpreter: it upcasts them
UPCAST = triton.knobs.runtime.interpret
# lengths, windows and their differences stay within int32
NO_WINDOW = 2**30
# one compilation serves all sizes; strides stay specialised, loads are as wide as they are aligned
SIZES = ("T", "S", "H", "block_size", "sink", "window", "bias_start", "bias_stop")


@triton.jit
def block_ends(o_i, L, T, block_size):
    """Return the first token of each row's block, and its end."""
    o_begin = L - T + (o_i // block_size) * block_size
    return o_begin, tl.minimum(L, o_begin + block_size)


@triton.jit
def key_tiles(i_first, i_last, L, T, S, block_size, sink, window, BS: tl.constexpr):
    """Return what rows [i_first, i_last] see, in tiles of BS keys.

    The tokens, [0, sink_high) and [low, high), one range from 0 where they touch; the tiles of
    both, n_sink and n_ring; those of the ring, [first, stop), that every row sees entirely, but for
    `wrap` if that is one of them; and the number of edges.
    """
    _, e_first = block_ends(i_first, L, T, block_size)
    _, high = block_ends(i_last, L, T, block_size)
    low = tl.maximum(sink, tl.maximum(L - (S - sink), e_first - window))
    sink_high = tl.minimum(sink, high)
    low = tl.where(low == sink, 0, low)
    n_sink = tl.where(low == 0, 0, tl.cdiv(tl.maximum(sink_high, 0), BS))
    n_ring = tl.cdiv(tl.maximum(high - low, 0), BS)
    first = tl.minimum(tl.cdiv(tl.maximum(high - window - low, 0), BS), n_ring)
    stop = tl.maximum(tl.maximum(e_first - low, 0) // BS, first)
    to_wrap = S - tl.where(low < sink, low, sink + (low - sink) % (S - sink))
    wrap = to_wrap // BS
    wraps = (to_wrap % BS != 0) & (wrap >= first) & (wrap < stop)
    wrap = tl.where(wraps, wrap, stop)
    n_edge = n_sink + first + n_ring - stop + wraps.to(tl.int32)
    return low, high, sink_high, n_sink, n_ring, first, stop, wrap, n_edge


@triton.jit
def edge_tile(u, low, high, sink_high, n_sink, n_ring, first, stop, wrap, BS: tl.constexpr):
    """Return edge u's first token, and the tokens [t_low, t_high) that are in it."""
    in_sink = u < n_sink
    i_s = tl.where(u < n_sink + first, u - n_sink, u - n_sink - first + stop)
    i_s = tl.where(i_s < n_ring, i_s, wrap)
    t0 = tl.where(in_sink, u * BS, low + i_s * BS)
    return t0, tl.where(in_sink, 0, low), tl.where(in_sink, sink_high, high)


@triton.jit
def interior_tile(u, low, first, wrap, BS: tl.constexpr):
    """Return the first token of tile u of the interior."""
    i_s = u + first
    return low + (i_s + (i_s >= wrap).to(tl.int32)) * BS


@triton.jit
def load_keys(
    p_k,
    p_v,
    stride_ks,
    stride_vs,
    t0,
    t_low,
    t_high,
    sink,
    S,
    BS: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the tokens [BS] from t0 on and their K and V [BS, D].

    If MASKED, those in [t_low, t_high) alone are loaded, and which they are is returned too.
    """
    # [BS]
    o_t = t0 + tl.arange(0, BS)
    o_d = tl.arange(0, D)
    # a tile that begins in the sink and runs past it is masked there, or the ring has not wrapped
    slot0 = tl.where(t0 < sink, t0, sink + (t0 - sink) % (S - sink))
    m_s = (o_t >= t_low) & (o_t < t_high)
    # [BS, D]
    if MASKED:
        o_s = slot0 + tl.arange(0, BS)
        o_s = tl.where(o_s >= S, o_s - (S - sink), o_s).to(tl.int64)
        p_kt = p_k + o_s[:, None] * stride_ks + o_d[None, :]
        p_vt = p_v + o_s[:, None] * stride_vs + o_d[None, :]
        b_k = tl.load(p_kt, mask=m_s[:, None], other=0.0)
        b_v = tl.load(p_vt, mask=m_s[:, None], other=0.0)
    else:
        # contiguous slots: the offsets within the tile do not change from tile to tile
        o_s = tl.arange(0, BS)[:, None]
        p_k += slot0.to(tl.int64) * stride_ks
        p_v += slot0.to(tl.int64) * stride_vs
        b_k = tl.load(p_k + (o_s * stride_ks + o_d[None, :]))
        b_v = tl.load(p_v + (o_s * stride_vs + o_d[None, :]))
    return o_t, m_s, b_k, b_v


@triton.jit
def product(b_a, b_b, UPCAST_DOT: tl.constexpr):
    """Return a @ b [.., ..] in float32."""
    if UPCAST_DOT:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, input_precision="ieee")


@triton.jit
def add_product(b_a, b_b, b_c, UPCAST_DOT: tl.constexpr):
    """Return c + round(a) @ b, where `a` is rounded to b's dtype."""
    b_a = b_a.to(b_b.dtype)
    if UPCAST_DOT:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_c, input_precision="ieee")


@triton.jit
def add_bias(b_x, o_t, o_begin, bias, bias_start, bias_stop, BIAS_TO_BLOCK: tl.constexpr):
    """Return the logits with the bias on the tokens [bias_start, bias_stop), or to the row's block.

    `o_t` and `o_begin` broadcast to the shape of `b_x`.
    """
    if BIAS_TO_BLOCK:
        m_b = (o_t >= bias_start) & (o_t < o_begin)
    else:
        m_b = (o_t >= bias_start) & (o_t < bias_stop)
    return b_x + tl.where(m_b, bias, 0.0)
