"""expand_tree, build_tree and TokenTree in every lane, against plain Python over lists."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import torch
from torch import Tensor

from sdvg_kernels import TokenTree, build_tree, expand_tree
from sdvg_kernels.testing import Lane, assert_within_budget


def _on(lane: Lane, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(lane.device) for tensor in tensors]


def _chosen(
    tokens: list[int], scores: list[float], parents: list[int], size: int, limit: int | None
) -> list[int]:
    """Choose candidates as the contract says."""
    depths: dict[int, int] = {}
    for i, (token, score, parent) in enumerate(zip(tokens, scores, parents, strict=True)):
        if token >= 0 and math.isfinite(score) and (parent == -1 or parent in depths):
            depths[i] = 1 if parent == -1 else depths[parent] + 1
    fits = [i for i, depth in depths.items() if limit is None or depth <= limit]
    best = sorted(fits, key=lambda i: (-scores[i], i))[: size - 1]
    kept: list[int] = []
    for i in sorted(best):
        if parents[i] == -1 or parents[i] in kept:
            kept.append(i)
    return kept


def _tree(
    root: int, tokens: list[int], parents: list[int], kept: list[int], size: int
) -> dict[str, list]:
    """Return the fields of a tree by their words: the mask as lists of bools."""
    node = {-1: 0, **{i: n for n, i in enumerate(kept, 1)}}
    above = [-1, *(node[parents[i]] for i in kept)]
    count = len(above)
    lines = []
    for n in range(count):
        line = [n]
        while above[line[-1]] >= 0:
            line.append(above[line[-1]])
        lines.append(line)
    children = [[c for c in range(count) if above[c] == n] for n in range(count)]
    siblings = [
        [c for c in range(n + 1, count) if n and above[c] == above[n]] for n in range(count)
    ]
    rest = [-1] * (size - count)
    return {
        "tokens": [root, *(tokens[i] for i in kept)] + [0] * (size - count),
        "parents": above + rest,
        "first_child": [min(c, default=-1) for c in children] + rest,
        "next_sibling": [min(s, default=-1) for s in siblings] + rest,
        "depths": [len(line) - 1 for line in lines] + rest,
        "mask": [[j in line for j in range(size)] for line in lines]
        + [[False] * size] * (size - count),
    }


def _words(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, size: int, limit: Tensor | None
) -> list[dict[str, list]]:
    """Build each sequence's tree in plain Python."""
    expected = []
    for b in range(len(root)):
        lists = [tensor[b].tolist() for tensor in (tokens, scores, parents)]
        kept = _chosen(*lists, size, None if limit is None else int(limit[b]))
        expected.append(_tree(int(root[b]), lists[0], lists[2], kept, size))
    return expected


