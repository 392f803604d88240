"""verify_tree in every lane."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdvg_kernels import sample_tokens, verify_chain, verify_tree
from sdvg_kernels.testing import Lane


class Drafted(NamedTuple):
    """A tree without `TokenTree`: ops do not import each other, nor do their tests."""

    tokens: Tensor
    parents: Tensor
    first_child: Tensor
    next_sibling: Tensor


def drafted(tokens: list[list[int]], parents: list[list[int]], device: str = "cpu") -> Drafted:
    """Return trees from their nodes' tokens and parents, in the order of the nodes."""
    first = [[-1] * len(row) for row in parents]
    sibling = [[-1] * len(row) for row in parents]
    for b, row in enumerate(parents):
        last: dict[int, int] = {}
        for node, parent in enumerate(row):
            if parent >= 0:
                if parent in last:
                    sibling[b][last[parent]] = node
                else:
                    first[b][parent] = node
                last[parent] = node
    links = (
        torch.tensor(each, dtype=torch.int32, device=device) for each in (parents, first, sibling)
    )
    return Drafted(torch.tensor(tokens, device=device), *links)


def keys(batch: int, device: str = "cpu", seed: int = 7) -> dict[str, Tensor]:
    """Return keys that differ between sequences."""
    return {
        "seeds": torch.full((batch,), seed - 2**40, device=device),
        "sequences": torch.arange(batch, device=device) // 3,
        "positions": torch.arange(batch, dtype=torch.int32, device=device) % 3 + 1000,
    }


def test_a_greedy_path_follows_the_likeliest_tokens(lane: Lane, random: torch.Generator) -> None:
    logits = torch.randn(2, 6, 11, generator=random)
    best = logits.argmax(2).tolist()
    # 0 -> 1, 2; 2 -> 3, 4; 4 -> 5
    parents = [-1, 0, 0, 2, 2, 4]
    other = [(token + 1) % 11 for token in best[0]]
    tokens = [
        [0, other[0], best[0][0], other[2], best[0][2], other[4]],
        [0, best[1][0], 1, 2, 3, 4],
    ]
    tree = drafted(tokens, [parents, parents], lane.device)
    out = verify_tree(
        tree, logits.to(lane.device), temperature=0, implementation=lane.implementation
    )
    assert out.path.tolist() == [[0, 2, 4, -1, -1, -1], [0, 1, -1, -1, -1, -1]]
    assert out.counts.tolist() == [3, 2]
    assert out.tokens.tolist() == [best[0][4], best[1][1]]


def test_without_a_draft_the_token_is_sample_tokens_own(
    lane: Lane, random: torch.Generator
) -> None:
    logits = 2 * torch.randn(9, 1, 50, generator=random).to(lane.device)
    options = {"temperature": 0.8, "top_k": 20, **keys(9, lane.device)}
    options["implementation"] = lane.implementation
    expected = sample_tokens(logits[:, 0], **options)
    tree = drafted([[0]] * 9, [[-1]] * 9, lane.device)
    chain = torch.empty(9, 0, dtype=torch.int64, device=lane.device)
    for out in (verify_tree(tree, logits, **options), verify_chain(chain, logits, **options)):
        assert torch.equal(out.tokens, expected)
        assert out.path.tolist() == [[0]] * 9
