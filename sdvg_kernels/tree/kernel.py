"""`expand_tree` and `build_tree` in Triton: a program for each beam, a program for each sequence.

    score[w, k] = score[w] + (x[k] - m) / T - log sum exp((x - m) / T),   x the K largest of a row
    beams = the K best of all W * K, in the last program of a sequence
    tree = the N - 1 best candidates, in order, each with its parent

The K best of a row lie in those K groups of 8 tokens whose best tokens are best: rows are searched
by their groups, then the 8 K tokens are ranked by counting. The N - 1 best candidates are those
above a threshold, found by bisection over the ordered bits of float32. Both are exact.
Layout: logits, uncond [B, W, V]; tokens, scores, parents [B, M]; a tree's fields [B, N], its mask
[B, N, NW].
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels._tickets import take
from sdvg_kernels._warp import guided, order
from sdvg_kernels.tree import config

# the most children of a beam, and the tokens of a group
_BK, _GROUP = tl.constexpr(16), tl.constexpr(8)
# what Triton must know of them, to read a group at once
_ALIGNED = ("logits", "uncond", "stride_cb", "stride_cw", "stride_ub", "stride_uw", "V")
# below and above every key; 16 keys fit between the first and any number's
_LEAST, _MOST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


@triton.jit
def _key(b_x, o_x):
    """Return int64 that are ordered as the float32 `b_x` are, of equal ones the lower `o_x` up."""
    return (order(b_x).to(tl.int64) << 32) | (0x7FFFFFFF - o_x).to(tl.int64)


@triton.jit
def _finite(b_x):
    """Return whether `b_x` are numbers."""
    return (b_x > float("-inf")) & (b_x < float("inf"))


@triton.jit
def _merge(scores, beams, i_b, M, K, BM: tl.constexpr):
    """Write beams [K] of sequence `i_b`: the places of its K best scores [M]."""
    # [BM]; other programs wrote the scores: .cg reads past this multiprocessor's own cache
    p_s = scores + i_b * M
    o_m = tl.arange(0, BM)
    m_m = o_m < M
    b_s = tl.load(p_s + o_m, mask=m_m, other=float("-inf"), cache_modifier=".cg")
    b_key = _key(b_s, o_m)
    if BM <= 128:
        b_rank = tl.sum((b_key[:, None] > b_key[None, :]).to(tl.int32), 0)
        tl.store(beams + i_b * K + b_rank, o_m, mask=m_m & (b_rank < K))
    else:
        # a comparison of each with each is longer than K maxima
        for i_k in range(K):
            best = tl.max(b_key, 0)
            tl.store(beams + i_b * K + i_k, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32))
            b_key = tl.where(b_key == best, _LEAST, b_key)


@triton.jit
def expand_kernel(
    logits,
    uncond,
    above,
    tokens,
    scores,
    beams,
    tickets,
    stride_cb,
    stride_cw,
    stride_cv,
    stride_ub,
    stride_uw,
    stride_uv,
    stride_ab,
    stride_aw,
    W,
    V,
    K,
    guidance,
    inverse_temperature,
    BG: tl.constexpr,
    BM: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    HAS_ABOVE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_ONLY: tl.constexpr,
    IS_MERGED: tl.constexpr,
):
    """Write tokens and scores of a beam's K children; the last of a sequence if IS_MERGED: beams.

    `above` is the beams' scores [B, W]. IS_WHOLE: a row is one tile. IS_ONLY: a beam is all of its
    sequence.
    """
    i_b = tl.program_id(0).to(tl.int64) // W
    i_w = tl.program_id(0).to(tl.int64) % W
    p_c = logits + i_b * stride_cb + i_w * stride_cw
    p_u = logits
    if HAS_UNCOND:
        p_u = uncond + i_b * stride_ub + i_w * stride_uw
    # [BK]: the best groups; places of no use are never the least
    o_k = tl.arange(0, _BK)
    b_best = tl.where(o_k < K, _LEAST + 1 + o_k.to(tl.int64), _MOST)
    top = tl.full([], float("-inf"), tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    is_bad = tl.full([], 0, tl.int32)
    for i_v in range(0, V, BG * _GROUP):
        # [BG, 8]
        o_g = i_v // _GROUP + tl.arange(0, BG)
        o_v = o_g[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        b_x = guided(p_c, p_u, o_v, o_v < V, stride_cv, stride_uv, guidance, HAS_UNCOND)
        is_bad |= tl.max(tl.max((b_x != b_x).to(tl.int32), 1), 0)
        b_x = tl.where(b_x != b_x, float("-inf"), b_x)
        # [BG]
        b_g = tl.max(b_x, 1)
        high = tl.maximum(top, tl.max(b_g, 0))
        # where nothing has come yet, or too much, any number will do
        base = tl.where(_finite(high), high, 0.0)
        b_e = tl.exp((b_x - base) * inverse_temperature)
        mass = mass * tl.exp((top - base) * inverse_temperature) + tl.sum(tl.sum(b_e, 1), 0)
        top = high
        b_key = _key(b_g, o_g)
        best = tl.max(b_key, 0)
        if IS_WHOLE:
            for i_k in range(K):
                b_best = tl.where(o_k == i_k, best, b_best)
                b_key = tl.where(b_key == best, _LEAST, b_key)
                best = tl.max(b_key, 0)
        else:
            worst = tl.min(b_best, 0)
            while best > worst:
                b_best = tl.where(b_best == worst, best, b_best)
                b_key = tl.where(b_key == best, _LEAST, b_key)
                worst = tl.min(b_best, 0)
                best = tl.max(b_key, 0)

    score = tl.full([], 0.0, tl.float32)
    if HAS_ABOVE:
        score = tl.load(above + i_b * stride_ab + i_w * stride_aw)
    is_good = (is_bad == 0) & _finite(top) & _finite(score)
    top = tl.where(is_good, top, 0.0)
    score = tl.where(is_good, score, 0.0)
    mass = tl.where(is_good, tl.maximum(mass, 1.0), 1.0)
    # [BK * 8]: the tokens of the best groups
    m_c = tl.broadcast_to((o_k < K)[:, None], [_BK, _GROUP])
    o_g = 0x7FFFFFFF - (b_best & 0x7FFFFFFF).to(tl.int32)
    o_c = tl.where(m_c, o_g[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :], 0x7FFFFFFF)
    o_c = tl.reshape(o_c, [_BK * _GROUP])
    b_c = guided(p_c, p_u, o_c, o_c < V, stride_cv, stride_uv, guidance, HAS_UNCOND)
    b_key = _key(b_c, o_c)
    b_rank = tl.sum((b_key[:, None] > b_key[None, :]).to(tl.int32), 0)
    # no child scores more than its beam, however a GPU rounds
    b_s = score + ((b_c - top) * inverse_temperature - tl.maximum(tl.log(mass), 0.0))
    m_s = (b_s > float("-inf")) & is_good
    o_s = (i_b * W + i_w) * K + b_rank
    m_c = b_rank < K
    tl.store(tokens + o_s, tl.where(m_s, o_c, -1).to(tl.int64), mask=m_c)
    tl.store(scores + o_s, tl.where(m_s, b_s, float("-inf")), mask=m_c)
    if IS_ONLY:
        tl.store(beams + o_s, b_rank, mask=m_c)
    if IS_MERGED:
        # all threads' stores come before the ticket, and the ticket before the last one's loads
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets + i_b, 1, sem="acq_rel")
        if ticket == W - 1:
            # for the next launch, or the next replay
            tl.store(tickets + i_b, 0)
            _merge(scores, beams, i_b, W * K, K, BM)


@triton.jit
def merge_kernel(scores, beams, M, K, BM: tl.constexpr):
    """Write the beams of sequence `program_id(0)`."""
    _merge(scores, beams, tl.program_id(0).to(tl.int64), M, K, BM)


@triton.jit
def build_kernel(
    root,
    tokens,
    scores,
    parents,
    limit,
    tree_tokens,
    tree_parents,
    first_child,
    next_sibling,
    depths,
    mask,
    stride_rb,
    stride_tb,
    stride_tm,
    stride_sb,
    stride_sm,
    stride_pb,
    stride_pm,
    stride_lb,
    M,
    N,
    NW,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
):
    """Write the tree of sequence `program_id(0)`."""
    i_b = tl.program_id(0).to(tl.int64)
    # [BM]
    o_m = tl.arange(0, BM)
    m_m = o_m < M
    o_mw = o_m.to(tl.int64)
    b_t = tl.load(tokens + i_b * stride_tb + o_mw * stride_tm, mask=m_m, other=-1).to(tl.int64)
    b_s = tl.load(scores + i_b * stride_sb + o_mw * stride_sm, mask=m_m, other=0.0)
    b_p = tl.load(parents + i_b * stride_pb + o_mw * stride_pm, mask=m_m, other=-2).to(tl.int64)
    # a parent that comes before: no climb goes round, or out of bounds
    m_good = (b_t >= 0) & _finite(b_s) & (b_p >= -1) & (b_p < o_m)
    # -1: the root, -2: nowhere
    b_p = tl.where(m_good, b_p, -2).to(tl.int32)
    b_up = b_p
    b_depth = tl.full([BM], 1, tl.int32)
    while tl.max(b_up, 0) >= 0:
        m_up = b_up >= 0
        b_at = tl.maximum(b_up, 0)
        b_depth += tl.where(m_up, tl.gather(b_depth, b_at, 0), 0)
        b_up = tl.where(m_up, tl.gather(b_up, b_at, 0), b_up)
    m_fit = b_up == -1
    if HAS_LIMIT:
        m_fit = m_fit & (b_depth <= tl.load(limit + i_b * stride_lb))

    # at least `wanted` candidates are lo or more, or all are; fewer are hi or more
    b_o = order(tl.where(b_s == 0, 0.0, b_s))
    wanted = N - 1
    lo = tl.min(tl.where(m_fit, b_o, 0x7FFFFFFF), 0).to(tl.int64)
    hi = tl.max(tl.where(m_fit, b_o, -0x7FFFFFFF), 0).to(tl.int64) + 1
    if tl.sum(m_fit.to(tl.int32), 0) <= wanted:
        hi = lo
    while hi - lo > 1:
        middle = (lo + hi) >> 1
        count = tl.sum((m_fit & (b_o >= middle)).to(tl.int32), 0)
        hi = tl.where(count == wanted, middle + 1, tl.where(count > wanted, hi, middle))
        lo = tl.where(count >= wanted, middle, lo)
    m_over = m_fit & (b_o > lo)
    b_tie = (m_fit & (b_o == lo)).to(tl.int32)
    left = wanted - tl.sum(m_over.to(tl.int32), 0)
    b_kept = (m_over | ((b_tie > 0) & (tl.cumsum(b_tie, 0) <= left))).to(tl.int32)
    # without their parents they go too: only where a child scores more than its parent
    b_at = tl.maximum(b_p, 0)
    b_gone = b_kept & (b_p >= 0).to(tl.int32) & (tl.gather(b_kept, b_at, 0) == 0).to(tl.int32)
    while tl.max(b_gone, 0) > 0:
        b_kept = b_kept - b_gone
        b_gone = b_kept & (b_p >= 0).to(tl.int32) & (tl.gather(b_kept, b_at, 0) == 0).to(tl.int32)

    b_node = tl.cumsum(b_kept, 0)
    deepest = tl.max(tl.where(b_kept > 0, b_depth, 0), 0)
    count = 1 + tl.sum(b_kept, 0)
    b_above = tl.where(b_p < 0, 0, tl.gather(b_node, b_at, 0))
    tl.store(tree_tokens + i_b * N + b_node, b_t, mask=b_kept > 0)
    tl.store(tree_parents + i_b * N + b_node, b_above, mask=b_kept > 0)
    # [BN]: the root and the padding
    o_n = tl.arange(0, BN)
    m_n = o_n < N
    m_rest = m_n & ((o_n == 0) | (o_n >= count))
    b_root = tl.where(o_n == 0, tl.load(root + i_b * stride_rb).to(tl.int64), 0)
    tl.store(tree_tokens + i_b * N + o_n, b_root, mask=m_rest)
    tl.store(tree_parents + i_b * N + o_n, tl.full([BN], -1, tl.int32), mask=m_rest)
    tl.debug_barrier()

    b_parent = tl.load(tree_parents + i_b * N + o_n, mask=m_n, other=-1)
    b_first = tl.full([BN], 0x7FFFFFFF, tl.int32)
    b_next = tl.full([BN], 0x7FFFFFFF, tl.int32)
    for i_n in range(0, N, 32):
        # [BN, 32]
        o_j = i_n + tl.arange(0, 32)
        b_j = tl.load(tree_parents + i_b * N + o_j, mask=o_j < N, other=-1)
        b_place = tl.broadcast_to(o_j[None, :], [BN, 32])
        b_child = tl.where(b_j[None, :] == o_n[:, None], b_place, 0x7FFFFFFF)
        b_first = tl.minimum(b_first, tl.min(b_child, 1))
        m_next = (b_j[None, :] == b_parent[:, None]) & (o_j[None, :] > o_n[:, None])
        b_next = tl.minimum(b_next, tl.min(tl.where(m_next, b_place, 0x7FFFFFFF), 1))
    b_first = tl.where(b_first < N, b_first, -1)
    b_next = tl.where((b_next < N) & (b_parent >= 0), b_next, -1)
    tl.store(first_child + i_b * N + o_n, b_first, mask=m_n)
    tl.store(next_sibling + i_b * N + o_n, b_next, mask=m_n)

    # [BN, BW]
    o_w = tl.arange(0, BW)
    b_mask = tl.zeros([BN, BW], tl.int32)
    b_line = tl.where(o_n < count, o_n, -1)
    b_far = tl.full([BN], -1, tl.int32)
    for _ in range(deepest + 1):
        m_line = b_line >= 0
        o_at = tl.maximum(b_line, 0)
        b_bit = tl.where(m_line, 1 << (o_at % 32), 0)
        b_mask |= tl.where((o_at // 32)[:, None] == o_w[None, :], b_bit[:, None], 0)
        b_far += m_line.to(tl.int32)
        b_line = tl.where(m_line, tl.gather(b_parent, o_at, 0), -1)
    tl.store(depths + i_b * N + o_n, b_far, mask=m_n)
    p_m = mask + (i_b * N + o_n)[:, None] * NW + o_w[None, :]
    tl.store(p_m, b_mask, mask=m_n[:, None] & (o_w < NW)[None, :])


def expand_tree(
    logits: torch.Tensor,
    scores: torch.Tensor | None,
    *,
    top_k: int,
    uncond: torch.Tensor | None,
    guidance: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens [B, W * K] int64, scores [B, W * K] float32 and beams [B, K] int32."""
    batch, beams, vocabulary = logits.shape
    count = beams * top_k
    device = logits.device
    tokens = logits.new_empty((batch, count), dtype=torch.int64)
    totals = logits.new_empty((batch, count), dtype=torch.float32)
    best = logits.new_empty((batch, top_k), dtype=torch.int32)
    if batch == 0:
        return tokens, totals, best
    is_aligned = _aligned(logits) and (uncond is None or _aligned(uncond))
    launch = config.expand(vocabulary, logits.element_size(), is_aligned)
    tile = max(32, triton.next_power_of_2(count))
    tickets = None
    with on(device):
        if beams > 1:
            tickets = take(device, batch)
        expand_kernel[(batch * beams,)](
            logits=logits,
            uncond=uncond,
            above=scores,
            tokens=tokens,
            scores=totals,
            beams=best,
            tickets=tickets,
            stride_cb=logits.stride(0),
            stride_cw=logits.stride(1),
            stride_cv=logits.stride(2),
            stride_ub=0 if uncond is None else uncond.stride(0),
            stride_uw=0 if uncond is None else uncond.stride(1),
            stride_uv=0 if uncond is None else uncond.stride(2),
            stride_ab=0 if scores is None else scores.stride(0),
            stride_aw=0 if scores is None else scores.stride(1),
            W=beams,
            V=vocabulary,
            K=top_k,
            guidance=guidance,
            inverse_temperature=1.0 / temperature,
            BG=launch.BG,
            BM=tile,
            HAS_UNCOND=uncond is not None,
            HAS_ABOVE=scores is not None,
            IS_WHOLE=vocabulary <= 8 * launch.BG,
            IS_ONLY=beams == 1,
            IS_MERGED=tickets is not None,
            num_warps=launch.num_warps,
            maxnreg=config.EXPAND_MAXNREG,
            enable_fp_fusion=False,
        )
        if beams > 1 and tickets is None:
            merge_kernel[(batch,)](
                scores=totals,
                beams=best,
                M=count,
                K=top_k,
                BM=tile,
                num_warps=config.MERGE_WARPS,
            )
    return tokens, totals, best


