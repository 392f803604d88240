"""The modulation ops in Triton: one kernel, whose parts the three ops turn on.

    residual = x + y * (gate + gate_table)                                        (with y)
    normed   = (LayerNorm(residual) * weight + bias) * (1 + scale) + shift        (with normed)

A program owns BT tokens of one frame and holds their rows in registers, in parts of BC channels:
it reads x and y once, takes mean and variance in two steps (no cancellation), and reads the
frame's modulation once for all its tokens.

Layout: x, y, residual, normed [B, T, C]; gate, shift, scale [B, F, C]; tables, weight, bias [C].
"""

# a Triton kernel's arguments have no Python types, and its tuples no unpacking
# ruff: noqa: ANN001, ANN201, ANN202, RUF005

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels import _tuned
from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels.modulation import config


@triton.jit
def _vector(row, table, o_c, m_c):
    """Return row + table at the channels o_c, [1, BC] float32; `table` may be None."""
    b_v = tl.load(row + o_c, mask=m_c, other=0.0).to(tl.float32)
    if table is not None:
        b_v += tl.load(table + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_v[None, :]


@triton.jit
def modulation_kernel(
    x,
    y,
    gate,
    gate_table,
    shift,
    shift_table,
    scale,
    scale_table,
    weight,
    bias,
    residual,
    normed,
    stride_xb,
    stride_xt,
    stride_yb,
    stride_yt,
    stride_gb,
    stride_gf,
    stride_hb,
    stride_hf,
    stride_cb,
    stride_cf,
    T,
    F,
    tiles,
    eps,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Write residual [B, T, C] where there is y, and normed [B, T, C] where it is not None."""
    PARTS: tl.constexpr = (C + BC - 1) // BC
    i_p = tl.program_id(0)
    i_f = i_p // tiles % F
    i_b = (i_p // tiles // F).to(tl.int64)
    # [BT]: within the frame, then within the sequence
    o_t = i_p % tiles * BT + tl.arange(0, BT)
    m_t = (o_t < T // F)[:, None]
    o_t = (i_f * (T // F) + o_t).to(tl.int64)[:, None]
    # [BC]
    o_c = tl.arange(0, BC)
    p_o = (i_b * T + o_t) * C

    # all loads first: nothing that waits stands between them; [BT, BC] each
    b_xs = ()
    b_ys = ()
    for i in tl.static_range(PARTS):
        m_x = m_t & (i * BC + o_c < C)[None, :]
        o_x = (i * BC + o_c)[None, :]
        p_x = x + i_b * stride_xb + o_t * stride_xt + o_x
        b_xs = b_xs + (tl.load(p_x, mask=m_x, other=0.0).to(tl.float32),)
        if y is not None:
            p_y = y + i_b * stride_yb + o_t * stride_yt + o_x
            b_ys = b_ys + (tl.load(p_y, mask=m_x, other=0.0).to(tl.float32),)

    if y is not None:
        b_rs = ()
        for i in tl.static_range(PARTS):
            m_c = i * BC + o_c < C
            b_y = b_ys[i]
            if gate is not None:
                p_g = gate + i_b * stride_gb + i_f.to(tl.int64) * stride_gf
                b_y = b_y * _vector(p_g, gate_table, i * BC + o_c, m_c)
            # the norm sees what is stored
            b_r = (b_xs[i] + b_y).to(residual.dtype.element_ty)
            tl.store(residual + p_o + (i * BC + o_c)[None, :], b_r, mask=m_t & m_c[None, :])
            b_rs = b_rs + (b_r.to(tl.float32),)
    else:
        b_rs = b_xs

    if normed is not None:
        # [BT, BC], and [BT, 1] once summed; channels past C hold zeros
        b_s = b_rs[0]
        for i in tl.static_range(1, PARTS):
            b_s += b_rs[i]
        # rounded alike everywhere: `/` is within 2 ulp on a GPU, a constant row might miss its mean
        b_mean = tl.sum(b_s, 1)[:, None] * (1.0 / C)
        b_s = tl.zeros([BT, BC], tl.float32)
        for i in tl.static_range(PARTS):
            b_d = tl.where((i * BC + o_c < C)[None, :], b_rs[i] - b_mean, 0.0)
            b_s += b_d * b_d
        b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_s, 1)[:, None] / C + eps)
        for i in tl.static_range(PARTS):
            m_c = i * BC + o_c < C
            b_n = (b_rs[i] - b_mean) * b_rstd
            if weight is not None:
                b_n *= _vector(weight, None, i * BC + o_c, m_c)
                b_n += _vector(bias, None, i * BC + o_c, m_c)
            if scale is not None:
                p_c = scale + i_b * stride_cb + i_f.to(tl.int64) * stride_cf
                p_h = shift + i_b * stride_hb + i_f.to(tl.int64) * stride_hf
                b_n *= 1.0 + _vector(p_c, scale_table, i * BC + o_c, m_c)
                b_n += _vector(p_h, shift_table, i * BC + o_c, m_c)
            b_n = b_n.to(normed.dtype.element_ty)
            tl.store(normed + p_o + (i * BC + o_c)[None, :], b_n, mask=m_t & m_c[None, :])


_Vector = torch.Tensor | None


def modulated_layer_norm(
    x: torch.Tensor,
    shift: _Vector,
    shift_table: _Vector,
    scale: _Vector,
    scale_table: _Vector,
    weight: _Vector,
    bias: _Vector,
    *,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the modulated norm of x, [B, T, C] in `dtype`."""
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    vectors = (None, None, shift, shift_table, scale, scale_table, weight, bias)
    _launch(x, None, vectors, None, normed, eps)
    return normed


def gated_residual(
    x: torch.Tensor, y: torch.Tensor, gate: _Vector, gate_table: _Vector
) -> torch.Tensor:
    """Return x + y * gate, [B, T, C] in x's dtype."""
    residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, y, (gate, gate_table, *[None] * 6), residual, None, 0.0)
    return residual


def gated_residual_layer_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: _Vector,
    gate_table: _Vector,
    *vectors: _Vector,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x + y * gate in x's dtype, its modulated norm in `dtype`), [B, T, C] each."""
    residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, y, (gate, gate_table, *vectors), residual, normed, eps)
    return residual, normed


