"""Drafts, beams, trees and commits in every lane, against plain Python."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sdvg_kernels import (
    FrameLayout,
    TokenTree,
    TreeState,
    beam_entries,
    commit_tree_,
    draft_entries,
    tree_entries,
)
from sdvg_kernels.testing import Lane

UNKNOWN = 10**9


class Row(NamedTuple):
    """Where a sequence is."""

    known: int
    lengths: int
    drafted: int


# prefix 4, frames of 6 behind each other, or with 2 tokens between them
JOINED, APART = FrameLayout(4, 6, 0, 3), FrameLayout(4, 6, 2, 3)
SIZES = {JOINED: 22, APART: 26}
# the root alone, a chain, a chain that the drafter has seen little of, a frame's last token,
# behind a frame's end, a video that is whole (S is put in for -1)
ROWS = (Row(7, 6, 5), Row(9, 5, 6), Row(17, 12, 3), Row(9, 8, 8), Row(12, 7, 4), Row(-1, 20, 21))


def make(
    layout: FrameLayout,
    random: torch.Generator,
    *,
    copies: int = 2,
    rows: tuple[Row, ...] = ROWS,
    width: int = 5,
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
) -> TreeState:
    """Return a state: NaN in features that are missing, numbers that are no ids behind `known`."""
    size = SIZES[layout] if size is None else size
    rows = tuple(row._replace(known=size) if row.known < 0 else row for row in rows) * copies
    ids = torch.randint(-1, 30, (len(rows), size + 1), generator=random)
    features = torch.randn(len(rows), size + 1, width, generator=random).to(dtype)
    for r, row in enumerate(rows):
        ids[r, row.known :] = UNKNOWN
        features[r, row.lengths :] = math.nan
    places = (torch.tensor(part, dtype=torch.int32) for part in zip(*rows, strict=True))
    return TreeState(ids, features, *places)


def on(lane: Lane, parts: tuple[Tensor, ...]) -> list[Tensor]:
    """Return copies of tensors on the lane's device."""
    return [part.to(lane.device, copy=True) for part in parts]


def bits(mask: Tensor) -> list[list[set[int]]]:
    """Return which bits are set in words [R, T, W]."""
    return [
        [{32 * w + j for w, word in enumerate(entry) for j in range(32) if word >> j & 1}
         for entry in row]
        for row in mask.tolist()
    ]  # fmt: skip


def places(state: TreeState) -> list[list[int]]:
    """Return known, lengths and drafted of each row."""
    return torch.stack(state[2:], 1).tolist()


def end_of(known: int, layout: FrameLayout, size: int) -> int:
    """Return the slot behind the frame that the next token is in."""
    end = size
    if layout.extra:
        end = layout.prefix + layout.tokens
        while end + layout.extra <= known:
            end += layout.tokens + layout.extra
    return end


@pytest.mark.parametrize("layout", [JOINED, APART], ids=["joined", "apart"])
@pytest.mark.parametrize(
    ("copies", "room", "width", "dtype"),
    [(1, 15, 5, torch.float32), (2, 33, 3, torch.float64), (2, 4, 600, torch.bfloat16)],
)
def test_a_draft_begins_with_the_pairs_that_are_new(
    layout: FrameLayout,
    copies: int,
    room: int,
    width: int,
    dtype: torch.dtype,
    lane: Lane,
    random: torch.Generator,
) -> None:
    rows = ROWS if room == 15 else ROWS[1::2] if room == 4 else ROWS[2::2]
    state = make(layout, random, copies=copies, rows=rows, width=width, dtype=dtype)
    got = draft_entries(
        TreeState(*on(lane, state)), layout, room, implementation=lane.implementation
    )
    got = type(got)(*(part.cpu() for part in got))
    seen = bits(got.mask)
    for r, (known, lengths, drafted) in enumerate(places(state)):
        for t in range(room):
            slot = drafted + t
            if slot >= known:
                assert (int(got.slots[r, t]), int(got.ids[r, t]), seen[r][t]) == (-1, 0, set())
                assert not got.features[r, t].any()
                continue
            assert int(got.slots[r, t]) == slot
            assert int(got.ids[r, t]) == max(int(state.ids[r, slot]), 0)
            assert seen[r][t] == set(range(t + 1))
            # the chain's go on from those of as many tokens before
            of = slot - 1 if slot - 1 < lengths else slot - 1 - (known - 1 - lengths)
            assert torch.equal(got.features[r, t], state.features[r, max(of, 0)])
        size, step = state.ids.shape[1] - 1, layout.tokens + layout.extra
        assert int(got.last[r]) == min(known - 1 - drafted, room - 1)
        assert int(got.root[r]) == int(state.ids[r, known - 1])
        assert int(got.limit[r]) == end_of(known, layout, size) - known
        frame, place = divmod(known - layout.prefix, step)
        assert int(got.places[r]) == frame * layout.tokens + place