def _assert_trees(trees: TokenTree, expected: list[dict[str, list]]) -> None:
    size = trees.tokens.shape[1]
    assert trees.tokens.dtype == torch.int64
    assert {field.dtype for field in trees[1:]} == {torch.int32}
    assert trees.mask.shape == (len(expected), size, -(-size // 32))
    node = torch.arange(size)
    bits = trees.mask.cpu()[:, :, node // 32] >> (node % 32) & 1
    # bits past the last node are 0
    words = (bits.long() << node % 32).split(32, 2)
    whole = torch.stack([word.sum(2) for word in words], 2)
    assert torch.equal(whole, trees.mask.cpu().long() & 0xFFFFFFFF)
    for name in TokenTree._fields:
        got = bits.bool() if name == "mask" else getattr(trees, name).cpu()
        assert got.tolist() == [one[name] for one in expected], name


def _candidates(batch: int, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates in levels, a child below its parent by a little or nothing."""
    tokens = torch.randint(0, 1000, (batch, count), generator=random)
    parents = torch.full((batch, count), -1, dtype=torch.int32)
    scores = -torch.randint(0, 5, (batch, count), generator=random).float() / 2
    for i in range(1, count):
        lowest = max(-1, i // 3 - 4)
        parents[:, i] = torch.randint(lowest, i // 3, (batch,), generator=random)
        above = scores.gather(1, parents[:, i : i + 1].clamp(min=0).long())[:, 0]
        scores[:, i] += torch.where(parents[:, i] >= 0, above, 0)
    return tokens, scores, parents


@pytest.mark.parametrize(
    ("count", "size"), [(1, 2), (40, 1), (40, 17), (90, 59), (20, 33), (300, 128)]
)
@pytest.mark.parametrize("limited", [False, True])
def test_the_tree_is_that_of_the_words(
    count: int, size: int, limited: bool, lane: Lane, random: torch.Generator
) -> None:
    tokens, scores, parents = _candidates(3, count, random)
    root = torch.tensor([5, 6, 7])
    limit = torch.tensor([2, 0, 4], dtype=torch.int32) if limited else None
    trees = build_tree(
        *_on(lane, root, tokens, scores, parents),
        size=size,
        limit=None if limit is None else limit.to(lane.device),
        implementation=lane.implementation,
    )
    _assert_trees(trees, _words(root, tokens, scores, parents, size, limit))


def test_parents_are_chosen_with_their_children(lane: Lane, random: torch.Generator) -> None:
    # ties throughout: a child scores as much as its parent
    _, _, parents = _candidates(2, 80, random)
    scores = torch.zeros(2, 80)
    tokens = torch.arange(80).expand(2, -1)
    for size in (2, 30, 81, 128):
        given = _on(lane, torch.tensor([80, 81]), tokens, scores, parents)
        trees = build_tree(*given, size=size, implementation=lane.implementation)
        count = min(size, 81)
        assert torch.equal(trees.tokens[:, 1:count].cpu(), tokens[:, : count - 1])
        assert (trees.depths[:, :count] >= 0).all()
        assert (trees.depths[:, count:] == -1).all()


def test_candidates_that_are_none_are_left_out(lane: Lane, random: torch.Generator) -> None:
    tokens, scores, parents = _candidates(8, 60, random)
    bad = torch.rand(8, 60, generator=random) < 0.1
    tokens[0].masked_fill_(bad[0], -1)
    scores[1].masked_fill_(bad[1], math.nan)
    scores[2].masked_fill_(bad[2], math.inf)
    scores[3].masked_fill_(bad[3], -math.inf)
    # parents that come later, cycles among them, and places that do not exist
    parents[4].masked_fill_(bad[4], 59)
    parents[5] = torch.randint(-3, 70, (60,), generator=random)
    parents[6] = torch.tensor([2**31 - 1, -(2**31), 60]).repeat(20)
    # children that score more than their parents
    scores[7] = -torch.rand(60, generator=random)
    root = torch.arange(8)
    for limit in (None, torch.full((8,), 3, dtype=torch.int32)):
        trees = build_tree(
            *_on(lane, root, tokens, scores, parents),
            size=25,
            limit=None if limit is None else limit.to(lane.device),
            implementation=lane.implementation,
        )
        _assert_trees(trees, _words(root, tokens, scores, parents, 25, limit))


def test_candidates_of_any_strides_and_integers_are_read(
    lane: Lane, random: torch.Generator
) -> None:
    tokens, scores, parents = _candidates(3, 50, random)
    root, limit = torch.tensor([3, 1, 2]), torch.tensor([3, 9, 2])
    wide = torch.full((100, 6), math.nan, device=lane.device)
    strided = wide.T[::2, 1:100:2].copy_(scores)
    columns = torch.stack((tokens.T, parents.T.long()), 1).to(lane.device)
    pairs = torch.stack((root, limit), 1).to(lane.device)
    trees = build_tree(
        pairs[:, 0].int(),
        columns[:, 0].T,
        strided,
        columns[:, 1].T,
        size=40,
        limit=pairs[:, 1],
        implementation=lane.implementation,
    )
    _assert_trees(trees, _words(root, tokens, scores, parents, 40, limit))


@pytest.mark.parametrize(("batch", "count"), [(0, 5), (2, 0)])
def test_no_candidates_and_no_sequences(batch: int, count: int, lane: Lane) -> None:
    made = [torch.zeros(batch, count, dtype=kind) for kind in (torch.int64, torch.float32)]
    given = _on(lane, torch.full((batch,), 9), *made, made[0].int())
    trees = build_tree(*given, size=3, implementation=lane.implementation)
    _assert_trees(trees, [_tree(9, [], [], [], 3)] * batch)
    logits = torch.zeros(0, 2, 7, device=lane.device)
    children = expand_tree(logits, top_k=3, implementation=lane.implementation)
    assert [tensor.shape for tensor in children] == [(0, 6), (0, 6), (0, 3)]


def _children(
    logits: Tensor,
    above: Tensor | None,
    top_k: int,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return tokens and scores [B, W * K] by the words of the contract."""
    x = logits.float()
    if uncond is not None:
        x = uncond.float() + torch.tensor(guidance) * (x - uncond.float())
    tokens = x.sort(dim=2, descending=True, stable=True).indices[:, :, :top_k]
    scores = (x.to(dtype) / temperature).log_softmax(2).gather(2, tokens)
    if above is not None:
        scores = scores + above[:, :, None].to(dtype)
    return tokens.flatten(1), scores.flatten(1)


# one in each launch, and rows of several tiles: 9001 that are not aligned, 9008 of 32 bits, 20000
@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        (337, torch.float32),
        (4001, torch.float16),
        (8192, torch.float32),
        (9008, torch.float32),
        (9001, torch.bfloat16),
        (16384, torch.bfloat16),
        (20000, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("guided", [False, True])
def test_children_are_the_likeliest_tokens(
    vocabulary: int, dtype: torch.dtype, guided: bool, lane: Lane, random: torch.Generator
) -> None:
    shape = (2, 2, vocabulary)
    logits, uncond = ((3 * torch.randn(shape, generator=random)).to(dtype) for _ in range(2))
    # the best come one after another, and from the last of several tiles
    logits[0, 1, -5:] = torch.tensor([31.0, 32.0, 30.0, 32.0, 33.0])
    above = torch.randn(2, 2, generator=random)
    options = {"top_k": 7, "temperature": 0.7}
    if guided:
        options |= {"uncond": uncond, "guidance": 3.0}
    given = {k: v.to(lane.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    tokens, scores, beams = expand_tree(
        *_on(lane, logits, above), **given, implementation=lane.implementation
    )
    expected, exact = _children(logits, above, **options)
    assert torch.equal(tokens.cpu(), expected)
    _, plain = _children(logits, above, **options, dtype=torch.float32)
    assert_within_budget(scores.cpu(), plain, exact)
    best = scores.cpu().sort(dim=1, descending=True, stable=True).indices[:, :7]
    assert torch.equal(beams.cpu(), best.int())
    # no child scores more than its beam
    assert (scores.cpu().view(2, 2, 7) <= above[:, :, None]).all()


def test_of_equal_tokens_and_candidates_the_first_comes(lane: Lane) -> None:
    logits = torch.zeros(1, 3, 20000, device=lane.device)
    logits[0, 1, [17, 12345, 19999]] = 2
    tokens, scores, beams = expand_tree(logits, top_k=4, implementation=lane.implementation)
    assert tokens.tolist() == [[0, 1, 2, 3, 17, 12345, 19999, 0, 0, 1, 2, 3]]
    assert beams.tolist() == [[4, 5, 6, 0]]
    for beam in (scores[0, :4], scores[0, 4:7], scores[0, 8:]):
        assert (beam == beam[0]).all()


# 288 candidates are merged in another way than 128
@pytest.mark.parametrize(("beams", "top_k"), [(1, 16), (18, 16), (13, 9)])
def test_beams_are_the_best_of_all_candidates(
    beams: int, top_k: int, lane: Lane, random: torch.Generator
) -> None:
    logits = torch.randn(1, beams, 40, generator=random)
    # beams like others, so that scores are tied
    logits[:, beams // 2 :] = logits[:, : beams - beams // 2].clone()
    tokens, scores, best = expand_tree(
        logits.to(lane.device), top_k=top_k, implementation=lane.implementation
    )
    assert torch.equal(tokens.cpu(), _children(logits, None, top_k)[0])
    order = scores.cpu().sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(best.cpu(), order[:, :top_k].int())


def test_a_place_without_a_child_is_marked(lane: Lane) -> None:
    logits = torch.zeros(7, 2, 1030, device=lane.device)
    above = torch.zeros(7, 2, device=lane.device)
    logits[0, 0, 1029] = math.nan
    logits[1, 0, 3] = math.inf
    logits[2, 0] = -math.inf
    logits[3, 0, 2:] = -math.inf
    above[4, 0], above[5, 0], above[6, 0] = math.nan, math.inf, -math.inf
    tokens, scores, beams = expand_tree(logits, above, top_k=3, implementation=lane.implementation)
    none, some = [-1, -1, -1], [0, 1, 2]
    for b in (0, 1, 2, 4, 5, 6):
        assert tokens[b].tolist() == none + some
        assert beams[b].tolist() == [3, 4, 5]
    assert tokens[3].tolist() == [0, 1, -1, *some]
    # of two tokens each has half of the mass
    assert beams[3].tolist() == [0, 1, 3]
    assert torch.equal(scores.isinf(), tokens < 0)
    assert not scores.isnan().any()
    # a vocabulary of fewer than K
    tokens, scores, beams = expand_tree(
        torch.zeros(1, 2, 3, device=lane.device), top_k=5, implementation=lane.implementation
    )
    assert tokens.tolist() == [[0, 1, 2, -1, -1] * 2]
    assert beams.tolist() == [[0, 1, 2, 5, 6]]
    # nothing at all: places in their order, and a tree of its root
    nothing = torch.full((1, 2, 30), math.nan, device=lane.device)
    tokens, scores, beams = expand_tree(nothing, top_k=4, implementation=lane.implementation)
    assert beams.tolist() == [[0, 1, 2, 3]]
    parents = torch.full_like(tokens, -1)
    trees = build_tree(
        beams[:, 0], tokens, scores, parents, size=9, implementation=lane.implementation
    )
    assert trees.depths.tolist() == [[0] + [-1] * 8]


def test_a_banned_token_is_no_child(lane: Lane) -> None:
    logits, uncond = torch.zeros(2, 1, 1, 6, device=lane.device)
    logits[..., 1:3] = -math.inf
    uncond[..., 2:5] = -math.inf
    uncond[..., 3:5] = -3
    tokens, scores, _ = expand_tree(
        logits, uncond=uncond, guidance=2.0, top_k=6, implementation=lane.implementation
    )
    assert tokens.tolist() == [[3, 4, 0, 5, -1, -1]]
    assert abs(scores[scores > -math.inf].double().exp().sum().item() - 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_strided_logits_of_any_float_are_read(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    around = torch.full((90, 4, 7), math.nan, dtype=dtype, device=lane.device)
    logits = around.permute(2, 1, 0)[1:6:2, ::3, 3:87:2]
    logits.copy_(torch.randn(logits.shape, generator=random))
    above = torch.full((4, 3), math.nan, device=lane.device)
    above = above.T[:, ::3].copy_(torch.randn(3, 2, generator=random))
    run = {"top_k": 5, "implementation": lane.implementation}
    plain = expand_tree(logits.contiguous(), above.contiguous(), **run)
    for got, want in zip(expand_tree(logits, above, **run), plain, strict=True):
        assert torch.equal(got, want)
    expected, _ = _children(logits.cpu(), above.cpu(), 5)
    assert torch.equal(plain[0].cpu(), expected)


def test_what_runs_beside_a_sequence_leaves_no_trace(lane: Lane, random: torch.Generator) -> None:
    logits, above = torch.randn(3, 4, 300, generator=random), torch.randn(3, 4, generator=random)
    run = {"top_k": 6, "implementation": lane.implementation}
    given = _on(lane, logits, above)
    together = expand_tree(*given, **run)
    for got, want in zip(expand_tree(*given, **run), together, strict=True):
        assert torch.equal(got, want)
    alone = expand_tree(*(tensor[1:2] for tensor in given), **run)
    for got, want in zip(alone, together, strict=True):
        assert torch.equal(got, want[1:2])


def test_programs_finish_in_any_order_and_leave_no_tickets(
    lane: Lane, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lane.implementation != "triton":
        pytest.skip("only Triton's programs take tickets")
    kernel = importlib.import_module("sdvg_kernels.tree.kernel")
    tickets = importlib.import_module("sdvg_kernels._tickets")
    logits = torch.randn(2, 5, 90, generator=random).to(lane.device)
    expected = expand_tree(logits, top_k=4, implementation="reference")[2]
    assert torch.equal(expand_tree(logits, top_k=4, implementation="triton")[2], expected)
    assert not tickets._POOLS[logits.device].take(0, 8).any()
    if lane.name == "interpreter":
        module = importlib.import_module("triton.runtime.interpreter")
        builder = module.interpreter_builder
        place, order = builder.set_grid_idx, torch.randperm(10, generator=random).tolist()
        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_idx", lambda x, y, z: place(order[x], y, z))
            assert torch.equal(expand_tree(logits, top_k=4, implementation="triton")[2], expected)
            assert not tickets._POOLS[logits.device].take(0, 8).any()
    # where there are none, a second launch merges
    monkeypatch.setattr(kernel, "take", lambda *_: None)
    assert torch.equal(expand_tree(logits, top_k=4, implementation="triton")[2], expected)


def _eagle(table: Tensor, root: int, top_k: int, levels: int, size: int) -> dict[str, list]:
    """Draft a tree as EAGLE-2 does, in plain Python: row t of `table` are the logits after t."""
    chances = table.double().log_softmax(1).tolist()
    tokens: list[int] = []
    scores: list[float] = []
    parents: list[int] = []
    beams = [-1]
    for _ in range(levels):
        first = len(tokens)
        for beam in beams:
            row = chances[root if beam < 0 else tokens[beam]]
            for token in sorted(range(len(row)), key=lambda v: (-row[v], v))[:top_k]:
                tokens.append(token)
                scores.append(row[token] + (0.0 if beam < 0 else scores[beam]))
                parents.append(beam)
        beams = sorted(range(first, len(tokens)), key=lambda i: (-scores[i], i))[:top_k]
    kept = _chosen(tokens, scores, parents, size, None)
    return _tree(root, tokens, parents, kept, size)


def test_levels_become_the_tree_of_eagle_2(lane: Lane, random: torch.Generator) -> None:
    table = 2 * torch.randn(50, 50, generator=random)
    root, run = torch.tensor([7, 31]), {"implementation": lane.implementation}
    after, at = _on(lane, table, root)
    # level by level: the tokens, scores and places of the beams, -1 the root
    beam_tokens, beam_scores, places = at[:, None], None, torch.full_like(at, -1)[:, None]
    levels: list[tuple[Tensor, Tensor, Tensor]] = []
    for level in range(4):
        tokens, scores, beams = expand_tree(after[beam_tokens], beam_scores, top_k=4, **run)
        levels.append((tokens, scores, places.repeat_interleave(4, 1).int()))
        beam_tokens, beam_scores = tokens.gather(1, beams.long()), scores.gather(1, beams.long())
        places = beams.long() + (4 + 16 * (level - 1) if level else 0)
    trees = build_tree(
        at, *(torch.cat(parts, 1) for parts in zip(*levels, strict=True)), size=20, **run
    )
    _assert_trees(trees, [_eagle(table, int(token), 4, 4, 20) for token in root])


def test_static_trees_are_given_by_their_parents(lane: Lane) -> None:
    parents = [-1, 0, 0, 1, 1, 3, 0]
    tokens = torch.arange(70, 84, device=lane.device).view(2, 7)
    expected = [
        _tree(int(row[0]), row.tolist()[1:], [p - 1 for p in parents[1:]], list(range(6)), 7)
        for row in tokens.cpu()
    ]
    trees = TokenTree.from_parents(tokens, parents)
    assert {field.device for field in trees} == {tokens.device}
    _assert_trees(trees, expected)
    _assert_trees(TokenTree.from_parents(tokens[1].int(), torch.tensor(parents)), expected[1:])
    rows = torch.tensor([parents, [-1, 0, 1, 2, 3, 4, 5]], device=lane.device)
    chain = TokenTree.from_parents(tokens[:, :7], rows)
    assert chain.depths[1].tolist() == list(range(7))
    # a chain of 64: all bits of a word, the sign's too
    line = TokenTree.from_parents(torch.zeros(64, dtype=torch.int64), list(range(-1, 63)))
    assert line.mask[0, 63].tolist() == [-1, -1]
    assert line.mask[0, 31].tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("parents", "text"),
    [
        ([0, 0, 0], "parents[0] must be -1: node 0 is the root, got 0"),
        ([-1, -1, 0], "parents[1] must name a node: node 0 is the only root, got -1"),
        ([-1, 3, 0], "parents[1] must name one of the 3 nodes: the node is an orphan, got 3"),
        ([-1, 0, -2], "parents[2] must name one of the 3 nodes: the node is an orphan, got -2"),
        ([-1, 2, 1], "parents[1] must lead to the root: it leads around a cycle, got 2"),
        ([-1, 0, 2], "parents[2] must lead to the root: it leads around a cycle, got 2"),
        ([-1, 2, 0], "parents[1] must come before its child, got 2"),
        (
            [[-1, 0, 0], [-1, 2, 0]],
            "parents[1] of tree 1 must come before its child, got 2",
        ),
        ([-1, 0], "parents must be [N] or have the shape of tokens, got [2]"),
    ],
)
def test_parents_of_no_tree_get_one_sentence(parents: list, text: str) -> None:
    text = re.escape(f"TokenTree.from_parents: {text}")
    with pytest.raises(ValueError, match=f"^{text}$"):
        TokenTree.from_parents(torch.zeros(2, 3, dtype=torch.int64), parents)


def test_tokens_of_no_tree_get_one_sentence() -> None:
    text = re.escape("tokens must be [B, N] or [N] with N >= 1, got [2, 0]")
    with pytest.raises(ValueError, match=text):
        TokenTree.from_parents(torch.zeros(2, 0, dtype=torch.int64), [])
    with pytest.raises(TypeError, match=r"tokens must be integers, got torch\.float32"):
        TokenTree.from_parents(torch.zeros(2), [-1, 0])
    with pytest.raises(TypeError, match=r"parents must be integers, got torch\.float32"):
        TokenTree.from_parents(torch.zeros(2, dtype=torch.int64), [-1.0, 0.0])


def test_opcheck() -> None:
    ops = torch.ops.sdvg_kernels
    logits, above = torch.randn(2, 3, 20), torch.randn(2, 3)
    torch.library.opcheck(ops.expand_tree, (logits, above, 4, logits, 2.0, 0.5, "reference"))
    given = _candidates(2, 9, torch.Generator().manual_seed(0))
    torch.library.opcheck(ops.build_tree, (torch.tensor([1, 2]), *given, None, 7, "reference"))


_LOGITS = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"logits": torch.zeros(2, 5)},
            ValueError,
            "logits must be [B, W, V] with W >= 1 and 1 <= V < 2^30, got [2, 5]",
        ),
        (
            {"logits": torch.zeros(2, 0, 5)},
            ValueError,
            "logits must be [B, W, V] with W >= 1 and 1 <= V < 2^30, got [2, 0, 5]",
        ),
        ({"logits": _LOGITS.int()}, TypeError, "logits must be floating, got torch.int32"),
        (
            {"logits": torch.zeros(1, 1025, 2)},
            ValueError,
            "logits must have at most 1024 beams, got 1025",
        ),
        ({"top_k": 0}, ValueError, "top_k must lie in [1, 16] with 3 beams, got 0"),
        ({"top_k": 17}, ValueError, "top_k must lie in [1, 16] with 3 beams, got 17"),
        (
            {"logits": torch.zeros(1, 100, 2), "top_k": 11},
            ValueError,
            "top_k must lie in [1, 10] with 100 beams, got 11",
        ),
        (
            {"temperature": 0.0},
            ValueError,
            "temperature must be finite and above 0, got 0.0; draft a greedy target's tree at 1",
        ),
        ({"guidance": math.nan}, ValueError, "guidance must be finite, got nan"),
        (
            {"guidance": 2.0},
            ValueError,
            "guidance must be 1 without uncond, got 2.0; give uncond",
        ),
        (
            {"uncond": torch.zeros(2, 3, 4)},
            ValueError,
            "uncond must have the shape of logits, got [2, 3, 4]",
        ),
        (
            {"uncond": _LOGITS.half()},
            TypeError,
            "uncond must have the dtype of logits, got torch.float16",
        ),
        (
            {"uncond": _LOGITS.to("meta")},
            ValueError,
            "uncond must be on logits' device, got meta",
        ),
        ({"scores": torch.zeros(2, 4)}, ValueError, "scores must be [B, W], got [2, 4]"),
        (
            {"scores": torch.zeros(2, 3).double()},
            TypeError,
            "scores must be float32, got torch.float64",
        ),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation must be one of 'reference', 'triton', got 'cuda'",
        ),
    ],
)
def test_bad_logits_get_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        expand_tree(**{"logits": _LOGITS, "top_k": 2, **change})
    assert str(caught.value) == f"expand_tree: {text}"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"tokens": torch.zeros(2, 1025, dtype=torch.int64)},
            ValueError,
            "tokens must be [B, M] with M <= 1024, got [2, 1025]",
        ),
        (
            {"tokens": torch.zeros(2, 4)},
            TypeError,
            "tokens must be int32 or int64, got torch.float32",
        ),
        (
            {"root": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "root must be [B], got [3]",
        ),
        (
            {"scores": torch.zeros(2, 5)},
            ValueError,
            "scores must be [B, M] like tokens, got [2, 5]",
        ),
        (
            {"scores": torch.zeros(2, 4).half()},
            TypeError,
            "scores must be float32, got torch.float16",
        ),
        (
            {"parents": torch.zeros(2, 5, dtype=torch.int32)},
            ValueError,
            "parents must be [B, M] like tokens, got [2, 5]",
        ),
        (
            {"parents": torch.zeros(2, 4, dtype=torch.int32, device="meta")},
            ValueError,
            "parents must be on tokens' device, got meta",
        ),
        (
            {"limit": torch.zeros(2, 1, dtype=torch.int32)},
            ValueError,
            "limit must be [B], got [2, 1]",
        ),
        ({"size": 0}, ValueError, "size must lie in [1, 128], got 0"),
        ({"size": 129}, ValueError, "size must lie in [1, 128], got 129"),
    ],
)
def test_bad_candidates_get_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    good = {
        "root": torch.zeros(2, dtype=torch.int64),
        "tokens": torch.zeros(2, 4, dtype=torch.int64),
        "scores": torch.zeros(2, 4),
        "parents": torch.full((2, 4), -1, dtype=torch.int32),
        "size": 3,
    }
    with pytest.raises(error) as caught:
        build_tree(**{**good, **change})
    assert str(caught.value) == f"build_tree: {text}"


@pytest.mark.gpu
def test_rows_lie_past_2_to_the_31() -> None:
    around = torch.zeros(2**31 + 700, dtype=torch.bfloat16, device="cuda")
    logits = around.as_strided((2, 2, 300), (2**31, 320, 1))
    logits.copy_(torch.randn(2, 2, 300))
    tokens, scores, _ = expand_tree(logits, top_k=4)
    # rows as far apart: as well aligned, they are summed in the same order
    plain = expand_tree(around.new_zeros(2, 2, 320)[..., :300].copy_(logits), top_k=4)
    assert torch.equal(tokens, plain[0])
    assert torch.equal(scores, plain[1])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 300])
def test_a_graph_replays_on_new_logits(batch: int) -> None:
    # 300 sequences are more than there are tickets for
    logits = torch.randn(batch, 10, 16384, device="cuda").bfloat16()
    above, root = torch.randn(batch, 10, device="cuda"), torch.arange(batch, device="cuda")
    parents = torch.full((batch, 100), -1, dtype=torch.int32, device="cuda")
    limit = torch.full((batch,), 2, dtype=torch.int32, device="cuda")

    def draft() -> tuple[Tensor, ...]:
        tokens, scores, beams = expand_tree(logits, above, top_k=10)
        trees = build_tree(root, tokens, scores, parents, size=59, limit=limit)
        return tokens, scores, beams, *trees

    draft()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draft()
    for _ in range(3):
        logits.copy_(torch.randn(batch, 10, 16384))
        graph.replay()
        for got, want in zip(captured, draft(), strict=True):
            assert torch.equal(got, want)
