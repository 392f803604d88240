"""Faults planted in the Hopper kernel's own source: the lane, or the output, shows each of them."""

from __future__ import annotations

import re
import types

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from sdvg_kernels.attention import finish, hopper, stream
from sdvg_kernels.testing import GluonLane, LaneFault
from tests.kernels.test_attention import Case, Inputs, check, make
from tests.kernels.test_gluon_lane import planted

# 2 tiles of some 8 units on 3 programs: the second ends one tile and begins the other
SHARED = Case((1000,), 140, 980, sink=9, heads=1, heads_cached=1, window=900, block_size=60)
# 2 tiles of 6 units on 4 programs: every seam is in the middle of a tile, or at its end
ALIGNED = Case((730,), 140, 760, heads=1, heads_cached=1)
PROGRAMS = {SHARED: 3, ALIGNED: 4}


def attend(module: types.ModuleType, case: Case, inputs: Inputs, seed: int) -> None:
    """Run the kernel of `module` in the lane and check what it gives."""
    with GluonLane(seed).patched(module):
        out, lse = module.block_causal_attention(
            inputs.query,
            *inputs.cache,
            block_size=case.block_size,
            sink=case.sink,
            window=case.window,
            cache_batch_idx=None,
            softmax_scale=case.dim**-0.5,
            bias=None,
            bias_start=0,
            bias_stop=None,
            return_lse=True,
            # what nobody writes must not be what an earlier run left there
            out=torch.full_like(inputs.query, torch.nan),
            programs=PROGRAMS[case],
        )
    check(case, inputs, out, lse)


def lines(*found: str) -> str:
    """Join the lines of a piece of source."""
    return "".join(f"{line}\n" for line in found)


K_FREE = "                mbarrier.wait(k_free.index(stage), phase ^ 1)\n"
V_FREE = "                mbarrier.wait(v_free.index(stage), phase ^ 1)\n"
Q_FREE = "            mbarrier.wait(q_free.index(i), (s & 1) ^ 1)\n"
V_FULL = "            mbarrier.wait(v_full.index(v_stage), v_phase)\n"
K_FULL = "            mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)\n"
QK_DONE = "            b_x = warpgroup_mma_wait(1, deps=(b_x,))\n"
PV_DONE = "            b_o = warpgroup_mma_wait(0, deps=(b_o,))\n"
K_RELEASE = "            mbarrier.arrive(k_free.index(stage), count=1)\n"
V_RELEASE = "            mbarrier.arrive(v_free.index(v_stage), count=1)\n"
Q_RELEASE = "        mbarrier.arrive(q_free.index(ID), count=1)\n"
CLEAN = "_clean(v_s.index(stage).reshape([BN, D]), run_stop - slot, BN, D)"
CLEAN_FENCE = lines("            chunk.store(b_v)", "    fence_async_shared()")
MEET = '        bar("sync", ALONE, "128")\n        p_a'
WHOSE_PART = "2 * i_c + begins.to(gl.int32)"
OUT_FENCE = "        fence_async_shared()\n        tma.async_copy_shared_to_global"
MERGE = "b_o = scale_rows(b_o, b_a) + scale_rows(b_po, b_w)"

# what is planted in hopper.py: (old, new, what the lane says); None: the output is wrong
PLANTED: dict[str, tuple[str, str, str | None]] = {
    "parity of a free K stage": (K_FREE, K_FREE.replace(" ^ 1", ""), "deadlock"),
    "parity of a free V stage": (V_FREE, V_FREE.replace(" ^ 1", ""), "deadlock"),
    "parity of a free Q stage": (Q_FREE, Q_FREE.replace(" ^ 1", ""), "deadlock"),
    "parity of a full K stage": (K_FULL, K_FULL.replace("& 1)", "& 1 ^ 1)"), "waits|never"),
    "parity of a full V stage": (V_FULL, V_FULL.replace("phase", "phase ^ 1"), "waits|never"),
    "K stage not released": (K_RELEASE, "", "deadlock"),
    "V stage not released": (V_RELEASE, "", "deadlock"),
    "Q stage not released": (Q_RELEASE, "", "deadlock"),
    "V released before P V": (PV_DONE + V_RELEASE, V_RELEASE + PV_DONE, "written by .*product"),
    "full V not awaited": (V_FULL, "", "nothing waits for|never written"),
    "full K not awaited": (K_FULL, "", "nothing waits for|never written"),
    "free V not awaited": (V_FREE, "", "written by|deadlock|waits for"),
    "free Q not awaited": (Q_FREE, "", "is written by|more came"),
    "Q K not awaited": (QK_DONE, QK_DONE.replace("1", "2"), "before warpgroup_mma_wait"),
    "P V not awaited": (PV_DONE, PV_DONE.replace("0", "1"), "before warpgroup_mma_wait"),
    "tail of V not cleaned": (CLEAN, "pass", None),
    "tail of V cleaned a row late": (CLEAN, CLEAN.replace("slot", "slot + 1"), None),
    "tail of V not fenced": (CLEAN_FENCE, CLEAN_FENCE.split("\n")[0] + "\n", "no fence_async"),
    "raw V not awaited": (
        "                    mbarrier.wait(v_raw, cleaned & 1)\n",
        "",
        "nothing waits for|never written",
    ),
    "no rescale of O": ("b_o = scale_rows(b_o, b_a)\n", "pass\n", None),
    "no rescale of the sum": ("b_l = b_l * b_a + gl.sum", "b_l = b_l + gl.sum", None),
    "masks left out": ("    if edge:\n", "    if edge & False:\n", None),
    "lost turn": (
        lines('            bar("arrive", OTHER, "256")', QK_DONE[:-1]),
        QK_DONE,
        "deadlock.*named barrier",
    ),
    "first turn": ("    if ID == 1:\n", "    if ID == 2:\n", "deadlock.*named barrier"),
    "copy of the output not awaited": (
        lines("    tma.store_wait(0)", "    if ID == 0:"),
        lines("    if ID == 0:"),
        "never waited for",
    ),
}  # fmt: skip