def test_masks_of_more_than_a_word(lane: Lane, random: torch.Generator) -> None:
    state = make(JOINED, random, copies=1, rows=(Row(45, 4, 3), Row(44, 11, 12)), size=70)
    mine, how = TreeState(*on(lane, state)), {"implementation": lane.implementation}
    drafted = bits(draft_entries(mine, JOINED, 42, **how).mask)
    assert drafted[0] == [set(range(t + 1)) for t in range(42)]
    assert drafted[1] == [set(range(t + 1)) if t < 32 else set() for t in range(42)]
    tree = TokenTree(*on(lane, trees(2, 3, random)))
    none = torch.zeros(2, dtype=torch.bool, device=lane.device)
    fed = bits(tree_entries(mine, JOINED, tree, none, 41, **how).mask)
    for line, chain in zip(fed, (40, 32), strict=True):
        before = [set(range(t + 1)) if t < chain else set() for t in range(41)]
        assert line[:42] == [*before, {*range(chain), 64}]


def test_a_prompt_of_one_token_has_no_tree(lane: Lane, random: torch.Generator) -> None:
    layout = FrameLayout(1, 6, 0, 0)
    state = make(layout, random, rows=(Row(1, 0, 1),), size=13)
    got = draft_entries(TreeState(*on(lane, state)), layout, 2, implementation=lane.implementation)
    assert got.limit.tolist() == [0, 0]
    assert got.slots.tolist() == [[-1, -1]] * 2
    assert got.last.tolist() == [0, 0]
    assert not got.features.any()


def test_features_are_copied_bit_for_bit(lane: Lane, random: torch.Generator) -> None:
    state = make(JOINED, random, width=4, dtype=torch.bfloat16)
    # NaN of all kinds, infinity, subnormals
    words = torch.tensor([0x7FC1, 0x7F81, -2, 1], dtype=torch.int16)
    state.features[0, :6] = words.view(torch.bfloat16)
    got = draft_entries(TreeState(*on(lane, state)), JOINED, 2, implementation=lane.implementation)
    assert torch.equal(got.features[0].cpu().view(torch.int16), words.expand(2, -1))


