"""Decisions in eager PyTorch: the definition of truth, and the ops' CPU implementation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def route_blocks(
    frame_rewards: Tensor,
    first: Tensor | None,
    *,
    tau: float,
    all_first: bool,
    aggregate: str,
) -> tuple[Tensor, Tensor]:
    """Return (accept [B] bool, score [B] float32); a NaN in a row makes its score NaN: rejected."""
    if aggregate == "min":
        score = frame_rewards.float().amin(1)
    else:
        # a float64 sum rounds to the same float32 in any order
        score = frame_rewards.float().double().mean(1).float()
    accept = score >= torch.full((), tau, dtype=torch.float32, device=score.device)
    if all_first:
        accept = torch.zeros_like(accept)
    elif first is not None:
        accept = accept & ~first
    return accept, score


# --- token verification: all sequences walk down their drafts together, level by level ---

# Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_RAISES = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10

# how far from 1 the sum of given probabilities may be: they may be rounded to 8 bits each
SUM_TOLERANCE = 0.01


class Warp(NamedTuple):
    """How logits become a distribution; a `top_k` of 0 keeps all, a temperature of 0 one."""

    guidance: float
    temperature: float
    top_k: int
    top_p: float


class Keys(NamedTuple):
    """What keys the noise of each sequence, [B] each; None at temperature 0."""

    seeds: Tensor | None
    sequences: Tensor | None
    positions: Tensor | None

    def at(self, rows: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the keys of what follows the nodes of `level` in the sequences `rows`."""
        if self.seeds is None or self.sequences is None or self.positions is None:
            return None
        return self.seeds[rows], self.sequences[rows].long(), self.positions[rows].long() + level


class _Walk:
    """Where each sequence stands: its path, its last node, and whether it goes on."""

    def __init__(self, batch: int, depth: int, device: torch.device) -> None:
        self.path = torch.full((batch, depth + 1), -1, dtype=torch.int32, device=device)
        self.path[:, 0] = 0
        self.counts = torch.ones(batch, dtype=torch.int32, device=device)
        self.tokens = torch.full((batch,), -1, dtype=torch.int64, device=device)
        self.nodes = torch.zeros(batch, dtype=torch.int64, device=device)
        self.goes = torch.ones(batch, dtype=torch.bool, device=device)

    def step(self, level: int, rows: Tensor, found: Tensor, token: Tensor, bad: Tensor) -> None:
        """Go from `level` to the children `found` [R], or end with `token` [R] where that is -1."""
        # nothing may be left where a draft was never drawn from what it is said to be
        bad = bad | ((found < 0) & (token < 0))
        ends = (found < 0) | bad
        self.goes[rows[ends]] = False
        self.tokens[rows] = torch.where(bad | ~ends, -1, token)
        on, child = rows[~ends], found[~ends]
        self.nodes[on] = child
        self.counts[on] += 1
        if len(on):
            self.path[on, level + 1] = child.int()
        self.counts[rows[bad]] = 0
        self.path[rows[bad]] = -1

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (path, counts, tokens)."""
        return self.path, self.counts, self.tokens


def verify_chain(
    draft: Tensor,
    logits: Tensor,
    draft_logits: Tensor | None,
    draft_probs: Tensor | None,
    uncond: Tensor | None,
    draft_uncond: Tensor | None,
    keys: Keys,
    warp: Warp,
    *,
    depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (path, counts, tokens) by the rule of Leviathan et al."""
    batch, drafted = draft.shape
    walk = _Walk(batch, depth, logits.device)
    for level in range(min(depth, drafted) + 1):
        rows = walk.goes.nonzero()[:, 0]
        if not len(rows):
            break
        noise = keys.at(rows, level)
        left, bad = processed(logits[rows, level], _rows(uncond, rows, level), warp)
        found = torch.full_like(rows, -1)
        spare = found
        if level < min(depth, drafted):
            x = draft[rows, level].long()
            inside = (x >= 0) & (x < left.shape[1])
            x = torch.where(inside, x, 0)[:, None]
            chances = left.softmax(1)
            if warp.temperature > 0 and draft_probs is not None:
                guess = draft_probs[rows, level].double()
                total = guess.sum(1, keepdim=True)
                wrong = ~((total[:, 0] - 1).abs() <= SUM_TOLERANCE) | ~(guess >= 0).all(1)
                guess = guess / total
            elif warp.temperature > 0 and draft_logits is not None:
                guess, wrong = processed(
                    draft_logits[rows, level], _rows(draft_uncond, rows, level), warp
                )
                guess = guess.softmax(1)
            else:
                guess = torch.zeros_like(chances).scatter_(1, x, inside.double()[:, None])
                wrong = torch.zeros_like(bad)
            bad = bad | wrong
            p, q = (torch.where(inside, of.gather(1, x)[:, 0], 0) for of in (chances, guess))
            taken = (p > 0) & (uniform(noise, len(rows), left.device) * q <= p)
            found = torch.where(taken, level + 1, -1)
            left = (chances - guess).clamp(min=0).log()
            # the drafter is the target but for rounding
            spare = torch.where(p > 0, x[:, 0], -1)
        walk.step(level, rows, found, race(left, noise, spare), bad)
    return walk.result()


