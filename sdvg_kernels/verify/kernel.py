"""`route_blocks` in Triton: one program reduces the frame rewards of BB sequences and decides.

    score[b] = min_f reward[b, f]  or  mean_f reward[b, f]
    accept[b] = score[b] >= tau and not first[b]

Layout: frame_rewards [B, F], first, accept and score [B].
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels.verify import chain, config, rows, walk


@triton.jit
def route_kernel(
    frame_rewards,
    first,
    accept,
    score,
    stride_rb,
    stride_rf,
    stride_fb,
    B,
    F,
    tau,
    BB: tl.constexpr,
    BF: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    ALL_FIRST: tl.constexpr,
    IS_MEAN: tl.constexpr,
):
    """Write accept [B] bool and score [B] float32."""
    # [BB]
    o_b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    m_b = o_b < B
    # [BB, BF]
    b_x = tl.zeros([BB, BF], tl.float64) if IS_MEAN else tl.full([BB, BF], float("inf"), tl.float32)
    b_nan = tl.zeros([BB, BF], tl.int32)
    for i_f in range(0, F, BF):
        o_f = i_f + tl.arange(0, BF)
        m_f = m_b[:, None] & (o_f < F)[None, :]
        p_r = frame_rewards + o_b[:, None] * stride_rb + o_f.to(tl.int64)[None, :] * stride_rf
        b_r = tl.load(p_r, mask=m_f, other=0.0).to(tl.float32)
        if IS_MEAN:
            b_x += b_r.to(tl.float64)
        else:
            b_x = tl.minimum(b_x, tl.where(m_f, b_r, float("inf")))
            # the minimum of NaN and a number is the number
            b_nan |= (b_r != b_r).to(tl.int32)
    if IS_MEAN:
        b_s = (tl.sum(b_x, 1) / F).to(tl.float32)
    else:
        b_s = tl.where(tl.max(b_nan, 1) > 0, float("nan"), tl.min(b_x, 1))
    b_a = b_s >= tau
    if ALL_FIRST:
        b_a = b_a & False
    if HAS_FIRST:
        b_a = b_a & (tl.load(first + o_b * stride_fb, mask=m_b, other=1) == 0)
    tl.store(accept + o_b, b_a, mask=m_b)
    tl.store(score + o_b, b_s, mask=m_b)


def route_blocks(
    frame_rewards: torch.Tensor,
    first: torch.Tensor | None,
    *,
    tau: float,
    all_first: bool,
    aggregate: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (accept [B] bool, score [B] float32)."""
    batch, frames = frame_rewards.shape
    accept = frame_rewards.new_empty(batch, dtype=torch.bool)
    score = frame_rewards.new_empty(batch, dtype=torch.float32)
    if batch == 0:
        return accept, score
    launch = config.ROUTE
    device = frame_rewards.device
    with on(device):
        route_kernel[(triton.cdiv(batch, launch.BB),)](
            frame_rewards=frame_rewards,
            first=first,
            accept=accept,
            score=score,
            stride_rb=frame_rewards.stride(0),
            stride_rf=frame_rewards.stride(1),
            stride_fb=0 if first is None else first.stride(0),
            B=batch,
            F=frames,
            tau=tau,
            BB=launch.BB,
            BF=launch.BF,
            HAS_FIRST=first is not None,
            ALL_FIRST=all_first,
            IS_MEAN=aggregate == "mean",
            num_warps=launch.num_warps,
        )
    return accept, score


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the shipped configurations of the room for `arch`; of routing by aggregate."""
    for room in (rows, walk, chain):
        yield from room.compilations(arch)
    launch = config.ROUTE
    for aggregate in ("min", "mean"):
        yield Compilation(
            kernel=route_kernel,
            arch=arch,
            config=f"fp32 {aggregate} BB{launch.BB} BF{launch.BF}",
            signature={"frame_rewards": "*fp32", "first": "*i1", "accept": "*i1", "score": "*fp32"}
            | dict.fromkeys(("stride_rb", "stride_rf", "stride_fb", "B", "F"), "i32")
            | {"tau": "fp32"},
            constants={
                "BB": launch.BB,
                "BF": launch.BF,
                "HAS_FIRST": True,
                "ALL_FIRST": False,
                "IS_MEAN": aggregate == "mean",
            },
            divisible=("frame_rewards", "first", "accept", "score"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.BUDGET,
        )
