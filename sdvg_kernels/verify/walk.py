"""`verify_tree` by every rule, in Triton: one program walks down the tree of one sequence.

    exact, relaxed   one coin a node; children in turn, until the sum of their shares reaches it
    chosen           the child that carries the row's choice: the likeliest token, or the drawn one
    typical          no coin: the deepest node that only typical ones lead to

Probabilities come from `rows`, and no row is read on the way but for neighbours; the row of the
last node is read for the race of the token that follows, without what was rejected: that is marked
in `stamps`, which holds the level + 1 at which a token was left out.
Layout: tokens to chances [B, N];
logits, uncond [B, N, V]; neighbours [V, K]; stamps [B, V]; path [B, P]; the others [B].
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels import _warp
from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels.verify import config
from sdvg_kernels.verify.reference import Keys, Warp
from sdvg_kernels.verify.rows import launch_rows

EXACT, CHOSEN, RELAXED, TYPICAL = (tl.constexpr(rule) for rule in range(4))


@triton.jit
def _linked(links, parents, at, node, elder, N):
    """Return the child of `node` that `links` names at `at`, or -1: it stands behind `elder`."""
    child = tl.load(links + at)
    is_there = (child > elder) & (child < N)
    parent = tl.load(parents + child, mask=is_there, other=-1)
    return tl.where(is_there & (parent == node), child, -1)


@triton.jit
def _lent(
    p_c,
    p_u,
    p_n,
    p_s,
    x,
    bound,
    stamp,
    top,
    mass,
    least,
    V,
    K,
    stride_cv,
    stride_uv,
    guidance,
    inverse_temperature,
    BK: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
):
    """Return what the first neighbours of `x` lend it, at most `bound`, and leave them out."""
    lent = 0.0
    i_k = 0
    while i_k < K:
        # [BK]
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_id = tl.load(p_n + o_k, mask=m_k, other=-1).to(tl.int64)
        m_k = m_k & (b_id >= 0) & (b_id < V)
        b_out = (tl.load(p_s + b_id, mask=m_k, other=0) == stamp) | (b_id == x)
        b_t = _warp.guided(p_c, p_u, b_id, m_k, stride_cv, stride_uv, guidance, HAS_UNCOND)
        b_p = _warp.weight(b_t, least, top, inverse_temperature) / mass
        b_sum = lent + tl.cumsum(tl.where(m_k & (b_out == 0), b_p, 0.0), 0)
        first = tl.min(tl.where(b_sum <= bound, BK, tl.arange(0, BK)), 0)
        b_in = tl.arange(0, BK) < first
        lent = tl.maximum(lent, tl.max(tl.where(b_in, b_sum, 0.0), 0))
        # few neighbours are held by every warp: all have looked before one of them writes
        tl.debug_barrier()
        tl.store(p_s + b_id, stamp.to(p_s.dtype.element_ty), mask=m_k & b_in)
        i_k = tl.where(first < BK, K, i_k + BK)
    return lent


@triton.jit
def _longest(parents, chances, bounds, N, depth, BN: tl.constexpr):
    """Return (the node at which the longest typical path ends, its level)."""
    # [BN]
    o_n = tl.arange(0, BN)
    b_parent = tl.load(parents + o_n, mask=o_n < N, other=-1)
    m_n = (b_parent >= 0) & (b_parent < o_n)
    b_up = tl.where(m_n, b_parent, 0)
    b_p = tl.load(chances + o_n, mask=m_n, other=0.0)
    b_typical = m_n & (b_p > tl.load(bounds + b_up, mask=m_n, other=1.0))
    b_log = tl.log(tl.where(b_typical, b_p, 1.0))
    b_level = tl.where(o_n == 0, 0, -1)
    b_score = tl.zeros([BN], tl.float32)
    for _ in range(depth):
        b_above = tl.gather(b_level, b_up, 0)
        b_new = b_typical & (b_above >= 0)
        b_score = tl.where(b_new, tl.gather(b_score, b_up, 0) + b_log, b_score)
        b_level = tl.where(b_new, b_above + 1, b_level)
    level = tl.max(b_level, 0)
    b_score = tl.where(b_level == level, b_score, float("-inf"))
    # of equally likely ones the first
    best = tl.max(b_score, 0)
    return tl.min(tl.where(b_score == best, o_n, BN), 0), level


@triton.jit
def walk_kernel(
    tokens,
    parents,
    first_child,
    next_sibling,
    tops,
    masses,
    bounds,
    leasts,
    chances,
    logits,
    uncond,
    neighbours,
    stamps,
    seeds,
    sequences,
    positions,
    path,
    counts,
    out,
    stride_cb,
    stride_cn,
    stride_cv,
    stride_ub,
    stride_un,
    stride_uv,
    N,
    V,
    K,
    depth,
    guidance,
    inverse_temperature,
    top_k,
    top_p,
    delta,
    ratio,
    BN: tl.constexpr,
    BP: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    RULE: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    HAS_RATIO: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Write the path, the count and the token of sequence `program_id(0)`."""
    i_b = tl.program_id(0).to(tl.int64)
    p_x = tokens + i_b * N
    p_up = parents + i_b * N
    p_first = first_child + i_b * N
    p_next = next_sibling + i_b * N
    p_top = tops + i_b * N
    p_mass = masses + i_b * N
    p_least = leasts + i_b * N
    p_chance = chances + i_b * N
    p_s = stamps + i_b * V
    seed, sequence, position = 0, 0, 0
    if not IS_GREEDY:
        seed = tl.load(seeds + i_b)
        sequence = tl.load(sequences + i_b).to(tl.int32)
        position = tl.load(positions + i_b).to(tl.int32)
    if RULE == EXACT or RULE == RELAXED:
        for i_v in range(0, V, BR):
            o_r = i_v + tl.arange(0, BR)
            tl.store(p_s + o_r, tl.zeros([BR], p_s.dtype.element_ty), mask=o_r < V)
        tl.debug_barrier()
    # [BP]
    o_p = tl.arange(0, BP)
    b_path = tl.where(o_p == 0, 0, -1)
    node = tl.full([], 0, tl.int32)
    level = tl.full([], 0, tl.int32)
    # the last child that could have come, where nothing is left for the race
    spare = tl.full([], -1, tl.int32)
    is_bad = tl.full([], 0, tl.int32)
    # whether `rows` has read the row of the node
    is_read = tl.full([], 0, tl.int32)
    if RULE == TYPICAL:
        node, level = _longest(p_up, p_chance, bounds + i_b * N, N, depth, BN)
        o_n = tl.arange(0, BN)
        b_up = tl.load(p_up + o_n, mask=o_n < N, other=-1)
        is_read = tl.max(((b_up == node) & (o_n > node)).to(tl.int32), 0)
        if is_read:
            is_bad = (tl.load(p_mass + node) < 0).to(tl.int32)
        above = node
        i_p = level
        while i_p > 0:
            b_path = tl.where(o_p == i_p, above, b_path)
            above = tl.load(p_up + above)
            i_p -= 1
    else:
        goes = tl.full([], 1, tl.int32)
        while goes > 0:
            goes = tl.full([], 0, tl.int32)
            is_read = tl.full([], 0, tl.int32)
            spare = tl.full([], -1, tl.int32)
            child = tl.full([], -1, tl.int32)
            if level < depth:
                child = _linked(p_first, p_up, node, node, node, N)
            at = node
            if child >= 0:
                is_read = tl.full([], 1, tl.int32)
                is_bad = (tl.load(p_mass + at) < 0).to(tl.int32)
                if is_bad:
                    child = tl.full([], -1, tl.int32)
            if RULE == CHOSEN:
                choice = tl.full([], -1, tl.int32)
                if child >= 0:
                    choice = tl.load(p_least + at)
                while child >= 0:
                    following = _linked(p_next, p_up, child, at, child, N)
                    if tl.load(p_x + child) == choice:
                        node = child
                        following = tl.full([], -1, tl.int32)
                        goes = tl.full([], 1, tl.int32)
                    child = following
            else:
                coin = 0.0
                top, mass, least = 0.0, 1.0, tl.full([], 0, tl.int32)
                if child >= 0:
                    coin = _warp.coin(seed, sequence, position + level)
                    if RULE == RELAXED:
                        top = tl.load(p_top + at)
                        mass = tl.load(p_mass + at)
                        least = tl.load(p_least + at)
                scanned = 0.0
                moved = 0.0
                while child >= 0:
                    following = _linked(p_next, p_up, child, at, child, N)
                    share = tl.load(p_chance + child)
                    x = tl.load(p_x + child).to(tl.int64)
                    if RULE == RELAXED:
                        if (x >= 0) & (x < V):
                            stamp = level + 1
                            # what was left out before is seen by all threads ...
                            tl.debug_barrier()
                            is_out = tl.load(p_s + x) == stamp
                            share = tl.where(is_out, 0.0, share)
                            bound = delta - moved
                            if HAS_RATIO:
                                bound = tl.minimum(bound, (ratio - 1) * share)
                            # ... before it changes
                            tl.debug_barrier()
                            tl.store(p_s + x, stamp.to(p_s.dtype.element_ty))
                            p_c = logits + i_b * stride_cb + at.to(tl.int64) * stride_cn
                            p_u = logits
                            if HAS_UNCOND:
                                p_u = uncond + i_b * stride_ub + at.to(tl.int64) * stride_un
                            lent = _lent(
                                p_c, p_u, neighbours + x * K, p_s, x, bound, stamp, top, mass,
                                least, V, K, stride_cv, stride_uv, guidance, inverse_temperature,
                                BK, HAS_UNCOND,
                            )  # fmt: skip
                            moved += lent
                            share += lent
                    scanned += share
                    if share > 0:
                        spare = x.to(tl.int32)
                        if coin <= scanned:
                            node = child
                            following = tl.full([], -1, tl.int32)
                            goes = tl.full([], 1, tl.int32)
                    child = following
            if goes:
                level += 1
                b_path = tl.where(o_p == level, node, b_path)
    p_c = logits + i_b * stride_cb + node.to(tl.int64) * stride_cn
    p_u = logits
    if HAS_UNCOND:
        p_u = uncond + i_b * stride_ub + node.to(tl.int64) * stride_un
    least = tl.full([], 0, tl.int32)
    if is_read:
        if is_bad == 0:
            least = tl.load(p_least + node)
            if RULE == EXACT:
                # the children of the last node are left out
                o_n = tl.arange(0, BN)
                b_up = tl.load(p_up + o_n, mask=o_n < N, other=-1)
                m_n = (b_up == node) & (o_n > node)
                m_n &= tl.load(p_chance + o_n, mask=m_n, other=0.0) > 0
                b_id = tl.load(p_x + o_n, mask=m_n, other=0).to(tl.int64)
                b_stamp = tl.zeros([BN], p_s.dtype.element_ty) + 1
                tl.store(p_s + b_id, b_stamp, mask=m_n)
    else:
        b_x, top, is_lost = _warp.peak(
            p_c, p_u, V, stride_cv, stride_uv, guidance, BV, HAS_UNCOND, IS_WHOLE
        )
        is_bad = is_lost.to(tl.int32)
        if is_bad == 0:
            least = _warp.threshold(
                b_x, top, p_c, p_u, V, stride_cv, stride_uv, guidance, inverse_temperature, top_k,
                top_p, BV, HAS_UNCOND, HAS_TOP_K, HAS_TOP_P, IS_WHOLE,
            ).to(tl.int32)  # fmt: skip
    token = tl.full([], -1, tl.int32)
    if is_bad == 0:
        races = 1
        if RULE == CHOSEN:
            token = least
            races = is_read == 0
        if races:
            tl.debug_barrier()
            stamp = level + 1
            if RULE == EXACT:
                stamp = tl.full([], 1, tl.int32)
            # [BR]
            b_best = tl.full([BR], float("-inf"), tl.float32)
            b_token = tl.full([BR], 0x7FFFFFFF, tl.int32)
            for i_v in range(0, V, BR):
                b_s = _warp.scores(
                    p_c, p_u, i_v, V, stride_cv, stride_uv, guidance, inverse_temperature, least,
                    seed, sequence, position + level, BR, HAS_UNCOND, HAS_TOP_K or HAS_TOP_P,
                    IS_GREEDY,
                )  # fmt: skip
                o_r = i_v + tl.arange(0, BR)
                if RULE == EXACT or RULE == RELAXED:
                    b_out = tl.load(p_s + o_r, mask=o_r < V, other=0) == stamp
                    b_s = tl.where(b_out, float("-inf"), b_s)
                b_token = tl.where(b_s > b_best, o_r, b_token)
                b_best = tl.maximum(b_best, b_s)
            token = _warp.winner(b_best, b_token)
            token = tl.where(token == 0x7FFFFFFF, spare, token)
    b_path = tl.where(token >= 0, b_path, -1)
    tl.store(path + i_b * (depth + 1) + o_p, b_path, mask=o_p <= depth)
    tl.store(counts + i_b, tl.where(token >= 0, level + 1, 0))
    tl.store(out + i_b, token.to(tl.int64))


