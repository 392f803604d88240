"""What kernels that sample share: rows of logits guided, warped and raced, in registers.

A row is `u + guidance (c - u)` in float32; what is kept of it is at least the k-th largest, and at
least the largest t of mass(x >= t) >= p mass(kept). Thresholds are found without a sort, by
bisection over the ordered bits of float32, and so are exact. Launch without fused products: the
bits are those of PyTorch. Noise is Philox 4x32-10 with counter (block, position, sequence, use).
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

import triton
import triton.language as tl

# -inf as `order` gives it
LOWEST = tl.constexpr(-2139095041)


@triton.jit
def order(b_x):
    """Return int32 that are ordered as the float32 `b_x` are."""
    b_i = b_x.to(tl.int32, bitcast=True)
    return b_i ^ ((b_i >> 31) & 0x7FFFFFFF)


@triton.jit
def guided(p_c, p_u, o_v, m_v, stride_cv, stride_uv, guidance, HAS_UNCOND: tl.constexpr):
    """Return guided logits of the tokens `o_v`; -inf outside `m_v`."""
    b_x = tl.load(p_c + o_v.to(tl.int64) * stride_cv, mask=m_v, other=float("-inf")).to(tl.float32)
    if HAS_UNCOND:
        b_u = tl.load(p_u + o_v.to(tl.int64) * stride_uv, mask=m_v, other=0.0).to(tl.float32)
        # a token that cannot come takes no part: -inf less -inf would be NaN
        b_banned = b_x == float("-inf")
        b_u = tl.where(b_banned, 0.0, b_u)
        b_guided = b_u + guidance * (tl.where(b_banned, 0.0, b_x) - b_u)
        b_x = tl.where(b_banned, float("-inf"), b_guided)
    # the two zeros are one value
    return tl.where(b_x == 0, 0.0, b_x)


@triton.jit
def weight(b_x, least, top, inverse_temperature):
    """Return each token's mass relative to that of `top`; 0 below `least`."""
    return tl.where(order(b_x) >= least, tl.exp((b_x - top) * inverse_temperature), 0.0)


