"""What the walk needs of a row of logits, in Triton: one program a row that has children.

    top, mass, bound     p(x) = exp((x - top) / temperature) / mass where x >= least
    least                as `_warp.order` gives it; where tokens are chosen, the choice
    chances[child] = p(its token), 0 for one that an elder sibling has, or outside the vocabulary

A mass of -1: the row has no distribution. Rows of leaves and padding are not read: the walk reads
the one that it ends at. Layout: logits, uncond [B, N, V]; tokens, parents [B, N]; the
others [B, N]. In a chain, node i has the child i, whose token is tokens[i], and no other.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sdvg_kernels import _warp
from sdvg_kernels._budget import Compilation
from sdvg_kernels.verify import config
from sdvg_kernels.verify.reference import Keys, Warp


@triton.jit
def _entropy(
    least,
    top,
    mass,
    p_c,
    p_u,
    V,
    stride_cv,
    stride_uv,
    guidance,
    inverse_temperature,
    BR: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
):
    """Return the entropy of a row in nats; it is read again, which leaves registers to others."""
    # [BR]
    b_e = tl.zeros([BR], tl.float32)
    for i_v in range(0, V, BR):
        o_v = i_v + tl.arange(0, BR)
        b_t = _warp.guided(p_c, p_u, o_v, o_v < V, stride_cv, stride_uv, guidance, HAS_UNCOND)
        b_w = _warp.weight(b_t, least, top, inverse_temperature)
        b_e += b_w * tl.where(b_w > 0, top - b_t, 0.0) * inverse_temperature
    return tl.log(mass) + tl.sum(b_e, 0) / mass


@triton.jit
def rows_kernel(
    logits,
    uncond,
    tokens,
    parents,
    seeds,
    sequences,
    positions,
    tops,
    masses,
    bounds,
    leasts,
    chances,
    stride_cb,
    stride_cn,
    stride_cv,
    stride_ub,
    stride_un,
    stride_uv,
    N,
    V,
    guidance,
    inverse_temperature,
    top_k,
    top_p,
    epsilon,
    alpha,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    IS_CHAIN: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    IS_COUPLED: tl.constexpr,
    IS_TYPICAL: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Write what the walk needs of the row (sequence, node), and its children's chances."""
    i_b = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1)
    i_r = i_b * N + i_n
    # [BN]
    o_n = tl.arange(0, BN)
    if IS_CHAIN:
        b_child = o_n == i_n
    else:
        b_parent = tl.load(parents + i_b * N + o_n, mask=o_n < N, other=-1)
        b_child = (b_parent == i_n) & (o_n > i_n)
    if tl.max(b_child.to(tl.int32), 0) > 0:
        p_c = logits + i_b * stride_cb + i_n.to(tl.int64) * stride_cn
        p_u = logits
        if HAS_UNCOND:
            p_u = uncond + i_b * stride_ub + i_n.to(tl.int64) * stride_un
        b_x, top, is_bad = _warp.peak(
            p_c, p_u, V, stride_cv, stride_uv, guidance, BV, HAS_UNCOND, IS_WHOLE
        )
        if is_bad:
            tl.store(masses + i_r, -1.0)
            if IS_TYPICAL:
                tl.store(bounds + i_r, float("inf"))
        else:
            least = _warp.threshold(
                b_x, top, p_c, p_u, V, stride_cv, stride_uv, guidance, inverse_temperature, top_k,
                top_p, BV, HAS_UNCOND, HAS_TOP_K, HAS_TOP_P, IS_WHOLE,
            )  # fmt: skip
            if IS_GREEDY or IS_COUPLED:
                seed, sequence, position = 0, 0, 0
                if IS_COUPLED:
                    seed = tl.load(seeds + i_b)
                    sequence = tl.load(sequences + i_b).to(tl.int32)
                    position = tl.load(positions + i_b).to(tl.int32)
                    node = i_n
                    while node > 0:
                        # a parent comes before its children: a cycle ends too
                        above = tl.load(parents + i_b * N + node)
                        node = tl.where(above < node, above, -1)
                        position += 1
                # [BR]
                b_best = tl.full([BR], float("-inf"), tl.float32)
                b_token = tl.full([BR], 0x7FFFFFFF, tl.int32)
                for i_v in range(0, V, BR):
                    b_s = _warp.scores(
                        p_c, p_u, i_v, V, stride_cv, stride_uv, guidance, inverse_temperature,
                        least, seed, sequence, position, BR, HAS_UNCOND, HAS_TOP_K or HAS_TOP_P,
                        IS_GREEDY,
                    )  # fmt: skip
                    b_token = tl.where(b_s > b_best, i_v + tl.arange(0, BR), b_token)
                    b_best = tl.maximum(b_best, b_s)
                tl.store(leasts + i_r, _warp.winner(b_best, b_token))
                tl.store(masses + i_r, 1.0)
            else:
                mass = _warp.at_least(
                    b_x, least, top, p_c, p_u, V, stride_cv, stride_uv, guidance,
                    inverse_temperature, BV, HAS_UNCOND, IS_WHOLE, True,
                )  # fmt: skip
                tl.store(tops + i_r, top)
                tl.store(masses + i_r, mass)
                tl.store(leasts + i_r, least.to(tl.int32))
                if IS_TYPICAL:
                    entropy = _entropy(
                        least, top, mass, p_c, p_u, V, stride_cv, stride_uv, guidance,
                        inverse_temperature, BR, HAS_UNCOND,
                    )  # fmt: skip
                    bound = tl.minimum(epsilon, alpha * tl.exp(-entropy))
                    tl.store(bounds + i_r, bound)
                p_t = tokens + i_b * N
                b_id = tl.load(p_t + o_n, mask=b_child, other=-1).to(tl.int64)
                b_inside = b_child & (b_id >= 0) & (b_id < V)
                b_t = _warp.guided(
                    p_c, p_u, b_id, b_inside, stride_cv, stride_uv, guidance, HAS_UNCOND
                )
                b_p = tl.where(
                    b_inside, _warp.weight(b_t, least, top, inverse_temperature) / mass, 0.0
                )
                if not IS_CHAIN and not IS_TYPICAL:
                    # a token that stands twice among siblings counts once
                    for i_s in range(0, N, BS):
                        # [BS]
                        o_s = i_s + tl.arange(0, BS)
                        m_s = o_s < N
                        b_elder = tl.load(parents + i_b * N + o_s, mask=m_s, other=-1)
                        b_elder = (b_elder == i_n) & (o_s > i_n)
                        b_other = tl.load(p_t + o_s, mask=b_elder, other=-1).to(tl.int64)
                        # [BN, BS]
                        b_same = (b_id[:, None] == b_other[None, :]) & b_elder[None, :]
                        b_same &= o_s[None, :] < o_n[:, None]
                        b_p = tl.where(tl.max(b_same.to(tl.int32), 1) > 0, 0.0, b_p)
                tl.store(chances + i_b * N + o_n, b_p, mask=b_child)


