"""What a Hopper program does: the keys that a tile sees, as units, and who does which units.

A tile is 128 query rows of one head. Its keys are at most two runs of slots: the low one, the sink
and what the ring wraps on to behind it; the high one, the ring before it wraps. Each run is cut
into units of BN slots; the last unit of a run may be partial. A tile has one unit at least, which
may see nothing.

The grid has one program per multiprocessor. Program `c` of G does whole tiles c, c + G, ..., so
that neighbours walk the keys of one head in step, and its share of the units of the tiles that do
not fill a wave (stream-K, arXiv 2301.03598). Lengths are known on the device alone: every program
counts all units and finds its own.
"""

# a kernel's arguments have no Python types, and not all of a tuple is used everywhere
# ruff: noqa: ANN001, ANN201, ANN202, RUF059

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# query rows of a tile
ROWS = gl.constexpr(128)
# integers of a program in the state: two counters, then its plan, which begins at PLAN
STATE = gl.constexpr(16)
PLAN = gl.constexpr(2)
# units that programs may differ by before a whole wave is shared: a part costs about as much
_SLACK = gl.constexpr(4)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def tile(i_tile, cache_seqlens, shape, BN: gl.constexpr):
    """Return where tile `i_tile` (a scalar, or a vector of them) is and which slots it sees.

    (first row, sequence, head); (its rows' L - T, the ends and the begins of its first and its last
    row's blocks); the two runs (units of the low one, its stop, what turns a slot of the ring in it
    into a token; slot of unit 0 if all were in the high one, its stop, the same); the units.
    """
    T, ring, H, block_size, sink, window = shape
    n_t = gl.cdiv(T, ROWS)
    i_bh = i_tile // n_t
    i_b = i_bh // H
    row = (i_tile - i_bh * n_t) * ROWS
    length = gl.load(cache_seqlens + i_b)
    before = length - T
    last_row = gl.minimum(row + ROWS, T) - 1
    begin_first = before + row // block_size * block_size
    begin_last = before + last_row // block_size * block_size
    end_first = gl.minimum(length, begin_first + block_size)
    end_last = gl.minimum(length, begin_last + block_size)

    low = gl.maximum(gl.maximum(sink, length - ring), end_first - window)
    # the window reaches the sink, and the ring has not wrapped: slots are tokens, in one run
    joined = low == sink
    low = gl.where(joined, 0, low)
    count = gl.maximum(end_last - low, 0)
    turn = (low - sink) % ring
    begin = gl.where(joined, 0, sink + turn)
    head = gl.where(joined, count, gl.minimum(count, ring - turn))
    in_sink = gl.maximum(gl.minimum(sink, end_last), 0)
    low_stop = gl.where(joined, count, in_sink + count - head)
    low_shift = gl.where(joined, 0, low + head - sink)
    high_stop = gl.where(joined, 0, begin + head)
    n_low = gl.cdiv(low_stop, BN)
    n_high = gl.cdiv(gl.maximum(high_stop - begin, 0), BN)
    n_unit = gl.maximum(n_low + n_high, 1)
    place = (row, i_b, i_bh - i_b * H)
    ends = (before, end_first, end_last, begin_first, begin_last)
    runs = (n_low, low_stop, low_shift, begin - n_low * BN, high_stop, low - begin)
    return place, ends, runs, n_unit


@gluon.jit
def unit(u, runs, BN: gl.constexpr):
    """Return unit `u`'s first slot, its run's stop, and what turns a slot of the ring into a token.

    Slots of the sink are tokens as they are.
    """
    n_low, low_stop, low_shift, begin, high_stop, high_shift = runs
    is_low = u < n_low
    slot = u * BN + gl.where(is_low, 0, begin)
    return slot, gl.where(is_low, low_stop, high_stop), gl.where(is_low, low_shift, high_shift)


@gluon.jit
def _less(o_k, o_stop):
    """Return o_k[None, :] < o_stop[:, None]."""
    # bits 1 and 2 of a wgmma's column are the thread's: what is left are constants of the code
    return (o_k & -7)[None, :] < o_stop[:, None] - (o_k & 6)[None, :]


