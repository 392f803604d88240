"""`block_causal_attention` in Triton: one portable kernel, and one that combines many parts.

A program owns a tile of BT query rows of one head and walks key tiles with the online softmax

    m' = max(m, max_s x)    l' = l 2^(m - m') + sum_s 2^(x - m')    o' = o 2^(m - m') + 2^(x - m') V

in base 2, with log2(e) folded into the scale (FlashAttention-2, arXiv 2307.08691). The order of
keys does not matter to a softmax: the tiles are in the order of tiles.py, and a split is a run of
them.

A short query packs the PACK heads that share keys into the rows of one tile, row r = token
r // PACK of head r % PACK: the keys are read once. The parts of a tile are float32 with their own
log-sum-exp; the last program of the tile to finish, by a ticket, adds them up in their order, so
that no second launch waits; where one program would have much to read, `combine_kernel` does it.

Layout: query, out [B, T, H, D]; caches [Bc, S, Hk, D]; part [NS, B, T, H, D]; part_lse [NS, B, H,
T] in base 2; lengths are read on the device.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels import _combine, _tuned
from sdvg_kernels._budget import Compilation
from sdvg_kernels._check import message
from sdvg_kernels._combine import combine_compilations, combine_parts, combine_rows
from sdvg_kernels._device import capability, on, processors
from sdvg_kernels._tickets import take
from sdvg_kernels.attention import backward, config
from sdvg_kernels.attention.tiles import (
    LOG2E,
    NO_WINDOW,
    SIZES,
    UPCAST,
    add_bias,
    add_product,
    block_ends,
    edge_tile,
    interior_tile,
    key_tiles,
    load_keys,
    product,
)

_LN2 = tl.constexpr(0.6931471805599453)
_SIZES = ("B", *SIZES, "num_splits")


@triton.jit
def _attend(
    b_q,
    b_m,
    b_l,
    b_o,
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
    """Fold the logical tokens [t0, t0 + BS) into the softmax; if MASKED, only [t_low, t_high)."""
    o_t, m_s, b_k, b_v = load_keys(
        p_k, p_v, stride_ks, stride_vs, t0, t_low, t_high, sink, S, BS, D, MASKED
    )
    # [BT, BS]
    b_x = product(b_q, tl.trans(b_k), UPCAST_DOT) * scale
    if HAS_BIAS:
        b_x = add_bias(
            b_x, o_t[None, :], o_begin[:, None], bias, bias_start, bias_stop, BIAS_TO_BLOCK
        )
    if MASKED:
        m_w = (o_t[None, :] < sink) | (o_t[None, :] >= o_end[:, None] - window)
        b_x = tl.where(m_s[None, :] & (o_t[None, :] < o_end[:, None]) & m_w, b_x, float("-inf"))

    # [BT]
    b_n = tl.maximum(b_m, tl.max(b_x, 1))
    # a row that has seen nothing yet: -inf - -inf is NaN
    b_z = tl.where(b_n == float("-inf"), 0.0, b_n) if MASKED else b_n
    b_p = tl.exp2(b_x - b_z[:, None])
    b_a = tl.exp2(b_m - b_z)
    b_l = b_l * b_a + tl.sum(b_p, 1)
    b_o = add_product(b_p, b_v, b_o * b_a[:, None], UPCAST_DOT)
    return b_n, b_l, b_o


@triton.jit(do_not_specialize=_SIZES)
def attention_kernel(
    query,
    k_cache,
    v_cache,
    cache_seqlens,
    cache_batch_idx,
    out,
    lse,
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
    stride_ob,
    stride_ot,
    stride_oh,
    B,
    T,
    S,
    H,
    block_size,
    sink,
    window,
    scale,
    bias,
    bias_start,
    bias_stop,
    num_splits,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_TO_BLOCK: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Write out [B, T, H, D] and lse [B, H, T]; if IS_SPLIT, parts of both, combined if BN > 0."""
    # query tiles of one head are neighbours: they share its keys in L2
    R = T * PACK
    n_t = tl.cdiv(R, BT)
    i_t = tl.program_id(0) % n_t
    i_n = (tl.program_id(0) // n_t) % num_splits
    i_bh = tl.program_id(0) // (n_t * num_splits)
    i_b = i_bh // (H // PACK)
    i_h = i_bh % (H // PACK)

    L = tl.load(cache_seqlens + i_b)
    # [BT]: rows, their tokens and heads
    o_r = i_t * BT + tl.arange(0, BT)
    m_i = o_r < R
    o_i = o_r // PACK
    o_h = i_h * PACK + o_r % PACK
    o_begin, o_end = block_ends(o_i, L, T, block_size)
    i_last = (tl.minimum(i_t * BT + BT, R) - 1) // PACK
    low, high, sink_high, n_sink, n_ring, first, stop, wrap, n_edge = key_tiles(
        i_t * BT // PACK, i_last, L, T, S, block_size, sink, window, BS
    )
    n_tile = n_sink + n_ring
    # shares that differ by one tile at most: no program is left with the rest
    share = n_tile // num_splits
    more = n_tile % num_splits
    u_first = i_n * share + tl.minimum(i_n, more)
    u_stop = u_first + share + (i_n < more).to(tl.int32)

    o_d = tl.arange(0, D)
    i_c = i_b
    if HAS_INDEX:
        i_c = tl.load(cache_batch_idx + i_b)
    i_c = i_c.to(tl.int64)
    i_g = (i_h // (GROUP // PACK)).to(tl.int64)
    p_k = k_cache + i_c * stride_kb + i_g * stride_kh
    p_v = v_cache + i_c * stride_vb + i_g * stride_vh
    # [BT, D]
    p_q = query + i_b.to(tl.int64) * stride_qb + o_h.to(tl.int64)[:, None] * stride_qh
    p_q += o_i.to(tl.int64)[:, None] * stride_qt + o_d[None, :]
    b_q = tl.load(p_q, mask=m_i[:, None], other=0.0)

    b_m = tl.full([BT], float("-inf"), tl.float32)
    b_l = tl.zeros([BT], tl.float32)
    b_o = tl.zeros([BT, D], tl.float32)
    for u in tl.range(u_first, tl.minimum(u_stop, n_edge), num_stages=EDGE_STAGES):
        t0, t_low, t_high = edge_tile(
            u, low, high, sink_high, n_sink, n_ring, first, stop, wrap, BS
        )
        b_m, b_l, b_o = _attend(
            b_q,
            b_m,
            b_l,
            b_o,
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
    for u in range(tl.maximum(u_first, n_edge), u_stop):
        b_m, b_l, b_o = _attend(
            b_q,
            b_m,
            b_l,
            b_o,
            p_k,
            p_v,
            stride_ks,
            stride_vs,
            interior_tile(u - n_edge, low, first, wrap, BS),
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

    # rows before the sequence see nothing
    m_seen = (b_l != 0.0) & (L - T + o_i >= 0)
    b_l = tl.where(m_seen, b_l, 1.0)
    b_o = tl.where(m_seen[:, None], b_o / b_l[:, None], 0.0)
    if IS_SPLIT:
        i_nb = i_n.to(tl.int64) * B + i_b
        p_p = part + ((i_nb * T + o_i) * H + o_h)[:, None] * D + o_d[None, :]
        tl.store(p_p, b_o, mask=m_i[:, None])
        b_x = tl.where(m_seen, b_m + tl.log2(b_l), float("-inf"))
        tl.store(part_lse + (i_nb * H + o_h) * T + o_i, b_x, mask=m_i)
    else:
        p_o = out + i_b.to(tl.int64) * stride_ob + o_h.to(tl.int64)[:, None] * stride_oh
        p_o += o_i.to(tl.int64)[:, None] * stride_ot + o_d[None, :]
        tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_i[:, None])
        if HAS_LSE:
            b_lse = tl.where(m_seen, (b_m + tl.log2(b_l)) * _LN2, float("-inf"))
            tl.store(lse + (i_b.to(tl.int64) * H + o_h) * T + o_i, b_lse, mask=m_i)
    if BN > 0:
        # all threads' stores come before the ticket, and the ticket before the last one's loads
        tl.debug_barrier()
        p_ticket = tickets + i_bh * n_t + i_t
        ticket = tl.atomic_add(p_ticket, 1, sem="acq_rel")
        if ticket == num_splits - 1:
            # for the next launch, or the next replay
            tl.store(p_ticket, 0)
            # _combine.choose and MOST_TILES keep the parts within 32-bit offsets
            for i_r in range(i_t * BT, tl.minimum(i_t * BT + BT, R), BR):
                o_c = i_r + tl.arange(0, BR)
                combine_rows(
                    part,
                    part_lse,
                    out,
                    lse,
                    stride_ob,
                    stride_ot,
                    stride_oh,
                    B,
                    T,
                    H,
                    num_splits,
                    i_b,
                    o_c // PACK,
                    i_h * PACK + o_c % PACK,
                    o_c < R,
                    D,
                    D,
                    BN,
                    HAS_LSE,
                )


def block_causal_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_size: int | None,
    sink: int,
    window: int | None,
    cache_batch_idx: torch.Tensor | None,
    softmax_scale: float,
    bias: float | None,
    bias_start: int,
    bias_stop: int | None,
    return_lse: bool,
    num_splits: int | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, T, H, D] in query's dtype, and lse [B, H, T] float32 ([0] if unasked)."""
    batch, rows, heads, dim = query.shape
    size, heads_cached = k_cache.shape[1:3]
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, rows) if return_lse else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    group = heads // heads_cached
    pack = group if rows * group <= config.MOST_PACKED else 1
    launch = config.choose(
        capability(query.device),
        dim,
        query.dtype,
        rows * pack,
        bias is not None,
        _tuned.gpu_name(query.device),
    )
    # offsets within a tile are 32 bits wide
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        stride = cache.stride(1)
        if stride * launch.BS >= 2**31:
            rule = f"have a slot stride below {2**31 // launch.BS} for Triton"
            raise NotImplementedError(message("block_causal_attention", name, rule, stride))
    tiles = batch * (heads // pack) * triton.cdiv(rows * pack, launch.BT)
    if num_splits is None:
        seen = size if window is None else min(size, sink + window + rows)
        key_tiles = triton.cdiv(seen, launch.BS)
        num_splits = config.splits(launch, tiles, key_tiles, processors(query.device))

    combine = _combine.COMBINE
    part = part_lse = tickets = None
    if num_splits > 1:
        part = query.new_empty((num_splits, batch, rows, heads, dim), dtype=torch.float32)
        part_lse = query.new_empty((num_splits, batch, heads, rows), dtype=torch.float32)
        combine = _combine.choose(min(rows * pack, launch.BT), dim, num_splits)
    with on(query.device):
        if num_splits > 1 and combine.last_program:
            tickets = take(query.device, tiles)
        attention_kernel[(tiles * num_splits,)](
            query=query,
            k_cache=k_cache,
            v_cache=v_cache,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            out=out,
            lse=lse,
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
            stride_ob=out.stride(0),
            stride_ot=out.stride(1),
            stride_oh=out.stride(2),
            B=batch,
            T=rows,
            S=size,
            H=heads,
            block_size=rows if block_size is None else min(block_size, rows),
            sink=sink,
            window=NO_WINDOW if window is None else min(window, NO_WINDOW),
            scale=softmax_scale * LOG2E.value,
            bias=(bias or 0.0) * LOG2E.value,
            bias_start=bias_start,
            bias_stop=bias_stop or 0,
            num_splits=num_splits,
            GROUP=group,
            PACK=pack,
            D=dim,
            BT=launch.BT,
            BS=launch.BS,
            BR=combine.BR,
            BN=0 if tickets is None else combine.BN,
            EDGE_STAGES=launch.edge_stages,
            IS_SPLIT=num_splits > 1,
            HAS_INDEX=cache_batch_idx is not None,
            HAS_LSE=return_lse,
            HAS_BIAS=bias is not None,
            BIAS_TO_BLOCK=bias_stop is None,
            UPCAST_DOT=UPCAST and query.dtype == torch.bfloat16,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        if num_splits > 1 and tickets is None:
            combine_parts(part, part_lse, out, lse, return_lse)
    return out, lse


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield every shipped configuration for `arch`: plain, and a split with every feature on."""
    stride = ("stride_qb", "stride_qt", "stride_qh", "stride_kb", "stride_ks", "stride_kh")
    stride += ("stride_vb", "stride_vs", "stride_vh", "stride_ob", "stride_ot", "stride_oh")
    integers = (*stride, *_SIZES)
    parts = ("part", "part_lse", "tickets")
    tensors = ("query", "k_cache", "v_cache", "cache_seqlens", "cache_batch_idx", "out", "lse")
    types = {"cache_seqlens": "*i32", "cache_batch_idx": "*i32", "lse": "*fp32"}
    types |= {"part": "*fp32", "part_lse": "*fp32", "tickets": "*i32"}
    types |= {"scale": "fp32", "bias": "fp32"} | dict.fromkeys(integers, "i32")
    for (table_arch, dim, is_float32), table in config.LAUNCHES.items():
        if table_arch != arch:
            continue
        dtype = torch.float32 if is_float32 else torch.bfloat16
        name = "fp32" if is_float32 else "bf16"
        cases = [(launch, False) for _, launch in table]
        cases += [
            (config.BIASED if launch.BS == 128 and launch.BT == 128 else launch, True)
            for _, launch in table
        ]
        for launch, full in cases:
            pack = 4 if full and launch.BT <= config.MOST_PACKED else 1
            combine = _combine.choose(launch.BT, dim, 2)
            last = full and combine.last_program
            yield Compilation(
                kernel=attention_kernel,
                arch=arch,
                config=f"D{dim} {name} BT{launch.BT} BS{launch.BS}"
                + (" split bias lse idx" if full else "")
                + (" packed" if pack > 1 else "")
                + (" combine" if last else ""),
                signature=types | dict.fromkeys(("query", "k_cache", "v_cache", "out"), f"*{name}"),
                constants={
                    "GROUP": pack,
                    "PACK": pack,
                    "D": dim,
                    "BT": launch.BT,
                    "BS": launch.BS,
                    "BR": combine.BR,
                    "BN": combine.BN if last else 0,
                    "EDGE_STAGES": launch.edge_stages,
                    "IS_SPLIT": full,
                    "HAS_INDEX": full,
                    "HAS_LSE": full,
                    "HAS_BIAS": full,
                    "BIAS_TO_BLOCK": full,
                    "UPCAST_DOT": False,
                }
                | ({} if full else dict.fromkeys(("cache_batch_idx", *parts)))
                | ({} if last or not full else {"tickets": None}),
                divisible=(*tensors, *parts, *stride),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                budget=config.budget(arch, launch.BT, dtype),
            )
    yield from combine_compilations(arch)
    yield from backward.compilations(arch)
