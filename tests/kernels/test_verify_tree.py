"""verify_tree in every lane."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdvg_kernels import TokenTree, Verified, sample_tokens, verify_tree
from sdvg_kernels.testing import Lane
from sdvg_kernels.verify import config
from tests.kernels.drafts import (
    Warped,
    distribution,
    keys,
    on,
    p_value,
    random_trees,
    walked,
)


def same(left: Verified, right: Verified) -> bool:
    """Return whether two results agree, wherever they lie."""
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(left, right, strict=True))


# the last one's rows are searched tile by tile
@pytest.mark.parametrize(
    ("vocabulary", "warp"),
    [
        (7, {}),
        (7, {"temperature": 0.0}),
        (11, {"temperature": 0.7, "top_k": 6, "guidance": 2.0}),
        (13, {"top_p": 0.8, "guidance": 0.5}),
        (16400, {"top_k": 16398}),
    ],
)
def test_children_are_tried_one_by_one(
    vocabulary: int, warp: dict[str, float], lane: Lane, random: torch.Generator
) -> None:
    # the interpreter takes its time
    batch = 150 if lane.name != "interpreter" else 3 if "top_p" in warp else 6
    batch, nodes = (2, 4) if vocabulary > 1000 else (batch, 6)
    logits, uncond = 2 * torch.randn(2, batch, nodes, vocabulary, generator=random)
    if vocabulary > 1000:
        # the likeliest lie in several tiles
        logits[:, :, ::4099] += 12
    tree = random_trees(logits, random)
    warped = Warped(uncond if "guidance" in warp else None, **warp)
    paths, tokens = walked(tree, logits, keys(batch), warped, nodes - 1)
    options = warped._asdict()
    if warped.uncond is not None:
        options["uncond"] = uncond.to(lane.device)
    out = verify_tree(
        on(lane.device, tree),
        logits.to(lane.device),
        **keys(batch, lane.device),
        **options,
        implementation=lane.implementation,
    )
    assert out.path.tolist() == paths
    assert out.tokens.tolist() == tokens
    assert out.counts.tolist() == [sum(node >= 0 for node in path) for path in paths]
    assert max(out.counts.tolist()) > 1


def test_a_greedy_path_follows_the_likeliest_tokens(lane: Lane, random: torch.Generator) -> None:
    logits = torch.randn(2, 6, 11, generator=random)
    best = logits.argmax(2).tolist()
    other = [(token + 1) % 11 for token in best[0]]
    tokens = [
        [0, other[0], best[0][0], other[2], best[0][2], other[4]],
        [0, best[1][0], 1, 2, 3, 4],
    ]
    tree = TokenTree.from_parents(torch.tensor(tokens), [-1, 0, 0, 2, 2, 4])
    options = {"temperature": 0, "implementation": lane.implementation}
    out = verify_tree(on(lane.device, tree), logits.to(lane.device), **options)
    assert out.path.tolist() == [[0, 2, 4, -1, -1, -1], [0, 1, -1, -1, -1, -1]]
    assert out.counts.tolist() == [3, 2]
    assert out.tokens.tolist() == [best[0][4], best[1][1]]
    out = verify_tree(on(lane.device, tree), logits.to(lane.device), depth=1, **options)
    assert out.path.tolist() == [[0, 2], [0, 1]]
    assert out.tokens.tolist() == [best[0][2], best[1][1]]


@pytest.mark.parametrize("coupled", [False, True])
def test_without_children_the_token_is_sample_tokens_own(
    coupled: bool, lane: Lane, random: torch.Generator
) -> None:
    logits = 2 * torch.randn(5, 1, 50, generator=random).to(lane.device)
    options = {"temperature": 0.8, "top_k": 20, **keys(5, lane.device)}
    options["implementation"] = lane.implementation
    expected = sample_tokens(logits[:, 0], **options)
    tree = on(lane.device, TokenTree.from_parents(torch.zeros(5, 1, dtype=torch.int64), [-1]))
    out = verify_tree(tree, logits, coupled=coupled, **options)
    assert torch.equal(out.tokens, expected)
    assert out.path.tolist() == [[0]] * 5


def test_coupled_to_the_noise_a_tree_gives_what_plain_sampling_gives(
    lane: Lane, random: torch.Generator
) -> None:
    batch, nodes = 5, 6
    logits = 2 * torch.randn(batch, nodes, 5, generator=random)
    tree, logits = on(lane.device, random_trees(logits, random)), logits.to(lane.device)
    keyed = keys(batch, lane.device)
    run = {"top_k": 4, "implementation": lane.implementation}
    out = verify_tree(tree, logits, coupled=True, **keyed, **run)
    assert out.counts.max() > 1
    for b in range(batch):
        path = [node for node in out.path[b].tolist() if node >= 0]
        given = [int(tree.tokens[b, node]) for node in path[1:]] + [int(out.tokens[b])]
        key = {name: value[b : b + 1].expand(len(path)) for name, value in keyed.items()}
        key["positions"] = key["positions"] + torch.arange(len(path), device=lane.device)
        assert sample_tokens(logits[b, path], **key, **run).tolist() == given
        # and no child that carries it is passed over
        children = tree.tokens[b][tree.parents[b] == path[-1]].tolist()
        assert given[-1] not in children


@pytest.mark.parametrize(
    "where", [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_what_comes_out_is_distributed_as_the_targets_own_tokens(where: str) -> None:
    # two levels: the first token's law, and the second's behind each accepted first
    count, vocabulary = 120_000, 7
    random = torch.Generator().manual_seed(3)
    logits, uncond = torch.randn(2, 1, 6, vocabulary, generator=random)
    warp = Warped(uncond, guidance=1.5, temperature=0.9, top_k=5)
    ids = distribution(logits[0, 0], uncond[0, 0], warp).topk(4).indices.tolist()
    tokens = torch.tensor([0, ids[1], ids[3], ids[2], 1, 3])
    tree = TokenTree.from_parents(tokens, [-1, 0, 0, 0, 1, 1])
    keyed = {
        "seeds": torch.full((count,), 11, device=where),
        "sequences": torch.arange(count, device=where) // 1000,
        "positions": torch.arange(count, device=where) % 1000 * 2,
    }
    options = warp._asdict() | {"uncond": uncond.to(where).expand(count, -1, -1)}
    out = verify_tree(
        TokenTree(*(field.to(where).expand(count, *field.shape[1:]) for field in tree)),
        logits.to(where).expand(count, -1, -1),
        **keyed,
        **options,
        depth=2,
    )
    path, tokens = out.path.cpu().long(), out.tokens.cpu()
    drafted = tree.tokens[0][path.clamp(min=0)]
    first = torch.where(path[:, 1] >= 0, drafted[:, 1], tokens)
    root = distribution(logits[0, 0], uncond[0, 0], warp)
    assert p_value(first.bincount(minlength=vocabulary), root) > 0.01
    assert (out.counts > 1).float().mean() > 0.15
    for node in (1, 2, 3):
        behind = path[:, 1] == node
        second = torch.where(path[:, 2] >= 0, drafted[:, 2], tokens)[behind]
        chances = distribution(logits[0, node], uncond[0, node], warp)
        assert p_value(second.bincount(minlength=vocabulary), chances) > 0.01


def test_rows_that_decide_nothing_may_hold_anything(lane: Lane, random: torch.Generator) -> None:
    logits = torch.randn(1, 6, 9, generator=random)
    tree = TokenTree.from_parents(torch.arange(6), [-1, 0, 0, 1, 1, 2])
    tree.parents[0, 5] = -1
    tree.first_child[0, 2] = -1
    run = {**keys(1, lane.device), "implementation": lane.implementation}
    want = verify_tree(on(lane.device, tree), logits.to(lane.device), **run)
    visited = want.path[want.path >= 0].tolist()
    logits[:, [node for node in range(6) if node not in visited]] = math.nan
    assert same(verify_tree(on(lane.device, tree), logits.to(lane.device), **run), want)


@pytest.mark.parametrize("warp", [{}, {"temperature": 0.0}, {"coupled": True}])
def test_a_sequence_without_a_distribution_says_so(warp: dict[str, float], lane: Lane) -> None:
    # the root's row; a leaf's; none that is reached
    logits = torch.zeros(3, 3, 4, device=lane.device)
    logits[:, 0, 2] = 60
    logits[0, 0, 1] = math.nan
    logits[1, 1] = -math.inf
    logits[2, 2, 0] = math.inf
    tree = TokenTree.from_parents(torch.tensor([[0, 2, 1]] * 3), [-1, 0, 0])
    run = {**keys(3, lane.device), **warp, "implementation": lane.implementation}
    out = verify_tree(on(lane.device, tree), logits, **run)
    assert out.counts.tolist() == [0, 0, 2]
    assert out.path.tolist() == [[-1, -1, -1], [-1, -1, -1], [0, 1, -1]]
    assert out.tokens.tolist()[:2] == [-1, -1]
    with pytest.raises(
        ValueError, match=r"^verify_tree: logits must have a distribution .* \[0, 1"
    ):
        out.check("verify_tree")
    assert Verified(*(field[2:] for field in out)).check() is not None


def test_links_that_lie_are_not_followed(lane: Lane) -> None:
    # a sibling that is itself, a child before its parent, links out of the tree and to another's,
    # and siblings in a circle
    parents = [[-1, 0, 0, 1], [-1, 0, 1, 2], [-1, 0, 0, 1], [-1, 0, 0, 1], [-1, 0, 0, 1]]
    first = [[1, 3, -1, -1], [1, 2, 1, 0], [99, 3, -1, -1], [3, 1, 2, 0], [1, -1, -1, -1]]
    sibling = [[-1, 1, -1, -1], [0, 1, 2, 3], [-1, 99, -1, -5], [-1, 3, 1, 0], [-1, 2, 1, -1]]
    links = (torch.tensor(each, dtype=torch.int32) for each in (parents, first, sibling))
    fields = dict(zip(("parents", "first_child", "next_sibling"), links, strict=True))
    tree = TokenTree.from_parents(torch.tensor([[0, 1, 2, 3]] * 5), [-1, 0, 0, 1])
    tree = tree._replace(**fields)
    for likely, nodes in ((1, (1, 1, -1, -1, 1)), (2, (-1, -1, -1, -1, 2)), (3, (-1,) * 5)):
        logits = torch.zeros(5, 4, 4, device=lane.device)
        logits[:, :, likely] = 60
        paths = [[0, node, -1, -1] for node in nodes]
        for warp in ({}, {"temperature": 0}):
            run = {**keys(5, lane.device), **warp, "implementation": lane.implementation}
            assert verify_tree(on(lane.device, tree), logits, **run).path.tolist() == paths


def test_a_token_counts_once_among_siblings_and_never_outside_the_vocabulary(
    lane: Lane, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an elder sibling of another turn counts too
    monkeypatch.setattr(config, "SIBLINGS", 2)
    logits = torch.randn(6, 5, 4, generator=random).to(lane.device)
    run = {**keys(6, lane.device), "implementation": lane.implementation}
    parents = [-1, 0, 0, 0, 0]
    twice = TokenTree.from_parents(torch.tensor([[0, 1, 4, 1, -3]] * 6), parents)
    once = TokenTree.from_parents(torch.tensor([[0, 1]] * 6), parents[:2])
    out = verify_tree(on(lane.device, twice), logits, depth=1, **run)
    want = verify_tree(on(lane.device, once), logits[:, :2], depth=1, **run)
    assert same(out, want)
    assert 0 < (out.counts == 2).sum() < 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_strided_logits_of_any_float_are_read(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    around = torch.full((50, 9, 7), math.nan, dtype=dtype, device=lane.device)
    logits = around.permute(2, 1, 0)[1:7:2, 1:9:2, 3:29:2]
    logits.copy_(torch.randn(3, 4, 13, generator=random))
    tree = random_trees(logits.float().cpu(), random)
    # fields, and keys whose low 32 bits are those of the other lanes, read with a stride
    spread = TokenTree(*(field.repeat_interleave(2, 0)[::2] for field in on(lane.device, tree)))
    keyed = {**keys(3, lane.device)}
    keyed["positions"] = (keyed["positions"].long() + 2**32).repeat_interleave(2)[::2]
    run = {"top_k": 9, "implementation": lane.implementation}
    out = verify_tree(spread, logits, uncond=logits, **keyed, **run)
    plain = logits.float().cpu().contiguous()
    want = verify_tree(tree, plain, uncond=plain, **keys(3), top_k=9, implementation="reference")
    assert same(out, want)


def test_what_runs_beside_a_sequence_leaves_no_trace(lane: Lane, random: torch.Generator) -> None:
    logits = torch.randn(6, 4, 5, generator=random)
    tree, keyed = on(lane.device, random_trees(logits, random)), keys(6, lane.device)
    logits, run = logits.to(lane.device), {"implementation": lane.implementation}
    together = verify_tree(tree, logits, **keyed, **run)
    assert same(verify_tree(tree, logits, **keyed, **run), together)
    for b in (0, 4):
        alone = verify_tree(
            TokenTree(*(field[b : b + 1] for field in tree)),
            logits[b : b + 1],
            **{name: key[b : b + 1] for name, key in keyed.items()},
            **run,
        )
        assert same(alone, Verified(*(field[b : b + 1] for field in together)))
    keyed["seeds"] = keyed["seeds"] + 1
    assert not same(verify_tree(tree, logits, **keyed, **run), together)


def test_no_sequences_give_nothing(lane: Lane) -> None:
    tree = TokenTree.from_parents(torch.zeros(1, 3, dtype=torch.int64), [-1, 0, 0])
    tree = on(lane.device, TokenTree(*(field[:0] for field in tree)))
    logits = torch.empty(0, 3, 9, device=lane.device)
    run = {**keys(0, lane.device), "implementation": lane.implementation}
    out = verify_tree(tree, logits, **run)
    assert [list(field.shape) for field in out] == [[0, 3], [0], [0]]


@pytest.mark.parametrize("rule", ["exact", "relaxed"])
def test_opcheck(rule: str, random: torch.Generator) -> None:
    logits, uncond = torch.randn(2, 3, 4, 9, generator=random)
    tree = random_trees(logits, random)
    table = torch.randint(9, (9, 2), generator=random).int() if rule == "relaxed" else None
    fields = (tree.tokens, tree.parents, tree.first_child, tree.next_sibling)
    warp = (2.0, 1.0, 4, 0.9)
    torch.library.opcheck(
        torch.ops.sdvg_kernels.verify_tree,
        (*fields, logits, uncond, table, *keys(3).values(), *warp, 3, rule, 0.3, 2.0, "reference"),
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(3, 4)}, ValueError, "logits must be [B, N, V] with at least one"),
        ({"logits": torch.zeros(2, 3, 4).int()}, TypeError, "logits must be floating, got torch"),
        ({"logits": torch.zeros(2, 4, 4)}, ValueError, "tree.tokens must be [B, N] for logits"),
        ({"parents": torch.zeros(2, 3)}, TypeError, "tree.parents must be int32, got torch.float"),
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tree.tokens must be int32 or int64, got torch"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1.0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0; None keeps all tokens"),
        ({"top_p": 1.5}, ValueError, "top_p must lie in (0, 1], got 1.5"),
        ({"guidance": 2.0}, ValueError, "guidance must be 1 without uncond, got 2.0; give uncond"),
        ({"uncond": torch.zeros(2, 3, 5)}, ValueError, "uncond must have the shape of logits"),
        ({"uncond": torch.zeros(2, 3, 4).half()}, TypeError, "uncond must have the dtype of"),
        ({"seeds": None}, ValueError, "seeds must be given unless temperature is 0, got None"),
        ({"seeds": torch.zeros(2).int()}, TypeError, "seeds must be int64, got torch.int32"),
        ({"positions": torch.zeros(3).int()}, ValueError, "positions must be [B], one a sequence"),
        ({"depth": -1}, ValueError, "depth must be at least 0, got -1"),
        ({"implementation": "cuda"}, ValueError, "implementation must be one of 'reference'"),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    tree = TokenTree.from_parents(torch.zeros(2, 3, dtype=torch.int64), [-1, 0, 0])
    fields = {name: change.pop(name) for name in ("tokens", "parents") if name in change}
    options = {"logits": torch.zeros(2, 3, 4), **keys(2), **change}
    with pytest.raises(error) as caught:
        verify_tree(tree._replace(**fields), options.pop("logits"), **options)
    assert str(caught.value).startswith(f"verify_tree: {text}")


def _large(
    batch: int, random: torch.Generator
) -> tuple[TokenTree, Tensor, dict[str, Tensor], dict[str, object]]:
    """Return what EAGLE-2 verifies for LlamaGen: 59 nodes, their tokens among the likeliest."""
    logits = (3 * torch.randn(batch, 59, 16384, generator=random)).bfloat16().float()
    tree = random_trees(logits, random, likeliest=2)
    # so cold that paths are some nodes long
    return tree, logits, keys(batch), {"temperature": 0.2, "top_k": 2000, "depth": 12}


@pytest.mark.gpu
@pytest.mark.parametrize("coupled", [False, True])
def test_both_devices_accept_the_same(coupled: bool, random: torch.Generator) -> None:
    tree, logits, keyed, options = _large(16, random)
    here = verify_tree(tree, logits, **keyed, **options, coupled=coupled)
    there = verify_tree(
        on("cuda", tree), logits.cuda(), **keys(16, "cuda"), **options, coupled=coupled
    )
    assert same(here, there)
    assert here.counts.float().mean() > 2


@pytest.mark.gpu
@pytest.mark.parametrize("warp", [{}, {"temperature": 0.0}, {"coupled": True}])
def test_a_graph_replays_with_new_logits_trees_and_keys(
    warp: dict[str, float], random: torch.Generator
) -> None:
    tree, logits, keyed, options = _large(4, random)
    options |= warp
    tree_there, logits_there, keyed_there = on("cuda", tree), logits.cuda(), keys(4, "cuda")
    verify_tree(tree_there, logits_there, **keyed_there, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = verify_tree(tree_there, logits_there, **keyed_there, **options)
    for seed in (1, 2):
        tree, logits, _, _ = _large(4, random)
        keyed = keys(4, seed=seed)
        for old, new in zip((*tree_there, logits_there), (*tree, logits), strict=True):
            old.copy_(new)
        for name, key in keyed.items():
            keyed_there[name].copy_(key)
        graph.replay()
        assert same(out, verify_tree(tree, logits, **keyed, **options))
