"""`sample_tokens` in Triton: one program guides, warps and samples one row.

    x = u + guidance (c - u)
    kept = x at least the k-th largest, and at least the largest t of mass(x >= t) >= p mass(kept)
    token = argmax over kept of x / temperature - log E,   E = -log(1 - uniform)

Thresholds are found without a sort, by bisection over the ordered bits of float32, and so are
exact. Guidance is computed without fused products: its bits are those of the reference.
Layout: logits, uncond [N, V]; seeds, sequences, positions, index [N]; out flat.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels._budget import Compilation
from sdvg_kernels.sampling import config

# -inf as _order gives it
_LOWEST = tl.constexpr(-2139095041)


@triton.jit
def _order(b_x):
    """Return int32 that are ordered as the float32 `b_x` are."""
    b_i = b_x.to(tl.int32, bitcast=True)
    return b_i ^ ((b_i >> 31) & 0x7FFFFFFF)


@triton.jit
def _guided(p_c, p_u, o_v, V, stride_cv, stride_uv, guidance, HAS_UNCOND: tl.constexpr):
    """Return guided logits of the tokens `o_v`; -inf past the last."""
    m_v = o_v < V
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
def _weight(b_x, least, top, inverse_temperature, IS_MASS: tl.constexpr):
    """Return each token's share in `_at_least`."""
    b_in = _order(b_x) >= least
    if IS_MASS:
        b_w = tl.where(b_in, tl.exp((b_x - top) * inverse_temperature), 0.0)
    else:
        b_w = b_in.to(tl.int32)
    return b_w