@pytest.mark.parametrize(
    ("copies", "width", "level", "words"),
    [(1, 3, 0, 1), (2, 4, 2, 2), (2, 16, 1, 3), (1, 1, 33, 2)],
)
def test_beams_stand_behind_what_they_continue(
    copies: int, width: int, level: int, words: int, lane: Lane, random: torch.Generator
) -> None:
    batch, above, first = 3, width if level else 1, 7
    known = torch.tensor([5, 9, 30] * copies, dtype=torch.int32)
    tokens = torch.randint(-1, 6, (batch, above * width), generator=random)
    scores = torch.randn(batch, above * width, generator=random)
    scores[tokens < 0] = -math.inf
    order = torch.rand(batch, above * width, generator=random).argsort(1)
    beams = order[:, :width].int().contiguous()
    # of any strides
    features = torch.randn(above, batch * copies, 2 * 9, generator=random).transpose(0, 1)[..., ::2]
    mask = None
    if level:
        mask = torch.randint(-(2**31), 2**31, (batch * copies, above, words), generator=random)
        mask = mask.int()
        # their own are set by the op alone
        at = level * width + torch.arange(width)
        for bit in at.tolist():
            mask[..., bit // 32] &= ~torch.tensor(
                1 << 31 if bit % 32 == 31 else 1 << bit % 32
            ).int()
    given = (known, tokens, scores, beams, features)
    got = beam_entries(
        *on(lane, given), None if mask is None else mask.to(lane.device), level=level, words=words,
        first=first, implementation=lane.implementation,
    )  # fmt: skip
    got = type(got)(*(part.cpu() for part in got))
    begin = width + (level - 1) * width**2 if level else 0
    seen, saw = bits(got.mask), None if mask is None else bits(mask)
    for r in range(batch * copies):
        for k in range(width):
            beam = int(beams[r % batch, k])
            parent, at = beam // width, level * width + k
            assert int(got.ids[r, k]) == max(int(tokens[r % batch, beam]), 0) + first
            assert torch.equal(got.features[r, k], features[r, parent])
            assert int(got.slots[r, k]) == int(known[r]) + at
            assert int(got.positions[r, k]) == int(known[r]) + level
            assert seen[r][k] == {at} | (saw[r][parent] if saw else set())
            if r < batch:
                assert got.scores[r, k] == scores[r, beam]
                children = got.parents[r, k * width : (k + 1) * width]
                assert children.tolist() == [begin + beam] * width


