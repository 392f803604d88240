"""Verification skipping: paths, the selector, similarity and the schedules, against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sdvg.tokens import skipping
from sdvg.tokens.skipping import Dynamic, Uniform
from sdvg_kernels import TokenTree


def random_tree(nodes: int, depth: int, g: torch.Generator) -> tuple[list[int], TokenTree]:
    """Return parents, breadth first, and the tree."""
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
    tokens = torch.randint(20, (len(parents),), generator=g)
    return parents, TokenTree.from_parents(tokens[None], torch.tensor(parents)[None])


def path_of(parents: list[int], node: int) -> list[int]:
    """Return the ancestors of a node from the root on, itself last."""
    found = [node]
    while parents[found[-1]] >= 0:
        found.append(parents[found[-1]])
    return found[::-1]


def leaves_of(parents: list[int]) -> list[int]:
    """Return the nodes that no other continues."""
    return [node for node in range(len(parents)) if node not in parents]


@pytest.mark.parametrize("seed", range(8))
def test_paths_are_ancestors_from_the_root_on(seed: int) -> None:
    parents, tree = random_tree(15, 4, torch.Generator().manual_seed(seed))
    ways = skipping.paths(tree, 4)
    for node in range(len(parents)):
        mine = [n for n in ways.nodes[0, node].tolist() if n >= 0]
        assert mine == path_of(parents, node)
    assert ways.leaves[0].nonzero()[:, 0].tolist() == leaves_of(parents)


@pytest.mark.parametrize("seed", range(8))
def test_similarity_is_the_mean_over_pairs_of_paths(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    parents, tree = random_tree(17, 4, g)
    codebook = skipping.unit(torch.randn(20, 5, generator=g))
    some = [path_of(parents, leaf)[1:] for leaf in leaves_of(parents)][::2]
    longest = max(map(len, some))
    weights = [0.9**level for level in range(longest)]

    def alike(one: list[int], other: list[int]) -> float:
        tokens = tree.tokens[0]
        return sum(
            weight * float(codebook[tokens[a]] @ codebook[tokens[b]])
            for weight, a, b in zip(weights, one, other, strict=False)
        ) / sum(weights)

    each = [alike(one, other) for one, other in itertools.combinations(some, 2)]
    expected = sum(each) / len(each) if each else 0.0
    ways = skipping.paths(tree, 4)
    found = skipping.similarity(tree, ways, codebook, decay=0.9, stride=2)
    assert math.isclose(float(found), expected, abs_tol=1e-5)


def test_the_selector_takes_every_leaf_evenly_and_cuts_it_to_the_mean_length() -> None:
    parents = [-1, 0, 0, 1, 1, 3, 5]
    tree = TokenTree.from_parents(torch.arange(7)[None], torch.tensor(parents)[None])
    count = 3000
    many = TokenTree(*(part.expand(count, *part.shape[1:]) for part in tree))
    keys = torch.arange(count)
    path, kept = skipping.select(
        many, skipping.paths(many, 4), torch.full((count,), 3), torch.zeros_like(keys), keys
    )
    # leaves 2, 4, 6 at depths 1, 2, 4: paths of 2, 3, 5 with the root, 3 on average
    by_first = {(2, -1, -1, -1): 1, (1, 4, -1, -1): 2, (1, 3, 5, 6): 2}
    seen = [tuple(row) for row in path.tolist()]
    assert set(seen) == set(by_first)
    assert all(by_first[row] == most for row, most in zip(seen, kept.tolist(), strict=True))
    share = [seen.count(row) / count for row in by_first]
    assert all(abs(part - 1 / 3) < 0.04 for part in share), share


def test_a_tree_of_the_root_alone_keeps_nothing() -> None:
    tree = TokenTree.from_parents(torch.tensor([[4]]), torch.tensor([[-1]]))
    ways = skipping.paths(tree, 3)
    _, kept = skipping.select(tree, ways, *(torch.zeros(1, dtype=torch.int64) for _ in range(3)))
    assert kept.tolist() == [0]
    alike = skipping.similarity(tree, ways, torch.eye(5), decay=0.9, stride=2)
    assert alike.tolist() == [0]


def test_uniform_skips_every_interval_and_dynamic_never_twice() -> None:
    steps = torch.arange(7)

    def alike(decay: float, stride: int) -> Tensor:
        return torch.tensor([0.7, 0.6, 0.7, math.nan])

    skips = skipping.wants(Uniform(3), steps, torch.zeros(7, dtype=torch.bool), alike)
    assert skips.nonzero()[:, 0].tolist() == [1, 4]
    before = torch.tensor([False, False, True, False])
    skips = skipping.wants(Dynamic(0.65), steps[:4], before, alike)
    # what cannot be compared is verified
    assert skips.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Uniform(1), "interval must be at least 2, got 1"),
        (lambda: Dynamic(1.5), r"threshold must lie in \[-1, 1\], got 1.5"),
        (lambda: Dynamic(math.nan), r"threshold must lie in \[-1, 1\], got nan"),
        (lambda: Dynamic(decay=0.0), r"decay must lie in \(0, 1\], got 0.0"),
        (lambda: Dynamic(stride=0), "stride must be at least 1, got 0"),
        (lambda: skipping.neighbours(torch.eye(4), 4), r"count must lie in \[1, 4\), got 4"),
    ],
)
def test_what_cannot_be_says_why(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_neighbours_are_the_nearest_other_codes() -> None:
    codebook = torch.randn(1500, 4, generator=torch.Generator().manual_seed(1))
    near = skipping.neighbours(codebook, 3)
    far = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
    assert torch.equal(near.long(), far.topk(3, largest=False).indices)
