"""`tree_attention` in Triton: what rows see of the slots behind the committed ones is bits.

    sees[t, s] = leftpad <= s < length, or bit s - length of mask[t]      if mask[t] has a bit
    out[t]     = softmax(scale q K^T) V over what t sees

Rows, tiles, softmax and splits are those of _fold.py. The committed slots, which all rows but
padding see, are the interior; the tiles that the padding of a prompt cuts, or that reach behind the
committed slots, are the edge: a row's words are read there, and slots that no row of the tile sees
are not loaded, nor is anything for a tile of padding.

Layout: query, out [B, T, H, D]; caches [Bc, S, Hk, D]; mask [B, T, W], the first slot in the lowest
bit; part [NS, B, T, H, BD]; part_lse [NS, B, H, T] in base 2.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels import _combine
from sdvg_kernels._budget import Compilation
from sdvg_kernels._combine import combine_parts
from sdvg_kernels._device import capability, on, processors
from sdvg_kernels._fold import fold, key_tiles, place, require_strides, store_rows
from sdvg_kernels._tickets import take
from sdvg_kernels.masked import config

_LOG2E = tl.constexpr(1.4426950408889634)
# bf16 dots are wrong in Triton's interpreter: it upcasts them
_INTERPRETED = triton.knobs.runtime.interpret
_SIZES = ("B", "T", "S", "H", "W", "num_splits")


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _bits(b_w, o_w, start):
    """Return the 32 bits from `start` on of words b_w [..., BW] with the numbers o_w."""
    LAST: tl.constexpr = len(b_w.shape) - 1
    b_low = tl.sum(tl.where(o_w == start >> 5, b_w, 0), LAST).to(tl.uint32, bitcast=True)
    b_high = tl.sum(tl.where(o_w == (start >> 5) + 1, b_w, 0), LAST).to(tl.uint32, bitcast=True)
    shift = (start & 31).to(tl.uint32)
    # a shift by 32 is undefined
    return (b_low >> shift) | ((b_high << 1) << (31 - shift))


@triton.jit
def _is_set(b_bits, o_c):
    return ((b_bits >> (o_c & 31).to(tl.uint32)) & 1) != 0


@triton.jit(do_not_specialize=_SIZES)
def tree_attention_kernel(
    query,
    k_cache,
    v_cache,
    lengths,
    mask,
    cache_batch_idx,
    cache_leftpad,
    out,
    part,
    part_lse,
    tickets,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_mb,
    stride_mt,
    stride_mw,
    stride_ob,
    stride_ot,
    stride_oh,
    B,
    T,
    S,
    H,
    W,
    scale,
    num_splits,
    PACK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BW: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_PAD: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Write out [B, T, H, D]; if IS_SPLIT, parts of it, combined here if BN > 0."""
    R = T * PACK
    i_t, i_n, i_bh = place(R, BT, num_splits)
    i_b = i_bh // (H // PACK)
    i_h = i_bh % (H // PACK)

    # [BT]: rows, their entries and heads
    o_r = i_t * BT + tl.arange(0, BT)
    m_i = o_r < R
    o_i = o_r // PACK
    o_h = i_h * PACK + o_r % PACK
    b_i = tl.cast(i_b, tl.int64)
    p_mask = mask + b_i * stride_mb + o_i.to(tl.int64) * stride_mt
    # [BT, BW]
    o_w = tl.arange(0, BW)
    p_w = p_mask[:, None] + o_w.to(tl.int64)[None, :] * stride_mw
    b_w = tl.load(p_w, mask=m_i[:, None] & (o_w < W)[None, :], other=0)
    # rows that are no padding, and what some row sees
    m_r = tl.max((b_w != 0).to(tl.int32), 1) > 0
    b_some = tl.reduce(b_w, 0, _or)
    words = tl.max(tl.where(b_some != 0, o_w + 1, 0), 0)

    # rows see slots in [first, stop), and every row all of [first, full)
    length = tl.load(lengths + i_b)
    full = tl.minimum(tl.maximum(length, 0), S)
    first = 0
    if HAS_PAD:
        first = tl.minimum(tl.maximum(tl.load(cache_leftpad + i_b), 0), full)
    stop = tl.where(words > 0, tl.minimum(length + words * 32, S), 0)
    low, cut, high, n_edge, u_first, u_stop = key_tiles(first, full, stop, i_n, num_splits, BS)

    if D % 16 != 0:
        # the launcher's promise: loads of 8 bytes
        stride_qb = stride_qb // 4 * 4
        stride_qt = stride_qt // 4 * 4
        stride_qh = stride_qh // 4 * 4
        stride_kb = stride_kb // 4 * 4
        stride_ks = stride_ks // 4 * 4
        stride_kh = stride_kh // 4 * 4
        stride_vb = stride_vb // 4 * 4
        stride_vs = stride_vs // 4 * 4
        stride_vh = stride_vh // 4 * 4
    o_d = tl.arange(0, BD)
    i_c = i_b
    if HAS_INDEX:
        i_c = tl.load(cache_batch_idx + i_b)
    p_k = k_cache + tl.cast(i_c, tl.int64) * stride_kb + tl.cast(i_h, tl.int64) * stride_kh
    p_v = v_cache + tl.cast(i_c, tl.int64) * stride_vb + tl.cast(i_h, tl.int64) * stride_vh
    # [BT, BD]
    p_q = query + b_i * stride_qb + o_h.to(tl.int64)[:, None] * stride_qh
    p_q += o_i.to(tl.int64)[:, None] * stride_qt + o_d[None, :]
    m_q = m_r[:, None]
    if D < BD:
        m_q = m_q & (o_d < D)[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)

    b_m = tl.full([BT], float("-inf"), tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, BD], tl.float32)
    for u in tl.range(u_first, tl.minimum(u_stop, n_edge), num_stages=EDGE_STAGES):
        s0 = tl.where(u < cut, low, high + u - cut) * BS
        # [BS], and [BT, BS]
        o_c = tl.arange(0, BS)
        m_k = (s0 + o_c >= first) & (s0 + o_c < full)
        m_x = tl.broadcast_to(m_k[None, :], [BT, BS])
        for i_w in tl.static_range((BS + 31) // 32):
            # 32 slots from here on have the bits from `start` on
            start = s0 + i_w * 32 - length
            m_w = (o_c // 32 == i_w) & (s0 + o_c < S)
            m_k |= m_w & _is_set(_bits(b_some, o_w, start), o_c)
            m_x |= m_w[None, :] & _is_set(_bits(b_w, o_w[None, :], start)[:, None], o_c[None, :])
        b_m, b_l, b_o = fold(
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
            D,
            BD,
            BS,
            True,
            UPCAST_DOT,
        )
    for u in range(tl.maximum(u_first, n_edge), u_stop):
        b_m, b_l, b_o = fold(
            b_q,
            b_m,
            b_l,
            b_o,
            p_k,
            p_v,
            stride_ks,
            stride_vs,
            (low + cut + u - n_edge) * BS,
            None,
            None,
            scale,
            D,
            BD,
            BS,
            False,
            UPCAST_DOT,
        )

    # padding went through the committed slots too
    m_seen = m_r & (b_l != 0.0)
    store_rows(
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
        PACK,
        D,
        BD,
        BT,
        BR,
        BN,
        IS_SPLIT,
    )


def tree_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor,
    *,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    softmax_scale: float,
    num_splits: int | None,
) -> torch.Tensor:
    """Return out [B, T, H, D] in query's dtype."""
    batch, rows, heads, dim = query.shape
    size, heads_cached = k_cache.shape[1:3]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    pack, words = heads // heads_cached, mask.shape[2]
    launch = config.choose(capability(query.device), dim, query.dtype, rows * pack)
    require_strides("tree_attention", query, k_cache, v_cache, launch.BS)
    tiles = batch * heads_cached * triton.cdiv(rows * pack, launch.BT)
    if num_splits is None:
        num_splits = config.splits(
            launch,
            tiles,
            key_tiles=triton.cdiv(size, launch.BS),
            processors=processors(query.device),
            key_tile_bytes=2 * launch.BS * dim * query.element_size(),
        )

    padded = triton.next_power_of_2(dim)
    combine = _combine.COMBINE
    part = part_lse = tickets = None
    if num_splits > 1:
        part = query.new_empty((num_splits, batch, rows, heads, padded), dtype=torch.float32)
        part_lse = query.new_empty((num_splits, batch, heads, rows), dtype=torch.float32)
        combine = _combine.choose(min(rows * pack, launch.BT), padded, num_splits)
    with on(query.device):
        if num_splits > 1 and combine.last_program:
            tickets = take(query.device, tiles)
        tree_attention_kernel[(tiles * num_splits,)](
            query=query,
            k_cache=k_cache,
            v_cache=v_cache,
            lengths=lengths,
            mask=mask,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            out=out,
            part=part,
            part_lse=part_lse,
            tickets=tickets,
            stride_qb=query.stride(0),
            stride_qt=query.stride(1),
            stride_qh=query.stride(2),
            stride_kb=k_cache.stride(0),
            stride_ks=k_cache.stride(1),
            stride_kh=k_cache.stride(2),
            stride_vb=v_cache.stride(0),
            stride_vs=v_cache.stride(1),
            stride_vh=v_cache.stride(2),
            stride_mb=mask.stride(0),
            stride_mt=mask.stride(1),
            stride_mw=mask.stride(2),
            stride_ob=out.stride(0),
            stride_ot=out.stride(1),
            stride_oh=out.stride(2),
            B=batch,
            T=rows,
            S=size,
            H=heads,
            W=words,
            scale=softmax_scale * _LOG2E.value,
            num_splits=num_splits,
            PACK=pack,
            D=dim,
            BD=padded,
            BT=launch.BT,
            BS=launch.BS,
            BW=triton.next_power_of_2(words),
            BR=combine.BR,
            BN=0 if tickets is None else combine.BN,
            EDGE_STAGES=launch.edge_stages,
            IS_SPLIT=num_splits > 1,
            HAS_INDEX=cache_batch_idx is not None,
            HAS_PAD=cache_leftpad is not None,
            UPCAST_DOT=_INTERPRETED and query.dtype == torch.bfloat16,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if num_splits > 1 and tickets is None:
            combine_parts(part, part_lse, out, out, return_lse=False)
    return out


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield every shipped configuration for `arch`: plain, and a split with all features."""
    caches = ("stride_kb", "stride_ks", "stride_kh", "stride_vb", "stride_vs", "stride_vh")
    rows = ("stride_qb", "stride_qt", "stride_qh", "stride_ob", "stride_ot", "stride_oh")
    masks = ("stride_mb", "stride_mt", "stride_mw")
    types = dict.fromkeys(("lengths", "mask", "cache_batch_idx", "cache_leftpad"), "*i32")
    types |= {"part": "*fp32", "part_lse": "*fp32", "tickets": "*i32", "scale": "fp32"}
    types |= dict.fromkeys((*caches, *rows, *masks, *_SIZES), "i32")
    for (table_arch, dim, is_float32), table in config.LAUNCHES.items():
        if table_arch != arch:
            continue
        name = "fp32" if is_float32 else "bf16"
        padded = triton.next_power_of_2(dim)
        for (_, launch), form in itertools.product(table, ("", " split idx pad packed")):
            combine = _combine.choose(launch.BT, padded, 2)
            last = bool(form) and combine.last_program
            absent = () if form else ("cache_batch_idx", "cache_leftpad", "part", "part_lse")
            yield Compilation(
                kernel=tree_attention_kernel,
                arch=arch,
                config=f"D{dim} {name} BT{launch.BT} BS{launch.BS}"
                + form
                + (" combine" if last else ""),
                signature=types | dict.fromkeys(("query", "k_cache", "v_cache", "out"), f"*{name}"),
                constants={
                    "PACK": 4 if form else 1,
                    "D": dim,
                    "BD": padded,
                    "BT": launch.BT,
                    "BS": launch.BS,
                    # the most and the fewest words of a usual pass
                    "BW": 8 if form else 4,
                    "BR": combine.BR,
                    "BN": combine.BN if last else 0,
                    "EDGE_STAGES": launch.edge_stages,
                    "IS_SPLIT": bool(form),
                    "HAS_INDEX": bool(form),
                    "HAS_PAD": bool(form),
                    "UPCAST_DOT": False,
                }
                # the words of an entry lie side by side
                | {"stride_mw": 1}
                | dict.fromkeys(absent)
                | ({} if last else {"tickets": None}),
                divisible=(
                    "query",
                    "k_cache",
                    "v_cache",
                    "out",
                    "part",
                    "part_lse",
                    *(() if dim % 16 else (*caches, *rows)),
                ),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                budget=config.budget(arch, launch, is_float32),
            )