def verify_tree(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    logits: torch.Tensor,
    uncond: torch.Tensor | None,
    neighbours: torch.Tensor | None,
    keys: Keys,
    warp: Warp,
    *,
    depth: int,
    rule: str,
    bounds: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (path, counts, tokens) by `rule`, with (delta, ratio) or (epsilon, alpha)."""
    batch, nodes, vocabulary = logits.shape
    path = logits.new_empty((batch, depth + 1), dtype=torch.int32)
    counts = logits.new_empty(batch, dtype=torch.int32)
    out = logits.new_empty(batch, dtype=torch.int64)
    if batch == 0:
        return path, counts, out
    is_greedy = warp.temperature == 0
    # one token has it all: by every rule, only the child that carries it is accepted
    is_chosen = is_greedy or rule == "coupled"
    is_relaxed = rule == "relaxed" and not is_chosen
    is_typical = rule == "typical" and not is_chosen
    number = RELAXED if is_relaxed else TYPICAL if is_typical else CHOSEN if is_chosen else EXACT
    delta, ratio = bounds if is_relaxed else (0.0, 1.0)
    launch = config.row_launch(vocabulary)
    tokens, parents, first_child, next_sibling = (
        field.contiguous() for field in (tokens, parents, first_child, next_sibling)
    )
    keys = Keys(*(None if key is None else key.contiguous() for key in keys))
    # nothing is looked up in what is not given
    table = tokens if neighbours is None else neighbours.contiguous()
    device = logits.device
    with on(device):
        rows = launch_rows(
            logits, uncond, tokens, parents, keys, warp, nodes, rule=rule, bounds=bounds
        )
        has_stamps = number in (EXACT, RELAXED)
        stamps = logits.new_empty((batch, vocabulary if has_stamps else 0), dtype=torch.int16)
        walk_kernel[(batch,)](
            tokens=tokens,
            parents=parents,
            first_child=first_child,
            next_sibling=next_sibling,
            **rows._asdict(),
            logits=logits,
            uncond=uncond,
            neighbours=table,
            stamps=stamps,
            seeds=keys.seeds,
            sequences=keys.sequences,
            positions=keys.positions,
            path=path,
            counts=counts,
            out=out,
            stride_cb=logits.stride(0),
            stride_cn=logits.stride(1),
            stride_cv=logits.stride(2),
            stride_ub=0 if uncond is None else uncond.stride(0),
            stride_un=0 if uncond is None else uncond.stride(1),
            stride_uv=0 if uncond is None else uncond.stride(2),
            N=nodes,
            V=vocabulary,
            K=table.shape[1],
            depth=depth,
            guidance=warp.guidance,
            inverse_temperature=1.0 if is_greedy else 1.0 / warp.temperature,
            top_k=warp.top_k,
            top_p=warp.top_p,
            delta=delta,
            ratio=ratio,
            BN=triton.next_power_of_2(nodes),
            BP=triton.next_power_of_2(depth + 1),
            BV=launch.BV,
            BR=launch.BR,
            BK=min(config.NEIGHBOURS, triton.next_power_of_2(table.shape[1])),
            RULE=number.value,
            HAS_UNCOND=uncond is not None,
            HAS_RATIO=ratio < float("inf"),
            HAS_TOP_K=warp.top_k > 0 and not is_greedy,
            HAS_TOP_P=warp.top_p < 1 and not is_greedy,
            IS_GREEDY=is_greedy,
            IS_WHOLE=launch.IS_WHOLE,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )
    return path, counts, out


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the shipped configurations for `arch` by rule: guided with thresholds, or plain."""
    strides = tuple(f"stride_{of}{axis}" for of in "cu" for axis in "bn")
    pointers = {"logits": "*bf16", "uncond": "*bf16", "stamps": "*i16", "neighbours": "*u16"}
    pointers |= dict.fromkeys(("tokens", "seeds", "out"), "*i64")
    pointers |= dict.fromkeys(("tops", "masses", "bounds", "chances"), "*fp32")
    fields = ("parents", "first_child", "next_sibling", "leasts", "sequences", "positions")
    pointers |= dict.fromkeys((*fields, "path", "counts"), "*i32")
    largest, tiled = config.WHOLE[-1], config.TILED
    rules = {"exact": EXACT, "chosen": CHOSEN, "relaxed": RELAXED, "typical": TYPICAL}
    rules |= {"plain": EXACT, "greedy": CHOSEN}
    cases = [(launch, "exact") for launch in (*config.WHOLE, tiled)]
    cases += [(largest, rule) for rule in rules if rule != "exact"]
    for launch, rule in cases:
        warps = rule not in ("plain", "greedy")
        yield Compilation(
            kernel=walk_kernel,
            arch=arch,
            config=f"bf16 {rule} BV{launch.BV}" + ("" if launch.IS_WHOLE else " tiled"),
            signature=pointers
            | dict.fromkeys((*strides, "N", "V", "K", "depth", "top_k"), "i32")
            | dict.fromkeys(("guidance", "inverse_temperature", "top_p", "delta", "ratio"), "fp32"),
            constants={
                "stride_cv": 1,
                "stride_uv": 1,
                "BN": 64,
                "BP": 8,
                "BV": launch.BV,
                "BR": launch.BR,
                "BK": config.NEIGHBOURS,
                "RULE": rules[rule].value,
                "HAS_UNCOND": warps,
                "HAS_RATIO": True,
                "HAS_TOP_K": warps,
                "HAS_TOP_P": warps,
                "IS_GREEDY": rule == "greedy",
                "IS_WHOLE": launch.IS_WHOLE,
            }
            | ({} if warps else {"uncond": None}),
            divisible=("logits", "uncond", "stamps", *strides, "V"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.WALK_BUDGET,
            enable_fp_fusion=False,
        )