def trees(batch: int, nodes: int, random: torch.Generator) -> TokenTree:
    """Return trees of which the last are padded."""
    parents = torch.tensor([-1] + [(i - 1) // 2 for i in range(1, nodes)])
    made = TokenTree.from_parents(torch.randint(20, (batch, nodes), generator=random), parents)
    short = max(1, nodes - 2)
    made.depths[-1, short:] = -1
    made.mask[-1, short:] = 0
    return made


@pytest.mark.parametrize(
    ("copies", "room", "nodes"), [(1, 0, 9), (2, 4, 9), (2, 33, 40), (1, 31, 1)]
)
def test_a_pass_is_fed_the_chain_and_the_tree(
    copies: int, room: int, nodes: int, lane: Lane, random: torch.Generator
) -> None:
    layout = APART
    rows = ROWS if room else (ROWS[0], ROWS[3], ROWS[5])
    state = make(layout, random, copies=copies, rows=rows)
    batch, size, base = len(rows), SIZES[layout], 32 * -(-room // 32)
    tree = trees(batch, nodes, random)
    skipping = torch.arange(batch) == 1
    got = tree_entries(
        TreeState(*on(lane, state)), layout, TokenTree(*on(lane, tree)), skipping.to(lane.device),
        room, implementation=lane.implementation,
    )  # fmt: skip
    got = type(got)(*(part.cpu() for part in got))
    seen, sees = bits(got.mask), bits(tree.mask)
    assert got.mask.shape == (batch * copies, room + nodes, base // 32 + tree.mask.shape[2])
    for r, (known, lengths, _) in enumerate(places(state)):
        b, fed = r % batch, not skipping[r % batch] and known < size
        chain = known - 1 - lengths if fed else -1
        assert int(got.chain[r]) == chain
        for t in range(room + nodes):
            node = t - room
            found = (int(got.slots[r, t]), int(got.positions[r, t]), int(got.ids[r, t]), seen[r][t])
            if 0 <= t < min(chain, room):
                token = max(int(state.ids[r, lengths + t]), 0)
                assert found == (lengths + t, lengths + t, token, set(range(t + 1)))
            elif fed and node >= 0 and tree.depths[b, node] >= 0:
                token = int(tree.tokens[b, node]) + layout.first
                if node == 0:
                    token = max(int(state.ids[r, known - 1]), 0)
                place = min(known - 1 + int(tree.depths[b, node]), size - 1)
                own = set(range(chain)) | {base + j for j in sees[b][node]}
                assert found == (lengths + base + node, place, token, own)
            else:
                assert found == (-1, 0, 0, set())


def committed(
    state: TreeState,
    layout: FrameLayout,
    tokens: Tensor,
    path: Tensor,
    counts: Tensor,
    drawn: Tensor | None,
    chain: Tensor | None,
    out: Tensor | None,
) -> list[list[int]]:
    """Commit in plain Python, in place, and return the moves."""
    batch, nodes = tokens.shape
    size, moves = state.ids.shape[1] - 1, []
    for r in range(len(state.ids)):
        b, known, length = r % batch, int(state.known[r]), int(state.lengths[r])
        count = int(counts[b])
        if out is not None:
            count = max(count, 1) if chain[r] >= 0 else 0
        kept = path[b, : max(count - 1, 0)].tolist()
        ids = [int(tokens[b, node]) + layout.first for node in kept]
        if out is not None and count:
            ids.append(int(drawn[b]) + layout.first if drawn[b] >= 0 else -1)
        end = end_of(known, layout, size)
        after = min(known + len(ids), end)
        state.ids[r, known:after] = torch.tensor(ids)[: after - known]
        whole = bool(ids) and after == end and after < size
        state.known[r] = after + layout.extra if whole else after
        state.drafted[r] = length + 1
        line = []
        if out is not None:
            room = out.shape[1] - nodes
            if count:
                waiting = int(chain[r])
                line = list(range(waiting)) + [32 * -(-room // 32) + node for node in (0, *kept)]
                entries = list(range(waiting)) + [room + node for node in (0, *kept)]
                state.features[r, length : length + len(line)] = out[r, entries]
            line += [-1] * (room + 1 + path.shape[1] - len(line))
        moves.append(line)
    return moves


def case(
    layout: FrameLayout,
    random: torch.Generator,
    *,
    copies: int = 2,
    room: int = 5,
    rows: tuple[Row, ...] = ROWS,
    width: int = 5,
    dtype: torch.dtype = torch.float32,
) -> tuple[TreeState, tuple[Tensor, ...]]:
    """Return a state, and what a verification gives; NaN where nothing is kept."""
    state = make(layout, random, copies=copies, rows=rows, width=width, dtype=dtype)
    batch, nodes, levels = len(rows), 15, 3
    tokens = torch.randint(20, (batch, nodes), generator=random)
    # a root alone, whole paths, a row without a distribution, one that ends in it, one not fed
    counts = torch.tensor([1, 3, 4, 2, 0, 4], dtype=torch.int32)[:batch]
    path = torch.tensor([[1, 3, 7], [2, 6, 13], [2, 5, 11]])[torch.arange(batch) % 3]
    path = torch.where(torch.arange(levels) < counts[:, None] - 1, path, -1)
    drawn = torch.tensor([4, 9, -1, 2, -1, 6])[:batch]
    fed = (state.known < SIZES[layout]) & (torch.arange(batch * copies) % batch != 1)
    chain = torch.where(fed, state.known - 1 - state.lengths, -1).int()
    out = torch.full((batch * copies, room + nodes, width), math.nan, dtype=dtype)
    for r in range(batch * copies):
        kept = [room, *(room + n for n in path[r % batch].tolist() if n >= 0)]
        entries = [*range(max(int(chain[r]), 0)), *kept]
        out[r, entries] = torch.randn(len(entries), width, generator=random).to(dtype)
    return state, (tokens, path, counts, drawn, chain, out)


def strided(path: Tensor, counts: Tensor, drawn: Tensor, out: Tensor) -> list[Tensor]:
    """Return the same as views into something larger, as int32 where there is a choice."""
    wide = torch.full((len(path), 2 * path.shape[1] + 1), 99, dtype=torch.int32)
    wide[:, 1::2] = path
    around = out.new_full((out.shape[1], len(out), 2 * out.shape[2]), math.nan)
    around[..., ::2] = out.transpose(0, 1)
    both = torch.stack((counts.long(), drawn), 1)
    return [wide[:, 1::2], both[:, 0], both[:, 1], around.transpose(0, 1)[..., ::2]]


@pytest.mark.parametrize("layout", [JOINED, APART], ids=["joined", "apart"])
@pytest.mark.parametrize(
    ("copies", "room", "width", "dtype"),
    [(2, 5, 5, torch.float32), (1, 33, 3, torch.float64), (1, 5, 600, torch.bfloat16)],
)
def test_a_pass_commits_its_path_and_the_drawn_token(
    layout: FrameLayout,
    copies: int,
    room: int,
    width: int,
    dtype: torch.dtype,
    lane: Lane,
    random: torch.Generator,
) -> None:
    state, given = case(layout, random, copies=copies, room=room, width=width, dtype=dtype)
    tokens, path, counts, drawn, chain, out = given
    want = TreeState(*(part.clone() for part in state))
    moves = committed(want, layout, *given)
    if room == 33:
        path, counts, drawn, out = strided(path, counts, drawn, out)
    tokens, chain = on(lane, (tokens, chain))
    path, counts, drawn, out = (part.to(lane.device) for part in (path, counts, drawn, out))
    mine = TreeState(*on(lane, state))
    got = commit_tree_(
        mine, layout, tokens, path, counts, drawn=drawn, chain=chain, out=out,
        implementation=lane.implementation,
    )  # fmt: skip
    assert got.tolist() == moves
    assert_state(mine, want)


def assert_state(got: TreeState, want: TreeState) -> None:
    """Assert that both hold the same, but for what went nowhere; NaN is NaN."""
    size = want.ids.shape[1] - 1
    for name, one, other in zip(TreeState._fields, got, want, strict=True):
        one, other = one.cpu(), other.cpu()
        if name in ("ids", "features"):
            one, other = one[:, :size], other[:, :size]
        assert torch.equal(torch.nan_to_num(one, 7e4), torch.nan_to_num(other, 7e4)), name


@pytest.mark.parametrize("layout", [JOINED, APART], ids=["joined", "apart"])
def test_a_skipped_step_commits_tokens_alone(
    layout: FrameLayout, lane: Lane, random: torch.Generator
) -> None:
    state, (tokens, path, counts, *_) = case(layout, random)
    want = TreeState(*(part.clone() for part in state))
    committed(want, layout, tokens, path, counts, None, None, None)
    mine = TreeState(*on(lane, state))
    got = commit_tree_(
        mine, layout, *on(lane, (tokens, path, counts)), implementation=lane.implementation
    )
    assert got.shape == (len(state.ids), 0)
    assert_state(mine, want)


def test_programs_commit_in_any_order(
    lane: Lane, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lane.name != "interpreter":
        pytest.skip("only the interpreter's programs run in a known order")
    state, (tokens, path, counts, drawn, chain, out) = case(APART, random, copies=1)
    module = importlib.import_module("triton.runtime.interpreter")
    builder = module.interpreter_builder
    place, many = builder.set_grid_idx, out.shape[1] - tokens.shape[1] + 2 + path.shape[1]
    found = []
    for turned in (0, 1):
        mine = TreeState(*(part.clone() for part in state))
        with monkeypatch.context() as patch:
            if turned:
                patch.setattr(builder, "set_grid_idx", lambda x, y, z: place(x, many - 1 - y, z))
            moves = commit_tree_(
                mine, APART, tokens, path, counts, drawn=drawn, chain=chain, out=out,
                implementation="triton",
            )  # fmt: skip
        found.append((mine, moves))
    assert torch.equal(found[0][1], found[1][1])
    assert_state(found[0][0], found[1][0])


def test_nothing_is_no_error(lane: Lane) -> None:
    layout, how = JOINED, {"implementation": lane.implementation}
    make = {"device": lane.device}
    small = [torch.empty(0, dtype=torch.int32, **make) for _ in range(3)]
    state = TreeState(
        torch.empty(0, 9, dtype=torch.int64, **make), torch.empty(0, 9, 4, **make), *small
    )
    assert draft_entries(state, layout, 3, **how).features.shape == (0, 3, 4)
    tokens, scores = torch.empty(0, 4, dtype=torch.int64, **make), torch.empty(0, 4, **make)
    beams, features = torch.empty(0, 2, dtype=torch.int32, **make), torch.empty(0, 2, 4, **make)
    mask = torch.empty(0, 2, 1, dtype=torch.int32, **make)
    got = beam_entries(small[0], tokens, scores, beams, features, mask, level=1, words=1, **how)
    assert got.parents.shape == (0, 4)
    tree = TokenTree.from_parents(tokens[:, :3], torch.tensor([-1, 0, 0]))
    flags = torch.empty(0, dtype=torch.bool, **make)
    assert tree_entries(state, layout, tree, flags, 2, **how).mask.shape == (0, 5, 2)
    path = torch.empty(0, 2, dtype=torch.int32, **make)
    moves = commit_tree_(
        state, layout, tree.tokens, path, small[0], drawn=tree.tokens[:, 0], chain=small[1],
        out=torch.empty(0, 5, 4, **make), **how,
    )  # fmt: skip
    assert moves.shape == (0, 5)
    assert commit_tree_(state, layout, tree.tokens, path, small[0], **how).shape == (0, 0)


def test_opcheck() -> None:
    ops, random = torch.ops.sdvg_kernels, torch.Generator().manual_seed(0)
    state, given = case(APART, random)
    state = TreeState(*(torch.nan_to_num(part) for part in state))
    given = [torch.nan_to_num(part) for part in given]
    layout = list(APART)
    torch.library.opcheck(ops.draft_entries, (*state, layout, 6, "reference"))
    torch.library.opcheck(ops.commit_tree_, (*state, *given, layout, "reference"))
    tree, skipping = trees(6, 9, random), torch.zeros(6, dtype=torch.bool)
    fields = (tree.tokens, tree.depths, tree.mask)
    torch.library.opcheck(
        ops.tree_entries,
        (state.ids, state.known, state.lengths, skipping, *fields, 5, 3, "reference"),
    )
    torch.library.opcheck(
        ops.beam_entries,
        (
            state.known[:4], tree.tokens[:2, :4].contiguous(), torch.randn(2, 4),
            torch.tensor([[3, 0], [2, 1]], dtype=torch.int32), torch.randn(4, 2, 5),
            torch.zeros(4, 2, 1, dtype=torch.int32), 1, 1, 0, "reference",
        ),
    )  # fmt: skip


def _state(**change: Tensor) -> TreeState:
    return make(JOINED, torch.Generator().manual_seed(0))._replace(**change)


_TREE = trees(6, 9, torch.Generator().manual_seed(0))
_SKIPPING = torch.zeros(6, dtype=torch.bool)
_BEAMS = {
    "known": torch.ones(4, dtype=torch.int32),
    "tokens": torch.zeros(2, 4, dtype=torch.int64),
    "scores": torch.zeros(2, 4),
    "beams": torch.zeros(2, 2, dtype=torch.int32),
    "features": torch.zeros(4, 2, 3),
    "mask": torch.zeros(4, 2, 1, dtype=torch.int32),
    "level": 1,
    "words": 1,
}
_COMMIT = {
    "tokens": _TREE.tokens,
    "path": torch.zeros(6, 3, dtype=torch.int32),
    "counts": torch.ones(6, dtype=torch.int32),
}
_SEEN = {
    "drawn": torch.zeros(6, dtype=torch.int64),
    "chain": torch.zeros(12, dtype=torch.int32),
    "out": torch.zeros(12, 11, 5),
}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: draft_entries(_state(ids=torch.zeros(12, dtype=torch.int64)), JOINED, 3),
            ValueError,
            "draft_entries: state.ids must be [R, S + 1] with S >= 1, got [12]",
        ),
        (
            lambda: draft_entries(_state(features=torch.zeros(12, 22, 5)), JOINED, 3),
            ValueError,
            "draft_entries: state.features must be [R, S + 1, width] like ids, got [12, 22, 5]",
        ),
        (
            lambda: draft_entries(_state(known=torch.zeros(12)), JOINED, 3),
            TypeError,
            "draft_entries: state.known must be torch.int32, got torch.float32",
        ),
        (
            lambda: draft_entries(
                _state(lengths=torch.zeros(24, dtype=torch.int32)[::2]), JOINED, 3
            ),
            ValueError,
            "draft_entries: state.lengths must be [12], contiguous, got [12] with strides [2]",
        ),
        (
            lambda: draft_entries(
                _state(drafted=torch.zeros(12, dtype=torch.int32, device="meta")), JOINED, 3
            ),
            ValueError,
            "draft_entries: state.drafted must be on cpu, got meta",
        ),
        (
            lambda: draft_entries(_state(), FrameLayout(4, 0, 1, 0), 3),
            ValueError,
            "draft_entries: layout must hold tokens >= 1 and nothing below 0, got (4, 0, 1, 0)",
        ),
        (
            lambda: draft_entries(_state(), JOINED, 0),
            ValueError,
            "draft_entries: room must lie in [1, 1024], got 0",
        ),
        (
            lambda: draft_entries(_state(), JOINED, 3, implementation="cuda"),
            ValueError,
            "draft_entries: implementation must be one of 'reference', 'triton', got 'cuda'",
        ),
        (
            lambda: beam_entries(**_BEAMS | {"known": torch.ones(3, dtype=torch.int32)}),
            ValueError,
            "beam_entries: beams must be of a number of sequences that divides 3 rows, got 2",
        ),
        (
            lambda: beam_entries(**_BEAMS | {"tokens": torch.zeros(2, 3, dtype=torch.int64)}),
            ValueError,
            "beam_entries: tokens must be [B, W * K] with W >= 1, got [2, 3]",
        ),
        (
            lambda: beam_entries(**_BEAMS | {"features": torch.zeros(4, 1, 3)}),
            ValueError,
            "beam_entries: features must be [R, W, width] with R = 4, W = 2, got [4, 1, 3]",
        ),
        (
            lambda: beam_entries(**_BEAMS | {"level": 16}),
            ValueError,
            "beam_entries: words must hold 34 bits, got 1",
        ),
        (
            lambda: beam_entries(**_BEAMS | {"mask": None}),
            ValueError,
            "beam_entries: mask must be given after level 0, got None",
        ),
        (
            lambda: tree_entries(_state(), JOINED, _TREE, _SKIPPING.int(), 3),
            TypeError,
            "tree_entries: skipping must be torch.bool, got torch.int32",
        ),
        (
            lambda: tree_entries(_state(), JOINED, _TREE, _SKIPPING, 1016),
            ValueError,
            "tree_entries: room must lie in [0, 1015], got 1016",
        ),
        (
            lambda: tree_entries(
                _state(), JOINED, TokenTree(*(part[:5] for part in _TREE)), _SKIPPING, 3
            ),
            ValueError,
            "tree_entries: tree must be of a number of sequences that divides 12 rows, got 5",
        ),
        (
            lambda: commit_tree_(_state(), JOINED, **_COMMIT | {"path": torch.zeros(6, 3)}),
            TypeError,
            "commit_tree_: path must be int32 or int64, got torch.float32",
        ),
        (
            lambda: commit_tree_(_state(), JOINED, **_COMMIT | {"counts": _SEEN["drawn"][:5]}),
            ValueError,
            "commit_tree_: counts must be [B] with B = 6, got [5]",
        ),
        (
            lambda: commit_tree_(_state(), JOINED, **_COMMIT, out=_SEEN["out"]),
            ValueError,
            "commit_tree_: drawn, chain and out must come together, got 1 of them",
        ),
        (
            lambda: commit_tree_(
                _state(), JOINED, **_COMMIT, **_SEEN | {"out": _SEEN["out"].double()}
            ),
            TypeError,
            "commit_tree_: out must be torch.float32 like the features, got torch.float64",
        ),
        (
            lambda: commit_tree_(
                _state(), JOINED, **_COMMIT, **_SEEN | {"out": torch.zeros(12, 8, 5)}
            ),
            ValueError,
            "commit_tree_: out must be [12, room + 9, 5], at most 1024 entries, got [12, 8, 5]",
        ),
    ],
)
def test_what_cannot_be_gets_one_sentence(
    call: Callable[[], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.gpu
def test_rows_lie_past_2_to_the_31() -> None:
    random, rows = torch.Generator().manual_seed(0), (Row(1100, 1095, 1095),)
    size, width = 1_100_000, 2048
    state = make(JOINED, random, rows=rows, copies=1, size=1200, width=width, dtype=torch.bfloat16)
    wide = TreeState(
        torch.zeros(2, size + 1, dtype=torch.int64, device="cuda"),
        torch.zeros(2, size + 1, width, dtype=torch.bfloat16, device="cuda"),
        *(part.repeat(2).cuda() for part in state[2:]),
    )
    wide.ids[1, :1201], wide.features[1, :1201] = state.ids[0].cuda(), state.features[0].cuda()
    got = draft_entries(wide, JOINED, 7)
    want = draft_entries(state, JOINED, 7)
    assert torch.equal(got.features[1].cpu(), want.features[0])
    assert torch.equal(got.ids[1].cpu(), want.ids[0])


@pytest.mark.gpu
def test_a_graph_replays_a_step_on_a_new_state() -> None:
    random = torch.Generator().manual_seed(0)
    states, givens = zip(*(case(APART, random, room=5) for _ in range(3)), strict=True)
    state, given = TreeState(*(x.cuda() for x in states[0])), [x.cuda() for x in givens[0]]
    tree = TokenTree(*(part.cuda() for part in trees(6, 15, random)))
    skipping = torch.zeros(6, dtype=torch.bool, device="cuda")
    scores = torch.randn(6, 9, device="cuda")
    beams = torch.arange(18, dtype=torch.int32, device="cuda").view(6, 3) % 9

    def step(implementation: str) -> list[Tensor]:
        how = {"implementation": implementation}
        drafted = draft_entries(state, APART, 14, **how)
        own = drafted.mask[:, :3].contiguous()
        grown = beam_entries(
            state.known, given[0][:, :9].contiguous(), scores, beams, drafted.features[:, :3], own,
            level=1, words=1, **how,
        )  # fmt: skip
        fed = tree_entries(state, APART, tree, skipping, 5, **how)
        moves = commit_tree_(
            state, APART, *given[:3], drawn=given[3], chain=given[4], out=given[5], **how
        )
        size = state.ids.shape[1] - 1
        after = [state.ids[:, :size], state.features[:, :size], *state[2:]]
        return [torch.nan_to_num(x) for x in (*drafted, *grown, *fed, moves, *after)]

    step("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step("triton")
    for one, other in zip(states, givens, strict=True):
        expected: list[Tensor] = []
        for run in (lambda: step("reference"), graph.replay):
            for mine, new in zip((*state, *given), (*one, *other), strict=True):
                mine.copy_(new)
            expected = run() or expected
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)