def build_tree(
    root: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    parents: torch.Tensor,
    limit: torch.Tensor | None,
    *,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the fields of a TokenTree of `size` nodes for each sequence."""
    batch, count = tokens.shape
    device = tokens.device
    words = triton.cdiv(size, 32)
    tree_tokens = torch.empty((batch, size), dtype=torch.int64, device=device)
    fields = [torch.empty((batch, size), dtype=torch.int32, device=device) for _ in range(4)]
    mask = torch.empty((batch, size, words), dtype=torch.int32, device=device)
    out = (tree_tokens, *fields, mask)
    if batch == 0:
        return out
    launch = config.build(count)
    with on(device):
        build_kernel[(batch,)](
            root=root,
            tokens=tokens,
            scores=scores,
            parents=parents,
            limit=limit,
            tree_tokens=tree_tokens,
            tree_parents=fields[0],
            first_child=fields[1],
            next_sibling=fields[2],
            depths=fields[3],
            mask=mask,
            stride_rb=root.stride(0),
            stride_tb=tokens.stride(0),
            stride_tm=tokens.stride(1),
            stride_sb=scores.stride(0),
            stride_sm=scores.stride(1),
            stride_pb=parents.stride(0),
            stride_pm=parents.stride(1),
            stride_lb=0 if limit is None else limit.stride(0),
            M=count,
            N=size,
            NW=words,
            BM=launch.BM,
            BN=max(16, triton.next_power_of_2(size)),
            BW=triton.next_power_of_2(words),
            HAS_LIMIT=limit is not None,
            num_warps=launch.num_warps,
        )
    return out


def _aligned(logits: torch.Tensor) -> bool:
    """Return whether Triton knows that groups of tokens are aligned, and one piece."""
    sizes = (logits.data_ptr(), logits.stride(0), logits.stride(1), logits.shape[2])
    return logits.stride(2) == 1 and all(size % 16 == 0 for size in sizes)


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the shipped configurations for `arch`, guided and merged; W and K are LANTERN's."""
    strides = ("stride_cb", "stride_cw", "stride_ub", "stride_uw", "stride_ab", "stride_aw")
    # each as one tile; rows of several, and of such as are not aligned, with the most candidates
    expansions = [(launch, "bf16", True, True, 128) for launch in config.EXPAND]
    expansions += [(config.EXPAND[3], "bf16", True, False, 128)]
    expansions += [(config.EXPAND[2], "fp32", True, False, 128)]
    expansions += [(config.EXPAND[1], "bf16", False, False, 1024)]
    for launch, dtype, is_aligned, is_whole, tile in expansions:
        yield Compilation(
            kernel=expand_kernel,
            arch=arch,
            config=f"{dtype} BG{launch.BG} BM{tile}"
            + ("" if is_whole else " tiles")
            + ("" if is_aligned else " not aligned"),
            signature={"logits": f"*{dtype}", "uncond": f"*{dtype}", "above": "*fp32"}
            | {"tokens": "*i64", "scores": "*fp32", "beams": "*i32", "tickets": "*i32"}
            | dict.fromkeys((*strides, "W", "V", "K"), "i32")
            | dict.fromkeys(("guidance", "inverse_temperature"), "fp32"),
            constants={
                "stride_cv": 1,
                "stride_uv": 1,
                "BG": launch.BG,
                "BM": tile,
                "HAS_UNCOND": True,
                "HAS_ABOVE": True,
                "IS_WHOLE": is_whole,
                "IS_ONLY": False,
                "IS_MERGED": True,
            },
            divisible=("tokens", "scores", "beams", "tickets") + (_ALIGNED if is_aligned else ()),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.BUDGET,
            maxnreg=config.EXPAND_MAXNREG,
            enable_fp_fusion=False,
        )
    for tile in (128, 1024):
        yield Compilation(
            kernel=merge_kernel,
            arch=arch,
            config=f"BM{tile}",
            signature={"scores": "*fp32", "beams": "*i32", "M": "i32", "K": "i32"},
            constants={"BM": tile},
            divisible=("scores", "beams"),
            num_warps=config.MERGE_WARPS,
            num_stages=3,
            budget=config.BUDGET,
        )
    fields = ("tree_parents", "first_child", "next_sibling", "depths", "mask")
    strides = ("stride_rb", "stride_tb", "stride_sb", "stride_pb", "stride_lb")
    for launch, nodes in zip(config.BUILD, (64, 64, 128), strict=True):
        yield Compilation(
            kernel=build_kernel,
            arch=arch,
            config=f"BM{launch.BM} BN{nodes} limit",
            signature={"root": "*i64", "tokens": "*i64", "scores": "*fp32", "parents": "*i32"}
            | {"limit": "*i32", "tree_tokens": "*i64"}
            | dict.fromkeys(fields, "*i32")
            | dict.fromkeys((*strides, "M", "N", "NW"), "i32"),
            constants={
                "stride_tm": 1,
                "stride_sm": 1,
                "stride_pm": 1,
                "BM": launch.BM,
                "BN": nodes,
                "BW": nodes // 32,
                "HAS_LIMIT": True,
            },
            divisible=("root", "tokens", "scores", "parents", "limit", "tree_tokens", *fields),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.BUDGET,
        )