def _launch(
    x: torch.Tensor,
    y: _Vector,
    vectors: tuple[_Vector, ...],
    residual: _Vector,
    normed: _Vector,
    eps: float,
) -> None:
    """Write residual and normed where they are not None."""
    batch, tokens, width = x.shape
    if x.numel() == 0:
        return
    gate, gate_table, shift, shift_table, scale, scale_table, weight, bias = vectors
    rows = gate if gate is not None else shift
    frames = 1 if rows is None else rows.shape[1]
    launch = config.choose(width, tokens // frames, _tuned.gpu_name(x.device))
    tiles = triton.cdiv(tokens // frames, launch.BT)
    stride_y, stride_g, stride_h, stride_c = (
        (0, 0) if tensor is None else tensor.stride()[:2] for tensor in (y, gate, shift, scale)
    )
    device = x.device
    with on(device):
        modulation_kernel[(batch * frames * tiles,)](
            x=x,
            y=y,
            gate=gate,
            gate_table=gate_table,
            shift=shift,
            shift_table=shift_table,
            scale=scale,
            scale_table=scale_table,
            weight=weight,
            bias=bias,
            residual=residual,
            normed=normed,
            stride_xb=x.stride(0),
            stride_xt=x.stride(1),
            stride_yb=stride_y[0],
            stride_yt=stride_y[1],
            stride_gb=stride_g[0],
            stride_gf=stride_g[1],
            stride_hb=stride_h[0],
            stride_hf=stride_h[1],
            stride_cb=stride_c[0],
            stride_cf=stride_c[1],
            T=tokens,
            F=frames,
            tiles=tiles,
            eps=eps,
            C=width,
            BT=launch.BT,
            BC=launch.BC,
            num_warps=launch.num_warps,
        )


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the ops for `arch`: Wan's widths, and the widest of each launch with all turned on."""
    strides = ("stride_xb", "stride_xt", "stride_yb", "stride_yt", "stride_gb", "stride_gf")
    strides += ("stride_hb", "stride_hf", "stride_cb", "stride_cf")
    gate, affine = ("gate", "gate_table"), ("weight", "bias")
    modulation = ("shift", "shift_table", "scale", "scale_table")
    ops = {
        "norm": (*modulation, "normed"),
        "affine norm": (*affine, "normed"),
        "residual": ("y", *gate, "residual"),
        "residual, norm": ("y", *gate, *modulation, "residual", "normed"),
        "residual, affine norm": ("y", *gate, *affine, "residual", "normed"),
        "all": ("y", *gate, *modulation, *affine, "residual", "normed"),
    }
    cases = [(width, "bf16", op) for width in (1536, 3072, 5120) for op in ops if op != "all"]
    # the stream in float32, the branch in bf16
    cases += [(width, "fp32", "all") for width, _ in config.LAUNCHES]
    for width, dtype, op in cases:
        launch = config.choose(width, 1560)
        types = dict.fromkeys((*gate, *modulation, *affine), "*fp32")
        types |= {"x": f"*{dtype}", "residual": f"*{dtype}", "y": "*bf16", "normed": "*bf16"}
        types |= dict.fromkeys((*strides, "T", "F", "tiles"), "i32") | {"eps": "fp32"}
        # a thread has 8 channels of a part: 16 bytes of bf16, twice 16 of float32
        rows = [types[name] for name in ("x", "y", "residual", "normed") if name in ("x", *ops[op])]
        vectors = [name for name in ops[op] if name in (*gate, *modulation, *affine)]
        wide = sum(2 if kind == "*fp32" else 1 for kind in rows) * launch.BT + 2 * len(vectors)
        unused = dict.fromkeys(name for name in ops["all"] if name not in ops[op])
        yield Compilation(
            kernel=modulation_kernel,
            arch=arch,
            config=f"C{width} {dtype} {op} BT{launch.BT} BC{launch.BC}",
            signature=types,
            constants={"C": width, "BT": launch.BT, "BC": launch.BC} | unused,
            divisible=("x", *ops[op], *strides),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.budget(width // launch.BC * wide),
        )
