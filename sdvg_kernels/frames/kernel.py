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

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sdvg_kernels._budget import Compilation
from sdvg_kernels._check import message
from sdvg_kernels.frames import config, reference

_DIGIT = tl.constexpr(4096)
_HALF = tl.constexpr(1 << (reference.PRECISION - 1))
_PRECISION = tl.constexpr(reference.PRECISION)
# a float32 this large has no digits behind the point: adding it rounds, halves to even
_ROUND = tl.constexpr(1.5 * 2**23)
# Triton's interpreter cuts the digits off where a GPU rounds to bf16
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _to_grey(b_v):
    """Return the grey levels of values in [-1, 1] as float16; NaN is black."""
    b_u = b_v.to(tl.float32) * 0.5 + 0.5
    if _INTERPRETED and b_v.dtype == tl.bfloat16:
        b_i = b_u.to(tl.uint32, bitcast=True)
        b_u = (b_i + 0x7FFF + (b_i >> 16 & 1) & 0xFFFF0000).to(tl.float32, bitcast=True)
    b_u = b_u.to(b_v.dtype).to(tl.float32)
    b_u = tl.where(b_u > 0, tl.minimum(b_u, 1.0), 0.0)
    return ((b_u * 255.0 + _ROUND) - _ROUND).to(tl.float16)


@triton.jit
def _to_level(b_high, b_low):
    """Return the sums of products with the two digits as grey levels, int32."""
    b_s = b_high.to(tl.int32) * _DIGIT + b_low.to(tl.int32) + _HALF
    return tl.minimum(tl.maximum(b_s >> _PRECISION, 0), 255)


