"""`quantize_rows` in Triton: a program reads a row once, holds it in registers, and rounds it.

    y = activation(x)        scale = max |y| / 448        value = e4m3(y * (448 / max |y|))

A row that registers do not hold is read a second time instead, and its activation computed again.

Layout: x [N, K] of any stride between rows, values [N, K], scales [N].
"""

# a Triton kernel's arguments have no Python types, and its tuples no unpacking
# ruff: noqa: ANN001, ANN201, ANN202, RUF005

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels.quantize import config

# Triton's interpreter drops the carry into the exponent when it casts to e4m3
_INTERPRETED = triton.knobs.runtime.interpret
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_STEP = tl.constexpr(1 / 448)
_TINY = tl.constexpr(2.0**-100)
# 2 sqrt(2 / pi), and that times 0.044715 over it
_LINEAR = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _part(x, o_c, K: tl.constexpr, IS_GELU: tl.constexpr):
    """Return activation(x) at the elements o_c, [BC] float32; zeros past K."""
    b_x = tl.load(x + o_c, mask=o_c < K, other=0.0).to(tl.float32)
    if IS_GELU:
        # x (1 + tanh(u)) / 2 is x sigmoid(2 u)
        b_u = _LINEAR * (b_x + _CUBIC * b_x * b_x * b_x)
        # beyond 80 the quotient is nothing beside any row's step
        b_x = b_x / (1.0 + tl.exp(tl.minimum(-b_u, 80.0)))
    return b_x


@triton.jit
def _larger(b_m, b_x):
    """Return the larger of b_m and |b_x|, element by element; NaN counts as infinity."""
    b_a = tl.abs(b_x)
    return tl.maximum(b_m, tl.where(b_a == b_a, b_a, float("inf")))


@triton.jit
def _rounded(b_x, b_inverse, PREROUND: tl.constexpr):
    """Return b_x * b_inverse in e4m3, to nearest even."""
    b_y = b_x * b_inverse
    if PREROUND:
        # to nearest even, 3 bits of mantissa, in float32
        b_u = b_y.to(tl.uint32, bitcast=True)
        b_u = (b_u + 0x7FFFF + ((b_u >> 20) & 1)) & 0xFFF00000
        b_n = b_u.to(tl.float32, bitcast=True)
        # below 2^-6 in steps of 2^-9: adding 1.5 x 2^14 leaves no smaller ones
        b_n = tl.where(tl.abs(b_y) < 0.015625, b_y + 24576.0 - 24576.0, b_n)
        # the bits of 480 are e4m3's NaN, which its cast does not know either
        b_y = tl.where(b_y == b_y, b_n, 480.0)
    return b_y.to(tl.float8e4nv)


@triton.jit
def quantize_kernel(
    x,
    values,
    scales,
    stride_xn,
    K: tl.constexpr,
    BC: tl.constexpr,
    IS_GELU: tl.constexpr,
    TWO_PASSES: tl.constexpr,
    PREROUND: tl.constexpr,
):
    """Write values [N, K] e4m3 and scales [N] float32."""
    PARTS: tl.constexpr = (K + BC - 1) // BC
    i_n = tl.program_id(0).to(tl.int64)
    p_x = x + i_n * stride_xn
    p_v = values + i_n * K
    # [BC]
    o_c = tl.arange(0, BC)
    b_m = tl.zeros([BC], tl.float32)
    b_xs = ()
    if TWO_PASSES:
        for i in range(PARTS):
            b_m = _larger(b_m, _part(p_x, i * BC + o_c, K, IS_GELU))
    else:
        # all loads first: nothing that waits stands between them
        for i in tl.static_range(PARTS):
            b_xs = b_xs + (_part(p_x, i * BC + o_c, K, IS_GELU),)
        for i in tl.static_range(PARTS):
            b_m = _larger(b_m, b_xs[i])

    b_largest = tl.max(b_m, 0)
    m_z = b_largest >= _TINY
    b_scale = tl.where(m_z, b_largest * _E4M3_STEP, 1.0)
    b_inverse = tl.where(m_z, tl.div_rn(_E4M3_MAX, tl.where(m_z, b_largest, 1.0)), 1.0)
    # e4m3 has no infinity: the whole row is lost
    m_f = b_largest < float("inf")
    b_inverse = tl.where(m_f, b_inverse, float("nan"))
    tl.store(scales + i_n, tl.where(m_f, b_scale, float("nan")))

    if TWO_PASSES:
        for i in range(PARTS):
            o_p = i * BC + o_c
            b_v = _rounded(_part(p_x, o_p, K, IS_GELU), b_inverse, PREROUND)
            tl.store(p_v + o_p, b_v, mask=o_p < K)
    else:
        for i in tl.static_range(PARTS):
            o_p = i * BC + o_c
            tl.store(p_v + o_p, _rounded(b_xs[i], b_inverse, PREROUND), mask=o_p < K)


def quantize_rows(x: torch.Tensor, activation: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values [N, K] e4m3, scales [N, 1] float32)."""
    rows, width = x.shape
    values = x.new_empty((rows, width), dtype=torch.float8_e4m3fn)
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    if rows == 0:
        return values, scales
    launch = config.choose(width)
    device = x.device
    with on(device):
        quantize_kernel[(rows,)](
            x=x,
            values=values,
            scales=scales,
            stride_xn=x.stride(0),
            K=width,
            BC=launch.BC,
            IS_GELU=activation == "gelu_tanh",
            TWO_PASSES=launch.two_passes,
            PREROUND=_INTERPRETED,
            num_warps=launch.num_warps,
        )
    return values, scales


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield Wan's widths for `arch`: inputs of products plain, the FFN's middle with its GELU."""
    # cvt to e4m3 begins with 8.9
    if arch < 89:
        return
    cases = [(width, "bf16", False) for width in (1536, 3072, 5120)]
    cases += [(width, "bf16", True) for width in (8960, 13824, 14336)]
    cases += [(width, "fp32", True) for width, _ in config.LAUNCHES]
    cases += [(32768, "bf16", gelu) for gelu in (False, True)]
    for width, dtype, gelu in cases:
        launch = config.choose(width)
        # 16-byte accesses a thread and part: of e4m3 one, of x two or four
        wide = 1 + (4 if dtype == "fp32" else 2)
        parts = 1 if launch.two_passes else triton.cdiv(width, launch.BC)
        yield Compilation(
            kernel=quantize_kernel,
            arch=arch,
            config=f"K{width} {dtype} {'gelu ' * gelu}BC{launch.BC}",
            signature={
                "x": f"*{dtype}",
                "values": "*fp8e4nv",
                "scales": "*fp32",
                "stride_xn": "i32",
            },
            constants={
                "K": width,
                "BC": launch.BC,
                "IS_GELU": gelu,
                "TWO_PASSES": launch.two_passes,
                "PREROUND": False,
            },
            divisible=("x", "values", "scales", "stride_xn"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.budget(wide * parts),
        )
