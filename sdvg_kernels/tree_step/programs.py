"""The programs of a tree's step in Triton: about one for each entry.

    draft_entries   program (row, entry)       feature, id, slot, mask; entry 0: where the row is
    beam_entries    program (row, beam)        feature, id, slot, mask; its children's parent
    tree_entries    program (row, 32 entries)  ids, slots, masks
    commit_tree_    program (row, 0)           ids, known, drafted, moves
                    program (row, 1 + entry)   feature

A row's programs read nothing that another writes: of `known` and `drafted` only program 0 knows,
the others take the chain's length from `tree_entries`. Features are copied, bit for bit.
Layout: ids [R, S + 1], features [R, S + 1, D], entries [R, T], masks [R, T, W].
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _below(b_count, b_word):
    """Return words `b_word` of a mask whose first `b_count` bits are set."""
    b_left = b_count - 32 * b_word
    b_some = ~(-1 << tl.minimum(tl.maximum(b_left, 0), 31))
    return tl.where(b_left >= 32, -1, b_some)


@triton.jit
def _end(known, S, prefix, tokens, extra):
    """Return the slot behind the frame of the next token, or the video where frames are joined."""
    stride = tokens + extra
    end = prefix + (known - prefix) // stride * stride + tokens
    return tl.where(extra > 0, end, S)


@triton.jit
def _copy(target, source, stride_sd, D, is_live, BD: tl.constexpr):
    """Copy a feature of D elements, or write zeros unless it `is_live`."""
    for i_d in range(0, D, BD):
        # [BD]
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_x = tl.load(source + o_d.to(tl.int64) * stride_sd, mask=m_d & is_live, other=0.0)
        tl.store(target + o_d, b_x, mask=m_d)


@triton.jit(do_not_specialize=("S", "T", "prefix", "tokens", "extra", "NW"))
def draft_kernel(
    ids,
    features,
    known,
    lengths,
    drafted,
    entry_ids,
    entry_features,
    entry_slots,
    entry_mask,
    last,
    root,
    limit,
    places,
    S,
    T,
    D,
    prefix,
    tokens,
    extra,
    NW,
    BD: tl.constexpr,
    BW: tl.constexpr,
):
    """Write entry `program_id(0) % T` of row `program_id(0) // T`."""
    i_r = (tl.program_id(0) // T).to(tl.int64)
    i_t = tl.program_id(0) % T
    k = tl.load(known + i_r)
    n = tl.load(lengths + i_r)
    first = tl.load(drafted + i_r)
    slot = first + i_t
    is_live = slot < k
    # the chain's features are missing: those of as many tokens before stand in
    source = tl.where(slot - 1 < n, slot - 1, slot - k + n)
    source = tl.minimum(tl.maximum(source, 0), S)
    p_t = i_r * T + i_t
    p_f = features + (i_r * (S + 1) + source) * D
    _copy(entry_features + p_t * D, p_f, 1, D, is_live, BD)
    token = tl.load(ids + i_r * (S + 1) + slot, mask=is_live, other=0)
    tl.store(entry_ids + p_t, tl.maximum(token, 0))
    tl.store(entry_slots + p_t, tl.where(is_live, slot, -1))
    # [BW]
    o_w = tl.arange(0, BW)
    b_mask = tl.where(is_live, _below(i_t + 1, o_w), 0)
    tl.store(entry_mask + p_t * NW + o_w, b_mask, mask=o_w < NW)
    if i_t == 0:
        end = tl.minimum(tl.maximum(k - 1 - first, 0), T - 1)
        tl.store(last + i_r, end.to(tl.int64))
        tl.store(root + i_r, tl.load(ids + i_r * (S + 1) + k - 1))
        # no feature stands before the first token of all: a prompt of one is fed alone
        tl.store(limit + i_r, tl.where(n > 0, _end(k, S, prefix, tokens, extra) - k, 0))
        made = k - prefix
        stride = tokens + extra
        tl.store(places + i_r, made // stride * tokens + made % stride)


@triton.jit(do_not_specialize=("B", "M", "W", "K", "NW", "level", "first"))
def beam_kernel(
    known,
    tokens,
    scores,
    beams,
    features,
    mask,
    entry_ids,
    entry_features,
    entry_slots,
    entry_positions,
    entry_mask,
    entry_scores,
    parents,
    stride_fr,
    stride_fw,
    stride_fd,
    B,
    M,
    W,
    K,
    D,
    NW,
    level,
    first,
    BD: tl.constexpr,
    BK: tl.constexpr,
    BW: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Write beam `program_id(0) % K` of row `program_id(0) // K`, of M candidates of W beams."""
    i_r = (tl.program_id(0) // K).to(tl.int64)
    i_k = tl.program_id(0) % K
    i_b = i_r % B
    beam = tl.load(beams + i_b * K + i_k)
    above = beam // K
    k = tl.load(known + i_r)
    p_k = i_r * K + i_k
    p_f = features + i_r * stride_fr + above * stride_fw
    _copy(entry_features + p_k * D, p_f, stride_fd, D, True, BD)
    token = tl.load(tokens + i_b * M + beam)
    tl.store(entry_ids + p_k, tl.maximum(token, 0) + first)
    at = level * K + i_k
    tl.store(entry_slots + p_k, k + at)
    tl.store(entry_positions + p_k, k + level)
    # [BW]
    o_w = tl.arange(0, BW)
    b_mask = tl.where(o_w == at // 32, 1 << (at % 32), 0)
    if HAS_MASK:
        p_m = mask + (i_r * W + above) * NW
        b_mask |= tl.load(p_m + o_w, mask=o_w < NW, other=0)
    tl.store(entry_mask + p_k * NW + o_w, b_mask, mask=o_w < NW)
    if i_r < B:
        tl.store(entry_scores + p_k, tl.load(scores + i_b * M + beam))
        # [BK]: a level's candidates begin behind those of the levels before
        o_k = tl.arange(0, BK)
        begin = tl.where(level > 0, K + (level - 1) * K * K, 0)
        b_beam = tl.full([BK], 0, tl.int32) + beam + begin
        tl.store(parents + p_k * K + o_k, b_beam, mask=o_k < K)


@triton.jit(do_not_specialize=("S", "B", "N", "NW", "room", "first"))
def tree_kernel(
    ids,
    known,
    lengths,
    skipping,
    tokens,
    depths,
    mask,
    entry_ids,
    entry_slots,
    entry_positions,
    entry_mask,
    chain,
    S,
    B,
    N,
    NW,
    room,
    first,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """Write entries `program_id(1) BT ...` of row `program_id(0)`; NW is of the tree's mask."""
    i_r = tl.program_id(0).to(tl.int64)
    i_b = i_r % B
    k = tl.load(known + i_r)
    n = tl.load(lengths + i_r)
    is_fed = (tl.load(skipping + i_b).to(tl.int32) == 0) & (k < S)
    count = tl.where(is_fed, k - 1 - n, -1)
    tl.store(chain + i_r, count, mask=tl.program_id(1) == 0)
    front = (room + 31) // 32
    # [BT]
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    m_t = o_t < room + N
    m_node = m_t & (o_t >= room)
    o_n = o_t - room
    b_depth = tl.load(depths + i_b * N + o_n, mask=m_node, other=-1)
    m_live = ((o_t < room) & (o_t < count)) | ((b_depth >= 0) & is_fed)
    b_behind = n + o_t
    b_position = tl.where(m_node, k - 1 + b_depth, b_behind)
    b_position = tl.minimum(tl.maximum(b_position, 0), S - 1)
    p_t = i_r * (room + N) + o_t
    # the root is a token of the row itself, and so is the chain
    m_own = m_live & (o_n <= 0)
    b_slot = tl.where(m_node, k - 1, b_behind)
    b_own = tl.load(ids + i_r * (S + 1) + b_slot, mask=m_own, other=0)
    b_token = tl.load(tokens + i_b * N + o_n, mask=m_live & (o_n > 0), other=0) + first
    b_id = tl.where(m_own, b_own, tl.where(m_live, b_token, 0))
    tl.store(entry_ids + p_t, tl.maximum(b_id, 0), mask=m_t)
    b_slot = tl.where(m_node, n + 32 * front + o_n, b_behind)
    tl.store(entry_slots + p_t, tl.where(m_live, b_slot, -1), mask=m_t)
    tl.store(entry_positions + p_t, tl.where(m_live, b_position, 0), mask=m_t)
    # [BT, BW]
    o_w = tl.arange(0, BW)[None, :]
    m_w = m_t[:, None] & (o_w < front + NW)
    b_seen = tl.where(m_node, count, o_t + 1)
    m_tree = m_node[:, None] & (o_w >= front) & (o_w < front + NW)
    p_m = mask + (i_b * N + o_n)[:, None] * NW + o_w - front
    b_tree = tl.load(p_m, mask=m_tree, other=0)
    b_mask = tl.where(o_w < front, _below(b_seen[:, None], o_w), b_tree)
    b_mask = tl.where(m_live[:, None], b_mask, 0)
    tl.store(entry_mask + p_t[:, None] * (front + NW) + o_w, b_mask, mask=m_w)


@triton.jit(do_not_specialize=("S", "B", "N", "P", "room", "prefix", "frame", "extra", "first"))
def commit_kernel(
    ids,
    features,
    known,
    lengths,
    drafted,
    tokens,
    path,
    counts,
    drawn,
    chain,
    out,
    moves,
    stride_pb,
    stride_pp,
    stride_cb,
    stride_wb,
    stride_or,
    stride_ot,
    stride_od,
    S,
    B,
    N,
    P,
    D,
    room,
    prefix,
    frame,
    extra,
    first,
    BD: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    HAS_OUT: tl.constexpr,
):
    """Commit row `program_id(0)`: its integers by program 0, its features by the others."""
    i_r = tl.program_id(0).to(tl.int64)
    i_b = i_r % B
    count = tl.load(counts + i_b * stride_cb).to(tl.int32)
    made = tl.maximum(count - 1, 0)
    length = tl.load(lengths + i_r)
    p_p = path + i_b * stride_pb
    waiting = -1
    if HAS_OUT:
        # a row without a distribution commits its -1, which is found when the frame is whole
        waiting = tl.load(chain + i_r)
        count = tl.where(waiting >= 0, tl.maximum(count, 1), 0)
        made = count
    if tl.program_id(1) == 0:
        k = tl.load(known + i_r)
        end = _end(k, S, prefix, frame, extra)
        # [BP]: the path below the root, and the drawn token right behind the accepted
        o_p = tl.arange(0, BP)
        b_node = tl.load(p_p + o_p.to(tl.int64) * stride_pp, mask=o_p < P, other=0)
        b_node = tl.minimum(tl.maximum(b_node, 0), N - 1)
        b_id = tl.load(tokens + i_b * N + b_node, mask=o_p < made, other=0) + first
        if HAS_OUT:
            token = tl.load(drawn + i_b * stride_wb)
            token = tl.where(token < 0, -1, token + first)
            b_id = tl.where(o_p == count - 1, token, b_id)
        # a token drawn behind a frame's last is none
        m_p = (o_p < made) & (o_p <= P) & (k + o_p < end)
        tl.store(ids + i_r * (S + 1) + k + o_p, b_id, mask=m_p)
        if HAS_OUT:
            # [BM]: offsets of chain, root and path
            o_m = tl.arange(0, BM)
            o_n = o_m - waiting
            m_n = (o_n > 0) & (o_n <= P)
            b_node = tl.load(p_p + (o_n - 1).to(tl.int64) * stride_pp, mask=m_n, other=0)
            b_node = tl.minimum(tl.maximum(b_node, 0), N - 1).to(tl.int32)
            b_move = tl.where(o_n < 0, o_m, b_node + (room + 31) // 32 * 32)
            b_move = tl.where(o_n < count, b_move, -1)
            p_m = moves + i_r * (room + 1 + P)
            tl.store(p_m + o_m, b_move, mask=o_m < room + 1 + P)
        after = tl.minimum(k + made, end)
        is_whole = (after == end) & (after < S)
        # all threads have read where the row was
        tl.debug_barrier()
        tl.store(known + i_r, tl.where(is_whole, after + extra, after))
        tl.store(drafted + i_r, length + 1)
    if HAS_OUT:
        i_m = tl.program_id(1) - 1
        beyond = i_m - waiting
        slot = length + i_m
        if (i_m >= 0) & (beyond < count) & (slot < S):
            is_node = (beyond > 0) & (beyond <= P)
            i_p = (beyond - 1).to(tl.int64)
            node = tl.load(p_p + i_p * stride_pp, mask=is_node, other=0)
            node = tl.minimum(tl.maximum(node, 0), N - 1) + room
            source = tl.where(beyond < 0, i_m, node).to(tl.int64)
            p_o = out + i_r * stride_or + source * stride_ot
            p_f = features + (i_r * (S + 1) + slot) * D
            _copy(p_f, p_o, stride_od, D, True, BD)