@triton.jit
def frames_kernel(
    video,
    levels,
    first_x,
    weights_x,
    first_y,
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

    # [BK, BX]
    p_w = weights_x + (i_x * 2 * BX + o_x)[None, :] * BK + o_k[:, None]
    b_wh = tl.load(p_w)
    b_wl = tl.load(p_w + BX * BK)
    # [BK]
    o_w = tl.multiple_of(tl.load(first_x + i_x), ALIGN) + o_k
    p_v = video + i_b * stride_vb + i_c.to(tl.int64) * stride_vc + i_f * stride_vf
    p_v += o_w.to(tl.int64)[None, :] * stride_vw
    row = tl.load(first_y + i_y)
    # [BY, BR]
    p_y = weights_y + (i_y * 2 * BY + o_y)[:, None] * window_y + o_r[None, :]

    # [BY, BX]
    b_high = tl.zeros([BY, BX], tl.float32)
    b_low = tl.zeros([BY, BX], tl.float32)
    for i_r in tl.range(0, window_y, BR, num_stages=STAGES):
        # [BR, BK]
        o_h = row + i_r + o_r
        m_v = (o_h < H)[:, None] & (o_w < W)[None, :]
        b_v = tl.load(p_v + o_h.to(tl.int64)[:, None] * stride_vh, mask=m_v, other=0.0)
        b_yh = tl.load(p_y + i_r)
        b_yl = tl.load(p_y + i_r + BY * window_y)
        b_g = _to_grey(b_v)
        # [BR, BX]
        b_m = _to_level(tl.dot(b_g, b_wh), tl.dot(b_g, b_wl)).to(tl.float16)
        b_high = tl.dot(b_yh, b_m, b_high)
        b_low = tl.dot(b_yl, b_m, b_low)

    b_o = tl.load(levels + i_c * 256 + _to_level(b_high, b_low))
    o_x = i_x * BX + o_x
    o_y = i_y * BY + o_y
    p_o = out + (i_p.to(tl.int64) * size + o_y[:, None]) * size + o_x[None, :]
    tl.store(p_o, b_o, mask=(o_y < size)[:, None] & (o_x < size)[None, :])


class _Tiles(NamedTuple):
    """One axis cut into tiles of outputs."""

    # [tiles] int32: the first input of each tile
    first: torch.Tensor
    # [tiles, 2, outputs, window] float16: the two digits of each weight, 0 where there is none
    weights: torch.Tensor


def _cut(axis: reference.Axis, outputs: int, align: int) -> _Tiles:
    """Return the axis in tiles of `outputs`, each beginning at a multiple of `align`; on the CPU.

    The window is the widest tile's.
    """
    first, weights = reference.taps(axis)
    tile = torch.arange(axis.count) // outputs
    # the first input grows with the output
    start = first[::outputs] // align * align
    tiles, most = len(start), weights.shape[1]
    place = (first - start[tile])[:, None] + torch.arange(most)
    window = int(place.max()) + 1
    dense = torch.zeros(tiles * outputs, window, dtype=torch.int32)
    dense[: axis.count].scatter_(1, place, weights)
    high = (dense + _DIGIT.value // 2).div(_DIGIT.value, rounding_mode="floor")
    digits = torch.stack([high, dense - high * _DIGIT.value])
    reach = int(digits.abs().sum(-1).max()) * 255
    if reach >= 2**24:
        rule = "reduce the video less for Triton: its sums would be inexact"
        got = f"{axis.size_in} pixels to {axis.size_out}"
        raise NotImplementedError(message("preprocess_frames", "size", rule, got))
    digits = digits.view(2, tiles, outputs, window).transpose(0, 1)
    return _Tiles(start.int(), digits.half())


@functools.lru_cache(64)
def _tables(
    axis: reference.Axis, outputs: int, align: int, multiple: int, device: torch.device
) -> _Tiles:
    """Return the tiles on `device`, their window a multiple of `multiple` (0: a power of two).

    Raises: RuntimeError inside a graph's capture, into which nothing may be copied from the host.
    """
    _refuse_capture(device)
    tiles = _cut(axis, outputs, align)
    window = tiles.weights.shape[-1]
    padded = (
        triton.cdiv(window, multiple) * multiple if multiple else triton.next_power_of_2(window)
    )
    weights = torch.nn.functional.pad(tiles.weights, (0, max(padded, 16) - window))
    return _Tiles(tiles.first.to(device), weights.contiguous().to(device))


@functools.lru_cache(64)
def _levels(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return what each grey level becomes, [3, 256] in `dtype` on `device`."""
    _refuse_capture(device)
    return reference.levels(mean, std, dtype).to(device)


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
    launch = config.FRAMES
    vertical, horizontal = reference.axes(height, width, size)
    x = _tables(horizontal, launch.BX, config.ALIGN, 0, device)
    y = _tables(vertical, launch.BY, 1, launch.BR, device)
    tiles_x, tiles_y = len(x.first), len(y.first)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        frames_kernel[(batch * frames * 3 * tiles_y * tiles_x,)](
            video=video,
            levels=_levels(mean, std, dtype, device),
            first_x=x.first,
            weights_x=x.weights,
            first_y=y.first,
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
            BK=x.weights.shape[-1],
            ALIGN=config.ALIGN,
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
            # a fused multiply and add would round a half the other way now and then
            enable_fp_fusion=False,
        )
    return out


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield, for `arch`, each dtype of the video at 480 x 832 -> 224, and the widest window."""
    launch = config.FRAMES
    tensors = ("video", "levels", "first_x", "weights_x", "first_y", "weights_y", "out")
    strides = ("stride_vb", "stride_vc", "stride_vf", "stride_vh")
    sizes = ("F", "H", "W", "size", "tiles_x", "tiles_y", "window_y")
    for dtype, window in (("bf16", 64), ("fp16", 64), ("fp32", 64), ("bf16", 256)):
        types = {"video": f"*{dtype}", "levels": f"*{dtype}", "out": f"*{dtype}"}
        types |= {"first_x": "*i32", "first_y": "*i32", "weights_x": "*fp16", "weights_y": "*fp16"}
        yield Compilation(
            kernel=frames_kernel,
            arch=arch,
            config=f"{dtype} BY{launch.BY} BX{launch.BX} BR{launch.BR} BK{window}",
            signature=types | dict.fromkeys((*strides, *sizes), "i32"),
            constants={
                "stride_vw": 1,
                "BY": launch.BY,
                "BX": launch.BX,
                "BR": launch.BR,
                "BK": window,
                "ALIGN": config.ALIGN,
                "STAGES": launch.num_stages,
            },
            divisible=(*tensors, *strides, "H", "W", "size", "window_y"),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            budget=config.BUDGET,
        )
