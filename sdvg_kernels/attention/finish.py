"""How a Hopper kernel ends a tile: whole, it is stored; shared, its programs leave parts.

Who arrives last merges all parts of a tile in the order of the keys, so that the order of arrival
changes nothing, and stores the tile.
"""

# a kernel's arguments have no Python types, and not all of a tuple is used everywhere
# ruff: noqa: ANN001, ANN201, ANN202, RUF059

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from sdvg_kernels.attention.stream import STATE, sharers

NEVER = gl.constexpr(float("-inf"))
# rows of a consumer: half a tile, the height of a wgmma
HALF = gl.constexpr(64)
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def bar(DO: gl.constexpr, ID: gl.constexpr, THREADS: gl.constexpr):
    """Come to the named barrier `ID` of `THREADS` threads, and wait for the others if to "sync"."""
    # Triton's own barriers are 0 to 3
    TEXT: gl.constexpr = "bar." + DO + " " + ID + ", " + THREADS + "; // $0"
    gl.inline_asm_elementwise(TEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def scale_rows(b_o, b_w):
    """Return b_o [64, D] with its rows scaled by b_w [64]."""
    return b_o * gl.convert_layout(b_w, gl.SliceLayout(1, b_o.type.layout))[:, None]


@gluon.jit
def _part(parts, i_c, begins, ID: gl.constexpr, D: gl.constexpr):
    """Return where program `i_c` leaves its part of a tile that it begins, or goes on with.

    A part is [64] maxima, [64] sums and [64, D] output, not normalised.
    """
    i_p = (2 * i_c + begins.to(gl.int32)) * 2 + ID
    return parts + i_p * (HALF * D + 2 * HALF)


@gluon.jit
def finish(
    ID: gl.constexpr, sums, o_rows, span, place, ends, o_desc, o_s, device, shape,
    HAS_LSE: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Store the 64 rows of consumer `ID` after the units `span` of a tile, or leave a part of them.

    `sums` are the rows' maxima in base 2, their sums and their output, not normalised; `span` is
    the first unit, the stop, and how many units the tile has.
    """
    b_m, b_l, b_o = sums
    first, stop, n_unit = span
    cache_seqlens, lse, parts, state = device
    ALONE: gl.constexpr = "11" if ID == 0 else "12"
    row_layout: gl.constexpr = b_m.type.layout
    o_layout: gl.constexpr = b_o.type.layout
    o_row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    o_r = place[0] + ID * HALF + o_rows
    finished = (first == 0) & (stop == n_unit)
    if finished == 0:
        c = gl.program_id(0)
        c_first, c_last = sharers(state, first, stop, n_unit)
        # the order of a part's elements is free: neighbouring threads are neighbours
        o_d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
        o_p = (o_d % 8 + o_d // 8 * (8 * HALF))[None, :]
        o_p = o_p + gl.arange(0, HALF, o_row_layout)[:, None] * 8
        p_p = _part(parts, c, first == 0, ID, D)
        gl.store(p_p + o_rows, b_m)
        gl.store(p_p + HALF + o_rows, b_l)
        gl.store(p_p + 2 * HALF + o_p, b_o)
        bar("sync", ALONE, "128")
        p_arrived = state + c_first * STATE + ID
        finished = gl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu") == c_last - c_first
        if finished:
            b_m = gl.full([HALF], NEVER, gl.float32, row_layout)
            b_l = gl.zeros([HALF], gl.float32, row_layout)
            b_o = gl.zeros([HALF, D], gl.float32, o_layout)
            for i_c in range(c_first, c_last + 1):
                p_p = _part(parts, i_c, i_c == c_first, ID, D)
                b_pm = gl.load(p_p + o_rows, cache_modifier=".cg")
                b_pl = gl.load(p_p + HALF + o_rows, cache_modifier=".cg")
                b_po = gl.load(p_p + 2 * HALF + o_p, cache_modifier=".cg")
                b_n = gl.maximum(b_m, b_pm)
                b_z = gl.where(b_n == NEVER, 0.0, b_n)
                b_a = gl.exp2(b_m - b_z)
                b_w = gl.exp2(b_pm - b_z)
                b_m = b_n
                b_l = b_l * b_a + b_pl * b_w
                b_o = scale_rows(b_o, b_a) + scale_rows(b_po, b_w)
    if finished:
        row, i_b, i_h = place
        # rows before the sequence see nothing
        m_seen = (b_l != 0.0) & (ends[0] + o_r >= 0)
        b_w = 1.0 / gl.where(m_seen, b_l, 1.0)
        m_seen_o = gl.convert_layout(m_seen, o_row_layout)[:, None]
        b_o = gl.where(m_seen_o, scale_rows(b_o, b_w), 0.0)
        # the last tile's copy has left the stage
        tma.store_wait(0)
        bar("sync", ALONE, "128")
        o_s.index(ID).reshape([HALF, D]).store(b_o.to(o_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [i_b, row + ID * HALF, i_h, 0], o_s.index(ID))
        if HAS_LSE:
            b_s = gl.where(m_seen, (b_m + gl.log2(b_l)) * _LN2, NEVER)
            p_lse = lse + (i_b * shape[2] + i_h).to(gl.int64) * shape[0]
            gl.store(p_lse + o_r, b_s, mask=o_r < shape[0])
