"""`block_causal_attention` over e4m3 K and V in Gluon for sm_90a; see e4m3.py for what is rounded.

Tiles, units, the plan, the protocol and the merge of parts are those of hopper.py. What differs:

A consumer rounds its 64 rows of Q once a segment and keeps them in registers. The factors of a unit
come with its K: the producer's threads put k_scale and v_scale [BN] beside the stage, 0 beyond the
run, and arrive at `k_full` with the copy. Weights are multiplied by 256 v_scale / r before they are
rounded, where r is the largest v_scale so far; O follows r as it follows the maximum.

V is [Bc, Hk, D, S]: 8-bit products take both operands along the summed dimension.
"""

# a kernel's arguments have no Python types, and not all of a tuple is used everywhere
# ruff: noqa: ANN001, ANN201, ANN202, RUF059

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels.attention import config
from sdvg_kernels.attention.descriptor import LAYOUT, can_copy, descriptor, swizzled, tiled
from sdvg_kernels.attention.e4m3 import E4m3Cache
from sdvg_kernels.attention.finish import HALF, NEVER, bar, finish, scale_rows
from sdvg_kernels.attention.hopper import _LOG2E, _NO_WINDOW, _SIZES, _processors, _softmax
from sdvg_kernels.attention.stream import ROWS, STATE, plan, segment, segments, unit

_MAX = gl.constexpr(448.0)
_WEIGHT = gl.constexpr(256.0)
# what a row must reach to have a factor, and the least that factors are divided by
_TINY = gl.constexpr(2.0**-100)


@gluon.jit
def _clean(stage, slots, BN: gl.constexpr, D: gl.constexpr):
    """Zero the columns of `stage` [D, BN] from `slots` on: 0 times what lies there may be NaN."""
    CHUNK: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    o_s = gl.arange(0, BN, gl.SliceLayout(0, layout))
    for i in gl.static_range(D // CHUNK):
        chunk = stage.slice(i * CHUNK, CHUNK)
        b_v = chunk.load(layout)
        chunk.store(gl.where((o_s < slots)[None, :], b_v, gl.zeros_like(b_v)))
    fence_async_shared()


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, shared, scale_s, v_raw, scales, cache_seqlens, cache_batch_idx, state,
    shape, GROUP: gl.constexpr, HAS_INDEX: gl.constexpr, STAGES: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """Copy each segment's Q once, and K, its factors and V of each unit, into free stages."""
    q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, v_full, v_free = shared
    k_scale, v_scale, S, HK = scales
    o_n = gl.arange(0, BN, gl.BlockedLayout([1], [32], [4], [0]))
    done = 0
    cleaned = 0
    for s in range(segments(state)):
        place, ends, runs, n_unit, first, stop = segment(s, cache_seqlens, state, shape, BN)
        row, i_b, i_h = place
        i_c = i_b
        if HAS_INDEX:
            i_c = gl.load(cache_batch_idx + i_b)
        i_g = i_h // GROUP
        for i in gl.static_range(2):
            mbarrier.wait(q_free.index(i), (s & 1) ^ 1)
            mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [i_b, row + i * HALF, i_h, 0], q_full.index(i), q_s.index(i)
            )
        for u in range(first, stop):
            slot, run_stop, shift = unit(u, runs, BN)
            stage = done % STAGES
            phase = (done // STAGES) & 1
            done += 1
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [i_c, slot, i_g, 0], k_full.index(stage), k_s.index(stage)
            )
            # 0 beyond the run, as a weight is there: 0 times what lies there may be NaN
            m_f = o_n < run_stop - slot
            # 32 bits: K and V are 256 times as many bytes or more
            o_f = ((i_c * S + slot) + o_n) * HK + i_g
            scale_s.index(2 * stage).store(gl.load(k_scale + o_f, mask=m_f, other=0.0))
            scale_s.index(2 * stage + 1).store(gl.load(v_scale + o_f, mask=m_f, other=0.0))
            mbarrier.arrive(k_full.index(stage), count=1)
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            if slot + BN > run_stop:
                mbarrier.expect(v_raw, v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    v_desc, [i_c, i_g, 0, slot], v_raw, v_s.index(stage)
                )
                mbarrier.wait(v_raw, cleaned)
                cleaned ^= 1
                _clean(v_s.index(stage).reshape([D, BN]), run_stop - slot, BN, D)
                mbarrier.arrive(v_full.index(stage), count=1)
            else:
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    v_desc, [i_c, i_g, 0, slot], v_full.index(stage), v_s.index(stage)
                )


# --- the consumers ---


