"""select_path and path_similarity in every lane, against plain loops over paths."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdvg_kernels import TokenTree, path_similarity, sample_tokens, select_path
from sdvg_kernels.testing import Lane, assert_within_budget

CODES = 20


def random_parents(nodes: int, depth: int, g: torch.Generator) -> list[int]:
    """Return the parents of a tree of at most so many nodes, breadth first."""
    depths, parents = [0], [-1]
    for node in range(1, nodes):
        # one of the last level or of that before: levels rise
        able = [i for i in range(node) if depths[-1] - 1 <= depths[i] < depth]
        able = [i for i in able if i >= parents[-1]]
        if not able:
            break
        parent = able[int(torch.randint(len(able), (), generator=g))]
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def batch_of(trees: list[list[int]], nodes: int, g: torch.Generator) -> TokenTree:
    """Return trees of these parents, padded to `nodes`."""
    words, made = -(-nodes // 32), []
    for parents in trees:
        one = TokenTree.from_parents(
            torch.randint(CODES, (len(parents),), generator=g), torch.tensor(parents)
        )
        rest = nodes - len(parents)
        fields = [
            torch.nn.functional.pad(field, (0, rest), value=0 if name == "tokens" else -1)
            for name, field in zip(one._fields[:-1], one[:-1], strict=True)
        ]
        mask = torch.nn.functional.pad(one.mask, (0, words - one.mask.shape[2], 0, rest))
        made.append((*fields, mask))
    return TokenTree(*(torch.cat(part).contiguous() for part in zip(*made, strict=True)))


def some_trees(nodes: int, depth: int, g: torch.Generator) -> tuple[list[list[int]], TokenTree]:
    """Return trees: of the root alone, a chain, and at random."""
    trees = [[-1], list(range(-1, min(depth, nodes - 1)))]
    trees += [random_parents(nodes, depth, g) for _ in range(3)]
    return trees, batch_of(trees, nodes, g)


def path_of(parents: list[int], node: int) -> list[int]:
    """Return the ancestors of a node from the root on, itself last."""
    found = [node]
    while parents[found[-1]] >= 0:
        found.append(parents[found[-1]])
    return found[::-1]


def leaves_of(parents: list[int]) -> list[int]:
    """Return the nodes that no other continues."""
    return [node for node in range(len(parents)) if node not in parents]


def on(lane: Lane, tree: TokenTree) -> TokenTree:
    """Return the tree on the lane's device."""
    return TokenTree(*(part.to(lane.device) for part in tree))


def keys(batch: int, device: str) -> dict[str, Tensor]:
    """Return keys that differ between sequences, large ones too."""
    return {
        "seeds": torch.arange(batch, device=device) * 2**40 - 3,
        "sequences": torch.arange(batch, device=device) * 7,
        "positions": torch.arange(batch, dtype=torch.int32, device=device) + 2**20,
    }


@pytest.mark.parametrize(("nodes", "depth", "levels"), [(15, 4, 4), (60, 5, 7), (128, 9, 6)])
@pytest.mark.parametrize("likely", [False, True])
def test_a_leafs_path_is_cut_to_the_mean_length(
    nodes: int, depth: int, levels: int, likely: bool, lane: Lane, random: torch.Generator
) -> None:
    trees, tree = some_trees(nodes, depth, random)
    wanted, drawn = torch.tensor([True, True, True, False, True]), keys(len(trees), "cpu")
    # what has no path has no weight: the draw is that of `sample_tokens`
    chance = torch.zeros(len(trees), nodes)
    chance.masked_fill_((tree.first_child >= 0) | (tree.depths < 0), -torch.inf)
    leaves = sample_tokens(chance, **drawn).tolist()
    path, counts = select_path(
        on(lane, tree), wanted.to(lane.device), levels, **keys(len(trees), lane.device),
        likely=likely, implementation=lane.implementation,
    )  # fmt: skip
    for b, parents in enumerate(trees):
        if likely:
            leaves[b] = 0
            while leaves[b] in parents:
                # the first that goes on from it
                leaves[b] = parents.index(leaves[b])
        lengths = [len(path_of(parents, leaf)) for leaf in leaves_of(parents)]
        line = path_of(parents, leaves[b])[1:]
        kept = min(len(line), sum(lengths) // len(lengths) - 1, levels)
        assert path[b].tolist() == (line + [-1] * levels)[:levels]
        assert int(counts[b]) == (kept + 1 if wanted[b] and kept else 0)


def test_every_leaf_is_taken_evenly(lane: Lane, random: torch.Generator) -> None:
    # leaves 2, 4, 6 at depths 1, 2, 4: paths of 2, 3, 5 with the root, 3 on average
    one = batch_of([[-1, 0, 0, 1, 1, 3, 5]], 7, random)
    by_path = {(2, -1, -1, -1): 1, (1, 4, -1, -1): 2, (1, 3, 5, 6): 2}
    count = 120 if lane.name == "interpreter" else 3000
    many = TokenTree(*(part.expand(count, *part.shape[1:]).contiguous() for part in one))
    places = torch.arange(count, device=lane.device)
    path, counts = select_path(
        on(lane, many), torch.ones_like(places, dtype=torch.bool), 4,
        seeds=torch.full_like(places, 3), sequences=torch.zeros_like(places),
        positions=places.int(), implementation=lane.implementation,
    )  # fmt: skip
    seen = [tuple(row) for row in path.tolist()]
    assert set(seen) == set(by_path)
    assert all(by_path[row] + 1 == n for row, n in zip(seen, counts.tolist(), strict=True))
    share = [seen.count(row) / count for row in by_path]
    assert all(abs(part - 1 / 3) < 2.2 / count**0.5 for part in share), share


def pairwise(
    trees: list[list[int]], tree: TokenTree, codebook: Tensor, decay: float, stride: int
) -> Tensor:
    """Return the similarity, pair by pair, in the codebook's dtype."""
    found = []
    for parents, tokens in zip(trees, tree.tokens, strict=True):
        some = [path_of(parents, leaf)[1:] for leaf in leaves_of(parents)][::stride]
        weights = [decay**level for level in range(max(map(len, some)))]
        total = codebook.new_zeros(())
        for one, other in itertools.combinations(some, 2):
            for weight, a, b in zip(weights, one, other, strict=False):
                total = total + weight * (codebook[tokens[a]] @ codebook[tokens[b]])
        couples = len(some) * (len(some) - 1) / 2
        found.append(total / sum(weights) / couples if couples else total)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("nodes", "depth", "width", "decay", "stride"),
    [(17, 4, 5, 0.9, 2), (60, 5, 8, 1.0, 1), (128, 3, 70, 0.5, 3)],
)
def test_similarity_is_the_mean_over_pairs_of_paths(
    nodes: int,
    depth: int,
    width: int,
    decay: float,
    stride: int,
    lane: Lane,
    random: torch.Generator,
) -> None:
    trees, tree = some_trees(nodes, depth, random)
    codebook = torch.nn.functional.normalize(torch.randn(CODES, width, generator=random), dim=1)
    got = path_similarity(
        on(lane, tree), codebook.to(lane.device), decay=decay, stride=stride,
        implementation=lane.implementation,
    )  # fmt: skip
    plain = pairwise(trees, tree, codebook, decay, stride)
    exact = pairwise(trees, tree, codebook.double(), decay, stride)
    assert_within_budget(got.cpu(), plain, exact)
    again = path_similarity(
        on(lane, tree), codebook.to(lane.device), decay=decay, stride=stride,
        implementation=lane.implementation,
    )  # fmt: skip
    assert torch.equal(got, again)