class Rows(NamedTuple):
    """What the walk needs of the rows; only those of rows with children are written."""

    # [B, N] float32
    tops: torch.Tensor
    masses: torch.Tensor
    bounds: torch.Tensor
    # [B, N] int32
    leasts: torch.Tensor
    # [B, N] float32
    chances: torch.Tensor


def new_rows(like: torch.Tensor, nodes: int) -> Rows:
    """Return memory for `nodes` rows of each sequence of `like` [B, ...]."""
    shape = (like.shape[0], nodes)
    tops, masses, bounds, chances = like.new_empty((4, *shape), dtype=torch.float32)
    return Rows(tops, masses, bounds, like.new_empty(shape, dtype=torch.int32), chances)


def launch_rows(
    logits: torch.Tensor,
    uncond: torch.Tensor | None,
    tokens: torch.Tensor,
    parents: torch.Tensor | None,
    keys: Keys,
    warp: Warp,
    count: int,
    *,
    rule: str,
    bounds: tuple[float, float] = (0.0, 0.0),
) -> Rows:
    """Return what is read of the first `count` rows of each sequence; a chain has no `parents`."""
    batch, _, vocabulary = logits.shape
    nodes = tokens.shape[1]
    rows = new_rows(logits, nodes)
    if count == 0:
        return rows
    is_greedy = warp.temperature == 0
    launch = config.row_launch(vocabulary)
    is_typical = rule == "typical" and not is_greedy
    epsilon, alpha = bounds if is_typical else (0.0, 0.0)
    rows_kernel[(batch, count)](
        logits=logits,
        uncond=uncond,
        tokens=tokens,
        parents=parents,
        seeds=keys.seeds,
        sequences=keys.sequences,
        positions=keys.positions,
        **rows._asdict(),
        stride_cb=logits.stride(0),
        stride_cn=logits.stride(1),
        stride_cv=logits.stride(2),
        stride_ub=0 if uncond is None else uncond.stride(0),
        stride_un=0 if uncond is None else uncond.stride(1),
        stride_uv=0 if uncond is None else uncond.stride(2),
        N=nodes,
        V=vocabulary,
        guidance=warp.guidance,
        inverse_temperature=1.0 if is_greedy else 1.0 / warp.temperature,
        top_k=warp.top_k,
        top_p=warp.top_p,
        epsilon=epsilon,
        alpha=alpha,
        BN=triton.next_power_of_2(nodes),
        BS=config.SIBLINGS,
        BV=launch.BV,
        BR=launch.BR,
        HAS_UNCOND=uncond is not None,
        HAS_TOP_K=warp.top_k > 0 and not is_greedy,
        HAS_TOP_P=warp.top_p < 1 and not is_greedy,
        IS_CHAIN=parents is None,
        IS_GREEDY=is_greedy,
        IS_COUPLED=rule == "coupled" and not is_greedy,
        IS_TYPICAL=is_typical,
        IS_WHOLE=launch.IS_WHOLE,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )
    return rows


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the shipped configurations for `arch`: guided with both thresholds, or plain."""
    strides = tuple(f"stride_{of}{axis}" for of in "cu" for axis in "bn")
    pointers = {"logits": "*bf16", "uncond": "*bf16", "tokens": "*i64", "seeds": "*i64"}
    pointers |= dict.fromkeys(("tops", "masses", "bounds", "chances"), "*fp32")
    pointers |= dict.fromkeys(("parents", "leasts", "sequences", "positions"), "*i32")
    cases = [(launch, "exact") for launch in (*config.WHOLE, config.TILED)]
    others = ("coupled", "typical", "chain", "plain", "greedy")
    cases += [(config.WHOLE[-1], rule) for rule in others]
    for launch, rule in cases:
        warps = rule not in ("plain", "greedy")
        yield Compilation(
            kernel=rows_kernel,
            arch=arch,
            config=f"bf16 {rule} BV{launch.BV}" + ("" if launch.IS_WHOLE else " tiled"),
            signature=pointers
            | dict.fromkeys((*strides, "N", "V", "top_k"), "i32")
            | dict.fromkeys(
                ("guidance", "inverse_temperature", "top_p", "epsilon", "alpha"), "fp32"
            ),
            constants={
                "stride_cv": 1,
                "stride_uv": 1,
                "BN": 64,
                "BS": config.SIBLINGS,
                "BV": launch.BV,
                "BR": launch.BR,
                "HAS_UNCOND": warps,
                "HAS_TOP_K": warps,
                "HAS_TOP_P": warps,
                "IS_CHAIN": rule == "chain",
                "IS_GREEDY": rule == "greedy",
                "IS_COUPLED": rule == "coupled",
                "IS_TYPICAL": rule == "typical",
                "IS_WHOLE": launch.IS_WHOLE,
            }
            | ({} if warps else {"uncond": None}),
            divisible=("logits", "uncond", *strides, "V"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.ROW_BUDGET,
            enable_fp_fusion=False,
        )
