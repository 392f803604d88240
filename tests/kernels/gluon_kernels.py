"""Small Gluon kernels that the tests of the CPU lane run, and break."""

# a kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# --- a pipeline: out[c] = sum of a[c, i] @ b[i], by two consumers and a producer ---


@gluon.jit
def _turn(KIND: gl.constexpr, ID: gl.constexpr):
    gl.inline_asm_elementwise(
        "bar." + KIND + " " + ID + ", 256; // $0",
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _fill(a_desc, b_desc, a_s, b_s, full, free, n, STAGES: gl.constexpr):
    for i in range(n):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        for c in gl.static_range(2):
            tma.async_copy_global_to_shared(
                a_desc, [c * 64, i * 64], full.index(stage), a_s.index(2 * stage + c)
            )
        tma.async_copy_global_to_shared(b_desc, [i * 64, 0], full.index(stage), b_s.index(stage))


@gluon.jit
def _add_up(ID: gl.constexpr, o_desc, a_s, b_s, o_s, full, free, n, STAGES: gl.constexpr):
    OWN: gl.constexpr = "9" if ID == 0 else "10"
    OTHER: gl.constexpr = "10" if ID == 0 else "9"
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_o = gl.zeros([64, 64], gl.float32, layout)
    if ID == 1:
        _turn("arrive", OTHER)
    for i in range(n):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        _turn("sync", OWN)
        b_o = warpgroup_mma(a_s.index(2 * stage + ID), b_s.index(stage), b_o, is_async=True)
        _turn("arrive", OTHER)
        b_o = warpgroup_mma_wait(0, deps=(b_o,))
        mbarrier.arrive(free.index(stage), count=1)
    o_s.index(ID).store(b_o.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [ID * 64, 0], o_s.index(ID))
    tma.store_wait(0)


@gluon.jit
def pipeline(a_desc, b_desc, o_desc, n, STAGES: gl.constexpr):
    a_s = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, 64, 64], a_desc.layout)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], b_desc.layout)
    o_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], o_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    gl.warp_specialize(
        [
            (_add_up, (gl.constexpr(0), o_desc, a_s, b_s, o_s, full, free, n, STAGES)),
            (_add_up, (gl.constexpr(1), o_desc, a_s, b_s, o_s, full, free, n, STAGES)),
            (_fill, (a_desc, b_desc, a_s, b_s, full, free, n, STAGES)),
        ],
        [4, 1],
        [160, 24],
    )


# --- sums of tiles by several programs: whoever comes last adds up what all have left ---


@gluon.jit
def hand_over(x, part, arrived, out, N: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    c = gl.program_id(0)
    o_n = gl.arange(0, N, layout)
    gl.store(part + c * N + o_n, gl.load(x + c * N + o_n) * 2.0)
    gl.inline_asm_elementwise(
        "bar.sync 9, 128; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    n_before = gl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if n_before == gl.num_programs(0) - 1:
        b_sum = gl.zeros([N], gl.float32, layout)
        for i in range(gl.num_programs(0)):
            b_sum += gl.load(part + i * N + o_n)
        gl.store(out + o_n, b_sum)


# --- values ---


@gluon.jit
def arithmetic(out, a, b, ring):
    gl.store(out, a // b)
    gl.store(out + 1, a % b)
    gl.store(out + 2, gl.where(ring == 0, 7, a % ring))
    gl.store(out + 3, gl.cdiv(b, 2))
    gl.store(out + 4, gl.minimum(a, b) + gl.maximum(a, b))
    gl.store(out + 5, (~(a < b)).to(gl.int32))
    gl.store(out + 6, a.to(gl.int64) * 2**31 // 2**31)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    o = gl.arange(0, 8, layout)
    gl.store(out + 8 + o, (o - 4) // 3, mask=o < 7)
    gl.store(out + 16 + o, gl.associative_scan(o, 0, _plus))
    gl.store(out + 24, gl.sum(gl.where(o % 2 == 0, o, 0), 0))


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def to_float8(x, out, N: gl.constexpr):
    o = gl.arange(0, N, gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(out + o, gl.load(x + o).to(gl.float8e4nv))


@gluon.jit
def reaches(x, first, N: gl.constexpr):
    o = gl.arange(0, N, gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(x + first + o, gl.load(x + o))


@gluon.jit
def overflows(x, n):
    o = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(x + o * n, 0.0)


@gluon.jit
def ranks_differ(x):
    o = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.store(x + o, (o[:, None] + o) * 1.0)


@gluon.jit
def unknown(x):
    gl.histogram(gl.load(x), 4)


@gluon.jit
def strange_assembly(x):
    gl.inline_asm_elementwise("nanosleep.u32 7;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _partition(x):
    gl.store(x, 1.0)


@gluon.jit
def same_place(x):
    gl.warp_specialize([(_partition, (x,)), (_partition, (x,))], [4], [24])


@gluon.jit
def _tile_of(b_x):
    gl.sum(b_x, 0)


@gluon.jit
def tile_to_worker(x):
    b_x = gl.arange(0, 32, gl.BlockedLayout([1], [32], [4], [0]))
    gl.warp_specialize([(_tile_of, (b_x,)), (_tile_of, (b_x,))], [4], [24])


@gluon.jit
def float8_across(a_desc, b_desc):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    a_s = gl.allocate_shared_memory(gl.float8e4nv, [64, 64], a_desc.layout)
    b_s = gl.allocate_shared_memory(gl.float8e4nv, [64, 64], b_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, 2 * a_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(a_desc, [0, 0], bar, a_s)
    tma.async_copy_global_to_shared(b_desc, [0, 0], bar, b_s)
    mbarrier.wait(bar, 0)
    warpgroup_mma(a_s, b_s, gl.zeros([64, 64], gl.float32, layout))
