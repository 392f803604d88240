"""The rope ops in Triton: one program is one token row, all its heads in one tile.

    n      = x / sqrt(mean(x^2) + eps) * weight      over all heads' channels, float32
    a', b' = a cos - b sin, a sin + b cos            of neighbouring channels; each pair of a head
                                                     turns with the frame, the row or the column
    q out  = rotated query;   cache[slot(start + i)] = rotated key, value

Query, key and value are read once and what comes of them is written once, 16 bytes an access; what
else is read (weights, 2 D values of the table) is the same for many rows and stays in the caches.
A pair lies in one thread, so rotation needs no exchange.

Layout: query [B, T, H, D], key and value [B, T, Hk, D], caches [Bc, S, Hk, D], scales [Bc, S, Hk];
table [P, D]: cosines, then sines. Lengths and frame offsets are read on the device.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels import _tuned
from sdvg_kernels._budget import Compilation
from sdvg_kernels._check import message
from sdvg_kernels._device import on
from sdvg_kernels.rope import config

_OP = "norm_rope"
# Triton's interpreter drops the carry into the exponent when it casts to e4m3
_INTERPRETED = triton.knobs.runtime.interpret
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_STEP = tl.constexpr(1 / 448)
_TINY = tl.constexpr(2.0**-100)
# one compilation serves all sizes; strides stay specialised: accesses are as wide as aligned
_SIZES = ("P", "S", "Bc", "sink", "width", "first_frame")


@triton.jit
def _rotate(b_x, b_cos, b_sin, BH: tl.constexpr, D: tl.constexpr):
    """Rotate the pairs of neighbouring channels of [BH, D] float32."""
    b_a, b_b = tl.split(tl.reshape(b_x, [BH, D // 2, 2]))
    b_y = tl.join(
        b_a * b_cos[None, :] - b_b * b_sin[None, :], b_a * b_sin[None, :] + b_b * b_cos[None, :]
    )
    return tl.reshape(b_y, [BH, D])


@triton.jit
def _quantise(b_x, PREROUND: tl.constexpr):
    """Return the rows [BH, D] as e4m3, and the float32 factor [BH] that undoes it."""
    # [BH]
    b_m = tl.max(tl.abs(b_x), 1)
    m_z = b_m >= _TINY
    b_m = tl.where(m_z, b_m, 1.0)
    b_s = tl.where(m_z, b_m * _E4M3_STEP, 1.0)
    # [BH, D]
    b_y = b_x * tl.where(m_z, tl.div_rn(_E4M3_MAX, b_m), 1.0)[:, None]
    if PREROUND:
        # to nearest even, 3 bits of mantissa, in float32
        b_u = b_y.to(tl.uint32, bitcast=True)
        b_u = (b_u + 0x7FFFF + ((b_u >> 20) & 1)) & 0xFFF00000
        b_n = b_u.to(tl.float32, bitcast=True)
        # below 2^-6 in steps of 2^-9: adding 1.5 x 2^14 leaves no smaller ones
        b_y = tl.where(tl.abs(b_y) < 0.015625, b_y + 24576.0 - 24576.0, b_n)
    return b_y.to(tl.float8e4nv), b_s


@triton.jit(do_not_specialize=_SIZES)
def rope_kernel(
    query,
    key,
    value,
    table,
    query_weight,
    key_weight,
    frame_offsets,
    lengths,
    cache_batch_idx,
    out_q,
    out_k,
    out_v,
    k_scale,
    v_scale,
    stride_qb,
    stride_qt,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    stride_okb,
    stride_oks,
    stride_ovb,
    stride_ovs,
    P,
    S,
    Bc,
    sink,
    width,
    first_frame,
    eps,
    stride_qh: tl.constexpr,
    stride_kh: tl.constexpr,
    stride_vh: tl.constexpr,
    stride_okh: tl.constexpr,
    stride_ovh: tl.constexpr,
    stride_ovd: tl.constexpr,
    H: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    FROM_LENGTHS: tl.constexpr,
    IS_E4M3: tl.constexpr,
    PREROUND: tl.constexpr,
):
    """Write out_q [B, T, H, D], and the key and value rows into out_k and out_v."""
    # a place in a frame, a frame, a sequence
    i_p = tl.program_id(0)
    i_f = tl.program_id(1)
    i_b = tl.program_id(2)
    i_t = i_f * tl.num_programs(0) + i_p
    T = tl.num_programs(1) * tl.num_programs(0)
    o_d = tl.arange(0, D)
    # [BH], [BK]
    o_h = tl.arange(0, BH)
    o_k = tl.arange(0, BK)
    m_h = (o_h < H)[:, None]
    m_k = (o_k < HK)[:, None]

    # [BH, D], [BK, D]
    p_q = query + i_b.to(tl.int64) * stride_qb + i_t.to(tl.int64) * stride_qt
    p_q += o_h[:, None] * stride_qh + o_d[None, :]
    p_k = key + i_b.to(tl.int64) * stride_kb + i_t.to(tl.int64) * stride_kt
    p_k += o_k[:, None] * stride_kh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_h, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b_k = tl.load(p_k, mask=m_k, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if HAS_CACHE:
        p_v = value + i_b.to(tl.int64) * stride_vb + i_t.to(tl.int64) * stride_vt
        p_v += o_k[:, None] * stride_vh + o_d[None, :]
        b_v = tl.load(p_v, mask=m_k, other=0.0, eviction_policy="evict_first")

    # where the row goes; a sequence that the cache does not have is not written
    i_c = i_b
    start = 0
    valid = True
    if HAS_INDEX:
        i_c = tl.load(cache_batch_idx + i_b)
        valid = (i_c >= 0) & (i_c < Bc)
    if HAS_CACHE:
        start = tl.load(lengths + i_c, mask=valid, other=-1)
        valid = start >= 0
    frame = first_frame
    if HAS_OFFSETS:
        frame += tl.load(frame_offsets + i_b)
    if FROM_LENGTHS:
        frame = start // tl.num_programs(0)
    frame += i_f
    i_r = i_p // width

    # the value needs no rotation: it leaves its registers first
    i_s = i_t
    if HAS_CACHE:
        i_s += start
        i_s = tl.where(i_s < sink, i_s, sink + (i_s - sink) % (S - sink))
        m_k = m_k & valid
        p_ov = out_v + i_c.to(tl.int64) * stride_ovb + i_s.to(tl.int64) * stride_ovs
        # 1 apart; or, with V [Bc, Hk, D, S], a row of slots apart
        p_ov += o_k[:, None] * stride_ovh + o_d[None, :] * stride_ovd
        if IS_E4M3:
            p_s = (i_c.to(tl.int64) * S + i_s) * HK + o_k
            m_s = (o_k < HK) & valid
            b_v, b_s = _quantise(b_v.to(tl.float32), PREROUND)
            tl.store(v_scale + p_s, b_s, mask=m_s)
        tl.store(p_ov, b_v.to(out_v.dtype.element_ty), mask=m_k)

    # [D / 2]
    o_p = tl.arange(0, D // 2)
    SPACE: tl.constexpr = D // 2 // 3
    TIME: tl.constexpr = D // 2 - 2 * SPACE
    b_n = tl.where(o_p < TIME + SPACE, i_r, i_p - i_r * width)
    b_n = tl.where(o_p < TIME, frame, b_n)
    # a position that the table does not have gives NaN
    m_p = (b_n >= 0) & (b_n < P) & valid
    p_c = table + b_n * D + o_p
    b_cos = tl.load(p_c, mask=m_p, other=float("nan"), eviction_policy="evict_last")
    b_sin = tl.load(p_c + D // 2, mask=m_p, other=float("nan"), eviction_policy="evict_last")

    if HAS_NORM:
        p_w = query_weight + o_h[:, None] * D + o_d[None, :]
        b_w = tl.load(p_w, mask=m_h, other=0.0, eviction_policy="evict_last").to(tl.float32)
        p_g = key_weight + o_k[:, None] * D + o_d[None, :]
        b_g = tl.load(p_g, mask=m_k, other=0.0, eviction_policy="evict_last").to(tl.float32)
        # the norm's own factor goes with the rotation: once per angle, not once per channel
        r_q = tl.rsqrt(tl.sum(b_q * b_q) / (H * D) + eps)
        r_k = tl.rsqrt(tl.sum(b_k * b_k) / (HK * D) + eps)
        b_q = _rotate(b_q * b_w, b_cos * r_q, b_sin * r_q, BH, D)
        b_k = _rotate(b_k * b_g, b_cos * r_k, b_sin * r_k, BK, D)
    else:
        b_q = _rotate(b_q, b_cos, b_sin, BH, D)
        b_k = _rotate(b_k, b_cos, b_sin, BK, D)
    p_oq = out_q + (i_b.to(tl.int64) * T + i_t) * (H * D) + o_h[:, None] * D + o_d[None, :]
    tl.store(p_oq, b_q.to(out_q.dtype.element_ty), mask=m_h)

    p_ok = out_k + i_c.to(tl.int64) * stride_okb + i_s.to(tl.int64) * stride_oks
    p_ok += o_k[:, None] * stride_okh + o_d[None, :]
    if IS_E4M3:
        b_k, b_s = _quantise(b_k, PREROUND)
        tl.store(k_scale + p_s, b_s, mask=m_s)
    tl.store(p_ok, b_k.to(out_k.dtype.element_ty), mask=m_k)


def norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    *,
    eps: float,
    height: int,
    width: int,
    start_frame: int,
    frame_offsets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normed and rotated (query, key), contiguous, in their own dtype."""
    out_k = torch.empty_like(key, memory_format=torch.contiguous_format)
    out_q = _launch(
        query,
        key,
        None,
        out_k,
        None,
        None,
        table,
        query_weight,
        key_weight,
        None,
        None,
        eps=eps,
        height=height,
        width=width,
        start_frame=start_frame,
        frame_offsets=frame_offsets,
        sink=0,
        cache_batch_idx=None,
    )
    return out_q, out_k


