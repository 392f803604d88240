"""What tests of token verification share: trees, keys, and the rules in their own words."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdvg_kernels import TokenTree
from sdvg_kernels.verify import reference


class Warped(NamedTuple):
    """How a test processes logits, as the ops' keywords."""

    uncond: Tensor | None = None
    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0


class Lender(NamedTuple):
    """LANTERN's and LANTERN++'s bounds and table."""

    table: Tensor
    delta: float = 1.0
    ratio: float = math.inf


def keys(batch: int, device: str = "cpu", seed: int = 7) -> dict[str, Tensor]:
    """Return keys that differ between sequences."""
    return {
        "seeds": torch.full((batch,), seed - 2**40, device=device),
        "sequences": torch.arange(batch, device=device) // 3,
        "positions": torch.arange(batch, dtype=torch.int32, device=device) % 3 + 1000,
    }


def on(device: str, tree: TokenTree) -> TokenTree:
    """Return `tree` on `device`."""
    return TokenTree(*(field.to(device) for field in tree))


def random_trees(logits: Tensor, random: torch.Generator, likeliest: int = 3) -> TokenTree:
    """Return trees for `logits` [B, N, V], some padded: their tokens are among the likeliest."""
    batch, nodes, _ = logits.shape
    parents = torch.full((batch, nodes), -1)
    first, sibling = torch.full_like(parents, -1), torch.full_like(parents, -1)
    tokens = torch.zeros_like(parents)
    for b in range(batch):
        size = nodes - (b % 3 if nodes > 3 else 0)
        draws = torch.rand(nodes, generator=random)
        last: dict[int, int] = {}
        for node, parent in enumerate(sorted(int(draws[i] * i) for i in range(1, size)), 1):
            parents[b, node] = parent
            (sibling[b] if parent in last else first[b])[last.get(parent, parent)] = node
            last[parent] = node
            tokens[b, node] = logits[b, parent].topk(likeliest).indices[node % likeliest]
    made = TokenTree.from_parents(tokens, [min(node, 1) - 1 for node in range(nodes)])
    links = {"parents": parents, "first_child": first, "next_sibling": sibling}
    return made._replace(**{name: field.int() for name, field in links.items()})


def distribution(logits: Tensor, uncond: Tensor | None, warp: Warped) -> Tensor:
    """Return a row's processed distribution in float64, by the words of the contract."""
    x = logits.float().cpu()
    if uncond is not None:
        u = uncond.float().cpu()
        x = u + torch.tensor(warp.guidance, dtype=torch.float32) * (x - u)
    if warp.temperature == 0:
        return torch.nn.functional.one_hot((x == x.max()).nonzero()[0, 0], len(x)).double()
    kept = torch.ones_like(x, dtype=torch.bool)
    if warp.top_k is not None:
        kept &= x >= x.sort(descending=True).values[min(warp.top_k, len(x)) - 1]
    p = (x.double() / warp.temperature).masked_fill(~kept, -torch.inf).softmax(0)
    if warp.top_p < 1:
        above = torch.stack([p[x > value].sum() for value in x])
        p = p.masked_fill(above >= warp.top_p, 0)
    return p / p.sum()


def one_by_one(
    p: Tensor, children: list[int], coin: float, lender: Lender | None = None
) -> tuple[int | None, Tensor]:
    """Try each child with a coin of its own: return (which one is accepted, what is left of p).

    After a rejection p is renormalised, and what is left of the coin is uniform again.
    """
    p, left, moved = p.clone(), 1.0, 0.0
    for i, x in enumerate(children):
        share, lent = p[x].item(), []
        if lender is not None:
            bound = min((lender.delta - moved) / left, (lender.ratio - 1) * share if share else 0)
            if lender.ratio == math.inf:
                bound = (lender.delta - moved) / left
            mass = 0.0
            for other in lender.table[x].tolist():
                chance = p[other].item() if other != x and 0 <= other < len(p) else 0.0
                if mass + chance > bound:
                    break
                mass += chance
                lent.append(other)
            share += mass
            moved += mass * left
        if share > 0 and coin <= share:
            return i, p
        coin = (coin - share) / (1 - share)
        p[[x, *(other for other in lent if 0 <= other < len(p))]] = 0
        left *= 1 - share
        p /= p.sum()
    return None, p


def walked(
    tree: TokenTree,
    logits: Tensor,
    keyed: dict[str, Tensor],
    warp: Warped,
    depth: int,
    lender: Lender | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Return (paths, tokens) of trees on the CPU, sequence by sequence and child by child."""
    paths, tokens = [], []
    for b in range(len(logits)):
        key = reference.Keys(*(value[b : b + 1].cpu() for value in keyed.values()))
        path, goes = [0], True
        while goes:
            node, level = path[-1], len(path) - 1
            uncond = None if warp.uncond is None else warp.uncond[b, node]
            p = distribution(logits[b, node], uncond, warp)
            noise = key.at(torch.tensor([0]), level)
            child, children = int(tree.first_child[b, node]), []
            while child >= 0 and level < depth:
                children.append(child)
                child = int(tree.next_sibling[b, child])
            coin = reference.uniform(noise, 1, torch.device("cpu")).item()
            ids = [int(tree.tokens[b, child]) for child in children]
            taken, left = one_by_one(p, ids, coin, lender)
            goes = taken is not None
            if goes:
                path.append(children[taken])
        paths.append(path + [-1] * (depth + 1 - len(path)))
        tokens.append(int(reference.race(left.log()[None], noise, torch.tensor([-1]))))
    return paths, tokens


def p_value(seen: Tensor, chances: Tensor) -> float:
    """Return how likely counts this far from `chances` are, by Pearson's test; NaN: none came."""
    possible = chances > 0
    assert not seen[~possible].any(), "a token that cannot come"
    expected = chances[possible] * seen.sum()
    far = ((seen[possible] - expected).square() / expected).sum()
    half = torch.tensor((possible.sum().item() - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, far / 2).item()
