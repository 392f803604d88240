"""The parts of a split become one: in the last program of each tile, or in a launch of its own.

What the attention kernels share. How parts are combined is chosen here, and was not measured.

    m = max_n lse[n]    out = sum_n 2^(lse[n] - m) part[n] / sum_n 2^(lse[n] - m)

Layout: part [NS, B, T, H, D] float32, part_lse [NS, B, H, T] float32 in base 2, out [B, T, H, DO],
D the power of two that DO is padded to.
The order of the sum is that of the parts, whoever adds them up: runs repeat bit for bit.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sdvg_kernels._budget import Budget, Compilation

_LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Combine:
    """BN parts of BR rows a step; in the last program of each tile, or in a launch of its own."""

    BR: int
    BN: int
    num_warps: int
    last_program: bool
    reason: str


COMBINE = Combine(
    4, 16, 4, False, "32 KB of parts on their way; few rows a program, so that all processors read"
)
# a dependent launch costs 1.5 to 2 us in a graph before its first load is back. One program takes
# 32 KB a step (64 registers a thread), and a step as long as L2 answers, 0.6 us: two are less. More
# rows are more bytes, and registers that a tile of 64 rows does not have
_LAST_PROGRAM_BYTES, _LAST_PROGRAM_ROWS = 64 << 10, 16


def choose(rows: int, dim: int, num_splits: int) -> Combine:
    """Return how `num_splits` parts of a tile of `rows` rows are combined. Not measured."""
    if rows > _LAST_PROGRAM_ROWS or num_splits * rows * dim * 4 > _LAST_PROGRAM_BYTES:
        return COMBINE
    few = 1 << (rows - 1).bit_length()
    return Combine(few, 8192 // dim // few, 4, True, "32 KB of parts on their way in one program")


@triton.jit
def combine_rows(
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
    o_i,
    o_h,
    m_i,
    D: tl.constexpr,
    DO: tl.constexpr,
    BN: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Write the rows (i_b, o_i, o_h) of out and lse from their parts, BN of them at a time.

    Offsets of parts are as wide as `B` and `i_b`.
    """
    o_d = tl.arange(0, D)
    stride_n = B * T * H
    # [BR]
    o_x = (i_b * H + o_h) * T + o_i
    o_p = (i_b * T + o_i) * H + o_h
    # other programs wrote the parts: .cg reads past this multiprocessor's own cache
    b_m = tl.full(o_i.shape, float("-inf"), tl.float32)
    for i_n in range(0, num_splits, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = (o_n < num_splits)[:, None] & m_i[None, :]
        p_x = part_lse + (o_n[:, None] * stride_n + o_x[None, :])
        b_x = tl.load(p_x, mask=m_n, other=float("-inf"), cache_modifier=".cg")
        b_m = tl.maximum(b_m, tl.max(b_x, 0))
    b_z = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_l = tl.zeros_like(b_m)
    # [BR, D]
    b_o = tl.zeros([o_i.shape[0], D], tl.float32)
    for i_n in range(0, num_splits, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = (o_n < num_splits)[:, None] & m_i[None, :]
        o_nx = o_n[:, None] * stride_n
        p_x = part_lse + (o_nx + o_x[None, :])
        b_x = tl.load(p_x, mask=m_n, other=float("-inf"), cache_modifier=".cg")
        # [BN, BR, D]: one load, so that all of it is on its way at once
        p_p = part + ((o_nx + o_p[None, :])[:, :, None] * D + o_d[None, None, :])
        b_p = tl.load(p_p, mask=m_n[:, :, None], other=0.0, cache_modifier=".cg")
        b_w = tl.exp2(b_x - b_z[None, :])
        b_l += tl.sum(b_w, 0)
        b_o += tl.sum(b_p * b_w[:, :, None], 0)

    m_seen = b_l != 0.0
    b_l = tl.where(m_seen, b_l, 1.0)
    p_o = out + tl.cast(i_b, tl.int64) * stride_ob + o_h.to(tl.int64)[:, None] * stride_oh
    p_o += o_i.to(tl.int64)[:, None] * stride_ot + o_d[None, :]
    m_o = m_i[:, None]
    if DO < D:
        m_o = m_o & (o_d < DO)[None, :]
    tl.store(p_o, (b_o / b_l[:, None]).to(out.dtype.element_ty), mask=m_o)
    if HAS_LSE:
        b_lse = tl.where(m_seen, (b_m + tl.log2(b_l)) * _LN2, float("-inf"))
        tl.store(lse + o_x, b_lse, mask=m_i)


@triton.jit(do_not_specialize=("B", "T", "H", "num_splits"))
def combine_kernel(
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
    D: tl.constexpr,
    DO: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Combine the parts into out and lse: BR rows, each of a token and a head, a program."""
    i_b = tl.program_id(0) // tl.cdiv(T * H, BR)
    # [BR]
    o_r = tl.program_id(0) % tl.cdiv(T * H, BR) * BR + tl.arange(0, BR)
    combine_rows(
        part,
        part_lse,
        out,
        lse,
        stride_ob,
        stride_ot,
        stride_oh,
        tl.cast(B, tl.int64),
        T,
        H,
        num_splits,
        tl.cast(i_b, tl.int64),
        o_r // H,
        o_r % H,
        o_r < T * H,
        D,
        DO,
        BN,
        HAS_LSE,
    )


def combine_parts(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    return_lse: bool,
) -> None:
    """Launch the kernel: write out, and lse [B, H, T] with `return_lse`."""
    num_splits, batch, rows, heads, dim = part.shape
    launch = COMBINE
    combine_kernel[(batch * triton.cdiv(rows * heads, launch.BR),)](
        part=part,
        part_lse=part_lse,
        out=out,
        lse=lse,
        stride_ob=out.stride(0),
        stride_ot=out.stride(1),
        stride_oh=out.stride(2),
        B=batch,
        T=rows,
        H=heads,
        num_splits=num_splits,
        D=dim,
        DO=out.shape[3],
        BR=launch.BR,
        BN=launch.BN,
        HAS_LSE=return_lse,
        num_warps=launch.num_warps,
    )


def combine_compilations(arch: int) -> Iterator[Compilation]:
    """Yield the second launch for `arch`."""
    for dim, padded in ((64, 64), (100, 128), (128, 128)):
        yield Compilation(
            kernel=combine_kernel,
            arch=arch,
            config=f"D{dim} bf16 BR{COMBINE.BR} BN{COMBINE.BN} lse",
            signature={"part": "*fp32", "part_lse": "*fp32", "out": "*bf16", "lse": "*fp32"}
            | dict.fromkeys(("stride_ob", "stride_ot", "stride_oh"), "i32")
            | dict.fromkeys(("B", "T", "H", "num_splits"), "i32"),
            constants={"D": padded, "DO": dim, "BR": COMBINE.BR, "BN": COMBINE.BN, "HAS_LSE": True},
            divisible=("part", "part_lse", "out", "lse", "stride_ob", "stride_ot", "stride_oh"),
            num_warps=COMBINE.num_warps,
            num_stages=3,
            budget=Budget(registers=128),
        )