def norm_rope_stage_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    *,
    eps: float,
    height: int,
    width: int,
    start_frame: int | None,
    frame_offsets: torch.Tensor | None,
    sink: int,
    cache_batch_idx: torch.Tensor | None,
) -> torch.Tensor:
    """Return the rotated query; write the rotated key and the value behind `lengths`."""
    return _launch(
        query,
        key,
        value,
        k_cache,
        v_cache,
        lengths,
        table,
        query_weight,
        key_weight,
        k_scale,
        v_scale,
        eps=eps,
        height=height,
        width=width,
        start_frame=start_frame,
        frame_offsets=frame_offsets,
        sink=sink,
        cache_batch_idx=cache_batch_idx,
    )


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    out_k: torch.Tensor,
    out_v: torch.Tensor | None,
    lengths: torch.Tensor | None,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    *,
    eps: float,
    height: int,
    width: int,
    start_frame: int | None,
    frame_offsets: torch.Tensor | None,
    sink: int,
    cache_batch_idx: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the kernel; return the rotated query [B, T, H, D]."""
    batch, rows, heads, dim = query.shape
    heads_key = key.shape[2]
    out_q = torch.empty_like(query, memory_format=torch.contiguous_format)
    if out_q.numel() == 0:
        return out_q
    tile, tile_key = (triton.next_power_of_2(count) for count in (heads, heads_key))
    # offsets within a tile are 32 bits wide, the second and third dimension of a grid 16
    tensors = {"query": query, "key": key, "value": value, "k_cache": out_k, "v_cache": out_v}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(2) * tile + tensor.stride(3) * dim >= 2**31 + dim:
            rule = f"have a head stride below {2**31 // tile} for Triton"
            raise NotImplementedError(message(_OP, name, rule, tensor.stride(2)))
    if max(batch, rows // (height * width)) >= 2**16:
        rule = "have fewer than 65536 sequences and frames for Triton"
        raise NotImplementedError(message(_OP, "query", rule, query.shape))
    value_strides = (0, 0, 0) if value is None else value.stride()
    out_v_strides = (0, 0, 0, 1) if out_v is None else out_v.stride()
    device = query.device
    launch = config.choose(tile, dim, _tuned.gpu_name(device))
    launch = config.INTERPRETED if _INTERPRETED else launch
    with on(device):
        rope_kernel[(height * width, rows // (height * width), batch)](
            query=query,
            key=key,
            value=value,
            table=table,
            query_weight=query_weight,
            key_weight=key_weight,
            frame_offsets=frame_offsets,
            lengths=lengths,
            cache_batch_idx=cache_batch_idx,
            out_q=out_q,
            out_k=out_k,
            out_v=out_v,
            k_scale=k_scale,
            v_scale=v_scale,
            stride_qb=query.stride(0),
            stride_qt=query.stride(1),
            stride_kb=key.stride(0),
            stride_kt=key.stride(1),
            stride_vb=value_strides[0],
            stride_vt=value_strides[1],
            stride_okb=out_k.stride(0),
            stride_oks=out_k.stride(1),
            stride_ovb=out_v_strides[0],
            stride_ovs=out_v_strides[1],
            P=table.shape[0],
            S=out_k.shape[1],
            Bc=out_k.shape[0],
            sink=sink,
            width=width,
            first_frame=start_frame or 0,
            eps=eps,
            stride_qh=query.stride(2),
            stride_kh=key.stride(2),
            stride_vh=value_strides[2],
            stride_okh=out_k.stride(2),
            stride_ovh=out_v_strides[2],
            stride_ovd=out_v_strides[3],
            H=heads,
            HK=heads_key,
            D=dim,
            BH=tile,
            BK=tile_key,
            HAS_NORM=query_weight is not None,
            HAS_CACHE=lengths is not None,
            HAS_INDEX=cache_batch_idx is not None,
            HAS_OFFSETS=frame_offsets is not None,
            FROM_LENGTHS=start_frame is None,
            IS_E4M3=k_scale is not None,
            PREROUND=_INTERPRETED,
            num_warps=launch.num_warps,
        )
    return out_q


# heads, head dim, dtype and cache of what is compiled: Wan 1.3B, 5B and 14B, and small models
_CASES = (
    *((heads, 128, "bf16", "cache") for heads in (4, 12, 24, 40)),
    *((heads, 64, "bf16", "cache") for heads in (6, 24)),
    *((heads, 128, "bf16", "e4m3") for heads in (12, 24, 40)),
    (24, 64, "bf16", "e4m3"),
    *((heads, 128, "bf16", "e4m3 V transposed") for heads in (12, 40)),
    (12, 128, "bf16", ""),
    (40, 128, "fp32", "cache"),
    (24, 64, "fp32", "cache"),
)


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the widths for `arch`: with a cache, with an e4m3 cache, without one, in float32."""
    for heads, dim, dtype, kind in _CASES:
        # cvt to e4m3 begins with 8.9
        if "e4m3" not in kind or arch >= 89:
            yield _compilation(arch, heads, dim, dtype, kind)