def test_nothing_is_no_error(lane: Lane) -> None:
    tree = on(lane, TokenTree.from_parents(torch.zeros(1, 5, dtype=torch.int64), [-1, 0, 0, 1, 1]))
    tree = TokenTree(*(part[:0] for part in tree))
    none = keys(0, lane.device)
    wanted = torch.zeros(0, dtype=torch.bool, device=lane.device)
    how = {"implementation": lane.implementation}
    assert select_path(tree, wanted, 4, **none, **how)[0].shape == (0, 4)
    assert path_similarity(tree, torch.eye(3, device=lane.device), **how).shape == (0,)


def test_opcheck() -> None:
    ops, random = torch.ops.sdvg_kernels, torch.Generator().manual_seed(0)
    _, tree = some_trees(9, 3, random)
    fields = (tree.depths, tree.first_child, tree.mask)
    wanted = torch.ones(5, dtype=torch.bool)
    torch.library.opcheck(
        ops.select_path, (*fields, wanted, *keys(5, "cpu").values(), 4, False, "reference")
    )
    torch.library.opcheck(
        ops.path_similarity, (tree.tokens, *fields, torch.randn(20, 3), 0.9, 2, "reference")
    )


_TREE = some_trees(9, 3, torch.Generator().manual_seed(0))[1]
_WANTED, _KEYS = torch.ones(5, dtype=torch.bool), keys(5, "cpu")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: select_path(_TREE, _WANTED, 0, **_KEYS),
            ValueError,
            "select_path: levels must lie in [1, 64], got 0",
        ),
        (
            lambda: select_path(_TREE, _WANTED.int(), 4, **_KEYS),
            TypeError,
            "select_path: wanted must be torch.bool, got torch.int32",
        ),
        (
            lambda: select_path(_TREE, _WANTED, 4, **_KEYS | {"positions": _KEYS["seeds"]}),
            TypeError,
            "select_path: positions must be torch.int32, got torch.int64",
        ),
        (
            lambda: select_path(_TREE._replace(mask=_TREE.mask[:4]), _WANTED, 4, **_KEYS),
            ValueError,
            "select_path: tree.mask must be [5, 9, 1], contiguous, got [4, 9, 1] with strides "
            "[9, 1, 1]",
        ),
        (
            lambda: path_similarity(_TREE, torch.eye(3).double()),
            TypeError,
            "path_similarity: codebook must be torch.float32, got torch.float64",
        ),
        (
            lambda: path_similarity(_TREE, torch.zeros(3)),
            ValueError,
            "path_similarity: codebook must be [V, E] with V, E >= 1, got [3]",
        ),
        (
            lambda: path_similarity(_TREE, torch.eye(3), decay=0.0),
            ValueError,
            "path_similarity: decay must lie in (0, 1], got 0.0",
        ),
        (
            lambda: path_similarity(_TREE, torch.eye(3), stride=0),
            ValueError,
            "path_similarity: stride must be at least 1, got 0",
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
def test_a_graph_replays_on_new_trees() -> None:
    random = torch.Generator().manual_seed(0)
    made = [some_trees(59, 5, random)[1] for _ in range(3)]
    tree = TokenTree(*(part.cuda() for part in made[0]))
    wanted, drawn = torch.ones(5, dtype=torch.bool, device="cuda"), keys(5, "cuda")
    codebook = torch.randn(CODES, 8, generator=random).cuda()

    def skip() -> tuple[Tensor, ...]:
        return *select_path(tree, wanted, 5, **drawn), path_similarity(tree, codebook)

    skip()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = skip()
    for new in made:
        for part, other in zip(tree, new, strict=True):
            part.copy_(other)
        drawn["positions"] += 1
        graph.replay()
        for got, want in zip(captured, skip(), strict=True):
            assert torch.equal(got, want)
