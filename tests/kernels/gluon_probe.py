"""A small Gluon kernel for sm_90a that codegen's tests compile: a TMA producer and one consumer.

    python tests/kernels/gluon_probe.py     # prints its rows as JSON: well pipelined, and not

A program of its own: the tests' process may have TRITON_INTERPRET set, which Gluon does not know.
"""

# a kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import json

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sdvg_kernels._budget import Budget, Compilation
from sdvg_kernels.codegen import compiled_row


@gluon.jit
def _produce(a_desc, b_desc, a_s, b_s, a_full, full, free, n):
    mbarrier.expect(a_full, a_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(a_desc, [0, 0], a_full, a_s)
    for i in range(n):
        mbarrier.wait(free.index(i % 2), ((i // 2) & 1) ^ 1)
        mbarrier.expect(full.index(i % 2), b_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(b_desc, [i * 64, 0], full.index(i % 2), b_s.index(i % 2))


@gluon.jit
def _consume(a_s, b_s, a_full, full, free, out, n, IN_FLIGHT: gl.constexpr, TOUCH: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_o = gl.zeros([64, 64], gl.float32, layout)
    mbarrier.wait(a_full, 0)
    for i in range(n):
        mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        b_o = warpgroup_mma(a_s, b_s.index(i % 2), b_o, is_async=True)
        b_o = warpgroup_mma_wait(IN_FLIGHT, deps=(b_o,))
        if TOUCH:
            # registers of a product in flight: ptxas can only wait for each
            b_o = b_o * 0.5
        mbarrier.arrive(free.index((i + IN_FLIGHT) % 2), count=1, pred=i >= IN_FLIGHT)
    b_o = warpgroup_mma_wait(0, deps=(b_o,))
    o_r = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    o_c = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    gl.store(out + o_r * 64 + o_c, b_o)


@gluon.jit
def probe_kernel(a_desc, b_desc, out, n, IN_FLIGHT: gl.constexpr, TOUCH: gl.constexpr):
    """Write sum_i A B_i, [64, 64] each."""
    a_s = gl.allocate_shared_memory(gl.bfloat16, [64, 64], a_desc.layout)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], b_desc.layout)
    a_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(a_full, count=1)
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (a_s, b_s, a_full, full, free, out, n, IN_FLIGHT, TOUCH)),
            (_produce, (a_desc, b_desc, a_s, b_s, a_full, full, free, n)),
        ],
        [4],
        [24],
    )


def case(in_flight: int, touch: bool) -> Compilation:
    """Return the probe with `in_flight` products left in flight, and perhaps touched there."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tile = f"tensordesc<bf16[64, 64],{layout!r}>"
    return Compilation(
        kernel=probe_kernel,
        arch=90,
        config=f"in flight {in_flight}" + (", touched" if touch else ""),
        signature={"a_desc": tile, "b_desc": tile, "out": "*fp32", "n": "i32"},
        constants={"IN_FLIGHT": in_flight, "TOUCH": touch},
        divisible=("out",),
        num_warps=4,
        num_stages=1,
        budget=Budget(registers=128, matrix="HGMMA", overlapped=True, setmaxnreg=(24, 232)),
        maxnreg=128,
    )


if __name__ == "__main__":
    cases = [case(1, False), case(0, False), case(1, True)]
    print(json.dumps([compiled_row(each)._asdict() for each in cases]))