def _compilation(arch: int, heads: int, dim: int, dtype: str, kind: str) -> Compilation:
    """Return one case; with an e4m3 cache, every other feature is on too."""
    cached, full, transposed = bool(kind), "e4m3" in kind, "transposed" in kind
    slots = 32768 if transposed else 1
    strides = tuple(name for name in rope_kernel.arg_names if name.startswith("stride_"))
    launch = config.choose(triton.next_power_of_2(heads), dim)
    # 16-byte accesses a thread: query, key, weights; rotated query; and with a cache all of value's
    item = 4 if dtype == "fp32" else 2
    per_tensor, per_stored = (
        triton.cdiv(heads * dim * size, 16 * 32 * launch.num_warps)
        for size in (item, 1 if full else item)
    )
    wide = 5 * per_tensor + per_stored + (per_tensor + per_stored if cached else 0)
    # the bytes of a transposed value are stored one by one
    wide -= per_stored * transposed
    given = dict.fromkeys(("query", "key", "value", "query_weight", "key_weight"), f"*{dtype}")
    stored = "*fp8e4nv" if full else f"*{dtype}"
    types = given | {"table": "*fp32", "out_q": f"*{dtype}", "out_k": stored, "out_v": stored}
    types |= {"k_scale": "*fp32", "v_scale": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("frame_offsets", "lengths", "cache_batch_idx"), "*i32")
    types |= dict.fromkeys((*strides, *_SIZES), "i32")
    absent = [] if cached else ["value", "out_v", "lengths"]
    absent += [] if full else ["k_scale", "v_scale", "cache_batch_idx", "frame_offsets"]
    tensors = tuple(name for name, kind in types.items() if kind.startswith("*"))
    return Compilation(
        kernel=rope_kernel,
        arch=arch,
        config=f"H{heads} D{dim} {dtype} {kind or 'no cache'}",
        signature=types,
        constants=dict.fromkeys((name for name in strides if name.endswith("h")), dim)
        | {
            "stride_ovh": dim * slots,
            "stride_ovd": slots,
            "H": heads,
            "HK": heads,
            "D": dim,
            "BH": triton.next_power_of_2(heads),
            "BK": triton.next_power_of_2(heads),
            "HAS_NORM": True,
            "HAS_CACHE": cached,
            "HAS_INDEX": full,
            "HAS_OFFSETS": full,
            "FROM_LENGTHS": cached and not full,
            "IS_E4M3": full,
            "PREROUND": False,
        }
        | dict.fromkeys(absent),
        divisible=(*tensors, *strides),
        num_warps=launch.num_warps,
        num_stages=3,
        budget=config.budget(full, wide, transposed),
    )
