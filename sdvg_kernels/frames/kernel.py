"""`preprocess_frames` in Triton: one kernel, both passes of the resize as exact products.

A program owns BY x BX output pixels of one channel of one frame. It walks the input rows that they
see, BR at a time: turns a window of BK columns into grey levels, resizes them along the row, rounds
to whole grey levels as Pillow does between its passes, and adds them to its columns' sums:

    middle[r, x] = grey[r, :] @ weights_x[:, x]          sum[y, x] += weights_y[y, r] @ middle[r, x]

Weights have 23 bits, so each is two digits, weight = 4096 high + low with |low| <= 2048: half
precision holds both and every grey level exactly, and float32 sums of their products stay below
2^24 (`reach` in the tables' builder), so they are exact in any order.

Layout: video [B, 3, F, H, W]; out [B, F, 3, size, size]; weights [tiles, 2, outputs, window].
"""

# a Triton kernel's arguments have no Python types, and its tuples no unpacking
# ruff: noqa: ANN001, ANN201, ANN202, RUF005

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sdvg_kernels._budget import Compilation
from sdvg_kernels._check import message
from sdvg_kernels._device import on
from sdvg_kernels.frames import config, reference

_DIGIT = tl.constexpr(4096)
_HALF = tl.constexpr(1 << (reference.PRECISION - 1))
_PRECISION = tl.constexpr(reference.PRECISION)
# a float32 this large has no digits behind the point: adding it rounds, halves to even
_ROUND = tl.constexpr(1.5 * 2**23)
# Triton's interpreter cuts digits off where a GPU rounds to bf16, and takes NaN for a maximum
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _interpreted(b_v):
    """Return b_v + 1 rounded to its dtype, float32; NaN gives -1: its maximum would stay NaN."""
    b_u = b_v.to(tl.float32) + 1.0
    b_u = tl.where(b_u == b_u, b_u, -1.0)
    if b_v.dtype == tl.bfloat16:
        b_i = b_u.to(tl.uint32, bitcast=True)
        b_u = (b_i + 0x7FFF + (b_i >> 16 & 1) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return b_u.to(b_v.dtype).to(tl.float32)


@triton.jit
def _to_grey(b_v):
    """Return the grey levels of values in [-1, 1] as float16; NaN is black."""
    # twice video * 0.5 + 0.5, with the same digits in the video's dtype
    if _INTERPRETED:
        b_u = _interpreted(b_v)
    else:
        b_u = (b_v + 1.0).to(tl.float32)
    # the maximum of NaN and 0 is 0
    b_u = tl.minimum(tl.maximum(b_u, 0.0), 2.0)
    return ((b_u * 127.5 + _ROUND) - _ROUND).to(tl.float16)


@triton.jit
def _to_level(b_high, b_low):
    """Return the sums of products with the two digits as grey levels, int32."""
    b_s = b_high.to(tl.int32) * _DIGIT + b_low.to(tl.int32) + _HALF
    return tl.minimum(tl.maximum(b_s >> _PRECISION, 0), 255)


@triton.jit
def frames_kernel(
    video,
    levels,
    span_x,
    weights_x,
    span_y,
    weights_y,
    out,
    stride_vb,
    stride_vc,
    stride_vf,
    stride_vh,
    stride_vw,
    F,
    H,
    W,
    size,
    tiles_x,
    tiles_y,
    window_y,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write out [B, F, 3, size, size]."""
    i_p = tl.program_id(0)
    i_x = i_p % tiles_x
    i_y = i_p // tiles_x % tiles_y
    i_p = i_p // tiles_x // tiles_y
    i_c = i_p % 3
    i_f = (i_p // 3 % F).to(tl.int64)
    i_b = (i_p // 3 // F).to(tl.int64)
    o_x = tl.arange(0, BX)
    o_y = tl.arange(0, BY)
    o_r = tl.arange(0, BR)
    o_k = tl.arange(0, BK)

    # high and low digits of each part of the window, [BK, BX] each
    p_w = weights_x + (i_x * 2 * BX + o_x)[None, :] * BW + o_k[:, None]
    b_ws = ()
    for i_k in tl.static_range(0, BW, BK):
        b_ws = b_ws + (tl.load(p_w + i_k), tl.load(p_w + i_k + BX * BW))
    # [BK]
    o_w = tl.multiple_of(tl.load(span_x + 2 * i_x), ALIGN) + o_k
    p_v = video + i_b * stride_vb + i_c.to(tl.int64) * stride_vc + i_f * stride_vf
    row = tl.load(span_y + 2 * i_y)
    rows = tl.load(span_y + 2 * i_y + 1)
    # [BY, BR]
    p_y = weights_y + (i_y * 2 * BY + o_y)[:, None] * window_y + o_r[None, :]

    # [BY, BX]
    b_high = tl.zeros([BY, BX], tl.float32)
    b_low = tl.zeros([BY, BX], tl.float32)
    for i_r in tl.range(0, rows, BR, num_stages=STAGES):
        o_h = (row + i_r + o_r)[:, None]
        # [BR, BX]
        b_xh = tl.zeros([BR, BX], tl.float32)
        b_xl = tl.zeros([BR, BX], tl.float32)
        for i_k in tl.static_range(0, BW // BK):
            # [BR, BK]
            o_v = (i_k * BK + o_w)[None, :]
            p_r = p_v + o_h.to(tl.int64) * stride_vh + o_v.to(tl.int64) * stride_vw
            b_g = _to_grey(tl.load(p_r, mask=(o_h < H) & (o_v < W), other=0.0))
            b_xh = tl.dot(b_g, b_ws[2 * i_k], b_xh)
            b_xl = tl.dot(b_g, b_ws[2 * i_k + 1], b_xl)
        b_m = _to_level(b_xh, b_xl).to(tl.float16)
        b_high = tl.dot(tl.load(p_y + i_r), b_m, b_high)
        b_low = tl.dot(tl.load(p_y + i_r + BY * window_y), b_m, b_low)

    b_o = tl.load(levels + i_c * 256 + _to_level(b_high, b_low))
    o_x = i_x * BX + o_x
    o_y = i_y * BY + o_y
    p_o = out + (i_p.to(tl.int64) * size + o_y[:, None]) * size + o_x[None, :]
    tl.store(p_o, b_o, mask=(o_y < size)[:, None] & (o_x < size)[None, :])


class _Tiles(NamedTuple):
    """One axis cut into tiles of outputs."""

    # [tiles, 2] int32: the first input of each tile, and how many it sees
    span: torch.Tensor
    # [tiles, 2, outputs, window] float16: the two digits of each weight, 0 where there is none
    weights: torch.Tensor


def _cut(axis: reference.Axis, outputs: int, align: int, part: int) -> _Tiles:
    """Return the axis in tiles of `outputs`, on the CPU.

    A tile begins at a multiple of `align`; the window, the widest tile's, is a multiple of `part`.
    """
    first, weights = reference.taps(axis)
    tile = torch.arange(axis.count) // outputs
    # the first input grows with the output
    start = first[::outputs] // align * align
    tiles, most = len(start), weights.shape[1]
    place = (first - start[tile])[:, None] + torch.arange(most)
    window = triton.cdiv(int(place.max()) + 1, part) * part
    dense = torch.zeros(tiles * outputs, window, dtype=torch.int32)
    dense[: axis.count].scatter_(1, place, weights)
    digit = _DIGIT.value
    high = (dense + digit // 2).div(digit, rounding_mode="floor")
    digits = torch.stack([high, dense - high * digit])
    if int(digits.abs().sum(-1).max()) * 255 >= 2**24:
        rule = "reduce the video less for Triton, whose sums would be inexact"
        got = f"{axis.size_in} pixels to {axis.size_out}"
        raise NotImplementedError(message("preprocess_frames", "size", rule, got))
    digits = digits.view(2, tiles, outputs, window).transpose(0, 1)
    seen = (digits != 0).any(2).any(1) * torch.arange(1, window + 1)
    return _Tiles(torch.stack([start, seen.amax(1)], 1).int(), digits.half().contiguous())


@functools.lru_cache(64)
def _tables(
    axis: reference.Axis, outputs: int, align: int, part: int, device: torch.device
) -> _Tiles:
    """Return the tiles on `device`.

    Raises: RuntimeError inside a graph's capture, into which nothing may be copied from the host.
    """
    _refuse_capture(device)
    return _Tiles(*(table.to(device) for table in _cut(axis, outputs, align, part)))


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        rule = "have run once at this size before a graph captures it"
        raise RuntimeError(message("preprocess_frames", "video", rule, "a first call"))


def preprocess_frames(
    video: torch.Tensor,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return [B, F, 3, size, size] in `dtype` from a video [B, 3, F, H, W] in [-1, 1]."""
    batch, _, frames, height, width = video.shape
    device = video.device
    out = torch.empty((batch, frames, 3, size, size), dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    vertical, horizontal = reference.axes(height, width, size)
    launch = config.choose(horizontal.stretch)
    x = _tables(horizontal, launch.BX, config.ALIGN, launch.BK, device)
    y = _tables(vertical, launch.BY, 1, launch.BR, device)
    tiles_x, tiles_y, window = len(x.span), len(y.span), x.weights.shape[-1]
    with on(device):
        frames_kernel[(batch * frames * 3 * tiles_y * tiles_x,)](
            video=video,
            levels=reference.levels(mean, std, dtype, device),
            span_x=x.span,
            weights_x=x.weights,
            span_y=y.span,
            weights_y=y.weights,
            out=out,
            stride_vb=video.stride(0),
            stride_vc=video.stride(1),
            stride_vf=video.stride(2),
            stride_vh=video.stride(3),
            stride_vw=video.stride(4),
            F=frames,
            H=height,
            W=width,
            size=size,
            tiles_x=tiles_x,
            tiles_y=tiles_y,
            window_y=y.weights.shape[-1],
            BY=launch.BY,
            BX=launch.BX,
            BR=launch.BR,
            BW=window,
            BK=launch.BK,
            ALIGN=config.ALIGN,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
            # a fused multiply and add would round a half the other way now and then
            enable_fp_fusion=False,
        )
    return out


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield, for `arch`, each dtype of the video at 480 x 832 -> 224, and the widest windows."""
    tensors = ("video", "levels", "span_x", "weights_x", "span_y", "weights_y", "out")
    strides = ("stride_vb", "stride_vc", "stride_vf", "stride_vh")
    sizes = ("F", "H", "W", "size", "tiles_x", "tiles_y", "window_y")
    cases = [(config.choose(480 / 224), 96, dtype) for dtype in ("bf16", "fp16", "fp32")]
    cases += [(launch, widest, "fp32") for _, launch, widest in config.LAUNCHES]
    for launch, window, dtype in cases:
        types = {"video": f"*{dtype}", "levels": f"*{dtype}", "out": f"*{dtype}"}
        types |= {"span_x": "*i32", "span_y": "*i32", "weights_x": "*fp16", "weights_y": "*fp16"}
        yield Compilation(
            kernel=frames_kernel,
            arch=arch,
            config=f"{dtype} BY{launch.BY} BX{launch.BX} BR{launch.BR} window {window}",
            signature=types | dict.fromkeys((*strides, *sizes), "i32"),
            constants={
                "stride_vw": 1,
                "BY": launch.BY,
                "BX": launch.BX,
                "BR": launch.BR,
                "BW": window,
                "BK": launch.BK,
                "ALIGN": config.ALIGN,
                "STAGES": launch.num_stages,
            },
            divisible=(*tensors, *strides, "H", "W", "size", "window_y"),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=False,
            budget=config.BUDGET,
        )
