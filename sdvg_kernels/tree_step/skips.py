"""The programs that choose a path without the target, in Triton: one for each sequence.

    leaf        the one whose word of noise is least: each is as likely; or first children's
    kept        min(depth of the leaf, floor(mean length of all paths) - 1), lengths with the root
    similarity  sum_l w_l mean_{i<j} <code_il, code_jl> / sum_l w_l,   w_l = decay^(l - 1)

The sum over pairs of a level is half of `|sum_i code_i|^2 - sum_i |code_i|^2`: no pair is looked
at, and a node counts as often as paths pass through it.
Layout: a tree's fields [B, N], its mask [B, N, NW], codebook [V, E].
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("N", "NW", "P"))
def select_kernel(
    depths,
    first_child,
    mask,
    wanted,
    seeds,
    sequences,
    positions,
    path,
    counts,
    N,
    NW,
    P,
    BN: tl.constexpr,
    BP: tl.constexpr,
    IS_LIKELY: tl.constexpr,
):
    """Write path and count of sequence `program_id(0)`."""
    i_b = tl.program_id(0).to(tl.int64)
    # [BN]
    o_n = tl.arange(0, BN)
    m_n = o_n < N
    b_depth = tl.load(depths + i_b * N + o_n, mask=m_n, other=-1)
    b_child = tl.load(first_child + i_b * N + o_n, mask=m_n, other=0)
    m_leaf = (b_depth >= 0) & (b_child < 0)
    leaf = tl.full([], 0, tl.int32)
    if IS_LIKELY:
        for _ in range(P):
            # children stand behind their parents
            child = tl.load(first_child + i_b * N + leaf)
            leaf = tl.where(child < N, tl.maximum(leaf, child), leaf)
    else:
        seed = tl.load(seeds + i_b)
        position = tl.load(positions + i_b).to(tl.int32)
        sequence = tl.load(sequences + i_b).to(tl.int32)
        o_c = o_n // 4
        b_0, b_1, b_2, b_3 = tl.philox(seed, o_c, o_c * 0 + position, o_c * 0 + sequence, o_c * 0)
        b_low = tl.where(o_n % 2 == 0, b_0, b_1)
        b_bits = tl.where(o_n % 4 < 2, b_low, tl.where(o_n % 2 == 0, b_2, b_3))
        # of equal words the first node's
        b_key = (b_bits.to(tl.int64) & 0xFFFFFFFF) * BN + o_n
        b_key = tl.where(m_leaf, b_key, 0x7FFFFFFFFFFFFFFF)
        leaf = tl.min(b_key, 0)
        leaf = tl.where(tl.max(m_leaf.to(tl.int32), 0) > 0, leaf % BN, 0).to(tl.int32)
    b_leaf = m_leaf.to(tl.int32)
    mean = tl.sum(b_leaf * (b_depth + 1), 0) // tl.maximum(tl.sum(b_leaf, 0), 1)
    far = tl.sum(tl.where(o_n == leaf, b_depth, 0), 0)
    kept = tl.minimum(tl.maximum(tl.minimum(far, mean - 1), 0), P)
    is_wanted = (tl.load(wanted + i_b).to(tl.int32) != 0) & (kept > 0)
    tl.store(counts + i_b, tl.where(is_wanted, kept + 1, 0))
    b_word = tl.load(mask + (i_b * N + leaf) * NW + o_n // 32, mask=m_n, other=0)
    m_on = ((b_word >> (o_n % 32)) & 1) != 0
    m_on = m_on & (b_depth >= 1) & (b_depth <= P)
    tl.store(path + i_b * P + b_depth - 1, o_n, mask=m_on)
    # [BP]: behind the leaf
    o_p = tl.arange(0, BP)
    b_none = tl.full([BP], -1, tl.int32)
    tl.store(path + i_b * P + o_p, b_none, mask=(o_p < P) & (o_p >= far))


@triton.jit(do_not_specialize=("N", "NW", "V", "stride"))
def similarity_kernel(
    tokens,
    depths,
    first_child,
    mask,
    codebook,
    out,
    N,
    NW,
    V,
    E,
    decay,
    stride,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    """Write the similarity of sequence `program_id(0)`."""
    i_b = tl.program_id(0).to(tl.int64)
    # [BN]
    o_n = tl.arange(0, BN)
    m_n = o_n < N
    b_depth = tl.load(depths + i_b * N + o_n, mask=m_n, other=-1)
    # how many of the paths that are compared a node is on
    b_count = tl.zeros([BN], tl.int32)
    rank = tl.full([], 0, tl.int32)
    number = tl.full([], 0, tl.int32)
    for i_m in range(0, N, 16):
        # [16]
        o_m = i_m + tl.arange(0, 16)
        m_m = o_m < N
        b_d = tl.load(depths + i_b * N + o_m, mask=m_m, other=-1)
        b_c = tl.load(first_child + i_b * N + o_m, mask=m_m, other=0)
        b_leaf = ((b_d >= 0) & (b_c < 0)).to(tl.int32)
        b_rank = rank + tl.cumsum(b_leaf, 0) - 1
        b_used = tl.where((b_leaf > 0) & (b_rank % stride == 0), 1, 0)
        rank += tl.sum(b_leaf, 0)
        number += tl.sum(b_used, 0)
        # [16, BN]
        p_m = mask + (i_b * N + o_m)[:, None] * NW + (o_n // 32)[None, :]
        b_word = tl.load(p_m, mask=m_m[:, None] & m_n[None, :], other=0)
        b_count += tl.sum(((b_word >> (o_n % 32)[None, :]) & 1) * b_used[:, None], 0)
    m_on = (b_count > 0) & (b_depth >= 1)
    b_share = tl.where(m_on, b_count, 0).to(tl.float32)
    b_token = tl.load(tokens + i_b * N + o_n, mask=m_n, other=0)
    b_token = tl.minimum(tl.maximum(b_token, 0), V - 1)
    deepest = tl.max(tl.where(m_on, b_depth, 0), 0)
    total = tl.full([], 0.0, tl.float32)
    weights = tl.full([], 0.0, tl.float32)
    weight = tl.full([], 1.0, tl.float32)
    for i_l in range(1, deepest + 1):
        b_at = tl.where(b_depth == i_l, b_share, 0.0)
        pairs = tl.full([], 0.0, tl.float32)
        for i_e in range(0, E, BE):
            # [BN, BE]
            o_e = i_e + tl.arange(0, BE)
            p_v = codebook + b_token[:, None] * E + o_e[None, :]
            m_v = (b_at > 0)[:, None] & (o_e < E)[None, :]
            b_v = tl.load(p_v, mask=m_v, other=0.0)
            b_sum = tl.sum(b_at[:, None] * b_v, 0)
            b_own = tl.sum(b_at[:, None] * b_v * b_v, 0)
            pairs += tl.sum(b_sum * b_sum - b_own, 0)
        total += weight * pairs / 2
        # the paths' levels have no gap
        weights += weight
        weight *= decay
    count = number.to(tl.float32)
    couples = tl.maximum(count * (count - 1) / 2, 1.0)
    found = total / tl.maximum(weights, 1e-9) / couples
    tl.store(out + i_b, tl.where(number > 1, found, 0.0))
