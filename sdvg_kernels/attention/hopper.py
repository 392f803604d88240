"""`block_causal_attention` in Gluon for sm_90a: two consumer warpgroups and a TMA producer.

A program walks segments: whole tiles of 128 query rows of one head, and parts of tiles (who does
what: stream.py). The producer copies Q, K and V with TMA into a ring of stages, whose phases go on
from segment to segment. Each consumer owns 64 rows. It issues the product Q K(u + 1) before
P V(u), and takes turns with the other on the tensor core through two named barriers, so that one's
softmax runs beside the other's products (FlashAttention-3, arXiv 2407.08608):

    m' = max(m, max_s x)    l' = l 2^(m - m') + sum_s 2^(x - m')    o' = o 2^(m - m') + 2^(x - m') V

in base 2, with log2(e) folded into the scale. The first unit of a segment is masked, and those
where some row misses some key; the others are not. Rows of V beyond a run's stop are zeroed in
shared memory: 0 times what lies there may be NaN.

A part of a tile leaves o, m and l in float32. Who arrives last, by a counter of each tile and
consumer, merges all parts in the order of the keys: the order of arrival changes nothing.

Descriptors are 4-D, [B, T, H, D] and [Bc, S, Hk, D], with any strides of 16 bytes: copies are cut
off at the end of a sequence, rows beyond are zeros. Lengths are read on the device.
"""

# a kernel's arguments have no Python types, and not all of a tuple is used everywhere
# ruff: noqa: ANN001, ANN201, ANN202, RUF059

from __future__ import annotations

import functools
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
from sdvg_kernels.attention.descriptor import LAYOUT, can_copy, descriptor
from sdvg_kernels.attention.finish import HALF, NEVER, bar, finish, scale_rows
from sdvg_kernels.attention.stream import ROWS, STATE, mask, plan, segment, segments, unit

_LOG2E = gl.constexpr(1.4426950408889634)
# lengths, windows and their differences stay within int32
_NO_WINDOW = 2**30
# one compilation serves all sizes
_SIZES = ("n_tile", "T", "ring", "H", "block_size", "sink", "window", "bias_start", "bias_stop")


# --- the producer ---


