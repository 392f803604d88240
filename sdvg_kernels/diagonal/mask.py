"""`diagonal_mask` in Triton: a program writes a tile of BT entries and BS slots.

Layout: slots, steps [B, T]; mask [B, T, S], or [B, T, S / 8] bytes with the first slot lowest.
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
from sdvg_kernels.diagonal import config
from sdvg_kernels.diagonal.rule import GRID, decoded_in


@triton.jit(do_not_specialize=("T", "S", "R", "stride_mr", *GRID))
def mask_kernel(
    slots,
    steps,
    cache_leftpad,
    mask,
    stride_sb,
    stride_st,
    stride_pb,
    stride_pt,
    stride_mr,
    R,
    T,
    S,
    lowest,
    prefix,
    height,
    width,
    row_stride,
    frame_stride,
    k,
    lead,
    frame_passes,
    BT: tl.constexpr,
    BS: tl.constexpr,
    HAS_PAD: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_ADDED: tl.constexpr,
):
    """Write a tile of the mask [R = B T, S]: bool, 0 and `lowest`, or a byte for 8 slots."""
    grid = (prefix, height, width, row_stride, frame_stride, k, lead, frame_passes)
    n_s = tl.cdiv(S, BS)
    # [BT]
    o_r = tl.program_id(0) // n_s * BT + tl.arange(0, BT)
    m_r = o_r < R
    o_b = (o_r // T).to(tl.int64)
    o_t = (o_r % T).to(tl.int64)
    o_slot = tl.load(slots + o_b * stride_sb + o_t * stride_st, mask=m_r, other=-1)
    o_step = tl.load(steps + o_b * stride_pb + o_t * stride_pt, mask=m_r, other=0)
    # [BS]
    s0 = tl.program_id(0) % n_s * BS
    o_s = s0 + tl.arange(0, BS)
    o_at = decoded_in(o_s, grid)
    m_x = (o_at[None, :] < o_step[:, None]) & (o_s[None, :] < o_slot[:, None])
    m_x |= o_s[None, :] == o_slot[:, None]
    if HAS_PAD:
        o_first = tl.load(cache_leftpad + o_b, mask=m_r, other=0)
        m_x &= o_s[None, :] >= o_first[:, None]
    p_r = mask + o_r.to(tl.int64)[:, None] * stride_mr
    if IS_PACKED:
        # [BT, BS / 8]
        o_8 = s0 // 8 + tl.arange(0, BS // 8)
        b_x = tl.reshape(m_x.to(tl.int32), [BT, BS // 8, 8])
        b_x = tl.sum(b_x << tl.arange(0, 8)[None, None, :], 2)
        m_8 = m_r[:, None] & (o_8 < tl.cdiv(S, 8))[None, :]
        tl.store(p_r + o_8[None, :], b_x.to(tl.uint8), mask=m_8)
    else:
        m_s = m_r[:, None] & (o_s < S)[None, :]
        b_x = tl.where(m_x, 0.0, lowest).to(mask.dtype.element_ty) if IS_ADDED else m_x
        tl.store(p_r + o_s[None, :], b_x, mask=m_s)


def diagonal_mask(
    slots: torch.Tensor,
    steps: torch.Tensor,
    *,
    size: int,
    grid: list[int],
    cache_leftpad: torch.Tensor | None,
    dtype: torch.dtype,
    packed: bool,
) -> torch.Tensor:
    """Return [B, T, S]: bool; or 0 and the lowest number of `dtype`; or [B, T, S / 8] uint8."""
    batch, rows = slots.shape
    last = -(-size // 8) if packed else size
    mask = slots.new_empty((batch, rows, last), dtype=torch.uint8 if packed else dtype)
    if batch * rows == 0:
        return mask
    launch = config.MASK
    added = dtype.is_floating_point
    tiles = triton.cdiv(batch * rows, launch.BT) * triton.cdiv(size, launch.BS)
    device = slots.device
    with on(device):
        mask_kernel[(tiles,)](
            slots=slots,
            steps=steps,
            cache_leftpad=cache_leftpad,
            mask=mask,
            stride_sb=slots.stride(0),
            stride_st=slots.stride(1),
            stride_pb=steps.stride(0),
            stride_pt=steps.stride(1),
            stride_mr=last,
            R=batch * rows,
            T=rows,
            S=size,
            lowest=torch.finfo(dtype).min if added else 0.0,
            **dict(zip(GRID, grid, strict=True)),
            BT=launch.BT,
            BS=launch.BS,
            HAS_PAD=cache_leftpad is not None,
            IS_PACKED=packed,
            IS_ADDED=added,
            num_warps=launch.num_warps,
        )
    return mask


def mask_compilations(arch: int) -> Iterator[Compilation]:
    """Yield the forms of the mask for `arch`."""
    launch = config.MASK
    strides = ("stride_sb", "stride_st", "stride_pb", "stride_pt")
    for form, kind in (("bool", "*i1"), ("bf16", "*bf16"), ("packed", "*u8")):
        yield Compilation(
            kernel=mask_kernel,
            arch=arch,
            config=f"{form} BT{launch.BT} BS{launch.BS} pad",
            signature={"slots": "*i32", "steps": "*i32", "cache_leftpad": "*i32", "mask": kind}
            | dict.fromkeys((*strides, "stride_mr", "R", "T", "S", *GRID), "i32")
            | {"lowest": "fp32"},
            constants={
                "BT": launch.BT,
                "BS": launch.BS,
                "HAS_PAD": True,
                "IS_PACKED": form == "packed",
                "IS_ADDED": form == "bf16",
            },
            divisible=("slots", "steps", "cache_leftpad", "mask"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.MASK_BUDGET,
        )