@gluon.jit
def _round(stage, rounded, factors, D: gl.constexpr):
    """Write rows of Q as e4m3 to `rounded`, and what undoes their scale to `factors`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    b_q = stage.load(layout).to(gl.float32)
    b_f = gl.max(gl.where(b_q < 0.0, -b_q, b_q), 1)
    m_f = b_f >= _TINY
    b_i = gl.where(m_f, _MAX / gl.where(m_f, b_f, 1.0), 1.0)
    rounded.store((b_q * b_i[:, None]).to(gl.float8e4nv))
    factors.store(gl.where(m_f, b_f * (1.0 / _MAX), 1.0))
    fence_async_shared()


@gluon.jit
def _weights(b_p, b_r, scale, layout: gl.constexpr):
    """Return weights times 256 v_scale / r as e4m3, the new r, what O is worth under it."""
    b_v = scale.load(gl.SliceLayout(0, b_p.type.layout))
    b_n = gl.maximum(b_r, gl.max(b_v, 0))
    b_p = b_p * (b_v * (_WEIGHT / b_n))[None, :]
    return gl.convert_layout(b_p.to(gl.float8e4nv), layout), b_n, b_r / b_n


@gluon.jit
def _consume(
    ID: gl.constexpr, o_desc, shared, beside, device, shape, weights, HAS_LSE: gl.constexpr,
    HAS_BIAS: gl.constexpr, BIAS_TO_BLOCK: gl.constexpr, STAGES: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """Attend with 64 rows of each segment's tile; store them, or a part of them."""
    q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, v_full, v_free = shared
    scale_s, rounded_s, factor_s = beside
    cache_seqlens, lse, parts, state = device
    OWN: gl.constexpr = "9" if ID == 0 else "10"
    OTHER: gl.constexpr = "10" if ID == 0 else "9"
    x_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    row_layout: gl.constexpr = gl.SliceLayout(1, x_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, x_layout)
    b_q = rounded_s.index(ID)
    b_zero = gl.zeros([HALF, BN], gl.float32, x_layout)
    o_rows = gl.arange(0, HALF, row_layout)
    if ID == 1:
        # the first product is the other's
        bar("arrive", OTHER, "256")
    done = 0
    for s in range(segments(state)):
        place, ends, runs, n_unit, first, stop = segment(s, cache_seqlens, state, shape, BN)
        o_r = place[0] + ID * HALF + o_rows
        b_m = gl.full([HALF], NEVER, gl.float32, row_layout)
        b_o = gl.zeros([HALF, D], gl.float32, o_layout)
        b_r = _TINY

        mbarrier.wait(q_full.index(ID), s & 1)
        _round(q_s.index(ID).reshape([HALF, D]), b_q, factor_s.index(ID), D)
        mbarrier.arrive(q_free.index(ID), count=1)

        stage = done % STAGES
        mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
        bar("sync", OWN, "256")
        b_k = k_s.index(stage).reshape([BN, D]).permute((1, 0))
        b_x = warpgroup_mma(b_q, b_k, b_zero, use_acc=False, is_async=True)
        bar("arrive", OTHER, "256")
        b_x = warpgroup_mma_wait(0, deps=(b_x,))
        b_x = (
            b_x
            * scale_s.index(2 * stage).load(column_layout)[None, :]
            * factor_s.index(ID).load(row_layout)[:, None]
        )
        b_m, b_a, b_p = _softmax(
            b_x, b_m, o_r, first, runs, ends, shape, weights, True, HAS_BIAS, BIAS_TO_BLOCK, BN
        )
        b_l = gl.sum(b_p, 1)
        b_p, b_r, b_c = _weights(b_p, b_r, scale_s.index(2 * stage + 1), p_layout)
        mbarrier.arrive(k_free.index(stage), count=1)
        for u in range(first + 1, stop):
            v_stage = done % STAGES
            v_phase = (done // STAGES) & 1
            done += 1
            stage = done % STAGES
            mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
            bar("sync", OWN, "256")
            b_k = k_s.index(stage).reshape([BN, D]).permute((1, 0))
            b_x = warpgroup_mma(b_q, b_k, b_zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            b_v = v_s.index(v_stage).reshape([D, BN]).permute((1, 0))
            b_o = warpgroup_mma(b_p, b_v, b_o, is_async=True)
            bar("arrive", OTHER, "256")
            b_x = warpgroup_mma_wait(1, deps=(b_x,))
            b_x = (
                b_x
                * scale_s.index(2 * stage).load(column_layout)[None, :]
                * factor_s.index(ID).load(row_layout)[:, None]
            )
            b_m, b_a, b_p = _softmax(
                b_x, b_m, o_r, u, runs, ends, shape, weights, False, HAS_BIAS, BIAS_TO_BLOCK, BN
            )
            b_l = b_l * b_a + gl.sum(b_p, 1)
            b_e, b_r, b_c = _weights(b_p, b_r, scale_s.index(2 * stage + 1), p_layout)
            mbarrier.arrive(k_free.index(stage), count=1)
            b_o = warpgroup_mma_wait(0, deps=(b_o,))
            mbarrier.arrive(v_free.index(v_stage), count=1)
            b_o = scale_rows(b_o, b_a * b_c)
            b_p = b_e
        stage = done % STAGES
        mbarrier.wait(v_full.index(stage), (done // STAGES) & 1)
        b_v = v_s.index(stage).reshape([D, BN]).permute((1, 0))
        b_o = warpgroup_mma(b_p, b_v, b_o, is_async=True)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(v_free.index(stage), count=1)
        b_o = b_o * (b_r * (1.0 / _WEIGHT))
        done += 1

        finish(
            ID, (b_m, b_l, b_o), o_rows, (first, stop, n_unit), place, ends, o_desc, o_s, device,
            shape, HAS_LSE, D,
        )  # fmt: skip
    tma.store_wait(0)
    if ID == 0:
        # no arrival of the other is left over for the next kernel
        bar("sync", OWN, "256")


@gluon.jit(do_not_specialize=(*_SIZES, "S", "HK"))
def hopper_fp8_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    k_scale,
    v_scale,
    cache_seqlens,
    cache_batch_idx,
    lse,
    parts,
    state,
    n_tile,
    T,
    S,
    ring,
    H,
    HK,
    block_size,
    sink,
    window,
    scale,
    bias,
    bias_unscaled,
    bias_start,
    bias_stop,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    LANES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    HAS_INDEX: gl.constexpr,
    HAS_LSE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BIAS_TO_BLOCK: gl.constexpr,
):
    """Write out [B, T, H, D] and lse [B, H, T]; `state` must be zero."""
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, 1, HALF, 1, D], q_desc.layout)
    o_s = gl.allocate_shared_memory(o_desc.dtype, [2, 1, HALF, 1, D], o_desc.layout)
    k_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, BN, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, 1, D, BN], v_desc.layout)
    # factors of a stage's K, then of its V
    scale_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scale_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BN], scale_layout)
    rounded_layout: gl.constexpr = gl.NVMMASharedLayout(D, 8, 2)
    rounded_s = gl.allocate_shared_memory(gl.float8e4nv, [2, HALF, D], rounded_layout)
    factor_s = gl.allocate_shared_memory(gl.float32, [2, HALF], scale_layout)
    beside = (scale_s, rounded_s, factor_s)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        # the copy of K, and its factors
        mbarrier.init(k_full.index(i), count=2)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    mbarrier.init(v_raw, count=1)
    fence_async_shared()

    shape = (T, ring, H, block_size, sink, window)
    weights = (scale, bias, bias_unscaled, bias_start, bias_stop)
    plan(n_tile, cache_seqlens, state, shape, BN, LANES)
    shared = (q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, v_full, v_free)
    device = (cache_seqlens, lse, parts, state)
    scales = (k_scale, v_scale, S, HK)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), o_desc, shared, beside, device, shape, weights,
                        HAS_LSE, HAS_BIAS, BIAS_TO_BLOCK, STAGES, BN, D)),
            (_consume, (gl.constexpr(1), o_desc, shared, beside, device, shape, weights,
                        HAS_LSE, HAS_BIAS, BIAS_TO_BLOCK, STAGES, BN, D)),
            (_produce, (q_desc, k_desc, v_desc, shared, scale_s, v_raw, scales, cache_seqlens,
                        cache_batch_idx, state, shape, GROUP, HAS_INDEX, STAGES, BN, D)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
    # fmt: on


def block_causal_attention(
    query: torch.Tensor,
    cache: E4m3Cache,
    cache_seqlens: torch.Tensor,
    *,
    block_size: int | None = None,
    sink: int = 0,
    window: int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    bias: float | None = None,
    bias_start: int = 0,
    bias_stop: int | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    programs: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, T, H, D] in query's dtype, and lse [B, H, T] float32 ([0] if unasked).

    Arguments are those of the emulation in e4m3.py, query in bfloat16 or float16; it, k and v lie
    as TMA takes them, k_scale and v_scale are contiguous. `programs`: the grid; None: one program
    per multiprocessor. An `out` that TMA cannot write is copied to. Checks nothing.
    """
    batch, rows, heads, dim = query.shape
    slots, heads_cached = cache.k_scale.shape[1:]
    softmax_scale = dim**-0.5 if softmax_scale is None else softmax_scale
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((batch, heads, rows) if return_lse else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if softmax_scale <= 0:
        # the kernel takes the maximum before it scales
        query = query * math.copysign(softmax_scale != 0, softmax_scale)
        softmax_scale = abs(softmax_scale) or 1.0
    written = out if can_copy(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    launch = config.HOPPER_FP8[dim]
    programs = programs or _processors(query.device)
    state = query.new_zeros((programs, STATE.value), dtype=torch.int32)
    parts = query.new_empty((programs, 4, HALF.value * (dim + 2)), dtype=torch.float32)
    with on(query.device):
        hopper_fp8_kernel[(programs,)](
            q_desc=descriptor(query, HALF.value),
            k_desc=descriptor(cache.k, launch.BN),
            v_desc=tiled(cache.v, (1, 1, dim, launch.BN)),
            o_desc=descriptor(written, HALF.value),
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            lse=lse,
            parts=parts,
            state=state,
            n_tile=batch * heads * triton.cdiv(rows, ROWS.value),
            T=rows,
            S=slots,
            ring=slots - sink,
            H=heads,
            HK=heads_cached,
            block_size=rows if block_size is None else min(block_size, rows),
            sink=sink,
            window=_NO_WINDOW if window is None else min(window, _NO_WINDOW),
            scale=softmax_scale * _LOG2E.value,
            bias=(bias or 0.0) * _LOG2E.value,
            bias_unscaled=(bias or 0.0) / softmax_scale,
            bias_start=bias_start,
            bias_stop=bias_stop or 0,
            GROUP=heads // heads_cached,
            D=dim,
            BN=launch.BN,
            STAGES=launch.stages,
            LANES=max(128, triton.next_power_of_2(programs)),
            CONSUMER_REGISTERS=launch.consumer_registers,
            PRODUCER_REGISTERS=launch.producer_registers,
            HAS_INDEX=cache_batch_idx is not None,
            HAS_LSE=return_lse,
            HAS_BIAS=bias is not None,
            BIAS_TO_BLOCK=bias is not None and bias_stop is None,
            num_warps=4,
            maxnreg=config.HOPPER_MAXNREG,
        )
    if written is not out:
        out.copy_(written)
    return out, lse


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield every shipped configuration for sm_90: plain, and with every feature on."""
    if arch != 90:
        return
    floats = ("k_scale", "v_scale", "lse", "parts")
    types = dict.fromkeys(floats, "*fp32")
    types |= dict.fromkeys(("scale", "bias", "bias_unscaled"), "fp32")
    integers = ("cache_seqlens", "cache_batch_idx", "state")
    types |= dict.fromkeys(integers, "*i32") | dict.fromkeys((*_SIZES, "S", "HK"), "i32")
    for dim, launch in config.HOPPER_FP8.items():
        rows = f"tensordesc<bf16[1, {HALF.value}, 1, {dim}],{LAYOUT!r}>"
        tiles = {
            "q_desc": rows,
            "k_desc": f"tensordesc<fp8e4nv[1, {launch.BN}, 1, {dim}],{swizzled(1, dim)!r}>",
            "v_desc": f"tensordesc<fp8e4nv[1, 1, {dim}, {launch.BN}],{swizzled(1, launch.BN)!r}>",
            "o_desc": rows,
        }
        for full in (False, True):
            yield Compilation(
                kernel=hopper_fp8_kernel,
                arch=arch,
                config=f"D{dim} e4m3 BN{launch.BN}" + (" bias lse idx" if full else ""),
                signature=types | tiles,
                constants={
                    "GROUP": 1,
                    "D": dim,
                    "BN": launch.BN,
                    "STAGES": launch.stages,
                    "LANES": 256,
                    "CONSUMER_REGISTERS": launch.consumer_registers,
                    "PRODUCER_REGISTERS": launch.producer_registers,
                }
                | dict.fromkeys(("HAS_INDEX", "HAS_LSE", "HAS_BIAS", "BIAS_TO_BLOCK"), full)
                | ({} if full else {"cache_batch_idx": None}),
                divisible=(*floats, *integers),
                num_warps=4,
                num_stages=1,
                budget=config.hopper_budget(
                    launch, "QGMMA", config.HOPPER_FP8_SPILLS if full else 0
                ),
                maxnreg=config.HOPPER_MAXNREG,
            )
