"""`rms_norm_silu` in Triton: what is added, the norm and SiLU in one pass over the rows.

    total = x + bias + residual                                            (rounded to x's dtype)
    out   = SiLU(total / max(||total||, 1e-12) * sqrt(C) * weight)

A program owns BT rows and holds them in registers, in parts of BC channels: it reads x and the
residual once and writes each output once.

Layout: x, residual, total, out [B, N, C]; weight, bias [C].
"""

# a Triton kernel's arguments have no Python types, and its tuples no unpacking
# ruff: noqa: ANN001, ANN201, RUF005

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels.norm_silu import config, reference

_EPS = tl.constexpr(reference.EPS)


@triton.jit
def norm_silu_kernel(
    x,
    weight,
    bias,
    residual,
    total,
    out,
    stride_xb,
    stride_xn,
    stride_rb,
    stride_rn,
    stride_tb,
    stride_tn,
    stride_ob,
    stride_on,
    N,
    tiles,
    root,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    IS_SILU: tl.constexpr,
):
    """Write total [B, N, C] where it is not None, and out [B, N, C]."""
    PARTS: tl.constexpr = (C + BC - 1) // BC
    i_p = tl.program_id(0)
    i_b = (i_p // tiles).to(tl.int64)
    # [BT, 1]
    o_n = (i_p % tiles * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    m_n = o_n < N
    # [BC]
    o_c = tl.arange(0, BC)

    # all loads first: nothing that waits stands between them; [BT, BC] each
    b_xs = ()
    b_rs = ()
    for i in tl.static_range(PARTS):
        m_x = m_n & (i * BC + o_c < C)[None, :]
        o_x = (i * BC + o_c)[None, :]
        p_x = x + i_b * stride_xb + o_n * stride_xn + o_x
        b_xs = b_xs + (tl.load(p_x, mask=m_x, other=0.0),)
        if residual is not None:
            p_r = residual + i_b * stride_rb + o_n * stride_rn + o_x
            b_rs = b_rs + (tl.load(p_r, mask=m_x, other=0.0),)

    b_ts = ()
    b_s = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(PARTS):
        m_c = i * BC + o_c < C
        b_t = b_xs[i].to(tl.float32)
        if bias is not None:
            b_t += tl.load(bias + i * BC + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            b_t += b_rs[i].to(tl.float32)
        # the norm sees what is stored; channels past C hold zeros
        b_t = b_t.to(x.dtype.element_ty)
        if total is not None:
            p_t = total + i_b * stride_tb + o_n * stride_tn + (i * BC + o_c)[None, :]
            tl.store(p_t, b_t, mask=m_n & m_c[None, :])
        b_ts = b_ts + (b_t,)
        b_t = b_t.to(tl.float32)
        b_s += b_t * b_t

    # [BT, 1]; a maximum would lose NaN
    b_l = tl.sqrt_rn(tl.sum(b_s, 1))[:, None]
    b_f = root / tl.where(b_l < _EPS, _EPS, b_l)
    for i in tl.static_range(PARTS):
        m_c = i * BC + o_c < C
        b_w = tl.load(weight + i * BC + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_y = b_ts[i].to(tl.float32) * b_f * b_w
        if IS_SILU:
            b_y = b_y / (1.0 + tl.exp(-b_y))
        p_o = out + i_b * stride_ob + o_n * stride_on + (i * BC + o_c)[None, :]
        tl.store(p_o, b_y.to(out.dtype.element_ty), mask=m_n & m_c[None, :])


def rms_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    silu: bool,
    total: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write total where it is not None, and out, [B, N, C] each."""
    if x.numel() == 0:
        return
    batch, rows, width = x.shape
    launch = config.choose(width)
    tiles = triton.cdiv(rows, launch.BT)
    stride_r, stride_t = (
        (0, 0) if tensor is None else tensor.stride()[:2] for tensor in (residual, total)
    )
    device = x.device
    with on(device):
        norm_silu_kernel[(batch * tiles,)](
            x=x,
            weight=weight,
            bias=bias,
            residual=residual,
            total=total,
            out=out,
            stride_xb=x.stride(0),
            stride_xn=x.stride(1),
            stride_rb=stride_r[0],
            stride_rn=stride_r[1],
            stride_tb=stride_t[0],
            stride_tn=stride_t[1],
            stride_ob=out.stride(0),
            stride_on=out.stride(1),
            N=rows,
            tiles=tiles,
            root=width**0.5,
            C=width,
            BT=launch.BT,
            BC=launch.BC,
            IS_SILU=silu,
            num_warps=launch.num_warps,
        )


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the op for `arch`: what Wan's decoders ask for at their widths, and the widest rows."""
    strides = tuple(f"stride_{tensor}{dim}" for tensor in "xrto" for dim in "bn")
    optional = ("bias", "residual", "total")
    ops = {
        "norm, SiLU": (),
        "bias, norm, SiLU": ("bias",),
        "sum, norm, SiLU": optional,
    }
    # Wan 2.1's widths, 2.2's, and the attention's norm
    cases = [(width, "bf16", op, True) for width in (96, 192, 384) for op in ops]
    cases += [(width, "bf16", "sum, norm, SiLU", True) for width in (256, 512, 1024)]
    cases += [(384, "bf16", "sum, norm, SiLU", False)]
    cases += [(width, "fp32", "sum, norm, SiLU", True) for width in (96, config.MAX_WIDTH)]
    for width, dtype, op, silu in cases:
        launch = config.choose(width)
        used = ops[op]
        types = {"x": f"*{dtype}", "weight": "*bf16", "bias": "*bf16", "residual": f"*{dtype}"}
        types |= {"total": f"*{dtype}", "out": f"*{dtype}", "root": "fp32"}
        types |= dict.fromkeys((*strides, "N", "tiles"), "i32")
        # a thread has 8 channels of a part: 16 bytes of bf16, twice 16 of float32
        rows = 2 + sum(name in used for name in ("residual", "total"))
        wide = width // launch.BC * rows * (2 if dtype == "fp32" else 1)
        yield Compilation(
            kernel=norm_silu_kernel,
            arch=arch,
            config=f"C{width} {dtype} {op if silu else 'sum, norm'} BT{launch.BT} BC{launch.BC}",
            signature=types,
            constants={"C": width, "BT": launch.BT, "BC": launch.BC, "IS_SILU": silu}
            | dict.fromkeys(name for name in optional if name not in used),
            divisible=("x", "weight", "out", *used, *strides),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.budget(width, wide),
        )