def verify_tree(
    tokens: Tensor,
    parents: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    logits: Tensor,
    uncond: Tensor | None,
    neighbours: Tensor | None,
    keys: Keys,
    warp: Warp,
    *,
    depth: int,
    rule: str,
    bounds: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (path, counts, tokens) by `rule`, with (delta, ratio) or (epsilon, alpha)."""
    if rule == "typical":
        return _typical(tokens, parents, logits, uncond, keys, warp, depth, *bounds)
    (batch, nodes, _), (delta, ratio), coupled = logits.shape, bounds, rule == "coupled"
    walk = _Walk(batch, depth, logits.device)
    for level in range(depth + 1):
        rows = walk.goes.nonzero()[:, 0]
        if not len(rows):
            break
        here, noise = walk.nodes[rows], keys.at(rows, level)
        left, bad = processed(logits[rows, here], _rows(uncond, rows, here), warp)
        chances = left.softmax(1)
        found, spare = torch.full_like(rows, -1), torch.full_like(rows, -1)
        if coupled:
            choice = race(left, noise, spare)
        coin = uniform(noise, len(rows), left.device)
        scanned, moved = torch.zeros_like(coin), torch.zeros_like(coin)
        child = first_child[rows, here].long() if level < depth else found
        # a child stands behind its parent and its elder siblings: a cycle ends
        elder = here
        for _ in range(nodes):
            there = (child > elder) & (child < nodes)
            elder = child = torch.where(there, child, 0)
            there &= parents[rows, child] == here
            if not there.any():
                break
            x = tokens[rows, child].long()
            inside = there & (x >= 0) & (x < left.shape[1])
            x = torch.where(inside, x, 0)
            if coupled:
                hit = inside & (x == choice)
            else:
                every = torch.arange(len(rows), device=left.device)
                stays = inside & (left[every, x] > -math.inf)
                share = torch.where(stays, chances[every, x], 0)
                bound = delta - moved
                if ratio < math.inf:
                    bound = torch.minimum(bound, (ratio - 1) * share)
                left[every[inside], x[inside]] = -math.inf
                if neighbours is not None:
                    counted, mass = _neighbourhood(neighbours, x, inside, chances, left, bound)
                    left.masked_fill_(counted, -math.inf)
                    moved += mass
                    share = share + mass
                scanned += share
                hit = (share > 0) & (coin <= scanned)
                spare = torch.where(share > 0, x, spare)
            found = torch.where(hit, child, found)
            child = torch.where(there & ~hit, next_sibling[rows, child].long(), -1)
        token = choice if coupled else race(left, noise, spare)
        walk.step(level, rows, found, token, bad)
    return walk.result()


def _typical(
    tokens: Tensor,
    parents: Tensor,
    logits: Tensor,
    uncond: Tensor | None,
    keys: Keys,
    warp: Warp,
    depth: int,
    epsilon: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (path, counts, tokens) of the longest path on which every node is typical."""
    batch, nodes, vocabulary = logits.shape
    device = logits.device
    every = torch.arange(batch, device=device)
    levels = torch.full((batch, nodes), -1, dtype=torch.int64, device=device)
    levels[:, 0] = 0
    scores = torch.zeros(batch, nodes, dtype=torch.float64, device=device)
    for node in range(nodes):
        goes = (levels[:, node] >= 0) & (levels[:, node] < depth)
        rows = goes.nonzero()[:, 0]
        below = parents[rows].long() == node
        # a parent comes before its children: a cycle is never entered
        below[:, : node + 1] = False
        if not below.any():
            continue
        row, bad = processed(logits[rows, node], _rows(uncond, rows, node), warp)
        chances = row.softmax(1)
        entropy = -torch.special.xlogy(chances, chances).sum(1)
        least = torch.clamp(alpha * (-entropy).exp(), max=epsilon)
        x = tokens[rows].long()
        inside = (x >= 0) & (x < vocabulary)
        chance = torch.where(inside, chances.gather(1, torch.where(inside, x, 0)), 0)
        typical = below & (chance > least[:, None]) & ~bad[:, None]
        level, score = (of[rows, node, None].expand(-1, nodes) for of in (levels, scores))
        levels[rows] = torch.where(typical, level + 1, levels[rows])
        scores[rows] = torch.where(typical, score + chance.log(), scores[rows])
    # of the longest the likeliest, of these the first
    longest = levels == levels.amax(1, keepdim=True)
    scores = scores.masked_fill(~longest, -math.inf)
    last = (scores == scores.amax(1, keepdim=True)).to(torch.uint8).argmax(1)
    path = torch.full((batch, depth + 1), -1, dtype=torch.int32, device=device)
    counts, node = levels[every, last].int() + 1, last
    for level in range(min(depth, nodes - 1), -1, -1):
        on = counts > level
        path[:, level] = torch.where(on, node, -1).int()
        node = torch.where(on & (level > 0), parents[every, node].long(), node)
    left, bad = processed(logits[every, last], _rows(uncond, every, last), warp)
    noise = None
    if keys.seeds is not None:
        noise = keys.seeds, keys.sequences.long(), keys.positions.long() + counts - 1
    token = torch.where(bad, -1, race(left, noise, torch.full_like(last, -1)))
    path[bad] = -1
    return path, torch.where(bad, 0, counts).int(), token


def _neighbourhood(
    neighbours: Tensor, x: Tensor, inside: Tensor, chances: Tensor, left: Tensor, bound: Tensor
) -> tuple[Tensor, Tensor]:
    """Return which tokens [R, V] lend `x` their chance, and how much that is [R].

    They are the first neighbours of `x` whose chances sum to at most `bound`.
    """
    vocabulary = left.shape[1]
    ids = neighbours.view(torch.int16) if neighbours.dtype == torch.uint16 else neighbours
    ids = ids[x].long()
    if neighbours.dtype == torch.uint16:
        ids = ids & 0xFFFF
    valid = (ids >= 0) & (ids < vocabulary) & inside[:, None]
    ids = torch.where(valid, ids, 0)
    stays = valid & (left.gather(1, ids) > -math.inf)
    mass = torch.where(stays, chances.gather(1, ids), 0)
    counted = valid & (mass.cumsum(1) <= bound[:, None])
    # what is not counted goes to a place more
    lends = torch.zeros(len(x), vocabulary + 1, dtype=torch.bool, device=x.device)
    lends.scatter_(1, torch.where(counted, ids, vocabulary), True)
    return lends[:, :vocabulary], torch.where(counted, mass, 0).sum(1)


def _rows(logits: Tensor | None, rows: Tensor, nodes: Tensor | int) -> Tensor | None:
    return None if logits is None else logits[rows, nodes]


# --- rows and noise: those of `sample_tokens`, whose reference another op may not import ---


def processed(logits: Tensor, uncond: Tensor | None, warp: Warp) -> tuple[Tensor, Tensor]:
    """Return the logits [R, V] float64 of what may come, -inf elsewhere; and where none may."""
    x = logits.float()
    if uncond is not None:
        u = uncond.float()
        scale = torch.full((), warp.guidance, dtype=torch.float32, device=x.device)
        x = torch.where(x == -math.inf, x, u + scale * (x - u))
    bad = x.isnan().any(1) | x.amax(1).isinf()
    x = x.masked_fill(bad[:, None], 0)
    if warp.temperature == 0:
        best = (x == x.amax(1, keepdim=True)).to(torch.uint8).argmax(1, keepdim=True)
        return torch.full_like(x, -math.inf, dtype=torch.float64).scatter_(1, best, 0), bad
    if warp.top_k:
        x = x.masked_fill(x < x.topk(warp.top_k, 1).values[:, -1:], -math.inf)
    scaled = x.double() / warp.temperature
    if warp.top_p < 1:
        ordered = scaled.sort(1, descending=True).values
        mass = (ordered - ordered[:, :1]).exp().cumsum(1)
        # the first place where the mass, its own included, reaches top_p
        last = (mass < warp.top_p * mass[:, -1:]).sum(1, keepdim=True).clamp(max=x.shape[1] - 1)
        scaled = scaled.masked_fill(scaled < ordered.gather(1, last), -math.inf)
    return scaled, bad


def race(left: Tensor, noise: tuple[Tensor, Tensor, Tensor] | None, spare: Tensor) -> Tensor:
    """Return the winner [R] of an exponential race of the logits `left`; `spare` where all left."""
    if noise is not None:
        bits = _philox(*noise, (left.shape[1] + 3) // 4, 0)[:, : left.shape[1]]
        # 1 - u, exactly, for the uniform u = (bits + 1/2) / 2^32
        left = left - (-((_WORD - bits).double().add(0.5) * 2.0**-32).log()).log()
    best = left.amax(1, keepdim=True)
    return torch.where(best[:, 0] > -math.inf, (left == best).to(torch.uint8).argmax(1), spare)


def uniform(noise: tuple[Tensor, Tensor, Tensor] | None, rows: int, device: torch.device) -> Tensor:
    """Return the coin [R] float64 in (0, 1) of each row; without noise all is certain: 1/2."""
    if noise is None:
        return torch.full((rows,), 0.5, dtype=torch.float64, device=device)
    return (_philox(*noise, 1, 1)[:, 0].double() + 0.5) * 2.0**-32


def _philox(seeds: Tensor, sequences: Tensor, positions: Tensor, blocks: int, use: int) -> Tensor:
    """Return words [R, 4 * blocks] int64 of the counters (block, position, sequence, use)."""
    counter = torch.arange(blocks, device=seeds.device)
    # [R, blocks]
    zero = torch.zeros_like(seeds[:, None] + counter)
    c0, c1, c2, c3 = (
        zero + counter,
        zero + (positions & _WORD)[:, None],
        zero + (sequences & _WORD)[:, None],
        zero + use,
    )
    key = [seeds[:, None] & _WORD, (seeds[:, None] >> 32) & _WORD]
    for _ in range(_ROUNDS):
        # a product of two words fills 64 bits, sign included: the shift brings copies of it in
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _WORD) ^ c1 ^ key[0], second & _WORD
        c2, c3 = ((first >> 32) & _WORD) ^ c3 ^ key[1], first & _WORD
        key = [(word + raised) & _WORD for word, raised in zip(key, _RAISES, strict=True)]
    return torch.stack((c0, c1, c2, c3), -1).flatten(1)
