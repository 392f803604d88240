"""`diagonal_attention` in Triton: who sees what is computed in the kernel.

    sees[q, s] = s <= slot[q] and (s == slot[q] or s holds no token of a grid or pass(s) < step[q])
    out[q]     = softmax(scale q K^T) V over what q sees

Rows, tiles, softmax and splits are those of _fold.py. Up to the first token that is not decoded
everything is seen: the interior. What is behind, some rows of the grid, is the edge: who sees what
is found per key, and what no entry sees is not loaded. A row's own slot, seen even where a stand-in
lies, is left out of the tiles: the softmax starts with it.

Layout: query, out [B, T, H, D]; caches [Bc, S, Hk, D]; slots, steps [B, T]; part [NS, B, T, H, BD];
part_lse [NS, B, H, T] in base 2.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201

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
from sdvg_kernels.diagonal import config
from sdvg_kernels.diagonal.mask import mask_compilations
from sdvg_kernels.diagonal.rule import GRID, decoded_in, first_undecoded

_LOG2E = tl.constexpr(1.4426950408889634)
# beyond every slot and step
_FAR = tl.constexpr(2**30)
# bf16 dots are wrong in Triton's interpreter: it upcasts them
_INTERPRETED = triton.knobs.runtime.interpret
_SIZES = ("B", "T", "S", "H", "num_splits", *GRID)


@triton.jit(do_not_specialize=_SIZES)
def diagonal_kernel(
    query,
    k_cache,
    v_cache,
    slots,
    steps,
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
    stride_sb,
    stride_st,
    stride_pb,
    stride_pt,
    stride_ob,
    stride_ot,
    stride_oh,
    B,
    T,
    S,
    H,
    scale,
    num_splits,
    prefix,
    height,
    width,
    row_stride,
    frame_stride,
    k,
    lead,
    frame_passes,
    PACK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_PUBLISHED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_PAD: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Write out [B, T, H, D]; if IS_SPLIT, parts of it, combined here if BN > 0."""
    grid = (prefix, height, width, row_stride, frame_stride, k, lead, frame_passes)
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
    p_slot = slots + b_i * stride_sb + o_i.to(tl.int64) * stride_st
    o_slot = tl.load(p_slot, mask=m_i, other=-1)
    m_r = o_slot >= 0
    p_step = steps + b_i * stride_pb + o_i.to(tl.int64) * stride_pt
    o_step = tl.load(p_step, mask=m_i, other=0)

    # besides their own slots, rows see slots in [first, stop), and every row all of [first, full)
    first = 0
    if HAS_PAD:
        first = tl.maximum(tl.load(cache_leftpad + i_b), 0)
    stop = tl.minimum(tl.max(o_slot, 0), S)
    full = tl.minimum(tl.min(tl.where(m_r, o_slot, _FAR), 0), S)
    latest = tl.max(tl.where(m_r, o_step, 0), 0)
    if not IS_PUBLISHED:
        earliest = tl.min(tl.where(m_r, o_step, _FAR), 0)
        full = tl.minimum(full, first_undecoded(earliest, S, grid))
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

    # the first part starts with each row's own slot
    m_own = m_r & (o_slot >= first) & (o_slot < S) & (i_n == 0)
    m_q = m_own[:, None]
    if D < BD:
        m_q = m_q & (o_d < D)[None, :]
    o_own = o_slot.to(tl.int64)[:, None]
    b_k = tl.load(p_k + o_own * stride_ks + o_d[None, :], mask=m_q, other=0.0)
    b_x = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 1) * scale
    b_m = tl.where(m_own, b_x, float("-inf"))
    b_l = m_own.to(tl.float32)
    b_o = tl.load(p_v + o_own * stride_vs + o_d[None, :], mask=m_q, other=0.0).to(tl.float32)
    for u in tl.range(u_first, tl.minimum(u_stop, n_edge), num_stages=EDGE_STAGES):
        s0 = tl.where(u < cut, low, high + u - cut) * BS
        o_s = s0 + tl.arange(0, BS)
        # a pass before all others' where it does not matter
        o_at = tl.full([BS], -1, tl.int32)
        if not IS_PUBLISHED:
            o_at = decoded_in(o_s, grid)
        m_k = (o_s >= first) & (o_s < stop) & (o_at < latest)
        m_x = (o_s[None, :] < o_slot[:, None]) & m_k[None, :]
        m_x = m_x & (o_at[None, :] < o_step[:, None])
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

    # padding went through the interior too, and so may rows that end before the padding
    m_seen = m_r & (o_slot >= first) & (b_l != 0.0)
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