@triton.jit
def peak(
    p_c,
    p_u,
    V,
    stride_cv,
    stride_uv,
    guidance,
    BV: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Return (the row if it is one tile, its largest value, whether it has no distribution)."""
    # [BV]
    b_x = tl.full([BV], float("-inf"), tl.float32)
    b_nan = tl.zeros([BV], tl.int32)
    if IS_WHOLE:
        o_v = tl.arange(0, BV)
        b_x = guided(p_c, p_u, o_v, o_v < V, stride_cv, stride_uv, guidance, HAS_UNCOND)
        b_nan = (b_x != b_x).to(tl.int32)
        top = tl.max(b_x, 0)
    else:
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_t = guided(p_c, p_u, o_v, o_v < V, stride_cv, stride_uv, guidance, HAS_UNCOND)
            b_nan |= (b_t != b_t).to(tl.int32)
            b_x = tl.maximum(b_x, b_t)
        top = tl.max(b_x, 0)
    is_bad = (tl.max(b_nan, 0) > 0) | (top == float("inf")) | (top == float("-inf"))
    return b_x, top, is_bad


@triton.jit
def at_least(
    b_x,
    least,
    top,
    p_c,
    p_u,
    V,
    stride_cv,
    stride_uv,
    guidance,
    inverse_temperature,
    BV: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_MASS: tl.constexpr,
):
    """Return how many tokens are `least` or more, or their mass relative to that of `top`."""
    if IS_WHOLE:
        if IS_MASS:
            b_w = weight(b_x, least, top, inverse_temperature)
        else:
            b_w = (order(b_x) >= least).to(tl.int32)
    else:
        b_w = tl.zeros([BV], tl.float32 if IS_MASS else tl.int32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_t = guided(p_c, p_u, o_v, o_v < V, stride_cv, stride_uv, guidance, HAS_UNCOND)
            if IS_MASS:
                b_w += weight(b_t, least, top, inverse_temperature)
            else:
                b_w += (order(b_t) >= least).to(tl.int32)
    return tl.sum(b_w, 0)


@triton.jit
def threshold(
    b_x,
    top,
    p_c,
    p_u,
    V,
    stride_cv,
    stride_uv,
    guidance,
    inverse_temperature,
    top_k,
    top_p,
    BV: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Return the least value that is kept, as `order` gives it."""
    lo = tl.full([], LOWEST, tl.int64)
    above = order(top).to(tl.int64) + 1
    if HAS_TOP_K:
        # at least top_k tokens are lo or more, fewer are hi or more
        hi = above
        while hi - lo > 1:
            middle = (lo + hi) >> 1
            count = at_least(
                b_x, middle, top, p_c, p_u, V, stride_cv, stride_uv, guidance,
                inverse_temperature, BV, HAS_UNCOND, IS_WHOLE, False,
            )  # fmt: skip
            hi = tl.where(count == top_k, middle + 1, tl.where(count > top_k, hi, middle))
            lo = tl.where(count >= top_k, middle, lo)
    if HAS_TOP_P:
        mass = at_least(
            b_x, lo, top, p_c, p_u, V, stride_cv, stride_uv, guidance,
            inverse_temperature, BV, HAS_UNCOND, IS_WHOLE, True,
        )  # fmt: skip
        wanted = top_p * mass
        hi = above
        while hi - lo > 1:
            middle = (lo + hi) >> 1
            mass = at_least(
                b_x, middle, top, p_c, p_u, V, stride_cv, stride_uv, guidance,
                inverse_temperature, BV, HAS_UNCOND, IS_WHOLE, True,
            )  # fmt: skip
            hi = tl.where(mass >= wanted, hi, middle)
            lo = tl.where(mass >= wanted, middle, lo)
    return lo


@triton.jit
def log_exponential(seed, sequence, position, i_v, BR: tl.constexpr):
    """Return log E for the tokens from `i_v`, a multiple of 4: word `v % 4` of counter `v // 4`."""
    # [BR / 4]
    o_c = i_v // 4 + tl.arange(0, BR // 4)
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_c, o_c * 0 + position, o_c * 0 + sequence, o_c * 0)
    # [BR]
    b_b = tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))
    b_u = (b_b.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    b_rest = ((b_b ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # the logarithm near 1 has few digits on a GPU, and small E decide the race
    b_small = b_u * (1 + b_u * (1 / 2 + b_u * (1 / 3 + b_u * (1 / 4 + b_u * (1 / 5)))))
    return tl.log(tl.where(b_u < 0.03125, b_small, -tl.log(b_rest)))


@triton.jit
def scores(
    p_c,
    p_u,
    i_v,
    V,
    stride_cv,
    stride_uv,
    guidance,
    inverse_temperature,
    least,
    seed,
    sequence,
    position,
    BR: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    IS_WARPED: tl.constexpr,
    IS_GREEDY: tl.constexpr,
):
    """Return what the tokens from `i_v` have in the race; -inf: left out."""
    # [BR]
    o_r = i_v + tl.arange(0, BR)
    b_r = guided(p_c, p_u, o_r, o_r < V, stride_cv, stride_uv, guidance, HAS_UNCOND)
    b_s = b_r
    if not IS_GREEDY:
        b_s = b_r * inverse_temperature
        b_s -= log_exponential(seed, sequence, position, i_v, BR)
    if IS_WARPED:
        b_s = tl.where(order(b_r) >= least, b_s, float("-inf"))
    return b_s


@triton.jit
def winner(b_best, b_token):
    """Return the token of the best score: of equal scores the lowest."""
    best = tl.max(b_best, 0)
    return tl.min(tl.where(b_best == best, b_token, 0x7FFFFFFF), 0)


@triton.jit
def coin(seed, sequence, position):
    """Return a uniform in (0, 1], the coin of `position`: word 0 of counter (0, ., ., 1)."""
    # [1]
    o_c = tl.zeros([1], tl.int32)
    b_0, _, _, _ = tl.philox(seed, o_c, o_c + position, o_c + sequence, o_c + 1)
    return tl.sum((b_0.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0)