@gluon.jit
def _clean(stage, rows, BN: gl.constexpr, D: gl.constexpr):
    """Zero the rows of `stage` [BN, D] from `rows` on: 0 times what lies there may be NaN."""
    CHUNK: gl.constexpr = 1024 // D
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_r = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    for i in gl.static_range(BN // CHUNK):
        if rows < (i + 1) * CHUNK:
            chunk = stage.slice(i * CHUNK, CHUNK)
            b_v = chunk.load(layout)
            b_v = gl.where((o_r < rows - i * CHUNK)[:, None], b_v, gl.zeros_like(b_v))
            chunk.store(b_v)
    fence_async_shared()


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    shared,
    v_raw,
    cache_seqlens,
    cache_batch_idx,
    state,
    shape,
    GROUP: gl.constexpr,
    HAS_INDEX: gl.constexpr,
    STAGES: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
):
    """Copy each segment's Q once, and K and V of each unit, into free stages."""
    q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, v_full, v_free = shared
    k_done = 0
    v_done = 0
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
        # as they are needed: K of a unit, then V of the one before
        for u in range(first, stop + 1):
            if u < stop:
                slot, run_stop, shift = unit(u, runs, BN)
                stage = k_done % STAGES
                phase = (k_done // STAGES) & 1
                k_done += 1
                mbarrier.wait(k_free.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    k_desc, [i_c, slot, i_g, 0], k_full.index(stage), k_s.index(stage)
                )
            if u > first:
                slot, run_stop, shift = unit(u - 1, runs, BN)
                stage = v_done % STAGES
                phase = (v_done // STAGES) & 1
                v_done += 1
                mbarrier.wait(v_free.index(stage), phase ^ 1)
                if slot + BN > run_stop:
                    mbarrier.expect(v_raw, v_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        v_desc, [i_c, slot, i_g, 0], v_raw, v_s.index(stage)
                    )
                    mbarrier.wait(v_raw, cleaned & 1)
                    cleaned += 1
                    _clean(v_s.index(stage).reshape([BN, D]), run_stop - slot, BN, D)
                    mbarrier.arrive(v_full.index(stage), count=1)
                else:
                    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        v_desc, [i_c, slot, i_g, 0], v_full.index(stage), v_s.index(stage)
                    )


# --- the consumers ---


@gluon.jit
def _softmax(
    b_x, b_m, o_row, u, runs, ends, shape, weights,
    FIRST: gl.constexpr, HAS_BIAS: gl.constexpr, BIAS_TO_BLOCK: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Return the new maximum, what old sums are worth under it, and the weights of unit `u`."""
    T, ring, H, block_size, sink, window = shape
    before, end_first, end_last, begin_first, begin_last = ends
    scale, bias, bias_unscaled, bias_start, bias_stop = weights
    slot, stop, shift = unit(u, runs, BN)
    # the tokens of the first and, if all are of one kind, of the last slot
    in_sink = slot + BN <= sink
    token = slot + gl.where(in_sink, 0, shift)
    edge = (slot + BN > stop) | (token + BN > end_first) | FIRST
    edge = edge | ((in_sink == 0) & ((slot < sink) | (token < end_last - window)))
    extra = 0.0
    if HAS_BIAS:
        stop_first = begin_first if BIAS_TO_BLOCK else bias_stop
        stop_last = begin_last if BIAS_TO_BLOCK else bias_stop
        inside = (token >= bias_start) & (token + BN <= stop_first)
        outside = (token + BN <= bias_start) | (token >= stop_last)
        edge = edge | ((inside | outside) == 0)
        extra = gl.where(inside & (edge == 0), bias, 0.0)
    if edge:
        b_x = mask(
            b_x, o_row, slot, stop, shift, before, shape, weights, HAS_BIAS, BIAS_TO_BLOCK, BN
        )
    b_n = gl.maximum(b_m, gl.max(b_x, 1) * scale + extra)
    # a row that has seen nothing yet: -inf - -inf is NaN
    b_z = gl.where(b_n == NEVER, 0.0, b_n)
    b_p = gl.exp2(b_x * scale - (b_z - extra)[:, None])
    return b_n, gl.exp2(b_m - b_z), b_p


@gluon.jit
def _consume(
    ID: gl.constexpr,
    o_desc,
    shared,
    device,
    shape,
    weights,
    HAS_LSE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BIAS_TO_BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    BN: gl.constexpr,
    D: gl.constexpr,
):
    """Attend with 64 rows of each segment's tile; store them, or a part of them."""
    q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, v_full, v_free = shared
    cache_seqlens, lse, parts, state = device
    OWN: gl.constexpr = "9" if ID == 0 else "10"
    OTHER: gl.constexpr = "10" if ID == 0 else "9"
    x_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, x_layout)
    b_q = q_s.index(ID).reshape([HALF, D])
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

        stage = done % STAGES
        mbarrier.wait(q_full.index(ID), s & 1)
        mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
        bar("sync", OWN, "256")
        b_k = k_s.index(stage).reshape([BN, D]).permute((1, 0))
        b_x = warpgroup_mma(b_q, b_k, b_zero, use_acc=False, is_async=True)
        bar("arrive", OTHER, "256")
        b_x = warpgroup_mma_wait(0, deps=(b_x,))
        mbarrier.arrive(k_free.index(stage), count=1)
        b_m, b_a, b_p = _softmax(
            b_x, b_m, o_r, first, runs, ends, shape, weights, True, HAS_BIAS, BIAS_TO_BLOCK, BN
        )
        b_l = gl.sum(b_p, 1)
        b_p = gl.convert_layout(b_p.to(o_desc.dtype), p_layout)
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
            b_o = warpgroup_mma(b_p, v_s.index(v_stage).reshape([BN, D]), b_o, is_async=True)
            bar("arrive", OTHER, "256")
            b_x = warpgroup_mma_wait(1, deps=(b_x,))
            mbarrier.arrive(k_free.index(stage), count=1)
            b_m, b_a, b_p = _softmax(
                b_x, b_m, o_r, u, runs, ends, shape, weights, False, HAS_BIAS, BIAS_TO_BLOCK, BN
            )
            b_l = b_l * b_a + gl.sum(b_p, 1)
            b_o = warpgroup_mma_wait(0, deps=(b_o,))
            mbarrier.arrive(v_free.index(v_stage), count=1)
            b_o = scale_rows(b_o, b_a)
            b_p = gl.convert_layout(b_p.to(o_desc.dtype), p_layout)
        mbarrier.arrive(q_free.index(ID), count=1)
        stage = done % STAGES
        mbarrier.wait(v_full.index(stage), (done // STAGES) & 1)
        b_o = warpgroup_mma(b_p, v_s.index(stage).reshape([BN, D]), b_o, is_async=True)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(v_free.index(stage), count=1)
        done += 1

        finish(
            ID, (b_m, b_l, b_o), o_rows, (first, stop, n_unit), place, ends, o_desc, o_s, device,
            shape, HAS_LSE, D,
        )  # fmt: skip
    tma.store_wait(0)
    if ID == 0:
        # no arrival of the other is left over for the next kernel
        bar("sync", OWN, "256")


@gluon.jit(do_not_specialize=_SIZES)
def hopper_kernel(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    cache_seqlens,
    cache_batch_idx,
    lse,
    parts,
    state,
    n_tile,
    T,
    ring,
    H,
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
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, 1, HALF, 1, D], q_desc.layout)
    o_s = gl.allocate_shared_memory(dtype, [2, 1, HALF, 1, D], o_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, 1, D], v_desc.layout)
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
        mbarrier.init(k_full.index(i), count=1)
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
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), o_desc, shared, device, shape, weights,
                        HAS_LSE, HAS_BIAS, BIAS_TO_BLOCK, STAGES, BN, D)),
            (_consume, (gl.constexpr(1), o_desc, shared, device, shape, weights,
                        HAS_LSE, HAS_BIAS, BIAS_TO_BLOCK, STAGES, BN, D)),
            (_produce, (q_desc, k_desc, v_desc, shared, v_raw, cache_seqlens, cache_batch_idx,
                        state, shape, GROUP, HAS_INDEX, STAGES, BN, D)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
    # fmt: on


def block_causal_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    block_size: int | None,
    sink: int,
    window: int | None,
    cache_batch_idx: torch.Tensor | None,
    softmax_scale: float,
    bias: float | None,
    bias_start: int,
    bias_stop: int | None,
    return_lse: bool,
    out: torch.Tensor | None,
    programs: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, T, H, D] in query's dtype, and lse [B, H, T] float32 ([0] if unasked).

    `programs`: the grid; None: one program per multiprocessor. An `out` that TMA cannot write is
    copied to.
    """
    batch, rows, heads, dim = query.shape
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
    launch = config.HOPPER[dim]
    programs = programs or _processors(query.device)
    # a memset of 64 bytes a program: nothing is left over from a launch, or shared by two streams
    state = query.new_zeros((programs, STATE.value), dtype=torch.int32)
    parts = query.new_empty((programs, 4, HALF.value * (dim + 2)), dtype=torch.float32)
    with on(query.device):
        hopper_kernel[(programs,)](
            q_desc=descriptor(query, HALF.value),
            k_desc=descriptor(k_cache, launch.BN),
            v_desc=descriptor(v_cache, launch.BN),
            o_desc=descriptor(written, HALF.value),
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            lse=lse,
            parts=parts,
            state=state,
            n_tile=batch * heads * triton.cdiv(rows, ROWS.value),
            T=rows,
            # S - sink and bias / scale: made in the kernel, they would hold registers in every role
            ring=k_cache.shape[1] - sink,
            H=heads,
            block_size=rows if block_size is None else min(block_size, rows),
            sink=sink,
            window=_NO_WINDOW if window is None else min(window, _NO_WINDOW),
            scale=softmax_scale * _LOG2E.value,
            bias=(bias or 0.0) * _LOG2E.value,
            bias_unscaled=(bias or 0.0) / softmax_scale,
            bias_start=bias_start,
            bias_stop=bias_stop or 0,
            GROUP=heads // k_cache.shape[2],
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


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield every shipped configuration for sm_90: plain, and with every feature on."""
    if arch != 90:
        return
    types = {"lse": "*fp32", "parts": "*fp32", "scale": "fp32", "bias": "fp32"}
    types |= {"bias_unscaled": "fp32"}
    types |= dict.fromkeys(("cache_seqlens", "cache_batch_idx", "state"), "*i32")
    types |= dict.fromkeys(_SIZES, "i32")
    for dim, launch in config.HOPPER.items():
        for dtype, full in (("bf16", False), ("fp16", False), ("bf16", True)):
            tiles = dict.fromkeys(("q_desc", "o_desc"), HALF.value)
            tiles |= dict.fromkeys(("k_desc", "v_desc"), launch.BN)
            yield Compilation(
                kernel=hopper_kernel,
                arch=arch,
                config=f"D{dim} {dtype} BN{launch.BN}" + (" bias lse idx" if full else ""),
                signature=types
                | {
                    n: f"tensordesc<{dtype}[1, {r}, 1, {dim}],{LAYOUT!r}>" for n, r in tiles.items()
                },
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
                divisible=("cache_seqlens", "cache_batch_idx", "lse", "parts", "state"),
                num_warps=4,
                num_stages=1,
                budget=config.hopper_budget(launch, spill_bytes=config.HOPPER_SPILLS * full),
                maxnreg=config.HOPPER_MAXNREG,
            )