def diagonal_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    steps: torch.Tensor,
    *,
    grid: list[int],
    published: bool,
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
    pack = heads // heads_cached
    launch = config.choose(capability(query.device), dim, query.dtype, rows * pack)
    require_strides("diagonal_attention", query, k_cache, v_cache, launch.BS)
    tiles = batch * heads_cached * triton.cdiv(rows * pack, launch.BT)
    if num_splits is None:
        key_tiles = triton.cdiv(size, launch.BS)
        num_splits = config.splits(launch, tiles, key_tiles, processors(query.device))

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
        diagonal_kernel[(tiles * num_splits,)](
            query=query,
            k_cache=k_cache,
            v_cache=v_cache,
            slots=slots,
            steps=steps,
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
            stride_sb=slots.stride(0),
            stride_st=slots.stride(1),
            stride_pb=steps.stride(0),
            stride_pt=steps.stride(1),
            stride_ob=out.stride(0),
            stride_ot=out.stride(1),
            stride_oh=out.stride(2),
            B=batch,
            T=rows,
            S=size,
            H=heads,
            scale=softmax_scale * _LOG2E.value,
            num_splits=num_splits,
            **dict(zip(GRID, grid, strict=True)),
            PACK=pack,
            D=dim,
            BD=padded,
            BT=launch.BT,
            BS=launch.BS,
            BR=combine.BR,
            BN=0 if tickets is None else combine.BN,
            EDGE_STAGES=launch.edge_stages,
            IS_SPLIT=num_splits > 1,
            IS_PUBLISHED=published,
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
    """Yield every shipped configuration for `arch`: plain, published, a split with all features."""
    yield from mask_compilations(arch)
    strides = ("stride_sb", "stride_st", "stride_pb", "stride_pt")
    caches = ("stride_kb", "stride_ks", "stride_kh", "stride_vb", "stride_vs", "stride_vh")
    rows = ("stride_qb", "stride_qt", "stride_qh", "stride_ob", "stride_ot", "stride_oh")
    types = {"slots": "*i32", "steps": "*i32", "cache_batch_idx": "*i32", "cache_leftpad": "*i32"}
    types |= {"part": "*fp32", "part_lse": "*fp32", "tickets": "*i32", "scale": "fp32"}
    types |= dict.fromkeys((*caches, *rows, *strides, *_SIZES), "i32")
    for (table_arch, dim, is_float32), table in config.LAUNCHES.items():
        if table_arch != arch:
            continue
        name = "fp32" if is_float32 else "bf16"
        padded = triton.next_power_of_2(dim)
        forms = ("", " published", " split idx pad packed")
        for (_, attend), form in itertools.product(table, forms):
            full = form.startswith(" split")
            spills = config.PUBLISHED_SPILLS if form == " published" and dim == 100 else 0
            combine = _combine.choose(attend.BT, padded, 2)
            last = full and combine.last_program
            absent = () if full else ("cache_batch_idx", "cache_leftpad", "part", "part_lse")
            yield Compilation(
                kernel=diagonal_kernel,
                arch=arch,
                config=f"D{dim} {name} BT{attend.BT} BS{attend.BS}"
                + form
                + (" combine" if last else ""),
                signature=types | dict.fromkeys(("query", "k_cache", "v_cache", "out"), f"*{name}"),
                constants={
                    "PACK": 4 if full else 1,
                    "D": dim,
                    "BD": padded,
                    "BT": attend.BT,
                    "BS": attend.BS,
                    "BR": combine.BR,
                    "BN": combine.BN if last else 0,
                    "EDGE_STAGES": attend.edge_stages,
                    "IS_SPLIT": full,
                    "IS_PUBLISHED": form == " published",
                    "HAS_INDEX": full,
                    "HAS_PAD": full,
                    "UPCAST_DOT": False,
                }
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
                num_warps=attend.num_warps,
                num_stages=attend.num_stages,
                budget=config.budget(arch, attend, is_float32, spills),
            )