@gluon.jit
def mask(
    b_x, o_row, slot, stop, shift, before, shape, weights,
    HAS_BIAS: gl.constexpr, BIAS_TO_BLOCK: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Return the logits of a unit with the bias on some keys, and -inf where a row sees no key."""
    T, ring, H, block_size, sink, window = shape
    scale, bias, bias_unscaled, bias_start, bias_stop = weights
    o_k = gl.arange(0, BN, gl.SliceLayout(0, b_x.type.layout))
    o_begin = before + o_row // block_size * block_size
    o_end = gl.minimum(before + T, o_begin + block_size)
    if HAS_BIAS:
        # the biased tokens, as columns of the sink and as columns of the ring
        o_first = gl.zeros_like(o_row) + bias_start - slot
        o_last = gl.zeros_like(o_row) + bias_stop - slot
        if BIAS_TO_BLOCK:
            o_last = o_begin - slot
        m_b = _less(o_k, gl.minimum(o_last, sink - slot)) & (_less(o_k, o_first) == 0)
        o_first = gl.maximum(o_first - shift, sink - slot)
        m_b = m_b | (_less(o_k, o_last - shift) & (_less(o_k, o_first) == 0))
        b_x = gl.where(m_b, b_x + bias_unscaled, b_x)
    # a row sees keys of the sink before its first stop, and keys of the ring in [low, high)
    o_sink = gl.minimum(gl.minimum(sink, stop), o_end) - slot
    o_low = gl.maximum(sink, o_end - window - shift) - slot
    o_high = gl.minimum(stop, o_end - shift) - slot
    m_x = _less(o_k, o_sink) | (_less(o_k, o_high) & (_less(o_k, o_low) == 0))
    return gl.where(m_x, b_x, float("-inf"))


@gluon.jit
def _units(o_tile, n_tile, cache_seqlens, shape, BN: gl.constexpr):
    """Return the units of each tile, 0 beyond the last."""
    inside = gl.minimum(o_tile, n_tile - 1)
    place, ends, runs, n_unit = tile(inside, cache_seqlens, shape, BN)
    return gl.where(o_tile < n_tile, n_unit, 0)


@gluon.jit
def plan(n_tile, cache_seqlens, state, shape, BN: gl.constexpr, LANES: gl.constexpr):
    """Write this program's work to `state`: whole tiles, and a run of units of the remaining ones.

    Its segments; how many are whole tiles; the first remaining tile and unit in it; where the last
    one stops; the program that begins the first remaining tile, and the one that ends the last.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    c = gl.program_id(0)
    n_program = gl.num_programs(0)
    # [LANES], programs
    o_c = gl.arange(0, LANES, layout)
    m_c = o_c < n_program
    whole = n_tile // n_program
    b_whole = gl.zeros([LANES], gl.int32, layout)
    b_wave = gl.zeros([LANES], gl.int32, layout)
    for i_w in range(whole):
        b_wave = _units(o_c + i_w * n_program, n_tile, cache_seqlens, shape, BN)
        b_wave = gl.where(m_c, b_wave, 0)
        b_whole += b_wave
    b_rest = _units(o_c + whole * n_program, n_tile, cache_seqlens, shape, BN)
    share = gl.cdiv(gl.sum(b_whole + gl.where(m_c, b_rest, 0), 0), n_program)
    # tiles differ so much that a wave must be shared to balance them
    uneven = (gl.max(b_whole, 0) > share + _SLACK) & (whole > 0)
    whole = gl.where(uneven, whole - 1, whole)
    b_whole = gl.where(uneven, b_whole - b_wave, b_whole)

    # a program without a share would tear a tile's run of programs apart: each has at least one
    b_share = gl.where(m_c, gl.maximum(share - b_whole, 1), 0)
    b_stop = gl.associative_scan(b_share, 0, _add)
    # [2 * LANES], the remaining tiles: where their units stop
    o_t = gl.arange(0, 2 * LANES, layout)
    rest = whole * n_program
    b_tile = gl.associative_scan(_units(rest + o_t, n_tile, cache_seqlens, shape, BN), 0, _add)
    n_rest = gl.max(b_tile, 0)

    m_own = o_c == c
    begin = gl.minimum(gl.sum(gl.where(m_own, b_stop - b_share, 0), 0), n_rest)
    stop = gl.minimum(gl.sum(gl.where(m_own, b_stop, 0), 0), n_rest)
    first_tile = gl.sum((b_tile <= begin).to(gl.int32), 0)
    first_begin = gl.max(gl.where(b_tile <= begin, b_tile, 0), 0)
    last_tile = gl.sum((b_tile < stop).to(gl.int32), 0)
    last_begin = gl.max(gl.where(b_tile < stop, b_tile, 0), 0)
    last_end = gl.min(gl.where(b_tile < stop, n_rest, b_tile), 0)
    segments = whole + gl.where(begin < stop, last_tile - first_tile + 1, 0)
    p_plan = state + c * STATE + PLAN
    gl.store(p_plan, segments)
    gl.store(p_plan + 1, whole)
    gl.store(p_plan + 2, rest + first_tile)
    gl.store(p_plan + 3, begin - first_begin)
    gl.store(p_plan + 4, stop - last_begin)
    gl.store(p_plan + 5, gl.sum((m_c & (b_stop <= first_begin)).to(gl.int32), 0))
    gl.store(p_plan + 6, gl.sum((m_c & (b_stop < last_end)).to(gl.int32), 0))
    # the stride of whole tiles: kept here, it takes no register from the partitions
    gl.store(p_plan + 7, n_program)


@gluon.jit
def segments(state):
    """Return the number of this program's segments: whole tiles, and parts of tiles."""
    return gl.load(state + gl.program_id(0) * STATE + PLAN)


@gluon.jit
def segment(s, cache_seqlens, state, shape, BN: gl.constexpr):
    """Return segment `s`: what `tile` returns, and the units [first, stop) that it has of it."""
    p_plan = state + gl.program_id(0) * STATE + PLAN
    whole = gl.load(p_plan + 1)
    wave = gl.program_id(0) + s * gl.load(p_plan + 7)
    i_tile = gl.where(s < whole, wave, gl.load(p_plan + 2) + s - whole)
    place, ends, runs, n_unit = tile(i_tile, cache_seqlens, shape, BN)
    first = gl.where(s == whole, gl.load(p_plan + 3), 0)
    is_last = (s >= whole) & (s == gl.load(p_plan) - 1)
    stop = gl.where(is_last, gl.load(p_plan + 4), n_unit)
    return place, ends, runs, n_unit, first, stop


@gluon.jit
def sharers(state, first, stop, n_unit):
    """Return the first and the last program of the tile whose units [first, stop) are ours."""
    c = gl.program_id(0)
    p_plan = state + c * STATE + PLAN
    c_first = gl.where(first > 0, gl.load(p_plan + 5), c)
    c_last = gl.where(stop < n_unit, gl.load(p_plan + 6), c)
    return c_first, c_last