@triton.jit
def _at_least(
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
    """Return how many tokens are `least` or more, or their mass relative to `top`."""
    if IS_WHOLE:
        b_w = _weight(b_x, least, top, inverse_temperature, IS_MASS)
    else:
        b_w = tl.zeros([BV], tl.float32 if IS_MASS else tl.int32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_t = _guided(p_c, p_u, o_v, V, stride_cv, stride_uv, guidance, HAS_UNCOND)
            b_w += _weight(b_t, least, top, inverse_temperature, IS_MASS)
    return tl.sum(b_w, 0)


@triton.jit
def _log_exponential(seed, sequence, position, i_v, BR: tl.constexpr):
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
def sample_kernel(
    logits,
    uncond,
    seeds,
    sequences,
    positions,
    index,
    out,
    stride_cn,
    stride_cv,
    stride_un,
    stride_uv,
    stride_sn,
    stride_qn,
    stride_pn,
    stride_in,
    V,
    OUT,
    guidance,
    inverse_temperature,
    top_k,
    top_p,
    BV: tl.constexpr,
    BR: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Write the token of row `program_id(0)`, or -1 for a row that has no distribution."""
    i_n = tl.program_id(0).to(tl.int64)
    i_out = i_n
    if HAS_INDEX:
        i_out = tl.load(index + i_n * stride_in).to(tl.int64)
    if (i_out >= 0) & (i_out < OUT):
        p_c = logits + i_n * stride_cn
        p_u = logits
        if HAS_UNCOND:
            p_u = uncond + i_n * stride_un
        # [BV]
        b_x = tl.full([BV], float("-inf"), tl.float32)
        b_nan = tl.zeros([BV], tl.int32)
        if IS_WHOLE:
            o_v = tl.arange(0, BV)
            b_x = _guided(p_c, p_u, o_v, V, stride_cv, stride_uv, guidance, HAS_UNCOND)
            b_nan = (b_x != b_x).to(tl.int32)
            top = tl.max(b_x, 0)
        else:
            for i_v in range(0, V, BV):
                o_v = i_v + tl.arange(0, BV)
                b_t = _guided(p_c, p_u, o_v, V, stride_cv, stride_uv, guidance, HAS_UNCOND)
                b_nan |= (b_t != b_t).to(tl.int32)
                b_x = tl.maximum(b_x, b_t)
            top = tl.max(b_x, 0)
        token = tl.full([], -1, tl.int32)
        is_bad = (tl.max(b_nan, 0) > 0) | (top == float("inf")) | (top == float("-inf"))
        if is_bad == 0:
            lo = tl.full([], _LOWEST, tl.int64)
            above = _order(top).to(tl.int64) + 1
            if HAS_TOP_K:
                # at least top_k tokens are lo or more, fewer are hi or more
                hi = above
                while hi - lo > 1:
                    middle = (lo + hi) >> 1
                    count = _at_least(
                        b_x, middle, top, p_c, p_u, V, stride_cv, stride_uv, guidance,
                        inverse_temperature, BV, HAS_UNCOND, IS_WHOLE, False,
                    )  # fmt: skip
                    hi = tl.where(count == top_k, middle + 1, tl.where(count > top_k, hi, middle))
                    lo = tl.where(count >= top_k, middle, lo)
            if HAS_TOP_P:
                mass = _at_least(
                    b_x, lo, top, p_c, p_u, V, stride_cv, stride_uv, guidance,
                    inverse_temperature, BV, HAS_UNCOND, IS_WHOLE, True,
                )  # fmt: skip
                wanted = top_p * mass
                hi = above
                while hi - lo > 1:
                    middle = (lo + hi) >> 1
                    mass = _at_least(
                        b_x, middle, top, p_c, p_u, V, stride_cv, stride_uv, guidance,
                        inverse_temperature, BV, HAS_UNCOND, IS_WHOLE, True,
                    )  # fmt: skip
                    hi = tl.where(mass >= wanted, hi, middle)
                    lo = tl.where(mass >= wanted, middle, lo)
            if not IS_GREEDY:
                seed = tl.load(seeds + i_n * stride_sn)
                sequence = tl.load(sequences + i_n * stride_qn).to(tl.int32)
                position = tl.load(positions + i_n * stride_pn).to(tl.int32)
            # [BR]
            b_best = tl.full([BR], float("-inf"), tl.float32)
            b_token = tl.full([BR], 0x7FFFFFFF, tl.int32)
            for i_v in range(0, V, BR):
                o_r = i_v + tl.arange(0, BR)
                b_r = _guided(p_c, p_u, o_r, V, stride_cv, stride_uv, guidance, HAS_UNCOND)
                b_s = b_r
                if not IS_GREEDY:
                    b_s = b_r * inverse_temperature
                    b_s -= _log_exponential(seed, sequence, position, i_v, BR)
                if HAS_TOP_K or HAS_TOP_P:
                    b_s = tl.where(_order(b_r) >= lo, b_s, float("-inf"))
                b_token = tl.where(b_s > b_best, o_r, b_token)
                b_best = tl.maximum(b_best, b_s)
            best = tl.max(b_best, 0)
            # of equal scores the first token
            token = tl.min(tl.where(b_best == best, b_token, 0x7FFFFFFF), 0)
        tl.store(out + i_out, token.to(out.dtype.element_ty))


def sample_tokens(
    logits: torch.Tensor,
    uncond: torch.Tensor | None,
    seeds: torch.Tensor | None,
    sequences: torch.Tensor | None,
    positions: torch.Tensor | None,
    *,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    index: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the chosen ids into `out`."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    launch = config.launch(vocabulary)
    device = logits.device
    is_greedy = temperature == 0
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        sample_kernel[(rows,)](
            logits=logits,
            uncond=uncond,
            seeds=seeds,
            sequences=sequences,
            positions=positions,
            index=index,
            out=out,
            stride_cn=logits.stride(0),
            stride_cv=logits.stride(1),
            stride_un=0 if uncond is None else uncond.stride(0),
            stride_uv=0 if uncond is None else uncond.stride(1),
            stride_sn=0 if seeds is None else seeds.stride(0),
            stride_qn=0 if sequences is None else sequences.stride(0),
            stride_pn=0 if positions is None else positions.stride(0),
            stride_in=0 if index is None else index.stride(0),
            V=vocabulary,
            OUT=out.numel(),
            guidance=guidance,
            inverse_temperature=1.0 if is_greedy else 1.0 / temperature,
            top_k=top_k,
            top_p=top_p,
            BV=launch.BV,
            BR=launch.BR,
            HAS_UNCOND=uncond is not None,
            HAS_INDEX=index is not None,
            HAS_TOP_K=top_k > 0 and not is_greedy,
            HAS_TOP_P=top_p < 1 and not is_greedy,
            IS_GREEDY=is_greedy,
            IS_WHOLE=launch.IS_WHOLE,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the shipped configurations for `arch`, with guidance and both thresholds."""
    strides = ("stride_cn", "stride_un", "stride_sn", "stride_qn", "stride_pn", "stride_in")
    for launch in (*config.WHOLE, config.TILED):
        yield Compilation(
            kernel=sample_kernel,
            arch=arch,
            config=f"bf16 BV{launch.BV} BR{launch.BR}",
            signature={"logits": "*bf16", "uncond": "*bf16", "seeds": "*i64", "out": "*i64"}
            | dict.fromkeys(("sequences", "positions", "index"), "*i32")
            | dict.fromkeys((*strides, "V", "OUT", "top_k"), "i32")
            | dict.fromkeys(("guidance", "inverse_temperature", "top_p"), "fp32"),
            constants={
                "stride_cv": 1,
                "stride_uv": 1,
                "BV": launch.BV,
                "BR": launch.BR,
                "HAS_UNCOND": True,
                "HAS_INDEX": True,
                "HAS_TOP_K": True,
                "HAS_TOP_P": True,
                "IS_GREEDY": False,
                "IS_WHOLE": launch.IS_WHOLE,
            },
            divisible=("logits", "uncond", "stride_cn", "stride_un", "V"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.BUDGET,
            enable_fp_fusion=False,
        )