# ... in finish.py
IN_FINISH: dict[str, tuple[str, str, str | None]] = {
    "output not fenced": (OUT_FENCE, OUT_FENCE.split("\n")[1], "no fence_async_shared"),
    "merge without weights": (MERGE, "b_o = b_o + b_po", None),
    "merge leaves one out": ("range(c_first, c_last + 1)", "range(c_first, c_last)", None),
    "merged by the last but one": (
        "== c_last - c_first\n",
        "== c_last - c_first - 1\n",
        "nothing orders",
    ),
    "part not finished": (MEET, "        p_a", "nothing orders"),
    "hand-over relaxed": ('sem="acq_rel"', 'sem="relaxed"', "nothing orders"),
    "parts of two tiles in one place": (WHOSE_PART, "2 * i_c", "nothing orders"),
}  # fmt: skip

# ... and in stream.py
SEES_SINK = "gl.minimum(gl.minimum(sink, stop)"
STOP, FIRST = "gl.store(p_plan + 4, stop - last_begin", "gl.store(p_plan + 3, begin - first_begin"
IN_STREAM: dict[str, tuple[str, str, str | None]] = {
    "a key too many": ("o_high = gl.minimum(stop, ", "o_high = 1 + gl.minimum(stop, ", None),
    "a key too few": ("o_high = gl.minimum(stop, ", "o_high = -1 + gl.minimum(stop, ", None),
    "window off by one": ("o_end - window - shift", "o_end - window - shift + 1", None),
    "sink off by one": (SEES_SINK, SEES_SINK.replace("(sink", "(sink - 1"), None),
    "share stops early": (STOP, STOP + " - 1", None),
    "share begins late": (FIRST, FIRST + " + 1", None),
    "wrong first sharer": ("b_stop <= first_begin)", "b_stop < first_begin)", None),
    "wrong last sharer": ("b_stop < last_end)", "b_stop <= last_end)", None),
}
# what shows only where NaN lies behind the keys, or a tile ends with a program's share
IN_ALIGNED = {
    "tail of V not cleaned",
    "tail of V cleaned a row late",
    "wrong first sharer",
    "wrong last sharer",
}
# what is right if the programs happen to arrive in their order
IN_ONE_ORDER = {"wrong last sharer"}


@pytest.mark.parametrize("case", PROGRAMS, ids=["shared", "aligned"])
@pytest.mark.parametrize("seed", range(4))
def test_without_a_fault_it_is_right(seed: int, case: Case, random: torch.Generator) -> None:
    attend(planted(hopper, "", ""), case, make(case, random, dtype=torch.bfloat16), seed)


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_in_the_kernel_is_found(fault: str, random: torch.Generator) -> None:
    old, new, says = PLANTED[fault]
    found_in(planted(hopper, old, new), fault, says, random)


@pytest.mark.parametrize("fault", [*IN_STREAM, *IN_FINISH])
def test_a_fault_in_what_the_kernels_share_is_found(fault: str, random: torch.Generator) -> None:
    room, faults = (stream, IN_STREAM) if fault in IN_STREAM else (finish, IN_FINISH)
    old, new, says = faults[fault]
    broken, module = planted(room, old, new), planted(hopper, "", "")
    for name, value in vars(broken).items():
        if isinstance(value, type(stream.plan)) and hasattr(hopper, name):
            setattr(module, name, value)
    found_in(module, fault, says, random)


def found_in(
    module: types.ModuleType, fault: str, says: str | None, random: torch.Generator
) -> None:
    """Assert that the fault is found whoever goes first; a few, in some order of arrival."""
    case = ALIGNED if fault in IN_ALIGNED else SHARED
    inputs = make(case, random, dtype=torch.bfloat16)
    said: list[AssertionError] = []
    for seed in range(6) if fault in IN_ONE_ORDER else (0, 1):
        try:
            attend(module, case, inputs, seed)
        except AssertionError as error:
            said.append(error)
    assert said
    assert len(said) == 2 or fault in IN_ONE_ORDER, "found in one order, missed in another"
    for error in said:
        assert isinstance(error, LaneFault) == bool(says), error
        assert re.search(says or "output|lse", str(error), re.DOTALL), error
